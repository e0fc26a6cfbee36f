"""Datasets, tasks and augmentation: kinds of folders and pictures, each with the right value."""
import base64
import contextlib
import http.server
import json
import os
import shutil
import struct
import threading
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import from_environment, same
from PIL import Image, ImageOps
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomResizedCrop, Resize

import data
from data import Batches, DataError, Pool, Task, load

CONFIG = SimpleNamespace(image=24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def paint(root: Path, paths: str) -> Path:
    """8 x 8 pictures below root, the n-th of brightness n."""
    root.mkdir(parents=True, exist_ok=True)
    for n, path in enumerate(paths.split()):
        file = root / path.replace("%20", " ")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (n, n, n)).save(file)
    return root


def seen(pool: Pool) -> str:
    """Brightness and class of every picture."""
    return " ".join(f"{image[0, 0, 0]}{pool.classes[c]}" for image, c in zip(pool.images, pool.labels))


# ------------------------------------------------------------------------------------------------------ tasks

def test_the_toy_world_and_its_tasks_are_what_they_were():
    pool = load("toy")
    assert pool.images.shape == (3200, 3, 48, 48)
    assert pool.images.double().mean().item() == pytest.approx(155.6555, abs=1e-3)
    assert [*pool.task(3).support, *pool.task(3).query[:3]] == [928, 136, 3099, 671, 2037, 801, 883, 905]
    task = pool.task(7, way=4, shot=3, query=5, seed=2)
    rows = torch.cat([task.support, task.query])
    assert len(rows.unique()) == 32 and len(task.classes.unique()) == 4
    assert torch.equal(pool.labels[rows], task.classes[torch.cat([task.labels, task.truth])])
    assert [*task.labels.bincount(), *task.truth.bincount()] == [3] * 4 + [5] * 4
    drawn = [pool.task(*key).support.tolist() for key in ((7, 4, 3, 5, 2), (8, 4, 3, 5, 2), (7, 4, 3, 5, 3))]
    assert drawn[0] == task.support.tolist() not in drawn[1:]
    with pytest.raises(DataError, match="16 classes, one of 200 pictures"):
        pool.task(0, query=200)


LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
SMALL = Pool(torch.zeros(6, 3, 2, 2), LABELS, ["a", "b", "c"], "", truth=torch.tensor([2, 0]))


def test_a_split_draws_again_where_there_are_too_few():
    tasks = [SMALL.split(shot, 1) for shot in (1, 2, 3)]
    for task in tasks:
        assert torch.equal(LABELS[task.support], task.labels) and torch.equal(task.truth, SMALL.truth)
        assert task.query.tolist() == [0, 1] and task.classes.tolist() == [0, 1, 2]
    assert [len(task.support) for task in tasks] == [3, 6, 9]
    assert [len(task.support.unique()) for task in tasks[:2]] == [3, 5]
    assert {*tasks[0].support.tolist()} < {*tasks[1].support.tolist()}
    with pytest.raises(DataError, match="class 'd' has no picture"):
        replace(SMALL, classes=["a", "b", "c", "d"]).split(1, 1)


def test_holding_out_leaves_every_class_a_picture():
    task = SMALL.holdout(2, seed=1)
    assert task.truth.tolist() == [0, 0, 1] and task.labels.tolist() == [0, 1, 2]
    assert sorted([*task.support, *task.query]) == [0, 1, 2, 3, 4, 5]
    assert torch.equal(LABELS[task.query], task.truth) and torch.equal(LABELS[task.support], task.labels)


# ---------------------------------------------------------------------------------------------------- folders

NFC, NFD = (unicodedata.normalize(form, "p\u00eache") for form in ("NFC", "NFD"))
LAYOUTS = {      # pictures, the n-th of brightness n; what is seen of them, or the word of what is said
    "class folders": ("cat/a.png cat/b.JPG dog/c.png", "0cat 1cat 2dog"),
    "hidden and litter": ("cat/a.png cat/._a.png .git/x.png __MACOSX/a.png cat/@eaDir/a.png "
                          "dog/.t/b.png dog/c.png #recycle/d.png", "0cat 6dog"),
    "a picture beside them": ("cat/a.png dog/c.png x.png", "0cat 1dog"),
    "a folder deeper": ("cat/a.png cat/more/b.png dog/c.png", "0cat 2dog"),
    "train and test": ("train/cat/a.png train/dog/b.png test/cat/c.png", "0cat 1dog 2cat"),
    "Train and valid": ("Train/cat/a.png Train/dog/b.png valid/dog/c.png", "0cat 1dog 2dog"),
    "all three": ("val/cat/v.png train/cat/a.png train/dog/b.png test/dog/c.png", "1cat 2dog 3dog"),
    "test flat": ("test/a.png train/cat/b.png train/dog/c.png val/cat/d.png", "1cat 2dog 3cat"),
    "val and test flat": ("test/a.png val/b.png train/cat/c.png train/dog/d.png", "2cat 3dog"),
    "test beside classes": ("cat/a.png dog/b.png test/c.png", "0cat 1dog"),
    "a class in test alone": ("train/cat/a.png train/dog/b.png test/x/c.png val/cat/d.png", "0cat 1dog 3cat"),
    "a class called train": ("car/a.png train/b.png", "0car 1train"),
    "accents in a part": (f"train/{NFD}/a.png train/x_y/b.png test/x_y/c.png", f"0{NFC} 1x_y 2x_y"),
    "one folder too high": ("leaves/cat/a.png leaves/dog/b.png", "in leaves/cat/, leaves/dog/"),
    "nested twice": ("seg_train/seg_train/cat/a.png seg_test/cat/b.png", "in seg_test/cat/, seg_train/seg"),
    "Tiny ImageNet": ("train/n1/images/a.png val/images/b.png", "in train/n1/images/"),
    "class/images": ("cat/images/a.png dog/images/b.png", "in cat/images/"),
    "one heap": ("a.png b.png", "2 pictures"),
    "two heaps": ("train/a.png test/b.png", "in test/, train/"),
    "two spellings": ("red_cat/a.png red%20cat/b.png", "second folder"),
    "two forms": (f"{NFD}/a.png {NFC}/b.png", "second folder"),
    "nothing": ("", "no pictures"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(case, tmp_path, capsys):
    paths, wanted = LAYOUTS[case]
    root = paint(tmp_path, paths)
    if wanted[0].isdigit() and "pictures" not in wanted:
        assert seen(load(str(root))) == seen(load(str(root))) == wanted
        left = len(data.files_in(root)) > len(wanted.split())
        assert capsys.readouterr().err.count("left out of") == left, "one line, once"
    else:
        with pytest.raises(DataError, match=wanted):
            load(str(root))


def test_what_is_left_out_is_counted(tmp_path, capsys):
    root = paint(tmp_path, "cat/a.png St.%20Bernard/b.png cat/deep/c.png")
    for name in "cat/notes Thumbs.db cat/desktop.ini cat/.DS_Store".split():
        (root / name).touch()
    (root / "cow").mkdir()
    assert len(load(str(root)).images) == 2
    said = "1 pictures not right in a class folder, 4 other files and empty folders, such as Thumbs.db"
    assert said in capsys.readouterr().err
    assert data.pictures_in(root) == sorted(root.rglob("*.png"))


def test_the_cache_is_used_and_left_when_a_picture_changes(tmp_path, capsys):
    root = paint(tmp_path / "a", "cat/a.png cat/b.png dog/c.png")
    assert torch.equal(load(str(root)).images, load(f"{root}/../a/").images)
    assert capsys.readouterr().err.count("decoding") == 1
    Image.new("RGB", (8, 8), (9, 9, 9)).save(root / "cat/b.png")
    os.utime(root / "cat/b.png", ns=(1, 1))
    assert seen(load(str(root))) == "0cat 9cat 2dog"
    prints = [load(str(root)).fingerprint, load(shutil.copytree(root, tmp_path / "b")).fingerprint]
    (root / "dog").rename(root / "cow")
    assert prints[0] == prints[1] != load(str(root)).fingerprint, "of what is in it, not where"


# ----------------------------------------------------------------------------------------------------- splits

def coop(folder: Path, split: str, pictures: str, classes=("banded", "dotted")) -> dict:
    """A set with CoOp's split: two classes of four, 0 and 1 to learn from, 2 in val, 3 to test on."""
    paint(folder / pictures, " ".join(f"{name}/{n}.png" for name in classes for n in range(4)))
    parts = {part: [[f"{name}/{n}.png", label, name] for label, name in enumerate(classes) for n in rows]
             for part, rows in (("train", (0, 1)), ("val", (2,)), ("test", (3,)))}
    (folder / split).write_text(json.dumps(parts))
    return parts


@pytest.mark.parametrize("name",
                         "caltech101 cars dtd flowers food101 pets sun397 ucf101".split())
def test_sets_with_coops_split_under_both_names(name, tmp_path):
    known = data.DATASETS[name]
    for n, folder in enumerate(known.folders.split()):
        coop(tmp_path / str(n) / folder, **known.lister.keywords)
        data.find([name], tmp_path / str(n), split=True)
        pool = load(name, tmp_path / str(n), size=8, split=True)
        assert seen(pool) == "0banded 1banded 4dotted 5dotted" and pool.sizes.tolist() == [[8, 8]] * 4
        assert pool.queries[:, 0, 0, 0].tolist() == [3, 7] and pool.truth.tolist() == [0, 1]
        assert len(load(name, tmp_path / str(n)).images) == 6, "episodes are drawn from both parts"


@pytest.mark.parametrize("said, change", {       # what is done to a split file, and what is said
    "listed twice": lambda s: s["test"].append(["./banded/0.png", 0, "banded"]),
    "twice: as .*'banded'.* as .*'dotted'": lambda s: s["test"].append(["banded/3.png", 1, "dotted"]),
    "1 of 7 pictures.*dotted/9.png": lambda s: s["test"].append(["dotted/9.png", 1, "dotted"]),
    "not whole, KeyError 'test'": lambda s: s.pop("test"),
    "not whole, TypeError": lambda s: s.update(test=3),
}.items())
def test_a_split_that_cannot_be_used_is_refused(said, change, tmp_path):
    split = coop(tmp_path / "dtd", "split_zhou_DescribableTextures.json", "images")
    change(split)
    (tmp_path / "dtd/split_zhou_DescribableTextures.json").write_text(json.dumps(split))
    with pytest.raises(DataError, match=said):
        load("dtd", tmp_path)


def test_eurosat_has_the_same_rows_with_a_split_however_its_paths_are_spelt(tmp_path):
    file = tmp_path / "eurosat" / data.EUROSAT_SPLIT
    coop(file.parent, file.name, "2750", ("AnnualCrop", "Forest"))
    text = file.read_text().replace('"Forest/', '"./Forest//').replace("Crop/1", "Crop\\\\1")
    file.unlink()
    before = seen(load("eurosat", tmp_path))
    with pytest.raises(DataError, match="no split"):
        load("eurosat", tmp_path, split=True)
    file.write_text(text)
    assert seen(load("eurosat", tmp_path)) == before and before.startswith("0Annual Crop Land 1Annual")
    pool = load("eurosat", tmp_path, split=True)
    assert seen(pool) == "0Annual Crop Land 1Annual Crop Land 4Forest 5Forest"


def test_aircraft_and_imagenet(tmp_path):
    planes = paint(tmp_path / "fgvc_aircraft", "images/0000001.jpg images/0000002.jpg images/0000003.jpg")
    (planes / "images_variant_train.txt").write_text("0000002 DC 3\n0000001 F/A-18\n")
    (planes / "images_variant_test.txt").write_text("0000003 DC 3\n")
    pool = load("aircraft", tmp_path, split=True)
    assert seen(pool) == "1DC 3 0F/A-18" and pool.truth.tolist() == [0]
    for inside in ("", "images/"):                             # CLIP-LoRA's folders and CoOp's
        root = tmp_path / f"net{inside}"
        net = paint(root / "imagenet", " ".join(f"{inside}{part}/n0{c}/a.JPEG" for part in ("train", "val")
                                                for c in (1, 2, 3)))
        (net / "classnames.txt").write_text("n01 great white shark\nn02 sunglasses\nn03 sunglasses\n")
        pool = load("imagenet", root, split=True)
        assert seen(pool) == "0great white shark 1sunglasses 2sunglasses n03"
    shutil.rmtree(net / "images/val")
    paint(net / "images/val", "a.JPEG")                        # as the archive has them
    assert len(load("imagenet", root).images) == 3
    with pytest.raises(DataError, match="imagenet: no split"):
        load("imagenet", root, split=True)


def test_queries_are_openais_preparation_and_sizes_the_pictures_own(tmp_path):
    for path, height, width in (("train/a", 300, 47), ("train/b", 77, 57), ("test/a", 64, 67),
                                ("test/b", 51, 77)):
        TF.to_pil_image(torch.rand(3, height, width)).save(paint(tmp_path / path, "") / "x.png")
    pool = load(str(tmp_path), size=32, split=True)
    assert pool.images.shape == (2, 3, 256, 256) and pool.sizes.tolist() == [[300, 47], [77, 57]]
    assert load(str(tmp_path), size=336).images.shape[-1] == 300, "small ones are not enlarged"
    theirs = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32)])
    for c, query in zip("ab", pool.queries):
        assert torch.equal(query, TF.pil_to_tensor(theirs(Image.open(tmp_path / "test" / c / "x.png"))))


# ------------------------------------------------------------------------------------------------- known sets

def test_chestx_takes_single_findings_wherever_they_lie(tmp_path):
    root = paint(tmp_path / "ChestX", "images_001/images/a.png images_002/images/b.png images/c.png")
    (root / "Data_Entry_2017.csv").write_text(
        "Image Index,Finding Labels\na.png,Mass\nb.png,Nodule\nc.png,Mass|Hernia\nd.png,No Finding\n")
    assert seen(load("chestx", tmp_path)) == "0Mass 1Nodule"
    (root / "images_002/images/b.png").unlink()
    with pytest.raises(DataError, match="1 of 2 pictures are lost, as b.png is; get it by curl"):
        load("chestx", tmp_path)


@pytest.mark.parametrize("name, classes, shape", [
    ("eurosat", 10, (1000, 3, 64, 64)), ("cropdiseases", 8, (320, 3, 256, 256)),
    ("isic", 7, (210, 3, 224, 224)), ("chestx", 6, (224, 3, 64, 64))])
def test_the_four_datasets_in_their_real_layouts(name, classes, shape):
    pool = load(name, from_environment("ATHA_DATA", "a folder with the datasets' samples"))
    assert len(pool.classes) == classes and pool.images.shape == shape and pool.images.float().std() > 10


def test_all_that_is_missing_is_named_and_what_can_be_fetched_is_not(tmp_path):
    names = {"toy", "nonsense", *data.GROUPS["all"], *data.GROUPS["all-fsl"]}
    with pytest.raises(DataError, match="there are toy, eurosat.*or a folder") as e:
        data.find(sorted(names), tmp_path)
    assert {name for name in names if f"{name}: " in str(e.value)} == names - {"toy", "eurosat", "isic"}
    with pytest.raises(DataError, match="toy: no split"):
        data.find(["toy"], tmp_path, split=True)


@contextlib.contextmanager
def served(files: dict[str, bytes], breaks: int, monkeypatch, name: str):
    """A set's archives by HTTP, the first answers broken off in the middle; gives what is asked for."""
    log = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            log.append(self.path[1:])
            content = files[log[-1]]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if len(log) <= breaks else content)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    archives = [f"http://127.0.0.1:{server.server_port}/{file}" for file in files]
    monkeypatch.setitem(data.DATASETS, name, data.DATASETS[name]._replace(archives=archives))
    yield log
    server.shutdown()
    server.server_close()


def test_what_is_half_there_is_fetched_and_a_broken_download_begins_again(tmp_path, monkeypatch, capsys):
    truth, pictures = (f"ISIC2018_Task3_Training_{part}" for part in ("GroundTruth", "Input"))
    whole = paint(tmp_path / "whole", " ".join(f"{pictures}/{n}.jpg" for n in range(7)))
    csv = [f"{n}," + ",".join(f"{n == c:.1f}" for c in range(7)) for n in range(7)]
    (paint(whole / truth, "") / f"{truth}.csv").write_text(
        "\n".join(["\ufeffimage," + ",".join(data.ISIC), *csv]), "utf-8")
    files = {f"{name}.zip": Path(shutil.make_archive(tmp_path / name, "zip", whole, name)).read_bytes()
             for name in (truth, pictures)}
    wanted = " ".join(f"{n}{name}" for n, name in enumerate(data.ISIC.values()))
    with served(files, 2, monkeypatch, "isic") as log:
        assert seen(load("isic", tmp_path)) == wanted                     # nothing is there
        assert log == [f"{truth}.zip"] * 3 + [f"{pictures}.zip"] and "CC BY-NC" in capsys.readouterr().err
        assert {*os.listdir(tmp_path / "ISIC")} == {truth, pictures}
        (tmp_path / "ISIC" / pictures / "3.jpg").unlink()                 # half unpacked
        assert seen(load("isic", tmp_path)) == seen(load("isic", tmp_path)) == wanted
        assert log[4:] == [*files]                                                  # once
    shutil.rmtree(tmp_path / "ISIC" / pictures)
    for name, content in files.items():                                   # of a run that was ended
        (tmp_path / "ISIC" / f".{name}").write_bytes(content)
    assert seen(load("isic", tmp_path)) == wanted


# --------------------------------------------------------------------------------------------------- pictures

RAMP = np.linspace(0, 1, 3600).reshape(60, 60)


def numbers(scale: float, dtype: str, mode=None, shift=0, **how):
    """Writes the ramp as numbers from shift to shift + scale."""
    def write(path):
        image = Image.fromarray((RAMP * scale + shift).astype(dtype))
        (image.convert(mode) if mode else image).save(path, **how)
    return write


# 2 x 2 pixels of 16 bits a channel, which Pillow does not write: 0, 85, 170, 255 times 256, and times 16
WHOLE, TWELVE = (base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAIAAAACEAIAAACtREYwAAAAF" + rest) for rest in (
    "ElEQVR42mNgAINQMGRYBYb/wRAAMOkF+x32L0QAAAAASUVORK5CYII=",
    "0lEQVR42mNgAAPWUBBk4FoFgvz/QRAALc4GVSIebk4AAAAASUVORK5CYII="))


PICTURES = {     # how a ramp from black to white is written
    **{name: numbers(255, "uint8", name.partition(".")[0]) for name in (
        "L.png L.jpg L.tif L.bmp L.pgm RGB.png RGB.jpg RGB.tif RGB.bmp RGB.ppm RGB.webp P.png P.gif LA.png "
        "RGBA.png RGBA.webp RGBA.tif CMYK.jpg CMYK.tif").split()},
    "gif.jpg": numbers(255, "uint8", "P", format="GIF"),
    **{f"16{ending}": numbers(65535, "uint16") for ending in (".png", ".tif", ".pgm")},
    "12 told.pgm": lambda path: path.write_bytes(
        b"P5 60 60 4095\n" + (RAMP * 4095).astype(">u2").tobytes()),
}
REFUSED = {
    "12 in 16.png": numbers(4095, "uint16"),
    "12 in 16 rgb.png": lambda path: path.write_bytes(TWELVE), "8 in 32.tif": numbers(255, "int32"),
    "32.tif": numbers(2 ** 31 - 1, "int32"), "signed.tif": numbers(40000, "int32", shift=-9),
    "to 1.tif": numbers(1, "float32"),
    "text.png": lambda path: path.write_text("no picture"), "not there.png": lambda path: None,
    "eps.png": lambda path: Image.new("RGB", (8, 8)).save(path, format="EPS"),
}


@pytest.mark.parametrize("name", [*PICTURES, *REFUSED])
def test_pictures_are_shown_rightly_or_refused_in_one_line(name, tmp_path):
    path = tmp_path / name
    {**PICTURES, **REFUSED}[name](path)
    if name in PICTURES:
        error = (data.decode(path, 60).float() - torch.from_numpy(RAMP * 255)).abs()
        assert error.shape == (3, 60, 60) and error.mean() < 4 and error.max() < 26
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])                # cut, it is refused
    with pytest.raises(DataError, match=f"cannot read .*{name}: .") as e:
        data.decode(path)
    assert "\n" not in str(e.value)


def test_the_upper_half_of_16_bits_a_channel_is_shown(tmp_path):
    (tmp_path / "a.png").write_bytes(WHOLE)
    assert data.decode(tmp_path / "a.png", 2)[2].flatten().tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize("turn", range(10))
def test_pictures_stand_upright_whatever_else_their_metadata_hold(turn, tmp_path):
    stored = Image.fromarray((np.add.outer(RAMP[:40, 0], 0.5 * RAMP[0, :30]) * 160).astype("uint8"))
    tag = struct.pack("<HHIHH", 0x112, 3, 1, turn, 0)
    damaged = b"\2\0" + tag + struct.pack("<HHIII", 0x11A, 5, 1, 9999, 0)                  # 9999 is nowhere
    for tags in (b"\1\0" + tag + bytes(4), damaged, bytes(range(40))):
        stored.save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0" + tags, quality=95)
        if tags != damaged:
            upright = TF.pil_to_tensor(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")).convert("RGB"))
        assert torch.equal(TF.pil_to_tensor(data.open_picture(tmp_path / "a.jpg")), upright)


# ----------------------------------------------------------------------------------------------- augmentation

@pytest.mark.parametrize("sides", [(375, 500), (40, 300), (300, 40)])
def test_boxes_are_torchvisions_given_the_same_numbers(sides, monkeypatch):
    u = torch.rand(100, 22, generator=torch.Generator().manual_seed(0))
    ours = torch.cat(data.crop_boxes(torch.tensor(sides).expand(100, 2), u, 0.5), 1)
    for one, box in zip(u, ours.int().tolist()):
        tries, places = iter(one[:20].view(2, 10).T.flatten().tolist()), iter(one[20:].tolist())
        with monkeypatch.context() as patch:                   # torchvision's chance is u
            patch.setattr(torch.Tensor, "uniform_", lambda x, a, b: x.fill_(a + (b - a) * next(tries)))
            patch.setattr(torch, "randint", lambda a, b, size: torch.tensor([int(next(places) * b)]))
            assert box == [*RandomResizedCrop.get_params(torch.empty(3, *sides), (0.5, 1), (3 / 4, 4 / 3))]


@pytest.mark.parametrize("mode, edge", [("bilinear", 7), ("bicubic", 10)])    # torchvision sees no further
def test_crops_show_what_torchvisions_show(mode, edge):
    torch.manual_seed(0)
    images, u, sides = torch.rand(20, 3, 64, 64), torch.rand(20, 23), torch.full((20, 2), 64)
    crops = data.random_crop(images, u, sides, 64, 0.08, mode == "bicubic")
    places = torch.cat(data.crop_boxes(sides, u, 0.08), 1).int().tolist()
    for image, crop, place, flip in zip(images, crops, places, u[:, 22] < 0.5):
        wanted = TF.resized_crop(image, *place, [64, 64], InterpolationMode(mode), False).clamp(0, 1)
        wanted = TF.hflip(wanted) if flip else wanted
        same(*(x[:, edge: -edge, edge: -edge] for x in (crop, wanted)), 1e-4)


def test_crops_are_of_the_picture_before_it_was_squashed_and_large_ones_are_averaged():
    x = torch.linspace(0.5 / 90, 1 - 0.5 / 90, 90).expand(99, 1, 90, 90)              # 360 x 120, squashed
    u, sides = torch.rand(99, 23, generator=torch.Generator().manual_seed(1)), torch.tensor([[120, 360]] * 99)
    crops = data.random_crop(torch.cat([x.mT, x, x], 1), u, sides, 90)[:, :2]          # rows y and x
    corners, boxes = (values / sides for values in data.crop_boxes(sides, u))
    same(crops.amin((2, 3)), corners + boxes / 180, 0.007)
    stripes, middle = (torch.arange(256) % 4 // 3.0).expand(1, 3, 256, 256), torch.full((1, 23), 0.5)
    same(data.random_crop(stripes, middle, torch.tensor([[256, 256]]), 32, 1), torch.tensor(0.25), 0.1)


def test_released_views_are_torchvisions_in_the_releases_order():
    image = torch.randint(256, (3, 40, 40), dtype=torch.uint8)
    for a, b, c, d, chance in ((0.9, 0.1, 0.6, 0.8, 0.49), (0.2, 0.7, 0.3, 0.5, 0.51)):
        def jitter(x):
            x = TF.adjust_contrast(TF.adjust_brightness(x, 0.6 + 0.8 * b), 0.6 + 0.8 * c)
            return TF.adjust_saturation(x, 0.6 + 0.8 * d)
        turned, flip = TF.rotate(image, 90 * a - 45), TF.hflip if chance < 0.5 else lambda x: x
        for view, wanted in enumerate((image, flip(jitter(turned)), turned, jitter(image), flip(image))):
            shown = data.released_view(image, view, (a, b, c, d, chance))
            assert (shown.int() - wanted.int()).abs().max() <= 1


def batches(augment: str, minibatch: int, images: torch.Tensor, **how) -> Batches:
    """Nine steps on two tasks of ten pictures, each of its own label."""
    every = torch.arange(10)
    recipe = SimpleNamespace(steps=9, augment=augment, minibatch=minibatch, crop_area=0.08, bicubic=True)
    tasks = [Task(every, every, every, every, every)] * 2
    return Batches(Pool(images, every, [], "", **how), tasks, [0, 1], recipe, CONFIG)


@pytest.mark.parametrize("augment, whole", [("none", 10), ("crop", 10), ("views", 50)])
@pytest.mark.parametrize("minibatch", [0, 4, 13, 100])
def test_batches_show_every_picture_once_an_epoch_and_the_same_when_asked_again(augment, whole, minibatch):
    grey = (10 * torch.arange(10) + 20).to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 30, 30)
    made, shown = batches(augment, minibatch, grey), min(minibatch or whole, whole)
    steps, epoch = [made(number) for number in range(9)], -(-whole // shown)
    assert made.shown == shown and all(map(torch.equal, steps[5], made(5)))
    for number, (pictures, labels, plain, plain_labels) in enumerate(steps):
        b = shown if (number + 1) % epoch else whole - (epoch - 1) * shown           # at the end what is left
        k = 10 if epoch == 1 else b
        assert pictures.shape == (2, b, 3, 24, 24) and plain.shape == (2, k, 3, 24, 24)
        assert torch.equal(plain_labels, labels[:, :k])
        for images, truth in ((plain, plain_labels), (pictures, labels))[: 1 if whole == 50 else 2]:
            middle = (images[:, :, 2, 12, 12] * CONFIG.std[2] + CONFIG.mean[2]) * 255
            assert (middle - 10 * truth - 20).abs().max() < 0.6
    for start in range(0, 10 - epoch, epoch):
        counts = torch.cat([labels for _, labels, *_ in steps[start: start + epoch]], 1)
        assert all(row.bincount().tolist() == [whole // 10] * 10 for row in counts)
    if epoch > 1:
        assert not torch.equal(*steps[0][1]), "another seed, another order"
        assert epoch > 8 or not torch.equal(steps[0][1], steps[epoch][1]), "another epoch, another order"
