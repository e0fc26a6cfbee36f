"""Faults, scale-out and determinism: what a run survives, and what it says about what it cannot use. Needs no network."""
import csv, errno, gzip, hashlib, json, multiprocessing, os, pickle, random, re, signal, socket, struct, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import HERE, REPO, TOY_CLIP, command, from_environment
from PIL import Image
from safetensors.torch import load_file, save, save_file

import clip_min
import data
import train

QUICK = "--shot 1 --query 2 --steps 2 --episodes 8 --batch 2 --dropout 0 --augment none --method atha".split()
BARE = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
TOY = data.toy_pictures(12)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Nothing is written where the tests were started."""
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------ processes that start at once

@pytest.fixture(scope="module")
def fork():
    """start(function, *arguments): a process that has torch loaded already, so that it starts in milliseconds."""
    context, started = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload(["test_faults"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**BARE, "PYTHONPATH": f"{REPO}{os.pathsep}{HERE}"}.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()

    def start(function, *args):
        started.append(context.Process(target=function, args=args))
        started[-1].start()
        return started[-1]
    start.barrier = context.Barrier
    yield start
    for process in started:
        process.kill()


def into(log: Path, cache: Path):
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    data.CACHE = clip_min.CACHE = cache
    torch.set_num_threads(1)


def run_child(argv: list, log: Path, cache: Path, environment: dict = {}):
    """train.py in a forked process, its text appended to a log."""
    into(log, cache)
    os.environ.update(environment)
    sys.exit(train.main([str(a) for a in argv]))


def load_child(barrier, log: Path, cache: Path, folder: Path | None, url: str = "", sha256: str = ""):
    """Load a folder of pictures, else weights from a server, at the same moment as other processes."""
    into(log, cache)
    clip_min.VIT_B16_URL, clip_min.VIT_B16_SHA256 = url, sha256
    barrier.wait()
    data.load(str(folder)) if folder else clip_min.load()


def draw_pictures(root: Path, classes: int = 6, each: int = 12) -> Path:
    for label, i in ((label, i) for label in range(classes) for i in range(each)):
        (root / data.TOY_CLASSES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(TOY[0][12 * label + i].permute(1, 2, 0).numpy()).save(root / data.TOY_CLASSES[label] / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def world(tmp_path_factory, fork):
    """A folder of pictures, a command on it, and what it gives when nobody disturbs it."""
    root = tmp_path_factory.mktemp("world")
    argv = ["--dataset", draw_pictures(root / "pictures"), "--weights", TOY_CLIP, *QUICK]
    for out in ("first", "whole"):                                       # the first one decodes the pictures
        begun, run = time.monotonic(), fork(run_child, [*argv, "--out", root / out], root / f"{out}.log", root / "cache")
        run.join(120)
        assert run.exitcode == 0, (root / f"{out}.log").read_text()
    return SimpleNamespace(argv=argv, pictures=root / "pictures", cache=root / "cache", seconds=time.monotonic() - begun,
                           records=records(root / "whole"), summary=summary((root / "whole.log").read_text()))


def records(out: Path) -> dict[int, dict]:
    """Every episode of a results folder, each of which must be there once."""
    found = [json.loads(line) for part in out.glob("*.jsonl") for line in part.read_bytes().split(b"\n")[:-1]]
    found = [r for r in found if "episode" in r]
    assert len({r["episode"] for r in found}) == len(found), "an episode is there twice"
    return {r["episode"]: r for r in found}


def summary(text: str) -> str:
    """The one line that reports the run, without its time."""
    line, = re.findall(r"^.* over \d+ episodes", text, re.MULTILINE)
    return line


def assert_same(got: dict, wanted: dict):
    """The same episodes with exactly the same accuracies, and the same losses but for the last bits: the same pictures."""
    assert {n: r["accuracy"] for n, r in got.items()} == {n: r["accuracy"] for n, r in wanted.items()}
    assert [got[n]["loss"] for n in wanted] == pytest.approx([r["loss"] for r in wanted.values()], rel=1e-3, abs=1e-5)


def said(error: str, *words: object):
    """One line for the user, no traceback, that holds the words."""
    line, = [line for line in error.splitlines() if line.strip()]
    assert "Traceback" not in error
    for word in words:
        assert str(word) in line


def refused(capsys, argv: list, *words: object):
    """The command line says in one line why it cannot do that, exit code 2."""
    capsys.readouterr()
    assert train.main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: ")
    said(error, *words)


def wait_for(true, seconds: float = 60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------ killed, and run again

def test_killed_at_random_moments(world, fork, tmp_path):
    """At least 20 kills, in the decoding too, 5 or more among the episodes: run again, nothing is lost or done twice."""
    chance, kills, midway, rounds, longest = random.Random(0), 0, 0, 0, 0.8 * world.seconds
    while kills < 20 or midway < 5:
        out, finished, rounds = tmp_path / f"out{rounds}", False, rounds + 1
        while not finished:
            run = fork(run_child, [*world.argv, "--out", out], tmp_path / "log", tmp_path / "cache")
            run.join(chance.uniform(0, longest))
            run.kill()
            run.join()
            assert run.exitcode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
            finished, longest = run.exitcode == 0, 1.01 * longest
            kills += not finished
            midway += not finished and any(0 < p.read_bytes().count(b"\n") - 1 < 8 for p in out.glob("*"))
        assert_same(records(out), world.records)
        assert all(p.read_bytes().endswith(b"\n") for p in out.iterdir())
        assert summary((tmp_path / "log").read_text().splitlines()[-1]) == world.summary


def test_half_a_line_is_dropped(world, tmp_path, monkeypatch):
    """A file cut anywhere, in its first line too: the run goes on after the lines that are whole, which stay as they were."""
    monkeypatch.setattr(data, "CACHE", world.cache)
    argv = [*map(str, world.argv), "--out", str(tmp_path)]
    assert train.main(argv) == 0
    part, = tmp_path.iterdir()
    whole, first = part.read_bytes(), part.read_bytes().index(b"\n")
    for length in (first // 2, first, first + 9, len(whole) // 2, len(whole) - 1):
        part.write_bytes(whole[:length])
        assert train.main(argv) == 0
        assert_same(records(tmp_path), world.records)
        assert part.read_bytes().startswith(whole[: whole[:length].rfind(b"\n") + 1])


def test_two_runs_on_one_file(tmp_path):
    """The second one is refused while the first is at it."""
    with train.Results(tmp_path / "x", {"a": 1}).file, pytest.raises(train.UsageError, match="another run is writing it"):
        train.Results(tmp_path / "x", {"a": 1})
    train.Results(tmp_path / "x", {"a": 1}).file.close()


def test_results_of_another_recipe(world, tmp_path, monkeypatch, capsys):
    """Named and refused, the file left as it was; but a run that failed before its first episode stands in nobody's way."""
    monkeypatch.setattr(data, "CACHE", world.cache)
    argv = [*map(str, world.argv), "--out", str(tmp_path / "out")]
    refused(capsys, [*argv, "--lr", 1e30], "not a number")
    refused(capsys, [*argv, "--query", 100], "circle", "12", "101")
    assert train.main(argv) == 0
    part, = (tmp_path / "out").iterdir()
    before = part.read_bytes()
    refused(capsys, [*argv, "--lr", 1e-3], part, "lr 0.0002", "0.001", "--out")
    assert part.read_bytes() == before
    part.write_bytes(before.replace(b'"steps": 2', b'"steps": 2, "older": 1', 1))
    refused(capsys, argv, part, "older")


# -------------------------------------------------------------------------------------------------- several processes

def torchrun(argv: list, cache: Path) -> subprocess.Popen:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", REPO / "train.py"]
    return subprocess.Popen([str(a) for a in [*start, *argv]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, **BARE, "XDG_CACHE_HOME": str(cache)})


def test_torchrun_shares_out(world, fork, tmp_path):
    """Two processes, then three, then one on the same files: each episode once, one summary, that of a single process."""
    out = ["--out", tmp_path / "out"]
    text, error = torchrun([*world.argv, "--episodes", 7, *out], tmp_path / "cache").communicate(timeout=240)
    mean, interval = train.mean_and_interval([world.records[n]["accuracy"] for n in range(7)])
    assert summary(text).endswith(f": {mean:.2f} ± {interval:.2f} % over 7 episodes"), error
    assert_same(records(tmp_path / "out"), {n: world.records[n] for n in range(7)})
    assert [p.read_bytes().count(b'"episode"') for p in sorted((tmp_path / "out").iterdir())] == [4, 3]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for log, ranks in (("three", [{**address, "RANK": str(r)} for r in range(3)]), ("one", [{}])):
        before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
        runs = [fork(run_child, [*world.argv, *out], tmp_path / log, world.cache, rank) for rank in ranks]
        assert [run.join(120) or run.exitcode for run in runs] == [0] * len(ranks), (tmp_path / log).read_text()
        assert_same(records(tmp_path / "out"), world.records)
        assert summary((tmp_path / log).read_text()) == world.summary
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before      # the last had nothing to do


def test_a_rank_that_dies(world, tmp_path):
    """The run fails at once: the other rank, which has hours to go, is stopped."""
    run = torchrun([*world.argv, "--episodes", 100000, "--out", tmp_path / "out"], tmp_path / "cache")
    wait_for(lambda: run.poll() is not None or [p.read_bytes().count(b"\n") > 1 for p in (tmp_path / "out").glob("*")] == [True, True])
    parents = {int(p.parent.name): int(p.read_text().rpartition(")")[2].split()[1]) for p in Path("/proc").glob("[0-9]*/stat")}
    ranks = sorted(pid for pid, parent in parents.items() if parent == run.pid)
    assert len(ranks) == 2, run.communicate()
    os.kill(ranks[1], signal.SIGKILL)
    text, _ = run.communicate(timeout=120)
    assert run.returncode != 0 and " over " not in text
    assert not Path(f"/proc/{ranks[0]}").exists()


# -------------------------------------------------------------------------------------------------------- determinism

@pytest.fixture
def episodes(world, tmp_path, monkeypatch):
    """run(*options): the records of the world's command with further options, in this process."""
    def run(*options):
        monkeypatch.setattr(data, "CACHE", world.cache)
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        assert train.main([*map(str, world.argv), *map(str, options), "--out", str(out)]) == 0
        return records(out)
    return run


def test_same_command_twice(episodes):
    """With dropout and augmentation: the same but for times. Another seed: other pictures, which zero-shot tells apart."""
    one, two = (episodes("--dropout", 0.25, "--augment", "crop", "--episodes", 6) for _ in range(2))
    assert [r | {"seconds": 0} for r in one.values()] == [r | {"seconds": 0} for r in two.values()]
    one, two = (episodes("--method", "zero-shot", "--seed", seed) for seed in (1, 2))
    assert [r["accuracy"] for r in one.values()] != [r["accuracy"] for r in two.values()]


@pytest.mark.parametrize("method", ["atha+tir", "svl"])
def test_batch_size_changes_nothing(method, episodes):
    """With augmentation, whose chance is each episode's own."""
    one, five = (episodes("--method", method, "--augment", "crop", "--episodes", 6, "--batch", batch) for batch in (1, 5))
    assert_same(five, one)


# ---------------------------------------------------------------------------------------------------------- the cache

def holds(pool: data.Pool, folder: Path) -> bool:
    """Whether the pool is of the folder's pictures as they are now."""
    files = sorted(folder.glob("*/*.png"))
    return torch.equal(pool.images, torch.stack([data.decode(f, 256) for f in files])) and \
        [pool.classes[label] for label in pool.labels] == [f.parent.name for f in files]


def kept(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock")


def test_two_processes_build_one_cache(world, fork, tmp_path, monkeypatch):
    barrier, logs = fork.barrier(2), [tmp_path / "0", tmp_path / "1"]
    runs = [fork(load_child, barrier, log, tmp_path / "cache", world.pictures) for log in logs]
    assert [run.join(60) or run.exitcode for run in runs] == [0, 0]
    assert sum("decoding pictures" in log.read_text() for log in logs) == 1 and len(kept(tmp_path / "cache")) == 1
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    assert holds(data.load(str(world.pictures)), world.pictures)


def cut(share: float):
    return lambda cache, folder: os.truncate(cache, int(share * cache.stat().st_size))


DAMAGE = {
    "cut to nothing": cut(0), "cut in the header": cut(0.0001), "cut in the pictures": cut(0.7),
    "not ours": lambda cache, folder: cache.write_bytes(b"x" * 1000),
    "another's safetensors": lambda cache, folder: save_file({"images": torch.zeros(3)}, cache),
    "a picture changed": lambda cache, folder: Image.new("RGB", (48, 48)).save(folder / "circle" / "00.png"),
    "a picture more": lambda cache, folder: Image.new("RGB", (48, 48)).save(folder / "circle" / "new.png"),
    "a picture less": lambda cache, folder: (folder / "circle" / "00.png").unlink(),
    "a class renamed": lambda cache, folder: (folder / "circle").rename(folder / "zero"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_cache_is_rebuilt(damage, tmp_path, own_cache, capsys):
    """A cache cut short, or of other files, is noticed; one that fits is used."""
    folder = draw_pictures(tmp_path / "pictures", classes=2, each=3)
    data.load(str(folder))
    place, = own_cache.glob("*.safetensors")
    DAMAGE[damage](place, folder)
    capsys.readouterr()
    for decodes in (True, False):
        assert holds(data.load(str(folder)), folder)
        assert ("decoding" in capsys.readouterr().err) == decodes


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_read_only_dataset(number, tmp_path, own_cache, monkeypatch, capsys):
    """Permissions do not bind root, and a mount needs root: so `open` refuses to write there, with the error of each case."""
    folder = draw_pictures(tmp_path / "CropDiseases" / "train", classes=2, each=3)

    def guarded(path, mode="r", *rest, **named):
        if "r" not in mode and tmp_path in Path(path).parents:
            raise OSError(number, os.strerror(number), str(path))
        return open(path, mode, *rest, **named)
    monkeypatch.setattr(data, "open", guarded, raising=False)
    before = sorted(tmp_path.rglob("*"))
    assert holds(data.load("cropdiseases", tmp_path), folder)
    said(re.sub(r"\rdecoding.*", "", capsys.readouterr().err), tmp_path / "CropDiseases", own_cache)
    assert holds(data.load("cropdiseases", tmp_path), folder)
    assert capsys.readouterr().err == "" and sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------------------------ weights

WHOLE = TOY_CLIP.read_bytes()
SHA256, OK = hashlib.sha256(WHOLE).hexdigest(), b"HTTP/1.0 200 OK\r\n"
ANSWERS = {    # what a server may send: head and body
    "404": (b"HTTP/1.0 404 Not Found\r\n\r\n", b"gone"),
    "broken off": (OK + b"Content-Length: %d\r\n\r\n" % len(WHOLE), WHOLE[:-1000]),
    "short, no length": (OK + b"\r\n", WHOLE[:-1000]),
    "another file": (OK + b"Content-Length: 9\r\n\r\n", b"not ours\n"),
    "a page": (OK + b"Content-Type: text/html\r\n\r\n", b"<html>log in first</html>"),
    "no HTTP": (b"220 ftp ready\r\n", b"\x00\xff\r\n" * 9),
    "silence": (b"", b""),
    "a length in words": (OK + b"Content-Length: much\r\n\r\n", b"x"),
    "whole": (OK + b"Content-Length: %d\r\n\r\n" % len(WHOLE), WHOLE),
}


@pytest.fixture
def server(monkeypatch):
    """A loopback server for the weights: .answer is what it sends, .asked how often; it stops in mid-file while .go is not set."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            http.asked += 1
            head, body = ANSWERS[http.answer]
            self.wfile.write(head + body[: len(body) // 2])
            http.go.wait(60)
            self.wfile.write(body[len(body) // 2:])

        def log_message(self, *_):
            pass
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.answer, http.asked, http.go, http.url = "whole", 0, threading.Event(), f"http://127.0.0.1:{http.server_port}/file"
    http.go.set()
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(clip_min, "VIT_B16_URL", http.url)
    monkeypatch.setattr(clip_min, "VIT_B16_SHA256", SHA256)
    yield http
    http.go.set()
    http.shutdown()


@pytest.mark.parametrize("answer", [name for name in ANSWERS if name != "whole"])
def test_download_that_fails(answer, server, own_cache, tmp_path, capsys):
    """Two lines say what was fetched and why it failed, nothing half-written stays, the next attempt works and is the last."""
    server.answer, argv = answer, ["--dataset", draw_pictures(tmp_path / "p", 2, 2)]
    assert train.main([str(a) for a in argv]) == 2
    announced, *error = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line and not re.search(" MB of |decoding", line)]
    assert announced.startswith("downloading ") and server.url in announced
    said("\n".join(error), "train.py: error: ", server.url)
    assert not [name for name in kept(own_cache) if "ViT" in name] if own_cache.exists() else True
    server.answer = "whole"
    assert clip_min.load()[0].config == clip_min.load(TOY_CLIP)[0].config
    assert capsys.readouterr().err.count("downloading") == 1
    asked = server.asked
    clip_min.load()
    assert server.asked == asked and capsys.readouterr().err == ""
    assert [name for name in kept(own_cache) if "ViT" in name] == ["ViT-B-16.safetensors"]


def test_download_killed(server, fork, own_cache, tmp_path):
    """In mid-file: the next attempt works, and leaves nothing of the first one."""
    server.go.clear()
    barrier = fork.barrier(1)
    run = fork(load_child, barrier, tmp_path / "log", own_cache, None, server.url, SHA256)
    wait_for(lambda: any(p.suffix == ".part" for p in own_cache.glob("*")))
    run.kill()
    run.join()
    server.go.set()
    clip_min.load()
    assert kept(own_cache) == ["ViT-B-16.safetensors"]


def test_processes_download_at_once(server, fork, own_cache, tmp_path):
    """As torchrun's do on a new machine: all get the weights."""
    barrier = fork.barrier(4)
    runs = [fork(load_child, barrier, tmp_path / "log", own_cache, None, server.url, SHA256) for _ in range(4)]
    assert [run.join(60) or run.exitcode for run in runs] == [0] * 4, (tmp_path / "log").read_text()
    assert kept(own_cache) == ["ViT-B-16.safetensors"]


def altered(change):
    """The toy CLIP with its tensors changed, as bytes of a safetensors file."""
    def make():
        tensors = load_file(TOY_CLIP)
        return (change(tensors), save(tensors))[1]
    return make


def without(start: str):
    return altered(lambda t: [t.pop(name) for name in [*t] if name.startswith(start)])


WEIGHTS = {    # what the file holds, what must be said
    "empty": (lambda: b"", "cannot read"),
    "cut in the header": (lambda: WHOLE[:100], "cannot read"),
    "cut in a tensor": (lambda: WHOLE[:-5], "cannot read"),
    "garbage": (lambda: random.Random(0).randbytes(5000), "cannot read"),
    "a zip of nothing": (lambda: b"PK" + bytes(500), "cannot read"),
    "another model": (altered(lambda t: (t.clear(), t.update(bert=torch.zeros(3)))), "visual.conv1.weight is missing"),
    "no text tower": (without("token_embedding"), "token_embedding.weight is missing"),
    "a tensor less": (without("ln_final.bias"), "ln_final.bias is missing"),
    "a block less": (without("transformer.resblocks.0."), "transformer.resblocks."),
    "misshapen": (altered(lambda t: t.update({"visual.ln_pre.weight": torch.zeros(7)})), "visual.ln_pre.weight has shape (7,)"),
    "flat": (altered(lambda t: t.update({"visual.conv1.weight": torch.zeros(7)})), "visual.conv1.weight has shape (7,)"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_cannot_be_used(case, tmp_path, capsys):
    content, words = WEIGHTS[case]
    (tmp_path / "w").write_bytes(content())
    refused(capsys, ["--dataset", "toy", "--weights", tmp_path / "w"], words, tmp_path / "w")


class Evil:
    """Unpickled, it makes a file."""
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("how", ["pickle", "zip", "old"])
def test_pickled_code_is_not_run(how, tmp_path, capsys):
    marker, file = tmp_path / "marker", tmp_path / "w.pt"
    if how == "pickle":
        file.write_bytes(pickle.dumps(Evil(marker)))
    else:
        torch.save({"visual.conv1.weight": Evil(marker)}, file, _use_new_zipfile_serialization=how == "zip")
    refused(capsys, ["--dataset", "toy", "--weights", file], "cannot read", file)
    assert not marker.exists()
    torch.load(file, weights_only=False) if how != "pickle" else pickle.loads(file.read_bytes())
    assert marker.exists()                                               # the code was live


def test_merges_that_cannot_be_used(tmp_path):
    """Cut short, garbled, or too few: with ids shifted, CLIP would go wrong without a word."""
    packed = gzip.compress("#version\n".encode() + b"".join(b"%c %c\n" % (a, b) for a in range(97, 120) for b in range(97, 120)))
    weights = load_file(TOY_CLIP)
    weights["token_embedding.weight"] = torch.zeros(514 + 30, weights["token_embedding.weight"].shape[1])
    save_file(weights, tmp_path / "model.safetensors")
    for content in (packed[:40], packed[:30] + b"\xff" * 9 + packed[39:], b"\xff" * 40, b"#version\na b\nc d\n"):
        (tmp_path / "merges.txt").write_bytes(content)
        with pytest.raises(clip_min.WeightsError, match="merges"):
            clip_min.load(tmp_path)


# ----------------------------------------------------------------------------------------------------------- pictures

def on_its_side(path: Path):
    """Left half red, right half blue, and EXIF says to turn it: upright, red is on top."""
    image, exif = Image.new("RGB", (64, 64), (0, 0, 255)), Image.Exif()
    image.paste((255, 0, 0), (0, 0, 32, 64))
    exif[0x0112] = 6
    image.save(path, exif=exif)


def one(mode: str, colour, size=(30, 20)):
    return lambda path: Image.new(mode, size, colour).save(path)


ODD = {    # how to make it, and the mean colour that it must have
    "grey.jpg": (one("L", 100), (100, 100, 100)), "bits.png": (one("1", 1), (255, 255, 255)),
    "grey-alpha.png": (one("LA", (50, 255)), (50, 50, 50)),
    "palette.png": (lambda path: Image.new("RGB", (9, 9), (200, 30, 40)).quantize().save(path), (200, 30, 40)),
    "alpha.png": (one("RGBA", (200, 30, 40, 255)), (200, 30, 40)), "cmyk.jpg": (one("CMYK", (0, 255, 255, 0)), (254, 0, 0)),
    "sixteen.png": (one("I;16", 25617), (100, 100, 100)), "sixteen.tif": (one("I;16", 25617), (100, 100, 100)),
    "sixteen-big-endian.tif": (one("I;16B", 25617), (100, 100, 100)), "dot.PNG": (one("RGB", (9, 8, 7), (1, 1)), (9, 8, 7)),
    "wide.png": (one("RGB", (9, 8, 7), (20000, 10)), (9, 8, 7)), "side.jpg": (on_its_side, (127, 0, 127)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures(name, tmp_path):
    make, wanted = ODD[name]
    (tmp_path / "a").mkdir()
    make(tmp_path / "a" / name)
    image, = data.load(str(tmp_path)).images.float()
    assert image.mean((1, 2)).tolist() == pytest.approx(wanted, abs=2)
    assert name != "side.jpg" or (image[0, :100].mean() > 240 and image[2, -100:].mean() > 240)


def jpeg(path: Path, share: float, **options) -> bytes:
    Image.effect_noise((40, 40), 50).save(path, "jpeg", **options)
    return path.read_bytes()[: int(share * path.stat().st_size)]


WORDS_FOR_A_NUMBER = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIIHHII", 0x0100, 2, 1, 64, 0x0112, 3, 1, 6) + bytes(4)
BROKEN = {"truncated": lambda path: jpeg(path, 0.6), "header alone": lambda path: jpeg(path, 0.02), "zero bytes": lambda path: b"",
          "text": lambda path: b"Not a picture\n" * 99, "EXIF": lambda path: jpeg(path, 1, exif=WORDS_FOR_A_NUMBER)}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_picture_is_named(case, tmp_path, own_cache, capsys):
    """Nothing half-decoded stays; without the picture it works."""
    folder = draw_pictures(tmp_path / "pictures", classes=2, each=2)
    bad = folder / "circle" / "bad.jpg"
    bad.write_bytes(BROKEN[case](tmp_path / "x"))
    refused(capsys, ["--dataset", folder, "--weights", TOY_CLIP, "--way", 2], "cannot decode", bad)
    assert kept(own_cache) == []
    bad.unlink()
    assert holds(data.load(str(folder)), folder)


def test_what_is_no_picture_is_left_out(tmp_path, capsys):
    folder = draw_pictures(tmp_path / "pictures", classes=2, each=2)
    for name in ("empty", "words", ".git", "circle/inner.jpg"):
        (folder / name).mkdir()
    for name in ("circle/.hidden.jpg", "circle/._00.png", "circle/Thumbs.db", "circle/a.txt", "words/b.md", ".git/x.png", "stray.png"):
        (folder / name).write_text("no picture")
    pool = data.load(str(folder))
    assert pool.classes == ["circle", "square"] and pool.labels.tolist() == [0, 0, 1, 1]
    said(re.sub(r"\rdecoding.*", "", capsys.readouterr().err), "empty, words")


def table(file: Path, rows: list[list]) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return file


def isic(root: Path) -> Path:
    truth = root / "ISIC2018_Task3_Training_GroundTruth"
    for folder in (truth, root / "ISIC2018_Task3_Training_Input"):
        folder.mkdir(parents=True)
    for i in range(7):
        Image.new("RGB", (8, 8)).save(root / "ISIC2018_Task3_Training_Input" / f"ISIC_{i}.jpg")
    rows = [[f"ISIC_{i}", *(float(i == j) for j in range(7))] for i in range(7)]
    return table(truth / f"{truth.name}.csv", [["image", *data.ISIC], *rows])


def chestx(root: Path) -> Path:
    (root / "images_001" / "images").mkdir(parents=True)
    for i in range(7):
        Image.new("L", (8, 8)).save(root / "images_001" / "images" / f"{i}.png")
    rows = [[f"{i}.png", name] for i, name in enumerate([*data.CHESTX, "No Finding", "Mass|Hernia"])]
    return table(root / "Data_Entry_2017.csv", [["Image Index", "Finding Labels"], *rows])


def put(old: str, new: str):
    return lambda file: file.write_text(file.read_text().replace(old, new))


TABLES = {    # layout and its folder, what is done to the table, what must be named
    "isic: column": (isic, "ISIC", put("BKL", "XXX"), "BKL"),
    "isic: two labels": (isic, "ISIC", put("ISIC_3,0.0", "ISIC_3,1.0"), "ISIC_3"),
    "isic: unknown label": (isic, "ISIC", put("ISIC_3,0.0,0.0,0.0,1.0", "ISIC_3,0.0,0.0,0.0,0.0"), "ISIC_3"),
    "isic: short row": (isic, "ISIC", put("ISIC_3,0.0,0.0,0.0,1.0,0.0,0.0,0.0", "ISIC_3"), "ISIC_3"),
    "isic: picture": (isic, "ISIC", put("ISIC_3,", "ISIC_99,"), "ISIC_99"),
    "isic: no table": (isic, "ISIC", lambda file: file.unlink(), "No such file"),
    "isic: no text": (isic, "ISIC", lambda file: file.write_bytes(b"\xff\xfe\x00" * 99), "cannot read"),
    "isic: open quote": (isic, "ISIC", lambda file: file.write_text(file.read_text() + '"' + "x" * 200000), "cannot read"),
    "isic: nothing": (isic, "ISIC", lambda file: file.write_text(""), "image"),
    "chestx: column": (chestx, "ChestX", put("Finding Labels", "Findings"), "Finding Labels"),
    "chestx: unknown label": (chestx, "ChestX", put("Nodule", "Nodul"), "Nodul"),
    "chestx: picture": (chestx, "ChestX", put("3.png", "99.png"), "99.png"),
}


@pytest.mark.parametrize("case", TABLES)
def test_broken_tables(case, tmp_path, capsys):
    layout, folder, damage, word = TABLES[case]
    file, name = layout(tmp_path / folder), layout.__name__
    assert len(data.load(name, tmp_path).classes) == 7
    damage(file)
    refused(capsys, ["--dataset", name, "--data", tmp_path, "--weights", TOY_CLIP], word, file)


# ---------------------------------------------------------------------------------------------------------- tokenizer

@pytest.fixture(params=["bytes", "merges"])
def tokenizer(request):
    return clip_min.Tokenizer([] if request.param == "bytes" else from_environment("ATHA_MERGES", "OpenAI's BPE merges file"))


SPECIAL = ["&#xd800;", "&amp;", "&#0;", "<|endoftext|>", "</w>", "²", "Ⅻ", "İ", "\u0301", "\x00", "'ll", "_", "\u200d", "\U0010ffff"]


def test_tokenizer_takes_any_text(tokenizer):
    """10,000 random texts, some of 10,000 characters: any code point, lone surrogates, controls, what means something to it."""
    chance = random.Random(0)
    draws = (lambda: chr(chance.randrange(0x110000)), lambda: chr(chance.randrange(0xd800, 0xe000)), lambda: chr(chance.randrange(256)),
             lambda: chance.choice("abc ABC 123 '"), lambda: chance.choice(SPECIAL))
    for length in [10000] * 10 + [int(chance.expovariate(1 / 15)) for _ in range(9990)]:
        some = chance.sample(draws, chance.randrange(1, 6))
        text = "".join(chance.choice(some)() for _ in range(length))
        row, = tokenizer(text)
        assert row.shape == (77,) and row[0] == tokenizer.start and row.min() >= 0 and row.max() == tokenizer.end
        if length < 10000:
            tokenizer.decode(tokenizer.encode(text)).encode()            # text again, which UTF-8 can write


def test_tokenizer_gives_text_back(tokenizer):
    chance, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyzàéîõüñøłабвгдежя中文字日本語αβγδ"
    for _ in range(500):
        text = " ".join("".join(chance.choices(letters, k=chance.randrange(1, 12))) for _ in range(chance.randrange(1, 9)))
        assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(f"  {text.capitalize()}\n")) == text
    for text in ("A photo of a Sea Lake, isn't it?", "Melanocytic Nevus (2018) 😀 é!", "tabs\tand\nlines  and   spaces", "x² + Ⅻ"):
        assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == re.sub(r"\s", "", text.lower())


# ----------------------------------------------------------------------------------------------------------- bad input

FEW, TOYS = ["--dataset", "toy", *QUICK], ["--weights", TOY_CLIP]
BAD = {    # arguments, words that must be in the one line
    "method": (["--dataset", "toy", "--method", "nonsense"], ["'nonsense'", "clip-lora", "atha-push"]),
    "joined": (["--dataset", "toy", "--method", "zero-shot+atha"], ["zero-shot+atha"]),
    "dataset": (["--dataset", "nonsense"], ["'nonsense'", "eurosat", "chestx"]),       # said before weights are fetched for it
    "one dataset of two": ([*FEW, "--dataset", "toy", "nonsense"], ["'nonsense'", "eurosat"]),
    "chestx not there": (["--dataset", "chestx", "--data", "{tmp}"], ["{tmp}/ChestX", "nih-chest-xrays"]),
    "cropdiseases half there": (["--dataset", "cropdiseases", "--data", "{tmp}/half", *TOYS], ["{tmp}/half/CropDiseases/train"]),
    "eurosat half there": (["--dataset", "eurosat", "--data", "{tmp}/half", *TOYS], ["{tmp}/half/eurosat/2750"]),
    "no pictures": (["--dataset", "{tmp}/half/eurosat", *TOYS], ["{tmp}/half/eurosat"]),
    "weights not there": (["--dataset", "toy", "--weights", "{tmp}/none.pt"], ["{tmp}/none.pt"]),
    "classes": ([*FEW, "--way", 17], ["17", "16"]),
    "pictures": ([*FEW, "--query", 300], ["circle", "12", "301"]),
    "NaN": ([*FEW, "--lr", 1e30], ["not a number", "0", "1", "--lr"]),
    "NaN after the last step": ([*FEW, "--steps", 1, "--lr", 1e38], ["not a number", "--lr"]),
    "out is a file": ([*FEW, "--out", "{tmp}/file"], ["{tmp}/file"]),
    "device": (["--dataset", "toy", "--device", "nonsense"], ["nonsense"]),
    **{f"{name} {value}": ([*FEW, name, value], [name]) for name, value in
       [("--episodes", -1), ("--batch", -1), *((name, 0) for name in ("--episodes", "--way", "--shot", "--query", "--steps", "--rank"))]},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise AssertionError("network access that nothing asked for")
    monkeypatch.setattr(clip_min, "download", no_network)
    monkeypatch.setattr(data, "fetch", no_network)
    monkeypatch.setattr(data, "toy_pictures", lambda each: TOY)
    for folder in ("CropDiseases", "eurosat"):
        (tmp_path / "half" / folder).mkdir(parents=True)
    (tmp_path / "file").write_text("a file")
    argv, words = ([str(a).replace("{tmp}", str(tmp_path)) for a in part] for part in BAD[case])
    try:
        refused(capsys, ["--out", str(tmp_path / "out"), *argv], *words)
    except SystemExit as stop:                                           # argparse, which prints the usage first
        assert stop.code == 2
        said(capsys.readouterr().err.splitlines()[-1], "train.py: error: ", *words)


def test_bad_input_as_a_user_sees_it(tmp_path):
    run = command("--dataset", "toy", "--method", "nonsense", cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.startswith("train.py: error: ")
    said(run.stderr, "'nonsense'")


GUARD = """import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        raise SystemExit(f"network access: {event} {args}")
sys.addaudithook(hook)
import train
for argv in (["--dataset", "cropdiseases", "--data", sys.argv[1]], ["--dataset", sys.argv[1] + "/CropDiseases/train"]):
    assert train.main([*argv, *sys.argv[2:]]) == 0"""


def test_no_network_and_nothing_written_elsewhere(tmp_path):
    """Only --data, --out and the cache folder change; no address is looked up, no connection opened."""
    draw_pictures(tmp_path / "data" / "CropDiseases" / "train", each=4)
    for name in ("home", "tmp", "work"):
        (tmp_path / name).mkdir()
    before = set(tmp_path.rglob("*"))
    environment = {**BARE, "PATH": os.environ["PATH"], "PYTHONPATH": str(REPO),
                   "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    run = subprocess.run([sys.executable, "-c", GUARD, str(tmp_path / "data"), "--weights", str(TOY_CLIP), *QUICK, "--episodes", "2"],
                         cwd=tmp_path / "work", capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    new = [p.relative_to(tmp_path).as_posix() for p in set(tmp_path.rglob("*")) - before if p.is_file()]
    places = ("work/results/", "home/.cache/atha/", "data/CropDiseases/.cropdiseases")
    assert {next((place for place in places if name.startswith(place)), name) for name in new} == set(places)
