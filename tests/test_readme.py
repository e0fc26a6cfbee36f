"""README.md: its code runs and prints what it says, its commands parse, its names and numbers are the code's.

A reader's folder has leaves/, new_pictures/, leaf.jpg and mine.py; what would be ViT-B/16 is the toy CLIP.
"""
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import REPO, TOY_CLIP, draw_pictures
from torch.distributed.run import get_args_parser

import clip_min
import data
import train

TEXT = (REPO / "README.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.M)}
SHELL = re.findall(r"^```sh\n(.*?)^```", TEXT, re.M | re.S) + re.findall(r"`(python [^`]*)`", TEXT)
LINES = re.split(r"\n|&&", "\n".join(SHELL))
COMMANDS = [shlex.split(line, comments=True) for line in LINES if line]
TRAIN = [words[words.index("train.py") + 1:] for words in COMMANDS if "train.py" in words]


def code_in(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@pytest.fixture
def reader(own_cache):
    own_cache.mkdir()
    shutil.copy(TOY_CLIP, own_cache / "ViT-B-16.safetensors")
    draw_pictures(Path("leaves"), 2, 8)
    draw_pictures(Path("new_pictures"), 2, 6)
    shutil.copy("leaves/circle/00.png", "leaf.jpg")
    Path("mine.py").write_text(code_in(SECTIONS["Your own method"])[0])


def run(part: str) -> None:
    """The commands of train.py in which a text is, in two steps of two episodes."""
    for words in TRAIN:
        if part in " ".join(words):
            few = ["--steps", "2"] * ("--predict" not in words)
            few += ["--episodes", "2", "--query", "2"] * ("--dataset" in words)
            assert train.main([*words, *few]) == 0, words


@pytest.mark.parametrize("name", [name for name, section in SECTIONS.items() if code_in(section)])
def test_python_runs_and_prints_what_it_says(name, reader, capsys):
    if name == "Your own pictures":
        run("leaf.safetensors")
        assert Path("leaf-hf/model.safetensors").is_file()
    names = {}
    for block in code_in(SECTIONS[name]):
        if needs := re.search("(?:import|from) (open_clip|transformers)", block):
            pytest.importorskip(needs[1])
        capsys.readouterr()
        exec(compile(block.replace("Recipe()", "Recipe(steps=9)"), name, "exec"), names)
        said, promised = capsys.readouterr().out, re.findall(r"# -> (.*)", block)
        assert bool(said) == ("print(" in block) and (not promised or said.splitlines() == promised), said


def test_the_own_method_is_compared_saved_and_predicts(reader, capsys):
    run("mine.py")
    out = capsys.readouterr().out
    assert re.search(r"\| mine.py:Mine\+atha \| [\d.]+ \([+-]", out) and "leaves" not in out


def test_commands_are_those_of_the_programs(reader):
    ci = (REPO / ".ci/run").read_text().replace("--quiet --disable-pip-version-check ", "")
    for words in COMMANDS:
        if "torchrun" in words:
            started = get_args_parser().parse_args(words[words.index("torchrun") + 1:])
            assert started.training_script == "train.py"
        elif words[1] == "clip_min.py":
            clip_min.main(words[2:])
        elif words[1].startswith("tests/"):
            assert all(word in (REPO / words[1]).read_text() for word in words[2:])
        elif words[1] != "train.py":
            assert words[:2] == ["pip", "install"] or " ".join(words) in ci
    for args in map(train.parse, TRAIN):
        assert {*args.dataset} <= {"toy", *data.DATASETS}
        for method in args.method:
            train.recipe_for(args.recipe, method, args.shot[0])
    assert 'pip install -e ".[test]"' in ci


def test_names_numbers_and_links_are_those_of_the_code():
    for name, file in re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", TEXT):
        assert re.search(rf"^(class|def) {name}\b", (REPO / file).read_text(), re.M), (name, file)
    titles = re.findall("^##+ (.*)", TEXT, re.M)
    anchors = {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]*)\)", TEXT):
        assert target in anchors or "//" in target or (REPO / target).is_file(), target
    known = {f"--{f.name.replace('_', '-')}" for f in fields(train.Options) + fields(train.Recipe)}
    assert {*re.findall(r"(?<=[ `])--[a-z-]+", TEXT)} <= known | {"--nproc-per-node", "--gpu"}
    assert all(f"`{name}`" in TEXT for name in [*train.METHODS, *data.GROUPS["all"]])
    for row in SECTIONS["Paper, authors' code, ours"].splitlines():
        cells = row.split(" | ")
        if len(cells) == 5:
            flags = re.findall("--([a-z-]+)`", cells[0])
            values = [getattr(train.Recipe(), flag.replace("-", "_")) for flag in flags]
            assert ", ".join(x if isinstance(x, str) else f"{x:g}" for x in values) in cells[3], row
    figures = re.compile(r"\d\d\.\d\d")
    assert {*figures.findall(SECTIONS["The papers' figures"])} <= {*figures.findall(train.PAPER)}


def test_it_is_short_and_its_sentences_are():
    assert len(TEXT.split()) <= 5000 and "{{" not in TEXT
    plain = re.sub(r"```.*?```", "\n\n", TEXT, flags=re.S)
    plain = re.sub(r"^.* \| .*$", "\n", re.sub(r"`[^`]*`|\]\([^)]*\)", "code", plain), flags=re.M)
    plain = re.sub(r"^( *[-*#]|\d+\.|!\[).*", r"\n\g<0>\n", plain, flags=re.M)
    for paragraph in re.split(r"\n\s*\n", plain):
        for sentence in re.split(r"(?<=[.!?:])[)*]*\s", " ".join(paragraph.split())):
            assert len(sentence.split()) <= 40, sentence
