"""Datasets as one tensor each, tasks drawn from (seed, number) alone, augmentation in batches.

    pool = load("eurosat", "datasets")                      # a name of DATASETS, toy, or a folder
    task = pool.task(0, way=5, shot=1, query=15, seed=1)    # index tensors, and what is true of each
    pool.images[task.support]                               # (5, 3, S, S) uint8

In this order: pools and tasks, what is in a folder, the known sets, reading pictures, augmentation. Every
picture is decoded once, to S x S, into a file in the cache that later runs map into memory.
"""
from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import runpy
import shutil
import sys
import time
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from math import ceil, pi, prod
from pathlib import Path
from posixpath import join, normpath                  # a list's paths are the same on every system
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unicodedata import normalize as unicode

import PIL
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import is_image_file

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache").removeprefix("~/")) / "atha"
warnings.filterwarnings("ignore", module=r"PIL\.")           # advice about palettes is not for our user


class DataError(ValueError):
    """Pictures or labels that cannot be had or used; the message is one line for the user."""


class Missing(DataError):
    """What is not there, or not all of it, but can be fetched."""


def digest(*what: object) -> str:
    """16 hexadecimal digits that stand for values, the same in every process."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def generator(*key: object) -> torch.Generator:
    """A random generator that depends on the key alone."""
    return torch.Generator().manual_seed(int(digest(*key)[:14], 16))


def nfc(text: str) -> str:
    """Text in Unicode's composed form: a Mac's zip spells an accent as a character of its own."""
    return unicode("NFC", text)


class Progress:
    """Says on stderr what begins, then every few seconds how much of it is done and the time left."""

    def __init__(self, what: str, total: float):
        self.what, self.total = what, total
        self.begun = self.said = time.monotonic()
        print(f"{what}: {total} to do", file=sys.stderr)

    def __call__(self, done: float, more: str = "") -> None:
        now = time.monotonic()
        if done and now - self.said > 5:
            self.said, left = now, (now - self.begun) / done * (self.total - done)
            print(f"{self.what}: {100 * done / self.total:.0f} %, {left:.0f} s left{more}", file=sys.stderr)


# -------------------------------------------------------------------------------------------- pools and tasks

class Task(NamedTuple):
    """Rows of a pool to learn from and to be tested on, and what is true of each: all int64."""
    classes: Tensor     # (N,) labels of the pool, in the task's order
    support: Tensor     # (M,) rows of its images
    labels: Tensor      # (M,) 0..N-1, places in classes
    query: Tensor       # (Q,) rows of its images; of a split, of its queries
    truth: Tensor       # (Q,) 0..N-1


@dataclass
class Pool:
    """A dataset. images (N, 3, S, S) uint8, squashed to a square, perhaps a mapped file: not to be written to.

    labels (N,) int64; classes: one name a label; fingerprint: changes with the pictures' names, sizes and
    labels; prompt: CoOp's own for this set; train: rows of the training split, where there is one.
    Loaded for its split: all images are the training split's; sizes (N, 2) is their height and width as they
    were; queries (T, 3, size, size) uint8 are the test pictures, by OpenAI's preparation; truth (T,) int64.
    """
    images: Tensor
    labels: Tensor
    classes: list[str]
    fingerprint: str
    prompt: str | None = None
    train: Tensor | None = None
    sizes: Tensor | None = None
    queries: Tensor | None = None
    truth: Tensor | None = None

    def rows(self, among: Tensor | None = None) -> list[Tensor]:
        """Rows of each class, of all or among some."""
        among = torch.arange(len(self.labels)) if among is None else among
        return [among[self.labels[among] == label] for label in range(len(self.classes))]

    def task(self, number: int, way: int = 5, shot: int = 1, query: int = 15, seed: int = 1) -> Task:
        """Episode `number` of a seed, drawn from all pictures, whatever their split. Raises DataError."""
        g, rows = generator("episode", seed, number), self.rows()
        if way > len(rows) or min(map(len, rows)) < shot + query:
            raise DataError(f"{way} classes of {shot} + {query} pictures (--way, --shot, --query) are asked; "
                            f"there are {len(rows)} classes, one of {min(map(len, rows))} pictures")
        classes = torch.randperm(len(rows), generator=g)[:way]
        drawn = torch.stack([rows[c][torch.randperm(len(rows[c]), generator=g)[: shot + query]]
                             for c in classes])                           # (way, shot + query)
        labels = torch.arange(way)
        return Task(classes, drawn[:, :shot].flatten(), labels.repeat_interleave(shot),
                    drawn[:, shot:].flatten(), labels.repeat_interleave(query))

    def split(self, shot: int, seed: int) -> Task:
        """All classes, `shot` pictures of each from the training split, the whole test split as queries.

        A class with fewer is drawn from with replacement; else a seed's pictures at few shots are among those
        at more. Raises DataError for a class without pictures.
        """
        support = []
        for label, rows in enumerate(self.rows()):
            g, n = generator("split", seed, label), len(rows)
            if not n:
                raise DataError(f"class {self.classes[label]!r} has no picture in the training split")
            order = torch.randperm(n, generator=g)[:shot]
            support.append(rows[torch.randint(n, (shot,), generator=g) if n < shot else order])
        classes = torch.arange(len(self.classes))
        return Task(classes, torch.cat(support), classes.repeat_interleave(shot),
                    torch.arange(len(self.truth)), self.truth)

    def holdout(self, count: int, seed: int) -> Task:
        """All classes with all that may be learned from, but for `count` pictures of each as queries.

        A class gives what it can spare: one picture at least stays to learn from.
        """
        kept, held = [], []
        for label, rows in enumerate(self.rows(self.train)):
            order = torch.randperm(len(rows), generator=generator("holdout", seed, label))
            spared = max(0, min(count, len(rows) - 1))
            held.append(rows[order[:spared]])
            kept.append(rows[order[spared:]])
        kept, held = torch.cat(kept), torch.cat(held)
        return Task(torch.arange(len(self.classes)), kept, self.labels[kept], held, self.labels[held])


# ------------------------------------------------------------------------------ what is in a dataset's folder

# A lister gives a row a picture: "train", "test" or "", its path below the folder, its class. Labels count
# the classes in the order in which they come. What is not there is a FileNotFoundError.

Rows = list[tuple[str, str, str]]
LITTER = "__MACOSX @eaDir #recycle $RECYCLE.BIN lost+found".split()       # of macOS, Synology, Windows, Linux
TEST = "test val valid validation".split()               # what people call the part that is tested on
say = cache(partial(print, file=sys.stderr))             # a line is said once


def contents(folder: Path) -> tuple[list[tuple[str, ...]], int]:
    """The parts of the path of every picture below a folder, sorted, and how much else there is."""
    def stop(error: OSError) -> None:                    # left alone, walk would pass over it
        raise error
    pictures, others = [], 0
    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        inside = Path(place).relative_to(folder).parts
        found = [(*inside, name) for name in files if is_image_file(name) and name[0] != "."]
        clean = [name for name in folders if name not in LITTER and name[0] != "."]
        # an empty folder is something else, too
        others += len(files) - len(found) + len(folders) - len(clean) + (not files and not folders)
        folders[:], pictures = clean, pictures + found
    return sorted(pictures), others


def pictures_in(folder: str | Path) -> list[Path]:
    """All pictures below a folder, sorted, without what is hidden or litter."""
    return [Path(folder, *parts) for parts in contents(Path(folder))[0]]


def list_folders(root: Path, under: str = "", names: dict[str, str] = {}) -> Rows:
    """Class folders, each called as in names; or train/ and test/ (or val/) that hold them: the split.

    Where train/ holds class folders, nothing beside it is a class, and a test part counts if it holds folders
    of the same classes. Raises DataError where there are no class folders, or two of one name.
    """
    found, others = contents(root / under)
    classes = {}                                         # of each part
    for parts in found:
        if len(parts) > 2:
            classes.setdefault(parts[0].lower(), set()).add(nfc(parts[1]))
    if "train" in classes:
        tests = [name for name in TEST if name in classes and classes[name] <= classes["train"]]
        part_of = {"train": "train", **{name: "test" for name in tests[:1]}}
        rows = [(part, parts) for name, part in part_of.items() for parts in found
                if len(parts) == 3 and parts[0].lower() == name]
    else:        # a flat test part beside class folders is no class; nor are two parts with all in one heap
        rows = [("", parts) for parts in found if len(parts) == 2 and parts[0].lower() not in TEST]
        rows = [] if {parts[0].lower() for _, parts in rows} == {"train"} else rows
    if not rows:
        where = ", ".join(sorted({join("", *parts[:-1]) or "." for parts in found})[:3])
        raise DataError(f"no class folders with pictures in {root / under}, but {len(found)} pictures in "
                        f"{where or 'all'} below it: each class needs a folder of its own, right in the "
                        "folder that is given or in its train/ and test/")
    left = sorted({*found} - {parts for _, parts in rows})
    if left or others:
        such = f" (such as {join(*left[0])})" if left else ""
        say(f"left out of {root / under}: {len(left)} pictures not right in a class folder{such}, "
            f"{others} other files, hidden ones and empty folders")
    folders = {}
    for part, (*_, folder, _) in rows:
        other = folders.setdefault((part, nfc(folder).replace("_", " ")), folder)
        if other != folder:
            raise DataError(f"two folders in {root / under} have one name: {other!a} and {folder!a}")
    return [(part, join(under, *parts), names.get(parts[-2], parts[-2])) for part, parts in rows]


def list_imagenet(root: Path) -> Rows:
    """Folders n01440764, ... in train/ and val/; classnames.txt has lines of such a name and its words."""
    words = {}
    for line in (root / "classnames.txt").read_text().splitlines():
        folder, _, name = line.partition(" ")            # two are "missile", two "sunglasses"
        words[folder] = f"{name} {folder}" if name in words.values() else name
    return list_folders(root, "images" if (root / "images").is_dir() else "", words)


def list_aircraft(root: Path) -> Rows:
    """Lists of FGVC-Aircraft: a picture's name, a space, its variant."""
    lines = [(part, line.partition(" ")) for part in ("train", "test")
             for line in (root / f"images_variant_{part}.txt").read_text().splitlines()]
    return [(part, f"images/{picture}.jpg", variant) for part, (picture, _, variant) in lines]


def list_split(root: Path, split: str, pictures: str) -> Rows:
    """CoOp's splits: {"train": [[picture, label, class name], ...], "test": ...}; its val is left out."""
    parts = json.loads((root / split).read_text())
    rows = [(part, row) for part in ("train", "test") for row in sorted(parts[part], key=lambda row: row[1])]
    if not len({label for _, (_, label, _) in rows}) == len({name for *_, (*_, name) in rows}) \
            == len({(label, name) for _, (_, label, name) in rows}):
        raise ValueError(f"{split}: a label has two names, or a name two labels")
    return once([(part, join(pictures, path), name) for part, (path, _, name) in rows])


def list_eurosat(root: Path) -> Rows:
    """All class folders, in their order, for episodes; where CoOp's split is beside them, its parts too."""
    rows = {path: ("", path, name) for _, path, name in list_folders(root, "2750", EUROSAT)}
    if (root / EUROSAT_SPLIT).exists():
        for part, path, name in list_split(root, EUROSAT_SPLIT, "2750"):
            rows[path] = part, path, EUROSAT.get(name, name)
    return list(rows.values())


def table(file: Path) -> list[dict]:
    with open(file, newline="", encoding="utf-8-sig") as lines:
        return list(csv.DictReader(lines))


def list_isic(root: Path) -> Rows:
    rows = table(root / "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv")
    return [("", f"ISIC2018_Task3_Training_Input/{row['image']}.jpg", name) for row in rows
            for key, name in ISIC.items() if float(row[key]) == 1]


def list_chestx(root: Path) -> Rows:
    """Only pictures with exactly one finding, of the seven."""
    where = {p.name: p.relative_to(root).as_posix()
             for part in ("images", "images_*/images") for p in root.glob(f"{part}/*.png")}
    rows = table(root / "Data_Entry_2017.csv")
    return [("", where.get(row["Image Index"], f"images/{row['Image Index']}"), row["Finding Labels"])
            for row in rows if row["Finding Labels"] in CHESTX]


def once(rows: Iterable[tuple[str, str, str]]) -> Rows:
    """The rows with their paths normalised and their names composed, each picture once. Raises DataError."""
    known = {}
    for part, path, name in rows:
        path, row = normpath(path.replace("\\", "/")), (part, nfc(name))
        if known.setdefault(path, row) != row:
            raise DataError(f"{path} is listed twice, as {known[path]} and as {row}")
    return [(part, path, name) for path, (part, name) in known.items()]


EUROSAT = {"AnnualCrop": "Annual Crop Land", "HerbaceousVegetation": "Herbaceous Vegetation Land",
           "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
           "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings",
           "SeaLake": "Sea or Lake"}
EUROSAT_SPLIT = "split_zhou_EuroSAT.json"
ISIC = {"MEL": "Melanoma", "NV": "Melanocytic Nevus", "BCC": "Basal Cell Carcinoma",
        "AKIEC": "Actinic Keratosis", "BKL": "Benign Keratosis", "DF": "Dermatofibroma",
        "VASC": "Vascular Lesion"}
CHESTX = "Atelectasis|Cardiomegaly|Effusion|Infiltration|Mass|Nodule|Pneumothorax".split("|")


# --------------------------------------------------------------------------------------------- the known sets

class Dataset(NamedTuple):
    """A known set: its folder under --data (of any of these names), how to list that, how to get it."""
    folders: str
    list: Callable[[Path], Rows]
    source: str
    prompt: str | None = None
    archives: tuple[str, ...] = ()
    terms: str = ""


COOP = "DATASETS.md in github.com/KaiyangZhou/CoOp says"
NO_SPLIT = "no split: give train/ and test/ with folders of the same classes, or the set's split_zhou_*.json, "\
           f"as {COOP}"
KAGGLE = "get it by curl -L -o a.zip https://www.kaggle.com/api/v1/datasets/download/"
HUB = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
ISIC_ZIP = "https://isic-challenge-data.s3.amazonaws.com/2018/ISIC2018_Task3_Training_"
# name, folder as CLIP-LoRA's code calls it, as CoOp's does, its split_zhou_*.json, pictures, CoOp's prompt
SPLITS = """
caltech101  Caltech101    caltech-101     Caltech101           101_ObjectCategories  a photo of a {}.
cars        StanfordCars  stanford_cars   StanfordCars         .                     a photo of a {}.
dtd         DTD           dtd             DescribableTextures  images                {} texture.
flowers     Flower102     oxford_flowers  OxfordFlowers        jpg         a photo of a {}, a type of flower.
food101     Food101       food-101        Food101              images      a photo of {}, a type of food.
pets        OxfordPets    oxford_pets     OxfordPets           images      a photo of a {}, a type of pet.
sun397      SUN397        sun397          SUN397               SUN397                a photo of a {}.
ucf101      UCF101        ucf101          UCF101               UCF-101-midframes     a photo of a person doing {}.
"""
DATASETS = {
    "eurosat": Dataset(
        "eurosat", list_eurosat, f"get it from https://github.com/phelber/EuroSAT, the split as {COOP}",
        "a centered satellite photo of {}.",
        (f"{HUB}/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",)),
    "isic": Dataset(
        "ISIC", list_isic, "get it from https://challenge.isic-archive.com/data",
        archives=(f"{ISIC_ZIP}GroundTruth.zip", f"{ISIC_ZIP}Input.zip"),
        terms=" (ISIC 2018: 2.6 GB in all, licence CC BY-NC, no commercial use)"),
    "cropdiseases": Dataset("CropDiseases", partial(list_folders, under="train"),
                            f"{KAGGLE}saroz014/plant-disease, its class folders in CropDiseases/train/"),
    "chestx": Dataset("ChestX", list_chestx, f"{KAGGLE}nih-chest-xrays/data (42 GB)"),
    "imagenet": Dataset("imagenet", list_imagenet, f"get it as {COOP}", "itap of a {}."),
    "aircraft": Dataset("fgvc_aircraft", list_aircraft, f"get it as {COOP}",
                        "a photo of a {}, a type of aircraft."),
}
DATASETS |= {
    name: Dataset(f"{theirs} {coops}", partial(list_split, split=f"split_zhou_{split}.json", pictures=pictures),
                  f"get it as {COOP}", prompt)
    for name, theirs, coops, split, pictures, prompt in (line.split(None, 5)
                                                         for line in SPLITS.strip().splitlines())}
GROUPS = {"all": "eurosat isic cropdiseases chestx".split(),              # the three papers' targets
          "all-fsl": "imagenet sun397 aircraft eurosat cars food101 pets flowers caltech101 dtd ucf101".split()}
TOY = Path(__file__).resolve().parent / "tests"                          # toy_world.py, toy_clip.safetensors


def look(name: str, root: str | Path, split: bool = False) -> tuple[Path, Rows]:
    """A dataset's folder and what is in it. Raises DataError; where it can be fetched, Missing."""
    known = DATASETS.get(name, Dataset(name, list_folders, f"a dataset is one of toy, {', '.join(DATASETS)}, or "
                                       "a folder of class folders"))
    places = [Path(root, folder) for folder in known.folders.split()] if name in DATASETS else [Path(name)]
    folder = next((place for place in places if place.is_dir()), places[0])
    try:
        rows = once(known.list(folder)) if name != "toy" else []
        lost = [path for _, path, _ in rows if not (folder / path).is_file()]
        if lost:
            raise FileNotFoundError(f"{len(lost)} of {len(rows)} pictures, such as {folder / lost[0]}")
    except FileNotFoundError as e:
        fetched = known.archives and (not split or (folder / EUROSAT_SPLIT).exists())
        raise (Missing if fetched else DataError)(f"{name}: missing {e.filename or e}; {known.source}") from e
    except (LookupError, TypeError, ValueError) as e:
        raise DataError(f"the lists in {folder} are damaged: {type(e).__name__} {e}") from e
    if split and not {"train", "test"} <= {part for part, _, _ in rows}:
        raise DataError(f"{name}: {NO_SPLIT}")
    return folder, rows


def find(names: Sequence[str], root: str | Path = "datasets", split: bool = False) -> None:
    """Raises one DataError that says of all datasets what is wrong, but for what `load` can fetch."""
    problems = []
    for name in names:
        try:
            look(name, root, split)
        except Missing:
            pass
        except DataError as e:
            problems.append(str(e))
    if problems:
        raise DataError("; ".join(problems))


def fetch(url: str, folder: Path, known: Dataset) -> None:
    """Download a zip archive, from where an interrupted try stopped, and unpack it. Raises DataError.

    What is unpacked takes its name when it is whole; then the archive goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{url.rpartition('/')[2]}.part"
    while part.exists() and time.time() - part.stat().st_mtime < 10:
        say(f"another run is busy with {part}: waiting for it")
        time.sleep(1)
        if not part.exists():                                            # it is done
            return
    progress = Progress(f"fetching {url}{known.terms} into {folder}, MB", 1)
    try:
        for _ in range(9):                                               # connections break
            if zipfile.is_zipfile(part):
                break
            begun = part.stat().st_size if part.exists() else 0
            ask = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"})
            with suppress(ConnectionError, TimeoutError), urllib.request.urlopen(ask, timeout=60) as answer, \
                    open(part, "ab" if answer.status == 206 else "wb") as out:
                progress.total = out.tell() + int(answer.headers["Content-Length"])
                while block := answer.read(1 << 20):
                    out.write(block)
                    progress(out.tell())
                if out.tell() == progress.total:
                    break
        with zipfile.ZipFile(part) as archive, TemporaryDirectory(prefix=".", dir=folder) as place:
            archive.extractall(place)
            for made in Path(place).iterdir():
                if (folder / made.name).exists():                        # half of it
                    shutil.copytree(made, folder / made.name, copy_function=shutil.move, dirs_exist_ok=True)
                else:
                    made.rename(folder / made.name)
    except Exception as e:                                   # of files, sockets, HTTP, zip, zlib: all sorts
        if isinstance(e, zipfile.BadZipFile):
            part.unlink()
        raise DataError(f"cannot download {url} ({e}): run again to go on, or {known.source}, and put it "
                        f"into {folder}") from e
    part.unlink()


def load(name: str, root: str | Path = "datasets", size: int | None = None, split: bool = False,
         broken: list[str] | None = None) -> Pool:
    """The dataset called `name` under root, fetched at need; or "toy"; or the folder at the path `name`.

    size: pixels a side of the backbone at hand, 224 if None; split: for Pool.split. A list as broken is given
    what is wrong with pictures that cannot be read, which are left out. Raises DataError or OSError.
    """
    known = DATASETS.get(name)
    for url in known.archives if known else ():
        try:
            look(name, root, split)
        except Missing:
            fetch(url, Path(root, known.folders), known)
    folder, rows = look(name, root, split)
    if name == "toy":
        toy = runpy.run_path(str(TOY / "toy_world.py"))
        return Pool(*toy["toy_pictures"](200), toy["TOY_CLASSES"], "toy")
    size = size or 224
    test = [row for row in rows if split and row[0] == "test"]
    rows = [row for row in rows if not split or row[0] == "train"]
    rows, images, sizes = decoded(folder, rows, side(folder, rows, max(256, size)), broken=broken)
    label_of = {name: label for label, name in enumerate(dict.fromkeys(name for *_, name in rows + test))}
    labels, truth = (torch.tensor([label_of[name] for *_, name in some]) for some in (rows, test))
    train = torch.tensor([i for i, (part, *_) in enumerate(rows) if part == "train"])
    weights = [(folder / path).stat().st_size for _, path, _ in rows + test]
    pool = Pool(images, labels, list(label_of), digest(rows, test, weights, images.shape),
                known and known.prompt, train if len(train) else None)
    if split:
        pool.sizes, pool.queries, pool.truth = sizes, decoded(folder, test, size, centre=True)[1], truth
    return pool


# ------------------------------------------------------------------------------------------- reading pictures

# What pictures' endings mean, and GIF, as some of Oxford's pets named .jpg are: none needs another program
FORMATS = "JPEG PNG PPM BMP TIFF WEBP GIF".split()
BICUBIC = TF.InterpolationMode.BICUBIC
UNCLEAR = "nothing says which of its numbers is white: keep it with 8 bits, or all 16, a channel"
VERSION = 1, PIL.__version__               # of what is in the cache: raise it when pictures are read otherwise


def open_picture(path: str | Path) -> Image.Image:
    """A picture of FORMATS as RGB, upright by its EXIF orientation. Raises DataError naming the file.

    Of 16 bits a channel the upper 8 are kept. Refused is what would come out dark, as nothing says which
    number is white: fewer bits kept in 16, and 32-bit, negative or floating-point numbers.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            deep = image.mode[0] in "IF" or re.search(";16[BLN]", str(image.tile))
            image.load()
            turn = 1
            with suppress(Exception):                                    # damaged metadata
                turn = image.getexif().get(0x112)
            low, high = image.getextrema() if image.mode[0] in "IF" else (0, 0)
            if image.mode == "F" or low < 0 or high >= 2 ** 16:
                raise ValueError(UNCLEAR)
            if image.mode[0] == "I":                                     # Pillow's own conversion would clip
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            image = image.convert("RGB")
            if deep and max(high for _, high in image.getextrema()) < 128:
                raise ValueError(UNCLEAR)
            # orientations 2 to 8 in Image.Transpose's numbers
            return image.transpose((0, 3, 1, 5, 4, 6, 2)[turn - 2]) if turn in range(2, 9) else image
    except Exception as e:                          # Pillow's readers raise all sorts: struct.error, KeyError
        raise DataError(f"cannot read {path}: {' '.join(str(e).split()) or type(e).__name__}") from e


def fitted(image: Image.Image, size: int, centre: bool = False) -> Tensor:
    """A picture as (3, size, size) uint8, bicubic: squashed; centre: its middle, by OpenAI's preparation."""
    if centre:
        image = TF.center_crop(TF.resize(image, size, BICUBIC), size)
    return TF.pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))


def decode(path: str | Path, size: int = 256) -> Tensor:
    """A picture file squashed to (3, size, size) uint8. Raises DataError naming the file."""
    return fitted(open_picture(path), size)


def side(folder: Path, rows: Rows, most: int) -> int:
    """The longest side of a hundred of the pictures, up to `most`: small ones are not enlarged."""
    sides = []
    for _, path, _ in rows[:: ceil(len(rows) / 100)]:
        with suppress(Exception), Image.open(folder / path, formats=FORMATS) as image:
            sides += image.size
    return min(max(sides, default=most), most)


def decoded(folder: Path, rows: Rows, size: int, centre: bool = False, broken: list[str] | None = None,
            ) -> tuple[Rows, Tensor, Tensor]:
    """Rows whose pictures can be read, those as a mapped tensor (N, 3, size, size) uint8, and their sides (N, 2).

    They are decoded once, by threads, into a file that is there whole or not at all. A list as broken is given
    what is wrong with the others; without one, they raise a DataError.
    """
    def place(rows: Rows) -> Path:
        stats = [(path, s.st_size, s.st_mtime_ns) for _, path, _ in rows for s in [(folder / path).stat()]]
        return CACHE / f"{digest(VERSION, str(folder.resolve()), stats, size, centre)}.u8"

    def read(row: tuple[str, str, str]) -> tuple[Tensor, tuple[int, int]] | DataError:
        try:
            image = open_picture(folder / row[1])
            return fitted(image, size, centre), (image.height, image.width)
        except DataError as e:
            return e

    file, good, sides, problems = place(rows), [], [], []
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        progress, part = Progress(f"decoding pictures of {folder}", len(rows)), file.with_suffix(f".{os.getpid()}")
        try:
            with ThreadPoolExecutor() as threads, open(part, "wb") as out:
                for start in range(0, len(rows), 256):                   # a few hundred bound the memory
                    progress(start)
                    some = rows[start: start + 256]
                    for row, found in zip(some, threads.map(read, some)):
                        if isinstance(found, DataError):
                            problems.append(str(found))
                        else:
                            good.append(row)
                            sides.append(found[1])
                            out.write(found[0].numpy().tobytes())
                out.write(torch.tensor(sides).numpy().tobytes())
            if problems and (broken is None or not good):
                raise DataError(f"{'; '.join(problems[:5])}; {len(problems)} in all")
            if problems:
                broken += problems
                rows, file = good, place(good)
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
    shape = len(rows), 3, size, size
    whole = torch.from_file(str(file), shared=True, size=prod(shape) + 16 * len(rows), dtype=torch.uint8)
    return rows, whole[: prod(shape)].view(shape), whole[prod(shape):].clone().view(torch.int64).view(-1, 2)


# ----------------------------------------------------------------------------------------------- augmentation

def normalize(images: Tensor, config) -> Tensor:
    """(..., 3, S, S) in 0..1 -> normalised by the mean and std of a backbone's config."""
    mean, std = (torch.tensor(x).view(3, 1, 1).to(images.device, non_blocking=True)
                 for x in (config.mean, config.std))
    return (images - mean) / std


def resize(images: Tensor, size: int) -> Tensor:
    """(..., 3, S, S) uint8 -> (..., 3, size, size) float in 0..1, antialiased."""
    return TF.resize(images / 255, [size, size])


def plain(images: Tensor, config, centre: bool = False) -> Tensor:
    """(..., 3, S, S) uint8 -> normalised for a backbone; centre: of 257/224 its size, cropped."""
    whole = round(config.image * 257 / 224) if centre else config.image
    return normalize(TF.center_crop(resize(images, whole), [config.image] * 2), config)


def warp(images: Tensor, maps: tuple[Tensor, ...], size: int, **how) -> Tensor:
    """Each of (B, 3, S, S) through its own affine map -> (B, 3, size, size); maps: six of (B,)."""
    maps = torch.stack(maps, -1).view(-1, 2, 3)
    grid = F.affine_grid(maps, (len(images), 3, size, size), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, **how)


def crop_boxes(sides: Tensor, u: Tensor, least: float = 0.08) -> tuple[Tensor, Tensor]:
    """Boxes as torchvision's RandomResizedCrop draws them: top left corners (B, 2) and sides (B, 2), whole.

    sides (B, 2): the pictures' heights and widths. u (B, 22) in 0..1: ten areas (least..1), ten ratios
    (3/4..4/3, even in the logarithm), a place. The first of ten boxes that fits; if none does, the largest
    of a ratio within the limits, in the middle.
    """
    sides = sides[..., None]                                                         # (B, 2, 1)
    area, ratio = sides.prod(1) * (least + (1 - least) * u[:, :10]), (4 / 3) ** (2 * u[:, 10:20] - 1)
    boxes = torch.stack([area / ratio, area * ratio], 1).sqrt().round()              # (B, 2, 10)
    last = torch.minimum(sides, (sides.flip(1) * 4 / 3).round())
    boxes = torch.cat([boxes, last], 2)                                              # (B, 2, 11)
    first = ((boxes > 0) & (boxes <= sides)).all(1).int().argmax(1)                  # (B,)
    boxes = boxes.gather(2, first.view(-1, 1, 1).expand(-1, 2, 1))                   # (B, 2, 1)
    room = sides - boxes
    corners = torch.where(first.view(-1, 1, 1) < 10, u[:, 20:22, None] * (room + 1), room / 2).floor()
    return corners[..., 0], boxes[..., 0]


def random_crop(images: Tensor, u: Tensor, size: int, least: float = 0.08, bicubic: bool = False,
                sides: Tensor | None = None) -> Tensor:
    """Random crop (area least..1, ratio 3/4..4/3), then a flip; images (B, 3, S, S) -> (B, 3, size, size).

    u (B, 23) in 0..1: the chance in it, so that a crop can be repeated: `crop_boxes`, and flip. sides (B, 2):
    height and width of the pictures before they were squashed, in whose pixels boxes are; None: S and S.
    """
    square = images.shape[-1]
    sides = u.new_full((len(u), 2), square) if sides is None else sides
    corners, boxes = crop_boxes(sides, u, least)
    (height, width), (y, x) = (boxes / sides).unbind(1), ((2 * corners + boxes) / sides - 1).unbind(1)
    zero, flip = torch.zeros_like(x), torch.where(u[:, 22] < 0.5, -1.0, 1.0)
    maps, mode = (flip * width, zero, x, zero, height, y), "bicubic" if bicubic else "bilinear"
    # grid_sample does not average: of large pictures it takes more pixels, which are averaged
    finer = max(1, round(square / size))
    crops = F.avg_pool2d(warp(images, maps, finer * size, padding_mode="border", mode=mode), finer)
    return crops.clamp(0, 1)                                                         # bicubic overshoots


def jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, colour of (B, 3, S, S) in 0..1, by factors (B, 3)."""
    grey = TF.rgb_to_grayscale
    brightness, contrast, colour = factors[..., None, None, None].unbind(1)
    images = (images * brightness).clamp(0, 1)
    mean = grey(images).mean((-2, -1), keepdim=True)
    images = (mean + contrast * (images - mean)).clamp(0, 1)
    return (grey(images) + colour * (images - grey(images))).clamp(0, 1)


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """(B, 3, S, S) turned counter-clockwise by angles (B,) in radians: nearest neighbour, 0 outside."""
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return warp(images, (cos, -sin, zero, sin, cos, zero), images.shape[-1], mode="nearest")


def five_views(images: Tensor, u: Tensor) -> Tensor:
    """The released five views: plain; rotation, jitter and flip; rotation; jitter; flip.

    images (B, 3, S, S) in 0..1 -> (5, B, 3, S, S). u (B, 10) in 0..1: two angles (-45..45 degrees), twice
    three jitter factors (0.6..1.4), two flips (p = 0.5).
    """
    def flipped(images: Tensor, chance: Tensor) -> Tensor:
        return torch.where(chance.view(-1, 1, 1, 1) < 0.5, images.flip(-1), images)
    angles, factors = (u[:, :2] - 0.5) * pi / 2, 0.6 + 0.8 * u[:, 2:8]
    return torch.stack([images, flipped(jitter(rotate(images, angles[:, 0]), factors[:, :3]), u[:, 8]),
                        rotate(images, angles[:, 1]), jitter(images, factors[:, 3:]), flipped(images, u[:, 9])])


class Batches:
    """The pictures of every training step for E tasks at once, the same whenever a step is asked for.

    batches(number) -> pictures (E, B, 3, size, size) normalised, labels (E, B), and without augmentation
    plain (E, K, 3, size, size), its labels (E, K). All chance is drawn from each task's own seed. In
    mini-batches each epoch has a new order and shows every picture once: its last step may be short.
    recipe: has steps, augment, minibatch, crop_area and bicubic; config: a backbone's image, mean and std.
    """

    def __init__(self, pool: Pool, tasks: Sequence[Task], seeds: Sequence[object], recipe, config,
                 device: str | torch.device = "cpu"):
        self.pool, self.recipe, self.config, self.device, self.seeds = pool, recipe, config, device, seeds
        self.support, self.labels = (torch.stack([task[i] for task in tasks]) for i in (1, 2))     # (E, M)
        self.each, self.pictures = torch.arange(len(tasks))[:, None], self.support.shape[1]
        whole = self.pictures * (5 if recipe.augment == "views" else 1)              # in an epoch
        self.shown = min(recipe.minibatch or whole, whole)                           # B, of the largest step
        self.mini, self.made = self.shown < whole, (None, None)
        self.epoch = ceil(whole / self.shown)                                        # steps in it
        # (E, epochs, whole): which of all that is shown; row r is view r // M of picture r % M
        order = self.uniform("order", ceil(recipe.steps / self.epoch), whole).argsort(-1) if self.mini \
            else torch.arange(whole).view(1, 1, -1)
        self.order = order.expand(len(tasks), -1, -1)
        if recipe.augment == "crop":
            self.crops = self.uniform("crop", recipe.steps, self.shown, 23).to(device)
        self.turns = self.uniform("views", self.pictures, 10)

    def uniform(self, what: str, *shape: int) -> Tensor:
        """(E, *shape) in 0..1."""
        return torch.stack([torch.rand(shape, generator=generator(what, seed)) for seed in self.seeds])

    def prepare(self, number: int) -> tuple[Tensor | None, ...]:
        """The step's pictures, but for the crop, which differs in every step; labels; plain; its labels; sides."""
        r, size = self.recipe, self.config.image
        epoch, step = divmod(number, self.epoch)
        rows = self.order[:, epoch, step * self.shown: (step + 1) * self.shown]      # (E, B)
        chosen = rows % self.pictures
        labels = self.labels[self.each, chosen].to(self.device)
        different = chosen if self.mini else chosen[:, : self.pictures]              # (E, K): views repeat them
        places = self.support[self.each, different]
        raw = self.pool.images[places].to(self.device)
        still = shown = plain(raw, self.config, r.augment == "none")
        sides = None if self.pool.sizes is None else self.pool.sizes[places].to(self.device).flatten(0, 1)
        if r.augment == "crop":
            shown = raw / 255
        if r.augment == "views":
            turns = self.turns[self.each, different].flatten(0, 1).to(self.device)
            views = five_views(resize(raw, size).flatten(0, 1), turns).unflatten(1, different.shape)
            place = torch.arange(rows.shape[1]) % different.shape[1]
            shown = normalize(views[rows // self.pictures, self.each, place], self.config)      # (E, B, ...)
        return sides, shown, labels, still, labels[:, : different.shape[1]]

    def __call__(self, number: int) -> tuple[Tensor, ...]:
        step, r = number if self.mini else 0, self.recipe                       # full batches are all one
        if self.made[0] != step:
            self.made = step, self.prepare(step)
        sides, shown, *others = self.made[1]
        if r.augment == "crop":
            u = self.crops[:, number, : shown.shape[1]].flatten(0, 1)
            shown = random_crop(shown.flatten(0, 1), u, self.config.image, r.crop_area, r.bicubic, sides)
            shown = normalize(shown, self.config).unflatten(0, (len(self.each), -1))
        return shown, *others
