"""Random damage to everything that a user hands over. The promise: it is taken, or refused in one line; never a traceback.

ATHA_FUZZ=20000 python -m pytest tests/test_fuzz.py    more cases than the few hundred that every run tries; ATHA_FUZZ_SEED other ones
"""
import json
import os
import random
import shutil
import warnings

import pytest
import torch
from conftest import HERE, TOY_CLIP, draw_pictures
from PIL import Image

import clip_min
import data
import train

CASES, SEED = int(os.environ.get("ATHA_FUZZ", 400)), int(os.environ.get("ATHA_FUZZ_SEED", 0))
REFUSALS = (train.UsageError, data.DataError, clip_min.WeightsError)
WORDS = [b"null", b"NaN", b"-1", b"1e999", b"[]", b"{}", b'"', b"\x00", b"\xff\xfe", b"9" * 30, b"true", b"\n", b",", b"../../x",
         b"\\ud800", b"[" * 2000, b'{"a":' * 500, b"0", b"0.5", b'"x"', b"\xf0\x9f\xa6\x81"]
VALUES = ["0", "-1", "1e400", "nan", "", "x", "9" * 40, "\udcff", "{}", "1", "2", "0.5", "all", "atha+", "toy", "/dev/null", "/", "mine.py:X",
          "a:b", "+", "\x00", "--", "-h", "meta", "cpu", "released", "tests", "\n"]


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Cut, doubled, flipped, overwritten, or with a word that means something put in; one to four times."""
    content = bytearray(content)
    for _ in range(chance.randrange(1, 5)):
        at, other = sorted(chance.randrange(len(content) + 1) for _ in range(2))
        kind = chance.randrange(6)
        if kind == 0:
            del content[at:]
        elif kind == 1:
            del content[at: min(other, at + 20)]
        elif kind == 2:
            content[at:at] = content[at: min(other, at + 50)]
        elif kind == 3 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif kind == 4:
            word = chance.choice(WORDS)
            content[at: at + len(word)] = word
        else:
            content[at:at] = chance.choice(WORDS)
    return bytes(content)


def damaged_json(value, chance: random.Random):
    """A JSON value with one part of it, at any depth, replaced by another, left out, or put in twice."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if chance.random() < 0.15 else rest | {key: damaged_json(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        i = chance.randrange(len(value))
        return value[:i] + [damaged_json(value[i], chance)] * chance.randrange(3) + value[i + 1:]
    return chance.choice([None, True, -1, 0, 1, 2 ** 70, 0.5, float("nan"), float("inf"), "", "x", "paper", [], {}, [[1]], "\udcff", 10 ** 400])


# ---------------------------------------------------------------------------------------------------------- targets

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What users hand over, sound: files as bytes."""
    root = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CACHE", root / "cache")
        draw_pictures(root / "p", 2, 3)
        fit = ["--fit", str(root / "p"), "--save", str(root / "saved"), "--steps", "1", "--weights", str(TOY_CLIP)]
        assert train.main(fit) == 0
    header = {"dataset": "x", "recipe": train.fields_of(train.Recipe(), "tir"), "seed": 1}
    lines = [header, *({"episode": n, "accuracy": 20.0 * n, "loss": 0.1} for n in range(5))]
    pictures = {}
    for name in ("a.jpg", "a.png", "a.tif", "a.webp", "a.bmp", "a.ppm", "a.gif"):
        Image.effect_noise((40, 30), 50).convert("RGB").save(root / name)
        pictures[name] = (root / name).read_bytes()
    return {"header": header, "results": "".join(json.dumps(line) + "\n" for line in lines).encode(), "pictures": pictures,
            "saved": (root / "saved").read_bytes(), "weights": TOY_CLIP.read_bytes()}


def results(world, place, chance, toy):
    (place / "x.part0.jsonl").write_bytes(damaged(world["results"], chance))
    train.Results(place / "x", world["header"]).file.close()


def safetensors(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file damaged anywhere, in its header's bytes, or in the meaning of its header."""
    length = int.from_bytes(content[:8], "little")
    header, kind = content[8: 8 + length], chance.randrange(3)
    if kind == 0:
        return damaged(content, chance)
    if kind == 1:
        header = damaged(header, chance)
    else:
        told = json.loads(header)
        notes = {key: json.loads(value) if value[:1] in '[{"0123456789n' else value for key, value in told["__metadata__"].items() if value}
        notes = damaged_json(notes, chance)
        notes = {key: json.dumps(value) for key, value in notes.items()} if isinstance(notes, dict) else {}
        header = json.dumps(told | {"__metadata__": notes}).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length:]


def saved(world, place, chance, toy):
    (place / "saved").write_bytes(safetensors(world["saved"], chance))
    train.load_tuned(place / "saved", *toy).logits(torch.zeros(1, 1, 3, 48, 48))


def weights(world, place, chance, toy):
    (place / "w.safetensors").write_bytes(safetensors(world["weights"], chance))
    clip_min.load(place / "w.safetensors")


def config(world, place, chance, toy):
    source = chance.choice(sorted(p for p in (HERE / "golden" / "backbones").iterdir() if p.is_dir()))
    folder = shutil.copytree(source, place / "hub", symlinks=True)
    file = chance.choice(sorted(folder.glob("*config*.json")))
    told = damaged_json(json.loads(file.read_text()), chance)
    file.write_bytes(json.dumps(told).encode() if chance.random() < 0.7 else damaged(file.read_bytes(), chance))
    clip_min.load(folder)


def merges(world, place, chance, toy):
    (place / "merges.txt").write_bytes(damaged(b"#version: 0.2\n" + b"".join(b"%c %c\n" % (a, a + 1) for a in range(97, 120)), chance))
    clip_min.Tokenizer(place / "merges.txt").encode("hello abcd")


def table(world, place, chance, toy):
    if chance.random() < 0.5:
        folder = place / "ChestX"
        (folder / "images").mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8)).save(folder / "images" / f"{i}.png")
        rows = "".join(f"{i}.png,{name},0\n" for i, name in enumerate(["Mass", "Nodule", "Mass|Hernia", "Effusion"]))
        (folder / "Data_Entry_2017.csv").write_bytes(damaged(f"Image Index,Finding Labels,x\n{rows}".encode(), chance))
        data.load("chestx", place)
    else:
        draw_pictures(place / "DTD" / "images", 2, 2)
        parts = {part: [[f"{name}/0{i}.png", label, name] for label, name in enumerate(("circle", "square"))]
                 for i, part in enumerate(("train", "test"))} | {"val": []}
        told = json.dumps(damaged_json(parts, chance)).encode() if chance.random() < 0.6 else damaged(json.dumps(parts).encode(), chance)
        (place / "DTD" / "split_zhou_DescribableTextures.json").write_bytes(told)
        data.load("dtd", place)


def picture(world, place, chance, toy):
    name = chance.choice(sorted(world["pictures"]))
    (place / name).write_bytes(damaged(world["pictures"][name], chance))
    assert data.decode(place / name, 16).shape == (3, 16, 16)


def names(world, place, chance, toy):
    (place / "names.json").write_bytes(damaged(b'{"ring": "a hoop", "star": "a sun"}', chance))
    train.read_names(str(place / "names.json"), ["ring", "star"])


FLAGS = sorted({f"--{f.name.replace('_', '-')}" for f in train.fields(train.Recipe)} | set(
    "--dataset --shot --method --recipe --split --episodes --way --query --seed --data --weights --out --device --precision --batch "
    "--probe --draw --draw-block --fit --save --holdout --folds --names --predict --json --top --export --format --nonsense".split()))


def command_line(world, place, chance, toy):
    argv = ["--dataset", "toy"] if chance.random() < 0.7 else []
    for _ in range(chance.randrange(4)):
        argv += [chance.choice(FLAGS), *(chance.choice(VALUES) for _ in range(chance.choice([0, 1, 1, 1, 2])))]
    try:
        args = train.parse(argv or ["x"])
    except SystemExit as e:
        assert not e.code                                                # --help
        return
    for method in args.method:
        train.flagged(args, train.recipe_for(args.recipe, method))


TARGETS = {"results": (results, 4), "saved": (saved, 3), "weights": (weights, 2), "config": (config, 2), "merges": (merges, 3),
           "table": (table, 2), "picture": (picture, 6), "names": (names, 3), "command line": (command_line, 6)}


@pytest.mark.parametrize("target", TARGETS)
def test_damage_is_refused_in_one_line_or_does_no_harm(target, world, toy, tmp_path, capsys):
    function, share = TARGETS[target]
    refused = 0
    for number in range(CASES * share // sum(share for _, share in TARGETS.values())):
        chance, place = random.Random(f"{SEED} {target} {number}"), tmp_path / "case"
        place.mkdir()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function(world, place, chance, toy)
        except (*REFUSALS, OSError, MemoryError) as e:                   # of the last two, main makes a line
            refused += 1
            assert str(e).strip(), (target, number)                      # line breaks in it are shown escaped
        except Exception as e:
            raise AssertionError(f"{target}, case {number} of seed {SEED}: {type(e).__name__}: {e}") from e
        shutil.rmtree(place)
    assert refused, "nothing was damaged"
