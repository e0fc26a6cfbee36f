"""tests/claims.py: verdicts, measurements beside plain formulas, claims built to be false and to be true."""
import json
from dataclasses import replace
from xml.etree import ElementTree

import claims
import pytest
import torch
import torch.nn.functional as F
from claims import CLAIMS, Claim, judge
from toy_world import TOY_CLASSES, toy_pictures

import data
import train
from atha import linear_cka

FALSE = Claim("nothing gains", "", "", "", "accuracy", "atha@alpha=0@beta=0@token_lr=0", "clip-lora")
TRUE = Claim("tuning far too fast harms", "", "", "", "accuracy", "zero-shot", "clip-lora")


# ------------------------------------------------------------------------------------------------ the verdict

@pytest.mark.parametrize("case", """
1 2 | | holds
-1 -2 | | does not hold
-1 2 | | undecided
0 0 | | undecided
5 nan | | measured in 5 episodes
0.1 -0.1 | 1 | holds
3 4 | 1 | does not hold
-3 -4 | 1 | does not hold
0.5 1.3 | 1 | undecided
9 -9 | 1 | undecided""".strip().splitlines())
def test_the_interval_alone_decides(case):
    values, within, said = map(str.strip, case.split("|"))
    columns = {"a": {"m": [float(x) for x in values.split()] * 5}, "b": {"m": [0] * 10}}
    assert judge(Claim("", "", "", "", "m", "a", "b", within), columns)[0] == said


def test_effects_are_paired_with_intervals_by_student():
    columns = {"a": {"m": [5, 7] * 5}, "b": {"m": [4, 0] * 5}, "c": {"m": [2, 10] * 5}}
    assert judge(Claim("", "", "", "", "m", "a", "b c"), columns) == ["holds", 2, 0]
    for n, t in {10: 2.262157, 15: 2.144787, 30: 2.04523, 100: 1.984217}.items():
        x = torch.arange(n).double()
        assert claims.interval(x) == pytest.approx([(n - 1) / 2, t * x.std().item() / n ** 0.5], rel=6e-4)


# ------------------------------------------------------------------------------------------- what is measured

@pytest.fixture
def look_at(toy, monkeypatch):
    """A look at two episodes; a class marks 21 of 36 patches, so some are marked by all."""
    monkeypatch.setattr(claims, "PAPER", replace(claims.PAPER, tir_top=0.6))
    rows, seeds = train.class_rows(toy[1], "a {}", TOY_CLASSES, toy[0]), [(1, 0), (1, 1)]
    pools = [data.Pool(*toy_pictures(20, 1, domain), TOY_CLASSES, "") for domain in ("target", "source")]
    worlds = [claims.World(toy[0], seeds, rows, pool, *of) for pool, of in zip(pools, ((1, 15), (0, 10)))]

    def look(method):
        job = train.Job(toy[0], pools[0], rows, method, train.recipe_for("paper", method, steps=5))
        return claims.Look(job.learn(worlds[0].tasks, seeds), *worlds)
    return look


def cos(a, b):
    """(..., D) and (N, D) -> (..., N)."""
    return F.cosine_similarity(a[..., None, :], b, dim=-1)


def marked(look, patches, text):
    """(n, L, N): the 21 patches that lie nearest each class."""
    similar = cos(look.visual.ln_post(patches) @ look.visual.proj, text)
    return (similar >= similar.sort(1).values[:, 15:16]).float()


def close(found, wanted, rel=1e-4):
    assert found.tolist() == pytest.approx([x.item() for x in wanted], rel=rel, abs=1e-6)


def test_what_is_seen_of_patches(look_at):
    look, seen = look_at("atha"), []
    pull = look.learner.hook(look.world.text)
    look.learner.features(look.world.images, lambda tokens, layer: pull(seen.append(tokens) or tokens, layer))
    patches = seen[2].unflatten(0, (2, -1))[1, :, 1:].detach()            # where it pulls, of episode 1
    texts, length = F.layer_norm(look.world.text[1], (64,)) @ look.visual.proj.T, patches.norm(dim=-1)
    m, marks = cos(patches, texts).amax(-1).sort().values, marked(look, patches, look.world.more[1])
    every, part = marks[..., :5].all(-1), look.learner.parts[1]
    both = torch.stack([marks[..., i] * marks[..., j] for i in range(5) for j in range(i)]).mean()
    close(look.blocks[1, 2], [
        m.mean(), m[:, -3:].mean(), m[:, :3].mean(),
        every.float().mean(), length[every].mean(), length.mean(),
        both * 36 / 21, marks[every][:, 5:].mean() - 21 / 36,
        part.alpha[1, 2], part.beta[1, 2], (part.beta[1, 2] < 0).float(),
        100 * part.beta[1, 2].abs() * texts.norm(dim=-1).mean() / length.mean()])
    assert look.measure("head") == look.blocks[:, 2, 1].tolist()
    assert len(look.world.more[1].unique(dim=0)) == 7                     # two classes are new


def test_what_is_measured_of_features(look_at):
    look, g = look_at("svl"), torch.Generator()
    image, text, truth = look.features[1], look.unit[1], look.world.truth[1]
    gap = image.mean(0) - text.mean(0)
    losses = torch.stack([F.cross_entropy(100 * cos(image - s * gap / 20, text + s * gap / 20), truth)
                          for s in range(-20, 21)])
    similar = [linear_cka(*(x[torch.randperm(len(x), generator=g)[:50]]
                            for x in (image, look.source.features[1]))) for _ in range(20)]
    found = [of()[1] for of in (look.accuracy, look.modality_gap, look.gap_shift, look.domain)]
    close(torch.stack(found), [100 * (cos(image, text).argmax(-1) == truth).double().mean(), gap.norm(),
                               losses[20] - losses.min(), torch.stack(similar).mean()])
    assert look.measure("pictures") == [8, 8]                             # twice in three of five steps
    assert look.measure("parameters") == [2 * 4 * 3 * 16 * 256] * 2


# ------------------------------------------------------------------------------------------- the command line

def test_one_claim_built_to_be_false_and_one_to_be_true(monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "World", lambda *of, world=claims.World: world(*of[:-1], 4))       # queries
    argv, kept = "--dataset toy --steps 2 --lr 0.1 --episodes 10 --out".split(), tmp_path / "kept.json"
    kept.write_text('{"before": {"claims": {}, "effects": {}}}')
    claims.main([*argv, str(kept)], [FALSE, TRUE])
    before, run = json.loads(kept.read_text()).values()
    said = run["claims"]
    assert said[FALSE.words] == ["undecided", 0, 0] and said[TRUE.words][0] == "holds"
    assert [*run["effects"]] == [FALSE.more]
    monkeypatch.setattr(train, "train", pytest.fail)                      # a rerun trains nothing
    claims.main([*argv, str(kept)], [FALSE, TRUE])


def test_two_episodes_from_end_to_end(capsys):
    few = [claim for claim in CLAIMS if {claim.more, claim.less} <= {*claims.COLOURS, ""}]
    claims.main("--dataset toy --steps 1 --episodes 2 --draw drawn --out kept.json".split(), few)
    said = capsys.readouterr().out
    assert all(f"| {claim.words} ({claim.unit}) |" in said for claim in CLAIMS) and "| atha | 3 |" in said
    assert len(ElementTree.parse("drawn/similarities.svg").findall("{*}polyline")) == 8
    assert data.decode("drawn/patches.png").float().std() > 9
