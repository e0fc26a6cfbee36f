"""The command line as its users meet it: own pictures, prediction, export, what people get wrong."""
import json

import pytest
import torch
from conftest import HERE, TOY_CLIP, command, draw_pictures, refused, same
from safetensors import safe_open
from safetensors.torch import load_file

import clip_min
import data
import train
from train import main

FIT = ["--weights", TOY_CLIP, "--save", "leaf.safetensors"]


def run(capsys, *argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, in this process."""
    capsys.readouterr()
    code = main([str(word) for word in argv])
    return code, *capsys.readouterr()


# ----------------------------------------------------------------------------------------------- own pictures

def test_fit_predict_and_what_they_say(tmp_path, capsys):
    """Folders named like classes give an accuracy, on stderr; stdout is a tab-separated line a picture."""
    folder, new = draw_pictures(tmp_path / "shapes"), draw_pictures(tmp_path / "new", classes=3, each=4)
    code, out, _ = run(capsys, "--fit", folder, *FIT, "--holdout", 6, "--steps", 20, "--augment", "none")
    assert code == 0 and "tested on 36 pictures: zero-shot " in out and " ± " in out and "paired" in out
    code, out, err = run(capsys, "--predict", "leaf.safetensors", new, new / "circle/00.png")
    rows = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and len(rows) == 13 and all(len(row) == 5 for row in rows), "the weights are remembered"
    path, name, p, second, q = rows[0]
    assert path == str(new / "circle/00.png") and rows[12] == rows[0] and name != second
    assert 1 >= float(p) >= float(q) and float(p) + float(q) <= 1.000001
    right = sum(row[1] == row[0].split("/")[-2] for row in rows)
    assert f"accuracy {100 * right / 13:.2f} % of 13 pictures" in err and right > 3
    learner, _ = train.load_tuned("leaf.safetensors", train.parse(["--predict", "leaf.safetensors", "x"]))
    picture = learner.prepare(data.decode(new / "circle/00.png", learner.size))[None, None]
    assert learner.logits(picture)[0, 0].softmax(-1).max().item() == pytest.approx(float(p), abs=1e-5)


def test_fit_on_a_real_folder(tmp_path, capsys):
    """A broken picture is named and left out, exit code 1; a class gives to --holdout what it can spare."""
    folder = draw_pictures(tmp_path / "shapes", classes=3, each=4)
    (folder / "circle/00.png").write_bytes(b"no picture")
    for number in "012":
        (folder / f"square/0{number}.png").unlink()
    code, out, err = run(capsys, "--fit", folder, *FIT, "--holdout", 2, "--steps", 1)
    assert code == 1 and "00.png" in err
    assert "tested on 4 pictures, which tell little" in out and "±" not in out
    code, out, _ = run(capsys, "--predict", "leaf.safetensors", folder)
    assert code == 1 and out.count("\n") == 8   # what can be read is answered


@pytest.mark.parametrize("each, steps, batch", [(10, 100, 60), (11, 400, 16)])
def test_many_pictures_come_in_mini_batches(tmp_path, capsys, monkeypatch, each, steps, batch):
    """Up to 64 pictures every step sees all; of more 16, in four times the steps; what a flag says counts."""
    seen = []
    monkeypatch.setattr(train.Job, "learn", lambda job, tasks, *_: seen.append((job.recipe, tasks)) or 1 / 0)
    folder = draw_pictures(tmp_path / "shapes", each=each)
    for more, wanted in (([], steps), (["--steps", "7"], 7)):
        with pytest.raises(ZeroDivisionError):
            main(["--fit", str(folder), *map(str, FIT), *more])
        recipe, (task,) = seen.pop()
        assert recipe.steps == wanted and (recipe.minibatch or len(task.support)) == batch


def test_saved_files_are_held_to_their_weights_and_code(tmp_path, capsys):
    folder, other = draw_pictures(tmp_path / "shapes", classes=3, each=3), tmp_path / "other.safetensors"
    mine = tmp_path / "mine.py"
    mine.write_text("from atha import Part\nclass Mine(Part):\n    pass\n")
    assert run(capsys, "--fit", folder, *FIT, "--steps", 1, "--method", f"{mine}:Mine+atha")[0] == 0
    refused(capsys, ["--predict", "leaf.safetensors", folder], "allow it", f"{mine}:Mine")
    assert run(capsys, "--predict", "leaf.safetensors", folder, "--method", f"{mine}:Mine")[0] == 0
    clip, tokenizer = clip_min.load(TOY_CLIP)
    clip.visual.proj.data += 1
    clip_min.save(clip.state_dict(), other, {"config": safe_open(TOY_CLIP, "pt").metadata()["config"]})
    argv = ["--predict", "leaf.safetensors", folder, "--method", f"{mine}:Mine"]
    refused(capsys, [*argv, "--weights", other], "other --weights")
    mine.write_text(mine.read_text() + "    pass\n")
    train.load_own.cache_clear()
    refused(capsys, argv, "has changed")
    refused(capsys, ["--predict", TOY_CLIP, folder], "not a file that --save wrote")


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_export_is_the_same_model_in_transformers(tmp_path, capsys, family):
    transformers = pytest.importorskip("transformers")
    weights = TOY_CLIP if family == "clip" else HERE / "golden/backbones/hf-siglip2"
    folder = draw_pictures(tmp_path / "shapes", classes=3, each=3)
    run(capsys, "--fit", folder, *FIT, "--weights", weights, "--steps", 3, "--lr", 0.01)
    assert run(capsys, "--export", "leaf.safetensors", "out/leaf")[0] == 0
    theirs = transformers.AutoModel.from_pretrained("out/leaf").eval()
    args = train.parse(["--export", "leaf.safetensors", "x", "--device", "cpu"])
    learner, tokenizer = train.load_tuned("leaf.safetensors", args)
    picture = learner.prepare(data.decode(folder / "circle/00.png", learner.size))[None, None]
    classes = load_file("out/leaf/classes.safetensors")["embeddings"]
    with torch.no_grad():
        image = theirs.get_image_features(pixel_values=picture[0])
        image = getattr(image, "pooler_output", image)
        image = image / image.norm(dim=-1, keepdim=True)
        same(theirs.logit_scale.exp() * image @ classes.T, learner.logits(picture)[0])
    if family == "siglip" or len(tokenizer.id) > 1000:                   # the toy CLIP has no merges
        text = transformers.AutoTokenizer.from_pretrained("out/leaf")("a photo of a circle.")["input_ids"]
        assert tokenizer("a photo of a circle.", 64)[0].tolist()[: len(text)] == text
    pixels = transformers.AutoImageProcessor.from_pretrained("out/leaf")
    assert tuple(pixels.image_mean) == pytest.approx(learner.clip.config.mean)
    notes = safe_open("out/leaf/classes.safetensors", "pt").metadata()
    assert json.loads(notes["classes"]) == learner.classes


def test_what_no_weights_can_hold_is_not_exported(tmp_path, capsys):
    folder = draw_pictures(tmp_path / "shapes", classes=3, each=3)
    for method, weights in (("atha", TOY_CLIP), ("clip-lora", HERE / "golden/backbones/open_clip-pe-core")):
        argv = ["--fit", folder, "--weights", weights, "--save", "leaf.safetensors", "--method", method]
        assert run(capsys, *argv, "--steps", 1)[0] == 0
        refused(capsys, ["--export", "leaf.safetensors", "out"], "--predict")


# -------------------------------------------------------------------------------------- what people get wrong

@pytest.mark.parametrize("argv, words", [
    ([], ["give one of --dataset", "--dataset toy"]),
    (["--dataset", "toy", "--rhoo", "1"], ["--rhoo", "--help"]),
    (["--dataset", "toy", "--shot", "one"], ["--shot", "one"]),
    (["--dataset", "toy", "--method", "ahta"], ["ahta", "clip-lora"]),
    (["--dataset", "toy", "--ra", "sofmax"], ["sofmax", "softmax"]),
    (["--dataset", "toy", "--recipe", "papers"], ["papers", "released-atha"]),
    (["--dataset", "toy", "--way", "17"], ["17", "16 classes"]),
    (["--dataset", "toy", "--split"], ["no split", "split_zhou"]),
    (["--dataset", "toy", "--prompt", "a photo"], ["a photo", "nothing tells them apart"]),
    (["--dataset", "chestx", "cropdiseases", "--weights", TOY_CLIP], ["chestx", "cropdiseases", "kaggle"]),
    (["--dataset", "nowhere", "--weights", TOY_CLIP], ["nowhere", "eurosat"]),
    (["--dataset", "toy", "--weights", "nothing.pt"], ["nothing.pt"]),
    (["--fit", "nowhere", "--weights", TOY_CLIP], ["nowhere"]),
    (["--predict", "nothing.safetensors", "."], ["nothing.safetensors"]),
    (["--dataset", "toy", "--out", "/dev/null/x", "--method", "zero-shot"], ["/dev/null"]),
    (["--dataset", "toy", "--method", "maple", "--weights", HERE / "golden/backbones/hf-siglip2"], ["maple"]),
])
def test_one_line_says_what_to_do(capsys, argv, words):
    refused(capsys, argv, *words)


def test_help_tells_every_flag_with_its_comment(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for part in ("--rho RHO share of head tokens (default 0.1)", "--holdout HOLDOUT pictures a class",
                 "{released,softmax}", "methods: zero-shot, clip-lora", "datasets: toy, eurosat"):
        assert part in text, part


def test_as_a_program(tmp_path):
    """From another folder, with the toy world: a table on stdout, progress on stderr."""
    done = command("--dataset", "toy", "--episodes", "2", "--steps", "2", "--query", "2", "--shot", "1", "2")
    assert done.returncode == 0 and "toy-5way2-1shot-atha" in done.stderr
    assert [line.split(" | ")[0] for line in done.stdout.splitlines() if line[:2] == "| "] == \
        ["| 1-shot", "| zero-shot", "| atha", "| 2-shot", "| zero-shot", "| atha"]
