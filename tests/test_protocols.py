"""Methods of the user's own, tasks of unequal classes, splits, results files, and machines that share no folder."""
import json
import os
import random
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPO, TOY_CLIP, draw_pictures, from_environment, refused
from test_faults import wait_for
from test_train import toy_pool

import data
import train
from data import Task

MINE = '''
from atha import Part, cosines, count_of, mark_top, scale_patches, text_to_tokens


class Mine(Part):
    """Halve the patch tokens that are least like any class."""
    fields = {"mine_share": (0.1, "share of the tokens")}

    def vision_hook(self, text):
        visual = self.backbone.visual
        texts = text_to_tokens(text, visual.proj)

        def hook(tokens, layer):
            nearest = cosines(tokens[:, 1:], texts).max(-1).values          # (B, L)
            count = count_of(self.recipe.mine_share, nearest.shape[1])
            return scale_patches(tokens, 1 - mark_top(nearest, count, largest=False) / 2)
        return hook
'''
TOY = "--dataset toy --steps 2 --episodes 2 --query 2".split()


@pytest.fixture
def mine():
    """A user's method in the folder where the command is run."""
    Path("mine.py").write_text(MINE)
    train.own_part.cache_clear()
    return "mine.py:Mine"


# ------------------------------------------------------------------------------------------- a method of one's own

def test_a_method_of_ones_own_joins_ours_with_a_flag_resume_and_comparison(mine, capsys):
    argv = [*TOY, "--method", "clip-lora", f"{mine}+atha", "--mine-share", "0.5"]
    assert train.main(argv) == 0
    first = capsys.readouterr().out
    assert re.search(r"^toy 5-way 1-shot mine.py:Mine\+atha \(paper\): ", first, re.M)
    assert re.search(r"minus clip-lora, paired.*\n.*\n\| mine.py:Mine\+atha \| [+-]", first)
    part = Path("results/toy-5way-1shot-Mine+atha-paper-seed1.part0.jsonl")
    assert json.loads(part.read_text().splitlines()[0])["recipe"]["mine_share"] == 0.5
    assert train.main(argv) == 0 and "episodes are done" not in capsys.readouterr().err
    refused(capsys, [*TOY, "--method", f"{mine}+atha", "--mine-share", "0.2"], "mine_share 0.5", "0.2")
    Path("mine.py").write_text(MINE.replace("/ 2", "/ 3"))
    train.own_part.cache_clear()
    refused(capsys, argv, "code", "--out")


def test_a_method_of_ones_own_acts_and_its_field_is_read(mine, toy):
    recipe = train.extended(train.Recipe(), [train.own_part(mine)])
    ids, tokens = toy[1](["a ring.", "a star."], 40)[None], torch.randn(3, 37, 128)
    for share, changed in ((0.0, 0), (0.5, 18)):
        learner = train.Learner(toy[0], ids, mine, replace(recipe, mine_share=share))
        ratio = learner.hook(learner.text()[1])(tokens, 0) / tokens
        assert (ratio[..., 0] < 0.6).sum(1).tolist() == [changed] * 3


def test_a_saved_method_of_ones_own_is_run_only_when_it_is_named(mine, capsys):
    draw_pictures(Path("pictures"), 2, 3)
    weights = ["--weights", str(TOY_CLIP)]
    fit = ["--fit", "pictures", "--save", "saved", "--steps", "2", "--method", mine, *weights]
    assert train.main(fit) == 0
    predict = ["--predict", "saved", "pictures", *weights]
    refused(capsys, predict, "mine.py:Mine", "--method")
    assert train.main([*predict, "--method", mine]) == 0 and "accuracy" in capsys.readouterr().out
    Path("mine.py").write_text(MINE.replace("/ 2", "/ 3"))
    train.own_part.cache_clear()
    refused(capsys, [*predict, "--method", mine], "other code")


def test_a_method_of_ones_own_may_import_what_lies_beside_it(mine, capsys):
    Path("beside_mine.py").write_text("SHARE = 0.3")
    Path("mine.py").write_text("from beside_mine import SHARE" + MINE.replace("(0.1,", "(SHARE,"))
    train.own_part.cache_clear()
    assert train.own_part(mine).fields["mine_share"][0] == 0.3


@pytest.mark.parametrize("code, words", [
    ("x = 1", "KeyError: 'Mine'"), ("class Mine: pass", "not a subclass of atha.Part"), ("1 / 0", "ZeroDivisionError"),
    ("def", "SyntaxError"), (MINE.replace("mine_share\": (0.1", "rho\": (0.1"), "rho is one of Recipe already"),
    (MINE.replace("vision_hook", "vison_hook") + "    def loss(self, step): return 0.0\n", "nothing calls vison_hook: is vision_hook meant?"),
    (MINE.replace("vision_hook", "my_hook"), "Mine overrides no hook and no loss")])
def test_a_method_of_ones_own_that_cannot_be_used_is_said_in_one_line(code, words, capsys):
    Path("mine.py").write_text(code)
    train.own_part.cache_clear()
    refused(capsys, [*TOY, "--method", "mine.py:Mine"], "mine.py:Mine", words)
    refused(capsys, [*TOY, "--method", "nowhere.py:Mine"], "nowhere.py")
    os.mkfifo("pipe.py")
    refused(capsys, [*TOY, "--method", "pipe.py:Mine"], "not an ordinary file")


PART = """
import torch
from atha import Part
class Mine(Part):
    fields = {{"mine_share": (0.1, "share of the tokens")}}
    def {0}:
        return {1}
"""
HOOK = "vision_hook(self, text)"


@pytest.mark.parametrize("method, made, words", [
    ("loss(self, step)", "step.features.mean()", "Mine.loss gave [] torch.float32 where [2] torch.float32"),
    ("loss(self, step)", "step.logits.mean(1)", "Mine.loss gave [2, 5]"), ("loss(self, step)", "None", "Mine.loss gave None"),
    (HOOK, "lambda x, layer: x[0]", "Mine.vision_hook gave [37, 128] torch.float32 where [10, 37, 128]"),
    (HOOK, "lambda x, layer: x.double()", "Mine.vision_hook gave [10, 37, 128] torch.float64"),
    (HOOK, "lambda x, layer: None", "Mine.vision_hook gave None"), (HOOK, "lambda x, layer: x[:5]", "Mine.vision_hook gave [5, 37"),
    ("text_hook(self, x, layer)", "x[:, 1:]", "Mine.text_hook gave"), ("groups(self)", "[('adam', [], 1e-3)]", "Mine.groups takes adamw or sgd"),
    ("groups(self)", "[('sgd', [torch.zeros(2, requires_grad=True)], 1e-3)]", "Mine.groups takes adamw or sgd, and parameters of the part")])
def test_what_a_method_of_ones_own_gives_back_must_fit(method, made, words, capsys):
    """Added as it is, it would be spread over the episodes, break a block of the tower, or not be saved."""
    loss = "" if "loss" in method else "    def loss(self, step):\n        return 0.0\n"
    Path("mine.py").write_text(PART.format(method, made) + loss)
    train.own_part.cache_clear()
    refused(capsys, [*TOY, "--method", "mine.py:Mine"], words)


INIT = """
    def loss(self, step):
        return 0.0
    def __init__(self, *how):
        super().__init__(*how)
        self.weight = torch.nn.Parameter(torch.zeros({}))
"""


@pytest.mark.parametrize("shape, groups, words", [
    ("1", "[('adamw', [self.weight], 1e-3)]", "parts.1.weight has shape [1], but its first dimension is the episodes', 2"),
    ("2, 3", "[]", "parts.1.weight is in no group"),
    ("2, 3", "[('adamw', [self.weight], 1e-3)]", "parts.1.weight never got a gradient")])
def test_what_a_method_of_ones_own_learns_is_one_an_episode_and_learned(shape, groups, words, capsys):
    """Shared by the episodes, it would let them learn from each other; in no group, it would stay as it is."""
    Path("mine.py").write_text(PART.format("groups(self)", groups) + INIT.format(shape))
    train.own_part.cache_clear()
    refused(capsys, [*TOY, "--method", "mine.py:Mine", "--episodes", "2", "--steps", "1"], words)


@pytest.mark.parametrize("method, made", [
    ("loss(self, step)", "0.5"), ("loss(self, step)", "step.logits.logsumexp(-1).mean(1)"), (HOOK, "lambda x, layer: x[:, :-1]"),
    (HOOK, "None"), ("text_hook(self, x, layer)", "x + 1")])
def test_what_a_method_of_ones_own_may_give_back(method, made, capsys):
    Path("mine.py").write_text(PART.format(method, made))
    train.own_part.cache_clear()
    assert train.main([*TOY, "--method", "mine.py:Mine"]) == 0, capsys.readouterr().err


def test_the_help_says_whose_fields_they_are(mine, capsys):
    with pytest.raises(SystemExit):
        train.main(["--method", mine, "--help"])
    said = capsys.readouterr().out
    assert "recipe of mine (a method of your own):" in said and "recipe of tir (defaults are the paper's):" in said


# ------------------------------------------------------------------------------------------------- tasks of any kind

def job_of(toy, method="clip-lora", **changes):
    pool = toy_pool()
    rows = train.class_rows(toy[1], "a photo of a {}.", pool.classes, 40)
    return train.Job(toy[0], pool, rows, method, replace(train.Recipe(), steps=2, dropout=0.0, **changes))


@pytest.mark.parametrize("method", ["clip-lora", "svl", "lv", "atha+tir"])
def test_classes_of_unequal_numbers_and_query_sets_of_any_size(toy, method):
    """Three pictures of one class and one of another; 4 and 30 queries: each task as it would be alone."""
    job, rows = job_of(toy, method), toy_pool().rows
    support = torch.stack([rows[2][0], rows[5][0], rows[5][1], rows[5][2]])
    tasks = [Task(torch.tensor([2, 5]), support, torch.tensor([0, 1, 1, 1]), rows[5][10:10 + n], torch.ones(n).long())
             for n in (4, 30)]
    learner = job.learn(tasks, [(1, 0), (1, 1)])
    both = job.logits(learner, tasks)
    assert [logits.shape for logits in both] == [(4, 2), (30, 2)] and learner.losses.isfinite().all()
    alone = job.logits(job.learn(tasks[1:], [(1, 1)]), tasks[1:])[0]
    assert (both[1] - alone).abs().max() < 1e-2 * alone.abs().max()


def test_queries_that_tasks_share_are_copied_once(toy, monkeypatch):
    job, seen = job_of(toy), []
    whole = train.Learner.prepare
    monkeypatch.setattr(train.Learner, "prepare", lambda self, images: seen.append(len(images)) or whole(self, images))
    task = toy_pool().task(0, way=2, shot=1, query=15, seed=1)
    learner = job.learn([task, task], [(1, 0), (1, 1)])
    assert [x.shape for x in job.logits(learner, [task, task])] == [(30, 2)] * 2 and seen == [1, 1]


def test_ra_in_minibatches_remembers_each_picture(toy):
    """One pass shows all pictures, so RA acts from the second on; with all of them in a step it is the full batch."""
    task = toy_pool().task(0, way=2, shot=4, query=1, seed=1)
    plain, small, none = ({"augment": "none", "minibatch": 4, "ra_weight": w, "extra_share": 1.0} for w in (3.0, 0.0, 0.0))
    whole = job_of(toy, "ra-only", **plain | {"minibatch": 0}).learn([task], [(1, 0)]).losses
    assert torch.equal(whole, job_of(toy, "ra-only", **plain | {"minibatch": 8}).learn([task], [(1, 0)]).losses)
    with_ra, without = (replace(job_of(toy, "ra-only", **x).recipe, steps=6) for x in (plain, small))
    losses = [replace(job_of(toy, "ra-only"), recipe=r).learn([task], [(1, 0)]).losses[:, 0] for r in (with_ra, without)]
    same = (losses[0] == losses[1]).tolist()
    assert same[:2] == [True, True] and not same[2], "the first pass has nothing to remember"


# --------------------------------------------------------------------------------------------------------- splits

@pytest.fixture
def split(tmp_path):
    """Toy pictures as a set with CoOp's split: 4 to learn from and 6 to be tested on, of each of 5 classes."""
    root = draw_pictures(tmp_path / "DTD" / "images", 5, 10)
    parts = {"train": [], "val": [], "test": []}
    for label, folder in enumerate(sorted(root.iterdir())):
        for i, picture in enumerate(sorted(folder.iterdir())):
            parts["train" if i < 4 else "test"].append([f"{folder.name}/{picture.name}", label, folder.name])
    (tmp_path / "DTD" / "split_zhou_DescribableTextures.json").write_text(json.dumps(parts))
    return ["--dataset", "dtd", "--data", str(tmp_path), "--weights", str(TOY_CLIP), "--split", "--steps", "2"]


def test_a_split_is_tested_whole_with_all_classes_by_seeds(split, toy, tmp_path, capsys):
    """The accuracy is the one that the logits give by hand."""
    assert train.main([*split, "--method", "zero-shot", "svl", "--shot", "1", "6"]) == 0
    said = capsys.readouterr()
    assert said.err.count("to learn from, not 6: drawn with replacement") == 5, "once a class"
    assert said.err.count("0 of 3 seeds are done") == 4 and "episode" not in said.err
    assert said.out.count("over 3 seeds") == 4 and "dtd all classes 1-shot zero-shot (clip-lora-fsl): " in said.out
    pool = data.load("dtd", tmp_path)
    texts = toy[1]([f"{name} texture." for name in pool.classes], 40)
    task = pool.split(1, 1)
    right = train.Learner(toy[0], texts[None], "zero-shot", train.Recipe())
    answers = right.logits(data.plain(pool.images[task.query], 48)[None])[0].argmax(-1)
    assert len(task.query) == 30 and f"{100 * (answers == pool.labels[task.query]).double().mean():.2f} ± 0.00" in said.out
    header, *records = map(json.loads, Path("results/dtd-split-1shot-svl-clip-lora-fsl-seed1.part0.jsonl").open())
    assert header["recipe"]["prompt"] == "{} texture." and header["recipe"]["rank"] == 2
    assert [record["episode"] for record in records] == [0, 1, 2]


def test_a_split_of_the_real_tiles(tmp_path, capsys):
    """Half of the sample to learn from: tuning is above zero-shot, and a run in two pieces is that of one."""
    root = from_environment("ATHA_DATA", "a folder with eurosat/2750").resolve() / "eurosat" / "2750"
    weights = from_environment("ATHA_WEIGHTS", "a small trained CLIP")
    (tmp_path / "eurosat").mkdir()
    (tmp_path / "eurosat" / "2750").symlink_to(root)
    chance, parts = random.Random(0), {"train": [], "val": [], "test": []}
    for label, folder in enumerate(sorted(root.iterdir())):
        pictures = sorted(folder.iterdir())
        chance.shuffle(pictures)
        for i, picture in enumerate(pictures[:60]):
            parts["train" if i < 40 else "test"].append([f"{folder.name}/{picture.name}", label, folder.name])
    (tmp_path / "eurosat" / "split_zhou_EuroSAT.json").write_text(json.dumps(parts))
    argv = ["--dataset", "eurosat", "--data", str(tmp_path), "--weights", str(weights), "--split", "--precision", "bfloat16"]
    argv += "--shot 4 --method zero-shot clip-lora --steps 60 --lr 2e-3 --minibatch 16".split()
    assert train.main([*argv, "--out", "whole"]) == 0
    zero, tuned = map(float, re.findall(r"fsl\): ([\d.]+) ±", capsys.readouterr().out))
    assert tuned > zero + 5
    assert train.main([*argv, "--out", "pieces", "--episodes", "1"]) == 0
    assert train.main([*argv, "--out", "pieces"]) == 0
    found = [{r["episode"]: r["accuracy"] for r in map(json.loads, next(Path(out).glob("*zero-shot*")).open()) if "episode" in r}
             for out in ("whole", "pieces")]
    assert found[0] == found[1]


# -------------------------------------------------------------------------------------------------- results files

def test_a_field_that_a_file_does_not_know_had_its_default(capsys):
    """So that a new field leaves old results valid; another value than the default is another run."""
    assert train.main(TOY) == 0
    part = Path("results/toy-5way-1shot-atha-paper-seed1.part0.jsonl")
    first, *rest = part.read_text().splitlines(keepends=True)
    header = json.loads(first)
    assert "tir_top" not in header["recipe"] and "rho" in header["recipe"], "only what the method reads"
    del header["recipe"]["rho"]
    part.write_text("".join([json.dumps(header) + "\n", *rest]))
    assert train.main(TOY) == 0
    refused(capsys, [*TOY, "--method", "atha", "--rho", "0.2"], part, "rho 0.1", "0.2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The lines of the results file of a finished run."""
    out = tmp_path_factory.mktemp("finished")
    assert train.main([*TOY, "--method", "zero-shot", "--out", str(out)]) == 0
    return next(out.iterdir()).read_bytes().splitlines()


@pytest.mark.parametrize("line, damage", [
    (0, "[1]"), (0, "{}"), (0, "garbage"), (1, ""), (1, "null"), (1, '{"episode": 0}'), (1, '{"episode": "0", "accuracy": 5}'),
    (1, '{"episode": 0, "accuracy": NaN}'), (1, '{"episode": 0, "accuracy": 101}'), (2, "\x00\x00"), (2, "[" * 5000), (2, '{"epi')])
def test_a_damaged_results_file_is_named_with_its_line(line, damage, finished, capsys):
    part = Path("results/toy-5way-1shot-zero-shot-paper-seed1.part0.jsonl")
    part.parent.mkdir()
    lines = [*finished[:line], damage.encode(), *finished[line + 1:]]
    part.write_bytes(b"".join(one + b"\n" for one in lines))
    refused(capsys, [*TOY, "--method", "zero-shot"], part, f"line {line + 1}")
    assert part.read_bytes().splitlines() == lines, "left as it was"


def test_a_results_file_that_is_a_pipe_is_refused(capsys):
    Path("results").mkdir()
    os.mkfifo("results/toy-5way-1shot-zero-shot-paper-seed1.part0.jsonl")
    refused(capsys, [*TOY, "--method", "zero-shot"], "not an ordinary file")


@pytest.mark.parametrize("change", [Path.unlink, lambda part: part.rename("elsewhere")])
def test_a_results_file_that_goes_away_during_the_run_loses_nothing_that_is_known(change, monkeypatch, capsys):
    """RANK alone is not torchrun's: WORLD_SIZE belongs to it."""
    whole, seen = train.try_tasks, []

    def disturbed(*args, **kwargs):
        seen.extend(Path("results").glob("*.part0.jsonl"))
        for part in Path("results").glob("*.part0.jsonl"):
            change(part)
        return whole(*args, **kwargs)
    monkeypatch.setattr(train, "try_tasks", disturbed)
    monkeypatch.setenv("RANK", "1")
    assert train.main([*TOY, "--method", "zero-shot", "--batch", "1"]) == 0
    assert len(seen) == 1 and "over 2 episodes" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ several machines

def node(rank: int, port: int, out: Path, *more: str) -> subprocess.Popen:
    """One of two machines, with a folder of its own."""
    out.mkdir(exist_ok=True)
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, str(REPO / "train.py"), *TOY, "--method", "clip-lora", "--episodes", "6", "--batch", "1", *more]
    return subprocess.Popen(argv, cwd=out, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_machines_without_a_shared_folder(tmp_path, capsys):
    """One is killed and both are started again: what each had done stays, the sum is that of one machine."""
    outs, port = [tmp_path / "a", tmp_path / "b"], free_port()
    nodes = [node(rank, port, out, "--steps", "200") for rank, out in enumerate(outs)]
    try:
        wait_for(lambda: all(part.read_bytes().count(b"\n") > 1 for out in outs for part in out.glob("results/*"))
                 and all(list(out.glob("results/*")) for out in outs), 120)
        nodes[1].kill()
    finally:
        for run in nodes:
            run.kill()
            run.communicate()
    before = {out: next(out.glob("results/*")).read_bytes() for out in outs}
    port = free_port()
    nodes = [node(rank, port, out, "--steps", "200") for rank, out in enumerate(outs)]
    said = [run.communicate(timeout=200) for run in nodes]
    assert [run.returncode for run in nodes] == [0, 0], said
    assert "over 6 episodes" in said[0][0] and said[1][0] == ""
    found = []
    for out in outs:
        whole = next(out.glob("results/*")).read_bytes()
        assert whole.startswith(before[out][: before[out].rfind(b"\n") + 1])
        found += [json.loads(line)["episode"] for line in whole.splitlines()[1:]]
    assert sorted(found) == list(range(6)), "each episode once"
    port = free_port()
    nodes = [node(rank, port, out, "--seed", str(rank)) for rank, out in enumerate(outs)]
    said = [run.communicate(timeout=100) for run in nodes]
    assert [run.returncode for run in nodes] == [2, 2] and "not started with the same command" in said[0][1]


@pytest.mark.parametrize("environment, words", [({"RANK": "0", "WORLD_SIZE": "2"}, "cannot join the other processes"),
                                                ({"RANK": "0", "WORLD_SIZE": "0"}, "cannot join the other processes")])
def test_processes_that_nobody_started_together(environment, words, monkeypatch, capsys):
    """Without an address, and with numbers that are no ranks."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(capsys, TOY, words)
    assert train.rank_and_size() == (0, 1)
