"""The README: every code block is run, or parsed by its program where it would download or take hours.

What it says of names, numbers and options is compared with the code.
"""
import ast
import importlib.util
import io
import re
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from types import SimpleNamespace

import claims
import pytest
import torch
from conftest import REPO, TOY_CLIP, draw_pictures
from torch.distributed.run import get_args_parser

import clip_min
import data
import train

TEXT = (REPO / "README.md").read_text()
BLOCKS = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.M)}
SHELL = "".join(block for kind, block in BLOCKS.findall(TEXT) if kind == "sh").replace("\\\n", " ")
COMMANDS = [line.split(" #")[0].strip() for line in SHELL.splitlines()]
MINE = next(block for _, block in BLOCKS.findall(TEXT) if block.startswith("# mine.py"))


@pytest.fixture(autouse=True)
def downloaded(own_cache):
    """What would be ViT-B/16 is the toy CLIP, to be quick."""
    own_cache.mkdir()
    shutil.copy(TOY_CLIP, own_cache / "ViT-B-16.safetensors")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The folder of someone who follows the README: leaves/, new_pictures/, leaf.jpg, mine.py, results/."""
    here = tmp_path_factory.mktemp("reader")
    draw_pictures(here / "leaves", 2, 8)
    draw_pictures(here / "new_pictures", 2, 6)
    shutil.copy(here / "leaves" / "circle" / "00.png", here / "leaf.jpg")
    (here / "tests").symlink_to(REPO / "tests")
    (here / "mine.py").write_text(MINE)
    toy = "--dataset toy --method clip-lora atha --episodes 3 --steps 2 --out"
    assert train.main([*toy.split(), str(here / "results")]) == 0
    return here


def quickly(command: str) -> None:
    """Run a train.py command of the README: two steps, two episodes."""
    words = shlex.split(command)[2:]
    words += ["--steps", "2"] * ("--fit" in words or "--dataset" in words)
    words += ["--episodes", "2"] * ("--dataset" in words)
    assert train.main(words) == 0, command


def table(first: str) -> list[list[str]]:
    """Cells of the table whose first row begins with `first`, without the line under it."""
    lines = TEXT[TEXT.index(f"\n| {first}") + 1:].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in [lines[0], *lines[2:]]]


def can_run(block: str) -> bool:
    """Whether all that a block imports is installed."""
    imports = [node for node in ast.walk(ast.parse(block)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [getattr(node, "module", None) or alias.name for node in imports for alias in node.names]
    return all(importlib.util.find_spec(name.partition(".")[0]) for name in names)


def test_the_commands_are_those_of_the_programs(reader, monkeypatch):
    monkeypatch.chdir(reader)                                            # where mine.py is
    fetched = re.findall(r"`((?:hf|python|pip) [^`]*)`", SECTIONS["Backbones"])
    for command in COMMANDS + fetched:
        words = shlex.split(command)
        if "torchrun" in words:
            started = get_args_parser().parse_args(words[words.index("torchrun") + 1:])
            assert started.training_script == "train.py"
        if "train.py" in words:
            train.parse(words[words.index("train.py") + 1:])
        elif words[:2] == ["python", "tests/claims.py"]:
            claims.parse(words[2:])
        elif words[0] == "python" and words[1] != "-m":
            assert (REPO / words[1]).is_file(), command
        else:
            assert words[:2] in (["pip", "install"], ["python", "-m"], ["hf", "download"]), command
    tests = [command for command in COMMANDS if "pytest" in command or ".[test]" in command]
    ci = (REPO / ".ci" / "run").read_text().replace(" --quiet --disable-pip-version-check", "")
    assert len(tests) == 2 and all(command in ci for command in tests), "CI does what the README says"


def test_your_own_pictures_and_your_own_method(reader, monkeypatch, capsys):
    monkeypatch.chdir(reader)
    for command in [c for c in COMMANDS if re.search("--fit|--predict|--export|mine.py", c)]:
        quickly(command)
    said = capsys.readouterr().out
    assert re.search(r"zero-shot: +[\d.]+ ± [\d.]+ %\nclip-lora: +[\d.]+ ±", said) and "accuracy" in said
    assert re.search(r"\| mine.py:Mine\+atha \| [+-]", said), "and is compared with clip-lora"
    assert (reader / "leaf-peft").is_dir() and (reader / "sheet.png").is_file()
    assert len(MINE.splitlines()) <= 33


def test_the_own_method_learns_and_its_loss_acts(reader, monkeypatch):
    monkeypatch.chdir(reader)
    quickly("python train.py --fit leaves --method mine.py:Mine --save own.safetensors")
    tensors, notes = train.read_saved("own.safetensors")
    share, = (tensor for name, tensor in tensors.items() if name.endswith(".share"))
    assert share.abs() > 1e-3
    own = train.own_part("mine.py:Mine")(None, torch.zeros(1, 2, 3), train.Recipe, set())
    own.recipe = SimpleNamespace(even=0.5)
    text = torch.eye(2)[None]
    features = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])                  # to the two texts: 0.8 and 0.4
    step = SimpleNamespace(features=features, text=text)
    torch.testing.assert_close(own.loss(step), torch.tensor([0.5 * 100 * 0.08]))


@pytest.mark.parametrize("section", [name for name, text in SECTIONS.items() if "```python" in text])
def test_python_blocks(section, reader, monkeypatch, capsys):
    monkeypatch.chdir(reader)
    monkeypatch.setitem(sys.modules, "train", train)
    if section == "Your own pictures" and not (reader / "leaf-hf").exists():     # the test above has not run
        for command in [c for c in COMMANDS if "--fit" in c or "--export" in c]:
            quickly(command)
    if importlib.util.find_spec("timm"):
        import timm
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model",
                            lambda name, pretrained, **how: create(name, depth=2, **how))
    names = {}
    for kind, block in BLOCKS.findall(SECTIONS[section]):
        if kind != "python" or block == MINE:
            continue
        code = compile(re.sub(r"range\((100|30)\)", "range(11)", block), "README.md", "exec")
        if not can_run(block):
            continue
        torch.manual_seed(0)
        with redirect_stdout(io.StringIO()) as said:
            exec(code, names)
        if promised := re.findall(r"# -> (.*)", block):
            assert said.getvalue().splitlines() == promised
        elif "print" in block:
            assert said.getvalue().strip()


def shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_tables_of_recipes_and_options_are_those_of_the_code():
    header, *rows = table("of | number")
    assert [name.strip("`") for name in header[3:]] == list(train.RECIPES)
    assert [row[1] for row in rows] == [f"`--{f.name.replace('_', '-')}`" for f in fields(train.Recipe)]
    for f, (groups, _, text, *told) in zip(fields(train.Recipe), rows):
        assert groups.lower().replace("-", "").replace(",", "").split() == f.metadata["groups"]
        values = [shown(getattr(recipe, f.name)) for recipe in train.RECIPES.values()]
        assert (text, [cell or told[0] for cell in told]) == (f.metadata["help"], values), f.name
    flags = {row[1].strip("`") for row in table("of | flag")[1:]}
    assert flags >= {f"--{line.split()[1].replace('_', '-')}" for line in train.FLAGS.strip().splitlines()}
    for flag in flags:
        with pytest.raises(train.UsageError, match="expected|one of|not allowed|give"):
            train.parse([flag])
    listed = " ".join(row[0] for row in table("name | what it is"))
    assert all(f"`{name}`" in listed for name in train.METHODS)


def test_the_tables_of_figures_and_sets_are_those_of_the_code():
    rows = table("1-shot | from")[1:] + table("5-shot | from")[1:]
    means = [row[-1] for row in rows]
    whole = [row[2:] for row in rows if all(row)]
    for _, _, _, *figures in map(str.split, train.PAPER.strip().splitlines()[1:]):
        assert figures in whole or figures[0] == "-" and figures[-1] in means, figures
    for name, row in zip(data.FSL, table("`--dataset` | folder under")[1:], strict=True):
        known = data.DATASETS[name]
        assert [row[0], row[1], row[5]] == [f"`{name}`", f"`{known.folder}`", known.prompt]
        assert all(f"`{part}`" in row[2] + row[3] for part in known.needs if part), name
    offline = "\n".join(map(" ".join, table("what | address")))
    for fact in (clip_min.VIT_B16_URL, clip_min.VIT_B16_SHA256, clip_min.MERGES_URL, clip_min.MERGES_SHA256):
        assert fact in offline


def test_names_and_links_lead_somewhere():
    for name, file in re.findall(r"\[`(\w+)`\]\((\w+\.py)\)", TEXT):
        code = (REPO / file).read_text()
        assert re.search(rf"^(?:class|def) {name}\b", code, re.M), f"{name} is not in {file}"
    titles = re.findall(r"^#+ (.*)", TEXT, re.M)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]*)\)", TEXT)) <= anchors
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", TEXT)
    for path in pictures + re.findall(r"`(tests/[\w./]+\.\w+)`", TEXT):
        assert (REPO / path).is_file(), path


def test_no_sentence_is_longer_than_a_breath():
    plain = re.sub(r"<!--.*?-->|```.*?```", "\n\n", TEXT, flags=re.S)
    plain = re.sub(r"^\|.*", "\n", re.sub(r"`[^`]*`", "code", plain), flags=re.M)
    plain = re.sub(r"^( *[-*#]|\d+\.|!\[).*", r"\n\g<0>\n", plain, flags=re.M)
    for paragraph in re.split(r"\n\s*\n", plain):
        for sentence in re.split(r"(?<=[.!?])[)*]*\s", " ".join(paragraph.split())):
            assert len(sentence.split()) <= 40, sentence
