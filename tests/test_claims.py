"""tests/claims.py: the verdict, what is measured, a claim built to be false and one built to be true."""
import json
from dataclasses import replace
from xml.etree import ElementTree

import claims
import pytest
import torch
from claims import CLAIMS, TRAINED, UNITS, Claim, above, judge, measured, row_of
from conftest import draw_pictures
from test_train import rows_of, toy_episodes, toy_pool

import atha
import data
import train
from data import generator
from train import Recipe, adapt

FALSE = Claim("nothing gains", "", "", above("atha-still", "clip-lora"))
TRUE = Claim("fine-tuning is above zero-shot", "", "", above("clip-lora", "zero-shot"))


def seen(**of):
    """Episodes with these accuracies."""
    return {name.replace("_", "-"): {n: {"accuracy": a} for n, a in enumerate(values)}
            for name, values in of.items()}


# ------------------------------------------------------------------------------------------------ the verdict

@pytest.mark.parametrize("values, verdict", [
    ([1, 2, 3, 4], "holds"), ([-1, -2, -3, -4], "does not hold"), ([-1, 2, -3, 4], "undecided"),
    ([0, 0, 0], "undecided"), ([1.96, -1.96 + 1e-3, 1.96, -1.96], "undecided")])
def test_the_interval_alone_decides(values, verdict):
    mean, half, said = judge(values)
    assert said == verdict and (mean, half) == train.mean_and_interval(values)


def test_effects_are_paired_and_leave_out_what_was_not_measured():
    records = seen(a=[50, 60, 70], b=[49, 58, 67])
    records["a"] = dict(reversed(records["a"].items()))                   # in whatever order they were done
    assert measured(above("a", "b"), records) == [1, 2, 3]
    assert measured({("a", "accuracy"): 1.0, ("b", "accuracy"): -0.5}, records) == [25.5, 31, 36.5]
    records["b"][1]["accuracy"] = None
    assert measured(above("a", "b"), records) == [1, 3]
    with pytest.raises(ValueError):
        measured(above("a", "b"), seen(a=[1, 2], b=[1]))


def test_where_what_is_needed_is_missing_there_is_nothing_to_see():
    half = next(claim for claim in CLAIMS if "half" in claim.said)
    gained = row_of(half, seen(atha=[54, 55, 54, 55], atha_push=[53, 54, 53, 54], clip_lora=[50, 51, 50, 51]))
    assert (gained["effect"], gained["verdict"], gained["because"]) == (1.0, "holds", "")
    lost = row_of(half, seen(atha=[48, 51, 48, 51], atha_push=[53, 54, 53, 54], clip_lora=[50, 51, 50, 51]))
    assert lost["verdict"] == "nothing to see here" and lost["because"] == "ATHA's gain is -1.00 ± 0.98"


def test_sinks_must_be_much_longer_than_other_tokens():
    claim = next(claim for claim in CLAIMS if claim.said == "TIR makes fewer sinks")
    for length, spread, verdict in ((2.0, 0.1, "holds"), (1.4, 0.01, "nothing to see here"),
                                    (1.6, 0.5, "nothing to see here")):
        lengths = {n: {"sink_length": length + spread * (-1) ** n} for n in range(4)}
        records = {name: {n: record | {"sink_share": share} for n, record in lengths.items()}
                   for name, share in (("clip-lora", 0.2), ("tir", 0.1))}
        row = row_of(claim, records)
        assert row["verdict"] == verdict and row["effect"] == pytest.approx(0.1)
    for record in records["clip-lora"].values():
        record["sink_length"] = None
    row = row_of(claim, records)
    assert (row["verdict"], row["because"]) == ("nothing to see here", "there are none")
    json.dumps(row, allow_nan=False)


def test_the_claims_name_what_can_be_trained_and_the_papers_figures():
    for claim in CLAIMS:
        for name, quantity in [*claim.effect, *(claim.needs or ())]:
            assert name in train.METHODS or name in TRAINED
            assert quantity in UNITS
    figures = {claim.said: claim.reported.split(",")[0] for claim in CLAIMS}
    mean = {}
    for family, method, shot, *_, figure in map(str.split, train.PAPER.strip().splitlines()[1:]):
        if family == "clip":
            mean.setdefault((method, int(shot)), []).append(float(figure))
    (first, second), five = mean["clip-lora", 1], mean["clip-lora", 5][0]      # ATHA's baseline and SVL's
    for said, (more, shot), less in (
            ("ATHA is above CLIP-LoRA", ("atha", 1), first),
            ("TIR is above CLIP-LoRA", ("tir", 5), five),
            ("SVL + RA is above CLIP-LoRA", ("svl", 1), second),
            ("SVL alone is above CLIP-LoRA", ("svl-only", 1), second),
            ("RA alone is above CLIP-LoRA", ("ra-only", 1), second),
            ("TIR: inhibiting is above enhancing", ("tir-inhibit", 5), mean["tir-enhance", 5][0])):
        assert figures[said] == f"{mean[more, shot][0] - less:+.2f}"
    none, lv, ad, ra = (sum(row) / 4 for row in (                         # SVL's gap table
        (0.014, 0.048, 0.406, 0.356), (0.022, 0.072, 0.626, 0.742), (0.012, 0.024, 0.191, 0.249),
        (0.009, 0.027, 0.171, 0.238)))
    for said, more, less in (("visual learning widens gap shift", lv, none),
                             ("SVL narrows gap shift", none, ad), ("RA narrows it further", ad, ra)):
        assert float(figures[said]) == pytest.approx(more - less, abs=6e-4)


# ------------------------------------------------------------------------------------------- what is measured

@pytest.fixture(scope="module")
def looked(toy):
    """Two episodes of a method under a recipe, as claims.py sees them: learner, tasks, records."""
    clip, tokenizer = toy
    tasks = [toy_pool().task(n, way=5, shot=1, query=6, seed=1) for n in range(2)]
    support, labels, _, names = toy_episodes(2)
    source = data.toy_pictures(10, seed=1, domain="source")[0]

    def look(method, **fields):
        recipe = replace(Recipe(), dropout=0.0, **fields)
        learner = adapt(clip, support, labels, rows_of(tokenizer, names), method, recipe, seeds=[0, 1])
        job = train.Job(clip, toy_pool(), rows_of(tokenizer, [toy_pool().classes])[0], method, recipe)
        return learner, tasks, claims.measure(job, learner, tasks, [(1, 0), (1, 1)], source)
    return look


def test_a_pull_is_not_counted_as_learning(looked):
    """Before the pull, with nothing learned, the tokens are the frozen model's, however strong the pull."""
    still = {"steps": 1, "lr": 0.0, "token_lr": 0.0, "alpha": 9.0, "beta": 0.0}
    frozen, pulled = (looked(method, **still)[2] for method in ("zero-shot", "atha"))
    for before, now in zip(frozen, pulled):
        assert [now[x] for x in ("similarity", "head", "tail")] == pytest.approx(
            [before[x] for x in ("similarity", "head", "tail")], abs=1e-6)
    assert pulled[0]["gap_shift"] != pytest.approx(frozen[0]["gap_shift"], rel=1e-2), "but it acts"


def test_what_is_measured_is_what_the_formulas_say(looked):
    learner, tasks, records = looked("tir", steps=2, tir_top=0.5)
    visual, (text, hook_text) = learner.backbone.visual, learner.text()
    for e, (task, record) in enumerate(zip(tasks, records)):
        seen = {}

        def keep(tokens, layer):
            seen[layer] = tokens.unflatten(0, (2, -1))[e, :, 1:]
            return tokens

        def features(pictures, probe=None):
            images = learner.prepare(pictures)[None].expand(2, -1, -1, -1, -1)
            return learner.features(images, learner.hook(hook_text, probe))[e]
        f = features(toy_pool().images[task.query], keep)
        cosine = atha.cosines(seen[2], atha.text_to_tokens(hook_text[e], visual.proj)).max(-1).values
        assert record["similarity"] == pytest.approx(cosine.mean().item(), rel=1e-4)
        assert record["head"] > record["similarity"] > record["tail"]
        sinks = atha.tir_marks(seen[2], hook_text[e], visual.ln_post, visual.proj, top=0.5).sum(-1) == 5
        long, others = seen[2].norm(dim=-1)[sinks].mean().item(), seen[2].norm(dim=-1)[~sinks].mean().item()
        assert sinks.any() and record["sink_share"] == pytest.approx(sinks.float().mean().item())
        assert record["sink_norm"] == pytest.approx(long, rel=1e-4)
        assert record["sink_length"] == pytest.approx(long / others, rel=1e-4)
        shift = atha.gap_shift(f, text[e], task.truth, scale=100.0)
        assert record["gap_shift"] == pytest.approx(shift.item(), rel=1e-3, abs=1e-5)
        rows = torch.randperm(160, generator=generator("source", 1, e))[:30]
        theirs = features(data.toy_pictures(10, seed=1, domain="source")[0][rows])
        wanted = atha.domain_similarity(theirs, f, generator("pairings", 1, e))
        assert record["domain"] == pytest.approx(wanted.item(), rel=1e-4)
        assert record["domain_masked"] != record["domain"]


def test_masking_nothing_changes_nothing_and_no_sink_has_no_length(looked):
    for record in looked("clip-lora", steps=1, tir_top=0.0)[2]:
        assert record["domain_masked"] == record["domain"] and 0 < record["domain"] < 1
        assert record["sink_share"] == 0 and record["sink_norm"] is None and record["sink_length"] is None


# ------------------------------------------------------------------------------------------- the command line

@pytest.fixture
def few(monkeypatch):
    """Two claims instead of all."""
    run = claims.run
    monkeypatch.setattr(claims, "run", lambda args: run(args, [FALSE, TRUE]))


def test_one_claim_built_to_be_false_and_one_to_be_true(few, tmp_path, capsys, monkeypatch):
    line = f"--dataset toy --steps 12 --lr 1e-3 --query 8 --episodes 6 --out {tmp_path}".split()
    assert claims.main(line) == 0
    said = capsys.readouterr().out
    kept = json.loads((tmp_path / "claims-toy-5way-1shot-paper-seed1.json").read_text())
    false, true = kept["rows"]
    assert false["verdict"] != "holds" and (false["effect"], false["interval"]) == (0, 0)
    assert true["verdict"] == "holds" and true["effect"] > 3
    tuned, frozen = (kept["accuracies"][name][0] for name in ("clip-lora", "zero-shot"))
    assert true["effect"] == pytest.approx(tuned - frozen) and f"| {true['claim']} |" in said
    drawn = ElementTree.parse(tmp_path / "claims-toy-5way-1shot-paper-seed1.svg").getroot()
    first, second = (float(circle.get("cx")) for circle in drawn.findall(".//{*}circle"))
    assert first == 600 < second, "effects about zero"

    monkeypatch.setattr(train, "adapt", pytest.fail)                      # nothing is trained again
    assert claims.main(line) == 0 and claims.table(kept["rows"]) in capsys.readouterr().out


def test_a_stopped_run_goes_on_with_what_it_has(few, tmp_path, monkeypatch):
    line = f"--dataset toy --steps 1 --query 4 --batch 1 --episodes 2 --out {tmp_path}".split()
    append, count = train.Results.append, []

    def stop(results, records):
        append(results, records)
        count.extend(record for record in records if "episode" in record)
        if len(count) == 3:                                               # before its accuracy is written
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(train.Results, "append", stop)
        assert claims.main(line) == 130
    assert claims.main(line) == 0
    rows = json.loads(next(tmp_path.glob("claims-*.json")).read_text())["rows"]
    assert [row["episodes"] for row in rows] == [2, 2]


def test_results_that_were_not_looked_into_are_refused(few, tmp_path, capsys):
    line = "--dataset toy --steps 1 --query 4 --episodes 2".split()
    assert train.main([*line, "--method", "clip-lora", "--out", str(tmp_path / "clip-lora")]) == 0
    assert claims.main([*line, "--out", str(tmp_path)]) == 2
    assert "results that were not looked into: give another --out" in capsys.readouterr().err


@pytest.mark.parametrize("given, words", [
    ("--shot 1 5", "one --shot"), ("--episodes 1", "two or more"), ("--method atha", "no --split"),
    ("--split", "no --split"), ("--recipe released", "a trainer's --recipe"), ("--stpes 2", "--stpes"),
    ("--source PICTURES", "has 12 pictures, fewer than an episode's 75 queries"),
    ("--source nowhere", "nowhere"),
    ("--device quantum", "--device quantum cannot be used")])
def test_what_cannot_be_is_said_in_one_line(given, words, tmp_path, capsys):
    given = given.replace("PICTURES", str(draw_pictures(tmp_path / "pictures", 2, 6)))
    assert claims.main(f"--dataset toy --steps 1 --out {tmp_path / 'out'} {given}".split()) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("claims.py: error: ") and words in last
    assert not list(tmp_path.rglob("*.jsonl"))


def test_the_picture_has_a_row_a_claim_and_a_scale_a_unit():
    row = {"claim": "a < b", "paper": "P", "reported": "", "episodes": 9, "because": ""}
    rows = [row | {"unit": unit, "effect": effect, "interval": interval, "verdict": verdict}
            for unit, effect, interval, verdict in (
                ("points", 1.0, 0.5, "holds"), ("points", -3.0, 0.0, "does not hold"),
                ("CKA", 0.001, 0.001, "undecided"), ("share", None, None, "nothing to see here"))]
    rows[3]["because"] = "there are none"
    root = ElementTree.fromstring(claims.picture(rows, "title"))
    bars = [(float(bar.get("x")) - 600, float(bar.get("width"))) for bar in root.findall(".//{*}rect")]
    unit = 110 / 3
    wanted = ((0.5 * unit, unit), (-110, 0), (0, 110))
    assert bars == [pytest.approx(bar, abs=0.1) for bar in wanted]
    words = [text.text for text in root.findall("{*}text")]
    assert words.count("a < b") == 4 and "+1.00 ± 0.50 points" in words
    assert words[-1] == "nothing to see here"
    assert "| a < b | P |  |  | nothing to see here: there are none |" in claims.table(rows)
