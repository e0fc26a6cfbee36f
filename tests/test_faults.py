"""Faults, scale-out and determinism: what runs survive, and what they say about what they cannot use (no network needed)."""
import csv
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import HERE, REPO, TOY_CLIP, command, from_environment
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.io import write_png

import clip_min
import data
import train

QUICK = "--shot 1 --query 5 --steps 2 --episodes 12 --batch 2 --dropout 0 --augment none".split()
BARE = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


# ------------------------------------------------------------------------------------------ processes that start at once

@pytest.fixture(scope="module")
def fork():
    """start(function, *arguments): a process that has torch loaded already, so that it starts in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**BARE, "PYTHONPATH": f"{REPO}{os.pathsep}{HERE}"}.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()
    started = []

    def start(function, *args):
        started.append(context.Process(target=function, args=args))
        started[-1].start()
        return started[-1]
    start.barrier = context.Barrier
    yield start
    for process in started:
        process.kill()


def run_child(argv: list, log: Path, cache: Path, environment: dict = {}):
    """train.py in a forked process, its text appended to a log."""
    into(log, cache)
    os.environ.update(environment)
    sys.exit(train.main([str(a) for a in argv]))


def load_child(barrier, log: Path, cache: Path, url: str | None = None, sha256: str = "", folder: Path | None = None):
    """Load a folder of pictures, or weights from a server, at the same moment as another process."""
    into(log, cache)
    clip_min.VIT_B16_URL, clip_min.VIT_B16_SHA256 = url, sha256
    barrier.wait()
    data.load(str(folder)) if folder else clip_min.load()


def into(log: Path, cache: Path):
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    data.CACHE = clip_min.CACHE = cache
    torch.set_num_threads(1)


def draw_pictures(root: Path, classes: int = 6, each: int = 12) -> Path:
    images, labels = TOY
    for label in range(classes):
        (root / data.TOY_CLASSES[label]).mkdir(parents=True)
        for i, image in enumerate(images[labels == label][:each]):
            write_png(image, str(root / data.TOY_CLASSES[label] / f"{i:02d}.png"))
    return root


TOY = data.toy_pictures(12)


@pytest.fixture(scope="module")
def world(tmp_path_factory, fork):
    """A folder of pictures, a command on it, and what it gives when nobody disturbs it."""
    root = tmp_path_factory.mktemp("world")
    pictures = draw_pictures(root / "pictures")
    argv = ["--dataset", pictures, "--weights", TOY_CLIP, *QUICK]
    for out in ("first", "whole"):                                       # the first one decodes the pictures
        begun, run = time.monotonic(), fork(run_child, [*argv, "--out", root / out], root / f"{out}.log", root / "cache")
        run.join(120)
        assert run.exitcode == 0, (root / f"{out}.log").read_text()
    return SimpleNamespace(pictures=pictures, argv=argv, cache=root / "cache", seconds=time.monotonic() - begun,
                           records=records(root / "whole"), summary=summary(root / "whole.log"))


def records(out: Path) -> dict[int, dict]:
    """Every episode of a results folder, each of which must be there once, in lines that are whole."""
    found = [json.loads(line) for part in out.glob("*.jsonl") for line in part.read_bytes().split(b"\n")[:-1]]
    found = [r for r in found if "episode" in r]
    assert len({r["episode"] for r in found}) == len(found), "an episode is there twice"
    return {r["episode"]: r for r in found}


def summary(log: Path | str) -> str:
    """The one line that reports the run, without its time."""
    text = log.read_text() if isinstance(log, Path) else log
    lines = re.findall(r"^.* over \d+ episodes", text, re.MULTILINE)
    assert len(lines) == 1, text
    return lines[0]


def assert_same(got: dict, wanted: dict):
    """The same episodes with the same accuracies, and losses but for the last bits: of the same pictures."""
    assert {n: r["accuracy"] for n, r in got.items()} == {n: r["accuracy"] for n, r in wanted.items()}
    assert [got[n]["loss"] for n in wanted] == pytest.approx([r["loss"] for r in wanted.values()], rel=1e-3, abs=1e-5)


def said(error: str, *words: str):
    """One line for the user, no traceback, that holds the words."""
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in error, error
    for word in words:
        assert word in lines[0]


def refused(capsys, argv: list, *words: str):
    """The command line says in one line why it cannot do that, exit code 2."""
    capsys.readouterr()
    assert train.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ")
    said(error, *words)


# ------------------------------------------------------------------------------------------------ killed, and run again

def test_killed_at_random_moments(world, fork, tmp_path):
    """At least 20 kills, at least 5 of them among the episodes, in the decoding too: run again, nothing is lost or done twice."""
    chance, kills, midway, rounds, longest = random.Random(0), 0, 0, 0, 1.2 * world.seconds
    while kills < 20 or midway < 5:
        out, finished = tmp_path / f"out{rounds}", False
        while not finished:
            run = fork(run_child, [*world.argv, "--out", out], tmp_path / "log", tmp_path / "cache")
            run.join(chance.uniform(0, longest))
            run.kill()
            run.join()
            assert run.exitcode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
            finished, longest = run.exitcode == 0, 1.01 * longest
            kills += not finished
            midway += not finished and out.exists() and 0 < sum(p.read_bytes().count(b"\n") - 1 for p in out.iterdir()) < 12
        assert_same(records(out), world.records)
        assert all(p.read_bytes().endswith(b"\n") for p in out.iterdir())
        rounds += 1
    assert summary("\n".join((tmp_path / "log").read_text().splitlines()[-1:])) == world.summary


def test_half_a_line_is_dropped(world, tmp_path, monkeypatch):
    """A file cut anywhere, in its first line too: the run goes on from the lines that are whole."""
    monkeypatch.setattr(data, "CACHE", world.cache)
    argv = [*map(str, world.argv), "--out", str(tmp_path)]
    assert train.main(argv) == 0
    part, = tmp_path.iterdir()
    whole, first = part.read_bytes(), part.read_bytes().index(b"\n")
    for length in (0, first // 2, first, first + 1, first + 9, len(whole) // 2, len(whole) - 20, len(whole) - 1):
        part.write_bytes(whole[:length])
        assert train.main(argv) == 0
        assert_same(records(tmp_path), world.records)
        assert part.read_bytes().startswith(whole[: whole[:length].rfind(b"\n") + 1])


def test_stopped_by_ctrl_c(world, fork, tmp_path):
    run = fork(run_child, [*world.argv, "--episodes", 5000, "--out", tmp_path / "out"], tmp_path / "log", world.cache)
    wait_for(lambda: "episodes/s" in (tmp_path / "log").read_text() if (tmp_path / "log").exists() else False)
    os.kill(run.pid, signal.SIGINT)
    run.join(60)
    assert run.exitcode == 130 and "Traceback" not in (tmp_path / "log").read_text()
    assert len(records(tmp_path / "out")) >= 2


def test_two_runs_on_one_file(world, tmp_path, capsys):
    """The second one is refused while the first is at it."""
    results = train.Results(tmp_path / "x", {"a": 1})
    with pytest.raises(train.UsageError, match="another run is writing it"):
        train.Results(tmp_path / "x", {"a": 1})
    results.file.close()
    train.Results(tmp_path / "x", {"a": 1})


def wait_for(true, seconds: float = 120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------- several processes

def torchrun(argv: list, cache: Path) -> subprocess.Popen:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", REPO / "train.py"]
    return subprocess.Popen([str(a) for a in [*start, *argv]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, **BARE, "XDG_CACHE_HOME": str(cache.parent)})


def test_torchrun_shares_out(world, fork, tmp_path):
    """Two processes, then three, then one on the same files: each episode once, one summary, that of a single process."""
    out = ["--out", tmp_path / "out"]
    text, error = torchrun([*world.argv, "--episodes", 7, *out], tmp_path / "atha").communicate(timeout=240)
    first = {n: world.records[n] for n in range(7)}
    mean, interval = train.mean_and_interval([r["accuracy"] for r in first.values()])
    assert summary(text).endswith(f": {mean:.2f} ± {interval:.2f} % over 7 episodes"), error
    assert_same(records(tmp_path / "out"), first)
    assert [sum(b'"episode"' in line for line in p.read_bytes().splitlines()) for p in sorted((tmp_path / "out").iterdir())] == [4, 3]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [{"RANK": str(r), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for r in range(3)]
    three = [fork(run_child, [*world.argv, *out], tmp_path / "three", world.cache, rank) for rank in ranks]
    for run in three:
        run.join(120)
    assert [run.exitcode for run in three] == [0, 0, 0], (tmp_path / "three").read_text()
    assert_same(records(tmp_path / "out"), world.records)
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    run = fork(run_child, [*world.argv, *out], tmp_path / "one", world.cache)
    run.join(120)
    assert summary(tmp_path / "three") == summary(tmp_path / "one") == world.summary
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_a_rank_that_dies(world, tmp_path):
    """The run fails at once: the other rank, which has hours to go, is stopped."""
    run = torchrun([*world.argv, "--episodes", 100000, "--out", tmp_path / "out"], world.cache)
    parts = [tmp_path / "out" / f"pictures-5way-1shot-atha-paper-seed1.part{rank}.jsonl" for rank in (0, 1)]
    wait_for(lambda: run.poll() is not None or all(p.exists() and p.read_bytes().count(b"\n") > 1 for p in parts))
    parents = {int(p.parent.name): int(p.read_text().rpartition(")")[2].split()[1]) for p in Path("/proc").glob("[0-9]*/stat")}
    ranks = [pid for pid, parent in parents.items() if parent == run.pid]
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGKILL)
    text, _ = run.communicate(timeout=120)
    assert run.returncode != 0 and " over " not in text
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


# ------------------------------------------------------------------------------------------------------- determinism

@pytest.fixture
def episodes(world, tmp_path, monkeypatch):
    """run(*options): the records of the world's command with further options, in this process."""
    monkeypatch.setattr(data, "CACHE", world.cache)

    def run(*options):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert train.main([*map(str, world.argv), *map(str, options), "--out", str(out)]) == 0
        return records(out)
    return run


def test_same_command_twice(episodes):
    """Dropout and augmentation on: the same but for times; another seed: other episodes."""
    chance = ["--dropout", 0.25, "--augment", "crop"]
    one, two, other = ([r | {"seconds": 0} for r in episodes(*chance, *seed).values()] for seed in ((), (), ("--seed", 2)))
    assert one == two
    assert [r["loss"] for r in one] != [r["loss"] for r in other]


@pytest.mark.parametrize("method", ["atha+tir", "svl"])
def test_batch_size_changes_nothing(method, episodes):
    """With augmentation, whose chance is each episode's own."""
    want = episodes("--method", method, "--augment", "crop", "--batch", 1)
    for batch in (5, 12):
        assert_same(episodes("--method", method, "--augment", "crop", "--batch", batch), want)


def test_episodes_of_a_seed():
    """An episode's pictures depend on seed and number alone, and are all distinct."""
    pool = data.Pool(*TOY, data.TOY_CLASSES, "")
    drawn = {(seed, n): torch.cat([p.flatten() for p in pool.episode(n, 5, 1, 5, seed)[1:]]).tolist() for seed in (1, 2) for n in range(50)}
    assert len({tuple(rows) for rows in drawn.values()}) == 100
    for (seed, n), rows in reversed(drawn.items()):
        assert len(set(rows)) == 30
        assert torch.cat([p.flatten() for p in pool.episode(n, 5, 1, 5, seed)[1:]]).tolist() == rows


# ---------------------------------------------------------------------------------------------------------- the cache

def whole_cache(pool: data.Pool, folder: Path) -> bool:
    """Whether the pool holds the folder's pictures."""
    files = sorted(folder.glob("*/*.png"))
    return torch.equal(pool.images, torch.stack([data.decode(f, 256) for f in files])) and \
        [pool.classes[label] for label in pool.labels] == [f.parent.name for f in files]


def test_two_processes_build_one_cache(world, fork, tmp_path):
    barrier = fork.barrier(2)
    runs = [fork(load_child, barrier, tmp_path / f"log{i}", tmp_path / "cache", None, "", world.pictures) for i in (0, 1)]
    for run in runs:
        run.join(60)
    logs = [(tmp_path / f"log{i}").read_text() for i in (0, 1)]
    assert [run.exitcode for run in runs] == [0, 0], logs
    assert sum("decoding pictures" in log for log in logs) == 1
    data.CACHE, before = tmp_path / "cache", sorted((tmp_path / "cache").iterdir())
    assert whole_cache(data.load(str(world.pictures)), world.pictures)
    assert len([p for p in before if not p.name.endswith(".lock")]) == 1


def cut(share: float):
    return lambda cache, folder: os.truncate(cache, int(share * cache.stat().st_size))


DAMAGE = {
    "cut to nothing": cut(0), "cut in the header": cut(0.00001), "cut in the pictures": cut(0.7),
    "not ours": lambda cache, folder: cache.write_bytes(b"x" * 1000),
    "another's safetensors": lambda cache, folder: save_file({"images": torch.zeros(3)}, cache),
    "a picture changed": lambda cache, folder: write_png(TOY[0][-1], str(folder / "circle" / "00.png")),
    "a picture more": lambda cache, folder: write_png(TOY[0][-1], str(folder / "circle" / "new.png")),
    "a picture less": lambda cache, folder: (folder / "circle" / "00.png").unlink(),
    "a class renamed": lambda cache, folder: (folder / "circle").rename(folder / "zero"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_cache_is_rebuilt(damage, tmp_path, own_cache, capsys):
    folder = draw_pictures(tmp_path / "pictures", classes=2, each=3)
    data.load(str(folder))
    place, = own_cache.glob("*.safetensors")
    DAMAGE[damage](place, folder)
    assert "decoding" in capsys.readouterr().err
    assert whole_cache(data.load(str(folder)), folder)
    assert "decoding" in capsys.readouterr().err
    assert whole_cache(data.load(str(folder)), folder)
    assert "decoding" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_read_only_dataset(number, tmp_path, own_cache, monkeypatch, capsys):
    """Permissions do not bind root, and a mount needs it: so `open` refuses to write there, with the error of each case."""
    folder = draw_pictures(tmp_path / "CropDiseases" / "train", classes=2, each=3)

    def guarded(path, mode="r", *rest, **named):
        if "r" not in mode and tmp_path in Path(path).parents:
            raise OSError(number, os.strerror(number), str(path))
        return open(path, mode, *rest, **named)
    monkeypatch.setattr(data, "open", guarded, raising=False)
    before = sorted(tmp_path.rglob("*"))
    assert whole_cache(data.load("cropdiseases", tmp_path), folder)
    said(re.sub(r"\rdecoding.*", "", capsys.readouterr().err), str(tmp_path / "CropDiseases"), str(own_cache))
    assert whole_cache(data.load("cropdiseases", tmp_path), folder)
    assert capsys.readouterr().err == "" and sorted(tmp_path.rglob("*")) == before
