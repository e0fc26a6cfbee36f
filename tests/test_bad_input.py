"""What cannot be used: pictures, tables, command lines. Each is said in one line, and nothing half-done stays."""
import csv, os, re, runpy, signal, stat, struct, subprocess, sys
from pathlib import Path

import pytest
from conftest import REPO, TOY_CLIP, draw_pictures, holds, kept, refused, said
from PIL import EpsImagePlugin, Image

import clip_min
import data
import train

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
    """Also after a line of progress."""
    folder = draw_pictures(tmp_path / "pictures", classes=2, each=35)
    (folder / "square" / "34.png").write_text("no picture")
    assert train.main(["--dataset", str(folder), "--weights", str(TOY_CLIP), "--way", "2"]) == 2
    assert re.search(r"^decoding 70 pictures\ntrain.py: error: cannot decode .*34.png.*\n$", capsys.readouterr().err)


def test_what_is_no_picture_is_left_out(tmp_path, capsys):
    folder = draw_pictures(tmp_path / "pictures", classes=2, each=2)
    for name in ("empty", "words", ".git", "circle/inner.jpg"):
        (folder / name).mkdir()
    for name in ("circle/.hidden.jpg", "circle/._00.png", "circle/Thumbs.db", "circle/a.txt", "words/b.md", ".git/x.png", "stray.png"):
        (folder / name).write_text("no picture")
    pool = data.load(str(folder))
    assert pool.classes == ["circle", "square"] and pool.labels.tolist() == [0, 0, 1, 1]
    endings, folders = re.sub(r"decoding.*\n", "", capsys.readouterr().err).splitlines()
    said(folders, "empty, words")
    said(endings, "1 .db", "1 .txt", "1 .md")


def test_postscript_is_not_handed_to_another_program(tmp_path, monkeypatch):
    """Whatever its name; Ghostscript, where it is installed, would be run on it."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: (_ for _ in ()).throw(AssertionError("Ghostscript was run")))
    with pytest.raises(data.DataError, match="cannot decode .*a.jpg: cannot identify"):
        data.decode(tmp_path / "a.jpg", 8)


def test_a_gif_named_jpg_is_read(tmp_path):
    Image.new("P", (8, 8), 0).save(tmp_path / "a.gif")
    assert data.decode((tmp_path / "a.gif").rename(tmp_path / "a.jpg"), 8).shape == (3, 8, 8)


@pytest.mark.parametrize("side", [9500, 14000])                          # Pillow warns of the first and refuses the second
def test_decompression_bombs(side, tmp_path):
    Image.new("1", (side, side)).save(tmp_path / "a.png")
    with pytest.raises(data.DataError, match="cannot decode .*a.png: .*(pixels|decompression bomb)"):
        data.decode(tmp_path / "a.png", 8)


def test_the_user_does_not_hear_pillows_advice(tmp_path):
    """pytest has warning filters of its own, so a program is asked."""
    Image.new("1", (9500, 9500)).save(tmp_path / "a.png")
    code = f"import data\ntry:\n data.decode({str(tmp_path / 'a.png')!r}, 8)\nexcept data.DataError as e:\n print(e)"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert "9500 x 9500 pixels are too many" in run.stdout and run.stderr == ""


@pytest.fixture
def no_waiting():
    """What waits for a pipe is ended, as a failure."""
    def late(*_):
        raise AssertionError("it waits")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("what", ["pipe", "socket", "folder", "dangling", "loop", "device"])
def test_only_ordinary_files_are_opened(what, tmp_path, no_waiting):
    """Among pictures, and in place of a table; a folder named as a picture is no picture of a class."""
    folder = draw_pictures(tmp_path / "ISIC", classes=2, each=2)
    path, truth = folder / "circle" / "odd.jpg", folder / "ISIC2018_Task3_Training_GroundTruth"
    truth.mkdir()
    make = {"pipe": os.mkfifo, "socket": lambda p: os.mknod(p, stat.S_IFSOCK | 0o600), "folder": os.mkdir, "dangling": lambda p: os.symlink("nowhere", p),
            "loop": lambda p: os.symlink(p, p), "device": lambda p: os.symlink("/dev/zero", p)}[what]
    make(path)
    word = "ordinary" if what in ("pipe", "socket", "device", "folder") else "cannot read"
    with pytest.raises(data.DataError, match=f"{re.escape(str(path))}.*{word}|{word} {re.escape(str(path))}"):
        data.decode(path, 8)
    if what != "folder":
        with pytest.raises(data.DataError, match=re.escape(str(path))):
            data.load_folder(folder)
    make(truth / f"{truth.name}.csv")
    with pytest.raises(data.DataError, match=f"{truth.name}.csv"):
        data.load("isic", tmp_path)


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path, monkeypatch):
    """Permissions do not bind root, so the system's answer is made here."""
    folder, scan = draw_pictures(tmp_path / "pictures", classes=2, each=2), os.scandir

    def guarded(path):
        if Path(path).name == "circle":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)
    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(data.DataError, match=f"{folder}/circle: Permission denied"):
        data.load_folder(folder)


def test_a_folder_named_as_a_known_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("toy", "eurosat"):
        pool = data.load_folder(draw_pictures(Path(name), classes=2, each=2))
        assert pool.classes == ["circle", "square"] and holds(pool, tmp_path / name)


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


def relink(file: Path, target: str):
    picture = file.parent / "images_001" / "images" / "3.png"
    picture.unlink()
    picture.symlink_to(target)


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
    "chestx: absolute path": (chestx, "ChestX", put("3.png", "/etc/3.png"), "outside"),
    "chestx: out of the folder": (chestx, "ChestX", put("3.png", "../../3.png"), "outside"),
    "chestx: no name": (chestx, "ChestX", put("3.png,", ","), "cannot read"),
    "chestx: dangling link": (chestx, "ChestX", lambda file: relink(file, "nowhere"), "No such file"),
    "chestx: linked to itself": (chestx, "ChestX", lambda file: relink(file, "3.png"), "symbolic links"),
    "chestx: two classes": (chestx, "ChestX", lambda file: file.write_text(file.read_text() + "3.png,Mass\n"), "3.png' as"),
    "chestx: nothing but its head": (chestx, "ChestX", lambda file: file.write_text("Image Index,Finding Labels\n"), "no pictures"),
}


@pytest.mark.parametrize("case", TABLES)
def test_broken_tables(case, tmp_path, capsys):
    layout, folder, damage, word = TABLES[case]
    file, name = layout(tmp_path / folder), layout.__name__
    assert len(data.load(name, tmp_path).classes) == 7
    damage(file)
    with pytest.raises(data.DataError) as e:
        data.load(name, tmp_path)
    said(str(e.value), word, file)


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
    "one picture of two": ([*FEW, "--method", "atha", "tir", "--draw", "x.png"], ["--draw", "one method"]),
    "context over names": ([*FEW, "--recipe", "released", "--prompt", "{}"], ["4 learned vectors", "--prompt"]),
    "context over parts": ([*FEW, "--method", "coop", "--context", 9, "--prompt", "a photo {}"], ["9 learned vectors"]),
    "a loss without effect": ([*FEW, "--method", "coop+svl"], ["coop+svl", "nothing that shapes them"]),
    "two jobs": (["--dataset", "toy", "--fit", "x", "--save", "y"], ["--dataset does not take --fit"]),
    "all dropped": ([*FEW, "--dropout", 1], ["not a number", "--dropout"]), "long name": ([*FEW, "--out", "n" * 300], ["too long"]),
    "seed": ([*FEW, "--seed", 2 ** 70], ["--seed"]), "rank": ([*FEW, "--rank", 10 ** 30], ["--rank", "4096"]), "meta": ([*FEW, "--device", "meta"], ["--device meta"]),
    "a prompt that cuts the names off": ([*FEW, "--prompt", "long " * 99 + "{}"], ["'circle' and 'square' have the same text", "long long"]),
    "draw what": ([*FEW, "--draw", "look"], ["look.png"]), "draw where": ([*FEW, "--draw", "{tmp}/file/look.png"], ["cannot write {tmp}/file"]),
    "draw which": ([*FEW, "--draw", "x.png", "--draw-block", 4], ["0 to 3"]),
    **{f"{name} {value}": (["--dataset", "toy", name, value], [name, "0 to 1"]) for name, value in
       [("--rho", 1.5), ("--gamma", -0.1), ("--tir-top", 2), ("--dropout", 2), ("--extra-share", -1)]},
    **{f"{name} {value}": (["--dataset", "toy", name, value], [name, "number"]) for name, value in
       [("--lr", -1), ("--lr", "nan"), ("--weight-decay", -1), ("--scale", "inf"), ("--context", -3)]},
    **{f"split of {name}": (["--dataset", "dtd", "--split", name, 3], ["--split", "neither --way nor --query"]) for name in ("--way", "--query")},
    "names alone": (["--dataset", "toy", "--names", "x.json"], ["--dataset does not take --names"]),
    "a flag misspelt": (["--fit", "{tmp}/half", "--save", "y", "--hodlout", 3], ["does not take --hodlout; is --holdout meant?"]),
    "pictures in no class": (["--fit", "{tmp}/own/circle", "--save", "y", *TOYS], ["2 pictures lie in it", "a folder of its own"]),
    "fit a file": (["--fit", "{tmp}/file", "--save", "y"], ["{tmp}/file", "folder"]),
    **{f"{name} {value}": (["--dataset", "toy", name, value], [name, str(value), "to 11"]) for name, value in
       [("--alpha-block", 12), ("--tir-blocks", 15), ("--text-block", 12)]},
    "NaN after the last step": ([*FEW, "--steps", 1, "--lr", 1e38], ["not a number", "--lr"]),
    "out is a file": ([*FEW, "--out", "{tmp}/file"], ["{tmp}/file"]),
    "device": (["--dataset", "toy", "--device", "nonsense"], ["nonsense"]),
    "crops of no area": ([*FEW, "--augment", "crop", "--crop-area", 0], ["--crop-area", "0.0001"]),
    **{f"{name} without a name": ([*FEW, name, ""], [name, "names nothing"]) for name in ("--weights", "--draw", "--method")},
    "episodes without end": ([*FEW, "--episodes", 10 ** 30], ["--episodes", "2^31"]),
    "a block without a picture": ([*FEW, "--draw-block", 1], ["--draw-block goes with --draw"]),
    "results of what is saved": (["--fit", "{tmp}/half", "--save", "x", "--out", "y"], ["--fit does not take --out"]),
    "save as a picture": (["--fit", "{tmp}/half", "--save", "{tmp}/leaf.jpg"], ["leaf.safetensors"]),
    "save over weights": (["--fit", "{tmp}/half", "--weights", "{tmp}/file", "--save", "{tmp}/file"], ["read here"]),
    "save over names": (["--fit", "{tmp}/half", "--names", "{tmp}/file", "--save", "{tmp}/half/../file"], ["read here"]),
    "save to a folder": (["--fit", "{tmp}/half", *TOYS, "--save", "."], ["cannot write .", "not an ordinary file"]),
    "nothing to do": (["--seed", 3], ["give one of --dataset, --fit"]),
    "a split that is not there": (["--dataset", "{tmp}/own", *TOYS, "--split"], ["split"]),
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
    if "{tmp}/own" in str(BAD[case][0]):
        draw_pictures(tmp_path / "own", 2, 2)
    argv, words = ([str(a).replace("{tmp}", str(tmp_path)) for a in part] for part in BAD[case])
    refused(capsys, [*argv, *(["--out", tmp_path / "out"] if "--out" not in argv and "--dataset" in argv else [])], *words)


def test_bad_input_as_a_user_sees_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "train.py --dataset toy --method nonsense".split())
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(train.__file__, run_name="__main__")
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("train.py: error: ")
    said(error, "'nonsense'")
