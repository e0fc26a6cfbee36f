"""Datasets as one tensor each, episodes drawn from (seed, number) alone, augmentation as batched tensor operations.

    pool = load("eurosat", "datasets")                         # or isic, cropdiseases, chestx, toy, or a folder of class folders
    classes, support, query = pool.episode(0, way=5, shot=1)   # index tensors (5,), (5, 1), (5, 15)
    pool.images[support]                                       # (5, 1, 3, S, S) uint8

Every picture is decoded once, to S x S (64 for eurosat, 48 for toy, else 256), into a file that later runs map into memory.
"""
from __future__ import annotations

import csv, fcntl, hashlib, http.client, json, os, shutil, sys, time, warnings, zipfile, zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from math import ceil, pi
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import EuroSAT
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2.functional import pil_to_tensor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)    # CLIP's, of RGB in 0..1
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atha"


class DataError(Exception):
    """Pictures or labels that cannot be had or used; the message is one line for the user."""


def generator(*key: object) -> torch.Generator:
    """A random generator that depends on the key alone."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:7], "big"))


@dataclass
class Pool:
    """A dataset. images (N, 3, S, S) uint8, labels (N,) int64, classes: one name a label; fingerprint changes with the files."""
    images: Tensor
    labels: Tensor
    classes: list[str]
    fingerprint: str

    @cached_property
    def rows(self) -> list[Tensor]:
        """Rows of each class."""
        return [torch.nonzero(self.labels == label)[:, 0] for label in range(len(self.classes))]

    def episode(self, number: int, way: int = 5, shot: int = 1, query: int = 15, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Episode `number` of a seed: classes (way,), support rows (way, shot), query rows (way, query), all distinct.

        Raises DataError when there are too few classes, or a class has too few pictures.
        """
        if way > len(self.classes):
            raise DataError(f"{way} classes asked (way), the dataset has {len(self.classes)}")
        for name, rows in zip(self.classes, self.rows):
            if len(rows) < shot + query:
                raise DataError(f"class {name!r} has {len(rows)} pictures, {shot} + {query} = {shot + query} (shot + query) are needed")
        g = generator("episode", seed, number)
        classes = torch.randperm(len(self.classes), generator=g)[:way]
        drawn = torch.stack([self.rows[c][torch.randperm(len(self.rows[c]), generator=g)[: shot + query]] for c in classes])
        return classes, drawn[:, :shot], drawn[:, shot:]


# ------------------------------------------------------------------------------------------- the datasets on disk

Listing = tuple[list[tuple[Path, int]], list[str]]    # (picture, label) pairs, class names

EUROSAT = {"AnnualCrop": "Annual Crop Land", "HerbaceousVegetation": "Herbaceous Vegetation Land", "Highway": "Highway or Road",
           "Industrial": "Industrial Buildings", "Pasture": "Pasture Land", "PermanentCrop": "Permanent Crop Land",
           "Residential": "Residential Buildings", "SeaLake": "Sea or Lake"}
ISIC = {"MEL": "Melanoma", "NV": "Melanocytic Nevus", "BCC": "Basal Cell Carcinoma", "AKIEC": "Actinic Keratosis",
        "BKL": "Benign Keratosis", "DF": "Dermatofibroma", "VASC": "Vascular Lesion"}
CHESTX = ["Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumothorax"]
OTHER_FINDINGS = ["No Finding", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Hernia", "Pleural_Thickening", "Pneumonia"]
ISIC_URL = "https://isic-challenge-data.s3.amazonaws.com/2018/ISIC2018_Task3_Training_"


def list_folders(root: Path) -> Listing:
    """A folder of class folders. Hidden files and what is no picture are left out; empty class folders are named."""
    def visible(folder: Path) -> list[Path]:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    if not root.is_dir():
        raise DataError(f"no folder {root}: it should hold class folders")
    found = {f.name: [p for p in visible(f) if p.suffix.lower() in IMG_EXTENSIONS and p.is_file()] for f in visible(root) if f.is_dir()}
    if empty := [name for name, pictures in found.items() if not pictures]:
        print(f"left out, no pictures in: {', '.join(empty)}", file=sys.stderr)
    classes = [name for name, pictures in found.items() if pictures]
    if not classes:
        raise DataError(f"no class folders with pictures in {root}")
    return [(p, label) for label, name in enumerate(classes) for p in found[name]], classes


def list_eurosat(root: Path) -> Listing:
    entries, folders = list_folders(root / "2750")
    return entries, [EUROSAT.get(name, name) for name in folders]


def list_isic(root: Path) -> Listing:
    table = root / "ISIC2018_Task3_Training_GroundTruth" / "ISIC2018_Task3_Training_GroundTruth.csv"
    pictures = root / "ISIC2018_Task3_Training_Input"
    rows = [(pictures / f"{row['image']}.jpg", [name for key, name in ISIC.items() if row[key] in ("1", "1.0")]) for row in read_table(table, ["image", *ISIC])]
    for picture, names in rows:
        if len(names) != 1:
            raise DataError(f"{table}: {picture.stem} has {len(names)} of the seven labels, expected one")
    return by_label(rows, list(ISIC.values()), table)


def list_chestx(root: Path) -> Listing:
    """Only pictures with exactly one finding, of the seven."""
    table = root / "Data_Entry_2017.csv"
    table_rows = read_table(table, ["Image Index", "Finding Labels"])
    for row in table_rows:
        if unknown := set((row["Finding Labels"] or "").split("|")) - {*CHESTX, *OTHER_FINDINGS}:
            raise DataError(f"{table}: {row['Image Index']} has an unknown finding {min(unknown)!r}")
    where = {p.name: p for folder in ("images", "images_*/images") for p in root.glob(f"{folder}/*.png")}
    rows = [(where.get(row["Image Index"], root / "images" / row["Image Index"]), [row["Finding Labels"]])
            for row in table_rows if row["Finding Labels"] in CHESTX]
    return by_label(rows, CHESTX, table)


def read_table(table: Path, columns: list[str]) -> list[dict[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := [c for c in columns if c not in (reader.fieldnames or [])]:
                raise DataError(f"{table} has no column {missing[0]!r}")
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"cannot read {table}: {e}") from e


def by_label(rows: list[tuple[Path, list[str]]], names: list[str], table: Path) -> Listing:
    """(picture, [class name]) rows of a table -> a listing of the classes that have pictures. Raises DataError for a missing picture."""
    there = {p for folder in {picture.parent for picture, _ in rows} if folder.is_dir() for p in folder.iterdir()}
    for picture, _ in rows:
        if picture not in there:
            raise DataError(f"{table} lists {picture.name}, which is not at {picture}")
    classes = [name for name in names if any(name in labels for _, labels in rows)]
    return [(picture, classes.index(labels[0])) for picture, labels in rows], classes


def fetch_isic(target: Path) -> None:
    print("ISIC 2018 task 3: 2.6 GB, licence CC BY-NC (no commercial use)", file=sys.stderr)
    for part in ("Input", "GroundTruth"):
        print(f"downloading {ISIC_URL}{part}.zip", file=sys.stderr)
        download_and_extract_archive(f"{ISIC_URL}{part}.zip", str(target), remove_finished=True)


KAGGLE = "curl -L -o a.zip https://www.kaggle.com/api/v1/datasets/download/"
DATASETS = {    # folder under --data, cached pixels a side, how to list it, how to fetch it: a function, or words for the user
    "eurosat": ("eurosat", 64, list_eurosat, lambda target: EuroSAT(str(target.parent), download=True)),
    "isic": ("ISIC", 256, list_isic, fetch_isic),
    "cropdiseases": ("CropDiseases", 256, lambda root: list_folders(root / "train"),
                     f"{KAGGLE}saroz014/plant-disease, its class folders in CropDiseases/train/"),
    "chestx": ("ChestX", 256, list_chestx, f"{KAGGLE}nih-chest-xrays/data (42 GB), with Data_Entry_2017.csv and images/ or images_0NN/images/ in ChestX/"),
}


def check(name: str, root: str | Path = "datasets") -> None:
    """Raises DataError where `load` is sure to: before anything is fetched for it."""
    if name in DATASETS:
        directory, _, _, source = DATASETS[name]
        if isinstance(source, str) and not (Path(root) / directory).is_dir():
            raise DataError(f"{name} is not at {Path(root) / directory}; get it with {source}")
    elif name != "toy" and not Path(name).is_dir():
        raise DataError(f"unknown dataset {name!r}: choose from {', '.join(DATASETS)}, toy, or give a folder of class folders")


def load(name: str, root: str | Path = "datasets") -> Pool:
    """The dataset called `name` under root, fetched at need; or "toy"; or the folder of class folders at the path `name`.

    Raises DataError: unknown name, dataset not found, no network, a picture that cannot be decoded, a broken table.
    """
    check(name, root)
    if name == "toy":
        images, labels = toy_pictures(200)
        return Pool(images, labels, list(TOY_CLASSES), "toy")
    directory, size, listing, source = DATASETS.get(name, (name, 256, list_folders, None))
    folder = Path(root) / directory if source else Path(name)
    if not folder.is_dir():
        fetch(name, folder, source)
    elsewhere = CACHE / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}-{size}.safetensors"
    return cached(listing(folder), folder, size, [folder / f".{name}-{size}.safetensors", elsewhere] if source else [elsewhere])


def fetch(name: str, folder: Path, source: Callable[[Path], None]) -> None:
    """Fetch into a folder beside, then rename: the dataset is there whole or not at all."""
    part = folder.with_name(f".{folder.name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{part}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)                             # a second process waits here, then finds the first one's work
            if folder.is_dir():
                return
            print(f"{name} is not at {folder}: downloading it", file=sys.stderr)
            shutil.rmtree(part, ignore_errors=True)                      # of a run that was killed
            try:
                source(part / folder.name)
                os.replace(part / folder.name, folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except (OSError, RuntimeError, http.client.HTTPException, zipfile.BadZipFile, zlib.error) as e:
        raise DataError(f"cannot download {name} ({e}): fetch it on another machine and put it at {folder}") from e


# ---------------------------------------------------------------------------------------------- the one-tensor cache

def decode(path: str | Path, size: int) -> Tensor:
    """Any picture that Pillow reads, upright, as (3, size, size) uint8 RGB. Raises DataError naming the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                               # Pillow's advice about palettes is not for our user
            image = ImageOps.exif_transpose(Image.open(path))
            if image.mode.startswith("I"):                                # 16 bits a pixel: Pillow's own conversion would clip
                image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
            return pil_to_tensor(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)).contiguous()
    except Exception as e:                                                # Pillow's readers raise all sorts: struct.error, KeyError, ...
        raise DataError(f"cannot decode {path}: {e}") from e


def decode_all(paths: list[Path], size: int) -> Tensor | str:
    """Pictures (n, 3, size, size), or a failure as its message: raised in a worker process, it would lose its type."""
    try:
        return torch.stack([decode(path, size) for path in paths])        # one tensor, as each takes a file descriptor on its way back
    except DataError as e:
        return str(e)


def cached(listing: Listing, root: Path, size: int, places: list[Path]) -> Pool:
    """The listed pictures from the first of `places` that holds them as they are now, else decoded into the first writable."""
    entries, classes = listing
    stats = [(str(p.relative_to(root)), label, (s := p.stat()).st_size, s.st_mtime_ns) for p, label in entries]
    fingerprint = hashlib.sha256(repr((stats, classes, size)).encode()).hexdigest()[:16]
    for place in places:
        if pool := open_cache(place, fingerprint):
            return pool
    for place, fallback in zip(places, [*places[1:], None]):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{place}.lock", "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)                         # a second run waits here, then finds the first one's work
                if not open_cache(place, fingerprint):
                    build_cache(place, entries, classes, size, fingerprint)
            return open_cache(place, fingerprint)
        except OSError as e:
            if fallback is None:
                raise DataError(f"cannot keep the decoded pictures in {place.parent}: {e.strerror}") from e
            print(f"cannot keep the decoded pictures in {place.parent} ({e.strerror}): they go to {fallback.parent}", file=sys.stderr)


def open_cache(place: Path, fingerprint: str) -> Pool | None:
    try:
        with safe_open(place, "pt") as file:                             # maps the file: pictures are read when first indexed
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") == fingerprint:
                return Pool(file.get_tensor("images"), file.get_tensor("labels"), json.loads(metadata["classes"]), fingerprint)
    except (OSError, SafetensorError):                                   # not there, or cut short
        pass


def build_cache(place: Path, entries: list[tuple[Path, int]], classes: list[str], size: int, fingerprint: str) -> None:
    """Write a safetensors file picture by picture, so that it may be larger than memory; it appears when it is whole."""
    total, start = len(entries), 8 * len(entries)
    header = json.dumps({"__metadata__": {"classes": json.dumps(classes), "fingerprint": fingerprint},
                         "labels": {"dtype": "I64", "shape": [total], "data_offsets": [0, start]},
                         "images": {"dtype": "U8", "shape": [total, 3, size, size], "data_offsets": [start, start + total * 3 * size * size]}}).encode()
    header += b" " * (-len(header) % 8)
    workers = min(len(os.sched_getaffinity(0)), 16, total // 200)
    batches = DataLoader([p for p, _ in entries], batch_size=64, num_workers=workers, collate_fn=partial(decode_all, size=size))
    part, done, begun = Path(f"{place}.part"), 0, time.monotonic()
    try:
        with part.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.write(torch.tensor([label for _, label in entries]).numpy())
            for batch in batches:
                if isinstance(batch, str):
                    raise DataError(batch)
                file.write(batch.numpy())
                done += len(batch)
                print(f"\rdecoding pictures {done}/{total}, {done / (time.monotonic() - begun):.0f} a second ", end="", file=sys.stderr)
        os.replace(part, place)
    finally:
        if done:
            print(file=sys.stderr)                                       # ends the line of progress, before a message too
        part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------ augmentation

@cache
def of_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1), copied to the device once: a copy in every training step would make the host wait for the GPU each time."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def normalize(images: Tensor) -> Tensor:
    """(..., 3, S, S) in 0..1 -> CLIP's normalisation."""
    return (images - of_channels(MEAN, images.device)) / of_channels(STD, images.device)


def resize(images: Tensor, size: int) -> Tensor:
    """(..., 3, S, S) uint8 or float in 0..1 -> (..., 3, size, size) float in 0..1, antialiased."""
    images = images / 255 if images.dtype == torch.uint8 else images
    if images.shape[-1] == size:
        return images
    flat = F.interpolate(images.flatten(0, -4), (size, size), mode="bilinear", antialias=True)
    return flat.view(*images.shape[:-2], size, size)


def plain(images: Tensor, size: int, centre: bool = False) -> Tensor:
    """(..., 3, S, S) uint8 -> (..., 3, size, size) normalised: resized, or (centre) resized to 257/224 of it and cropped."""
    if not centre:
        return normalize(resize(images, size))
    margin = (round(size * 257 / 224) - size) // 2
    return normalize(resize(images, round(size * 257 / 224))[..., margin: margin + size, margin: margin + size])


def warp(images: Tensor, matrices: Tensor, size: int, padding: str) -> Tensor:
    """Each image of (..., 3, S, S) through its own affine map (..., 2, 3) -> (..., 3, size, size)."""
    flat = images.flatten(0, -4)
    grid = F.affine_grid(matrices.flatten(0, -3), (len(flat), 3, size, size), align_corners=False)
    return F.grid_sample(flat, grid, padding_mode=padding, align_corners=False).view(*images.shape[:-2], size, size)


def random_crop(images: Tensor, u: Tensor, size: int) -> Tensor:
    """Random resized crop (area 0.5..1, ratio 3/4..4/3) and flip; images (..., 3, S, S) in 0..1, u (..., 5) uniform in 0..1."""
    area, ratio = 0.5 + 0.5 * u[..., 0], (4 / 3) ** (2 * u[..., 1] - 1)
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = (2 * u[..., 2] - 1) * (1 - width), (2 * u[..., 3] - 1) * (1 - height)
    zero, flip = torch.zeros_like(x), torch.where(u[..., 4] < 0.5, -1.0, 1.0)
    matrices = torch.stack([torch.stack([flip * width, zero, x], -1), torch.stack([zero, height, y], -1)], -2)
    return warp(images, matrices, size, "border")


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
    """The released five views, in 0..1: plain; rotation, jitter and flip; rotation; jitter; flip. (E, M, ...) -> (E, 5 M, ...), view first.

    u (E, M, 8) uniform in 0..1: two angles (-45..45 degrees), two times three jitter factors (0.6..1.4). Flips are certain.
    """
    def turned(angle: Tensor, flip: float) -> Tensor:
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        matrices = torch.stack([torch.stack([flip * cos, -sin, zero], -1), torch.stack([flip * sin, cos, zero], -1)], -2)
        return warp(images, matrices, images.shape[-1], "zeros")
    angles, factors = (u[..., :2] - 0.5) * pi / 2, 0.6 + 0.8 * u[..., 2:]
    return torch.cat([images, jitter(turned(angles[..., 0], -1.0), factors[..., :3]), turned(angles[..., 1], 1.0),
                      jitter(images, factors[..., 3:]), images.flip(-1)], 1)


def support_batches(images: Tensor, labels: Tensor, augment: str, steps: int, size: int, seeds: Sequence[object],
                    minibatch: int = 0) -> tuple[Tensor, Callable[[int], tuple[Tensor, Tensor]]]:
    """Support sets (E, M, 3, S, S) uint8 and labels (E, M) -> plain pictures (E, M, 3, size, size) and batches(step).

    augment: none, crop or views (see Recipe). batches(step) gives pictures (E, B, 3, size, size), normalised, and labels
    (E, B). All chance is drawn from each episode's own seed.
    """
    def uniform(what: str, *shape: int) -> Tensor:                       # (E, *shape)
        return torch.stack([torch.rand(shape, generator=generator(what, seed)) for seed in seeds]).to(images.device)
    still = plain(images, size, centre=augment == "none")
    pictures, crops = still, None
    if augment == "views":
        pictures = normalize(five_views(resize(images, size), uniform(augment, images.shape[1], 8)))
        labels = labels.repeat(1, 5)
    elif augment == "crop":
        # grid_sample does not average: shrink first, so that a crop of half the area has about `size` pixels a side
        pictures = resize(images, min(images.shape[-1], ceil(size * 2 ** 0.5)))
        crops = uniform(augment, steps, pictures.shape[1], 5)
    order = None
    if 0 < minibatch < pictures.shape[1]:
        epochs = ceil(steps * minibatch / pictures.shape[1])
        order = uniform("order", epochs, pictures.shape[1]).argsort(-1).flatten(1)         # (E, epochs * M): shuffled anew in each epoch

    def batches(step: int) -> tuple[Tensor, Tensor]:
        x, y = pictures, labels
        if order is not None:
            rows = order[:, step * minibatch: (step + 1) * minibatch]
            x, y = torch.stack([p[r] for p, r in zip(x, rows)]), y.gather(1, rows)
        return (x if crops is None else normalize(random_crop(x, crops[:, step, : x.shape[1]], size))), y
    return still, batches


# ------------------------------------------------------------------------------------------------------ the toy world

def _fold(x: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Turn every point by a multiple of 1/n of a circle, so that it lies within 180/n degrees of the x axis; y >= 0."""
    angle = torch.remainder(torch.atan2(y, x) + pi / n, 2 * pi / n) - pi / n
    return torch.hypot(x, y) * angle.cos(), torch.hypot(x, y) * angle.sin().abs()


def _box(x: Tensor, y: Tensor, width: float = 0.85, height: float = 0.85) -> Tensor:
    return torch.maximum(x.abs() - width, y.abs() - height)


# How far a point is outside a shape of radius about 1 (negative: inside), to first order; x to the right, y down.
_SHAPES = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.95,
    "square": lambda x, y: _box(x, y),
    "triangle": lambda x, y: _fold(y, x, 3)[0] - 0.55,
    "star": lambda x, y: _fold(-y, x, 5)[0] * 0.6 + _fold(-y, x, 5)[1] * 0.8 - 0.6,
    "cross": lambda x, y: torch.minimum(_box(x, y, 1, 0.3), _box(x, y, 0.3, 1)),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.75).abs() - 0.2,
    "frame": lambda x, y: _box(x, y, 0.7, 0.7).abs() - 0.17,
    "heart": lambda x, y: torch.minimum((x.abs() + y.abs() - 0.8) * 0.7, torch.hypot(x.abs() - 0.4, y + 0.4) - 0.56),
    "moon": lambda x, y: torch.maximum(torch.hypot(x, y) - 1, 0.85 - torch.hypot(x - 0.5, y)),
    "arrow": lambda x, y: torch.minimum(_box(x + 0.4, y, 0.6, 0.22), torch.maximum(0.1 - x, (x + y.abs() - 1) * 0.7)),
    "hourglass": lambda x, y: torch.maximum((x.abs() - y.abs()) * 0.7, y.abs() - 0.9),
    "flower": lambda x, y: (torch.hypot(x, y) - 0.7 - 0.3 * (6 * torch.atan2(y, x)).cos()) * 0.5,
    "wave": lambda x, y: torch.maximum(((y - 0.4 * (5 * x).sin()).abs() - 0.25) * 0.6, x.abs() - 1),
    "spiral": lambda x, y: torch.maximum((torch.atan2(y, x) - 9 * torch.hypot(x, y)).cos() / 9, torch.hypot(x, y) - 1),
    "stripes": lambda x, y: torch.maximum(-(9 * x).cos() / 9, _box(x, y, 0.87, 0.87)),
    "checkerboard": lambda x, y: torch.maximum((7.4 * x).sin() * (7.4 * y).sin() / 7.4, _box(x, y, 0.82, 0.82)),
}
TOY_CLASSES = list(_SHAPES)


def toy_pictures(per_class: int, seed: int = 0, domain: str = "target", size: int = 48) -> tuple[Tensor, Tensor]:
    """Shapes drawn by code: two domains with the same classes, so that a model of the one has something to adapt to.

    domain: "source", any colour on plain ground of another, or "target": grey, pale, dark on light, blurred,
    on cloudy and noisy ground. The same seed gives the same pictures.
    Returns (N, 3, size, size) uint8 and labels (N,) int64, N = per_class pictures of each of TOY_CLASSES in turn.
    """
    chance = torch.Generator().manual_seed(seed)
    n = per_class * len(TOY_CLASSES)
    labels = torch.arange(len(TOY_CLASSES)).repeat_interleave(per_class)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=chance)

    radius, turn = uniform(0.28, 0.42, 1, 1), uniform(-0.4, 0.4, 1, 1)    # of the picture's side; radians
    place = (0.5 - radius)[..., None] * uniform(-1, 1, 1, 1, 2) + 0.5      # (n, 1, 1, 2): all but corners inside
    grid = (torch.arange(size) + 0.5) / size
    x, y = (grid - place[..., 0]) / radius, (grid[:, None] - place[..., 1]) / radius              # (n, 1, S), (n, S, 1)
    x, y = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()                       # (n, S, S)
    outside = torch.cat([shape(u, v) for shape, u, v in zip(_SHAPES.values(), x.split(per_class), y.split(per_class))])
    inside = (0.5 - outside * radius * size).clamp(0, 1)[:, None]          # (n, 1, S, S), a soft edge one pixel wide

    if domain == "source":
        ground = uniform(0, 1, 3, 1, 1)                                    # (n, 3, 1, 1)
        shape = torch.remainder(ground + uniform(0.3, 0.7, 3, 1, 1), 1)    # at least 0.3 away in every channel
        pictures = ground + inside * (shape - ground)
    else:
        cloud = F.interpolate(uniform(-1, 1, 1, 6, 6), size=(size, size), mode="bicubic", align_corners=False)
        pictures = 0.7 + 0.22 * cloud - 0.4 * inside
        pictures = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        pictures = pictures + 0.05 * torch.randn(pictures.shape, generator=chance)
        pictures = pictures.expand(-1, 3, -1, -1)
    return (255 * pictures.clamp(0, 1)).round().to(torch.uint8), labels
