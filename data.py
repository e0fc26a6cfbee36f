"""Datasets as one tensor each, tasks drawn from (seed, number) alone, augmentation in batches.

In this order: what is told, pools and tasks, what is in a folder, the known sets, the one-tensor file,
augmentation, the toy world.

    pool = load("eurosat", "datasets")                      # a name of DATASETS, toy, or a folder
    task = pool.task(0, way=5, shot=1, query=15, seed=1)    # index tensors, and what is true of each
    pool.images[task.support]                               # (5, 3, S, S) uint8

Every picture is decoded once, to S x S (64 for eurosat, 48 for toy, else 256), into a file that later runs
map into memory.
"""
from __future__ import annotations

import csv, hashlib, json, os, shutil, stat, sys, time, warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass
from functools import cache, cached_property, partial
from math import ceil, pi, prod
from pathlib import Path
from posixpath import join                          # a listing's paths are the same on every system
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from torch import Tensor, atan2, hypot, maximum, minimum
from torchvision.datasets import EuroSAT
from torchvision.datasets.folder import is_image_file
from torchvision.datasets.utils import download_and_extract_archive

try:
    import fcntl
except ImportError:                                                      # Windows: see `try_lock`
    fcntl = None

RGB = tuple[float, float, float]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)    # CLIP's, of RGB
# A user id without a name and without HOME keeps "~", so its cache is where the run is: .cache/atha
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache").removeprefix("~/")) / "atha"
# What pictures' endings mean, and GIF, as some of Oxford's pets named .jpg are: none needs another program
FORMATS = "JPEG PNG PPM BMP TIFF WEBP GIF".split()
warnings.filterwarnings("ignore", module=r"PIL\.")  # advice about palettes is not for our user


class DataError(Exception):
    """Pictures or labels that cannot be had or used; the message is one line for the user."""


def digest(*what: object) -> str:
    """16 hexadecimal digits that stand for values, the same in every process."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def generator(*key: object) -> torch.Generator:
    """A random generator that depends on the key alone."""
    return torch.Generator().manual_seed(int(digest(*key)[:14], 16))


def printable(text: object) -> str:
    """The text with control characters and bytes that are not UTF-8 escaped, as file names may hold them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def progress(text: str, last: bool = True) -> None:
    """One line on stderr; on a terminal all but the last are cut to its width and written over by the next.

    It never raises: a run does not end because nobody can hear how far it is.
    """
    text, stream = printable(text), sys.stderr
    with suppress(AttributeError, OSError, ValueError):                  # None, full, closed
        if stream.isatty():
            width = os.get_terminal_size(stream.fileno()).columns or 80
            text = "\r\x1b[K" + (f"{text}\n" if last else text[: width - 1])
        else:
            text += "\n"
        stream.write(text)                                               # what it cannot encode, it escapes
        stream.flush()


say_once = cache(progress)


class Clock:
    """Tells how far a piece of work is, the time left first: at once where nothing is done yet (nobody knows
    how long the first part takes), then after a second and ever less often, to every ten.

    What is done in threads comes together, the first after the time of one, from which no rest can be told:
    only from a fiftieth of all, or ten seconds.
    """

    def __init__(self, what: str, total: float):
        self.what, self.total, self.begun = what, total, time.monotonic()
        self.said = self.begun

    def tell(self, done: float, text: str, last: bool = False) -> None:
        """done: of the total; text: what is known by now; last: the line that stays."""
        now = time.monotonic()
        took = now - self.begun
        if last:
            progress(f"{self.what}: {text}, {took:.0f} s")
        elif not done:
            progress(f"{self.what}: {text}", last=False)
        elif (50 * done >= self.total or took > 10) and now - self.said > min(10, max(1, took / 20)):
            self.said = now
            left = took / done * max(0, self.total - done)     # the last pass may be longer than what is left
            progress(f"{left:.0f} s left, {text}, {self.what}", last=False)


def told(things: Iterable, total: int, what: str) -> Iterator:
    """The things one by one, telling how far they are; if that was worth telling, also how long it took."""
    clock = Clock(what, total)
    for done, thing in enumerate(things, 1):
        yield thing
        clock.tell(done, f"{done} of {total}", last=done == total and clock.said > clock.begun)


@contextmanager
def refusing(what: str, *errors: type[Exception]) -> Iterator[None]:
    """Such errors within (if none are named OSError and ValueError) become a DataError: what and why."""
    try:
        yield
    except (errors or (OSError, ValueError)) as e:
        why = getattr(e, "strerror", None) or str(e) or type(e).__name__         # without the path again
        raise DataError(f"{what}: {why}") from e


# -------------------------------------------------------------------------------------------- pools and tasks

class Task(NamedTuple):
    """Rows of a pool to learn from and to be tested on, and what is true of each: all int64."""
    classes: Tensor     # (N,) labels of the pool, in the task's order
    support: Tensor     # (M,) rows
    labels: Tensor      # (M,) 0..N-1, places in classes
    query: Tensor       # (Q,) rows
    truth: Tensor       # (Q,) 0..N-1


@dataclass
class Pool:
    """A dataset. images (N, 3, S, S) uint8, perhaps a mapped file: not to be written to; labels (N,) int64.

    classes: one name a label; fingerprint: changes with the pictures' names, sizes and labels. With a split
    of its own: test and train, its rows (there may be others), and prompt, its few-shot protocol's.
    """
    images: Tensor
    labels: Tensor
    classes: list[str]
    fingerprint: str
    prompt: str | None = None
    test: Tensor | None = None
    train: Tensor | None = None

    def by_class(self, rows: Tensor) -> list[Tensor]:
        """Rows (n,) sorted into one tensor a class."""
        labels = self.labels[rows]
        return [rows[labels == label] for label in range(len(self.classes))]

    @cached_property
    def everything(self) -> list[Tensor]:
        """Rows of each class."""
        return self.by_class(torch.arange(len(self.labels)))

    @cached_property
    def rows(self) -> list[Tensor]:
        """Rows of each class that may be learned from: of the training split where there is one."""
        return self.everything if self.train is None else self.by_class(self.train)

    def episode(self, number: int, way: int = 5, shot: int = 1, query: int = 15, seed: int = 1,
                ) -> tuple[Tensor, Tensor, Tensor]:
        """Episode `number` of a seed: classes (way,), support rows (way, shot), queries (way, query).

        Drawn from all pictures, whatever their split. Raises DataError when there are too few classes, or too
        few pictures in one.
        """
        if way > len(self.classes):
            raise DataError(f"{way} classes asked (way), the dataset has {len(self.classes)}")
        for name, rows in zip(self.classes, self.everything):
            if len(rows) < shot + query:
                raise DataError(f"class {name!r} has {len(rows)} pictures, "
                                f"{shot} + {query} = {shot + query} (shot + query) are needed")
        g = generator("episode", seed, number)
        classes = torch.randperm(len(self.classes), generator=g)[:way]
        members = [self.everything[label] for label in classes]
        orders = [torch.randperm(len(rows), generator=g)[: shot + query] for rows in members]
        drawn = torch.stack([rows[order] for rows, order in zip(members, orders)])
        return classes, drawn[:, :shot], drawn[:, shot:]

    def task(self, number: int, way: int, shot: int, query: int, seed: int) -> Task:
        """The same episode as a task, grouped by class."""
        classes, support, queries = self.episode(number, way, shot, query, seed)
        labels = torch.arange(way)
        return Task(classes, support.flatten(), labels.repeat_interleave(shot),
                    queries.flatten(), labels.repeat_interleave(query))

    def split(self, shot: int, seed: int) -> Task:
        """All classes, `shot` pictures of each from the training split, the whole test split as queries.

        A class with fewer is drawn from with replacement, which is said once; else a seed's pictures at few
        shots are among those at more. Raises DataError without a split, or for a class without pictures.
        """
        if self.test is None:
            raise DataError(NO_SPLIT)
        support = []
        for label, rows in enumerate(self.rows):
            g, n, name = generator("split", seed, label), len(rows), self.classes[label]
            if not n:
                raise DataError(f"class {name!r} has no picture in the training split")
            if n < shot:
                say_once(f"class {name!r} has {n} pictures to learn from, not {shot}: drawn with replacement")
                order = torch.randint(n, (shot,), generator=g)
            else:
                order = torch.randperm(n, generator=g)[:shot]
            support.append(rows[order])
        classes = torch.arange(len(self.classes))
        labels = classes.repeat_interleave(shot)
        return Task(classes, torch.cat(support), labels, self.test, self.labels[self.test])


# ------------------------------------------------------------------------------ what is in a dataset's folder

class Found(NamedTuple):
    """What a lister finds in a folder: rows, their classes, and what it read, for messages."""
    rows: list[tuple[str, str, str]]    # "train", "test" or ""; picture, as a path below the folder; class
    classes: list[str]                  # in the order of the labels; those without pictures get none
    source: Path


def listed(found: Found) -> tuple[list[str], list[int], list[str], dict[str, Tensor]]:
    """What was found: pictures, each once, their labels, the classes, and the rows of "train" and "test".

    Raises DataError where that cannot be, whatever the lister.
    """
    rows, classes, source = found
    class_of, part_of, known = {}, {}, set(classes)
    if len(known) < len(classes):
        raise DataError(f"{source} gives two labels one name")
    for part, picture, name in rows:
        if os.path.isabs(picture) or ".." in picture.split("/"):
            raise DataError(f"{source} lists {picture!r}, which is outside its folder")
        if not name or name not in known:
            raise DataError(f"{source}: {picture!r} is of {name!r}, which is none of its classes")
        if class_of.setdefault(picture, name) != name:
            raise DataError(f"{source} has {picture!r} as {class_of[picture]!r} and as {name!r}")
        if part and part_of.setdefault(picture, part) != part:
            raise DataError(f"{source} has {picture!r} in train and in test: it would be tested by heart")
    if not rows or len(set(part_of.values())) == 1:
        raise DataError(f"{source} lists no pictures{' of train or of test' if rows else ''}")
    classes = sorted(set(class_of.values()), key=classes.index)          # those with pictures
    with refusing(f"{source}: no text can be made of a class name, which is not UTF-8"):
        "".join(classes).encode()
    label_of = {name: label for label, name in enumerate(classes)}
    row_of = {picture: row for row, picture in enumerate(class_of)}
    split = {part: torch.tensor([row_of[picture] for picture in part_of if part_of[picture] == part])
             for part in set(part_of.values())}
    return list(class_of), [label_of[name] for name in class_of.values()], classes, split


def ordinary(path: str | Path) -> os.stat_result:
    """Size and time of an ordinary file. Raises DataError for all else: a pipe would be waited for."""
    with refusing(f"cannot read {path}"):
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not an ordinary file")
    return status


def read_text(path: Path) -> str:
    """An ordinary file of UTF-8. Raises DataError."""
    ordinary(path)
    with refusing(f"cannot read {path}"):
        return path.read_text(encoding="utf-8-sig")


def read_table(table: Path, columns: list[str]) -> list[dict[str, str | None]]:
    """Rows of a CSV file that must have some columns; a short row's last fields are None."""
    with refusing(f"cannot read {table}", csv.Error):
        reader = csv.DictReader(read_text(table).splitlines(keepends=True))
        if missing := [c for c in columns if c not in (reader.fieldnames or [])]:
            raise DataError(f"{table} has no column {missing[0]!r}")
        return list(reader)


def visible(folder: Path) -> list[list[str]]:
    """Names of the folders and of the files in a folder, but for hidden ones; sorted."""
    def stop(error: OSError) -> None:                                    # left alone, walk would pass over it
        raise error
    with refusing(f"cannot look into {folder}"):
        _, *both = next(os.walk(folder, onerror=stop))
    return [sorted(name for name in names if not name.startswith(".")) for names in both]


def say_no_pictures(endings: Counter) -> None:
    """endings: of files that are not taken for pictures."""
    counts = ", ".join(f"{n} {ending}" for ending, n in endings.most_common(5))
    progress(f"left out, as these endings are none of pictures that are read here: {counts}")


def list_folders(root: Path, under: str = "", names: dict[str, str] = {}) -> Found:
    """Class folders, each called as in names; or train/ and test/ (else val/) that hold them: the split.

    What is left out is told.
    """
    test = "test" if os.path.isdir(root / under / "test") else "val"
    parts = {join(under, "train"): "train", join(under, test): "test"}
    if not all(os.path.isdir(root / place) and visible(root / place)[0] for place in parts):
        parts = {under: ""}
    rows, left, endings = [], [], Counter()
    for place, part in parts.items():
        folders, files = visible(root / place)
        left += [f for f in files if is_image_file(f) or not (root / place / f).exists()]
        for folder in folders:
            deeper, files = visible(root / place / folder)
            pictures = [f for f in files if is_image_file(f)]
            rows += [(part, join(place, folder, f), names.get(folder, folder)) for f in pictures]
            left += [join(folder, name) for name in deeper] if pictures else [folder]
            endings.update(os.path.splitext(f)[1] or f for f in files if not is_image_file(f))
    if endings:
        say_no_pictures(endings)
    if not rows:
        bare = sum(map(is_image_file, left))
        hint = f": {bare} pictures lie in it, but each class needs a folder of its own" if bare else ""
        raise DataError(f"no class folders with pictures in {root / under}{hint}")
    if left:
        more = f" and {len(left) - 9} more" if len(left) > 9 else ""
        progress(f"left out, without pictures or not right in a class folder: {', '.join(left[:9])}{more}")
    return Found(rows, list(dict.fromkeys(name for _, _, name in rows)), root / under)


def list_imagenet(root: Path) -> Found:
    """Folders n01440764, ... in train/ and val/; classnames.txt has lines of such a name and its words."""
    table = root / "classnames.txt"
    words = {}
    for folder, _, name in (line.partition(" ") for line in read_text(table).splitlines()):
        words[folder] = f"{name} {folder}" if name in words.values() else name       # two are "sunglasses"
    return Found(list_folders(root, names=words).rows, list(words.values()), table)


def list_aircraft(root: Path) -> Found:
    """Lists of FGVC-Aircraft: a picture's name, a space, its variant."""
    rows, variants = [], root / "variants.txt"
    for part in ("train", "test"):
        for line in read_text(root / f"images_variant_{part}.txt").splitlines():
            picture, _, variant = line.partition(" ")
            rows.append((part, f"images/{picture}.jpg", variant))
    return Found(rows, read_text(variants).splitlines(), variants)


def list_split(root: Path, split: str, pictures: str) -> Found:
    """CoOp's splits: {"train": [[picture, label, class name], ...], "test": ...}; its val is left out."""
    source, names, rows = root / split, {}, []
    try:
        parts = json.loads(read_text(source))
        for part in ("train", "test"):
            for picture, label, name in parts[part]:
                if type(label) is not int or type(name) is not str:
                    raise TypeError
                if names.setdefault(label, name) != name:
                    raise DataError(f"{source} gives label {label} two names, {names[label]!r} and {name!r}")
                rows.append((part, join(pictures, picture), name))
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise DataError(f"{source} does not hold train and test lists of [picture, label, class name]") from e
    if strange := names.keys() - range(len(names)):
        raise DataError(f"{source}: {len(names)} labels are not 0 to {len(names) - 1}: one is {min(strange)}")
    return Found(rows, [names[label] for label in range(len(names))], source)


EUROSAT = {"AnnualCrop": "Annual Crop Land", "HerbaceousVegetation": "Herbaceous Vegetation Land",
           "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
           "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings",
           "SeaLake": "Sea or Lake"}
EUROSAT_SPLIT = "split_zhou_EuroSAT.json"
ISIC = {"MEL": "Melanoma", "NV": "Melanocytic Nevus", "BCC": "Basal Cell Carcinoma",
        "AKIEC": "Actinic Keratosis", "BKL": "Benign Keratosis", "DF": "Dermatofibroma",
        "VASC": "Vascular Lesion"}
CHESTX = "Atelectasis|Cardiomegaly|Effusion|Infiltration|Mass|Nodule|Pneumothorax".split("|")
OTHERS = "No Finding|Consolidation|Edema|Emphysema|Fibrosis|Hernia|Pleural_Thickening|Pneumonia".split("|")


def list_eurosat(root: Path) -> Found:
    """All class folders, in their order, for episodes; where CoOp's split is beside them, its parts too."""
    found = list_folders(root, "2750", EUROSAT)
    if not os.path.exists(root / EUROSAT_SPLIT):
        return found
    rows, _, source = list_split(root, EUROSAT_SPLIT, "2750")
    rows = [(part, picture, EUROSAT.get(name, name)) for part, picture, name in rows]
    return Found(found.rows + rows, found.classes, source)


def list_isic(root: Path) -> Found:
    table = root / "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv"
    rows = []
    for row in read_table(table, ["image", *ISIC]):
        found = [key for key in ISIC if row[key] in ("1", "1.0")]
        if len(found) != 1:
            raise DataError(f"{table}: {row['image']} has {len(found)} of the seven labels, expected one")
        rows.append(("", f"ISIC2018_Task3_Training_Input/{row['image']}.jpg", ISIC[found[0]]))
    return Found(rows, list(ISIC.values()), table)


def list_chestx(root: Path) -> Found:
    """Only pictures with exactly one finding, of the seven."""
    table, rows = root / "Data_Entry_2017.csv", []
    where = {p.name: p.relative_to(root).as_posix()
             for part in ("images", "images_*/images") for p in root.glob(f"{part}/*.png")}
    for row in read_table(table, ["Image Index", "Finding Labels"]):
        picture, findings = row["Image Index"], row["Finding Labels"] or ""
        if unknown := set(findings.split("|")) - {*CHESTX, *OTHERS}:
            raise DataError(f"{table}: {picture} has an unknown finding {min(unknown)!r}")
        if findings in CHESTX:
            rows.append(("", where.get(picture, join("images", picture)), findings))
    return Found(rows, CHESTX, table)


# --------------------------------------------------------------------------------------------- the known sets

def fetch_isic(target: Path) -> None:
    progress("ISIC 2018 task 3: 2.6 GB, licence CC BY-NC (no commercial use)")
    for part in ("Input", "GroundTruth"):
        url = f"https://isic-challenge-data.s3.amazonaws.com/2018/ISIC2018_Task3_Training_{part}.zip"
        progress(f"downloading {url}")
        download_and_extract_archive(url, target, remove_finished=True)


class Dataset(NamedTuple):
    """A known set: its folder under --data, how to list that, what must be in it, where people get it."""
    folder: str
    list: Callable[[Path], Found]
    needs: tuple[str, ...] = ()
    source: str = ""
    fetch: Callable[[Path], object] | None = None
    size: int = 256                     # pixels a side that are kept
    prompt: str | None = None           # of the few-shot protocol, if it has a test split
    split: str = ""                     # a file that is needed for the split alone


COOP = "DATASETS.md in github.com/KaiyangZhou/CoOp"
NO_SPLIT = ("this dataset has no split of its own: it takes train/ and test/ (or val/) with class folders, "
            f"or for a known set its split_zhou_<Name>.json ({COOP})")
KAGGLE = "curl -L -o a.zip https://www.kaggle.com/api/v1/datasets/download/"
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"


def coop_set(folder: str, split: str, pictures: str, prompt: str, source: str) -> Dataset:
    """A set whose split is CoOp's file split_zhou_<split>.json, with the folder that its paths begin in."""
    split = f"split_zhou_{split}.json"
    return Dataset(folder, partial(list_split, split=split, pictures=pictures), (split, pictures),
                   f"the pictures from {source}, the split from {COOP}", prompt=prompt)


DATASETS = {
    "eurosat": Dataset("eurosat", list_eurosat, ("2750",), "the pictures from https://github.com/phelber/"
                       f"EuroSAT (a run without the split fetches them), the split from {COOP}",
                       fetch=lambda target: EuroSAT(target.parent, download=True), split=EUROSAT_SPLIT,
                       size=64, prompt="a centered satellite photo of {}."),
    "isic": Dataset("ISIC", list_isic, ("ISIC2018_Task3_Training_GroundTruth",),
                    "https://challenge.isic-archive.com/data", fetch=fetch_isic),
    "cropdiseases": Dataset("CropDiseases", partial(list_folders, under="train"), ("train",),
                            f"{KAGGLE}saroz014/plant-disease, its class folders in CropDiseases/train/"),
    "chestx": Dataset("ChestX", list_chestx, ("Data_Entry_2017.csv",),
                      f"{KAGGLE}nih-chest-xrays/data (42 GB), with Data_Entry_2017.csv and images/ or "
                      "images_0NN/images/ in ChestX/"),
    "imagenet": Dataset("imagenet", list_imagenet, ("classnames.txt", "train", "val"),
                        "the class folders train/ and val/ from https://image-net.org, "
                        f"classnames.txt from {COOP}", prompt="itap of a {}."),
    "aircraft": Dataset("fgvc_aircraft", list_aircraft, ("variants.txt", "images_variant_train.txt",
                        "images_variant_test.txt", "images"), f"{OXFORD}fgvc-aircraft/ (its data/ folder)",
                        prompt="a photo of a {}, a type of aircraft."),
    "sun397": coop_set("SUN397", "SUN397", "SUN397", "a photo of a {}.",
                       "https://vision.princeton.edu/projects/2010/SUN/"),
    "cars": coop_set("StanfordCars", "StanfordCars", "", "a photo of a {}.",
                     "https://ai.stanford.edu/~jkrause/cars/car_dataset.html"),
    "food101": coop_set("Food101", "Food101", "images", "a photo of {}, a type of food.",
                        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/"),
    "pets": coop_set("OxfordPets", "OxfordPets", "images", "a photo of a {}, a type of pet.",
                     f"{OXFORD}pets/"),
    "flowers": coop_set("Flower102", "OxfordFlowers", "jpg", "a photo of a {}, a type of flower.",
                        f"{OXFORD}flowers/102/"),
    "caltech101": coop_set("Caltech101", "Caltech101", "101_ObjectCategories", "a photo of a {}.",
                           "https://data.caltech.edu/records/mzrjq-6wc02"),
    "dtd": coop_set("DTD", "DescribableTextures", "images", "{} texture.", f"{OXFORD}dtd/"),
    "ucf101": coop_set("UCF101", "UCF101", "UCF-101-midframes", "a photo of a person doing {}.", COOP),
}
PAPERS = "eurosat isic cropdiseases chestx".split()                      # the three papers' targets
FSL = "imagenet sun397 aircraft eurosat cars food101 pets flowers caltech101 dtd ucf101".split()


def check(name: str, root: str | Path = "datasets", split: bool = False) -> None:
    """Raises DataError where `load` (or `Pool.split`, if wanted) is sure to: before anything is fetched."""
    known = DATASETS.get(name)
    if not known and name != "toy" and not os.path.isdir(name):
        raise DataError(f"unknown dataset {name!r}: choose from {', '.join(DATASETS)}, toy, or give a folder")
    if split and (name == "toy" or known and not known.prompt):
        raise DataError(NO_SPLIT)
    # what is not there at all can be fetched, but no split is
    if known and (split or not known.fetch or os.path.isdir(Path(root) / known.folder)):
        for path in (*known.needs, known.split if split else ""):
            place = Path(root) / known.folder / path
            if not place.exists():
                raise DataError(f"{name} needs {place}, which is not there; get {known.source}")


def load(name: str, root: str | Path = "datasets") -> Pool:
    """The dataset called `name` under root, fetched at need; or "toy"; or the folder at the path `name`.

    Raises DataError: unknown name, nothing there, no network, a picture that cannot be decoded, a bad table.
    """
    check(name, root)
    if name == "toy":
        return Pool(*toy_pictures(200), TOY_CLASSES, "toy")
    if name not in DATASETS:
        return load_folder(name)
    known, folder = DATASETS[name], Path(root) / DATASETS[name].folder
    if not folder.is_dir():
        fetch(name, folder)
    return decoded(folder, known, [folder / f".{name}-{known.size}.u8"])


def load_folder(path: str | Path) -> Pool:
    """A folder of class folders, or of train/ and test/ (or val/) that hold them. Raises DataError."""
    return decoded(Path(path), Dataset("", list_folders), [])


def try_lock(file) -> bool:
    """Whether this process now is the one that writes an open file; without locks here, it always is."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (AttributeError, OSError):                                # no fcntl; a file system without locks
        pass
    return True


@contextmanager
def made_once(target: Path) -> Iterator[Path]:
    """Where to make a file or folder, which then takes the target's place: it is there whole or not at all.

    One process at a time, so that the second finds the work done. Without locks both do it: no harm.
    """
    part = target.with_name(f".{target.name.removeprefix('.')}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{part}.lock", "a+") as lock:
        if not try_lock(lock):
            progress(f"waiting for another run that is busy with {target.parent}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(part, ignore_errors=True)                          # of a run that was killed
        part.mkdir()
        try:
            yield part / target.name
            with suppress(FileNotFoundError):                            # where nothing was left to make
                os.replace(part / target.name, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def fetch(name: str, folder: Path) -> None:
    """Download a dataset. Raises DataError."""
    try:
        with made_once(folder) as target:
            if not folder.is_dir():
                progress(f"{name} is not at {folder}: downloading it")
                DATASETS[name].fetch(target)
    except Exception as e:                                   # of files, sockets, HTTP, zip, zlib: all sorts
        raise DataError(f"cannot download {name} ({e}): fetch it on another machine and put it at {folder}, "
                        f"so that there is {folder / DATASETS[name].needs[0]}") from e


# ---------------------------------------------------------------------------------------- the one-tensor file

def decode(path: str | Path, size: int) -> Tensor:
    """Any picture of FORMATS, upright, as (3, size, size) uint8 RGB. Raises DataError naming the file."""
    ordinary(path)
    # Pillow's readers raise all sorts: struct.error, KeyError
    with refusing(f"cannot decode {path}", Exception), Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:         # Pillow only warns up to twice that
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode == "I" and not 0 <= image.getextrema()[1] < 2 ** 16:
            raise ValueError("nothing tells how bright its numbers are: keep it with 8 or 16 bits a channel")
        if image.mode.startswith("I"):              # 16 bits a pixel: Pillow's own conversion would clip
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        return TF.pil_to_tensor(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def decoded(folder: Path, known: Dataset, places: list[Path]) -> Pool:
    """The dataset in a folder, its pictures kept in the first of `places` that can be written, or CACHE."""
    found, size = known.list(folder), known.size
    pictures, labels, classes, split = listed(found)
    paths = [os.path.join(folder, picture) for picture in pictures]
    with refusing(str(found.source), DataError):
        stats = [ordinary(path) for path in told(paths, len(paths), "looking for pictures")]
    sizes = [s.st_size for s in stats]
    fingerprint = digest(pictures, sizes, [s.st_mtime_ns for s in stats], size)
    cache = CACHE / f"{digest(os.fsencode(folder.resolve()))}-{size}.u8"
    images = keep(paths, size, fingerprint, [*places, cache])
    name = digest(pictures, sizes, labels, classes, size)
    return Pool(images, torch.tensor(labels), classes, name, known.prompt, **split)


def keep(paths: list[str], size: int, fingerprint: str, places: list[Path]) -> Tensor:
    """The pictures from the first place that holds them, else decoded into the first that can be written."""
    shape = len(paths), 3, size, size
    for place in places:
        if (images := mapped(place, shape, fingerprint)) is not None:
            return images
    for place in places:
        try:
            with made_once(place) as target:
                if mapped(place, shape, fingerprint) is None:
                    decode_all(paths, size, target, fingerprint)
            if (images := mapped(place, shape, fingerprint)) is None:
                raise OSError("they cannot be mapped into memory there")
            return images
        except OSError as e:
            said = (f"cannot keep decoded pictures ({prod(shape) / 1e9:.1f} GB) in {place.parent}: "
                    f"{e.strerror or e}")
            if place == places[-1]:
                raise DataError(f"{said}; XDG_CACHE_HOME names another place") from e
            progress(f"{said}; they go to {places[-1].parent}")


def mapped(place: Path, shape: tuple[int, ...], fingerprint: str) -> Tensor | None:
    """A file of pictures, read as they are indexed; None if there is none, or it is cut or of other pictures.

    The fingerprint stands behind the pictures: what is mapped begins with them.
    """
    length = prod(shape) + len(fingerprint)
    with suppress(OSError, DataError, RuntimeError):
        if ordinary(place).st_size == length:
            shared = os.access(place, os.W_OK)              # where it can be: a private map counts as memory
            file = torch.from_file(str(place), shared=shared, size=length, dtype=torch.uint8)
            if bytes(file[prod(shape):]) == fingerprint.encode():
                return file[: prod(shape)].view(shape)
    return None


def decode_all(paths: list[str], size: int, place: Path, fingerprint: str) -> None:
    """Decode by threads (Pillow lets go of Python's lock) and write in order, the fingerprint last.

    Raises DataError naming the pictures that cannot be decoded.
    """
    def attempt(path: str) -> Tensor | DataError:
        try:
            return decode(path, size)
        except DataError as e:
            return e
    pool, broken = ThreadPoolExecutor(), []
    pictures = (picture for start in range(0, len(paths), 256)      # a few hundred at a time bound the memory
                for picture in pool.map(attempt, paths[start: start + 256]))
    progress(f"decoding {len(paths)} pictures")
    try:
        with open(place, "wb") as file:
            for picture in told(pictures, len(paths), "decoding pictures"):
                if isinstance(picture, DataError):
                    broken.append(str(picture))
                elif not broken:
                    file.write(picture.numpy().tobytes())
            file.write(fingerprint.encode())
        if broken:
            more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
            raise DataError("; ".join(broken[:5]) + more)
    finally:
        pool.shutdown(cancel_futures=True)                               # waits only for the pictures in hand


# ----------------------------------------------------------------------------------------------- augmentation

@cache
def of_channels(values: RGB, device: torch.device) -> Tensor:
    """(3, 1, 1), copied to the device once: a copy in every step would make the host wait for the GPU."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def normalize(images: Tensor, mean: RGB = MEAN, std: RGB = STD) -> Tensor:
    """(..., 3, S, S) in 0..1 -> normalised by a backbone's mean and std."""
    return (images - of_channels(tuple(mean), images.device)) / of_channels(tuple(std), images.device)


def resize(images: Tensor, size: int) -> Tensor:
    """(..., 3, S, S) uint8 -> (..., 3, size, size) float in 0..1, antialiased."""
    return TF.resize(images / 255, [size, size])


def plain(images: Tensor, size: int, centre: bool = False, mean: RGB = MEAN,
          std: RGB = STD) -> Tensor:
    """(..., 3, S, S) uint8 -> (..., 3, size, size) normalised; centre: of 257/224 the size, cropped."""
    whole = round(size * 257 / 224) if centre else size
    inside = slice((whole - size) // 2, (whole - size) // 2 + size)
    return normalize(resize(images, whole)[..., inside, inside], mean, std)


def warp(images: Tensor, maps: Sequence[Tensor], size: int, padding: str, mode: str = "bilinear") -> Tensor:
    """Each image of (..., 3, S, S) through its own affine map -> (..., 3, size, size); maps: six of (...)."""
    flat, matrices = images.flatten(0, -4), torch.stack(maps, -1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, (len(flat), 3, size, size), align_corners=False)
    turned = F.grid_sample(flat, grid, mode=mode, padding_mode=padding, align_corners=False)
    return turned.view(*images.shape[:-2], size, size)


def random_crop(images: Tensor, u: Tensor, size: int, least: float = 0.5, bicubic: bool = False) -> Tensor:
    """Random crop (area least..1, ratio 3/4..4/3) and flip; images (..., 3, S, S) and u (..., 5) in 0..1.

    u: the chance in it, for area, ratio, x, y and flip, so that a crop can be repeated.
    """
    area, ratio = least + (1 - least) * u[..., 0], (4 / 3) ** (2 * u[..., 1] - 1)
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = (2 * u[..., 2] - 1) * (1 - width), (2 * u[..., 3] - 1) * (1 - height)
    zero, flip = torch.zeros_like(x), torch.where(u[..., 4] < 0.5, -1.0, 1.0)
    mode = "bicubic" if bicubic else "bilinear"
    crop = warp(images, (flip * width, zero, x, zero, height, y), size, padding="border", mode=mode)
    return crop.clamp(0, 1) if bicubic else crop                         # bicubic overshoots at edges


def jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, colour of (..., 3, S, S) in 0..1, by factors (..., 3)."""
    def grey(x: Tensor) -> Tensor:
        return (x * of_channels((0.299, 0.587, 0.114), x.device)).sum(-3, keepdim=True)
    brightness, contrast, colour = factors[..., None, None, None].unbind(-4)
    images = (images * brightness).clamp(0, 1)
    mean = grey(images).mean((-2, -1), keepdim=True)
    images = (mean + contrast * (images - mean)).clamp(0, 1)
    return (grey(images) + colour * (images - grey(images))).clamp(0, 1)


def five_views(images: Tensor, u: Tensor) -> Tensor:
    """The released five views, in 0..1: plain; rotation, jitter and flip; rotation; jitter; flip.

    (E, M, ...) -> (E, 5 M, ...): all pictures in the first view, then in the next. u (E, M, 8) uniform in
    0..1: two angles (-45..45 degrees), twice three jitter factors (0.6..1.4). Flips are certain.
    """
    def turned(angle: Tensor, flip: float) -> Tensor:
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        maps = (flip * cos, -sin, zero, flip * sin, cos, zero)
        return warp(images, maps, images.shape[-1], padding="zeros")
    angles, factors = (u[..., :2] - 0.5) * pi / 2, 0.6 + 0.8 * u[..., 2:]
    all_three = jitter(turned(angles[..., 0], -1.0), factors[..., :3])
    return torch.cat([images, all_three, turned(angles[..., 1], 1.0), jitter(images, factors[..., 3:]),
                      images.flip(-1)], 1)


def once(make: Callable) -> Callable:
    """A method of Batches whose result is kept until another step is asked for; full batches are all one."""
    def kept(self: Batches, step: int) -> Tensor:
        if self.mini and step != self.step:
            self.step, self.made = step, {}
        if make not in self.made:
            self.made[make] = make(self, step)
        return self.made[make]
    return kept


@dataclass(eq=False)
class Batches:
    """The pictures of each training step, for E tasks at once, the same whenever a step is asked for.

    All chance is drawn from each task's own seed. A full batch is made once, mini-batches step by step.
    """
    images: Tensor                      # (N, 3, S, S) uint8, a pool's
    support: Tensor                     # (E, M) rows of it
    labels: Tensor                      # (E, M) int64
    _: KW_ONLY
    size: int                           # pixels a side
    steps: int
    seeds: Sequence[object]             # E keys
    augment: str = "crop"               # none, crop or views (see Recipe)
    minibatch: int = 0                  # pictures a step, shuffled anew in each epoch; 0: all
    area: float = 0.5                   # of the smallest crop
    bicubic: bool = False               # the crop's interpolation
    mean: RGB = MEAN
    std: RGB = STD
    device: torch.device | str = "cpu"
    told: Callable[[int], object] = int # hears of every step asked for; int: nobody does

    def __post_init__(self):
        tasks, self.pictures = self.support.shape                        # E, M
        self.shown = self.pictures * (5 if self.augment == "views" else 1)       # in an epoch
        self.batch = min(self.minibatch or self.shown, self.shown)       # B
        self.mini = self.batch < self.shown
        self.different = self.batch if self.mini else self.pictures      # K
        if self.mini:
            epochs = ceil(self.steps * self.batch / self.shown)
            order = self.uniform("order", epochs, self.shown).argsort(-1).flatten(1)
            order = order[:, : self.steps * self.batch].view(tasks, self.steps, self.batch)
        else:
            order = torch.arange(self.shown).expand(tasks, 1, -1)
        task, picture = torch.arange(tasks)[:, None, None], order % self.pictures
        places, truth = self.support[task, picture], self.labels[task, picture].to(self.device)
        # (E, steps, B) each; what all steps of a full batch share is in memory once
        self.order, self.places, self.truth = (x.expand(-1, self.steps, -1)
                                               for x in (order.to(self.device), places, truth))
        self.step, self.made = 0, {}    # see `once`
        self.coming, self.background = (None, None), ThreadPoolExecutor(1)       # see `taken`

    def uniform(self, what: str, *shape: int) -> Tensor:
        """(E, *shape) in 0..1."""
        return torch.stack([torch.rand(shape, generator=generator(what, seed)) for seed in self.seeds])

    @cached_property
    def turns(self) -> Tensor:
        """(E, M, 8) in 0..1: the chance in each picture's views."""
        return self.uniform("views", self.pictures, 8).to(self.device)

    @cached_property
    def crops(self) -> Tensor:
        """(E, steps, B, 5) in 0..1: the chance in each crop. Every step draws for all that an epoch shows."""
        drawn = torch.empty(len(self.seeds), self.steps, self.batch, 5)
        for task, seed in enumerate(self.seeds):
            stream = generator("crop", seed)
            for step in range(self.steps):
                drawn[task, step] = torch.rand(self.shown, 5, generator=stream)[: self.batch]
        return drawn.to(self.device)

    def rows(self, step: int) -> Tensor:
        """(E, B) int64: which of all that is shown the step shows; row r is view r // M of picture r % M."""
        return self.order[:, step]

    def read(self, step: int) -> Tensor:
        """The step's pictures without views (E, K, 3, S, S) uint8, off the mapped file."""
        pictures = self.images[self.places[:, step, : self.different]]
        return pictures.pin_memory() if torch.device(self.device).type == "cuda" else pictures

    @once
    def taken(self, step: int) -> Tensor:
        """The same on the device; of mini-batches a thread reads the next one while this one is used."""
        number, coming = self.coming
        pictures = coming.result() if number == step else self.read(step)
        if self.mini and step + 1 < self.steps:
            self.coming = step + 1, self.background.submit(self.read, step + 1)
        return pictures.to(self.device, non_blocking=True)

    @once
    def still(self, step: int) -> Tensor:
        """Without augmentation, (E, K, 3, size, size)."""
        return plain(self.taken(step), self.size, self.augment == "none", self.mean, self.std)

    @once
    def prepared(self, step: int) -> Tensor:
        """The step's pictures (E, B, 3, s, s), but for the crop, which differs in every step."""
        if self.augment == "none":
            return self.still(step)
        pictures = self.taken(step)
        if self.augment == "crop":
            # grid_sample does not average: shrink first, until the smallest crop has about `size` pixels
            return resize(pictures, min(pictures.shape[-1], ceil(self.size * self.area ** -0.5)))
        rows = self.rows(step)
        task = torch.arange(len(rows), device=self.device)[:, None]
        turns = self.turns[task, rows[:, : self.different] % self.pictures]
        views = normalize(five_views(resize(pictures, self.size), turns), self.mean, self.std)
        if not self.mini:
            return views
        return views[task, rows // self.pictures * self.batch + torch.arange(self.batch, device=self.device)]

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Pictures (E, B, 3, size, size), normalised, and labels (E, B)."""
        self.told(step)
        pictures = self.prepared(step)
        if self.augment == "crop":
            pictures = random_crop(pictures, self.crops[:, step], self.size, self.area, self.bicubic)
            pictures = normalize(pictures, self.mean, self.std)
        return pictures, self.truth[:, step]

    def plain(self, step: int) -> tuple[Tensor, Tensor]:
        """Without augmentation: pictures (E, K, 3, size, size), labels (E, K); all M of a full batch."""
        return self.still(step), self.truth[:, step, : self.different]


# ---------------------------------------------------------------------------------------------- the toy world

def _fold(x: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Turn each point by a multiple of 1/n of a circle to within 180/n degrees of the x axis; y >= 0."""
    angle = torch.remainder(atan2(y, x) + pi / n, 2 * pi / n) - pi / n
    return hypot(x, y) * angle.cos(), hypot(x, y) * angle.sin().abs()


def _box(x: Tensor, y: Tensor, width: float = 0.85, height: float = 0.85) -> Tensor:
    return maximum(x.abs() - width, y.abs() - height)


# How far a point is outside a shape of radius about 1 (negative: inside), to first order; x right, y down
_SHAPES = {
    "circle": lambda x, y: hypot(x, y) - 0.95,
    "square": lambda x, y: _box(x, y),
    "triangle": lambda x, y: _fold(y, x, 3)[0] - 0.55,
    "star": lambda x, y: _fold(-y, x, 5)[0] * 0.6 + _fold(-y, x, 5)[1] * 0.8 - 0.6,
    "cross": lambda x, y: minimum(_box(x, y, 1, 0.3), _box(x, y, 0.3, 1)),
    "ring": lambda x, y: (hypot(x, y) - 0.75).abs() - 0.2,
    "frame": lambda x, y: _box(x, y, 0.7, 0.7).abs() - 0.17,
    "heart": lambda x, y: minimum((x.abs() + y.abs() - 0.8) * 0.7, hypot(x.abs() - 0.4, y + 0.4) - 0.56),
    "moon": lambda x, y: maximum(hypot(x, y) - 1, 0.85 - hypot(x - 0.5, y)),
    "arrow": lambda x, y: minimum(_box(x + 0.4, y, 0.6, 0.22), maximum(0.1 - x, (x + y.abs() - 1) * 0.7)),
    "hourglass": lambda x, y: maximum((x.abs() - y.abs()) * 0.7, y.abs() - 0.9),
    "flower": lambda x, y: (hypot(x, y) - 0.7 - 0.3 * (6 * atan2(y, x)).cos()) * 0.5,
    "wave": lambda x, y: maximum(((y - 0.4 * (5 * x).sin()).abs() - 0.25) * 0.6, x.abs() - 1),
    "spiral": lambda x, y: maximum((atan2(y, x) - 9 * hypot(x, y)).cos() / 9, hypot(x, y) - 1),
    "stripes": lambda x, y: maximum(-(9 * x).cos() / 9, _box(x, y, 0.87, 0.87)),
    "checkerboard": lambda x, y: maximum((7.4 * x).sin() * (7.4 * y).sin() / 7.4, _box(x, y, 0.82, 0.82)),
}
TOY_CLASSES = list(_SHAPES)


def toy_pictures(per_class: int, seed: int = 0, domain: str = "target", size: int = 48,
                 ) -> tuple[Tensor, Tensor]:
    """Shapes drawn by code: two domains with the same classes, so that there is something to adapt to.

    domain: "source", any colour on plain ground of another, or "target": grey, pale, dark on light, blurred,
    on cloudy and noisy ground. The same seed gives the same pictures.
    Returns (N, 3, size, size) uint8 and labels (N,) int64: per_class pictures of each of TOY_CLASSES in turn.
    """
    chance = torch.Generator().manual_seed(seed)
    n = per_class * len(TOY_CLASSES)
    labels = torch.arange(len(TOY_CLASSES)).repeat_interleave(per_class)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=chance)

    radius, turn = uniform(0.28, 0.42, 1, 1), uniform(-0.4, 0.4, 1, 1)    # of the picture's side; radians
    place = (0.5 - radius)[..., None] * uniform(-1, 1, 1, 1, 2) + 0.5  # (n, 1, 1, 2): all but corners inside
    grid = (torch.arange(size) + 0.5) / size
    x, y = (grid - place[..., 0]) / radius, (grid[:, None] - place[..., 1]) / radius   # (n, 1, S), (n, S, 1)
    x, y = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()                       # (n, S, S)
    points = zip(_SHAPES.values(), x.split(per_class), y.split(per_class))
    outside = torch.cat([shape(u, v) for shape, u, v in points])
    inside = (0.5 - outside * radius * size).clamp(0, 1)[:, None]  # (n, 1, S, S), a soft edge, one pixel

    if domain == "source":
        ground = uniform(0, 1, 3, 1, 1)                                    # (n, 3, 1, 1)
        shape = torch.remainder(ground + uniform(0.3, 0.7, 3, 1, 1), 1)    # 0.3 away or more in every channel
        pictures = ground + inside * (shape - ground)
    else:
        cloud = F.interpolate(uniform(-1, 1, 1, 6, 6), size=(size, size), mode="bicubic", align_corners=False)
        pictures = 0.7 + 0.22 * cloud - 0.4 * inside
        pictures = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        pictures = pictures + 0.05 * torch.randn(pictures.shape, generator=chance)
        pictures = pictures.expand(-1, 3, -1, -1)
    return (255 * pictures.clamp(0, 1)).round().to(torch.uint8), labels
