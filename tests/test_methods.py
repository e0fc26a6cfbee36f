"""The formulas of atha.py against golden vectors of the released code, naive twins, and cases whose value is known."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import HERE, same
from safetensors.torch import load_file
from torch import nn

import atha
from atha import (LoRA, Probe, add_lora, atha_step, compare, domain_similarity, gap_shift, linear_cka, lv_loss, mask_sinks,
                  modality_gap, ra_loss, svl_loss, text_to_tokens, tir_step, tir_weights, tir_weights_simple)
from train import Recipe

VECTORS = load_file(HERE / "golden" / "methods.safetensors")


def case(prefix):
    return {name[len(prefix) + 1:]: tensor for name, tensor in VECTORS.items() if name.startswith(prefix + ".")}


def layer_norm(weight, bias):
    norm = nn.LayerNorm(len(weight))
    norm.load_state_dict({"weight": weight, "bias": bias})
    return norm.requires_grad_(False)


# ------------------------------------------------------------------------------------------------ golden vectors

@pytest.mark.parametrize("k", range(4))
def test_atha_golden(k):
    c = case(f"atha.{k}")
    same(atha_step(c["tokens"], c["text"], c["alpha"], c["beta"], c["ratio_head"].item(), c["ratio_tail"].item()), c["out"])


@pytest.mark.parametrize("k", range(2))
def test_tir_golden(k):
    c = case(f"tir.{k}")
    same(tir_step(c["tokens"], c["text"], layer_norm(c["ln_weight"], c["ln_bias"]), c["proj"], c["top_ratio"].item()), c["out"])


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_class_texts_to_token_space_golden(recipe):
    c = case("prototypes")
    same(text_to_tokens(c["text"], c["proj"], layer_norm(c["ln_weight"], c["ln_bias"]), recipe), c[recipe])


@pytest.mark.parametrize("stacked", [False, True])
def test_svl_and_ra_golden(stacked):
    c = case("svl")
    if stacked:                                                           # the same with an episode axis
        c = {name: torch.stack([x, x]) for name, x in c.items()}
    same(svl_loss(c["features"], c["labels"], c["shuffled_index"], 100), c["loss_ad"])
    f, g, t = (F.normalize(c[name], dim=-1) for name in ("features", "plain_features", "text"))
    relation = f @ g.mT
    of_text = torch.stack([x[a][:, None] * x[b] for x, a, b in zip(t.view(-1, 5, 32), c["labels"].view(-1, 50), c["plain_labels"].view(-1, 10))]).sum(-1)
    weight = c["fuse_weight"].view(-1)[0]
    fused = weight * c["previous_relation"] + (1 - weight) * of_text.view_as(relation)
    for recipe in ("paper", "released"):
        same(ra_loss(relation, fused, recipe), c[f"loss_ra_{recipe}"])


# ------------------------------------------------------------------------------------------- which tokens, how much

@pytest.mark.parametrize("share, length, count", [(0.1, 196, 19), (0.3, 196, 58), (0.29, 100, 29), (0.1, 9, 0), (1.0, 7, 7)])
def test_number_of_chosen_tokens_is_the_floor(share, length, count):
    assert atha.count_of(share, length) == count


@pytest.mark.parametrize("ways", [1, 2, 5, 9])
def test_tir_weights_of_any_way(ways):
    marks = torch.tril(torch.ones(ways + 1, ways), -1)[None]              # token i is marked by i classes
    weights = tir_weights(marks)[0].tolist()
    assert weights[0] == 1 and (ways == 1 or (weights[1] == 2 and weights[ways] == pytest.approx(0)))
    if ways == 5:
        assert weights == pytest.approx([1 - 0.5 * (s - 3) if s else 1 for s in range(6)])


def test_tir_chooses_in_float32_whatever_the_weights_are():
    torch.manual_seed(0)
    tokens, text, norm, proj = torch.randn(4, 300, 64), torch.randn(5, 32), nn.LayerNorm(64), torch.randn(64, 32)
    low = [x.bfloat16() for x in (tokens, text, norm, proj)]             # the norm in place
    exact = atha.tir_marks(low[0].float(), low[1].float(), norm.float(), low[3].float())
    assert torch.equal(atha.tir_marks(low[0], low[1], norm.bfloat16(), low[3]), exact)


@pytest.mark.parametrize("inhibit, enhance, low, high", [(True, False, 0.5, 1), (False, True, 1, 2), (True, True, 0.5, 2)])
def test_tir_inhibits_and_enhances_apart(inhibit, enhance, low, high):
    torch.manual_seed(0)
    tokens = torch.randn(4, 50, 16)
    out = tir_step(tokens, torch.randn(5, 8), nn.LayerNorm(16), torch.randn(16, 8), 0.3, inhibit, enhance)
    weights = (out / tokens)[..., 0]
    assert weights[:, 0].eq(1).all(), "[CLS] is not touched"
    assert weights.min().item() <= low + 1e-6 and weights.max().item() == pytest.approx(high)
    assert inhibit or weights.min() > 1 - 1e-6


# ----------------------------------------------------------------------------------------------------------- LoRA

def test_lora_starts_as_the_frozen_layer_exactly_and_is_scaled_by_the_root_of_the_rank():
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 12), torch.randn(6, 5, 24)
    lora = LoRA(linear, rank=16, alpha=8, dropout=0, episodes=3)
    assert lora.B.abs().max() == 0 and torch.equal(lora(x), linear(x)) and lora.scaling == 8 / math.sqrt(16)
    assert lora.A.abs().max() <= 24 ** -0.5 and lora.A.std().item() == pytest.approx((1 / 3 / 24) ** 0.5, rel=0.1), "Kaiming uniform, a = sqrt(5)"
    lora.B.data.normal_()
    for i in range(6):
        e = i // 2
        same(lora(x)[i], linear(x[i]) + 2 * x[i] @ lora.A[e].T @ lora.B[e].T)
    assert not linear.weight.requires_grad and lora.A.requires_grad


def test_lora_drops_its_input_in_training_alone():
    torch.manual_seed(0)
    lora, x = LoRA(nn.Linear(24, 12), dropout=0.5), torch.randn(2, 5, 24)
    lora.B.data.normal_()
    assert not torch.equal(lora(x), lora(x)) and torch.equal(lora.eval()(x), lora(x))


@pytest.mark.parametrize("p", [0.25, 0.1])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = atha.dropout(torch.ones(1000, 1001), p, training=True)
    assert (x == 0).float().mean().item() == pytest.approx(p, abs=3e-3) and x.max().item() == pytest.approx(1 / (1 - p))
    assert atha.dropout(x, p, training=False) is x
    rows = (x == 0).float() - p
    assert (rows[:, :-1] * rows[:, 1:]).mean().abs() < 1e-3, "neighbours are independent"


def test_add_lora_wraps_by_name_and_says_when_nothing_fits():
    tower = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"q_proj": nn.Linear(4, 4), "o": nn.Linear(4, 4)}))
    assert list(add_lora(tower)) == ["1.q_proj"] and not tower[0].weight.requires_grad
    with pytest.raises(ValueError, match="no nn.Linear named qkv"):
        add_lora(tower, targets=("qkv",))


# ---------------------------------------------------------------------------------------------------- diagnostics

def test_cka_of_identical_rotated_and_independent_features():
    torch.manual_seed(0)
    x = torch.randn(400, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert linear_cka(x, x).item() == pytest.approx(1) and linear_cka(x, 3 * x @ rotation + 1).item() == pytest.approx(1)
    assert linear_cka(x, torch.randn(400, 8)).item() < 0.05
    assert linear_cka(torch.stack([x, x]), torch.stack([x, torch.randn(400, 8)])).shape == (2,)


def test_modality_gap_and_gap_shift_of_made_sets():
    text, labels = torch.eye(4), torch.arange(4).repeat(10)
    text5 = F.pad(text, (0, 1))
    assert modality_gap(text[labels], text).item() == pytest.approx(0, abs=1e-6)
    assert gap_shift(text[labels], text, labels, 10).item() == pytest.approx(0, abs=1e-6), "aligned: no shift helps"
    assert modality_gap(torch.tensor([[1.0, 0]]), torch.tensor([[0, 1.0]])).item() == pytest.approx(2 ** 0.5)
    assert modality_gap(3 * text[labels], text).item() == pytest.approx(0, abs=1e-6), "of unit features"
    image = F.normalize(text5 + torch.tensor([0, 0, 0, 0, 3.0]), dim=-1)[labels]        # all pictures pushed the same way
    assert modality_gap(image, text5) > 0.5 and gap_shift(image, text5, labels, 10) > 0.1, "closing the gap helps"
    half = (image.mean(0) - text5.mean(0)) / 2
    shifted = [F.cross_entropy(10 * F.normalize(image - s / 10 * half, dim=-1) @ F.normalize(text5 + s / 10 * half, dim=-1).T, labels).item()
               for s in range(-20, 21)]
    assert gap_shift(image, text5, labels, 10).item() == pytest.approx(shifted[20] - min(shifted), rel=1e-4)


def tower(width):
    """What a diagnostic asks of a vision tower, with token space and image space the same."""
    return SimpleNamespace(first_patch=1, ln_post=nn.Identity(), proj=torch.eye(width))


def test_probe_counts_the_classes_that_mark_a_token():
    tokens = torch.zeros(1, 11, 4)
    tokens[0, 1:, :] = torch.eye(4)[[0, 0, 0, 1, 1, 1, 2, 2, 2, 2]]       # patches 0-2 lie on class 0, 3-5 on class 1, the rest on neither
    tokens[0, 7:] *= 5
    text = torch.tensor([[[1, 0, -1, 0], [0, 1, -1, 0.0]]])
    probe = Probe(text, tower(4), Recipe(rho=0.3, gamma=0.4, tir_top=0.3))
    assert torch.equal(probe(tokens, 0), tokens), "it changes nothing"
    row, (head, tail) = {name: x[0].tolist() for name, x in probe.rows[0].items()}, probe.masks[0].unbind(1)
    assert row["share"] == pytest.approx([0.4, 0.6, 0.0]) and row["norm"][:2] == pytest.approx([5, 1])
    assert math.isnan(row["norm"][2]), "no token, no length"
    half = 0.5 ** 0.5
    assert [row[name] for name in ("all", "head", "neutral", "tail")] == pytest.approx([0.2 * half, half, half, -half], abs=1e-5)
    assert tail[0].tolist() == [False] * 6 + [True] * 4 and head.sum() == 3


def test_probe_and_comparison_are_means_over_episodes():
    torch.manual_seed(0)
    text, tokens, other = torch.randn(2, 3, 8), torch.randn(6, 13, 8), torch.randn(6, 13, 8)
    recipe = Recipe(tir_top=0.5)
    both, alone = Probe(text, tower(8), recipe), [Probe(text[e: e + 1], tower(8), recipe) for e in range(2)]
    both(tokens, 0)
    for e, probe in enumerate(alone):
        probe(tokens[3 * e: 3 * e + 3], 0)
        assert all(torch.allclose(x[e], probe.rows[0][name][0], equal_nan=True) for name, x in both.rows[0].items())
    after = Probe(text, tower(8), recipe)
    after(other, 0)
    row, = compare(both, after)
    assert row["block"] == 0 and row["all_before"] == pytest.approx(both.rows[0]["all"].mean().item())
    assert row["cka"] == pytest.approx(linear_cka(tokens.mean(1).view(2, 3, 8), other.mean(1).view(2, 3, 8)).mean().item())
    nothing = Probe(text[:1, :1], tower(8), Recipe(rho=0.0, gamma=0.0))
    nothing(tokens[:1], 0)
    row, = compare(nothing, nothing)
    assert math.isnan(row["head_before"]) and math.isnan(row["tail_after"]) and row["all_before"] == row["neutral_after"]


def test_masking_sets_to_zero_what_every_class_marks_and_at_its_blocks_alone():
    torch.manual_seed(0)
    tokens, text = torch.randn(4, 21, 8), torch.randn(2, 3, 8)
    hook = mask_sinks(text, tower(8), blocks=(1, 3), top=0.6)
    assert torch.equal(hook(tokens, 0), tokens) and torch.equal(hook(tokens, 2), tokens)
    masked, marked = hook(tokens, 3), 0
    for image, seen, texts in zip(tokens, masked, text[[0, 0, 1, 1]]):
        top = [set(F.cosine_similarity(image[1:], t[None]).topk(12).indices.tolist()) for t in texts]
        sinks = set.intersection(*top)
        assert [i for i in range(20) if seen[1 + i].eq(0).all()] == sorted(sinks) and torch.equal(seen[0], image[0])
        kept = [1 + i for i in range(20) if i not in sinks]
        assert torch.equal(seen[kept], image[kept])
        marked += len(sinks)
    assert marked


def test_domain_similarity_is_the_mean_over_random_pairings():
    torch.manual_seed(0)
    x, y = torch.randn(30, 6), torch.randn(30, 9)
    g = torch.Generator().manual_seed(5)
    pairings = [torch.randperm(30, generator=g) for _ in range(20)]
    wanted = sum(linear_cka(x[order], y).item() for order in pairings) / 20
    ours = domain_similarity(x, y, torch.Generator().manual_seed(5))
    assert ours.item() == pytest.approx(wanted, rel=1e-5) and ours != linear_cka(x, y)


def test_visual_learning_is_cross_entropy_against_class_means():
    torch.manual_seed(0)
    f, labels = torch.randn(2, 8, 5), torch.tensor([[0, 0, 1, 2, 2, 1, 0, 1], [2, 1, 0, 0, 1, 2, 2, 2]])
    for e in range(2):
        unit = F.normalize(f[e], dim=-1)
        means = F.normalize(torch.stack([unit[labels[e] == c].mean(0) for c in range(3)]), dim=-1)
        wanted = F.cross_entropy(7 * unit @ means.T, labels[e])
        same(lv_loss(f, labels, 3, 7)[e], wanted)
        same(lv_loss(f[e], labels[e], 3, 7), wanted)


@pytest.mark.parametrize("ways", [2, 5, 9])
def test_the_simplified_rule_weighs_sinks_and_specific_tokens_alone(ways):
    marks = torch.tril(torch.ones(ways + 1, ways), -1)[None]              # token i is marked by i classes
    assert tir_weights_simple(marks)[0].tolist() == [1, 2, *[1] * (ways - 2), 0]


def test_ra_draws_to_what_was_alike_a_step_before_and_to_what_the_texts_say():
    """Features that change wholly from step to step: only the step before, augmented and plain, gives this target."""
    torch.manual_seed(0)
    part, number = atha.RA(None, torch.zeros(2, 3, 4), Recipe(steps=10, ra_weight=3.0), set()), 4
    rows, labels = torch.arange(4).expand(2, -1), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    features, plain, text = (F.normalize(torch.randn(number, 2, n, 6), dim=-1) for n in (4, 4, 3))
    for k in range(number):
        step = atha.Step(k, features=features[k], labels=labels, logits=None, text=text[0], plain=plain[k], plain_labels=labels, rows=rows, total=4)
        ours, c = part.loss(step), 1 - k / 6
        if k == 0:
            assert ours == 0.0, "there is no step before"
            continue
        for e in range(2):
            of_text = torch.stack([torch.stack([text[0, e, m] @ text[0, e, n] for n in labels[e]]) for m in labels[e]])
            fused = c * features[k - 1, e] @ plain[k - 1, e].T + (1 - c) * of_text
            p, q = (features[k, e] @ plain[k, e].T).softmax(-1), fused.softmax(-1)
            same(ours[e], 3 * (p * (p / q).log()).sum(-1).mean(), 1e-5)
