"""Datasets as one tensor each, tasks drawn from (seed, number) alone, augmentation in batches.

    pool = load("eurosat", "datasets")                      # a name of DATASETS, toy, or a folder
    task = pool.task(0, way=5, shot=1, query=15, seed=1) # index tensors, and what is true of each
    pool.images[task.support]                               # (5, 3, S, S) uint8

In this order: pools and tasks, what is in a folder, the known sets, the one-tensor file, augmentation. Every
picture is decoded once, to S x S (64 for eurosat, 48 for toy, else 256), into a file in the cache that later
runs map into memory.
"""
from __future__ import annotations

import csv
import hashlib
import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import ceil, pi, prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import EuroSAT
from torchvision.datasets.folder import is_image_file
from torchvision.datasets.utils import download_and_extract_archive

from clip_min import CACHE, CLIPConfig

# What pictures' endings mean, and GIF, as some of Oxford's pets named .jpg are: none needs another program
FORMATS = "JPEG PNG PPM BMP TIFF WEBP GIF".split()


class DataError(Exception):
    """Pictures or labels that cannot be had or used; the message is one line for the user."""


def digest(*what: object) -> str:
    """16 hexadecimal digits that stand for values, the same in every process."""
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def generator(*key: object) -> torch.Generator:
    """A random generator that depends on the key alone."""
    return torch.Generator().manual_seed(int(digest(*key)[:14], 16))


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
    support: Tensor     # (M,) rows
    labels: Tensor      # (M,) 0..N-1, places in classes
    query: Tensor       # (Q,) rows
    truth: Tensor       # (Q,) 0..N-1


@dataclass
class Pool:
    """A dataset. images (N, 3, S, S) uint8, perhaps a mapped file: not to be written to; labels (N,) int64.

    classes: one name a label; fingerprint: changes with the pictures' names, sizes and labels. With a split
    of its own: train and test, its rows (there may be others), and prompt, its few-shot protocol's.
    """
    images: Tensor
    labels: Tensor
    classes: list[str]
    fingerprint: str
    prompt: str | None = None
    train: Tensor | None = None
    test: Tensor | None = None

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
        at more. Raises DataError without a split, or for a class without pictures.
        """
        if self.train is None or self.test is None:
            raise DataError(NO_SPLIT)
        support = []
        for label, rows in enumerate(self.rows(self.train)):
            g, n = generator("split", seed, label), len(rows)
            if not n:
                raise DataError(f"class {self.classes[label]!r} has no picture in the training split")
            order = torch.randperm(n, generator=g)[:shot]
            support.append(rows[torch.randint(n, (shot,), generator=g) if n < shot else order])
        classes = torch.arange(len(self.classes))
        return Task(classes, torch.cat(support), classes.repeat_interleave(shot),
                    self.test, self.labels[self.test])

    def holdout(self, count: int, seed: int) -> Task:
        """All classes with all that may be learned from, but for `count` pictures of each as queries."""
        rows = [r[torch.randperm(len(r), generator=generator("holdout", seed, label))]
                for label, r in enumerate(self.rows(self.train))]
        if min(map(len, rows)) <= count:
            raise DataError(f"every class needs more than the {count} pictures that are held out")
        kept, held = torch.cat([r[count:] for r in rows]), torch.cat([r[:count] for r in rows])
        return Task(torch.arange(len(rows)), kept, self.labels[kept], held, self.labels[held])


# ------------------------------------------------------------------------------ what is in a dataset's folder

# A lister gives a row a picture: "train", "test" or "", its path below the folder, its class. Labels count
# the classes in the order in which they come.

Rows = list[tuple[str, str, str]]


def list_folders(root: Path, under: str = "", names: dict[str, str] = {}) -> Rows:
    """Class folders, each called as in names; or train/ and test/ (or val/) that hold them: the split."""
    parts = {p.name: p for p in (root / under).iterdir()}
    test = parts.get("test", parts.get("val"))
    places = {"train": parts["train"], "test": test} if "train" in parts and test else {"": root / under}
    return [(part, str(file.relative_to(root)), names.get(file.parent.name, file.parent.name))
            for part, place in places.items() for file in sorted(place.glob("[!.]*/[!.]*"))
            if is_image_file(file.name)]


def list_imagenet(root: Path) -> Rows:
    """Folders n01440764, ... in train/ and val/; classnames.txt has lines of such a name and its words."""
    words = {}
    for line in (root / "classnames.txt").read_text().splitlines():
        folder, _, name = line.partition(" ")
        words[folder] = f"{name} {folder}" if name in words.values() else name       # two are "sunglasses"
    return list_folders(root, names=words)


def list_aircraft(root: Path) -> Rows:
    """Lists of FGVC-Aircraft: a picture's name, a space, its variant."""
    lines = [(part, line.partition(" ")) for part in ("train", "test")
             for line in (root / f"images_variant_{part}.txt").read_text().splitlines()]
    return [(part, f"images/{picture}.jpg", variant) for part, (picture, _, variant) in lines]


def list_split(root: Path, split: str, pictures: str) -> Rows:
    """CoOp's splits: {"train": [[picture, label, class name], ...], "test": ...}; its val is left out."""
    parts = json.loads((root / split).read_text())
    return [(part, os.path.join(pictures, picture), name) for part in ("train", "test")
            for picture, label, name in sorted(parts[part], key=lambda row: row[1])]


def list_eurosat(root: Path) -> Rows:
    """All class folders, in their order, for episodes; where CoOp's split is beside them, its parts too."""
    rows = {path: ("", path, name) for _, path, name in list_folders(root, "2750", EUROSAT)}
    if (root / EUROSAT_SPLIT).exists():
        for part, path, name in list_split(root, EUROSAT_SPLIT, "2750"):
            rows[path] = part, path, EUROSAT.get(name, name)
    return list(rows.values())


def table(file: Path) -> list[dict]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def list_isic(root: Path) -> Rows:
    rows = table(root / "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv")
    return [("", f"ISIC2018_Task3_Training_Input/{row['image']}.jpg", name) for row in rows
            for key, name in ISIC.items() if float(row[key]) == 1]


def list_chestx(root: Path) -> Rows:
    """Only pictures with exactly one finding, of the seven."""
    where = {p.name: str(p.relative_to(root))
             for part in ("images", "images_*/images") for p in root.glob(f"{part}/*.png")}
    rows = table(root / "Data_Entry_2017.csv")
    return [("", where[row["Image Index"]], row["Finding Labels"]) for row in rows
            if row["Finding Labels"] in CHESTX]


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

def fetch_isic(target: Path) -> None:
    for part in ("Input", "GroundTruth"):                 # 2.6 GB, licence CC BY-NC (no commercial use)
        url = f"https://isic-challenge-data.s3.amazonaws.com/2018/ISIC2018_Task3_Training_{part}.zip"
        download_and_extract_archive(url, target, remove_finished=True)


class Dataset(NamedTuple):
    """A known set: its folder under --data, how to list and get that, pixels a side, the split's prompt."""
    folder: str
    list: Callable[[Path], Rows]
    source: str = ""
    fetch: Callable[[Path], object] | None = None
    size: int = 256
    prompt: str | None = None


COOP = "DATASETS.md in github.com/KaiyangZhou/CoOp"
NO_SPLIT = f"no split: give train/ and test/ class folders, or the set's split_zhou_*.json ({COOP})"
KAGGLE = "curl -L -o a.zip https://www.kaggle.com/api/v1/datasets/download/"
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data/"


def coop_set(folder: str, split: str, pictures: str, prompt: str, source: str) -> Dataset:
    """A set whose split is CoOp's file split_zhou_<split>.json, with the folder that its paths begin in."""
    lister = partial(list_split, split=f"split_zhou_{split}.json", pictures=pictures)
    return Dataset(folder, lister, f"the pictures from {source}, the split from {COOP}", prompt=prompt)


DATASETS = {
    "eurosat": Dataset("eurosat", list_eurosat, "https://github.com/phelber/EuroSAT, "
                       f"the split from {COOP}", lambda target: EuroSAT(target.parent, download=True), 64,
                       "a centered satellite photo of {}."),
    "isic": Dataset("ISIC", list_isic, "https://challenge.isic-archive.com/data", fetch_isic),
    "cropdiseases": Dataset("CropDiseases", partial(list_folders, under="train"),
                            f"{KAGGLE}saroz014/plant-disease, its class folders in CropDiseases/train/"),
    "chestx": Dataset("ChestX", list_chestx, f"{KAGGLE}nih-chest-xrays/data (42 GB)"),
    "imagenet": Dataset("imagenet", list_imagenet, "the class folders train/ and val/ from "
                        f"https://image-net.org, classnames.txt from {COOP}", prompt="itap of a {}."),
    "aircraft": Dataset("fgvc_aircraft", list_aircraft, f"{OXFORD}fgvc-aircraft/ (its data/ folder)",
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
TOY = Path(__file__).resolve().parent / "tests"                          # toy_world.py, toy_clip.safetensors


def load(name: str, root: str | Path = "datasets") -> Pool:
    """The dataset called `name` under root, fetched at need; or "toy"; or the folder at the path `name`.

    Raises DataError, or OSError where a file of it is not there.
    """
    if name == "toy":
        toy = runpy.run_path(str(TOY / "toy_world.py"))
        return Pool(*toy["toy_pictures"](200), toy["TOY_CLASSES"], "toy")
    known = DATASETS.get(name, Dataset("", list_folders, f"a folder, or one of toy, {', '.join(DATASETS)}"))
    folder = Path(root) / known.folder if known.folder else Path(name)
    if known.fetch and not folder.is_dir():
        known.fetch(folder)
    if not folder.is_dir():
        raise DataError(f"{name}: there is no folder {folder}; get {known.source}")
    try:
        rows = known.list(folder)
    except (LookupError, ValueError) as e:
        raise DataError(f"the lists in {folder} are damaged: {type(e).__name__} {e}") from e
    classes = list(dict.fromkeys(name for _, _, name in rows))
    if not classes:
        raise DataError(f"no class folders with pictures in {folder}")
    label_of = {name: label for label, name in enumerate(classes)}
    images, fingerprint = decoded(folder, [path for _, path, _ in rows], known.size)
    split = {part: torch.tensor([i for i, row in enumerate(rows) if row[0] == part])
             for part in ("train", "test")}
    split = split if all(map(len, split.values())) else {}
    labels = torch.tensor([label_of[name] for _, _, name in rows])
    return Pool(images, labels, classes, digest(fingerprint, rows), known.prompt, **split)


# ---------------------------------------------------------------------------------------- the one-tensor file

def decode(path: str | Path, size: int = 256) -> Tensor:
    """Any picture of FORMATS, upright, as (3, size, size) uint8 RGB. Raises DataError naming the file."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode[0] in "IF":
                raise ValueError("it has more than 8 bits a channel, which would be cut off")
            image = ImageOps.exif_transpose(image).convert("RGB")
            return TF.pil_to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))
    except Exception as e:                          # Pillow's readers raise all sorts: struct.error, KeyError
        raise DataError(f"cannot read {path}: {' '.join(str(e).split()) or type(e).__name__}") from e


def attempt(path: str | Path, size: int = 256) -> Tensor | DataError:
    """The picture, or why it cannot be had."""
    try:
        return decode(path, size)
    except DataError as e:
        return e


def decoded(folder: Path, paths: list[str], size: int) -> tuple[Tensor, str]:
    """All pictures as one mapped tensor (N, 3, size, size) uint8, decoded once, and their fingerprint."""
    stats = [(folder / path).stat() for path in paths]
    key = digest(str(folder.resolve()), paths, [(s.st_size, s.st_mtime_ns) for s in stats], size)
    file, shape = CACHE / f"{key}.u8", (len(paths), 3, size, size)
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        progress = Progress(f"decoding pictures of {folder}", len(paths))
        part, broken = file.with_suffix(f".{os.getpid()}.part"), []
        with ThreadPoolExecutor() as pool, open(part, "wb") as out:
            for start in range(0, len(paths), 256):       # a few hundred at a time bound the memory
                progress(start)
                some = [folder / path for path in paths[start: start + 256]]
                for image in pool.map(partial(attempt, size=size), some):
                    if isinstance(image, DataError):
                        broken.append(str(image))
                    else:
                        out.write(image.numpy().tobytes())
        if broken:
            part.unlink()
            raise DataError(f"{'; '.join(broken[:5])}; {len(broken)} in all")
        os.replace(part, file)
    images = torch.from_file(str(file), shared=True, size=prod(shape), dtype=torch.uint8).view(shape)
    return images, digest([s.st_size for s in stats], size)


# ----------------------------------------------------------------------------------------------- augmentation

def normalize(images: Tensor, config: CLIPConfig) -> Tensor:
    """(..., 3, S, S) in 0..1 -> normalised by the mean and std of a backbone's config."""
    mean, std = (torch.tensor(x).view(3, 1, 1).to(images.device, non_blocking=True)
                 for x in (config.mean, config.std))
    return (images - mean) / std


def resize(images: Tensor, size: int) -> Tensor:
    """(..., 3, S, S) uint8 -> (..., 3, size, size) float in 0..1, antialiased."""
    return TF.resize(images / 255, [size, size])


def plain(images: Tensor, config: CLIPConfig, centre: bool = False) -> Tensor:
    """(..., 3, S, S) uint8 -> normalised for a backbone; centre: of 257/224 its size, cropped."""
    whole = round(config.image * 257 / 224) if centre else config.image
    return normalize(TF.center_crop(resize(images, whole), [config.image] * 2), config)


def warp(images: Tensor, maps: tuple[Tensor, ...], size: int, **how) -> Tensor:
    """Each of (B, 3, S, S) through its own affine map -> (B, 3, size, size); maps: six of (B,)."""
    maps = torch.stack(maps, -1).view(-1, 2, 3)
    grid = F.affine_grid(maps, (len(images), 3, size, size), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, **how)


def random_crop(images: Tensor, u: Tensor, size: int, least: float = 0.5, bicubic: bool = False) -> Tensor:
    """Random crop (area least..1, ratio 3/4..4/3) and flip; images (B, 3, S, S) and u (B, 5) in 0..1.

    u: the chance in it, for area, ratio, x, y and flip, so that a crop can be repeated.
    """
    area, ratio = least + (1 - least) * u[:, 0], (4 / 3) ** (2 * u[:, 1] - 1)
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = (2 * u[:, 2] - 1) * (1 - width), (2 * u[:, 3] - 1) * (1 - height)
    zero, flip = torch.zeros_like(x), torch.where(u[:, 4] < 0.5, -1.0, 1.0)
    maps, mode = (flip * width, zero, x, zero, height, y), "bicubic" if bicubic else "bilinear"
    return warp(images, maps, size, padding_mode="border", mode=mode).clamp(0, 1)        # bicubic overshoots


def jitter(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, colour of (B, 3, S, S) in 0..1, by factors (B, 3)."""
    grey = TF.rgb_to_grayscale
    brightness, contrast, colour = factors[..., None, None, None].unbind(1)
    images = (images * brightness).clamp(0, 1)
    mean = grey(images).mean((-2, -1), keepdim=True)
    images = (mean + contrast * (images - mean)).clamp(0, 1)
    return (grey(images) + colour * (images - grey(images))).clamp(0, 1)


def five_views(images: Tensor, u: Tensor) -> Tensor:
    """The released five views: plain; rotation, jitter and flip; rotation; jitter; flip.

    images (B, 3, S, S) in 0..1 -> (5, B, 3, S, S). u (B, 8) in 0..1: two angles (-45..45 degrees), twice
    three jitter factors (0.6..1.4). Flips are certain.
    """
    def turned(angle: Tensor, flip: float) -> Tensor:
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        maps = (flip * cos, -sin, zero, flip * sin, cos, zero)
        return warp(images, maps, images.shape[-1], padding_mode="zeros")
    angles, factors = (u[:, :2] - 0.5) * pi / 2, 0.6 + 0.8 * u[:, 2:]
    return torch.stack([images, jitter(turned(angles[:, 0], -1.0), factors[:, :3]), turned(angles[:, 1], 1.0),
                        jitter(images, factors[:, 3:]), images.flip(-1)])


class Batches:
    """The pictures of every training step for E tasks at once, the same whenever a step is asked for.

    batches(number) -> pictures (E, B, 3, size, size) normalised, labels (E, B), and without augmentation
    plain (E, K, 3, size, size), its labels (E, K). All chance is drawn from each task's own seed.
    images (N, 3, S, S) uint8: a pool's; recipe: has steps, augment, minibatch, crop_area and bicubic.
    """

    def __init__(self, images: Tensor, tasks: Sequence[Task], seeds: Sequence[object], recipe,
                 config: CLIPConfig, device: str | torch.device = "cpu"):
        self.images, self.recipe, self.config, self.device, self.seeds = images, recipe, config, device, seeds
        self.support, self.labels = (torch.stack([task[i] for task in tasks]) for i in (1, 2))     # (E, M)
        self.each, self.pictures = torch.arange(len(tasks))[:, None], self.support.shape[1]
        whole = self.pictures * (5 if recipe.augment == "views" else 1)              # in an epoch
        self.shown = min(recipe.minibatch or whole, whole)                           # B
        self.mini, self.made = self.shown < whole, (None, None)
        self.different = self.shown if self.mini else self.pictures                  # K: views repeat them
        epochs = ceil(recipe.steps * self.shown / whole) if self.mini else 1
        # (E, epochs * whole): which of all that is shown; row r is view r // M of picture r % M
        order = self.uniform("order", epochs, whole).argsort(-1) if self.mini else torch.arange(whole)
        self.order = order.expand(len(tasks), epochs, -1).flatten(1)
        if recipe.augment == "crop":
            self.crops = self.uniform("crop", recipe.steps, self.shown, 5).to(device)
        self.turns = self.uniform("views", self.pictures, 8)

    def uniform(self, what: str, *shape: int) -> Tensor:
        """(E, *shape) in 0..1."""
        return torch.stack([torch.rand(shape, generator=generator(what, seed)) for seed in self.seeds])

    def prepare(self, number: int) -> tuple[Tensor, ...]:
        """The step's pictures, but for the crop, which differs in every step; labels; plain; its labels."""
        r, size = self.recipe, self.config.image
        rows = self.order[:, number * self.shown: (number + 1) * self.shown]         # (E, B)
        chosen = rows % self.pictures
        labels = self.labels[self.each, chosen].to(self.device)
        different = chosen[:, : self.different]                                      # (E, K)
        raw = self.images[self.support[self.each, different]].to(self.device)
        still = shown = plain(raw, self.config, r.augment == "none")
        if r.augment == "crop":
            # grid_sample does not average: shrink first, until the smallest crop has about `size` pixels
            shown = resize(raw, min(raw.shape[-1], ceil(size * r.crop_area ** -0.5)))
        if r.augment == "views":
            turns = self.turns[self.each, different].flatten(0, 1).to(self.device)
            views = five_views(resize(raw, size).flatten(0, 1), turns).unflatten(1, different.shape)
            place = torch.arange(self.shown) % self.different
            shown = normalize(views[rows // self.pictures, self.each, place], self.config)      # (E, B, ...)
        return shown, labels, still, labels[:, : self.different]

    def __call__(self, number: int) -> tuple[Tensor, ...]:
        step, r = number if self.mini else 0, self.recipe                       # full batches are all one
        if self.made[0] != step:
            self.made = step, self.prepare(step)
        shown, *others = self.made[1]
        if r.augment == "crop":
            u = self.crops[:, number].flatten(0, 1)
            shown = random_crop(shown.flatten(0, 1), u, self.config.image, r.crop_area, r.bicubic)
            shown = normalize(shown, self.config).unflatten(0, (len(self.each), -1))
        return shown, *others
