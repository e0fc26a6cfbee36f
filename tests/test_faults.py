"""Faults, scale-out and determinism: what a run survives, and what it says about what it cannot use. Needs no network."""
import contextlib, errno, fcntl, hashlib, io, itertools, json, multiprocessing, os, random, re, resource, select, signal, socket
import struct, subprocess, sys, termios, threading, time, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import HERE, REPO, TOY_CLIP, draw_pictures, holds, kept, refused, said
from PIL import Image
from safetensors.torch import save_file

import clip_min
import data
import train

QUICK = "--shot 1 --query 2 --steps 1 --episodes 8 --batch 2 --dropout 0 --augment none --method atha".split()
BARE = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


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
    part.write_bytes(before.replace(b'"steps": 1', b'"steps": 1, "older": 1', 1))
    refused(capsys, argv, part, "older")
    first, rest = before.split(b"\n", 1)
    for key in ("query", "weights", "data", "precision"):
        part.write_bytes(json.dumps(json.loads(first) | {key: "another"}).encode() + b"\n" + rest)
        refused(capsys, argv, part, f"{key} 'another'")


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
    assert [r | {"elapsed": 0} for r in one.values()] == [r | {"elapsed": 0} for r in two.values()]
    one, two = (episodes("--method", "zero-shot", "--seed", seed) for seed in (1, 2))
    assert [r["accuracy"] for r in one.values()] != [r["accuracy"] for r in two.values()]


@pytest.mark.parametrize("method", ["atha+tir", "svl"])
def test_batch_size_changes_nothing(method, episodes):
    """With augmentation, whose chance is each episode's own."""
    one, five = (episodes("--method", method, "--augment", "crop", "--episodes", 6, "--batch", batch) for batch in (1, 5))
    assert_same(five, one)


def test_out_of_memory_halves_the_batch(episodes, world, monkeypatch, capsys):
    tried, whole = [], train.try_tasks

    def small(job, tasks, seeds, told):
        tried.append(len(tasks))
        if len(tasks) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return whole(job, tasks, seeds, told)
    monkeypatch.setattr(train, "try_tasks", small)
    assert_same(episodes("--batch", 4), world.records)
    assert tried[:3] == [4, 2, 1] and "2 episodes at a time from here on" in capsys.readouterr().err


@pytest.mark.parametrize("argv, words", [(["--dataset", "toy"], "what is finished is kept"), (["--fit", "x", "--save", "y"], "nothing was saved")])
def test_stopped_by_hand(argv, words, monkeypatch, capsys):
    monkeypatch.setattr(train, "run", lambda args: signal.raise_signal(signal.SIGINT))
    assert train.main(argv) == 130
    said(capsys.readouterr().err, "stopped", words)


# ---------------------------------------------------------------------------------------------------------- the cache

def test_two_processes_build_one_cache(world, fork, tmp_path, monkeypatch):
    barrier, logs = fork.barrier(2), [tmp_path / "0", tmp_path / "1"]
    runs = [fork(load_child, barrier, log, tmp_path / "cache", world.pictures) for log in logs]
    assert [run.join(60) or run.exitcode for run in runs] == [0, 0]
    assert sum("decoding" in log.read_text() for log in logs) == 1 and len(kept(tmp_path / "cache")) == 1
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    assert holds(data.load(str(world.pictures)), world.pictures)


def cut(share: float):
    return lambda cache, folder: os.truncate(cache, int(share * cache.stat().st_size))


DAMAGE = {
    "cut to nothing": cut(0), "cut in the pictures": cut(0.7), "cut in the fingerprint": cut(0.9999999),
    "longer": lambda cache, folder: cache.write_bytes(cache.read_bytes() + b"x"),
    "of other pictures": lambda cache, folder: cache.write_bytes(cache.read_bytes()[:-3] + b"abc"),
    "a pipe": lambda cache, folder: (cache.unlink(), os.mkfifo(cache)),
    "another's safetensors": lambda cache, folder: save_file({"images": torch.zeros(3)}, cache),
    "a picture changed": lambda cache, folder: Image.new("RGB", (48, 48)).save(folder / "circle" / "00.png"),
    "a picture less": lambda cache, folder: (folder / "circle" / "00.png").unlink(),
    "a class renamed": lambda cache, folder: (folder / "circle").rename(folder / "zero"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_cache_is_rebuilt(damage, tmp_path, own_cache, capsys):
    """A cache cut short, or of other files, is noticed; one that fits is used."""
    folder = draw_pictures(tmp_path / "pictures", classes=2, each=3)
    data.load(str(folder))
    place, = own_cache.glob("*.u8")
    DAMAGE[damage](place, folder)
    capsys.readouterr()
    for decodes in (True, False):
        assert holds(data.load(str(folder)), folder)
        assert ("decoding" in capsys.readouterr().err) == decodes and len(kept(own_cache)) == 1


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
    said(re.sub(r"decoding.*", "", capsys.readouterr().err), tmp_path / "CropDiseases", own_cache)
    assert holds(data.load("cropdiseases", tmp_path), folder)
    assert capsys.readouterr().err == "" and sorted(tmp_path.rglob("*")) == before


def test_a_dataset_is_fetched_whole_or_not_at_all(tmp_path, monkeypatch):
    """A download that breaks off leaves nothing, nor does a killed one stand in the way of the next."""
    asked = []

    def source(target: Path):
        assert not target.exists()
        draw_pictures(target / "2750", 2, 2)
        asked.append(target)
        if len(asked) == 1:
            raise zipfile.BadZipFile("cut short")
    monkeypatch.setitem(data.DATASETS, "eurosat", data.DATASETS["eurosat"]._replace(fetch=source))
    with pytest.raises(data.DataError, match="cannot download eurosat .cut short.* put it at"):
        data.load("eurosat", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".eurosat.part.lock"]
    draw_pictures(asked[0] / "2750", 3, 3)                               # as after a kill
    assert len(data.load("eurosat", tmp_path).images) == 4 and len(asked) == 2


@pytest.mark.parametrize("signum, error", [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_decoding_stops_at_once_and_leaves_no_part(signum, error, tmp_path, own_cache, monkeypatch):
    """Where the signal is an exception of the main thread, as train.py makes it: hundreds of pictures are left undone."""
    threads = threading.active_count()                           # other tests may have left some
    folder, taken, whole = draw_pictures(tmp_path / "pictures", classes=6, each=60), itertools.count(), data.decode

    def slow(path, size):
        number = next(taken)                                             # of one thread alone
        time.sleep(0.02)
        if number == 20:
            os.kill(os.getpid(), signum)
        return whole(path, size)
    monkeypatch.setattr(data, "decode", slow)
    before = signal.signal(signum, lambda *_: signal.default_int_handler(2, None) if signum == signal.SIGINT else sys.exit(143))
    try:
        with pytest.raises(error):
            data.load(str(folder))
    finally:
        signal.signal(signum, before)
    assert kept(own_cache) == [] and next(taken) < 80
    monkeypatch.setattr(data, "decode", whole)
    assert holds(data.load(str(folder)), folder) and threading.active_count() == threads


def test_a_killed_run_s_part_is_replaced(tmp_path, own_cache):
    folder = draw_pictures(tmp_path / "pictures", classes=2, each=3)
    data.load(str(folder))
    place, = own_cache.glob("*.u8")
    part = own_cache / f".{place.name}.part"
    part.mkdir()
    place.rename(part / place.name)
    assert holds(data.load(str(folder)), folder) and kept(own_cache) == [place.name]


def test_full_disk(tmp_path, own_cache):
    """One line that says how much is wanted and where, and nothing half-written."""
    folder = draw_pictures(tmp_path / "pictures", classes=2, each=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        with pytest.raises(data.DataError, match=f"0.0 GB. in {own_cache}: File too large; XDG_CACHE_HOME"):
            data.load(str(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept(own_cache) == []


def test_results_on_a_full_disk(tmp_path, monkeypatch):
    """The file is named; what stands in it already is kept, half a line is not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    results = train.Results(tmp_path / "x", {"recipe": {}})
    results.append([{"episode": 0, "accuracy": 50.0}])
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(data.DataError, match="cannot write .*x.part0.jsonl: File too large"):
            results.append([{"episode": n, "accuracy": 50.0} for n in range(1, 9)])
        with contextlib.suppress(OSError):
            results.file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = train.Results(tmp_path / "x", {"recipe": {}})
    assert 0 in again.done and len(again.done) < 9 and (tmp_path / "x.part0.jsonl").read_bytes().endswith(b"\n")
    again.file.close()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_cannot_be_written_loses_no_episode(stream, world, tmp_path, monkeypatch):
    """As a process would end: without stderr all is well; a full stdout is an error when the summary is printed."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    monkeypatch.setattr(data, "CACHE", world.cache)
    monkeypatch.setattr(sys, stream, None if stream == "stderr" else open("/dev/full", "w"))
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, world.argv), "--out", str(tmp_path)])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="0" if stream == "stderr" else "2"):
        train.command_line()
    assert_same(records(tmp_path), world.records)


def test_a_notebook_s_output_will_do(world, tmp_path, monkeypatch):
    """Any object that can be written to."""
    monkeypatch.setattr(data, "CACHE", world.cache)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert train.main([*map(str, world.argv), "--out", str(tmp_path)]) == 0
    assert summary(out.getvalue()) == world.summary and "0 of 8 episodes are done" in err.getvalue()
    told = {"device": "cpu", "ranks": 1, "compile": False, "torch": torch.__version__, "batch": 2, "program": train.program()}
    assert all(record | told == record for record in records(tmp_path).values())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to\nmore"),
                                   torch.cuda.OutOfMemoryError("CUDA out of memory. Tried")])
def test_lack_of_memory_anywhere_is_said_in_one_line(error, monkeypatch, capsys):
    def begin(args):
        raise error
    monkeypatch.setattr(train, "begin", begin)
    refused(capsys, ["--dataset", "toy"], "out of memory")
    monkeypatch.setattr(train, "begin", lambda args: {}[1])
    with pytest.raises(KeyError):                                        # our own faults are not hidden
        train.main(["--dataset", "toy"])


def test_compiling_writes_into_the_cache(own_cache, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "x")                   # to be put back as it was
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(train, "compile_works", lambda device: (_ for _ in ()).throw(train.UsageError(os.environ["TORCHINDUCTOR_CACHE_DIR"])))
    with pytest.raises(train.UsageError, match=f"^{own_cache}/compiled$"):
        train.begin(train.parse("--dataset toy --compile".split()))


@pytest.mark.parametrize("without", ["fcntl", "locks"])
def test_a_system_without_locks(without, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(data, "fcntl", None if without == "fcntl" else SimpleNamespace(flock=refuse, LOCK_EX=2, LOCK_NB=4))
    folder = draw_pictures(tmp_path / "pictures", classes=2, each=3)
    assert holds(data.load(str(folder)), folder)


def test_names_that_are_not_utf8(tmp_path, capsys):
    """Of files, and of the folder that holds all: nothing is wrong with them. Of a class: no text can be made of it."""
    folder = draw_pictures(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9t\xe9")), classes=2, each=2)
    os.rename(folder / "circle" / "00.png", os.fsencode(folder) + b"/circle/\xff\n.png")
    pool = data.load(str(folder))
    assert len(pool.images) == 4 and len(data.load(str(folder)).images) == 4
    with pytest.raises(data.DataError) as e:
        data.decode(folder / "none.png", 8)
    data.progress(f"error: {e.value}")
    assert "\\udce9t\\udce9" in capsys.readouterr().err.splitlines()[-1]
    os.rename(folder / "circle", os.fsencode(folder) + b"/c\xff")
    with pytest.raises(data.DataError, match="not UTF-8"):
        data.load(str(folder))


NOBODY = """import os, pwd
def unknown(*_):
    raise KeyError("no such user")
pwd.getpwuid = unknown
import data
print(data.CACHE)"""


def test_a_user_without_a_name_and_without_home():
    run = subprocess.run([sys.executable, "-c", NOBODY], env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == (".cache/atha\n", "")


# ----------------------------------------------------------------------------------------------------------- progress

def on_terminal(monkeypatch, columns: int, *calls) -> str:
    """What progress writes on a terminal of so many columns."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(slave, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        for call in calls:
            data.progress(*call)
        text = b""
        while select.select([master], [], [], 0.2)[0]:                   # it comes in pieces
            text += os.read(master, 10000)
    os.close(master)
    return text.decode()


def test_progress_fits_the_terminal_and_is_written_over(monkeypatch):
    text = on_terminal(monkeypatch, 20, ("x" * 50, False), ("7 s left, decoding pictures: 3 of 70", False), ("an error that is long, and whole",))
    assert text.split("\r\x1b[K") == ["", "x" * 19, "7 s left, decoding ", "an error that is long, and whole\r\n"]
    assert on_terminal(monkeypatch, 0, ("y" * 100, False)) == "\r\x1b[K" + "y" * 79, "a terminal that does not know its width"


def test_progress_shows_control_characters_escaped(monkeypatch, capsys):
    data.progress("a\x1b[31mb\nc\udcffd\u202ee é ± 葉")
    assert capsys.readouterr().err == "a\\x1b[31mb\\nc\\udcffd\\u202ee é ± 葉\n"
    assert "\\x07" in on_terminal(monkeypatch, 80, ("\x07",))


@pytest.mark.parametrize("stream", ["none", "closed", "ascii", "full"])
def test_progress_never_ends_a_run(stream, monkeypatch, tmp_path):
    if stream == "full" and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    file = None if stream == "none" else open("/dev/full" if stream == "full" else tmp_path / "log", "w", encoding="ascii", errors="backslashreplace")
    if stream == "closed":
        file.close()
    monkeypatch.setattr(sys, "stderr", file)
    data.progress("± 葉")
    data.progress("the end")
    if stream != "ascii":
        clip_min.say("what the weights are taken for")
    if stream == "ascii":
        file.close()
        assert (tmp_path / "log").read_text() == "\\xb1 \\u8449\nthe end\n"
    if stream == "full":
        with contextlib.suppress(OSError):
            file.close()


def test_progress_is_heard_of_slow_work_with_the_time_left_first(monkeypatch, capsys):
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(data.time, "monotonic", lambda: next(clock))
    assert list(data.told("abcd", 4, "reading")) == list("abcd")
    assert capsys.readouterr().err == "9 s left, 1 of 4, reading\n6 s left, 2 of 4, reading\n3 s left, 3 of 4, reading\nreading: 4 of 4, 12 s\n"


def test_no_rest_is_told_from_the_first_of_many_that_come_together(monkeypatch, capsys):
    """32 threads: 32 of 1000 after one second, 32 more after the next: not 999 s after the first."""
    clock = {"now": 0.0}
    monkeypatch.setattr(data.time, "monotonic", lambda: clock["now"])

    def arrive():
        for i in range(1000):
            clock["now"] = 1.5 * (1 + i // 32)
            yield i
    assert len(list(data.told(arrive(), 1000, "reading"))) == 1000
    first, *_ = capsys.readouterr().err.splitlines()
    assert int(first.partition(" s left")[0]) < 3 * 1.5 * 1000 / 32


def test_work_whose_first_part_is_slow_is_heard_of_at_once_and_quick_work_never(monkeypatch, capsys):
    monkeypatch.setattr(data.time, "monotonic", lambda: 0.0)
    assert list(data.told("abcd", 4, "reading")) == list("abcd") and capsys.readouterr().err == ""
    data.Clock("training", 9).tell(0, "step 0 of 9")
    assert capsys.readouterr().err == "training: step 0 of 9\n"


# ------------------------------------------------------------------------------------------------------------ weights

WHOLE = TOY_CLIP.read_bytes()
SHA256, OK = hashlib.sha256(WHOLE).hexdigest(), b"HTTP/1.0 200 OK\r\n"
ANSWERS = {    # what a server may send: head and body
    "404": (b"HTTP/1.0 404 Not Found\r\n\r\n", b"gone"),
    "broken off": (OK + b"Content-Length: %d\r\n\r\n" % len(WHOLE), WHOLE[:-1000]),
    "short, no length": (OK + b"\r\n", WHOLE[:-1000]),
    "a page": (OK + b"Content-Type: text/html\r\n\r\n", b"<html>log in first</html>"),
    "no HTTP": (b"220 ftp ready\r\n", b"\x00\xff\r\n" * 9),
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
    announced, *error = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line and not re.search("B/s]|decoding", line)]
    assert announced.startswith("downloading ") and server.url in announced
    said("\n".join(error), "train.py: error: ", server.url)
    assert not [name for name in kept(own_cache) if "ViT" in name]
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
    wait_for(lambda: any(p.suffix == ".partial" for p in own_cache.glob("*")))
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


# ------------------------------------------------------------------------------------------- what a run leaves alone

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


# ------------------------------------------------------------------------------------------- what attempts to break it found

OWN = {    # the body of a class, and what the one line must hold
    "raises": ("def vision_hook(self, text):\n        raise KeyError('deep')", ["mine.py, line 5, in vision_hook", "KeyError: 'deep'"]),
    "gives nothing": ("def vision_hook(self, text):\n        return lambda tokens, layer: None", ["Mine.vision_hook gave None"]),
    "a loss of all episodes": ("def loss(self, step):\n        return step.features.sum()", ["Mine.loss gave []"]),
    "fields without a help": ("fields = {'magic': 0.1}", ["mine.py:Mine", "fields"]),
    "a field like a flag": ("fields = {'dataset': (0.1, 'x')}", ["fields", "--dataset"]),
    "a field of no kind": ("fields = {'magic': (None, 'x')}", ["fields", "NoneType"]),
    "ends everything": ("raise SystemExit(0)", ["mine.py:Mine", "SystemExit"]),
}


@pytest.mark.parametrize("case", OWN)
def test_own_code_that_fails_is_one_line(case, tmp_path, monkeypatch, capsys):
    body, words = OWN[case]
    monkeypatch.chdir(tmp_path)
    loss = "" if "def loss" in body else "    def loss(self, step): return 0.0\n"
    Path("mine.py").write_text(f"from atha import Part\n\nclass Mine(Part):\n    {body}\n{loss}")
    train.own_part.cache_clear()
    refused(capsys, ["--dataset", draw_pictures(Path("p"), 2, 3), "--weights", TOY_CLIP, "--way", 2, *QUICK[:-1], "mine.py:Mine"], *words)


def test_own_code_is_an_ordinary_file(tmp_path, capsys):
    os.mkfifo(tmp_path / "mine.py")
    refused(capsys, ["--dataset", "toy", "--method", f"{tmp_path}/mine.py:Mine"], "not an ordinary file")


@pytest.mark.parametrize("error, word", [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"), (MemoryError(), "out of memory"),
    (RuntimeError("can't start new thread"), "out of memory"), (FileExistsError(errno.EEXIST, "File exists", "there"), "File exists: 'there'")])
def test_whatever_the_system_refuses_is_one_line(error, word, monkeypatch, capsys):
    def run(_):
        raise error
    monkeypatch.setattr(train, "run", run)
    refused(capsys, ["--dataset", "toy"], word)


@pytest.mark.parametrize("painter, argv", [("draw_patches", "--dataset {p} --way 2 --out out")])
def test_a_picture_for_which_there_is_no_room(painter, argv, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    pictures = draw_pictures(tmp_path / "p", 2, 3)
    assert train.main(["--fit", str(pictures), "--weights", str(TOY_CLIP), "--steps", "1", "--save", "saved"]) == 0
    monkeypatch.setattr(train, painter, full)
    options = [] if "--predict" in argv else ["--weights", TOY_CLIP, *QUICK]
    assert train.main([*map(str, [*argv.format(p=pictures).split(), *options]), "--draw", "x.png"]) == 2
    said(capsys.readouterr().err.splitlines()[-1], "cannot write", "x.png: No space left on device")


def test_a_fault_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(train, "run", lambda args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        train.main(["--dataset", "toy"])


def test_output_that_is_no_stream_of_a_system():
    """As a notebook's: text that cannot be reconfigured."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
        assert train.main(["--dataset", "nonsense"]) == 2
    said(error.getvalue(), "nonsense")


def test_another_process_that_ended(monkeypatch):
    def gone(*_):
        raise RuntimeError("Connection closed by peer")
    monkeypatch.setattr(train, "rank_and_size", lambda: (0, 2))
    monkeypatch.setattr(torch.distributed, "all_gather_object", gone)
    with pytest.raises(data.DataError, match="finished episodes are kept"):
        train.gathered({})


@pytest.mark.parametrize("line", ['{"episode": 1.5, "accuracy": 5}', '{"episode": 0, "accuracy": 600}', '{"episode": null, "accuracy": 5}'])
def test_results_that_cannot_be(line, tmp_path):
    """No number of an episode, or no share."""
    part = tmp_path / "x.part0.jsonl"
    part.write_text(json.dumps({"recipe": {}}) + '\n{"episode": 0, "accuracy": 5}\n' + line + "\n")
    with pytest.raises(train.UsageError, match=re.escape(f"{part}, line 3, is damaged")):
        train.Results(tmp_path / "x", {"recipe": {}})


def test_nothing_is_kept_of_episodes_that_cannot_be_drawn(tmp_path, capsys):
    refused(capsys, ["--dataset", draw_pictures(tmp_path / "p", 2, 2), "--weights", TOY_CLIP, "--out", tmp_path / "out"], "way")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, methods", [
    ("--dataset toy", ["zero-shot", "atha"]), ("--dataset eurosat", ["atha"]), ("--dataset toy eurosat", ["atha"]),
    ("--fit x --save y", ["clip-lora"]), ("--predict x y", []), ("--dataset dtd --method all", train.TABLE)])
def test_the_method_where_none_is_named(argv, methods):
    assert train.parse(argv.split()).method == methods


def test_results_of_two_folders_of_one_name_are_not_mixed(tmp_path, capsys):
    folders = [draw_pictures(tmp_path / name / "leaves", 2, 2 + each) for each, name in enumerate("ab")]
    argv = ["--weights", TOY_CLIP, "--out", tmp_path / "out", "--way", 2, *QUICK, "--query", 1, "--method", "zero-shot", "--dataset"]
    assert train.main([*map(str, argv), *map(str, folders)]) == 2
    said(capsys.readouterr().err.splitlines()[-1], "leaves-2way", "made with data", "--out")


def test_one_episode_has_no_interval():
    assert train.in_short([50.0]) == "50.00" and train.in_short([50.0, 70.0]) == "60.00 ± 13.86"


def test_what_is_saved_goes_where_a_link_leads(tmp_path, capsys):
    """And what is said of it cannot steer a terminal."""
    (tmp_path / "old").write_text("old")
    (tmp_path / "link\x1b[31m").symlink_to(tmp_path / "old")
    argv = ["--fit", draw_pictures(tmp_path / "p", 2, 2), "--weights", TOY_CLIP, "--steps", 1, "--save"]
    assert train.main([*map(str, argv), str(tmp_path / "link\x1b[31m")]) == 0
    assert (tmp_path / "link\x1b[31m").is_symlink() and (tmp_path / "old").stat().st_size > 1000
    assert "\\x1b[31m" in capsys.readouterr().out


def test_what_is_left_out_is_told(tmp_path, capsys):
    root = draw_pictures(tmp_path / "p", 2, 2)
    (root / "gone").symlink_to("nowhere")
    (root / "circle" / "deeper").mkdir()
    data.load(str(root))
    assert "left out, without pictures or not right in a class folder: gone, circle/deeper\n" in capsys.readouterr().err


def test_a_split_of_own_pictures_is_told(tmp_path, capsys):
    for part in ("train", "test"):
        draw_pictures(tmp_path / "p" / part, 2, 2)
    assert train.main(["--fit", str(tmp_path / "p"), "--weights", str(TOY_CLIP), "--steps", "1", "--save", str(tmp_path / "s")]) == 0
    assert "training part are used" in capsys.readouterr().err


@pytest.mark.parametrize("text, word", [('{"circle": 3}', "one JSON object"), ("[" * 9999, "--names"), ('{"circle": "square"}', "have the same text")])
def test_names_that_say_nothing(text, word, tmp_path, capsys):
    (tmp_path / "names").write_text(text)
    argv = ["--fit", draw_pictures(tmp_path / "p", 2, 2), "--weights", TOY_CLIP, "--names", tmp_path / "names", "--save", tmp_path / "s"]
    refused(capsys, argv, word)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("mode, value", [("F", 0.5), ("I", 70000)])
def test_pictures_of_unknown_brightness(mode, value, tmp_path):
    Image.new(mode, (8, 8), value).save(tmp_path / "x.tif")
    with pytest.raises(data.DataError, match="how bright"):
        data.decode(tmp_path / "x.tif", 8)


def test_weights_that_may_not_be_opened_are_not_called_missing(tmp_path, monkeypatch, capsys):
    def shut(path, mode="r", *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr(Path, "open", shut)
    with pytest.raises(clip_min.WeightsError, match="Permission denied"):
        clip_min.load(TOY_CLIP)


def test_damaged_configs_are_called_so(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    (tmp_path / "model.safetensors").symlink_to(TOY_CLIP)
    with pytest.raises(clip_min.WeightsError, match="damaged, or not of a kind that is read here"):
        clip_min.load(tmp_path)
