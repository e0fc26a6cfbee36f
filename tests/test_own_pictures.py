"""Your own pictures: --fit on a folder of class folders, --save, --predict, and what they say when they cannot."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TOY_CLIP, command, draw_pictures, same
from PIL import Image
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
    """run(arguments) -> exit code, standard output (with --json: its rows), lines of standard error but progress and the note on percentages."""
    def run(*args):
        capsys.readouterr()
        code, (out, err) = train.main(["--weights", str(TOY_CLIP), *map(str, args)]), capsys.readouterr()
        out = [json.loads(line) for line in out.splitlines()] if "--json" in args else out
        return code, out, [line for line in err.splitlines()
                           if line and not line.startswith(("decoding", "the percentages", "fitting", "classifying")) and "s left" not in line]
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
        return tmp_path / "saved", learners[-1], out + "\n".join(err)
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
    zero_shot, tuned = (line.split() for line in said.splitlines() if line.startswith(("zero-shot:", "clip-lora:")))
    assert "90 pictures held out; chance, the most frequent class: 16.67 %" in said and "tuning helps" in said
    assert 100 / 6 < float(zero_shot[1]) < float(tuned[1]) <= 100


@pytest.mark.parametrize("method", ["clip-lora", "atha", "svl"])
def test_three_pictures_at_a_time_give_the_full_batch_result_without_dropout(fit, pictures, method, monkeypatch):
    _, whole, _ = fit(pictures, "--method", method, "--dropout", 0, "--batch", 100)
    seen, forward = [], clip_min.VisionTransformer.forward
    monkeypatch.setattr(clip_min.VisionTransformer, "forward", lambda self, images, *rest: seen.append(len(images)) or forward(self, images, *rest))
    _, chunked, _ = fit(pictures, "--method", method, "--dropout", 0, "--batch", 3)
    assert set(seen) == {3} and (method == "svl" or len(seen) == 2 * 3 * 8), "in parts, each computed again for backward"
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


def test_of_a_folder_with_a_split_the_training_part_is_fitted_which_is_said(fit, tmp_path):
    for part, each in (("train", 4), ("test", 2)):
        draw_pictures(tmp_path / "own" / part, 3, each)
    _, _, said = fit(tmp_path / "own", "--method", "zero-shot")
    assert "of its 18 pictures, the 12 of its training part are used" in said


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


# ------------------------------------------------------------------------------------------- how far to trust a fit

@pytest.mark.parametrize("counts, folds", [((4, 4, 4), 2), ((2, 3), 2), ((5, 3, 7), 3), ((10, 10, 11), 5), ((2, 2), 2)])
def test_folds_ask_for_every_picture_once_of_a_fit_that_has_not_seen_it(counts, folds):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    pool = data.Pool(torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), labels, [f"c{i}" for i in range(len(counts))], "")
    whole, *tasks = train.own_tasks(pool, 0, folds, seed=1)
    assert sorted(whole.support.tolist()) == list(range(len(labels))) and not len(whole.query) and len(tasks) == folds
    assert sorted(torch.cat([task.query for task in tasks]).tolist()) == list(range(len(labels)))
    assert len({len(task.support) for task in tasks}) == 1
    for task in tasks:
        seen = [*task.support.tolist(), *task.query.tolist()]
        assert len(set(seen)) == len(seen) >= len(labels) - 1
        assert torch.equal(task.truth, labels[task.query]) and torch.equal(task.labels, labels[task.support])
        assert task.labels.unique().tolist() == list(range(len(counts))), "every class is learned in every fold"


def test_a_holdout_keeps_back_so_many_of_each_class():
    pool = data.Pool(torch.zeros(9, 3, 1, 1, dtype=torch.uint8), torch.arange(9) // 3, ["a", "b", "c"], "")
    task, = train.own_tasks(pool, 2, 0, seed=3)
    assert task.truth.tolist() == [0, 0, 1, 1, 2, 2] and task.labels.tolist() == [0, 1, 2]
    assert sorted([*task.support.tolist(), *task.query.tolist()]) == list(range(9))


def test_the_temperature_is_found_again_and_a_faultless_few_is_not_certain():
    g = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(5_000, 5, generator=g)
    truth = torch.multinomial((logits / 3).softmax(-1), 1, generator=g)[:, 0]
    assert train.temperature_of(logits, truth) == pytest.approx(3, rel=0.1)
    few = 30 * torch.eye(5)
    said = (few / train.temperature_of(few, torch.arange(5))).softmax(-1).max(-1).values
    assert 0.7 < said.min() and said.max() < 0.95, "five right answers of five"


def test_the_calibration_error_is_that_of_its_definition():
    probabilities = torch.rand(300, 4, generator=torch.Generator().manual_seed(1)).softmax(-1) ** 3
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    best, said = probabilities.max(-1)                           # too sure where it is sure, not sure enough where not
    truth, error = torch.where(best < 0.45, said, torch.arange(300) % 4), 0.0
    for low in [k / 10 for k in range(10)]:
        inside = [i for i in range(300) if low <= probabilities[i].max() < low + 0.1]
        if inside:
            right = sum(int(probabilities[i].argmax()) == truth[i] for i in inside) / len(inside)
            error += len(inside) / 300 * abs(right - sum(probabilities[i].max().double() for i in inside) / len(inside))
    assert train.calibration_error(probabilities, truth) == pytest.approx(float(error), abs=1e-6)
    assert train.calibration_error(torch.eye(3), torch.arange(3)) == 0


@pytest.mark.parametrize("tuned, verdict", [(4, "within noise"), (6, "tuning helps"), (0, "within noise"), (-6, "tuning harms")])
def test_a_difference_within_noise_is_called_so(toy, pictures, capsys, monkeypatch, tuned, verdict):
    pool = data.load_folder(pictures)
    truth = torch.arange(24) % 6
    task = train.Task(torch.arange(6), torch.arange(6) * 4, torch.arange(6), torch.arange(24), truth)
    said = {name: truth.clone() for name in ("zero-shot", "clip-lora")}
    said["zero-shot" if tuned > 0 else "clip-lora"][: abs(tuned)] += 1      # so many wrong that the other gets right
    monkeypatch.setattr(train.Job, "logits", lambda job, learner, tasks: [
        20 * torch.eye(7)[said["clip-lora" if learner is tuned_one else "zero-shot"], :6]])
    rows = train.class_rows(toy[1], "{}", pool.classes, 40)
    job = train.Job(toy[0], pool, rows, "clip-lora", train.Recipe())
    tuned_one = train.Learner(toy[0], rows[None], "clip-lora", job.recipe)
    temperature = train.trust(job, tuned_one, [task])
    out = capsys.readouterr().out
    assert verdict in out and f"{100 * tuned / 24:+.2f}" in out and 0.01 <= temperature <= 100
    assert "circle             4 " in out and ("cross 1" in out) == (tuned < 0), "what is taken for what when tuned"


def test_folds_tell_what_to_expect_then_everything_is_fitted_and_kept(run, fit, pictures):
    saved, learner, said = fit(pictures, "--folds", 2, "--method", "clip-lora", "--dropout", 0)
    for line in ("24 pictures held out in 2 folds", "zero-shot:", "clip-lora:", "difference:", "taken for",
                 "percentages are off by"):
        assert line in said
    assert len(learner.token_ids) == 1
    clip, tokenizer = clip_min.load(TOY_CLIP)
    tuned = train.load_tuned(saved, clip, tokenizer)
    assert f"temperature {tuned.temperature:.3g}, which was fitted to the same pictures" in said and tuned.temperature != 1
    wanted = (tuned.logits(prepared(pictures))[0] / tuned.temperature).softmax(-1).max(-1).values
    code, rows, err = run("--predict", saved, pictures, "--json")
    assert code == 0 and [row["probability"] for row in rows[:-1]] == wanted.tolist() and not err
    _, whole, _ = fit(pictures, "--method", "clip-lora", "--dropout", 0)
    same(tuned.logits(prepared(pictures)), whole.logits(prepared(pictures)))          # folds change nothing but that


def test_without_pictures_held_out_the_percentages_are_called_what_they_are(fit, pictures, capsys):
    saved, _, _ = fit(pictures, "--method", "zero-shot")
    train.main(["--predict", str(saved), str(pictures / "ring"), "--json"])
    out, err = capsys.readouterr()
    assert "the percentages are not calibrated" in err and all(json.loads(line) for line in out.splitlines())


@pytest.mark.parametrize("options, wanted", [([], (16, 400)), (["--minibatch", 0], (0, 400)), (["--steps", 7], (16, 7)),
                                             (["--recipe", "released", "--method", "svl"], (16, 5000))])
def test_many_pictures_are_fitted_in_mini_batches(run, tmp_path, monkeypatch, options, wanted):
    def stop(job, tasks, *rest):
        raise train.UsageError(f"{job.recipe.minibatch} {job.recipe.steps} of {len(tasks[0].support)}")
    monkeypatch.setattr(train, "trained", stop)
    folder = draw_pictures(tmp_path / "pictures", 6, 11)
    code, _, err = run("--fit", folder, "--save", tmp_path / "saved", *options)
    assert code == 2 and err == ["train.py: error: {} {} of 66".format(*wanted)]
    _, _, err = run("--fit", folder, "--save", tmp_path / "saved", "--holdout", 1)
    assert err == ["train.py: error: 0 100 of 60"]


# ------------------------------------------------------------------------------------------------ saved files

def changed(saved, **notes):
    """A saved file with notes that are JSON already."""
    with safe_open(saved, "pt") as file:
        tensors, stored = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    save_file(tensors, saved, stored | notes)


def test_the_weights_of_a_fit_are_remembered_while_they_are_there(fit, pictures, tmp_path, capsys):
    shutil.copy(TOY_CLIP, tmp_path / "weights")
    saved, _, _ = fit(pictures, "--method", "zero-shot", "--weights", tmp_path / "weights")
    assert train.main(["--predict", str(saved), str(pictures / "ring")]) == 0
    with safe_open(TOY_CLIP, "pt") as file:
        save_file(load_file(TOY_CLIP) | {"logit_scale": torch.ones(())}, tmp_path / "weights", file.metadata())
    for said in ("give the right --weights", f"weights {tmp_path}/weights, which are not there: give --weights"):
        assert train.main(["--predict", str(saved), str(pictures / "ring")]) == 2
        assert said in capsys.readouterr().err
        (tmp_path / "weights").unlink(missing_ok=True)
    changed(saved, place='"hf-hub:some/where"')
    assert train.main(["--predict", str(saved), str(pictures / "ring")]) == 2
    assert "hf-hub:some/where, which are not there: give --weights" in capsys.readouterr().err


@pytest.mark.parametrize("note, value", [
    ("classes", '["a"]'), ("classes", '{"a": 1}'), ("classes", '["a", "a", "a", "b", "c", "d"]'), ("classes", "[1, 2, 3, 4, 5, 6]"),
    ("phrases", '["a", "b"]'), ("phrases", "null"), ("method", "3"), ("method", '"no such"'), ("recipe", "[]"),
    ("recipe", "{}"), ("weights", "null"), ("place", "7"), ("temperature", "NaN"), ("temperature", "-1.0"), ("temperature", "1e9"),
    ("temperature", '"1"'), ("temperature", "true"), ("size", "0"), ("size", "1.5"), ("size", "99999"), ("classes", "[" * 9999), ("size", "")])
def test_a_note_that_is_not_of_its_kind_is_refused(run, fit, pictures, note, value):
    saved, _, _ = fit(pictures, "--method", "zero-shot")
    changed(saved, **{note: value})
    code, out, err = run("--predict", saved, pictures)
    assert (code, out, len(err)) == (2, "", 1) and err[0].startswith("train.py: error: ")


@pytest.mark.parametrize("field, value", [("rank", 0), ("rank", True), ("rank", "4"), ("dropout", 2), ("dropout", "NaN"), ("augment", "all"),
                                          ("scale", None), ("tir_blocks", [99]), ("prompt", "no place"), ("lr", 10 ** 400), ("tune", "no such")])
def test_fields_of_a_saved_recipe_are_checked_as_those_of_the_command_line(run, fit, pictures, field, value):
    saved, learner, _ = fit(pictures, "--method", "clip-lora")
    changed(saved, recipe=json.dumps(train.asdict(learner.recipe) | {field: value}).replace('"NaN"', "NaN"))
    code, out, err = run("--predict", saved, pictures)
    assert (code, out, len(err)) == (2, "", 1) and err[0].startswith("train.py: error: ") and "is not" in err[0] + "is not" * (field in ("prompt", "tune"))


@pytest.mark.parametrize("change", [lambda t: t.to(torch.float16), lambda t: t[:0], lambda t: t / 0, lambda t: t.to(torch.int8)])
def test_tensors_of_another_kind_are_refused(run, fit, pictures, change):
    saved, _, _ = fit(pictures, "--method", "clip-lora")
    with safe_open(saved, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        save_file(tensors | {name: change(t).contiguous() for name, t in list(tensors.items())[:1]}, saved, file.metadata())
    code, out, err = run("--predict", saved, pictures)
    assert (code, out, len(err)) == (2, "", 1) and "does not hold what clip-lora learns" in err[0]


@pytest.mark.parametrize("where", ["method", "tune"])
def test_no_code_is_run_because_a_saved_file_names_it(run, fit, pictures, tmp_path, where):
    saved, learner, _ = fit(pictures, "--method", "clip-lora")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    evil, recipe = f"{tmp_path / 'evil.py'}:Evil", train.asdict(learner.recipe)
    changed(saved, **({"method": json.dumps(evil)} if where == "method" else {"recipe": json.dumps(recipe | {"tune": evil})}))
    code, out, err = run("--predict", saved, pictures)
    assert (code, out, len(err)) == (2, "", 1) and f"{evil}, a method of your own: name it by --method" in err[0]
    assert not (tmp_path / "ran").exists()


def test_only_ordinary_files_are_written_and_names_too_long_are_said_before_the_work(run, pictures, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for save, said in ((tmp_path / "pipe", "not an ordinary file"), (tmp_path / ("n" * 250), "too long")):
        code, out, err = run("--fit", pictures, "--save", save, "--steps", 1)
        assert (code, out, len(err)) == (2, "", 1) and f"cannot write {save}" in err[0] and said in err[0]
    assert (tmp_path / "pipe").is_fifo() and sorted(p.name for p in tmp_path.iterdir()) == ["pictures", "pipe"]


# ------------------------------------------------------------------------------------------------ new pictures

def test_links_are_followed_once_hidden_ones_left_out_and_unreadable_folders_named(run, fit, pictures, tmp_path, monkeypatch):
    saved, _, _ = fit(pictures, "--method", "zero-shot")
    new = tmp_path / "new"
    (new / "album.png").mkdir(parents=True)
    shutil.copy(pictures / "star" / "00.png", new / "album.png" / "star.png")
    (new / "ring").symlink_to(pictures / "ring")
    (new / "up").symlink_to(new)
    shutil.copytree(pictures / "cross", new / ".hidden")
    (new / "closed").mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", closed)
    code, rows, err = run("--predict", saved, new, "--json")
    names = [row["picture"] for row in rows[:-1]]
    assert names == [f"{new}/album.png/star.png", *(f"{new}/ring/0{i}.png" for i in range(4))] and rows[-1]["pictures"] == 4
    assert code == 1 and len(err) == 1 and "skipped: " in err[0] and f"{new}/closed" in err[0]


@pytest.mark.parametrize("columns, top", [(60, 2), (80, 3), (40, 1)])
def test_a_table_fits_the_terminal(run, fit, pictures, monkeypatch, columns, top):
    monkeypatch.setenv("COLUMNS", str(columns))
    saved, _, _ = fit(pictures, "--method", "zero-shot")
    code, out, _ = run("--predict", saved, pictures, "--top", top)
    lines = out.splitlines()
    assert code == 0 and max(map(len, lines)) < columns and all(line.count(".png") == 1 for line in lines[1:25])
    assert all(len(line.split()) == 1 + 2 * top for line in lines[:25])


def test_a_method_given_with_a_saved_file_is_that_of_the_file(run, fit, pictures):
    saved, _, _ = fit(pictures)
    assert train.read_saved(saved)[1]["method"] == "clip-lora", "what --fit takes where no method is named"
    for argv in (["--predict", saved, pictures / "ring"], ["--export", saved, pictures / "out"]):
        code, _, err = run(*argv, "--method", "atha")
        assert code == 2 and err == [f"train.py: error: {saved} was fitted with clip-lora, not with atha"]
        assert run(*argv, "--method", "clip-lora")[0] == 0


def test_top_names_so_many_classes_surest_first(run, fit, pictures):
    saved, _, _ = fit(pictures, "--method", "zero-shot")
    _, rows, _ = run("--predict", saved, pictures / "ring", "--json", "--top", 99)
    for row in rows[:-1]:
        assert sorted(name for name, _ in row["top"]) == CLASSES and sum(p for _, p in row["top"]) == pytest.approx(1)
        assert [p for _, p in row["top"]] == sorted((p for _, p in row["top"]), reverse=True)
        assert row["top"][:2] == [[row["class"], row["probability"]], [row["runner_up"], row["runner_up_probability"]]]


def test_a_sheet_shows_what_is_wrong_first_then_what_is_least_sure(run, fit, pictures, tmp_path):
    saved, _, _ = fit(pictures, "--method", "zero-shot")
    _, rows, _ = run("--predict", saved, pictures, "--json", "--draw", tmp_path / "sheet.png")
    right = {row["picture"]: row["class"] == Path(row["picture"]).parent.name for row in rows[:-1]}
    order = sorted(rows[:-1], key=lambda row: (right[row["picture"]], row["probability"] * (1 if right[row["picture"]] else -1)))
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert 0 < sum(right.values()) < 24 and sheet.size == (6 * 192, 4 * 236)
    for i, row in enumerate(order):
        x, y = i % 6 * 192, i // 6 * 236
        tile = sheet.crop((x, y, x + 188, y + 188))
        wanted = Image.open(row["picture"]).convert("RGB").resize((256, 256), 3).resize((188, 188))
        difference = torch.tensor(list(tile.tobytes())).float() - torch.tensor(list(wanted.tobytes())).float()
        assert difference.abs().mean() < 2, f"tile {i} is not {row['picture']}"
        below = sheet.crop((x, y + 188, x + 188, y + 236))
        assert min(below.tobytes()) < 100, "and has its caption"


@pytest.mark.parametrize("arguments, said", [
    ("--fit {pictures} --save {tmp}/new --json", "--fit does not take --json"), ("--predict {tmp}/x {pictures} --prompt {{}}", "--predict does not take --prompt"),
    ("--predict {tmp}/x {pictures} --shot 5", "--predict does not take --shot"), ("--fit {pictures} --save {tmp}/new --episodes 3", "--fit does not take --episodes"),
    ("--fit {pictures} --save {tmp}/new --top 3", "--fit does not take --top"), ("--fit {pictures} --save {tmp}/new --folds 1", "--folds is a number from 2 up"),
    ("--fit {pictures} --save {tmp}/new --folds 2 --holdout 1", "the place of --holdout"), ("--predict {tmp}/x {pictures} --top 0", "--top: must be from 1"),
    ("--fit {pictures} --save {tmp}/new --folds 5", "--folds 5 takes 5 pictures of every class or more: 'circle' has 4"),
    ("--fit {tmp}/alike --save {tmp}/new", "classes 'black rot' and 'black_rot' have the same text"),
    ("--fit {pictures} --save {tmp}/new --draw {tmp}/x.png", "--fit does not take --draw"), ("--export {tmp}/x {tmp}/y --top 3", "--export does not take --top")])
def test_flags_that_would_be_ignored_and_fits_that_cannot_be_are_refused(run, pictures, tmp_path, arguments, said):
    for i, name in enumerate(("black rot", "black_rot")):
        shutil.copytree(pictures / CLASSES[i], tmp_path / "alike" / name)
    code, out, err = run(*(part.format(tmp=tmp_path, pictures=pictures) for part in arguments.split()))
    assert code == 2 and not out and len(err) == 1 and said in err[0], err
    assert not (tmp_path / "new").exists()


def test_a_folder_called_like_a_dataset_is_the_folder(fit, run, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures.rename("toy")
    saved, _, _ = fit("toy", "--method", "zero-shot")
    assert train.read_saved(saved)[1]["classes"] == CLASSES
