"""Your own pictures: --fit on a folder of class folders, --save, --predict, and what either says when it cannot."""
import json
import shutil

import pytest
import torch
from conftest import TOY_CLIP, command, same
from safetensors.torch import load_file, safe_open, save_file

import clip_min
import data
import train


@pytest.fixture
def pictures(folder):
    """Six class folders (circle, square, triangle, star, cross, ring) of four pictures each, 00.png to 03.png."""
    for picture in folder.rglob("*.png"):
        if int(picture.stem) >= 4:
            picture.unlink()
    return folder


@pytest.fixture
def fitted(monkeypatch):
    """The support set and the Learner of every adaptation, as it was before it was saved."""
    seen, adapt = [], train.adapt

    def spy(clip, support, *args, **kwargs):
        seen.append((support, adapt(clip, support, *args, **kwargs)))
        return seen[-1][1]
    monkeypatch.setattr(train, "adapt", spy)
    return seen


@pytest.fixture
def run(capsys):
    """run(arguments) -> exit code, standard output, lines of standard error without the progress of decoding."""
    def run(*args, weights=TOY_CLIP):
        capsys.readouterr()
        try:
            code = train.main([*map(str, args), "--weights", str(weights)])
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line and not line.startswith("decoding")]
    return run


@pytest.fixture
def fit(run, tmp_path):
    """fit(folder, options) -> the saved file and standard output; three steps unless the options say otherwise."""
    def fit(folder, *options):
        saved = tmp_path / "saved.safetensors"
        code, out, err = run("--fit", folder, "--save", saved, "--steps", 3, *options)
        assert code == 0, err
        return saved, out
    return fit


def prepared(paths, centre=False):
    return data.plain(torch.stack([data.decode(path, 256) for path in paths]), 48, centre)[None]


def rows_of(out):
    return [json.loads(line) for line in out.splitlines()]


def test_a_saved_model_predicts_in_a_fresh_process_exactly_what_it_did_before(fit, fitted, pictures):
    saved, _ = fit(pictures)
    paths = sorted(pictures.rglob("*.png"))
    before = fitted[0][1].logits(prepared(paths))[0].softmax(-1).topk(2)
    fresh = command("--predict", saved, pictures, "--json", "--weights", TOY_CLIP)
    assert fresh.returncode == 0, fresh.stderr
    rows, classes = rows_of(fresh.stdout)[:-1], sorted(folder.name for folder in pictures.iterdir())
    assert [row["picture"] for row in rows] == [str(path) for path in paths]
    assert [[row["probability"], row["runner_up_probability"]] for row in rows] == before.values.tolist()
    assert [[row["class"], row["runner_up"]] for row in rows] == [[classes[i] for i in top] for top in before.indices.tolist()]


@pytest.mark.parametrize("method", ["zero-shot", "clip-lora", "atha", "tir", "svl", "atha+tir", "released"])
def test_what_was_learned_and_no_more_is_saved_and_three_lines_bring_it_back(fit, fitted, pictures, method):
    saved, _ = fit(pictures, *(["--recipe", "released"] if method == "released" else ["--method", method]))
    before, images = fitted[0][1], prepared(sorted(pictures.rglob("*.png")), centre=method == "released")
    clip, tokenizer = clip_min.load(TOY_CLIP)
    learner = train.load_tuned(saved, clip, tokenizer)
    logits = learner.logits(images)                                      # (1, pictures, classes)
    assert learner.classes == ["circle", "cross", "ring", "square", "star", "triangle"]
    assert torch.equal(logits, before.logits(images))
    assert saved.stat().st_size < sum(4 * t.numel() for t in before.learned().values()) + 20_000 < 2e6


def test_holdout_reports_zero_shot_and_tuned_accuracy_on_pictures_kept_back(fit, fitted, folder):
    _, out = fit(folder, "--holdout", 14, "--method", "clip-lora", "--steps", 12, "--lr", "1e-3")
    lines = [line for line in out.splitlines() if "held out" in line]
    zero_shot, tuned = (float(line.split(":")[1].split("%")[0]) for line in lines)
    assert fitted[0][0].shape[1] == 6 * 6 and all("84" in line for line in lines)
    assert lines[0].startswith("zero-shot") and lines[1].startswith("clip-lora") and tuned > zero_shot > 100 / 6


@pytest.mark.parametrize("method", ["clip-lora", "atha", "svl"])
def test_three_pictures_at_a_time_give_the_full_batch_result_without_dropout(run, fit, fitted, pictures, method):
    for batch in (100, 3):
        code, _, err = run("--fit", pictures, "--save", pictures / "saved", "--steps", 3, "--method", method, "--dropout", 0, "--batch", batch)
        assert code == 0 and ("3 of 24 pictures at a time" in " ".join(err)) == (batch == 3)
    (_, whole), (_, chunked) = fitted
    images = prepared(sorted(pictures.rglob("*.png")))
    same(chunked.losses, whole.losses)
    same(chunked.logits(images), whole.logits(images))


def test_a_folder_of_class_folders_gives_accuracy_and_a_confusion_matrix_that_sum_up(run, fit, pictures):
    (pictures / "ring" / "03.png").unlink()
    saved, _ = fit(pictures, "--method", "zero-shot")
    code, out, _ = run("--predict", saved, pictures, "--json")
    *rows, total = rows_of(out)
    confusion, classes = torch.tensor(total["confusion"]), total["classes"]
    pairs = [(row["picture"].split("/")[-2], row["class"]) for row in rows]
    assert code == 0 and total["pictures"] == len(rows) == confusion.sum() == 23
    assert total["accuracy"] == pytest.approx(100 * sum(true == said for true, said in pairs) / 23)
    assert all(confusion[i, j] == pairs.count((a, b)) for i, a in enumerate(classes) for j, b in enumerate(classes))
    assert all(1 >= row["probability"] >= row["runner_up_probability"] >= 0 and row["class"] != row["runner_up"] for row in rows)
    code, table, _ = run("--predict", saved, pictures)
    assert code == 0 and f"{total['accuracy']:.2f} % of 23 pictures" in table and all(row["picture"] in table for row in rows)


def test_pictures_that_cannot_be_read_are_named_and_skipped_and_the_exit_code_is_1(run, fit, pictures, tmp_path):
    saved, _ = fit(pictures, "--method", "zero-shot")
    whole, cut, text = (pictures / "ring" / f"0{i}.png" for i in range(3))
    cut.write_bytes(cut.read_bytes()[:500])
    text.write_text("not a picture")
    code, out, err = run("--predict", saved, tmp_path / "missing.png", cut, whole, text)
    assert code == 1 and len(out.splitlines()) >= 1 and str(whole) in out
    assert len(err) == 3 and all(any(str(path) in line for line in err) for path in (tmp_path / "missing.png", cut, text))
    code, out, _ = run("--predict", saved, pictures, "--json")
    assert code == 1 and rows_of(out)[-1]["pictures"] == len(rows_of(out)) - 1 == 22


def test_prompt_and_names_make_the_texts_of_the_classes(fit, fitted, pictures, toy, tmp_path):
    (tmp_path / "names.json").write_text('{"ring": "Hula-Hoop, für Kinder"}', encoding="utf-8")
    fit(pictures, "--method", "zero-shot")
    saved, _ = fit(pictures, "--method", "zero-shot", "--prompt", "ein {}.", "--names", tmp_path / "names.json")
    texts = ["ein circle.", "ein cross.", "ein Hula-Hoop, für Kinder.", "ein square.", "ein star.", "ein triangle."]
    rows = toy[1](texts, toy[0].config.context)[None]
    plain, named, loaded = (learner.token_ids for learner in (fitted[0][1], fitted[1][1], train.load_tuned(saved, *toy)))
    assert torch.equal(named, rows[..., : named.shape[-1]]) and torch.equal(named, loaded) and plain.shape != named.shape


@pytest.mark.parametrize("counts, options", [
    pytest.param({"a": 1, "b": 1}, [], id="one picture a class"),
    pytest.param({f"class {i}": 1 for i in range(100)}, [], id="100 classes of one picture"),
    pytest.param({"a": 1, "b": 9, "c": 4}, ["--method", "svl"], id="uneven counts"),
    pytest.param({"a": 2, "b": 9, "c": 4}, ["--holdout", "1"], id="uneven counts, one held out"),
    pytest.param({"Blätter": 2, "葉": 2, "лист ☘": 2}, [], id="names beyond ASCII"),
    pytest.param({"a": 3, "b": 3, "nothing": 0}, ["--minibatch", "2"], id="one class folder empty"),
])
def test_unusual_folders_work(run, fit, pictures, tmp_path, counts, options):
    source = sorted(pictures.rglob("*.png"))
    for start, (name, count) in enumerate(counts.items()):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(count):                                           # the same picture may come under several names and classes
            shutil.copy(source[(start + i) % len(source)], tmp_path / "own" / name / f"{i}.png")
    saved, _ = fit(tmp_path / "own", *options)
    code, out, _ = run("--predict", saved, tmp_path / "own", "--json")
    assert code == 0 and len(rows_of(out)) == sum(counts.values()) + 1
    assert rows_of(out)[-1]["classes"] == sorted(name for name in counts if counts[name])
    code, out, _ = run("--predict", saved, source[0])
    assert code == 0 and str(source[0]) in out


@pytest.fixture
def other_clip(tmp_path):
    """The toy CLIP with one number changed."""
    with safe_open(TOY_CLIP, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(TOY_CLIP)
    save_file(tensors | {"logit_scale": tensors["logit_scale"] + 1}, tmp_path / "other.safetensors", metadata)
    return tmp_path / "other.safetensors"


def test_a_saved_model_refuses_other_weights_naming_both(run, fit, pictures, other_clip):
    saved, _ = fit(pictures, "--method", "zero-shot")
    code, out, err = run("--predict", saved, pictures, weights=other_clip)
    assert code == 2 and out == "" and len(err) == 1
    assert all(clip_min.load(weights)[0].fingerprint in err[0] for weights in (TOY_CLIP, other_clip))


FIT = "--fit {pictures} --save {tmp}/new.safetensors --steps 3 "


@pytest.mark.parametrize("arguments, said", [
    ("--fit {tmp}/one --save {tmp}/new", "one class"), ("--fit {tmp}/empty --save {tmp}/new", "{tmp}/empty"),
    ("--fit {tmp}/nowhere --save {tmp}/new", "{tmp}/nowhere"), ("--fit {tmp}/broken --save {tmp}/new", "{tmp}/broken/b/0.png"),
    ("--fit {pictures}", "--save"), (FIT + "--method atha tir", "one method"), (FIT + "--method all", "one method"),
    (FIT + "--names {tmp}/nowhere.json", "{tmp}/nowhere.json"), (FIT + "--names {pictures}/ring/00.png", "00.png"),
    (FIT + "--names {tmp}/list.json", "{tmp}/list.json"), (FIT + "--names {tmp}/number.json", "{tmp}/number.json"),
    (FIT + "--names {tmp}/unknown.json", "'rnig'"), (FIT + "--prompt photo", "{{}}"),
    (FIT + "--holdout 4", "--holdout"), (FIT + "--holdout -1", "--holdout"), (FIT + "--steps 0", "--steps"), (FIT + "--batch -1", "--batch"),
    ("--fit {pictures} --save {tmp}/list.json/new", "{tmp}/list.json/new"), ("--fit {pictures} --save {pictures}", "cannot write {pictures}"),
    ("--predict {tmp}/nowhere {pictures}", "{tmp}/nowhere"), ("--predict {pictures} {pictures}", "{pictures}"),
    ("--predict {pictures}/ring/00.png {pictures}", "00.png"), ("--predict {clip} {pictures}", "{clip}"),
    ("--predict {tmp}/bare {pictures}", "{tmp}/bare"), ("--predict {tmp}/half {pictures}", "{tmp}/half"),
    ("--predict {saved}", "pictures"), ("--predict {saved} {tmp}/empty", "pictures"),
])
def test_what_cannot_be_done_is_said_in_one_line(run, fit, pictures, tmp_path, arguments, said):
    (tmp_path / "empty").mkdir()
    shutil.copytree(pictures / "ring", tmp_path / "one" / "ring")
    shutil.copytree(pictures / "ring", tmp_path / "broken" / "a")
    (tmp_path / "broken" / "b").mkdir()
    (tmp_path / "broken" / "b" / "0.png").write_text("not a picture")
    for name, text in {"list": "[1]", "number": '{"ring": 3}', "unknown": '{"rnig": "a ring"}'}.items():
        (tmp_path / f"{name}.json").write_text(text)
    saved = fit(pictures, "--method", "clip-lora", "--steps", 1)[0] if "saved" in arguments or "half" in arguments else None
    if "half" in arguments:
        with safe_open(saved, "pt") as file:
            save_file({name: file.get_tensor(name) for name in list(file.keys())[1:]}, tmp_path / "half", file.metadata())
    save_file({"weight": torch.ones(2)}, tmp_path / "bare")
    known = {"tmp": tmp_path, "pictures": pictures, "clip": TOY_CLIP, "saved": saved}
    code, out, err = run(*(argument.format(**known) for argument in arguments.split()))
    assert code == 2 and out == "" and len(err) == 1, (code, out, err)
    assert err[0].startswith("train.py: error: ") and said.format(**known) in err[0]
    assert not any(word in err[0] for word in ("object has no", "Errno", "Expecting value"))
