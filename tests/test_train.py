"""The loop, recipes, results, tables: recorded runs of the authors' code, resume, shares, what is printed."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import torch
from conftest import HERE, REPO, TOY_CLIP, from_environment, refused, same
from safetensors.torch import load_file

import clip_min
import data
import train
from atha import UsageError
from train import RECIPES, Recipe, adapt, main, parts_of, recipe_for

QUICK = ["--dataset", "toy", "--episodes", "3", "--steps", "3", "--query", "4", "--precision", "float32"]


def results_in(folder) -> dict[str, list[dict]]:
    """The lines of every file of results, headers aside, by the file's name."""
    return {file.name: [json.loads(line) for line in file.read_text().splitlines()[1:]]
            for file in sorted(folder.glob("*.jsonl"))}


# --------------------------------------------------------------------------------------------------- the loop

@pytest.mark.parametrize("method", ["atha", "tir", "svl"])
def test_recorded_run_of_the_released_code(method):
    """Losses, answers and what is learned of whole runs of the authors' code, given what it drew."""
    if method == "svl":                                                  # 12 MB: not in the repository
        folder = from_environment("ATHA_GOLDEN", "the folder with trace_released_svl.safetensors")
        run = load_file(folder / "trace_released_svl.safetensors")
    else:                                                # they share weights, pictures and first adapters
        run = load_file(HERE / "golden" / "released_atha_tir.safetensors")
        own = {name: t for name, t in run.items() if name.startswith(f"{method}.")}
        run |= {name.removeprefix(f"{method}."): t for name, t in own.items()}
    clip = clip_min.from_weights({n[8:]: t.float() for n, t in run.items() if n.startswith("weights.")})
    lora_A = {n[7:]: t for n, t in run.items() if n.startswith("lora_A.")}
    ids, labels = run["token_ids"][None], torch.arange(5)[None]
    if method == "svl":
        views = run["support_views"].float()                             # (view, class, 3, S, S)
        recipe = replace(RECIPES["released-svl"], steps=20, dropout=0.0)
        ours = adapt(clip, views[:1], labels, ids, method, recipe, lora_A=lora_A, picks=run["shuffled_index"],
                     batches=lambda number: (views.flatten(0, 1)[None], labels.repeat(1, 5)))
        same(ours.logits(run["queries"].float()[None])[0] / 100, run["query_cosines"], 1e-6)
    else:
        recipe = replace(RECIPES["released-atha"], steps=10, dropout=0.0)
        ours = adapt(clip, run["images"][None], labels, ids, method, recipe, lora_A=lora_A)
        same(ours.logits(run["queries"][None])[0], run["query_logits"], 1e-5)
        for name in ("context", "alpha", "beta") if method == "atha" else ("context",):
            learned, = (getattr(part, name) for part in ours.parts if hasattr(part, name))
            assert (learned[0] - run[f"{name}_final"]).abs().max() < 1e-6
    same(ours.losses[:, 0], run["losses"], 1e-5)


def test_learning_rates_are_those_of_pytorch_and_of_coop():
    """SVL's and CLIP-LoRA's cosine as CosineAnnealingLR has it; CoOp's: 1e-5, then cosine from the start."""
    weight, recipe = [torch.nn.Parameter(torch.zeros(1))], Recipe(steps=20, cosine=8.0)
    ours, theirs = (torch.optim.AdamW(weight, 2e-4) for _ in range(2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=160, eta_min=1e-6)
    for number in range(20):
        rate = train.learning_rate(ours, recipe, number)
        assert rate == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        theirs.step()
        schedule.step()
    sgd = torch.optim.SGD(weight, 2e-3)
    rates = [train.learning_rate(sgd, recipe, number) for number in range(20)]
    assert rates[:2] == [1e-5, 2e-3] and rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[11] == pytest.approx(1e-3) and 0 < rates[19] < 5e-5           # half way; near the end
    assert train.learning_rate(sgd, replace(recipe, prompt_schedule=False), 0) == 2e-3
    assert train.learning_rate(ours, Recipe(), 50) == 2e-4


def test_adapt_gives_what_the_command_line_gives(tmp_path, toy):
    """An episode of `--dataset toy`, redone in a program: the lines that README shows."""
    assert main([*QUICK, "--method", "atha+svl", "--batch", "1", "--out", str(tmp_path)]) == 0
    (clip, tokenizer), pool, recipe = toy, data.load("toy"), Recipe(steps=3)
    task = pool.task(2, way=5, shot=1, query=4, seed=1)
    ids = train.class_rows(tokenizer, recipe.prompt, [pool.classes[c] for c in task.classes], clip)[None]
    batches = data.Batches(pool, [task], [(1, 2)], recipe, clip.config)
    learner = adapt(clip, None, None, ids, "atha+svl", recipe, batches=batches, seeds=[(1, 2)])
    right = learner.logits(learner.prepare(pool.images[task.query])[None])[0].argmax(-1) == task.truth
    (_, lines), = results_in(tmp_path).items()
    assert lines[2] == {"episode": 2, "accuracy": pytest.approx(100 * right.double().mean().item())}


# ---------------------------------------------------------------------------------------- methods and recipes

def test_the_papers_numbers_and_what_the_trainers_set_by_hand():
    r = recipe_for("paper", "svl", 5)
    assert r == Recipe() and (r.steps, r.scale, r.crop_area, r.lr) == (100, 100, 0.08, 2e-4)
    assert (r.rank, r.lora_alpha, r.dropout, r.lora) == (16, 8, 0.25, "vision")
    assert (r.rho, r.gamma, r.alpha, r.alpha_block, r.beta, r.tir_blocks, r.tir_top, r.ra_weight, r.ra,
            r.extra_share) == (0.1, 0.1, 0.8, 8, 0.01, (8, 10), 0.3, 3, "released", 0.6)
    assert recipe_for("released", "atha") == recipe_for("released", "clip-lora") == RECIPES["released-atha"]
    assert recipe_for("released", "tir+svl", shot=5).scale == 4 and recipe_for("released", "tir").scale == 2
    for shot, dataset, steps in ((1, "isic", 250), (5, "isic", 1250), (1, "chestx", 125)):
        assert recipe_for("released", "svl", shot, dataset).steps == steps
    baseline = recipe_for("released-svl", "clip-lora", shot=5)
    assert (baseline.steps, baseline.minibatch, baseline.augment) == (250, 25, "views")
    assert recipe_for("clip-lora-fsl", "clip-lora", shot=16).steps == 8000


def test_methods_join_and_take_settings():
    def switched_on(method):
        return {part.__name__: halves for part, halves in parts_of(method).items()}
    joined = {"CLIPLoRA": set(), "ATHA": {"pull"}, "TIR": {"inhibit", "enhance"}}
    assert switched_on("tir+atha-pull") == joined
    assert [*switched_on("coop+svl")] == ["CoOp", "SVL", "RA"], "a way to tune that is named is the only one"
    assert [*switched_on("clip-lora+coop")] == ["CLIPLoRA", "CoOp"] and switched_on("zero-shot") == {}
    recipe = recipe_for("paper", "atha@rho=0.2@tir_rule=simple@tir_blocks=[3]@sgd=true", rho=0.3, beta=0.5)
    assert recipe == Recipe(rho=0.2, tir_rule="simple", tir_blocks=(3,), sgd=True, beta=0.5)
    for method in ("atha@rhoo=1", "atha@tir_rule=3", "athaa", "atha+"):
        with pytest.raises(UsageError):
            recipe_for("paper", method)


def test_settings_are_what_a_method_reads(toy, tmp_path, monkeypatch):
    def read(method, **values):
        return train.settings_of(toy[0], method, Recipe(**values))
    assert read("atha", tir_top=0.5) == read("atha") != read("atha", rho=0.5)
    assert read("zero-shot", lr=1.0) == read("zero-shot") != read("zero-shot", scale=1.0)
    known = {name for part in train.PARTS for name in part.reads.split()}
    known |= {*train.ALWAYS.split(), *train.TRAINING.split()}
    assert known == {f.name for f in fields(Recipe)}, "every field is read by something, and is one"
    mine = tmp_path / "mine.py"
    mine.write_text("import atha\nclass Mine(atha.Part):\n    pass\n")
    before = read(f"{mine}:Mine")
    mine.write_text(mine.read_text() + "# changed\n")
    train.load_own.cache_clear()                                         # as in another process
    assert read(f"{mine}:Mine") != before and "rho" in before["recipe"], "who does not tell, may read all"


OWN = """
import torch
from torch import nn
from atha import Part

class Bias(Part):
    def __init__(self, backbone, token_ids, recipe, halves):
        super().__init__(backbone, token_ids, recipe, halves)
        shape = SHAPE
        self.bias = nn.Parameter(torch.zeros(shape, device=token_ids.device))
    def groups(self):
        return [("adamw", [self.bias], 0.1)]
    def vision_hook(self, text):
        BODY
        return lambda tokens, layer: tokens + self.bias[:1, None] if layer == 0 else tokens
"""


def test_a_method_of_ones_own(tmp_path, capsys):
    """It trains beside ours; what each episode learns has its own first dimension; its errors show where."""
    mine, width = tmp_path / "mine.py", "len(token_ids), backbone.config.vision_width"
    mine.write_text(OWN.replace("SHAPE", width).replace("BODY", "pass"))
    argv = [*QUICK, "--out", str(tmp_path / "out"), "--batch", "1", "--method", "clip-lora"]
    assert main([*argv, f"{mine}:Bias+atha"]) == 0
    assert "mine.py:Bias+atha | " in capsys.readouterr().out
    mine.write_text(OWN.replace("SHAPE", "backbone.config.vision_width").replace("BODY", "pass"))
    train.load_own.cache_clear()
    refused(capsys, [*argv, f"{mine}:Bias"], "bias", "episodes")
    refused(capsys, [*argv, f"{mine}:Nothing"], "Nothing")
    train.load_own.cache_clear()
    refused(capsys, [*argv, f"{tmp_path}/none.py:Bias"], "none.py")
    train.load_own.cache_clear()
    mine.write_text(OWN.replace("SHAPE", width).replace("BODY", "open('/no/such/file')"))
    with pytest.raises(FileNotFoundError):
        main([*argv, f"{mine}:Bias"])


# ---------------------------------------------------------------------------------------------------- results

def test_killed_and_resumed(tmp_path):
    """SIGKILL in the middle, half a line at the end: the rest is done, once, and equal to a run in one go."""
    argv = ["--dataset", "toy", "--method", "atha", "--steps", "5", "--episodes", "8", "--batch", "1"]
    process = subprocess.Popen([sys.executable, str(REPO / "train.py"), *argv, "--out", "killed"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        lines = [line for some in results_in(tmp_path).values() for line in some]
        if (found := [*os.scandir("killed")] if os.path.isdir("killed") else []) and \
                open(found[0].path, "rb").read().count(b"\n") > 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    file, = os.scandir("killed")
    with open(file.path, "ab") as out:
        out.write(b'{"episode": 7, "accu')
    for folder in ("killed", "whole"):
        assert main([*argv, "--out", folder]) == 0
    lines = [[json.loads(line) for line in open(f"{folder}/{file.name}")] for folder in ("killed", "whole")]
    assert lines[0] == lines[1] and [line["episode"] for line in lines[0][1:]] == [*range(8)]


def test_other_settings_are_another_file(tmp_path, capsys):
    argv = [*QUICK, "--out", str(tmp_path), "--method", "atha"]
    for more in ([], ["--tir-top", "0.4"], ["--rho", "0.2"], ["--precision", "bfloat16"]):
        assert main([*argv, *more]) == 0
    files = results_in(tmp_path)
    assert len(files) == 3, "what ATHA does not read makes no other file"
    assert all(len(lines) == 3 for lines in files.values()), "nothing was done twice"


def test_two_processes_share_the_episodes(tmp_path, capsys, monkeypatch):
    """As torchrun numbers them: a file each, together those of one process; one alone says that it waits."""
    argv = ["--dataset", "toy", "--method", "clip-lora", "--steps", "2", "--episodes", "5", "--batch", "1"]
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    monkeypatch.setattr(train, "WORLD", 2)
    for rank in (1, 0):
        monkeypatch.setattr(train, "RANK", rank)
        capsys.readouterr()
        assert main([*argv, "--out", str(tmp_path / "two")]) == 0
        assert ("| clip-lora |" in capsys.readouterr().out) == (rank == 0)
    first, second = results_in(tmp_path / "two").values()
    assert {len(first), len(second)} == {2, 3}
    (_, one), = results_in(tmp_path / "one").items()
    assert sorted([*first, *second], key=lambda line: line["episode"]) == one

    monkeypatch.setattr(train.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main([*argv, "--out", str(tmp_path / "alone")])
    assert "2 episodes of other processes to wait for" in capsys.readouterr().err


def test_out_of_memory_halves_the_batch(tmp_path, capsys, monkeypatch):
    learn, sizes = train.Job.learn, []

    def tight(job, tasks, *rest):
        sizes.append(len(tasks))
        if len(tasks) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return learn(job, tasks, *rest)
    monkeypatch.setattr(train.Job, "learn", tight)
    argv = [*QUICK, "--method", "clip-lora", "--out", str(tmp_path), "--batch", "3"]
    assert main(argv) == 0 and sizes == [3, 2, 1, 1, 1]
    monkeypatch.setattr(train.Job, "learn", lambda job, tasks, *rest: tight(job, [*tasks] * 2, *rest))
    refused(capsys, [*argv[:-1], "1", "--seed", "2"], "out of memory")


def test_a_cpu_that_multiplies_bfloat16_is_told(capsys, monkeypatch):
    data.say.cache_clear()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    train.load_clip(train.parse(QUICK))
    assert "--precision bfloat16" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_told(tmp_path, capsys):
    argv = [*QUICK, "--method", "clip-lora", "--out", tmp_path, "--lr", "1e30"]
    refused(capsys, argv, "not a number", "--lr")
    assert not any(results_in(tmp_path).values())


# ----------------------------------------------------------------------------------------------------- tables

def test_mean_and_interval():
    assert train.mean_text([50, 60]) == "55.00"                            # no interval of fewer than ten
    values = [40.0, 60.0] * 50                                        # standard deviation 10
    assert train.mean_text(values) == "50.00 ± 1.96" and train.mean_text([1.0, 1.0], "+") == "+1.00"


def test_table_is_paired_with_the_first_method():
    cells = {("atha", 1, "isic"): {0: 50.0, 1: 60.0}, ("clip-lora", 1, "isic"): {0: 49.0, 1: 58.0},
             ("atha", 1, "mean"): {0: 50.0, 1: 60.0}, ("clip-lora", 1, "mean"): {0: 49.0, 1: 58.0}}
    lines = train.table(cells, 1, "").splitlines()
    assert lines[0].endswith("minus clip-lora, paired by episode") and lines[2] == "| 1-shot | isic | mean |"
    assert lines[4] == "| atha | 55.00 (+1.50) | 55.00 (+1.50) |"
    lines = train.table(cells, 1, "clip").splitlines()
    assert lines[4] == "| atha | 55.00 (+1.50, paper 38.86) | 55.00 (+1.50, paper 58.35) |"
    assert lines[5] == "| clip-lora | 53.50 (paper 35.23/36.40) | 53.50 (paper 55.92/56.07) |"
    alone = {("tir@tir_top=0.1", 1, "toy"): {0: 1.0}, ("tir", 1, "toy"): {0: 3.0}}
    assert "| tir | 3.00 (+2.00) |" in train.table(alone, 1, "clip")               # two settings of it


def test_the_papers_figures_stand_beside_their_setting_alone(tmp_path, capsys, monkeypatch):
    """All four sets, played by the toy world, under the untouched recipe, on a config of the papers' size."""
    shown, pool, (clip, tokenizer) = [], data.load("toy"), clip_min.load(TOY_CLIP)
    monkeypatch.setattr(train, "table", lambda cells, shot, family: shown.append((family, [*cells])) or "")
    monkeypatch.setattr(data, "find", lambda *_: None)
    monkeypatch.setattr(data, "load", lambda *_: pool)
    monkeypatch.setattr(train, "load_clip", lambda args: (clip, tokenizer))
    argv = ["--dataset", "all", "--method", "zero-shot", "--episodes", "2", "--out", str(tmp_path)]
    assert main(argv) == 0 and shown[-1][0] == "" and shown[-1][1][-1] == ("zero-shot", 1, "mean")
    config = replace(clip.config, vision_layers=12, vision_width=768, patch=16)
    monkeypatch.setattr(clip, "config", config)
    assert main(argv) == 0 and shown[-1][0] == "clip"
    for more in (["--scale", "50"], ["--way", "4"], ["--recipe", "released"]):
        assert main([*argv, *more]) == 0 and shown[-1][0] == ""
    assert main([*argv[:1], "isic", "chestx", *argv[2:]]) == 0 and "mean" not in shown[-1][1][-1]
