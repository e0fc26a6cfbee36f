"""Other systems, tried here by taking away what only Linux has: locks, /proc, fork, affinity, signals, users."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import REPO, TOY_CLIP, draw_pictures, said

import atha
import train

# What PyTorch and Pillow need is theirs, so they are loaded first; ours is loaded and run without
ELSEWHERE = """
import io, json, os, signal, sys
import PIL.Image, safetensors.torch, torch, torchvision.datasets, torchvision.transforms.v2
for name in "fcntl resource pwd grp termios tty pty select syslog".split():
    sys.modules[name] = None
for name in "fork forkpty register_at_fork sched_getaffinity sched_setaffinity sysconf statvfs mkfifo mknod " \\
            "getuid geteuid getgid getpgid killpg wait4 getloadavg nice posix_spawn".split():
    delattr(os, name)
for name in "SIGKILL SIGALRM SIGHUP SIGUSR1 SIGCHLD SIGPIPE alarm setitimer pthread_kill".split():
    delattr(signal, name)

def without_proc(call):
    def guarded(path, *rest, **named):
        if str(path).startswith(("/proc", "/sys", "/dev/shm")):
            raise PermissionError(13, "Permission denied", path)
        return call(path, *rest, **named)
    return guarded
for module, name in ((io, "open"), (__builtins__, "open"), (os, "open"), (os, "stat"), (os, "listdir")):
    setattr(module, name, without_proc(getattr(module, name)))

import train
*first, last = json.loads(sys.argv[1])
for argv in first:
    assert train.main(argv) == 0, argv
sys.argv[1:] = last
train.command_line()
"""


def test_nothing_that_only_linux_has_is_needed(tmp_path):
    """A run, the same gone on with, a fit and its use: as a process of its own, the last one by `command_line`.

    The program is a link, beside which nothing of it lies.
    """
    draw_pictures(tmp_path / "p", 2, 3)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "train.py").symlink_to(REPO / "train.py")
    toy = "--dataset toy --steps 2 --query 2 --method clip-lora --episodes".split()
    fit = "--fit p --save saved --steps 2 --weights".split()
    argvs = [[*toy, "1"], [*toy, "2"], [*fit, str(TOY_CLIP)], ["--predict", "saved", "p", "--json"]]
    run = subprocess.run([sys.executable, "-c", ELSEWHERE, json.dumps(argvs)], cwd=tmp_path, capture_output=True, text=True,
                         env={**train.os.environ, "PYTHONPATH": f"{tmp_path / 'bin'}:{REPO}"}, timeout=120)
    assert run.returncode == 0 and "1 of 2 episodes are done" in run.stderr and "Traceback" not in run.stderr, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["pictures"] == 6
    part, = (tmp_path / "results").iterdir()
    assert [json.loads(line).get("episode") for line in part.open()] == [None, 0, 1]


def test_without_meminfo_a_small_machine_is_assumed(toy, monkeypatch):
    at_once = train.pictures_at_once(toy[0], torch.device("cpu"))
    monkeypatch.setattr(train.Path, "read_text", lambda path: (_ for _ in ()).throw(FileNotFoundError(2, "No such file", path)))
    assert 0 < train.pictures_at_once(toy[0], torch.device("cpu")) != at_once


def test_apples_gpu_is_taken_or_refused_in_one_line(capsys):
    if torch.backends.mps.is_available():
        pytest.skip("it is there: then the other tests are what says whether it works")
    assert train.main(["--dataset", "toy", "--device", "mps"]) == 2
    error = capsys.readouterr().err
    said(error, "--device mps cannot be used: ")
    assert len(error) < 200, "not all that torch could do instead"


def test_dropout_stays_on_its_device():
    """That of a CPU is drawn there; any other device has its own."""
    assert atha.dropout(torch.ones(8, device="meta"), 0.5, training=True).device.type == "meta"
