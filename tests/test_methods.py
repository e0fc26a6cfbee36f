"""The ideas of atha.py: golden vectors, episodes in plain loops, batched and alone, all backbones."""
import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import naive
import pytest
import torch
import torch.nn.functional as F
from conftest import HERE, same
from safetensors.torch import load_file, save_file
from torch import nn

import atha
import clip_min
from atha import LoRA, atha_step, mark_top, ra_loss, svl_loss, text_to_tokens, tir_step
from train import METHODS, Learner, Recipe, UsageError, adapt, recipe_for, start

VECTORS = load_file(HERE / "golden" / "methods.safetensors")
RECIPES = ["paper", "released-atha", "released-svl"]
JOINED = ["atha+tir", "tir+svl", "coop+svl", "coop+ra-only"]


def case(prefix):
    return {name[len(prefix) + 1:]: x for name, x in VECTORS.items() if name.startswith(prefix + ".")}


def norm_of(c):
    norm = nn.LayerNorm(len(c["ln_weight"]))
    norm.load_state_dict({"weight": c["ln_weight"], "bias": c["ln_bias"]})
    return norm.requires_grad_(False)


def made_episodes(clip, count=2):
    """Noise as support and queries (E, 3, 3, S, S), of three ways; labels (E, 3); token rows (E, 3, 12)."""
    g, size, end = torch.Generator().manual_seed(0), clip.config.image, clip.config.vocab - 1
    ids = torch.randint(1, 90, (count, 3, 12), generator=g)
    ids[..., :5], ids[..., 8] = torch.tensor([end - 1, 40, 41, 42, 43]), end
    images = torch.randn(count, 6, 3, size, size, generator=g).to(clip.visual.proj.dtype)
    labels = torch.arange(3).expand(count, -1)
    return images[:, 3:], labels, ids, images[:, :3]


def equals_alone(clip, method, recipe):
    """The second of two episodes learns and answers as it does without the first, to float64's rounding."""
    clip = copy.deepcopy(clip).double()
    support, labels, ids, query = made_episodes(clip)
    both = adapt(clip, support, labels, ids, method, recipe, seeds=[5, 6])
    alone = adapt(clip, support[1:], labels[1:], ids[1:], method, recipe, seeds=[6])
    assert torch.allclose(both.losses[:, 1:], alone.losses, rtol=1e-5)
    for name, learned in alone.learned().items():
        same(both.learned()[name][1:], learned)
    same(both.logits(query)[1:], alone.logits(query[1:]))
    return both


# --------------------------------------------------------------------------------------------------- formulas

def test_golden_vectors():
    for c in map(case, ("atha.0", "atha.1", "atha.2", "atha.3")):
        rho, gamma = c["ratio_head"].item(), c["ratio_tail"].item()
        same(atha_step(c["tokens"], c["text"], c["alpha"], c["beta"], rho, gamma), c["out"])
    for c in map(case, ("tir.0", "tir.1")):
        same(tir_step(c["tokens"], c["text"], norm_of(c), c["proj"], c["top_ratio"].item()), c["out"])
    c = case("prototypes")
    for recipe in ("paper", "released"):
        same(text_to_tokens(c["text"], c["proj"], norm_of(c), recipe), c[recipe])


@pytest.mark.parametrize("episodes", [None, 2])
def test_golden_losses(episodes):
    c = case("svl")
    if episodes:
        c = {name: torch.stack([x] * episodes) for name, x in c.items()}
    same(svl_loss(c["features"], c["labels"], c["shuffled_index"], 100), c["loss_ad"])
    f, plain, text = (F.normalize(c[name], dim=-1) for name in ("features", "plain_features", "text"))
    share = c["fuse_weight"].view(-1)[0]
    fused = atha.fuse_relations(c["previous_relation"], text, c["labels"], c["plain_labels"], share)
    same(ra_loss(f @ plain.mT, fused), c["loss_ra_released"])
    same(ra_loss(f @ plain.mT, fused, "softmax"), c["loss_ra_paper"])


@pytest.mark.parametrize("ways", [1, 2, 5, 9])
def test_tir_s_weights_by_how_many_classes_mark_a_token(ways):
    marks = torch.tril(torch.ones(ways + 1, ways), -1)[None]              # token i is marked by i classes
    weights, simple = (rule(marks)[0].tolist() for rule in (atha.tir_weights, atha.tir_weights_simple))
    if ways > 1:
        line = [2 - 2 * (count - 1) / (ways - 1) for count in range(1, ways + 1)]        # from 2 to 0
        assert weights == pytest.approx([1, *line]) and simple == [1, 2, *[1] * (ways - 2), 0]
    assert weights[0] == simple[0] == 1


def test_shares_of_tokens_are_rounded_down_and_names_of_recipes_read():
    for share, length, count in ((0.1, 196, 19), (0.29, 100, 29), (0.1, 9, 0), (1.0, 7, 7)):
        assert mark_top(torch.rand(2, length), share).sum(1).tolist() == [count, count]
    with pytest.raises(ValueError, match="no recipe 'ours'"):
        text_to_tokens(torch.ones(2, 3), torch.ones(4, 3), recipe="ours")
    with pytest.raises(ValueError, match="no recipe 'paper'"):
        ra_loss(torch.ones(2, 2), torch.ones(2, 2), "paper")


def test_formulas_are_what_they_are_under_autocast_and_choices_made_in_float32():
    torch.manual_seed(0)
    tokens, text, proj = torch.randn(4, 300, 64), torch.randn(5, 32), torch.randn(64, 32)
    norm, texts = nn.LayerNorm(64), text_to_tokens(text, proj)
    f, y = F.normalize(text, dim=-1), torch.arange(5)

    def formulas():
        return (atha_step(tokens, texts, 0.8, 0.1), tir_step(tokens, text, norm, proj),
                text_to_tokens(text, proj), svl_loss(f, y, y, 100),
                atha.fuse_relations(torch.ones(5, 5), f, y, y, 0.5), atha.linear_cka(*tokens[:2]))
    exact = formulas()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(exact, formulas()))
    low = [x.bfloat16() for x in (tokens, text, proj)]
    marks = atha.tir_marks(low[0].float(), low[1].float(), norm, low[2].float())
    assert torch.equal(atha.tir_marks(*low[:2], norm.bfloat16(), low[2]), marks)
    assert atha_step(low[0], texts, 0.8, 0.1).dtype == torch.bfloat16


def test_cka_of_identical_rotated_and_independent_features():
    torch.manual_seed(0)
    x, rotation = torch.randn(400, 8), torch.linalg.qr(torch.randn(8, 8)).Q
    values = atha.linear_cka(x, torch.stack([x, 3 * x @ rotation + 1, torch.randn(400, 8)]))
    assert values[:2].tolist() == pytest.approx([1, 1]) and values[2] < 0.05


def test_visual_learning_is_cross_entropy_against_class_means():
    torch.manual_seed(0)
    f, labels = F.normalize(torch.randn(2, 5, 5), dim=-1), torch.tensor([[0, 0, 1, 2, 1], [2, 1, 0, 2, 2]])
    for e in range(2):
        means = F.normalize(torch.stack([f[e, labels[e] == c].mean(0) for c in range(3)]), dim=-1)
        same(atha.lv_loss(3 * f, labels, 3, 7)[e], F.cross_entropy(7 * f[e] @ means.T, labels[e]))


# ------------------------------------------------------------------------------------------------------- LoRA

def test_lora_adds_a_scaled_product_an_episode(tmp_path):
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 12), torch.randn(6, 5, 24)
    lora, frozen = LoRA(linear, rank=16, alpha=8, dropout=0.5, episodes=3).eval(), linear.weight.clone()
    assert torch.equal(lora(x), linear(x)) and not linear.weight.requires_grad
    assert lora.A.std().item() == pytest.approx((1 / 3 / 24) ** 0.5, rel=0.1), "Kaiming uniform, a = sqrt(5)"
    lora.B.data.normal_()
    for i in range(6):
        e = i // 2
        same(lora(x)[i], linear(x[i]) + 8 / math.sqrt(16) * x[i] @ lora.A[e].T @ lora.B[e].T)
        same(lora.merged(e)(x[i]), lora(x)[i])
    assert torch.equal(linear.weight, frozen), "merged in a copy"
    assert not torch.equal(lora.train()(x), lora(x)), "dropout"
    save_file(lora.state_dict(), tmp_path / "lora.safetensors")           # takes contiguous tensors alone


@pytest.mark.parametrize("p", [0.25, 0.1])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = atha.dropout(torch.ones(1000, 1001), p, training=True)
    dropped = (x == 0).float() - p
    assert dropped.mean().abs() < 3e-3 and x.max().item() == pytest.approx(1 / (1 - p))
    assert (dropped[:, :-1] * dropped[:, 1:]).mean().abs() < 1e-3, "neighbours are independent"
    assert atha.dropout(x, p, training=False) is x


# --------------------------------------------------------------------------------------------- whole episodes

VARIANTS = {"": {}, "text": {"lora": "text"}, "softmax": {"ra": "softmax"}, "mini": {"minibatch": 3}}
ALONE = [*METHODS[1:], *JOINED, "clip-lora text", "svl text", "svl softmax", "ra-only mini"]
WRITTEN = [("paper", m) for m in ALONE if m not in ("maple", "lv")]
WRITTEN += [(name, m) for name in RECIPES[1:] for m in ("atha", "tir", "svl")]


@pytest.mark.parametrize("name, method", WRITTEN)
def test_an_episode_equals_the_one_in_plain_loops(toy, name, method):
    method, _, variant = method.partition(" ")
    r = replace(recipe_for(name, method), steps=3, dropout=0.0, cosine=0.0, prompt_schedule=False)
    r = replace(r, **VARIANTS[variant])
    clip, g = copy.deepcopy(toy[0]).double(), torch.Generator().manual_seed(0)
    support, labels, ids, query = made_episodes(clip, count=1)
    images, picks = torch.cat([support, support.flip(-1)], 1), torch.randint(6, (3, 3), generator=g)
    towers = {"both": ("visual", "transformer"), "vision": ("visual",), "text": ("transformer",)}[r.lora]
    A = {path: torch.rand(16, layer.in_features, generator=g).double() / 9
         for path, layer in clip.named_modules() if "coop" not in method and path.startswith(towers)
         and path.endswith(("q_proj", "k_proj", "v_proj"))}
    ours = adapt(clip, support, labels, ids, method, r, lambda _: (images, labels.repeat(1, 2)),
                 lora_A=A, picks=picks)
    y, ids = labels[0].tolist(), clip.trim(ids)[0]
    losses, logits = naive.adapt(clip, lambda _: (images[0], y * 2), support[0], y, ids, method, r, A, picks)
    same(ours.losses[:, 0], losses, 1e-6)
    same(ours.logits(query)[0], logits(query[0]))
    assert losses[0] != losses[2], "something is learned"


@pytest.mark.parametrize("method", [*METHODS, *JOINED, "maple+svl", "maple+atha+tir"])
@pytest.mark.parametrize("name", RECIPES)
def test_batched_equals_alone(toy, method, name):
    equals_alone(toy[0], method, replace(recipe_for(name, method), steps=2, dropout=0.0))


@pytest.mark.parametrize("method", ["clip-lora", "svl", "atha", "tir", "coop", "maple", "lv"])
@pytest.mark.parametrize("backbone", ["hf-clip-gelu", "open_clip-pe-core", "hf-siglip2"])
def test_every_method_on_every_backbone(backbone, method):
    if backbone == "hf-siglip2":
        pytest.importorskip("tokenizers", reason="SigLIP's text needs the package tokenizers")
    clip, _ = clip_min.load(HERE / "golden" / "backbones" / backbone)
    recipe = replace(Recipe(), context=2, steps=2, dropout=0.0, lora="both", extra_last=True)
    if method == "maple" and backbone != "hf-clip-gelu":
        with pytest.raises(UsageError, match="CLIP's own towers alone"):
            equals_alone(clip, method, recipe)
        return
    learner = equals_alone(clip, method, recipe)
    assert learner.losses[0].ne(learner.losses[1]).all(), "something is learned"
    if method in ("atha", "tir"):
        recipe = replace(recipe, alpha_block=0, rho=1.0, tir_blocks=(0,))
        learner = Learner(clip, made_episodes(clip)[2][:1], method, recipe)
        tokens = torch.randn(30, 17, clip.config.vision_width)
        changed = (learner.hook(learner.text()[1])(tokens, 0) != tokens).any(-1).any(0)
        assert changed[0] == (backbone == "hf-siglip2") and changed[1:].all(), "[CLS] stays, if any"


def test_maple_golden():
    """The authors' features, through the part's own hooks on both towers."""
    names = "maple", "clip_openai_tiny"
    golden, weights = (load_file(HERE / "golden" / f"{name}.safetensors") for name in names)
    clip = clip_min.from_weights({name[8:]: x for name, x in weights.items() if name.startswith("weights.")})
    ids = golden["token_ids"].clone()
    ids[:, 1:3] = ids[0, 1:3]                                             # the vectors replace them anyway
    learner = Learner(clip, ids[None], "maple", replace(Recipe(), maple_depth=2))
    maple, = learner.parts
    maple.prompts.data[0], maple.weight.data[0] = golden["context"], golden["proj_weight"].mT
    maple.bias.data[0, :, 0] = golden["proj_bias"]
    _, text = learner.text()
    same(text[0], golden["text_features"])
    same(learner.clip.visual(golden["images"], learner.hook(text)), golden["image_features"])


def test_the_caller_s_clip_stays_and_without_a_step_answers_are_its_own(toy):
    before, (support, labels, ids, query) = copy.deepcopy(toy[0].state_dict()), made_episodes(toy[0])
    recipe = recipe_for("released-atha", "atha")
    first, _ = (adapt(toy[0], support, labels, ids, method, replace(recipe, steps=2))
                for method in ("atha+tir", "maple+svl"))
    assert list(before) == list(toy[0].state_dict())
    assert all(torch.equal(x, before[name]) for name, x in toy[0].state_dict().items())
    tuned, frozen = (adapt(toy[0], support, labels, ids, method, replace(recipe, steps=0)).logits(query)
                     for method in ("clip-lora", "zero-shot"))
    assert torch.equal(tuned, frozen) and not torch.equal(first.logits(query), frozen)


# ------------------------------------------------------------------------------------------------------ parts

@pytest.mark.parametrize("share, count", [(0.6, 3), (0.55, 3), (0.0, 0), (1.0, 5)])
def test_the_steps_in_which_a_loss_acts(share, count):
    for last, first in ((False, 0), (True, 5 - count)):
        part = atha.LV(None, None, SimpleNamespace(steps=5, extra_share=share, extra_last=last), set())
        progress = {number: x for number in range(5) if (x := part.progress(number)) is not None}
        assert progress == {first + i: pytest.approx(i / (5 * share)) for i in range(count)}


def test_prompts_start_as_words_and_deeper_projections_as_copies_of_one(toy):
    ids = made_episodes(toy[0])[2]
    deep = clip_min.CLIP(replace(toy[0].config, text_layers=4))
    seeds = range(len(ids))
    coop, maple = (start(deep, ids, method, Recipe(), seeds, 3).parts[0] for method in ("coop", "maple"))
    words = deep.token_embedding(ids[:, 0])
    assert torch.equal(coop.context, words[:, 1:5]) and torch.equal(maple.prompts[:, 0], words[:, 1:3])
    assert maple.prompts[:, 1:].std().item() == pytest.approx(0.02, rel=0.1)
    for p in (maple.weight, maple.bias):
        assert torch.equal(p[:, 1], p[:, 3])
        assert not torch.equal(p[:, 0], p[:, 1]) and not torch.equal(p[0], p[1])
    for method, field in (("coop", "context"), ("maple", "maple_prompts")):
        with pytest.raises(UsageError, match="5 learned vectors would replace class names"):
            Learner(deep, ids, method, replace(Recipe(), **{field: 5}))
