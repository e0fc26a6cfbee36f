"""Datasets, episodes and augmentation."""
import json
import math
import os
import shutil

import pytest
import torch
from conftest import draw_pictures, from_environment, same
from PIL import Image

import data
from data import Batches, DataError, five_views, jitter, load, plain, random_crop, resize, toy_pictures


def test_an_episode_depends_on_seed_and_number_alone():
    pool = load("toy")
    classes, support, query = pool.episode(7, way=4, shot=3, query=5, seed=2)
    assert classes.shape == (4,) and support.shape == (4, 3) and query.shape == (4, 5) and len(set(classes.tolist())) == 4
    rows = torch.cat([support, query], 1)
    assert len(set(rows.flatten().tolist())) == 32 and (pool.labels[rows] == classes[:, None]).all()
    again = load("toy").episode(7, way=4, shot=3, query=5, seed=2)
    assert all(torch.equal(a, b) for a, b in zip((classes, support, query), again))
    assert not torch.equal(support, pool.episode(8, 4, 3, 5, 2)[1]) and not torch.equal(support, pool.episode(7, 4, 3, 5, 3)[1])
    counts = torch.bincount(torch.cat([pool.episode(n)[0] for n in range(400)]), minlength=16)
    assert counts.min() > 80, "every class is drawn: 125 times of 400 on average"


def test_toy_pictures_are_the_same_every_time_and_differ_by_domain():
    a, labels = toy_pictures(3)
    assert torch.equal(a, toy_pictures(3)[0]) and a.shape == (48, 3, 48, 48) and a.dtype == torch.uint8 and labels.tolist() == sorted(labels.tolist())
    grey = toy_pictures(3, domain="target")[0].float()
    assert grey.std(1).max() == 0 and toy_pictures(3, domain="source")[0].float().std(1).max() > 50


def test_random_crop_of_a_ramp_shows_where_it_was_taken():
    ramp = torch.linspace(0, 1, 64).expand(2, 3, 64, 64)                  # brightness is the x coordinate
    u = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.9], [1.0, 0.5, 0.5, 0.5, 0.1]])   # half the area, at the left; all of it, flipped
    crop, flipped = random_crop(ramp, u, 32)[:, 0, 16]
    assert crop[0] == pytest.approx(0, abs=0.02) and crop[-1].item() == pytest.approx(math.sqrt(0.5), abs=0.02)
    assert flipped[0] > 0.98 and flipped[-1] < 0.02


def test_random_crops_stay_inside_and_within_their_limits():
    torch.manual_seed(0)
    x, y = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="xy")
    crops = random_crop(torch.stack([x, y, 0 * x]).expand(500, 3, 64, 64), torch.rand(500, 5), 32)
    width, height = (crops[:, c].flatten(1).max(1).values - crops[:, c].flatten(1).min(1).values for c in (0, 1))
    assert (width * height).min() > 0.43 and 0.7 < (width / height).min() < 0.8 and 1.25 < (width / height).max() < 1.43
    assert crops[:, :2].mean((2, 3)).std(0).min() > 0.03, "from left to right and from top to bottom"


def test_resizing_averages_and_the_centre_crop_leaves_the_margin_out():
    images = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    images[..., ::2] = 200
    assert resize(images, 64).std().item() < 0.01, "antialiased: a fine grid becomes grey"
    ramp = (torch.arange(257) / 257 * 255).to(torch.uint8).expand(1, 3, 257, 257)
    middle = plain(ramp, 224, centre=True)
    same(middle[0, 0, 0], ((ramp[0, 0, 0, 16:240] / 255) - data.MEAN[0]) / data.STD[0])


def test_five_views_are_what_they_are_called():
    torch.manual_seed(0)
    images, u = torch.rand(2, 3, 3, 32, 32), torch.rand(2, 3, 8)
    u[..., :2] = 0.5                                                      # angle 0
    views = five_views(images, u).unflatten(1, (5, 3))
    same(views[:, 0], images)
    same(views[:, 2], images, 1e-4)
    same(views[:, 1], jitter(images.flip(-1), 0.6 + 0.8 * u[..., 2:5]), 1e-4)
    same(views[:, 3], jitter(images, 0.6 + 0.8 * u[..., 5:]), 1e-4)
    same(views[:, 4], images.flip(-1))
    turned = five_views(torch.ones(1, 1, 3, 64, 64), torch.ones(1, 1, 8))[0, 2]
    assert turned.eq(0).float().mean().item() == pytest.approx(3 - 2 * 2 ** 0.5, abs=0.02), "45 degrees, its corners black"


def test_jitter_by_one_changes_nothing_and_colour_zero_is_grey():
    images = torch.rand(4, 3, 8, 8)
    same(jitter(images, torch.ones(4, 3)), images)
    grey = jitter(images, torch.tensor([1.0, 1, 0]).expand(4, 3))
    assert grey.std(1).max() < 1e-6
    same(jitter(images / 2, torch.tensor([1.5, 1, 1]).expand(4, 3)), 0.75 * images)
    assert jitter(images, torch.tensor([1.0, 0, 1]).expand(4, 3)).flatten(1).std(1).max() < 1e-6


def naive(images, labels, augment, step, *, steps, size, seeds, minibatch):
    """A step of support sets (E, M, 3, S, S), one picture after another: (pictures, labels, un-augmented, rows shown)."""
    found = []
    for seed, pictures, own in zip(seeds, images, labels):
        m = len(pictures)
        shown = 5 * m if augment == "views" else m
        rows = torch.arange(shown)
        if 0 < minibatch < shown:
            epochs = math.ceil(steps * minibatch / shown)
            order = torch.rand(epochs, shown, generator=data.generator("order", seed)).argsort(-1).flatten()
            rows = order[step * minibatch: (step + 1) * minibatch]
        if augment == "views":
            u = torch.rand(m, 8, generator=data.generator("views", seed))[None]
            whole = data.normalize(five_views(resize(pictures, size)[None], u)[0])[rows]
        elif augment == "crop":
            u = torch.rand(steps, m, 5, generator=data.generator("crop", seed))[step, : len(rows)]
            large = resize(pictures, min(pictures.shape[-1], math.ceil(size * 2 ** 0.5)))[rows]
            whole = data.normalize(torch.stack([random_crop(x[None], v[None], size)[0] for x, v in zip(large, u)]))
        else:
            whole = plain(pictures, size, centre=True)[rows]
        found.append((whole, own[rows % m], plain(pictures, size, augment == "none")[rows % m], rows))
    return [torch.stack(part) for part in zip(*found)]


@pytest.mark.parametrize("augment", ["none", "crop", "views"])
@pytest.mark.parametrize("minibatch", [0, 3, 4, 7, 100])
def test_batches_are_those_of_the_formulas_written_naively(augment, minibatch):
    """Bit for bit, in any order of steps."""
    torch.manual_seed(0)
    pool, support = torch.randint(256, (20, 3, 40, 40), dtype=torch.uint8), torch.stack([torch.randperm(20)[:6] for _ in range(2)])
    labels, seeds = torch.randint(3, (2, 6)), [(1, 0), (1, 1)]
    batches = Batches(pool, support, labels, size=24, steps=9, seeds=seeds, augment=augment, minibatch=minibatch)
    for step in (0, 1, 5, 2, 8, 8, 0):
        wanted = naive(pool[support], labels, augment, step, steps=9, size=24, seeds=seeds, minibatch=minibatch)
        pictures, truth = batches(step)
        still, still_labels = batches.plain(step)
        assert torch.equal(pictures, wanted[0]) and torch.equal(truth, wanted[1]) and torch.equal(batches.rows(step), wanted[3])
        assert torch.equal(still_labels, labels.gather(1, batches.rows(step)[:, : still.shape[1]] % 6))
        if batches.mini:
            assert torch.equal(still, wanted[2]) and pictures.shape[1] == minibatch
        else:
            assert torch.equal(still, plain(pool[support], 24, augment == "none")) and still.shape[1] == 6


def test_batches_of_a_task_are_its_own_whatever_trains_beside_it():
    pool, support = torch.randint(256, (9, 3, 40, 40), dtype=torch.uint8), torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    labels = torch.arange(4).expand(2, -1)
    both, alone = (Batches(pool, support[e:], labels[e:], size=32, steps=3, seeds=[(1, 0), (1, 1)][e:], minibatch=2) for e in (0, 1))
    for step in range(3):
        assert torch.equal(both(step)[0][1], alone(step)[0][0]) and torch.equal(both(step)[1][1], alone(step)[1][0])
    assert not torch.equal(both.crops[:, 0], both.crops[:, 1]), "a fresh crop in every step"


def test_minibatches_go_through_the_whole_set_before_they_repeat():
    pool = 40 * torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(-1, 3, 8, 8)       # a picture says its label
    every = torch.arange(6)[None]
    batches = Batches(pool, every, every, size=8, steps=6, seeds=[0], augment="none", minibatch=2)
    seen = [batches(step)[1].flatten().tolist() for step in range(6)]
    assert sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) == list(range(6)) and seen[:3] != seen[3:]
    x, y = batches(0)
    same(x[..., 0, 0, 0] * data.STD[0] + data.MEAN[0], 40 * y / 255)


class Counted:
    """A pool's pictures that count how many of them are taken."""
    def __init__(self, images):
        self.images, self.most, self.shape = images, 0, images.shape

    def __getitem__(self, rows):
        self.most = max(self.most, rows.numel() if isinstance(rows, torch.Tensor) else 0)
        return self.images[rows]


def test_minibatches_take_no_more_pictures_than_they_show():
    images, support = Counted(torch.zeros(60, 3, 8, 8, dtype=torch.uint8)), torch.arange(60).view(2, 30)
    for augment in ("none", "crop", "views"):
        batches = Batches(images, support, support % 3, size=8, steps=40, seeds=[0, 1], augment=augment, minibatch=4)
        for step in range(40):
            batches(step)
            batches.plain(step)
    assert images.most == 8
    assert not any(isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel() > 2 * 40 * 4 * 5 for t in vars(batches).values())


def test_the_smallest_area_of_a_crop_and_its_interpolation_are_options():
    x, y = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="xy")
    pool = torch.stack([x, y, 0 * x]).to(torch.uint8).expand(400, 3, 256, 256)
    for area, bicubic in ((0.5, False), (0.08, False), (0.08, True)):
        batches = Batches(pool, torch.arange(400)[None], torch.zeros(1, 400, dtype=torch.int64), size=16, steps=1, seeds=[0],
                          area=area, bicubic=bicubic, mean=(0, 0, 0), std=(1, 1, 1))
        seen = batches(0)[0][0]
        spans = [seen[:, c].flatten(1).max(1).values - seen[:, c].flatten(1).min(1).values for c in (0, 1)]
        areas = spans[0] * spans[1] * (16 / 15) ** 2
        assert 0.85 * area < areas.min() < 1.2 * area + 0.02 and areas.max() > 0.9
        assert 0 <= seen.min() and seen.max() <= 1, "bicubic overshoots, pictures do not"
    edge = torch.zeros(1, 1, 3, 64, 64)
    edge[..., 32:] = 1
    u = torch.tensor([0.0, 0.5, 0.5, 0.5, 0.9]).expand(1, 1, 5)
    assert not torch.equal(random_crop(edge, u, 64, 0.08, bicubic=True), random_crop(edge, u, 64, 0.08))


# ------------------------------------------------------------------------------------------------ tasks and splits

def test_a_task_is_the_episode_and_knows_its_labels():
    pool = load("toy")
    task = pool.task(3, way=4, shot=2, query=5, seed=7)
    classes, support, query = pool.episode(3, 4, 2, 5, 7)
    assert torch.equal(task.classes, classes) and torch.equal(task.support, support.flatten()) and torch.equal(task.query, query.flatten())
    assert torch.equal(pool.labels[task.support], classes[task.labels]) and torch.equal(pool.labels[task.query], classes[task.truth])


def pictures_of(root, counts):
    """Toy pictures below root: {"folder": number}, each of its own brightness, which is returned by path."""
    for at, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (20 * at + i,) * 3).save(root / folder / f"{i}.png")
    return root


def entries(folder, label, name, numbers):
    return [[f"{folder}/{i}.png", label, name] for i in numbers]


def dtd(root):
    """A made DTD with a split as CoOp writes it: 3 classes of 6, 5 and 4 pictures, 3, 2 and 1 of them in train."""
    pictures_of(root / "DTD" / "images", {"banded": 6, "dotted": 5, "lined": 4})
    parts = {"train": (3, 2, 1), "val": (1, 1, 1), "test": (2, 2, 2)}
    split, start = {}, [0, 0, 0]
    for part, counts in parts.items():
        split[part] = []
        for label, (name, count) in enumerate(zip(("banded", "dotted", "lined"), counts)):
            split[part] += entries(name, label, name, range(start[label], start[label] + count))
            start[label] += count
    file = root / "DTD" / "split_zhou_DescribableTextures.json"
    file.write_text(json.dumps(split))
    return file, split


def test_a_split_of_ones_own(tmp_path, capsys):
    _, split = dtd(tmp_path)
    pool = load("dtd", tmp_path)
    assert pool.classes == ["banded", "dotted", "lined"] and pool.prompt == "{} texture." and len(pool.images) == 12, "val is left out"
    brightness = {picture: 20 * label + int(picture.split("/")[1][0]) for part in split.values() for picture, label, _ in part}
    for part, rows in (("train", pool.train), ("test", pool.test)):
        assert pool.images[rows, 0, 0, 0].tolist() == [brightness[picture] for picture, _, _ in split[part]]
        assert pool.labels[rows].tolist() == [label for _, label, _ in split[part]]
    assert sorted(torch.cat(pool.rows).tolist()) == sorted(pool.train.tolist())
    capsys.readouterr()
    tasks = [pool.split(shot, seed) for shot in (1, 2, 3) for seed in (1, 2, 3)]
    for task, shot in zip(tasks, (1, 1, 1, 2, 2, 2, 3, 3, 3)):
        assert task.classes.tolist() == [0, 1, 2] and torch.equal(task.query, pool.test) and torch.equal(task.truth, pool.labels[pool.test])
        assert task.labels.tolist() == [c for c in range(3) for _ in range(shot)]
        assert torch.equal(pool.labels[task.support], task.labels) and set(task.support.tolist()) <= set(pool.train.tolist())
        assert len(set(task.support.tolist())) == sum(min(shot, n) for n in (3, 2, 1)) or shot > 2, "no picture twice where there are enough"
    assert capsys.readouterr().err.count("'lined' has 1 pictures to learn from, not 2") == 1, "said once"
    assert len({tuple(task.support.tolist()) for task in tasks[3:6]}) > 1 and torch.equal(pool.split(1, 2).support, tasks[1].support)
    assert len(pool.episode(0, 2, 1, 2)[2]) == 2, "episodes are drawn from everything"


def test_a_class_that_cannot_be_learned_and_a_dataset_without_a_split_are_refused(tmp_path):
    file, split = dtd(tmp_path)
    split["train"] = split["train"][:-1]
    file.write_text(json.dumps(split))
    with pytest.raises(DataError, match="'lined' has no picture in the training split"):
        load("dtd", tmp_path).split(1, 1)
    with pytest.raises(DataError, match="no split of its own.*split_zhou_.*CoOp"):
        load("toy").split(1, 1)


SPLITS = {    # what is done to the split, what must be said
    "a picture that is not there": (lambda s: s["test"].append(["dotted/99.png", 1, "dotted"]), "dotted/99.png.*No such file"),
    "labels from 1": (lambda s: [e.__setitem__(1, e[1] + 1) for part in s.values() for e in part], "3 labels are not 0 to 2: one is 3"),
    "a label left out": (lambda s: [e.__setitem__(1, 2 * e[1]) for part in s.values() for e in part], "labels are not 0 to 2: one is 4"),
    "one label, two names": (lambda s: s["test"][0].__setitem__(2, "lined"), "label 0 two names, 'banded' and 'lined'"),
    "two labels, one name": (lambda s: [e.__setitem__(2, "same") for part in s.values() for e in part], "two labels one name"),
    "in train and test": (lambda s: s["test"].append(s["train"][0]), "'images/banded/0.png' in train and in test"),
    "of two classes": (lambda s: s["test"].append(["banded/0.png", 2, "lined"]), "'images/banded/0.png' as 'banded' and as 'lined'"),
    "outside": (lambda s: s["test"].append(["../../x.png", 1, "dotted"]), "'images/../../x.png', which is outside"),
    "an absolute path": (lambda s: s["test"].append(["/etc/passwd", 1, "dotted"]), "'/etc/passwd', which is outside"),
    "a label in words": (lambda s: s["test"].append(["dotted/4.png", "1", "dotted"]), "does not hold train and test lists"),
    "a label of true": (lambda s: s["test"].append(["dotted/4.png", True, "dotted"]), "does not hold train and test lists"),
    "a short row": (lambda s: s["test"].append(["dotted/4.png", 1]), "does not hold train and test lists"),
    "no test": (lambda s: s.pop("test"), "does not hold train and test lists"),
    "an empty test": (lambda s: s.update(test=[]), "no pictures of train or of test"),
    "a NUL": (lambda s: s["test"].append(["dotted/\0.png", 1, "dotted"]), "null (byte|character)"),
    "a name of no text": (lambda s: [e.__setitem__(2, "\ud800") for part in s.values() for e in part if e[1] == 1], "UTF-8"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_a_split_that_cannot_be_used_is_named(case, tmp_path, own_cache):
    file, split = dtd(tmp_path)
    SPLITS[case][0](split)
    file.write_text(json.dumps(split))
    with pytest.raises(DataError, match=SPLITS[case][1]) as e:
        load("dtd", tmp_path)
    assert str(file) in str(e.value) or case == "a name of no text"
    assert [p.name for p in (tmp_path / "DTD").iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("content", ["", "[]", "[" * 100000, '{"train": 3, "test": 4}', "\xff", "3", '{"train": "abc", "test": "abc"}'])
def test_a_split_file_of_something_else(content, tmp_path):
    file, _ = dtd(tmp_path)
    file.write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match="does not hold|cannot read|no pictures"):
        load("dtd", tmp_path)


def test_a_split_that_is_not_there_is_refused_before_the_dataset_is_looked_at(tmp_path, monkeypatch):
    split, got = tmp_path / "eurosat" / "split_zhou_EuroSAT.json", []
    monkeypatch.setattr(data, "fetch", lambda *_: got.append(1))
    data.check("eurosat", tmp_path)                                       # it would be fetched
    for there in (False, True):
        with pytest.raises(DataError, match="CoOp") as e:
            data.check("eurosat", tmp_path, split=True)
        assert f"needs {split}, " in str(e.value) if there else f"needs {tmp_path / 'eurosat'}" in str(e.value)
        (tmp_path / "eurosat" / "2750").mkdir(parents=True, exist_ok=True)
    split.touch()
    data.check("eurosat", tmp_path, split=True)
    for name in ("toy", "isic", "cropdiseases", "chestx"):
        with pytest.raises(DataError, match="no split of its own"):
            data.check(name, tmp_path, split=True)
    assert got == []


def test_what_is_missing_is_named_with_where_to_get_it(tmp_path):
    for name in data.FSL[:3] + data.FSL[4:]:
        known = data.DATASETS[name]
        with pytest.raises(DataError) as e:
            data.check(name, tmp_path)
        assert str(tmp_path / known.folder) in str(e.value) and "CoOp" in known.source or name == "aircraft"
        (tmp_path / known.folder).mkdir()
        with pytest.raises(DataError) as e:
            data.check(name, tmp_path)
        assert str(tmp_path / known.folder / known.needs[0]) in str(e.value) and known.source in str(e.value)
        for part in known.needs:
            (tmp_path / known.folder / part).mkdir(exist_ok=True)
        data.check(name, tmp_path)
    assert len(data.FSL) == len(set(data.FSL)) == 11 and set(data.FSL) | set(data.PAPERS) == set(data.DATASETS)
    assert all(data.DATASETS[name].prompt.count("{}") == 1 for name in data.FSL)


@pytest.mark.parametrize("test", ["test", "val"])
def test_class_folders_in_train_and_test(test, tmp_path, capsys):
    counts = {"train/ant": 3, "train/bee": 2, f"{test}/bee": 2, f"{test}/ant": 1, "other/ant": 5}
    pool = load(str(pictures_of(tmp_path / "own", counts)))
    assert pool.classes == ["ant", "bee"] and len(pool.images) == 8
    assert pool.images[pool.train, 0, 0, 0].tolist() == [0, 1, 2, 20, 21] and pool.labels[pool.train].tolist() == [0, 0, 0, 1, 1]
    assert pool.images[pool.test, 0, 0, 0].tolist() == [60, 40, 41] and pool.labels[pool.test].tolist() == [0, 1, 1]
    assert [len(rows) for rows in pool.rows] == [3, 2]
    classes = pictures_of(tmp_path / "classes", {"train": 3, "test": 2})                   # vehicles and examinations, say
    assert load(str(classes)).test is None and load(str(classes)).classes == ["test", "train"]
    assert data.load_folder(tmp_path / "own").fingerprint == pool.fingerprint


def test_aircraft_and_imagenet(tmp_path):
    planes = pictures_of(tmp_path / "fgvc_aircraft", {"images": 4})
    for path in sorted((planes / "images").iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"), quality=100)
    for name, lines in (("variants", ["F/A-18", "DC 3"]), ("images_variant_train", ["2 DC 3", "0 F/A-18"]),
                        ("images_variant_val", []), ("images_variant_test", ["1 DC 3"])):
        (planes / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    pool = load("aircraft", tmp_path)
    assert pool.classes == ["F/A-18", "DC 3"] and pool.labels[pool.train].tolist() == [1, 0] and pool.images[pool.test, 0, 0, 0].tolist() == [1]
    (planes / "images_variant_test.txt").write_text("1 DC 4\n")
    with pytest.raises(DataError, match="'images/1.jpg' is of 'DC 4', which is none"):
        load("aircraft", tmp_path)
    net = pictures_of(tmp_path / "imagenet", {"train/n02": 2, "train/n01": 2, "val/n01": 1, "val/n02": 1})
    (net / "classnames.txt").write_text("n01 great white shark\nn02 hen\n")
    pool = load("imagenet", tmp_path)
    assert pool.classes == ["great white shark", "hen"] and pool.images[pool.test, 0, 0, 0].tolist() == [40, 60]
    (net / "classnames.txt").write_text("n01 sunglasses\nn02 sunglasses\n")
    assert load("imagenet", tmp_path).classes == ["sunglasses", "sunglasses n02"], "as two of the real ones are"
    (net / "classnames.txt").write_text("n01 great white shark\n")
    with pytest.raises(DataError, match="is of 'n02', which is none of its classes"):
        load("imagenet", tmp_path)


def eurosat_sample(tmp_path):
    """The sample in links, so that nothing is written beside it."""
    root = from_environment("ATHA_DATA", "a folder with the datasets' samples").resolve()
    (tmp_path / "eurosat").mkdir()
    (tmp_path / "eurosat" / "2750").symlink_to(root / "eurosat" / "2750")
    return tmp_path / "eurosat"


def test_eurosat_with_a_split_has_the_episodes_that_it_had_without(tmp_path):
    folder = eurosat_sample(tmp_path)
    before = load("eurosat", tmp_path)
    assert before.test is None
    classes = sorted(p.name for p in (folder / "2750").iterdir())
    order = {c: sorted(p.name for p in (folder / "2750" / c).iterdir()) for c in classes}
    parts = {"train": slice(0, 50), "val": slice(50, 70), "test": slice(70, 100)}
    split = {part: [[f"{c}/{name}", classes[::-1].index(c), data.EUROSAT.get(c, c)] for c in classes for name in order[c][span]]
             for part, span in parts.items()}
    (folder / "split_zhou_EuroSAT.json").write_text(json.dumps(split))
    pool = load("eurosat", tmp_path)
    assert pool.fingerprint == before.fingerprint and pool.test is not None
    assert all(torch.equal(a, b) for n in range(5) for a, b in zip(pool.episode(n), before.episode(n)))
    assert len(pool.train) == 500 and len(pool.test) == 300 and pool.prompt == "a centered satellite photo of {}."
    task = pool.split(4, 1)
    assert len(task.support) == 40 and torch.equal(task.truth, torch.arange(10).repeat_interleave(30))
    picture = data.decode(folder / "2750" / classes[0] / order[classes[0]][70], 64)
    assert torch.equal(pool.images[pool.test[0]], picture)
    first, names = f"2750/{split['train'][0][0]}", [data.EUROSAT.get(c, c) for c in classes]
    split["train"][0][1:] = split["train"][-1][1:]
    (folder / "split_zhou_EuroSAT.json").write_text(json.dumps(split))
    with pytest.raises(DataError, match=f"{first!r} as {names[0]!r} and as {names[-1]!r}"):
        load("eurosat", tmp_path)


def test_fingerprints_hold_what_they_should(tmp_path, monkeypatch):
    """A copy with other times, or the folder spelled otherwise, is the same dataset; another picture or class is not."""
    first = draw_pictures(tmp_path / "a", 2, 2)
    shutil.copytree(first, tmp_path / "b", copy_function=shutil.copy)
    for path in (tmp_path / "b").rglob("*.png"):
        os.utime(path, (1, 1))
    one = load(str(first)).fingerprint
    assert load(str(tmp_path / "b")).fingerprint == load(f"{first}/../a/").fingerprint == one
    monkeypatch.chdir(tmp_path)
    assert load("a").fingerprint == one
    (tmp_path / "b" / "circle").rename(tmp_path / "b" / "zero")
    assert load(str(tmp_path / "b")).fingerprint != one
    (first / "circle" / "00.png").unlink()
    assert load(str(first)).fingerprint != one


@pytest.mark.parametrize("name, classes, pictures", [("eurosat", 10, 1000), ("cropdiseases", 8, 320), ("isic", 7, 210), ("chestx", 6, 224)])
def test_the_four_datasets_in_their_real_layouts(name, classes, pictures, tmp_path):
    root = from_environment("ATHA_DATA", "a folder with the datasets' samples").resolve()
    folder = data.DATASETS[name].folder
    (tmp_path / folder).mkdir()
    for part in (root / folder).iterdir():                                # links, so that the cache is not written beside the samples
        (tmp_path / folder / part.name).symlink_to(part)
    pool = load(name, tmp_path)
    assert len(pool.classes) == classes and len(pool.images) == pictures and pool.images.float().std() > 10
    again = load(name, tmp_path)
    drawn = torch.stack([again.episode(n)[1] for n in range(16)])
    assert torch.equal(again.images[drawn], pool.images[drawn])
