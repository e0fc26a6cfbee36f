"""Datasets, episodes and augmentation."""
import math

import pytest
import torch
from conftest import from_environment, same

import data
from data import five_views, jitter, load, plain, random_crop, resize, support_batches, toy_pictures


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


@pytest.mark.parametrize("augment, count", [("none", 4), ("crop", 4), ("views", 20)])
def test_batches_of_an_episode_are_its_own(augment, count):
    images, labels = torch.randint(256, (2, 4, 3, 40, 40), dtype=torch.uint8), torch.arange(4).expand(2, -1)
    both, alone = (support_batches(images[e:], labels[e:], augment, 3, 32, [(1, 0), (1, 1)][e:])[1] for e in (0, 1))
    for step in range(3):
        x, y = both(step)
        assert x.shape == (2, count, 3, 32, 32) and y.tolist() == [list(range(4)) * (count // 4)] * 2
        assert torch.equal(x[1], alone(step)[0][0])
    assert torch.equal(both(0)[0], both(1)[0]) == (augment != "crop"), "a fresh crop in every step"


def test_minibatches_go_through_the_whole_set_before_they_repeat():
    images = 40 * torch.arange(6, dtype=torch.uint8).view(1, 6, 1, 1, 1).expand(-1, -1, 3, 8, 8)       # a picture says its label
    labels = torch.arange(6)[None]
    batches = support_batches(images, labels, "none", 6, 8, [0], minibatch=2)[1]
    seen = [batches(step)[1].flatten().tolist() for step in range(6)]
    assert sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) == list(range(6)) and seen[:3] != seen[3:]
    x, y = batches(0)
    same(x[..., 0, 0, 0] * data.STD[0] + data.MEAN[0], 40 * y / 255)


@pytest.mark.parametrize("name, classes, pictures", [("eurosat", 10, 1000), ("cropdiseases", 8, 320), ("isic", 7, 210), ("chestx", 6, 224)])
def test_the_four_datasets_in_their_real_layouts(name, classes, pictures, tmp_path):
    root = from_environment("ATHA_DATA", "a folder with the datasets' samples").resolve()
    folder = data.DATASETS[name][0]
    (tmp_path / folder).mkdir()
    for part in (root / folder).iterdir():                                # links, so that the cache is not written beside the samples
        (tmp_path / folder / part.name).symlink_to(part)
    pool = load(name, tmp_path)
    assert len(pool.classes) == classes and len(pool.images) == pictures and pool.images.float().std() > 10
    again = load(name, tmp_path)
    drawn = torch.stack([again.episode(n)[1] for n in range(16)])
    assert torch.equal(again.images[drawn], pool.images[drawn])
