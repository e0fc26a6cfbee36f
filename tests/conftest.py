"""What the tests share. Real pictures, merges and a trained CLIP come from folders that variables name."""
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")         # small matrices: a second thread is in the way
import pytest
import torch
from PIL import Image

REPO, HERE = Path(__file__).parents[1], Path(__file__).parent
sys.path[:0] = [str(REPO), str(HERE)]

import clip_min
import data
import toy_world
import train

TOY_CLIP = HERE / "toy_clip.safetensors"


def from_environment(name: str, what: str) -> Path:
    """The folder or file that an environment variable names; without it the test is skipped."""
    if not os.environ.get(name):
        pytest.skip(f"{name} is not set: it names {what}")
    return Path(os.environ[name])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache, or where the tests were started, nor do its processes."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for module in (clip_min, data):
        monkeypatch.setattr(module, "CACHE", cache / "atha")
    train.load_own.cache_clear()                                  # another test's mine.py is another file
    return cache / "atha"


@pytest.fixture(scope="session")
def toy():
    """The toy CLIP and its tokenizer."""
    return clip_min.load(TOY_CLIP)


def draw_pictures(root: Path, classes: int = 6, each: int = 12) -> Path:
    """A folder of class folders with toy pictures, as PNG."""
    images, labels = toy_world.toy_pictures(each)
    for i in range(classes * each):
        place = root / toy_world.TOY_CLASSES[int(labels[i])] / f"{i % each:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(place)
    return root


def command(*args, program: str = "train.py", **kwargs) -> subprocess.CompletedProcess:
    """Run a program of the repository as a user would; returns the finished process with its text."""
    argv = [sys.executable, str(REPO / program), *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, **kwargs)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal within a tolerance relative to the largest value."""
    error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()
    assert error < tolerance, f"relative difference {error:.2e}"


def refused(capsys, argv: list, *words: object) -> None:
    """The command line says in one line, its last, why it cannot do that, with exit code 2."""
    capsys.readouterr()
    assert train.main([str(a) for a in argv]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train.py: error: ")
    for word in words:
        assert str(word) in last, last
