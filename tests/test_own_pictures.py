"""Your own pictures: --fit on a folder of class folders, --save, --predict, and what they say when they cannot."""
import json
import shutil

import pytest
import torch
from conftest import TOY_CLIP, command, draw_pictures, same
from safetensors.torch import load_file, safe_open, save_file

import clip_min
import data
import train

CLASSES = ["circle", "cross", "ring", "square", "star", "triangle"]
FIT = "--fit {pictures} --save {tmp}/new --steps 3 "


@pytest.fixture
def pictures(tmp_path):
    """Six class folders of four pictures, 00.png to 03.png."""
    return draw_pictures(tmp_path / "pictures", 6, 4)


@pytest.fixture
def run(capsys):
    """run(arguments) -> exit code, standard output (with --json: its rows), lines of standard error but the progress of decoding."""
    def run(*args):
        capsys.readouterr()
        code, (out, err) = train.main(["--weights", str(TOY_CLIP), *map(str, args)]), capsys.readouterr()
        out = [json.loads(line) for line in out.splitlines()] if "--json" in args else out
        return code, out, [line for line in err.splitlines() if line and not line.startswith("decoding")]
    return run


@pytest.fixture
def fit(run, tmp_path, monkeypatch):
    """fit(folder, options) -> the saved file, the learner as it was before, what was printed; three steps unless the options differ."""
    learners, adapt = [], train.adapt
    monkeypatch.setattr(train, "adapt", lambda *args, **kwargs: learners.append(adapt(*args, **kwargs)) or learners[-1])

    def fit(folder, *options):
        learners.clear()
        code, out, err = run("--fit", folder, "--save", tmp_path / "saved", "--steps", 3, *options)
        assert code == 0, err
        return tmp_path / "saved", learners[0], out + "\n".join(err)
    return fit


def prepared(folder, centre=False):
    return data.plain(torch.stack([data.decode(path, 256) for path in sorted(folder.rglob("*.png"))]), 48, centre)[None]


def test_a_saved_model_predicts_in_a_fresh_process_exactly_what_it_did_before(fit, pictures):
    saved, learner, _ = fit(pictures)
    before = learner.logits(prepared(pictures))[0].softmax(-1).topk(2)
    fresh = command("--predict", saved, pictures, "--json", "--weights", TOY_CLIP)
    rows = [json.loads(line) for line in fresh.stdout.splitlines()[:-1]]
    assert fresh.returncode == 0 and [row["picture"] for row in rows] == sorted(map(str, pictures.rglob("*.png"))), fresh.stderr
    assert [[row["probability"], row["runner_up_probability"]] for row in rows] == before.values.tolist()
    assert [[row["class"], row["runner_up"]] for row in rows] == [[CLASSES[i] for i in top] for top in before.indices.tolist()]


@pytest.mark.parametrize("method", ["zero-shot", "clip-lora", "atha", "tir", "svl", "atha+tir", "released"])
def test_three_lines_bring_back_a_saved_model_which_holds_no_more_than_it_learned(fit, pictures, method):
    saved, before, _ = fit(pictures, *(["--recipe", "released"] if method == "released" else ["--method", method]))
    images = prepared(pictures, centre=method == "released")
    clip, tokenizer = clip_min.load(TOY_CLIP)
    learner = train.load_tuned(saved, clip, tokenizer)
    logits = learner.logits(images)                                      # (1, pictures, classes)
    assert learner.classes == CLASSES and torch.equal(logits, before.logits(images))
    assert saved.stat().st_size < sum(4 * t.numel() for t in before.learned().values()) + 20_000 < 2e6


def test_holdout_reports_zero_shot_and_tuned_accuracy_on_pictures_kept_back(fit, tmp_path):
    _, _, said = fit(draw_pictures(tmp_path / "pictures", 6, 20), "--holdout", 15, "--method", "clip-lora", "--steps", 10, "--lr", "1e-3")
    zero_shot, tuned = (line.split() for line in said.splitlines() if "90 pictures" in line)
    assert "fitting clip-lora on 30 pictures of 6 classes" in said and zero_shot[0] == "zero-shot:" and tuned[0] == "clip-lora:"
    assert 100 / 6 < float(zero_shot[1]) < float(tuned[1]) <= 100


@pytest.mark.parametrize("method", ["clip-lora", "atha", "svl"])
def test_three_pictures_at_a_time_give_the_full_batch_result_without_dropout(fit, pictures, method, monkeypatch):
    _, whole, at_once = fit(pictures, "--method", method, "--dropout", 0, "--batch", 100)
    seen, forward = [], clip_min.VisionTransformer.forward
    monkeypatch.setattr(clip_min.VisionTransformer, "forward", lambda self, images, *rest: seen.append(len(images)) or forward(self, images, *rest))
    _, chunked, in_parts = fit(pictures, "--method", method, "--dropout", 0, "--batch", 3)
    assert set(seen) == {3} and (method == "svl" or len(seen) == 2 * 3 * 8), "in parts, each computed again for backward"
    assert "3 of 24 pictures at a time" in in_parts and "at a time" not in at_once
    same(chunked.losses, whole.losses)
    same(chunked.logits(prepared(pictures)), whole.logits(prepared(pictures)))


def test_a_folder_of_class_folders_gives_accuracy_and_a_confusion_matrix_that_sum_up(run, fit, pictures):
    (pictures / "ring" / "03.png").unlink()
    saved, _, _ = fit(pictures, "--method", "zero-shot")
    code, (*rows, total), _ = run("--predict", saved, pictures, "--json")
    pairs = [(row["picture"].split("/")[-2], row["class"]) for row in rows]
    assert code == 0 and total["pictures"] == len(rows) == 23 and total["classes"] == CLASSES
    assert total["accuracy"] == pytest.approx(100 * sum(true == said for true, said in pairs) / 23)
    assert total["confusion"] == [[pairs.count((true, said)) for said in CLASSES] for true in CLASSES]
    code, table, _ = run("--predict", saved, pictures)
    assert code == 0 and f"{total['accuracy']:.2f} % of 23 pictures" in table and all(row["picture"] in table for row in rows)


def test_pictures_that_cannot_be_read_are_named_and_skipped_and_the_exit_code_is_1(run, fit, pictures, tmp_path):
    saved, _, _ = fit(pictures, "--method", "zero-shot")
    missing, cut, text = broken = tmp_path / "missing.png", pictures / "ring" / "00.png", pictures / "ring" / "01.png"
    cut.write_bytes(cut.read_bytes()[:500])
    text.write_text("not a picture")
    code, rows, err = run("--predict", saved, pictures, missing, "--json")
    assert code == 1 and len(rows) == 22 + 1 and rows[-1]["pictures"] == 22
    assert len(err) == 3 and all(sum(str(path) in line for line in err) == 1 for path in broken)


def test_prompt_and_names_make_the_texts_of_the_classes(fit, pictures, toy, tmp_path):
    (tmp_path / "names.json").write_text('{"ring": "Hula-Hoop, für Kinder"}', encoding="utf-8")
    saved, before, _ = fit(pictures, "--method", "zero-shot", "--prompt", "ein {}.", "--names", tmp_path / "names.json")
    rows = toy[1](["ein circle.", "ein cross.", "ein Hula-Hoop, für Kinder.", "ein square.", "ein star.", "ein triangle."], 40)
    assert torch.equal(train.class_rows(toy[1], "ein {}.", ["Apple_scab"], 40), toy[1](["ein Apple scab."], 40))
    for learner in (before, train.load_tuned(saved, *toy)):
        assert torch.equal(learner.token_ids, rows[None, :, : learner.token_ids.shape[-1]])


@pytest.mark.parametrize("counts, options", [
    pytest.param([1, 1], "--method atha", id="one picture a class"), pytest.param([1] * 100, "--steps 1", id="100 classes of one picture"),
    pytest.param([1, 9, 4], "--method svl", id="uneven counts"), pytest.param([2, 9, 4], "--holdout 1", id="uneven counts, one held out"),
    pytest.param([3, 0, 3], "--minibatch 2", id="one class folder empty")])
def test_unusual_folders_and_names_beyond_ascii_work_and_so_do_duplicates(run, fit, pictures, tmp_path, counts, options):
    source = sorted(pictures.rglob("*.png"))
    for label, count in enumerate(counts):
        (tmp_path / "own" / f"Blatt 葉 {label} ☘").mkdir(parents=True)
        for i in range(count):
            shutil.copy(source[(label + i) % 8], tmp_path / "own" / f"Blatt 葉 {label} ☘" / f"{i}.png")
    fit(tmp_path / "own", *options.split())
    for what, lines in ((tmp_path / "own", sum(counts) + 1), (source[0], 1)):
        code, rows, _ = run("--predict", tmp_path / "saved", what, "--json")
        assert code == 0 and len(rows) == lines and rows[0]["class"].startswith("Blatt 葉 ")


def test_a_saved_model_refuses_other_weights_naming_both(run, fit, pictures, tmp_path):
    saved, _, _ = fit(pictures, "--method", "zero-shot")
    with safe_open(TOY_CLIP, "pt") as file:
        save_file(load_file(TOY_CLIP) | {"logit_scale": torch.ones(())}, tmp_path / "other", file.metadata())
    code, out, err = run("--predict", saved, pictures, "--weights", tmp_path / "other")
    assert (code, out, len(err)) == (2, "", 1) and all(clip_min.load(w)[0].fingerprint in err[0] for w in (TOY_CLIP, tmp_path / "other"))


@pytest.mark.parametrize("arguments, said", [
    ("--fit {tmp}/one --save {tmp}/new", "one class"), ("--fit {tmp}/empty --save {tmp}/new", "{tmp}/empty"),
    ("--fit {tmp}/nowhere --save {tmp}/new", "{tmp}/nowhere"), ("--fit {tmp}/bad --save {tmp}/new", "{tmp}/bad/ring/00.png"),
    ("--fit {pictures}", "--save"), (FIT + "--method atha tir", "one method"),
    (FIT + "--names {tmp}/nowhere", "{tmp}/nowhere"), (FIT + "--names {tmp}/bad/ring/00.png", "00.png"), (FIT + "--names {tmp}/[1]", "[1]"),
    (FIT + '--names {tmp}/{{"ring":3}}', '{{"ring":3}}'), (FIT + '--names {tmp}/{{"rnig":"hoop"}}', "'rnig'"),
    (FIT + "--prompt photo", "{{}}"), (FIT + "--holdout 4", "--holdout"), (FIT + "--holdout -1", "--holdout"),
    (FIT + "--steps 0", "--steps"), (FIT + "--batch -1", "--batch"), (FIT + "--save {pictures}", "cannot write {pictures}"),
    (FIT + "--save {tmp}/bare/new", "cannot write {tmp}/bare/new"), ("--predict {tmp}/nowhere {pictures}", "{tmp}/nowhere"),
    ("--predict {pictures} {pictures}", "{pictures}"), ("--predict {clip} {pictures}", "{clip}"), ("--predict {tmp}/bare x.png", "bare"),
    ("--predict {tmp}/half {pictures}", "{tmp}/half"), ("--predict {tmp}/saved {tmp}/empty", "pictures")])
def test_what_cannot_be_done_is_said_in_one_line(run, fit, pictures, tmp_path, arguments, said):
    shutil.copytree(pictures / "ring", tmp_path / "one" / "ring")
    shutil.copytree(pictures, tmp_path / "bad")
    (tmp_path / "empty").mkdir()
    for name in ("[1]", '{"ring":3}', '{"rnig":"hoop"}', "bad/ring/00.png"):   # files that hold their own names
        (tmp_path / name).write_text(name)
    save_file({"weight": torch.ones(2)}, tmp_path / "bare")
    if "saved" in arguments or "half" in arguments:
        with safe_open(fit(pictures, "--method", "clip-lora", "--steps", 1)[0], "pt") as file:
            save_file({name: file.get_tensor(name) for name in list(file.keys())[1:]}, tmp_path / "half", file.metadata())
    known = {"tmp": tmp_path, "pictures": pictures, "clip": TOY_CLIP}
    code, out, err = run(*(part.format(**known) for part in arguments.split()))
    assert code == 2 and out == "" and len(err) == 1 and err[0].startswith("train.py: error: "), (code, out, err)
    assert said.format(**known) in err[0] and "object has no attribute" not in err[0]
