"""Every code block of the README is run, or, where it would download or take hours, at least parsed by the program it calls."""
import re
import shlex
import shutil

import pytest
import torch
from conftest import REPO, TOY_CLIP, draw_pictures

import data
import train

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (REPO / "README.md").read_text(), re.M | re.S)
COMMANDS = [line.split("#")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]


@pytest.fixture(autouse=True)
def downloaded(own_cache):
    """What would be ViT-B/16 is the toy CLIP, to be quick."""
    own_cache.mkdir()
    shutil.copy(TOY_CLIP, own_cache / "ViT-B-16.safetensors")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The folder of someone who follows the README: leaves/, new_pictures/, leaf.jpg."""
    here = tmp_path_factory.mktemp("reader")
    draw_pictures(here / "leaves", 2, 6)
    draw_pictures(here / "new_pictures", 2, 6)
    shutil.copy(here / "leaves" / "circle" / "00.png", here / "leaf.jpg")
    return here


def test_the_commands_are_those_of_the_programs():
    for command in COMMANDS:
        words = shlex.split(command)
        if "train.py" in words:
            train.parse(words[words.index("train.py") + 1:])
        else:
            assert words[:2] in (["pip", "install"], ["python", "-m"]), command
    tests = [c for c in COMMANDS if "pytest" in c or ".[test]" in c]
    ci = (REPO / ".ci" / "run").read_text().replace(" --quiet --disable-pip-version-check", "")
    assert len(tests) == 2 and all(c in ci for c in tests), "CI does what the README says"


def test_your_own_pictures(reader, monkeypatch, capsys):
    monkeypatch.chdir(reader)
    for command in [c for c in COMMANDS if "--fit" in c or "--predict" in c]:
        assert train.main(shlex.split(command)[2:]) == 0
    said = capsys.readouterr().out
    assert re.search(r"zero-shot: +[\d.]+ %.*\natha: +[\d.]+ %", said) and "accuracy" in said


@pytest.mark.parametrize("code", [block for kind, block in BLOCKS if kind == "python"])
def test_python_blocks(code, reader, monkeypatch, capsys):
    monkeypatch.chdir(reader)
    if "leaf.safetensors" in code and not (reader / "leaf.safetensors").exists():
        train.main(["--fit", "leaves", "--save", "leaf.safetensors", "--steps", "2"])
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    assert re.search("|".join(data.TOY_CLASSES[:4]), capsys.readouterr().out)
