"""Datasets as one tensor each, tasks drawn from (seed, number) alone, augmentation in batches.

    pool = load("eurosat", "datasets")                      # a name of DATASETS, toy, or a folder
    task = pool.task(0, way=5, shot=1, query=15, seed=1)    # index tensors, and what is true of each
    pool.images[task.support]                               # (5, 3, S, S) uint8

In this order: pools and tasks, what is in a folder, the known sets, reading pictures, augmentation. Every
picture is decoded once, to S x S, into a file in the cache that later runs map into memory.
"""
import csv
import hashlib
import json
import os
import runpy
import shutil
import sys
import time
import unicodedata
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from glob import glob
from math import ceil
from pathlib import Path
from posixpath import join, normpath                  # a list's paths are the same on every system
from typing import NamedTuple

import PIL
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import is_image_file

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "atha")
nfc = partial(unicodedata.normalize, "NFC")          # a Mac's zip spells an accent as a character of its own

class DataError(ValueError):
    """Pictures or labels that cannot be had or used; the message is one line for the user."""

def digest(*what: object) -> str:
    """16 hexadecimal digits that stand for values, the same in every process."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]

def generator(*key: object) -> torch.Generator:
    """A random generator that depends on the key alone."""
    return torch.Generator().manual_seed(int(digest(*key)[:14], 16))

@cache
def say(line: str):
    """Print a line on stderr, once."""
    print(line, file=sys.stderr)

class Progress:
    """Says on stderr what begins, then every few seconds how much of it is done and the time left."""

    def __init__(self, what: str, total: float):
        self.what, self.total = what, total
        self.begun = self.said = time.monotonic()
        say(f"{what}: {total} to do")

    def __call__(self, done: float, more=""):
        now = time.monotonic()
        if done and now - self.said > 5:
            self.said = now
            say(f"{self.what}: {100 * done / self.total:.0f} %, "
                f"{(now - self.begun) * (self.total / done - 1):.0f} s left{more}")


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
    """A dataset. images (N, 3, S, S) uint8, squashed to squares, perhaps a mapped file: not to be written to.

    labels (N,) int64; classes: one name a label; fingerprint: changes with the pictures' names, sizes and
    labels; prompt: CoOp's own for this set. Loaded for its split: images are of the training part, sizes
    (N, 2) their heights and widths as they were; queries (T, 3, size, size) uint8 are the test pictures by
    OpenAI's preparation, truth (T,) their labels.
    """
    images: Tensor
    labels: Tensor
    classes: list[str]
    fingerprint: str
    prompt: str = None
    sizes: Tensor = None
    queries: Tensor = None
    truth: Tensor = None

    def rows(self) -> list[Tensor]:
        """Rows of each class."""
        return [torch.where(self.labels == label)[0] for label in range(len(self.classes))]

    def task(self, number: int, way=5, shot=1, query=15, seed=1) -> Task:
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
        """All classes, `shot` pictures of each from the training part, the whole test part as queries.

        A class with fewer is drawn from with replacement; else a seed's pictures at few shots are among those
        at more. Raises DataError for a class without pictures.
        """
        support = []
        for label, rows in enumerate(self.rows()):
            g, n = generator("split", seed, label), len(rows)
            if not n:
                raise DataError(f"class {self.classes[label]!r} has no picture in the training split")
            order = torch.randint(n, (shot,), generator=g) if n < shot else torch.randperm(n, generator=g)
            support.append(rows[order[:shot]])
        classes = torch.arange(len(self.classes))
        return Task(classes, torch.cat(support), classes.repeat_interleave(shot),
                    torch.arange(len(self.truth)), self.truth)

    def holdout(self, count: int, seed: int) -> Task:
        """All classes with all their pictures, but for `count` of each as queries.

        A class gives what it can spare: one picture at least stays to learn from.
        """
        held, kept = map(torch.cat, zip(*(
            rows[torch.randperm(len(rows), generator=generator("holdout", seed, label))]
            .tensor_split([min(count, len(rows) - 1)]) for label, rows in enumerate(self.rows()))))
        return Task(torch.arange(len(self.classes)), kept, self.labels[kept], held, self.labels[held])


# ------------------------------------------------------------------------------ what is in a dataset's folder

# A lister gives a row a picture: "train", "test" or "", its path below the folder, its class. Labels count
# the classes in the order in which they come. What is not there is a FileNotFoundError.

Rows = list                                               # of such tuples of three strings
LITTER = {*"__MACOSX @eaDir #recycle $RECYCLE.BIN lost+found".split()}    # of macOS, Synology, Windows, Linux
TEST = "test val valid validation".split()                # what people call the part that is tested on

def files_in(folder: Path) -> list:
    """Paths of all files and empty folders below a folder, sorted, without hidden ones and litter."""
    paths = map(Path, glob("**", root_dir=folder, recursive=True))
    return sorted(path for path in paths if not LITTER & {*path.parts}
                  and (is_image_file(path.name) or not any(Path(folder, path).glob("*"))))

def pictures_in(folder: Path) -> list:
    """All pictures below a folder, sorted, without hidden ones and litter."""
    return [Path(folder, path) for path in files_in(folder) if is_image_file(path.name)]

def list_folders(root: Path, under: str = "", names={}) -> Rows:
    """Class folders, each called as in names; or train/ and test/ (or val/) that hold them: the split.

    Where train/ holds class folders, nothing beside it is a class; of a test part, such classes count alone.
    Raises DataError where there are no class folders, or two of one name.
    """
    files = files_in(place := root / under)
    found = [path.parts for path in files if is_image_file(path.name)]
    if not found:
        raise FileNotFoundError(f"no pictures in {place}")
    deep = [(parts[0].lower(), parts) for parts in found if len(parts) == 3]
    rows = [("train", parts) for part, parts in deep if part == "train"]
    classes = {parts[1] for _, parts in rows}
    tests = ([("test", parts) for part, parts in deep if part == name and parts[1] in classes]
             for name in TEST)
    # without train/: pictures of all classes in one heap, as people keep a test part, are no class either
    rows += next(filter(None, tests), []) if rows else [
        ("", parts) for parts in found if len(parts) == 2 and parts[0].lower() not in TEST]
    if {parts[-2].lower() for _, parts in rows} <= {"train"}:
        raise DataError(f"no class folders with pictures right in {place}, or in its train/ and test/: give "
                        f"the folder above the class folders ({len(found)} pictures are in "
                        f"{', '.join(sorted({join(*parts[:-1], '') for parts in found})[:3]) or place})")
    if len(rows) < len(files):
        say(f"left out of {place}: {len(found) - len(rows)} pictures not right in a class folder, "
            f"{len(files) - len(found)} other files and empty folders, such as "
            f"{join(*min({path.parts for path in files} - {parts for _, parts in rows}))}")
    folders = {(part, nfc(parts[-2]).replace("_", " ")): parts[-2] for part, parts in rows}
    if twins := {parts[-2] for _, parts in rows} - {*folders.values()}:
        raise DataError(f"in {place} there is a second folder, accents and _ aside, for each of {twins!a}")
    return [(part, join(under, *parts), names.get(parts[-2], parts[-2])) for part, parts in rows]

def list_imagenet(root: Path) -> Rows:
    """Folders n01440764, ... in train/ and val/; classnames.txt has lines of such a name and its words."""
    words = {}
    for line in (root / "classnames.txt").read_text().splitlines():
        folder, name = line.split(" ", 1)                 # two are "missile", two "sunglasses"
        words[folder] = f"{name} {folder}" if name in words.values() else name
    return list_folders(root, "images" if (root / "images").is_dir() else "", words)

def list_aircraft(root: Path) -> Rows:
    """Lists of FGVC-Aircraft: a picture's seven digits, a space, its variant."""
    return [(part, f"images/{line[:7]}.jpg", line[8:]) for part in ("train", "test")
            for line in (root / f"images_variant_{part}.txt").read_text().splitlines()]

def list_split(root: Path, split: str, pictures: str) -> Rows:
    """CoOp's splits: {"train": [[picture, label, class name], ...], "test": ...}; its val is left out."""
    parts = json.loads((root / split).read_text())
    return once([(part, join(pictures, picture), name) for part in ("train", "test")
                 for picture, label, name in sorted(parts[part], key=lambda row: row[1])])

def list_eurosat(root: Path) -> Rows:
    """All class folders, in their order, for episodes; where CoOp's split is beside them, its parts too."""
    rows = list_folders(root, "2750")
    if (root / EUROSAT_SPLIT).exists():
        rows += list_split(root, EUROSAT_SPLIT, "2750")
    rows = {row[1]: row for row in rows}.values()
    return [(part, path, EUROSAT.get(name, name)) for part, path, name in rows]

def table(file: Path) -> list:
    return [*csv.DictReader(file.read_text("utf-8-sig").splitlines())]

def list_isic(root: Path) -> Rows:
    rows = table(root / "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv")
    return [("", f"ISIC2018_Task3_Training_Input/{row['image']}.jpg", name) for row in rows
            for key, name in ISIC.items() if float(row[key]) == 1]

def list_chestx(root: Path) -> Rows:
    """Only pictures with exactly one finding, of the seven."""
    where = {path.name: str(path) for path in files_in(root)}
    return [("", where.get(row["Image Index"], row["Image Index"]), row["Finding Labels"])
            for row in table(root / "Data_Entry_2017.csv") if row["Finding Labels"] in CHESTX]

def once(rows: Rows) -> Rows:
    """The rows with paths normalised and names composed, each picture once. Raises DataError for twins."""
    known = {}
    for part, path, name in rows:
        row = part, normpath(path.replace("\\", "/")), nfc(name)
        if known.setdefault(row[1], row) != row:
            raise DataError(f"one picture is listed twice: as {known[row[1]]} and as {row}")
    return [*known.values()]

EUROSAT = dict(pair.split("=") for pair in (
    "AnnualCrop=Annual Crop Land|HerbaceousVegetation=Herbaceous Vegetation Land|Highway=Highway or Road|"
    "Industrial=Industrial Buildings|Pasture=Pasture Land|PermanentCrop=Permanent Crop Land|"
    "Residential=Residential Buildings|SeaLake=Sea or Lake").split("|"))
EUROSAT_SPLIT = "split_zhou_EuroSAT.json"
ISIC = dict(pair.split("=") for pair in (
    "MEL=Melanoma|NV=Melanocytic Nevus|BCC=Basal Cell Carcinoma|AKIEC=Actinic Keratosis|BKL=Benign Keratosis|"
    "DF=Dermatofibroma|VASC=Vascular Lesion").split("|"))
CHESTX = "Atelectasis|Cardiomegaly|Effusion|Infiltration|Mass|Nodule|Pneumothorax".split("|")


# --------------------------------------------------------------------------------------------- the known sets

class Dataset(NamedTuple):
    """A known set: its folder under --data (of any of these names), how to list that, how to get it."""
    folders: str
    lister: object
    source: str
    prompt: str = None
    archives: tuple = ()

COOP = "as DATASETS.md in github.com/KaiyangZhou/CoOp says"
KAGGLE = "get it by curl -L -o a.zip https://www.kaggle.com/api/v1/datasets/download/"
EUROSAT_ZIP = (f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/datasets/torchgeo/eurosat/"
               "resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip")
ISIC_2018 = "https://isic-challenge-data.s3.amazonaws.com/2018/ISIC2018_Task3_Training_"
DATASETS = {
    "eurosat": Dataset("eurosat", list_eurosat, f"get it from github.com/phelber/EuroSAT, its split {COOP}",
                       "a centered satellite photo of {}.", [EUROSAT_ZIP]),
    "isic": Dataset("ISIC", list_isic, "get it from https://challenge.isic-archive.com/data: 2.6 GB, licence "
                    "CC BY-NC, no commercial use", None,
                    [f"{ISIC_2018}GroundTruth.zip", f"{ISIC_2018}Input.zip"]),
    "cropdiseases": Dataset("CropDiseases", partial(list_folders, under="train"),
                            f"{KAGGLE}saroz014/plant-disease, its class folders in CropDiseases/train/"),
    "chestx": Dataset("ChestX", list_chestx, f"{KAGGLE}nih-chest-xrays/data (42 GB)"),
    "imagenet": Dataset("imagenet", list_imagenet, f"get it {COOP}", "itap of a {}."),
    "aircraft": Dataset("fgvc_aircraft", list_aircraft, f"get it {COOP}",
                        "a photo of a {}, a type of aircraft."),
}
# The sets with a split of CoOp's: folder in CLIP-LoRA's code, in CoOp's, split_zhou_*.json, pictures, prompt
SPLITS = """
caltech101  Caltech101    caltech-101     Caltech101           101_ObjectCategories  a photo of a {}.
cars        StanfordCars  stanford_cars   StanfordCars         .                     a photo of a {}.
dtd         DTD           dtd             DescribableTextures  images                {} texture.
flowers     Flower102     oxford_flowers  OxfordFlowers        jpg         a photo of a {}, a type of flower.
food101     Food101       food-101        Food101              images      a photo of {}, a type of food.
pets        OxfordPets    oxford_pets     OxfordPets           images      a photo of a {}, a type of pet.
sun397      SUN397        sun397          SUN397               SUN397                a photo of a {}.
ucf101      UCF101        ucf101          UCF101          UCF-101-midframes  a photo of a person doing {}.
"""
for line in SPLITS.strip().splitlines():
    name, ours, theirs, split, pictures, prompt = line.split(maxsplit=5)
    lister = partial(list_split, split=f"split_zhou_{split}.json", pictures=pictures)
    DATASETS[name] = Dataset(f"{ours} {theirs}", lister, f"get it {COOP}", prompt)
GROUPS = {"all": "eurosat isic cropdiseases chestx".split(),              # the three papers' targets
          "all-fsl": "imagenet sun397 aircraft eurosat cars food101 pets flowers caltech101 dtd "
                     "ucf101".split()}
OWN = Dataset("", list_folders, f"there are toy, {', '.join(DATASETS)}, or a folder of class folders")
TOY = Path(__file__).resolve().parent / "tests"                          # toy_world.py, toy_clip.safetensors

def look(name: str, root: Path, split: bool) -> tuple[Path, Rows]:
    """A dataset's folder and what is in it, fetched if it is not there and can be. Raises DataError."""
    known = DATASETS.get(name, OWN)
    places = [Path(root, folder) for folder in known.folders.split()] or [Path(name)]
    folder = next(filter(Path.is_dir, places), places[0])
    for url in (*known.archives, ""):
        try:
            rows = once(known.lister(folder)) if name != "toy" else []
            if lost := [path for _, path, _ in rows if not (folder / path).is_file()]:
                raise FileNotFoundError(f"{len(lost)} of {len(rows)} pictures are lost, as {lost[0]} is")
            break
        except DataError:
            raise
        except (OSError, LookupError, TypeError, ValueError) as e:
            if not url:
                raise DataError(f"{name}: {folder} is not {'whole' if folder.is_dir() else 'there'}, "
                                f"{type(e).__name__} {e}; {known.source}") from e
        fetch(url, folder, known)
    if split and not {"train", "test"} <= {part for part, _, _ in rows}:
        raise DataError(f"{name}: no split: give train/ and test/ with folders of the same classes, or a "
                        f"known set's split_zhou_*.json, {COOP}")
    return folder, rows

def find(names: list, root="datasets", split=False):
    """Raises one DataError that says of all datasets what is wrong, but for those that `load` can fetch."""
    problems = []
    for name in names:
        try:
            if not DATASETS.get(name, OWN).archives:
                look(name, root, split)
        except DataError as e:
            problems.append(str(e))
    if problems:
        raise DataError("; ".join(problems))

def fetch(url: str, folder: Path, known: Dataset) -> None:
    """Download a zip archive, unless it is there and whole, and unpack it. Raises DataError."""
    archive, place = folder / f".{Path(url).name}", folder / ".unpacked"
    say(f"fetching {url} into {folder} ({known.source})")
    try:
        os.makedirs(folder, exist_ok=True)
        for _ in range(5):                                               # connections break
            if not zipfile.is_zipfile(archive):
                torch.hub.download_url_to_file(url, str(archive))
        shutil.unpack_archive(archive, place)
        shutil.copytree(place, folder, copy_function=shutil.move, dirs_exist_ok=True)
        shutil.rmtree(place)
        archive.unlink()
    except Exception as e:                                   # of files, sockets, HTTP, zip, zlib: all sorts
        if not isinstance(e, OSError):                                   # a damaged archive
            archive.unlink(missing_ok=True)
        raise DataError(f"cannot download {url} ({e}): run again, or {known.source}, into {folder}") from e

def load(name: str, root="datasets", size=None, split=False, broken=None) -> Pool:
    """The dataset called `name` under root, fetched at need; or "toy"; or the folder at the path `name`.

    size: pixels a side of the backbone at hand, 224 if None; split: for Pool.split. A list as broken is given
    what is wrong with pictures that cannot be read, which are left out, as is a test part. Raises DataError.
    """
    (folder, rows), size = look(name, root, split), size or 224
    if name == "toy":
        return Pool(*runpy.run_path(str(TOY / "toy_world.py"))["toy_dataset"](), "toy")
    test = [row for row in rows if row[0] == "test"]
    if split or broken is not None:
        learned = max(rows)[0]                           # "train", or "" where there are no parts
        rows = [row for row in rows if row[0] == learned]
    rows, images, sizes = decoded(folder, rows, max(256, size), broken=broken)
    label_of = {}
    labels = torch.tensor([label_of.setdefault(name, len(label_of)) for *_, name in rows + test])
    weights = [os.path.getsize(folder / path) for _, path, _ in rows + test]
    pool = Pool(images, labels[: len(rows)], [*label_of], digest(rows, test, weights, images.shape),
                DATASETS.get(name, OWN).prompt)
    if split:
        pool.sizes, pool.truth = sizes.contiguous().view(torch.int64), labels[len(rows):]
        pool.queries = decoded(folder, test, size, centre=True)[1]
    return pool


# ------------------------------------------------------------------------------------------- reading pictures

# What pictures' endings mean, and GIF, as some of Oxford's pets named .jpg are: none needs another program
FORMATS = "JPEG PNG PPM BMP TIFF WEBP GIF".split()
UNCLEAR = "nothing says which of its numbers is white: keep it with 8 bits, or all 16, a channel"

def open_picture(path: Path) -> Image.Image:
    """A picture of FORMATS as RGB, upright by its EXIF orientation. Raises DataError naming the file.

    Of 16 bits a channel the upper 8 are kept. Refused is what would come out dark, as nothing says which
    number is white: fewer bits kept in 16, and 32-bit, negative or floating-point numbers.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            deep, picture = ";16" in str(image.tile), image
            image.load()
            if image.mode[0] in "IF":
                low, high = image.getextrema()
                if low < 0 or not 2 ** 15 <= high < 2 ** 16:
                    raise ValueError(UNCLEAR)                            # Pillow's own conversion would clip
                picture = image.convert("I").point(lambda value: value / 256).convert("L")
            picture = picture.convert("RGB")
            if deep and max(high for _, high in picture.getextrema()) < 128:
                raise ValueError(UNCLEAR)
            with suppress(Exception):        # no orientation, or 1, or damaged; 2 to 8 in Pillow's numbers
                return picture.transpose((None, None, 0, 3, 1, 5, 4, 6, 2)[image.getexif()[0x112]])
            return picture
    except Exception as e:                          # Pillow's readers raise all sorts: struct.error, KeyError
        raise DataError(f"cannot read {path}: {' '.join(str(e).split()) or type(e).__name__}") from e

def fitted(image: Image.Image, size: int, centre=False) -> Tensor:
    """A picture as (3, size, size) uint8, bicubic: squashed; centre: its middle, by OpenAI's preparation."""
    image = TF.resize(image, size if centre else [size, size], Image.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(image, size))

def decode(path: Path, size=256) -> Tensor:
    """A picture file squashed to (3, size, size) uint8. Raises DataError naming the file."""
    return fitted(open_picture(path), size)

def decoded(folder: Path, rows: Rows, size: int, centre=False, broken=None) -> tuple:
    """Rows whose pictures can be read, those mapped as (N, 3, S, S) uint8, the bytes of their sides (N, 16).

    S is size, or less for the sake of small pictures. They are decoded once, by threads, into a file that is
    there whole or not at all. A list as broken is given what is wrong with the others; else a DataError says.
    """
    def read(row):
        try:
            image = open_picture(folder / row[1])
        except DataError as e:
            problems.append(str(e))
            return b""
        sides = torch.tensor([image.height, image.width])
        return sides.numpy().tobytes() + fitted(image, size, centre).numpy().tobytes()
    sides, problems, good, threads = [], [], rows, ThreadPoolExecutor()
    for _, path, _ in rows[:: len(rows) // 100 + 1]:                     # small ones are not enlarged
        with suppress(Exception):
            sides += Image.open(folder / path).size
    size = size if centre else min(max(sides, default=size), size)
    stats = [(s.st_size, s.st_mtime_ns) for s in map(os.stat, (folder / path for _, path, _ in rows))]
    file = CACHE / f"{digest(1, PIL.__version__, folder.resolve(), rows, stats, size, centre)}.u8"
    part = file.with_suffix(f".{os.getpid()}")
    try:
        if not file.exists():
            os.makedirs(CACHE, exist_ok=True)
            good, progress = [], Progress(f"decoding pictures of {folder}", len(rows))
            with open(part, "wb") as out:
                for row, record in zip(rows, threads.map(read, rows)):
                    out.write(record)
                    good += [row] if record else []
                    progress(len(good))
            if good == rows != []:
                part.replace(file)
            elif broken is None or not good:
                raise DataError(f"{'; '.join(problems[:5])}; {len(problems)} of {len(rows)} pictures of "
                                f"{folder} cannot be read")
            else:
                say(f"left out: {'; '.join(problems)}")
                broken += problems
                file = part
        whole = torch.from_file(str(file), True, len(good) * (16 + 3 * size * size), dtype=torch.uint8)
        whole = whole.view(len(good), -1)
    finally:
        threads.shutdown(cancel_futures=True)
        part.unlink(missing_ok=True)
    return good, whole[:, 16:].unflatten(1, (3, size, size)), whole[:, :16]


# ----------------------------------------------------------------------------------------------- augmentation

def normalize(images: Tensor, config) -> Tensor:
    """(..., 3, S, S) in 0..1 -> normalised by the mean and std of a backbone's config."""
    channels = zip(images.unbind(-3), config.mean, config.std)           # numbers: a GPU waits for tensors
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], -3)

def plain(images: Tensor, config, centre=False) -> Tensor:
    """(..., 3, S, S) uint8 -> normalised for a backbone; centre: of 257/224 its size, cropped."""
    size = config.image
    whole = TF.resize(images / 255, round(size * 257 / 224) if centre else size)
    return normalize(TF.center_crop(whole, size), config)

def crop_boxes(sides: Tensor, u: Tensor, least=0.08) -> tuple:
    """Boxes as torchvision's RandomResizedCrop draws them: top left corners, heights and widths, (B, 2) each.

    sides (B, 2): the pictures' heights and widths. u (B, 22) in 0..1: ten areas (least..1), ten ratios
    (3/4..4/3, even in the logarithm), a place. The first of ten boxes that fits; if none does, the largest
    of a ratio within the limits, in the middle.
    """
    sides = sides[..., None]                                                         # (B, 2, 1)
    area, ratio = sides.prod(1) * (least + (1 - least) * u[:, :10]), (4 / 3) ** (2 * u[:, 10:20] - 1)
    boxes = torch.stack([area / ratio, area * ratio], 1).sqrt().round()              # (B, 2, 10)
    boxes = torch.cat([boxes, torch.minimum(sides, (sides.flip(1) * 4 / 3).round())], 2)
    first = (boxes <= sides).all(1, True).int().argmax(2, True)                      # (B, 1, 1)
    boxes = boxes.take_along_dim(first, 2)                                           # (B, 2, 1)
    corners = torch.where(first < 10, u[:, 20:22, None] * (sides - boxes + 1), (sides - boxes) / 2).floor()
    return corners[..., 0], boxes[..., 0]

def random_crop(images: Tensor, u: Tensor, sides: Tensor, size: int, least=0.08, bicubic=False) -> Tensor:
    """Random crop (area least..1, ratio 3/4..4/3), then a flip; images (B, 3, S, S) -> (B, 3, size, size).

    u (B, 23) in 0..1: the chance in it, so that a crop can be repeated: of `crop_boxes`, and of the flip.
    sides (B, 2): heights and widths of the pictures before they were squashed, in whose pixels boxes are.
    """
    corners, boxes = crop_boxes(sides, u, least)
    scale, shift = (boxes / sides).flip(1), ((2 * corners + boxes) / sides - 1).flip(1)          # of x, of y
    scale[:, 0] *= torch.where(u[:, 22] < 0.5, -1, 1)                                # flips
    # grid_sample does not average: of large pictures it takes more pixels, which are averaged
    finer = max(1, round(images.shape[-1] / size))
    grid = F.affine_grid(torch.cat([scale.diag_embed(), shift[..., None]], 2),
                         [len(u), 3, finer * size, finer * size], False)
    crops = F.grid_sample(images, grid, "bicubic" if bicubic else "bilinear", "border", align_corners=False)
    return F.avg_pool2d(crops, finer).clamp(0, 1)                                    # bicubic overshoots

def released_view(image: Tensor, view: int, u) -> Tensor:
    """One of the released five views of a picture (3, S, S) uint8; u: five numbers in 0..1, the chance in it.

    0: plain; 1: rotation by -45..45 degrees, jitter by 0.6..1.4 and flip (p = 0.5); 2, 3, 4: one of these.
    """
    if view in (1, 2):
        image = TF.rotate(image, 90 * u[0] - 45)
    if view in (1, 3):
        for adjust, x in zip((TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation), u[1:]):
            image = adjust(image, 0.6 + 0.8 * x)
    return TF.horizontal_flip(image) if view in (1, 4) and u[4] < 0.5 else image

class Batches:
    """The pictures of every training step for E tasks at once, the same whenever a step is asked for.

    batches(number) -> pictures (E, B, 3, size, size) normalised, labels (E, B), and without augmentation
    plain (E, K, 3, size, size), its labels (E, K). All chance is drawn from each task's own seed. In
    mini-batches each epoch has a new order and shows every picture once: its last step may be short.
    recipe: has steps, augment, minibatch, crop_area and bicubic; config: a backbone's image, mean and std.
    """

    def __init__(self, pool: Pool, tasks: list, seeds: list, recipe, config, device="cpu"):
        def uniform(what, *shape):                                                   # (E, *shape) in 0..1
            return torch.stack([torch.rand(shape, generator=generator(what, seed)) for seed in seeds])
        self.recipe, self.config = recipe, config
        support, labels = (torch.stack([task[i] for task in tasks]) for i in (1, 2))             # (E, M)
        images, self.pictures = pool.images[support].to(device), support.shape[1]
        sides = torch.full((*support.shape, 2), images.shape[-1]) if pool.sizes is None \
            else pool.sizes[support]                                                 # (E, M, 2)
        if recipe.augment == "views":
            small, chance = TF.resize(images, config.image), uniform("views", 5, self.pictures, 5).tolist()
            images = torch.stack([torch.stack([
                released_view(image, view, u) for view, row in enumerate(rows) for image, u in zip(own, row)])
                for own, rows in zip(small, chance)])
        whole = images.shape[1]                 # W, of an epoch; with views r is view r // M of picture r % M
        self.shown = min(recipe.minibatch or whole, whole)                           # B, of the largest step
        self.epoch = ceil(whole / self.shown)                                        # steps in it
        order = torch.arange(whole).expand(len(tasks), recipe.steps, -1)             # (E, epochs, W)
        if self.epoch > 1:
            order = uniform("order", ceil(recipe.steps / self.epoch), whole).argsort(-1)
        if recipe.augment == "crop":
            self.crops = uniform("crop", recipe.steps, self.shown, 23).to(device)
        # all is on the device, so that no step waits for the host
        self.images, self.labels, self.sides, self.order = (
            x.to(device) for x in (images, labels.repeat(1, whole // self.pictures), sides, order))
        self.each = torch.arange(len(tasks), device=device)[:, None]

    def __call__(self, number: int) -> tuple:
        r, (epoch, step) = self.recipe, divmod(number, self.epoch)
        rows = self.order[:, epoch, step * self.shown: (step + 1) * self.shown]      # (E, B)
        different = rows[:, : self.pictures if self.epoch == 1 else None] % self.pictures      # (E, K)
        still = plain(self.images[self.each, different], self.config, r.augment == "none")
        images = self.images[self.each, rows] / 255
        if r.augment == "crop":
            u, sides = self.crops[:, number, : rows.shape[1]], self.sides[self.each, rows]
            images = random_crop(*(x.flatten(0, 1) for x in (images, u, sides)), self.config.image,
                                 r.crop_area, r.bicubic).unflatten(0, rows.shape)
        images = still if r.augment == "none" else normalize(images, self.config)
        return images, self.labels.gather(1, rows), still, self.labels.gather(1, different)
