"""What cannot be used: weights, merges, pictures, tables, command lines. Each is said in one line, and nothing half-done stays."""
import csv, gzip, pickle, random, re, runpy, struct, sys
from pathlib import Path

import pytest
import torch
from conftest import TOY_CLIP, draw_pictures, holds, kept, refused, said
from PIL import Image
from safetensors.torch import load_file, save, save_file

import clip_min
import data
import train

# ------------------------------------------------------------------------------------------------------------ weights

WHOLE = TOY_CLIP.read_bytes()


def altered(change):
    """The toy CLIP with its tensors changed, as bytes of a safetensors file."""
    def make():
        tensors = load_file(TOY_CLIP)
        return (change(tensors), save(tensors))[1]
    return make


def without(start: str):
    return altered(lambda t: [t.pop(name) for name in [*t] if name.startswith(start)])


WEIGHTS = {    # what the file holds, what must be said
    "cut in a tensor": (lambda: WHOLE[:-5], "cannot read"),
    "garbage": (lambda: random.Random(0).randbytes(5000), "cannot read"),
    "a zip of nothing": (lambda: b"PK" + bytes(500), "cannot read"),
    "another model": (altered(lambda t: (t.clear(), t.update(bert=torch.zeros(3)))), "visual.conv1.weight is missing"),
    "a tensor less": (without("ln_final.bias"), "ln_final.bias is missing"),
    "a block less": (without("transformer.resblocks.0."), "transformer.resblocks."),
    "misshapen": (altered(lambda t: t.update({"visual.ln_pre.weight": torch.zeros(7)})), "visual.ln_pre.weight has shape (7,), expected (128,)"),
    "flat": (altered(lambda t: t.update({"visual.conv1.weight": torch.zeros(7)})), "visual.conv1.weight has shape (7,)"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_cannot_be_used(case, tmp_path, capsys):
    content, words = WEIGHTS[case]
    (tmp_path / "w").write_bytes(content())
    refused(capsys, ["--dataset", "toy", "--weights", tmp_path / "w"], words, tmp_path / "w")


class Evil:
    """Unpickled, it makes a file."""
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("how", ["pickle", "zip", "old"])
def test_pickled_code_is_not_run(how, tmp_path, capsys):
    marker, file = tmp_path / "marker", tmp_path / "w.pt"
    if how == "pickle":
        file.write_bytes(pickle.dumps(Evil(marker)))
    else:
        torch.save({"visual.conv1.weight": Evil(marker)}, file, _use_new_zipfile_serialization=how == "zip")
    refused(capsys, ["--dataset", "toy", "--weights", file], "cannot read", file)
    assert not marker.exists()
    torch.load(file, weights_only=False) if how != "pickle" else pickle.loads(file.read_bytes())
    assert marker.exists()                                               # the code was live


def test_merges_that_cannot_be_used(tmp_path):
    """Cut short, garbled, or too few: with ids shifted, CLIP would go wrong without a word."""
    packed = gzip.compress("#version\n".encode() + b"".join(b"%c %c\n" % (a, b) for a in range(97, 120) for b in range(97, 120)))
    weights = load_file(TOY_CLIP)
    weights["token_embedding.weight"] = torch.zeros(514 + 30, weights["token_embedding.weight"].shape[1])
    save_file(weights, tmp_path / "model.safetensors")
    for content in (packed[:40], packed[:30] + b"\xff" * 9 + packed[39:], b"\xff" * 40, b"#version\na b\nc d\n"):
        (tmp_path / "merges.txt").write_bytes(content)
        with pytest.raises(clip_min.WeightsError, match="merges"):
            clip_min.load(tmp_path)


# ----------------------------------------------------------------------------------------------------------- pictures

def on_its_side(path: Path):
    """Left half red, right half blue, and EXIF says to turn it: upright, red is on top."""
    image, exif = Image.new("RGB", (64, 64), (0, 0, 255)), Image.Exif()
    image.paste((255, 0, 0), (0, 0, 32, 64))
    exif[0x0112] = 6
    image.save(path, exif=exif)


def one(mode: str, colour, size=(30, 20)):
    return lambda path: Image.new(mode, size, colour).save(path)


ODD = {    # how to make it, and the mean colour that it must have
    "grey.jpg": (one("L", 100), (100, 100, 100)), "bits.png": (one("1", 1), (255, 255, 255)),
    "grey-alpha.png": (one("LA", (50, 255)), (50, 50, 50)),
    "palette.png": (lambda path: Image.new("RGB", (9, 9), (200, 30, 40)).quantize().save(path), (200, 30, 40)), "cmyk.jpg": (one("CMYK", (0, 255, 255, 0)), (254, 0, 0)),
    "sixteen.png": (one("I;16", 25617), (100, 100, 100)), "sixteen.tif": (one("I;16", 25617), (100, 100, 100)),
    "sixteen-big-endian.tif": (one("I;16B", 25617), (100, 100, 100)), "dot.PNG": (one("RGB", (9, 8, 7), (1, 1)), (9, 8, 7)),
    "wide.png": (one("RGB", (9, 8, 7), (20000, 10)), (9, 8, 7)), "side.jpg": (on_its_side, (127, 0, 127)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures(name, tmp_path):
    make, wanted = ODD[name]
    (tmp_path / "a").mkdir()
    make(tmp_path / "a" / name)
    image, = data.load(str(tmp_path)).images.float()
    assert image.mean((1, 2)).tolist() == pytest.approx(wanted, abs=2)
    assert name != "side.jpg" or (image[0, :100].mean() > 240 and image[2, -100:].mean() > 240)


def jpeg(path: Path, share: float, **options) -> bytes:
    Image.effect_noise((40, 40), 50).save(path, "jpeg", **options)
    return path.read_bytes()[: int(share * path.stat().st_size)]


WORDS_FOR_A_NUMBER = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIIHHII", 0x0100, 2, 1, 64, 0x0112, 3, 1, 6) + bytes(4)
BROKEN = {"truncated": lambda path: jpeg(path, 0.6), "header alone": lambda path: jpeg(path, 0.02), "zero bytes": lambda path: b"",
          "text": lambda path: b"Not a picture\n" * 99, "EXIF": lambda path: jpeg(path, 1, exif=WORDS_FOR_A_NUMBER)}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_picture_is_named(case, tmp_path, own_cache, capsys):
    """Nothing half-decoded stays; without the picture it works."""
    folder = draw_pictures(tmp_path / "pictures", classes=2, each=2)
    bad = folder / "circle" / "bad.jpg"
    bad.write_bytes(BROKEN[case](tmp_path / "x"))
    refused(capsys, ["--dataset", folder, "--weights", TOY_CLIP, "--way", 2], "cannot decode", bad)
    assert kept(own_cache) == []
    bad.unlink()
    assert holds(data.load(str(folder)), folder)


def test_a_message_has_a_line_of_its_own(tmp_path, capsys):
    """Also after a line of progress: the 70th picture is in the second batch to be decoded."""
    folder = draw_pictures(tmp_path / "pictures", classes=2, each=35)
    (folder / "square" / "34.png").write_text("no picture")
    assert train.main(["--dataset", str(folder), "--weights", str(TOY_CLIP), "--way", "2"]) == 2
    assert re.search(r"\rdecoding pictures 64/70, .*\ntrain.py: error: cannot decode .*34.png.*\n$", capsys.readouterr().err)


def test_what_is_no_picture_is_left_out(tmp_path, capsys):
    folder = draw_pictures(tmp_path / "pictures", classes=2, each=2)
    for name in ("empty", "words", ".git", "circle/inner.jpg"):
        (folder / name).mkdir()
    for name in ("circle/.hidden.jpg", "circle/._00.png", "circle/Thumbs.db", "circle/a.txt", "words/b.md", ".git/x.png", "stray.png"):
        (folder / name).write_text("no picture")
    pool = data.load(str(folder))
    assert pool.classes == ["circle", "square"] and pool.labels.tolist() == [0, 0, 1, 1]
    said(re.sub(r"\rdecoding.*", "", capsys.readouterr().err), "empty, words")


def table(file: Path, rows: list[list]) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return file


def isic(root: Path) -> Path:
    truth = root / "ISIC2018_Task3_Training_GroundTruth"
    for folder in (truth, root / "ISIC2018_Task3_Training_Input"):
        folder.mkdir(parents=True)
    for i in range(7):
        Image.new("RGB", (8, 8)).save(root / "ISIC2018_Task3_Training_Input" / f"ISIC_{i}.jpg")
    rows = [[f"ISIC_{i}", *(float(i == j) for j in range(7))] for i in range(7)]
    return table(truth / f"{truth.name}.csv", [["image", *data.ISIC], *rows])


def chestx(root: Path) -> Path:
    (root / "images_001" / "images").mkdir(parents=True)
    for i in range(7):
        Image.new("L", (8, 8)).save(root / "images_001" / "images" / f"{i}.png")
    rows = [[f"{i}.png", name] for i, name in enumerate([*data.CHESTX, "No Finding", "Mass|Hernia"])]
    return table(root / "Data_Entry_2017.csv", [["Image Index", "Finding Labels"], *rows])


def put(old: str, new: str):
    return lambda file: file.write_text(file.read_text().replace(old, new))


TABLES = {    # layout and its folder, what is done to the table, what must be named
    "isic: column": (isic, "ISIC", put("BKL", "XXX"), "BKL"),
    "isic: two labels": (isic, "ISIC", put("ISIC_3,0.0", "ISIC_3,1.0"), "ISIC_3"),
    "isic: unknown label": (isic, "ISIC", put("ISIC_3,0.0,0.0,0.0,1.0", "ISIC_3,0.0,0.0,0.0,0.0"), "ISIC_3"),
    "isic: short row": (isic, "ISIC", put("ISIC_3,0.0,0.0,0.0,1.0,0.0,0.0,0.0", "ISIC_3"), "ISIC_3"),
    "isic: picture": (isic, "ISIC", put("ISIC_3,", "ISIC_99,"), "ISIC_99"),
    "isic: no table": (isic, "ISIC", lambda file: file.unlink(), "No such file"),
    "isic: no text": (isic, "ISIC", lambda file: file.write_bytes(b"\xff\xfe\x00" * 99), "cannot read"),
    "isic: open quote": (isic, "ISIC", lambda file: file.write_text(file.read_text() + '"' + "x" * 200000), "cannot read"),
    "isic: nothing": (isic, "ISIC", lambda file: file.write_text(""), "image"),
    "chestx: column": (chestx, "ChestX", put("Finding Labels", "Findings"), "Finding Labels"),
    "chestx: unknown label": (chestx, "ChestX", put("Nodule", "Nodul"), "Nodul"),
    "chestx: picture": (chestx, "ChestX", put("3.png", "99.png"), "99.png"),
}


@pytest.mark.parametrize("case", TABLES)
def test_broken_tables(case, tmp_path, capsys):
    layout, folder, damage, word = TABLES[case]
    file, name = layout(tmp_path / folder), layout.__name__
    assert len(data.load(name, tmp_path).classes) == 7
    damage(file)
    refused(capsys, ["--dataset", name, "--data", tmp_path, "--weights", TOY_CLIP], word, file)


# ----------------------------------------------------------------------------------------------------------- bad input

TOYS, TOY = ["--weights", TOY_CLIP], data.toy_pictures(12)
FEW = ["--dataset", "toy", *"--shot 1 --query 2 --steps 2 --episodes 8 --batch 2 --dropout 0 --augment none --method atha".split()]
BAD = {    # arguments, words that must be in the one line
    "one dataset of two": ([*FEW, "--dataset", "toy", "nonsense"], ["'nonsense'", "eurosat", "chestx"]),    # said before weights are fetched for it
    "chestx not there": (["--dataset", "chestx", "--data", "{tmp}"], ["{tmp}/ChestX", "nih-chest-xrays"]),
    "cropdiseases half there": (["--dataset", "cropdiseases", "--data", "{tmp}/half", *TOYS], ["{tmp}/half/CropDiseases/train"]),
    "eurosat half there": (["--dataset", "eurosat", "--data", "{tmp}/half", *TOYS], ["{tmp}/half/eurosat/2750"]),
    "no pictures": (["--dataset", "{tmp}/half/eurosat", *TOYS], ["{tmp}/half/eurosat"]),
    "weights not there": (["--dataset", "toy", "--weights", "{tmp}/none.pt"], ["{tmp}/none.pt"]),
    "classes": ([*FEW, "--way", 17], ["17 classes asked (way), the dataset has 16"]),
    "pictures": ([*FEW, "--query", 300], ["class 'circle' has 12 pictures, 1 + 300 = 301 (shot + query) are needed"]),
    "NaN": ([*FEW, "--lr", 1e30], ["not a number", "0", "1", "--lr"]),
    "mini-batches with RA": ([*FEW, "--method", "svl", "--minibatch", 2], ["--minibatch", "RA"]),
    "one picture of two": ([*FEW, "--method", "atha", "tir", "--draw", "x.png"], ["--draw", "one method"]),
    "context over names": ([*FEW, "--recipe", "released", "--prompt", "{}"], ["4 context vectors", "--prompt"]),
    "context over parts": ([*FEW, "--context", 9, "--prompt", "a photo {}"], ["9 context vectors", "--context"]),
    "two jobs": (["--dataset", "toy", "--fit", "x", "--save", "y"], ["one of"]),
    "draw what": ([*FEW, "--draw", "look"], ["look.png"]), "draw where": ([*FEW, "--draw", "{tmp}/file/look.png"], ["cannot write {tmp}/file"]),
    "draw which": ([*FEW, "--draw", "x.png", "--draw-block", 4], ["0 to 3"]),
    **{f"{name} {value}": (["--dataset", "toy", name, value], [name, "0 to 1"]) for name, value in
       [("--rho", 1.5), ("--gamma", -0.1), ("--tir-top", 2), ("--dropout", 2), ("--extra-share", -1)]},
    **{f"{name} {value}": (["--dataset", "toy", name, value], [name, "number"]) for name, value in
       [("--lr", -1), ("--lr", "nan"), ("--weight-decay", -1), ("--scale", "inf"), ("--context", -3)]},
    "names alone": (["--dataset", "toy", "--names", "x.json"], ["--names goes with --fit"]),
    "fit a file": (["--fit", "{tmp}/file", "--save", "y"], ["{tmp}/file", "folder"]),
    **{f"{name} {value}": (["--dataset", "toy", name, value], [f"no block {value}"]) for name, value in
       [("--alpha-block", 12), ("--tir-blocks", 15), ("--text-block", 12)]},
    "NaN after the last step": ([*FEW, "--steps", 1, "--lr", 1e38], ["not a number", "--lr"]),
    "out is a file": ([*FEW, "--out", "{tmp}/file"], ["{tmp}/file"]),
    "device": (["--dataset", "toy", "--device", "nonsense"], ["nonsense"]),
    **{f"{name} {value}": ([*FEW, name, value], [name]) for name, value in
       [("--episodes", -1), ("--batch", -1), *((name, 0) for name in ("--episodes", "--way", "--shot", "--query", "--steps", "--rank"))]},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise AssertionError("network access that nothing asked for")
    monkeypatch.setattr(clip_min, "download", no_network)
    monkeypatch.setattr(data, "fetch", no_network)
    monkeypatch.setattr(data, "toy_pictures", lambda each: TOY)
    for folder in ("CropDiseases", "eurosat"):
        (tmp_path / "half" / folder).mkdir(parents=True)
    (tmp_path / "file").write_text("a file")
    argv, words = ([str(a).replace("{tmp}", str(tmp_path)) for a in part] for part in BAD[case])
    refused(capsys, ["--out", tmp_path / "out", *argv], *words)


def test_bad_input_as_a_user_sees_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "train.py --dataset toy --method nonsense".split())
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(train.__file__, run_name="__main__")
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("train.py: error: ")
    said(error, "'nonsense'")
