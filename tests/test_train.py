"""The loop: batched equals alone, naive twins, recorded runs of the released code, the main job from end to end."""
import copy
import functools
import json
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import HERE, REPO, command, from_environment, same
from safetensors.torch import load_file
from torch.func import functional_call

import clip_min
import data
import train
from train import METHODS, RECIPES, Recipe, UsageError, adapt, parts_of, recipe_for

QUIET = {"steps": 2, "dropout": 0.0}
EVERY = [*METHODS, "atha+tir", "tir+svl", "clip-lora+coop", "maple+svl", "coop+atha", "maple+atha+tir"]


def halves(method):
    """The names of the parts that a method switches on, and their halves."""
    return {part.__name__ for part in parts_of(method)}.union(*parts_of(method).values())


toy_pool = functools.cache(lambda: data.load("toy"))


def toy_episodes(count, shot=1, seed=1):
    """Normalised support (E, 5 shot, 3, 48, 48), labels, queries (E, 20, ...) and class rows of toy episodes."""
    pool = toy_pool()
    drawn = [pool.episode(n, shot=shot, query=4, seed=seed) for n in range(count)]
    support, query = (data.plain(torch.stack([pool.images[d[i].flatten()] for d in drawn]), 48) for i in (1, 2))
    names = [[pool.classes[c] for c in d[0]] for d in drawn]
    return support, torch.arange(5).repeat_interleave(shot).expand(count, -1), query, names


def rows_of(tokenizer, names):
    return torch.stack([tokenizer([f"a photo of a {n}." for n in row], 40) for row in names])


def part_of(learner, name):
    """What the part of a learner that has something of that name has there."""
    return next(getattr(part, name) for part in learner.parts if hasattr(part, name))


# ------------------------------------------------------------------------------------------- batched equals alone

@pytest.mark.parametrize("method, name, dtype", [(m, n, torch.float64) for m in EVERY for n in ("paper", "released")]
                         + [(m, "paper", torch.float32) for m in ("clip-lora", "atha", "tir", "svl")])
def test_batched_equals_alone(toy, method, name, dtype):
    """AdamW turns a gradient that is all rounding into a full step, so float32 is held to the mean, float64 to every number."""
    clip, tokenizer = copy.deepcopy(toy[0]).to(dtype), toy[1]
    support, labels, query, names = toy_episodes(2)
    ids, recipe = rows_of(tokenizer, names), replace(recipe_for(name, method), **QUIET)
    together = adapt(clip, support, labels, ids, method, recipe, seeds=[5, 6])
    for e in range(2):
        alone = adapt(clip, support[e:e + 1], labels[e:e + 1], ids[e:e + 1], method, recipe, seeds=[5 + e])
        if method != "zero-shot":
            same(together.losses[:, e], alone.losses[:, 0])
        for key, learned in alone.learned().items():
            difference = (together.learned()[key][e] - learned[0]).abs()
            assert (difference.max() if dtype == torch.float64 else difference.mean()) < 1e-5, key
        assert torch.equal(together.logits(query)[e].argmax(-1), alone.logits(query[e:e + 1])[0].argmax(-1))


def test_nothing_is_left_behind_in_the_host(toy):
    clip, tokenizer = toy
    before = {name: t.clone() for name, t in clip.state_dict().items()}
    support, labels, query, names = toy_episodes(2)
    first = adapt(clip, support, labels, rows_of(tokenizer, names), "atha+tir", replace(RECIPES["released-atha"], **QUIET))
    logits = first.logits(query)
    adapt(clip, support, labels, rows_of(tokenizer, names), "svl", replace(RECIPES["paper"], **QUIET))
    assert torch.equal(first.logits(query), logits), "two results may live side by side"
    assert list(before) == list(clip.state_dict()) and all(torch.equal(t, clip.state_dict()[n]) for n, t in before.items())


@pytest.mark.parametrize("name", ["paper", "released"])
def test_before_the_first_step_the_adapted_model_is_the_frozen_one(toy, name):
    clip, tokenizer = toy
    support, labels, query, names = toy_episodes(2)
    ids, recipe = rows_of(tokenizer, names), replace(recipe_for(name, "clip-lora"), steps=1, lr=0.0, context_lr=0.0)
    tuned, frozen = (adapt(clip, support, labels, ids, method, recipe) for method in ("clip-lora", "zero-shot"))
    assert torch.equal(tuned.logits(query), frozen.logits(query))


# ------------------------------------------------------------------------ one episode written out, as plain as can be

def naive_episode(clip, support, labels, ids, method, r, lora_A, picks, views):
    """Losses of one episode with plain loops; only CLIP itself is shared. Adapters are added to the weights, not to the layers."""
    A, B = {n: a.clone().requires_grad_() for n, a in lora_A.items()}, {n: torch.zeros(a.shape[1], a.shape[0], requires_grad=True) for n, a in lora_A.items()}
    layers, weights, on = clip.config.vision_layers, dict(clip.named_parameters()), halves(method)
    context = clip.token_embedding.weight[ids[0, 1:5]].clone().requires_grad_()
    alpha = torch.zeros(layers).index_fill_(0, torch.tensor(math.floor(r.alpha_block * layers / 12)), r.alpha).requires_grad_()
    beta = torch.full((layers,), r.beta).requires_grad_()
    adamw, sgd = [*A.values(), *B.values()], []
    rates = {id(p): r.lr for p in adamw}
    if "pull" in on:
        (sgd if r.sgd else adamw).extend([alpha, beta])
        rates |= {id(alpha): 1e-3, id(beta): 1e-3}
    if "coop" in r.tune:
        sgd.append(context)
        rates[id(context)] = 2e-3
    memory, losses, before = {}, [], None
    for step in range(r.steps):
        merged = {n + ".weight": weights[n + ".weight"] + r.lora_alpha / math.sqrt(r.rank) * B[n] @ A[n] for n in A}

        def text_hook(x, layer):
            if layer == 0 and "coop" in r.tune:
                x = x.clone()
                x[:, 1:5] = context + clip.positional_embedding[1:5]
            return x
        class Text(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.clip = clip
            def forward(self):
                return self.clip.encode_text(ids, text_hook)
        T = functional_call(Text(), {"clip." + n: w for n, w in merged.items() if n.startswith("transformer")}, ())

        def to_tokens(t):
            if r.text_to_tokens == "paper":
                return ((t - t.mean()) / (t.var(correction=0) + 1e-5).sqrt()) @ clip.visual.proj.T
            return (t @ torch.linalg.pinv(clip.visual.proj) - clip.visual.ln_post.bias) / clip.visual.ln_post.weight
        goals = [to_tokens(t) for t in T]

        def vision_hook(x, layer):
            if "pull" not in on:
                return x
            x = torch.cat([x[:, :1], x], 1) if r.copy_cls else x
            rows = []
            for image in x:
                s = torch.stack([F.cosine_similarity(image[1:], g[None], dim=-1) for g in goals], 1).detach()
                order = s.max(1).values.sort(descending=True).indices.tolist()
                new = list(image.unbind())
                for i in order[: int(r.rho * len(order))]:
                    new[1 + i] = new[1 + i] + alpha[layer] * goals[s[i].argmax()]
                for i in order[len(order) - int(r.gamma * len(order)):]:
                    new[1 + i] = new[1 + i] - beta[layer] * goals[s[i].argmin()]
                rows.append(torch.stack(new))
            return torch.stack(rows)

        def encode(images):
            f = functional_call(clip.visual, {n[7:]: w for n, w in merged.items() if n.startswith("visual")}, (images, vision_hook))
            return f / f.norm(dim=-1, keepdim=True)
        T = T / T.norm(dim=-1, keepdim=True)
        images, wanted = (support, labels) if views is None else (views, labels.repeat(len(views) // len(support)))
        f = encode(images)

        def cross_entropy(of):
            return -sum((r.scale * f[i] @ of.T).log_softmax(0)[wanted[i]] for i in range(len(f))) / len(f)
        loss = cross_entropy(T)
        first = math.floor(0.4 * r.steps) if r.extra_last else 0
        acts = first <= step < first + 0.6 * r.steps
        if "LV" in on and acts:
            means = [f[[i for i in range(len(f)) if wanted[i] == label]].mean(0) for label in range(len(T))]
            loss = loss + 0.1 * cross_entropy(torch.stack([mean / mean.norm() for mean in means]))
        if "SVL" in on and acts:
            g = encode(support)
            loss = loss + 0.1 * cross_entropy(f[picks[step]])
            now = f @ g.T
            if before is not None:
                c = 1 - (step - first) / (0.6 * r.steps)
                fused = torch.stack([torch.stack([c * before[m, n] + (1 - c) * (T[wanted[m]] @ T[labels[n]]).detach() for n in range(len(g))]) for m in range(len(f))])
                if r.ra == "paper":
                    loss = loss + 3 * sum((p * (p.log() - q.log())).sum() for p, q in zip(now.softmax(1), fused.softmax(1))) / len(f)
                else:
                    loss = loss + 3 * (fused.exp() * (fused - now)).sum() / fused.numel()
            before = now.detach()
        for p in [*adamw, *sgd]:
            p.grad = None
        loss.backward()
        with torch.no_grad():
            for p in adamw:
                rate = rates[id(p)] if not r.cosine or p is alpha or p is beta else 1e-6 + (rates[id(p)] - 1e-6) * (1 + math.cos(math.pi * step / (8 * r.steps))) / 2
                m, v = memory.get(id(p), (0, 0))
                m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad ** 2
                memory[id(p)] = m, v
                p -= rate * 0.01 * p
                p -= rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            for p in sgd:
                memory[id(p)] = 0.9 * memory.get(id(p), 0) + p.grad + 5e-4 * p
                p -= rates[id(p)] * memory[id(p)]
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("method", ["atha", "svl", "lv", "svl late"])
@pytest.mark.parametrize("name", ["paper", "released"])
def test_five_steps_equal_the_episode_written_out(toy, method, name):
    clip, tokenizer = toy
    method, late = method.removesuffix(" late"), method.endswith(" late")
    recipe = replace(recipe_for(name, method), steps=5, dropout=0.0, extra_last=late)
    support, labels, _, names = toy_episodes(1, shot=2)
    torch.manual_seed(0)
    views = torch.cat([support[0], support[0].flip(-1)]) if method == "svl" else None
    picks = torch.randint(20 if method == "svl" else 10, (5, 5))
    ids = rows_of(tokenizer, names)
    lora_A = {n: torch.empty(16, m.in_features).uniform_(-0.08, 0.08) for n, m in clip.named_modules()
              if n.endswith(("q_proj", "k_proj", "v_proj")) and (recipe.text_lora or n.startswith("visual"))}
    batches = None if views is None else lambda step: (views[None], labels.repeat(1, 2))
    ours = adapt(clip, support, labels, ids, method, recipe, batches=batches, lora_A=lora_A, picks=picks)
    cut = ids[0][:, : int(ids.argmax(-1).max()) + 1]
    same(ours.losses[:, 0], naive_episode(clip, support[0], labels[0], cut, method, recipe, lora_A, picks, views), 1e-4)


# ------------------------------------------------------------------------------ whole runs of the authors' own code

@pytest.mark.parametrize("method", ["atha", "tir", "svl"])
def test_recorded_run_of_the_released_code(method):
    if method == "svl":                                                  # 12 MB: not in the repository
        run = load_file(from_environment("ATHA_GOLDEN", "the folder with trace_released_svl.safetensors") / "trace_released_svl.safetensors")
    else:                                                                # they share weights, pictures and first adapters
        run = load_file(HERE / "golden" / "released_atha_tir.safetensors")
        run |= {name.removeprefix(f"{method}."): t for name, t in run.items() if name.startswith(f"{method}.")}
    clip = clip_min.from_weights({n[8:]: t.float() for n, t in run.items() if n.startswith("weights.")})
    lora_A = {n[7:]: t for n, t in run.items() if n.startswith("lora_A.")}
    ids, labels = run["token_ids"][None], torch.arange(5)[None]
    if method == "svl":
        views = run["support_views"].float()
        ours = adapt(clip, views[:1], labels, ids, method, replace(RECIPES["released-svl"], steps=20, dropout=0.0), lora_A=lora_A,
                     picks=run["shuffled_index"], batches=lambda step: (views.flatten(0, 1)[None], labels.repeat(1, 5)))
        assert (ours.logits(run["queries"].float()[None])[0] / 100 - run["query_cosines"]).abs().max() < 1e-6
    else:
        ours = adapt(clip, run["images"][None], labels, ids, method, replace(RECIPES["released-atha"], steps=10, dropout=0.0), lora_A=lora_A)
        assert (ours.logits(run["queries"][None])[0] - run["query_logits"]).abs().max() < 1e-5
        assert (part_of(ours, "context")[0] - run["context_final"]).abs().max() < 1e-6
    if method == "atha":
        assert (part_of(ours, "alpha")[0] - run["alpha_final"]).abs().max() < 1e-6 and (part_of(ours, "beta")[0] - run["beta_final"]).abs().max() < 1e-6
    assert ((ours.losses[:, 0] - run["losses"]) / run["losses"]).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------- recipes and the tables

def test_released_means_the_trainer_that_the_method_came_with():
    assert recipe_for("released", "atha") == recipe_for("released", "clip-lora") == RECIPES["released-atha"]
    assert recipe_for("released", "tir", shot=5).scale == 4 and recipe_for("released", "tir").scale == 2
    assert [recipe_for("released", "svl", shot, d).steps for shot, d in ((1, ""), (5, ""), (1, "chestx"))] == [250, 1250, 125]
    baseline = recipe_for("released-svl", "clip-lora", shot=5)
    assert (baseline.steps, baseline.minibatch) == (250, 25) and recipe_for("released", "ra-only").augment == "views"
    assert (r := recipe_for("paper", "svl", 5)) == Recipe()
    assert (r.steps, r.scale, r.lr, r.rank, r.lora_alpha, r.dropout, r.rho, r.gamma, r.alpha, r.alpha_block, r.beta, r.tir_blocks, r.tir_top, r.svl_weight,
            r.ra_weight, r.extra_share) == (100, 100, 2e-4, 16, 8, 0.25, 0.1, 0.1, 0.8, 8, 0.01, (8, 10), 0.3, 0.1, 3, 0.6), "the papers' numbers"


@pytest.mark.parametrize("name, method, wanted", [("released", "atha", (100, 4.0)), ("released-svl", "svl", (1250, 100.0))])
def test_adapt_means_by_a_recipe_s_name_what_the_command_line_does(toy, name, method, wanted, monkeypatch):
    """At 5 shot."""
    monkeypatch.setattr(train, "Learner", lambda clip, ids, method, recipe: (_ for _ in ()).throw(UsageError((recipe.steps, recipe.scale))))
    with pytest.raises(UsageError) as e:
        adapt(toy[0], torch.zeros(1, 25, 3, 48, 48), torch.zeros(1, 25).long(), torch.zeros(1, 5, 40).long(), method, name)
    assert e.value.args[0] == wanted


def test_methods_join_and_unknown_ones_are_named():
    assert halves("atha+tir") == {"CLIPLoRA", "ATHA", "TIR", "pull", "push", "inhibit", "enhance"}
    alone = ("svl-only", "ra-only", "tir-inhibit", "coop", "maple+lv", "clip-lora")
    assert [halves(method) for method in alone] == [
        {"CLIPLoRA", "SVL"}, {"CLIPLoRA", "RA"}, {"CLIPLoRA", "TIR", "inhibit"}, {"CoOp"}, {"MaPLe", "LV"}, {"CLIPLoRA"}]
    for wrong in ("ahta", "atha+", "zero-shot+atha", "+", ""):
        with pytest.raises(UsageError, match="choose from zero-shot, clip-lora, coop"):
            parts_of(wrong)


def test_the_order_of_joined_names_means_nothing():
    for a, b in (("atha+svl", "svl+atha"), ("tir+svl", "svl+tir"), ("maple+clip-lora", "clip-lora+maple")):
        assert list(parts_of(a)) == list(parts_of(b))
        for name in ("paper", "released"):
            assert recipe_for(name, a) == recipe_for(name, b)


def test_ablations_keep_one_side_still(toy):
    clip, tokenizer = toy
    support, labels, _, names = toy_episodes(1)
    for method, moved, start, still in (("atha-push", "beta", 0.01, "alpha"), ("atha-pull", "alpha", 0, "beta")):
        ours = adapt(clip, support, labels, rows_of(tokenizer, names), method, replace(RECIPES["paper"], **QUIET))
        assert part_of(ours, still).eq(0).all() and part_of(ours, moved).ne(start).all()


def test_tir_acts_before_its_own_blocks_alone(toy):
    clip, tokenizer = toy
    learner, tokens = train.Learner(clip, rows_of(tokenizer, toy_episodes(1)[3]), "tir", Recipe()), torch.randn(2, 37, 128)
    hook = learner.hook(learner.text()[1])
    assert [torch.equal(hook(tokens, layer), tokens) for layer in range(4)] == [True, True, False, False], "8 and 10 of 12"


def test_interval_is_1_96_standard_errors():
    assert train.mean_and_interval([10, 20, 30, 40]) == pytest.approx((25, 1.96 * 125 ** 0.5 / 2))
    assert math.isnan(train.mean_and_interval([10])[1])


def test_tables_have_the_papers_figure_beside_ours_and_differences_paired_with_the_baseline():
    table = train.markdown({("clip-lora", 1, "isic"): {0: 31.0, 1: 29.0}, ("clip-lora", 1, "eurosat"): {0: 78.0, 1: 80.0},
                            ("atha", 1, "isic"): {1: 35.0, 0: 36.0}, ("atha", 1, "eurosat"): {0: 79.0, 1: 81.0}})
    assert "| atha | 35.50 ± 0.69 (38.86) | 80.00 ± 1.39 (82.56) | 57.75 (58.35) |" in table and "(35.23 / 36.40)" in table
    assert "| atha | +5.50 ± 0.69 | +1.00 ± 0.00 | +3.25 |" in table, "5 and 6 on the two episodes"
    cells = {(method, 1, "isic"): {0: 40.0} for method in ("clip-lora", "atha", "svl")}
    assert [train.markdown(cells, recipe=name).count("| svl | +0.00") for name in ("paper", "released-svl", "released")] == [1, 1, 0]
    assert "another trainer made it: svl" in train.markdown(cells, recipe="released") and "another" not in train.markdown(cells)
    assert "| atha | +0.00" in train.markdown(cells, recipe="released"), "its trainer is the baseline's"
    cells = {("svl", 1, "isic"): {0: 40.0, 1: 50.0}}
    assert "(45.01)" in train.markdown(cells, "pe-core") and "(" not in train.markdown(cells, "") + train.markdown(cells, "siglip")


# ------------------------------------------------------------------------------------------------------ the main job

def test_the_toy_run_from_end_to_end(tmp_path, monkeypatch, capsys):
    """Tuning beats zero-shot; the second start finds everything done; two more episodes go on from there."""
    line = "--dataset toy --shot 1 --method zero-shot clip-lora --steps 30 --episodes".split()
    said = command(*line, 8, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    means = dict(re.findall(r"^toy 5-way 1-shot (\S+) \(paper\): ([\d.]+) ±", said.stdout, re.M))
    assert float(means["clip-lora"]) > float(means["zero-shot"]) + 3
    monkeypatch.chdir(tmp_path)
    assert train.main([*line, "8"]) == 0
    again = capsys.readouterr()
    assert re.findall(r"[\d.]+ ± [\d.]+", again.out) == re.findall(r"[\d.]+ ± [\d.]+", said.stdout) and "episodes/s" not in again.err
    assert train.main([*line, "10"]) == 0 and "8 of 10 episodes are done" in capsys.readouterr().err
    header, *records = map(json.loads, next((tmp_path / "results").glob("*clip-lora*.jsonl")).read_text().splitlines())
    assert header["recipe"]["steps"] == 30 and [r["episode"] for r in records] == list(range(10))


def test_real_pictures_with_a_trained_clip(tmp_path, capsys):
    """eurosat, few episodes and steps: tuning beats zero-shot by more than both intervals, and moves away from the frozen model (CKA);
    ATHA raises the head tokens' similarity where it pulls, and lowers the tail's."""
    weights, root = from_environment("ATHA_WEIGHTS", "a small trained CLIP"), from_environment("ATHA_DATA", "a folder with eurosat/2750")
    (tmp_path / "eurosat").mkdir()
    (tmp_path / "eurosat" / "2750").symlink_to(root.resolve() / "eurosat" / "2750")
    argv = "--dataset eurosat --shot 1 --method zero-shot atha --steps 20 --lr 5e-4 --episodes 10 --precision bfloat16 --batch 5 --probe"
    assert train.main([*argv.split(), "--data", str(tmp_path), "--weights", str(weights), "--out", str(tmp_path / "results")]) == 0
    (zero, z), (tuned, t) = [map(float, pair) for pair in re.findall(r"^eurosat .*: ([\d.]+) ± ([\d.]+) %", capsys.readouterr().out, re.M)]
    assert tuned - t > zero + z
    rows = [json.loads(line) for line in next((tmp_path / "results").glob("*.probe.jsonl")).read_text().splitlines()]
    assert rows[-1]["cka_features"] < 0.99
    assert rows[5]["head_after"] > rows[5]["head_before"] + 0.05 and rows[5]["tail_after"] < rows[5]["tail_before"]


def test_a_full_size_episode_fits_into_8_gib(tmp_path):
    """ViT-B/16, random weights, 1 shot, 3 steps; peak memory of a process that does nothing else."""
    code = f"""
import sys, resource; sys.path.insert(0, {str(REPO)!r})
import torch, clip_min, train
from dataclasses import replace
train.multiply_fast()
clip, ids = clip_min.CLIP().eval(), torch.randint(1, 49000, (1, 5, 77))
ids[..., 9] = 49407
learner = train.adapt(clip, torch.randn(1, 5, 3, 224, 224), torch.arange(5)[None], ids, "atha", replace(train.RECIPES["paper"], steps=3))
assert learner.losses.isfinite().all() and learner.logits(torch.randn(1, 5, 3, 224, 224)).shape == (1, 5, 5)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)
"""
    (tmp_path / "full.py").write_text(code)
    said = command(program=str(tmp_path / "full.py"))
    assert said.returncode == 0 and float(said.stdout) < 8, said.stdout + said.stderr


def test_compile_gives_the_same_losses_or_says_that_it_cannot(toy, capsys):
    clip, tokenizer = toy
    if not train.compile_works(torch.device("cpu")):
        assert "going on without" in capsys.readouterr().err
        return
    support, labels, _, names = toy_episodes(1)
    ids, recipe = rows_of(tokenizer, names), replace(RECIPES["paper"], steps=2, dropout=0.0)
    plain, compiled = (adapt(clip, support, labels, ids, "atha", recipe, compile=c) for c in (False, True))
    assert [x.backbone.visual.transformer.resblocks[0]._compiled_call_impl is None for x in (plain, compiled)] == [True, False]
    same(compiled.losses, plain.losses, 1e-4)
