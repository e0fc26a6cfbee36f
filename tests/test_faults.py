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


def wait_for(true, seconds: float = 20):
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


def test_two_processes_build_one_cache(world, fork, tmp_path, monkeypatch):
    barrier = fork.barrier(2)
    runs = [fork(load_child, barrier, tmp_path / f"log{i}", tmp_path / "cache", None, "", world.pictures) for i in (0, 1)]
    for run in runs:
        run.join(60)
    logs = [(tmp_path / f"log{i}").read_text() for i in (0, 1)]
    assert [run.exitcode for run in runs] == [0, 0], logs
    assert sum("decoding pictures" in log for log in logs) == 1
    before = sorted((tmp_path / "cache").iterdir())
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
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


# ------------------------------------------------------------------------------------------------------------ weights

WHOLE = TOY_CLIP.read_bytes()
SHA256 = hashlib.sha256(WHOLE).hexdigest()
ANSWERS = {    # what a server may send: status line and headers, body
    "404": (b"HTTP/1.0 404 Not Found\r\n\r\n", b"gone"),
    "broken off": (b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(WHOLE), WHOLE[:-1000]),
    "short, no length": (b"HTTP/1.0 200 OK\r\n\r\n", WHOLE[:-1000]),
    "another file": (b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n", b"not ours\n"),
    "a page": (b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n", b"<html>log in first</html>"),
    "no HTTP": (b"220 ftp ready\r\n", b"\x00\xff\r\n" * 9),
    "silence": (b"", b""),
    "no length but words": (b"HTTP/1.0 200 OK\r\nContent-Length: much\r\n\r\n", b"x"),
    "whole": (b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(WHOLE), WHOLE),
}


@pytest.fixture
def server():
    """A loopback server: .answer is what it sends next, .asked how often, .url where; .hold stops it in mid-file until set."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            http.asked += 1
            head, body = ANSWERS[http.answer]
            self.wfile.write(head + body[: len(body) // 2])
            self.wfile.flush()
            http.hold.wait(60)
            self.wfile.write(body[len(body) // 2:])

        def log_message(self, *_):
            pass
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.answer, http.asked, http.hold, http.url = "whole", 0, threading.Event(), f"http://127.0.0.1:{http.server_port}/file"
    http.hold.set()
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    yield http
    http.hold.set()
    http.shutdown()


@pytest.mark.parametrize("answer", [name for name in ANSWERS if name != "whole"])
def test_download_that_fails(answer, server, own_cache, monkeypatch, capsys):
    """One line says so, nothing half-written stays, an older file is left alone, and the next attempt works."""
    monkeypatch.setattr(clip_min, "VIT_B16_URL", server.url)
    monkeypatch.setattr(clip_min, "VIT_B16_SHA256", SHA256)
    own_cache.mkdir(parents=True)
    (own_cache / "older").write_text("kept")
    server.answer = answer
    assert train.main(["--dataset", "eurosat", "--data", str(own_cache)]) == 2
    announced, *error = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line and " MB of " not in line]
    assert announced.startswith("downloading ") and server.url in announced
    said("\n".join(error), "train.py: error: ", server.url)
    assert [p.name for p in own_cache.iterdir() if p.suffix != ".lock"] == ["older"]
    server.answer = "whole"
    clip, _ = clip_min.load()
    assert clip.config == clip_min.load(TOY_CLIP)[0].config
    assert capsys.readouterr().err.count("downloading") == 1
    asked = server.asked
    clip_min.load()
    assert server.asked == asked and capsys.readouterr().err == ""
    assert sorted(p.name for p in own_cache.iterdir() if p.suffix != ".lock") == ["ViT-B-16.safetensors", "older"]


def test_download_killed(server, fork, own_cache, tmp_path, monkeypatch):
    """Killed in mid-file: the next attempt works, and leaves nothing of the first one."""
    monkeypatch.setattr(clip_min, "VIT_B16_URL", server.url)
    monkeypatch.setattr(clip_min, "VIT_B16_SHA256", SHA256)
    server.hold.clear()
    run = fork(load_child, fork.barrier(1), tmp_path / "log", own_cache, server.url, SHA256)
    wait_for(lambda: any(p.name.endswith(".part") for p in own_cache.glob("*")))
    run.kill()
    run.join()
    server.hold.set()
    assert not (own_cache / "ViT-B-16.safetensors").exists()
    clip_min.load()
    assert [p.name for p in own_cache.iterdir() if p.suffix != ".lock"] == ["ViT-B-16.safetensors"]


def test_two_processes_download_at_once(server, fork, own_cache, tmp_path):
    """As torchrun's do on a new machine: both get the weights."""
    barrier = fork.barrier(4)
    runs = [fork(load_child, barrier, tmp_path / f"log{i}", own_cache, server.url, SHA256) for i in range(4)]
    for run in runs:
        run.join(60)
    assert [run.exitcode for run in runs] == [0] * 4, [(tmp_path / f"log{i}").read_text()[-500:] for i in range(4)]
    assert [p.name for p in own_cache.iterdir() if p.suffix != ".lock"] == ["ViT-B-16.safetensors"]


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def altered(change) -> bytes:
    """The toy CLIP with its tensors changed, as a safetensors file."""
    from safetensors.torch import save
    tensors = load_file(TOY_CLIP)
    change(tensors)
    return save(tensors)


WEIGHTS = {    # file name, what it holds, what must be said
    "empty": ("w.safetensors", lambda: b"", "cannot read"),
    "cut in the header": ("w.safetensors", lambda: WHOLE[:100], "cannot read"),
    "cut in a tensor": ("w.safetensors", lambda: WHOLE[:-5], "cannot read"),
    "garbage": ("w.safetensors", lambda: random.Random(0).randbytes(5000), "cannot read"),
    "a page": ("w.pt", lambda: b"<html>", "cannot read"),
    "a zip of nothing": ("w.pt", lambda: b"PK" + bytes(500), "cannot read"),
    "another model": ("w.safetensors", lambda: altered(lambda t: (t.clear(), t.update(bert=torch.zeros(3)))), "visual.conv1.weight is missing"),
    "vision alone": ("w.safetensors", lambda: altered(lambda t: [t.pop(n) for n in [*t] if not n.startswith("visual.")]), "token_embedding.weight"),
    "a tensor less": ("w.safetensors", lambda: altered(lambda t: t.pop("ln_final.bias")), "ln_final.bias is missing"),
    "a block less": ("w.safetensors", lambda: altered(lambda t: [t.pop(n) for n in [*t] if n.startswith("transformer.resblocks.0.")]), "transformer.resblocks."),
    "misshapen": ("w.safetensors", lambda: altered(lambda t: t.update({"visual.ln_pre.weight": torch.zeros(7)})), "visual.ln_pre.weight has shape (7,)"),
    "flat": ("w.safetensors", lambda: altered(lambda t: t.update({"visual.conv1.weight": torch.zeros(7)})), "visual.conv1.weight has shape (7,)"),
    "square": ("w.safetensors", lambda: altered(lambda t: t.update({"visual.proj": torch.zeros(3, 3)})), "visual."),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_cannot_be_used(case, tmp_path, capsys):
    name, content, words = WEIGHTS[case]
    (tmp_path / name).write_bytes(content())
    refused(capsys, ["--dataset", "toy", "--weights", tmp_path / name], words, str(tmp_path / name))


@pytest.mark.parametrize("write", [lambda evil, file: file.write_bytes(pickle.dumps(evil)), lambda evil, file: torch.save({"a": evil}, file),
                                   lambda evil, file: torch.save({"a": evil}, file, _use_new_zipfile_serialization=False)])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_pickled_code_is_not_run(write, name, tmp_path, capsys):
    write(Evil(tmp_path / "marker"), tmp_path / name)
    refused(capsys, ["--dataset", "toy", "--weights", tmp_path / name], "cannot read", str(tmp_path / name))
    assert not (tmp_path / "marker").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()                                # it would have been


@pytest.mark.parametrize("damage", [lambda packed: packed[:40], lambda packed: packed[:30] + b"\xff" * 9 + packed[39:], lambda packed: b"\xff" * 40])
def test_merges_that_cannot_be_read(damage, tmp_path):
    import gzip
    text = "#version\n" + "".join(f"{a} {b}\n" for a in "abcdefgh" for b in "abcdefgh")
    (tmp_path / "merges").write_bytes(damage(gzip.compress(text.encode())))
    with pytest.raises(clip_min.WeightsError, match="merges"):
        clip_min.read_merges(tmp_path / "merges")


def test_too_few_merges(tmp_path):
    """Ids would be shifted, the end of text too: CLIP would go wrong without a word."""
    weights = load_file(TOY_CLIP)
    weights["token_embedding.weight"] = torch.zeros(514 + 10, weights["token_embedding.weight"].shape[1])
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "merges.txt").write_text("#version\na b\nc d\n")
    with pytest.raises(clip_min.WeightsError, match="merges"):
        clip_min.load(tmp_path)


# ----------------------------------------------------------------------------------------------------------- pictures

def rotated(path: Path):
    """Left half red, right half blue; EXIF says that it lies on its side: upright, red is on top."""
    image, exif = Image.new("RGB", (64, 64), (0, 0, 255)), Image.Exif()
    image.paste((255, 0, 0), (0, 0, 32, 64))
    exif[0x0112] = 6
    image.save(path, exif=exif, quality=95)


def plain_picture(mode: str, colour, size=(30, 20)):
    return lambda path: Image.new(mode, size, colour).save(path)


ODD = {    # how to make it, and the mean colour that it must have
    "grey.png": (plain_picture("L", 100), (100, 100, 100)),
    "grey.jpg": (plain_picture("L", 100), (100, 100, 100)),
    "palette.png": (lambda path: Image.new("RGB", (9, 9), (200, 30, 40)).convert("P", palette=Image.Palette.ADAPTIVE).save(path), (200, 30, 40)),
    "bits.png": (plain_picture("1", 1), (255, 255, 255)),
    "alpha.png": (plain_picture("RGBA", (200, 30, 40, 255)), (200, 30, 40)),
    "grey-alpha.png": (plain_picture("LA", (50, 255)), (50, 50, 50)),
    "cmyk.jpg": (plain_picture("CMYK", (0, 255, 255, 0)), (254, 0, 0)),
    "sixteen.png": (plain_picture("I;16", 100 * 256 + 17), (100, 100, 100)),
    "sixteen.tif": (plain_picture("I;16", 100 * 256 + 17), (100, 100, 100)),
    "sixteen-big-endian.tif": (plain_picture("I;16B", 100 * 256 + 17), (100, 100, 100)),
    "one.png": (plain_picture("RGB", (9, 8, 7), (1, 1)), (9, 8, 7)),
    "wide.png": (plain_picture("RGB", (9, 8, 7), (20000, 10)), (9, 8, 7)),
    "high.jpg": (plain_picture("RGB", (90, 90, 90), (10, 20000)), (90, 90, 90)),
    "loud.JPEG": (plain_picture("RGB", (90, 90, 90)), (90, 90, 90)),
    "rotated.jpg": (rotated, (127, 0, 127)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures(name, tmp_path):
    make, wanted = ODD[name]
    (tmp_path / "a").mkdir()
    make(tmp_path / "a" / name)
    image = data.load(str(tmp_path)).images[0].float()
    assert image.shape == (3, 256, 256)
    assert image.mean((1, 2)).tolist() == pytest.approx(wanted, abs=2)
    if name == "rotated.jpg":
        assert image[0, :100].mean() > 240 and image[2, -100:].mean() > 240


def with_broken_exif(folder: Path) -> bytes:
    """A JPEG whose orientation stands beside a number written as text."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0100] = 6, 64
    Image.new("RGB", (8, 8)).save(folder / "b.jpeg", exif=exif)
    content = bytearray((folder / "b.jpeg").read_bytes())
    content[content.index(b"\x01\x00\x00\x04") + 3 if b"\x01\x00\x00\x04" in content else content.index(b"\x00\x01\x04\x00") + 2] = 2
    (folder / "b.jpeg").unlink()
    return bytes(content)


def noise(folder: Path, share: float = 1) -> bytes:
    write_png(torch.randint(256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), str(folder / "n.png"))
    Image.open(folder / "n.png").save(folder / "n.jpeg")
    content = (folder / "n.jpeg").read_bytes()
    (folder / "n.png").unlink(), (folder / "n.jpeg").unlink()
    return content[: int(share * len(content))]


BROKEN = {"truncated": lambda folder: noise(folder, 0.6), "header only": lambda folder: noise(folder, 0.02), "zero bytes": lambda folder: b"",
          "text": lambda folder: b"Not a picture\n" * 99, "damaged EXIF": with_broken_exif}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_picture_is_named(case, tmp_path, own_cache, capsys):
    """Nothing half-decoded stays, and with the picture gone the next attempt works."""
    folder = draw_pictures(tmp_path / "pictures", classes=2, each=2)
    bad = folder / "circle" / "bad.jpg"
    bad.write_bytes(BROKEN[case](tmp_path))
    refused(capsys, ["--dataset", folder, "--weights", TOY_CLIP, "--way", 2], "cannot decode", str(bad))
    assert [p.suffix for p in own_cache.iterdir()] in ([], [".lock"])
    bad.unlink()
    assert whole_cache(data.load(str(folder)), folder)


def test_broken_bytes_are_named(tmp_path):
    """Any byte of a picture may be wrong: it is decoded, or named; nothing else is raised."""
    chance, pictures = random.Random(0), []
    exif = Image.Exif()
    exif[0x0112], exif[0x010e], exif[0x011a] = 6, "words", 72.0
    for format, options in (("jpeg", {"exif": exif}), ("png", {"exif": exif}), ("tiff", {}), ("webp", {"exif": exif}), ("bmp", {}), ("ppm", {})):
        Image.new("RGB", (12, 10), (9, 99, 200)).save(tmp_path / "whole", format, **options)
        pictures.append((tmp_path / "whole").read_bytes())
    for n in range(1500):
        content = bytearray(pictures[n % len(pictures)])
        for _ in range(chance.choice((1, 1, 3))):
            content[chance.randrange(min(len(content), 300))] = chance.randrange(256)
        (tmp_path / "x.jpg").write_bytes(content)
        try:
            assert data.decode(tmp_path / "x.jpg", 8).shape == (3, 8, 8)
        except data.DataError as e:
            assert str(tmp_path / "x.jpg") in str(e) and "\n" not in str(e)


def test_what_is_no_picture_is_left_out(tmp_path, capsys):
    folder = draw_pictures(tmp_path / "pictures", classes=2, each=2)
    for name in (".hidden.jpg", "._00.png", ".DS_Store", "Thumbs.db", "notes.txt", "00.png.part"):
        (folder / "circle" / name).write_text("no picture")
    for name in ("empty", "words", ".git", "circle/inner.jpg"):
        (folder / name).mkdir()
    for stray in (folder / "words" / "readme.md", folder / ".git" / "x.png", folder / "stray.png", folder / "labels.csv"):
        stray.write_text("no picture")
    pool = data.load(str(folder))
    assert pool.classes == ["circle", "square"] and pool.labels.tolist() == [0, 0, 1, 1]
    first, *_ = capsys.readouterr().err.splitlines()
    assert "empty" in first and "words" in first and ".git" not in first


def isic(root: Path) -> Path:
    (root / "ISIC2018_Task3_Training_Input").mkdir(parents=True)
    (root / "ISIC2018_Task3_Training_GroundTruth").mkdir()
    for i in range(7):
        Image.new("RGB", (8, 8)).save(root / "ISIC2018_Task3_Training_Input" / f"ISIC_{i}.jpg")
    table = root / "ISIC2018_Task3_Training_GroundTruth" / "ISIC2018_Task3_Training_GroundTruth.csv"
    return write(table, [["image", *data.ISIC], *([f"ISIC_{i}", *(float(i == j) for j in range(7))] for i in range(7))])


def chestx(root: Path) -> Path:
    (root / "images_001" / "images").mkdir(parents=True)
    for i in range(7):
        Image.new("L", (8, 8)).save(root / "images_001" / "images" / f"{i}.png")
    rows = [[f"{i}.png", name, 60] for i, name in enumerate(data.CHESTX)]
    return write(root / "Data_Entry_2017.csv", [["Image Index", "Finding Labels", "Age"], *rows, ["7.png", "No Finding", 1], ["8.png", "Mass|Hernia", 1]])


def write(table: Path, rows: list[list]) -> Path:
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return table


def replaced(old: str, new: str):
    return lambda table: table.write_text(table.read_text().replace(old, new))


TABLES = {    # layout, folder, what is done to the table, what must be named
    "isic: column": ("isic", "ISIC", replaced("BKL", "XXX"), "BKL"),
    "isic: two labels": ("isic", "ISIC", replaced("ISIC_3,0.0", "ISIC_3,1.0"), "ISIC_3"),
    "isic: unknown label": ("isic", "ISIC", replaced("ISIC_3,0.0,0.0,0.0,1.0", "ISIC_3,0.0,0.0,0.0,0.0"), "ISIC_3"),
    "isic: short row": ("isic", "ISIC", replaced("ISIC_3,0.0,0.0,0.0,1.0,0.0,0.0,0.0", "ISIC_3"), "ISIC_3"),
    "isic: picture": ("isic", "ISIC", replaced("ISIC_3,", "ISIC_99,"), "ISIC_99"),
    "isic: no table": ("isic", "ISIC", lambda table: table.unlink(), "GroundTruth.csv"),
    "isic: no text": ("isic", "ISIC", lambda table: table.write_bytes(b"\xff\xfe\x00" * 99), "GroundTruth.csv"),
    "isic: open quote": ("isic", "ISIC", lambda table: table.write_text(table.read_text() + '"' + "x" * 200000), "GroundTruth.csv"),
    "isic: nothing": ("isic", "ISIC", lambda table: table.write_text(""), "image"),
    "chestx: column": ("chestx", "ChestX", replaced("Finding Labels", "Findings"), "Finding Labels"),
    "chestx: unknown label": ("chestx", "ChestX", replaced("Nodule", "Nodul"), "Nodul"),
    "chestx: picture": ("chestx", "ChestX", replaced("3.png", "99.png"), "99.png"),
}


@pytest.mark.parametrize("case", TABLES)
def test_broken_tables(case, tmp_path, capsys):
    name, folder, damage, word = TABLES[case]
    table = globals()[name](tmp_path / folder)
    assert len(data.load(name, tmp_path).classes) == 7
    damage(table)
    refused(capsys, ["--dataset", name, "--data", tmp_path, "--weights", TOY_CLIP], word, str(table))


# ---------------------------------------------------------------------------------------------------------- tokenizer

def random_text(chance: random.Random, length: int) -> str:
    """Any code points, lone surrogates and controls too, and what means something to a tokenizer."""
    draws = (lambda: chr(chance.randrange(0x110000)), lambda: chr(chance.randrange(0xd800, 0xe000)), lambda: chr(chance.randrange(256)),
             lambda: chance.choice("abc ABC 123 '"), lambda: chance.choice(("&#xd800;", "&amp;", "<|endoftext|>", "</w>", "²", "İ", "\u0301", "\x00", "'ll")))
    draw = chance.choice((*draws, lambda: chance.choice(draws)()))
    return "".join(draw() for _ in range(length))


@pytest.mark.parametrize("real", [False, True])
def test_tokenizer_takes_any_text(real):
    """10,000 random texts, some of 10,000 characters."""
    tokenizer = clip_min.Tokenizer(from_environment("ATHA_MERGES", "OpenAI's BPE merges file") if real else [])
    chance = random.Random(0)
    texts = [random_text(chance, 10000 if n % 1000 == 0 else int(chance.expovariate(1 / 15))) for n in range(10000)]
    for start in range(0, 10000, 500):
        rows = tokenizer(texts[start: start + 500])
        assert rows.shape == (500, 77) and rows.dtype == torch.int64
        assert rows.min() >= 0 and (rows[:, 0] == tokenizer.start).all() and (rows.max(1).values == tokenizer.end).all()
    for text in texts[1:200]:
        assert tokenizer.decode(tokenizer.encode(text)).encode()         # is text again


@pytest.mark.parametrize("real", [False, True])
def test_tokenizer_gives_text_back(real):
    tokenizer = clip_min.Tokenizer(from_environment("ATHA_MERGES", "OpenAI's BPE merges file") if real else [])
    chance, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyzàéîõüßñøłžабвгдежя中文字日本語αβγδ"
    for _ in range(500):
        words = " ".join("".join(chance.choices(letters, k=chance.randrange(1, 12))) for _ in range(chance.randrange(1, 9)))
        assert tokenizer.decode(tokenizer.encode(words.title() if chance.random() < 0.1 else words)) == words.title().lower() or words == words
    for text in ("A photo of a Sea Lake, isn't it?", "Melanocytic Nevus (2018) 😀 é!", "tabs\tand\nlines  and   spaces"):
        assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == re.sub(r"\s", "", text.lower())


# ----------------------------------------------------------------------------------------------------------- bad input

def no_network(*_, **__):
    raise AssertionError("network access that nothing asked for")


FEW = ["--dataset", "toy", *QUICK]
BAD = {    # arguments, words that must be in the one line
    "method": (["--dataset", "toy", "--method", "nonsense"], ["'nonsense'", "clip-lora", "atha-push"]),
    "joined": (["--dataset", "toy", "--method", "zero-shot+atha"], ["zero-shot+atha"]),
    "dataset": (["--dataset", "nonsense"], ["'nonsense'", "eurosat", "chestx"]),
    "one dataset of two": (["--dataset", "toy", "nonsense"], ["'nonsense'", "eurosat"]),
    "chestx not there": (["--dataset", "chestx", "--data", "{tmp}"], ["{tmp}/ChestX", "nih-chest-xrays"]),
    "cropdiseases half there": (["--dataset", "cropdiseases", "--data", "{tmp}/half"], ["{tmp}/half/CropDiseases/train"]),
    "eurosat half there": (["--dataset", "eurosat", "--data", "{tmp}/half"], ["{tmp}/half/eurosat/2750"]),
    "no pictures": (["--dataset", "{tmp}/half"], ["{tmp}/half"]),
    "weights not there": (["--dataset", "toy", "--weights", "{tmp}/none.pt"], ["{tmp}/none.pt"]),
    "classes": ([*FEW, "--way", 17], ["17", "16"]),
    "pictures": ([*FEW, "--query", 300], ["circle", "200", "301"]),
    "NaN": ([*FEW, "--lr", 1e30], ["not a number", "0", "1", "--lr"]),
    "NaN in the last step": ([*FEW, "--steps", 1, "--lr", 1e38, "--lora-alpha", 1e30], ["not a number", "--lr"]),
    "fit: no folder": (["--fit", "{tmp}/none", "--save", "{tmp}/x", "--weights", TOY_CLIP], ["{tmp}/none"]),
    "predict: not ours": (["--predict", TOY_CLIP, "{tmp}", "--weights", TOY_CLIP], ["toy_clip.safetensors"]),
    "predict: no file": (["--predict", "{tmp}/none", "{tmp}", "--weights", TOY_CLIP], ["{tmp}/none"]),
    "out is a file": ([*FEW, "--out", "{tmp}/file"], ["{tmp}/file"]),
    "names": (["--fit", "{tmp}/pics", "--save", "{tmp}/x", "--names", "{tmp}/none", "--weights", TOY_CLIP], ["{tmp}/none"]),
    "device": (["--dataset", "toy", "--device", "nonsense"], ["nonsense"]),
    **{f"{name} {value}": ([*FEW, name, value], [name]) for name, value in
       (("--episodes", 0), ("--episodes", -1), ("--way", 0), ("--shot", 0), ("--query", 0), ("--batch", -1), ("--steps", 0), ("--rank", 0))},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clip_min, "download", no_network)
    monkeypatch.setattr(data, "fetch", no_network)
    monkeypatch.setattr(data, "toy_pictures", lambda each: (TOY[0][:, None].expand(-1, 17, -1, -1, -1).flatten(0, 1), TOY[1].repeat_interleave(17)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half" / "CropDiseases").mkdir(parents=True)
    (tmp_path / "half" / "eurosat").mkdir()
    (tmp_path / "file").write_text("a file")
    if case == "names":
        draw_pictures(tmp_path / "pics", 2, 2)
    argv, words = ([str(a).replace("{tmp}", str(tmp_path)) for a in part] for part in BAD[case])
    if "--out" not in argv:
        argv += ["--out", str(tmp_path / "out")]
    try:
        refused(capsys, argv, *words)
    except SystemExit as stop:                                           # argparse, which prints the usage first
        assert stop.code == 2
        said(capsys.readouterr().err.splitlines()[-1], "train.py: error: ", *words)


def test_results_of_another_recipe(episodes, world, tmp_path, capsys):
    """Named and refused, the file left as it was; a run that failed before its first episode stands in nobody's way."""
    argv = [*map(str, world.argv), "--out", str(tmp_path / "out")]
    refused(capsys, [*argv, "--lr", 1e30], "not a number")
    refused(capsys, [*argv, "--query", 100], "100")
    assert train.main(argv) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    refused(capsys, [*argv, "--lr", 1e-3], "lr 0.0002", "0.001", "--out")
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    part, = before
    part.write_bytes(before[part].replace(b'"steps": 2', b'"steps": 2, "older": 1', 1))
    refused(capsys, argv, "older")


def test_as_a_user_sees_it(tmp_path):
    run = command("--dataset", "nonsense", "--weights", TOY_CLIP, cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.startswith("train.py: error: ")
    said(run.stderr, "'nonsense'")


def test_no_network_and_nothing_written_elsewhere(tmp_path):
    """Only --data, --out and the cache folder change; no address is looked up, no connection opened."""
    places = {name: tmp_path / name for name in ("home", "tmp", "work", "data")}
    draw_pictures(places["data"] / "CropDiseases" / "train", each=6)
    for place in places.values():
        place.mkdir(exist_ok=True)
    guard = """import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        raise SystemExit(f"network access: {event} {args}")
sys.addaudithook(hook)
import train
for argv in (["--dataset", "cropdiseases", "--data", sys.argv[1]], ["--dataset", sys.argv[1] + "/CropDiseases/train"]):
    assert train.main([*argv, *sys.argv[2:]]) == 0"""
    before = {p for p in tmp_path.rglob("*")}
    run = subprocess.run([sys.executable, "-c", guard, str(places["data"]), "--weights", str(TOY_CLIP), *QUICK, "--episodes", "2"], cwd=places["work"],
                         capture_output=True, text=True, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), **BARE,
                                                              "HOME": str(places["home"]), "TMPDIR": str(places["tmp"])})
    assert run.returncode == 0, run.stderr
    new = {p.relative_to(tmp_path).as_posix() for p in set(tmp_path.rglob("*")) - before if p.is_file()}
    assert {name for name in new if not name.startswith(("work/results/", "home/.cache/atha/", "data/CropDiseases/.cropdiseases-256"))} == set()
    assert any(name.startswith("work/results/") for name in new) and any(name.startswith("home/.cache/atha/") for name in new)
