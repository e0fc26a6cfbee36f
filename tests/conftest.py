"""What the tests share. Real pictures, BPE merges and a trained CLIP come from folders named by environment variables."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

REPO, HERE = Path(__file__).parents[1], Path(__file__).parent
sys.path.insert(0, str(REPO))
os.environ.setdefault("OMP_NUM_THREADS", "2")

import clip_min  # noqa: E402
import data  # noqa: E402

TOY_CLIP = HERE / "toy_clip.safetensors"


def from_environment(name: str, what: str) -> Path:
    """The folder or file that an environment variable names; without it the test is skipped, with the reason."""
    if not os.environ.get(name):
        pytest.skip(f"{name} is not set: it names {what}")
    return Path(os.environ[name])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache folder, nor do the processes that it starts."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for module in (clip_min, data):
        monkeypatch.setattr(module, "CACHE", cache / "atha")
    return cache / "atha"


@pytest.fixture(scope="session")
def toy():
    """The toy CLIP and its tokenizer."""
    return clip_min.load(TOY_CLIP)


@pytest.fixture
def folder(tmp_path):
    """A folder of 6 class folders with 20 toy pictures each, as PNG."""
    images, labels = data.toy_pictures(20)
    for i in range(6 * 20):
        place = tmp_path / "pictures" / data.TOY_CLASSES[int(labels[i])]
        place.mkdir(parents=True, exist_ok=True)
        save_image(images[i] / 255, place / f"{i % 20:02d}.png")
    return tmp_path / "pictures"


def command(*args, program: str = "train.py", **kwargs) -> subprocess.CompletedProcess:
    """Run a program of the repository as a user would; returns the finished process with its text."""
    return subprocess.run([sys.executable, str(REPO / program), *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal within a tolerance relative to the largest value."""
    error = ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()
    assert error < tolerance, f"relative difference {error:.2e}"
