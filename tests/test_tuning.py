"""CoOp, MaPLe, visual learning, late losses: golden vectors, a naive twin, batched equals alone, refusals."""
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import HERE, same
from safetensors.torch import load_file
from test_train import QUIET, part_of, rows_of, toy_episodes

import clip_min
import train
from data import generator
from train import Learner, Recipe, UsageError, adapt

TINY = load_file(HERE / "golden" / "clip_openai_tiny.safetensors")


def test_maple_golden():
    """The authors' features, through the part's own hooks on both towers."""
    golden = load_file(HERE / "golden" / "maple.safetensors")
    clip = clip_min.from_weights({n[8:]: t for n, t in TINY.items() if n.startswith("weights.")})
    ids = golden["token_ids"].clone()
    ids[:, 1:3] = ids[0, 1:3]                                             # the vectors replace them anyway
    learner = Learner(clip, ids[None], "maple", replace(Recipe(), maple_depth=2))
    maple, = learner.parts
    maple.prompts.data[0] = golden["context"]
    maple.weight.data[0] = golden["proj_weight"].mT
    maple.bias.data[0, :, 0] = golden["proj_bias"]
    _, text = learner.text()
    same(text[0], golden["text_features"])
    same(learner.backbone.visual(golden["images"], learner.hook(text)), golden["image_features"])


def naive_maple(clip, support, labels, ids, r, seed):
    """Losses of one episode with MaPLe written out: row by row, a block's vectors apart, SGD by hand."""
    c, g = clip.config, generator("learner", seed)
    depth, width, wide = min(9, c.text_layers), c.text_width, c.vision_width
    deeper = 0.02 * torch.randn(depth - 1, 2, width, generator=g)
    prompts = [clip.token_embedding.weight[ids[0, 1:3]], *deeper]
    weights = list(torch.empty(depth, width, wide).uniform_(-width ** -0.5, width ** -0.5, generator=g))
    biases = list(torch.empty(depth, 1, wide).uniform_(-width ** -0.5, width ** -0.5, generator=g))
    learned = [p.clone().requires_grad_() for p in (*prompts, *weights, *biases)]
    prompts, weights, biases = learned[:depth], learned[depth: 2 * depth], learned[2 * depth:]
    speeds, losses = [torch.zeros_like(p) for p in learned], []

    def replace_words(x, layer):
        if layer >= depth:
            return x
        vectors = prompts[layer] + (clip.positional_embedding[1:3] if layer == 0 else 0)
        return torch.stack([torch.cat([row[:1], vectors, row[3:]]) for row in x])

    def add_patches(x, layer):
        if layer >= depth:
            return x
        vectors = F.linear(prompts[layer], weights[layer].T, biases[layer][0])
        vectors, kept = (clip.visual.ln_pre(vectors), x) if layer == 0 else (vectors, x[:, :-2])
        return torch.stack([torch.cat([row, vectors]) for row in kept])
    for _ in range(r.steps):
        text, f = clip.encode_text(ids, replace_words), clip.visual(support, add_patches)
        cosine = F.cosine_similarity(f[:, None], text[None], dim=-1)
        loss = -(100 * cosine).log_softmax(1)[torch.arange(len(f)), labels].mean()
        losses.append(loss.item())
        for p, speed, grad in zip(learned, speeds, torch.autograd.grad(loss, learned)):
            speed.mul_(0.9).add_(grad + 5e-4 * p.detach())
            p.data -= 0.0035 * speed
    return torch.tensor(losses)


def test_five_steps_of_maple_equal_the_episode_written_out(toy):
    clip, tokenizer = toy
    support, labels, _, names = toy_episodes(1, shot=2)
    ids, recipe = rows_of(tokenizer, names), replace(Recipe(), steps=5)
    ours = adapt(clip, support, labels, ids, "maple", recipe, seeds=[7])
    cut = ids[0][:, : int(ids.argmax(-1).max()) + 1]
    same(ours.losses[:, 0], naive_maple(clip, support[0], labels[0], cut, recipe, 7), 1e-4)
    assert ours.losses[4] < ours.losses[0]


@pytest.mark.parametrize("method", ["svl", "ra-only", "lv", "maple+svl"])
def test_late_losses_batched_equal_alone(toy, method):
    clip, tokenizer = toy[0], toy[1]
    support, labels, _, names = toy_episodes(2)
    ids, recipe = rows_of(tokenizer, names), replace(Recipe(), steps=4, dropout=0.0, extra_last=True)
    together = adapt(clip, support, labels, ids, method, recipe, seeds=[5, 6])
    for e in range(2):
        alone = adapt(clip, support[e:e + 1], labels[e:e + 1], ids[e:e + 1], method, recipe, seeds=[5 + e])
        same(together.losses[:, e], alone.losses[:, 0], 1e-4)


@pytest.mark.parametrize("share, early, late", [
    (0.6, range(3), range(2, 5)), (0.55, range(3), range(2, 5)), (0.0, (), ()), (1.0, range(5), range(5))])
def test_the_steps_in_which_a_loss_acts(toy, share, early, late):
    ids = rows_of(toy[1], toy_episodes(1)[3])
    for last, acting in ((False, early), (True, late)):
        recipe = replace(Recipe(), steps=5, extra_share=share, extra_last=last)
        part = Learner(toy[0], ids, "lv", recipe).parts[1]
        progress = [part.progress(number) for number in range(5)]
        assert [p is not None for p in progress] == [number in acting for number in range(5)]
        if acting:
            wanted = [i / (5 * share) for i in range(len(acting))]
            assert [progress[number] for number in acting] == pytest.approx(wanted)


def test_lv_draws_a_class_together_and_svl_apart(toy):
    """Features of a class end closer to each other with visual learning than without, less close with SVL."""
    clip, tokenizer = toy
    support, labels, _, names = toy_episodes(2, shot=2)
    recipe = replace(Recipe(), steps=5, dropout=0.0, lr=1e-3, lv_weight=1.0, svl_weight=1.0, scale=10.0)
    ids = rows_of(tokenizer, names)
    tight = []
    for method in ("lv", "clip-lora", "svl-only"):
        learner = adapt(clip, support, labels, ids, method, recipe)
        with torch.no_grad():
            f = learner.features(support, learner.text_and_hook[1]).view(2, 5, 2, -1)           # (E, N, shot, embed)
        tight.append((f[:, :, 0] * f[:, :, 1]).sum(-1).mean().item())
    assert tight[0] > tight[1] > tight[2]


def test_coop_learns_its_context_alone(toy):
    clip, tokenizer = toy
    support, labels, _, names = toy_episodes(1)
    ids = rows_of(tokenizer, names)
    learner = adapt(clip, support, labels, ids, "coop", replace(Recipe(), **QUIET))
    words = clip.token_embedding(ids[:, 0, 1:5])                          # "a photo of a"
    assert list(learner.learned()) == ["parts.0.context"]
    moved = (part_of(learner, "context") - words).norm() / words.norm()
    assert 0 < moved < 0.5, "it starts from the prompt's own words"


@pytest.mark.parametrize("method", ["coop+svl", "coop+svl-only", "coop+ra-only", "coop+lv", "coop+tir+svl"])
def test_a_loss_on_pictures_is_refused_where_their_features_cannot_change(toy, method):
    with pytest.raises(UsageError, match=re.escape(f"{method}: its loss acts on picture features")):
        Learner(toy[0], rows_of(toy[1], toy_episodes(1)[3]), method, Recipe())


@pytest.mark.parametrize("method, field, most", [("coop", "context", 7), ("maple", "maple_prompts", 7)])
def test_vectors_that_would_replace_class_names_are_refused(toy, method, field, most):
    ids = torch.arange(1, 21).expand(1, 5, 20).clone()
    ids[0, :, 1 + most] = torch.arange(30, 35)                            # seven words that all classes share
    assert Learner(toy[0], ids, method, replace(Recipe(), **{field: most})).parts
    with pytest.raises(UsageError, match="8 learned vectors would replace class names: give a --prompt with"):
        Learner(toy[0], ids, method, replace(Recipe(), **{field: most + 1}))


def test_the_command_line_says_so_in_one_line(capsys, tmp_path):
    line = "--dataset toy --episodes 1 --steps 1 --method".split()
    for given, word in ((["maple", "--prompt", "{}"], "class names"), (["coop+svl"], "picture features")):
        assert train.main([*line, *given, "--out", str(tmp_path)]) == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith("train.py: error: ") and word in last


def test_maple_in_text_and_vision_alike_is_kept_and_read_back(toy):
    """What is learned is every tensor that moved, and logits follow it."""
    clip, tokenizer = toy
    support, labels, query, names = toy_episodes(1)
    learner = adapt(clip, support, labels, rows_of(tokenizer, names), "maple", replace(Recipe(), **QUIET))
    assert sorted(learner.learned()) == ["parts.0.bias", "parts.0.prompts", "parts.0.weight"]
    again = Learner(clip, rows_of(tokenizer, names), "maple", learner.recipe).requires_grad_(False)
    again.load_state_dict(learner.learned(), strict=False)
    assert torch.equal(again.logits(query), learner.logits(query)) and math.isfinite(learner.losses.sum())
