"""Few-shot adaptation of CLIP to far-away domains: ATHA, TIR, SVL + RA on CLIP-LoRA, CoOp and MaPLe.

  python train.py --dataset toy --shot 1          no download, no GPU, a minute or two on two cores
  python train.py --dataset eurosat --shot 1      the real thing: ATHA, 800 episodes, fetched at need
  python train.py --dataset all --shot 1 5 --method all          the papers' tables
  python train.py --dataset dtd --split --shot 16 --method clip-lora             all classes, whole test split
  python train.py --dataset eurosat --method mine.py:Mine        a method of your own
  python train.py --fit FOLDER --save mine.safetensors           your own pictures
  python train.py --predict mine.safetensors PICTURES
  python train.py --export mine.safetensors OUT                  for transformers

In a program, `adapt` is the whole of training in one call.
"""
from __future__ import annotations

import argparse
import copy
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import cache, cached_property
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, distributed, nn
from torchvision.datasets.folder import is_image_file

import clip_min
import data
from atha import PARTS, Hook, LoRA, Part, Step, UsageError
from clip_min import CLIP, Tokenizer, WeightsError
from data import Batches, DataError, Pool, Progress, Task, generator

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))           # torchrun's
CUDA = torch.cuda.is_available()


# ---------------------------------------------------------------------------------------- recipes and methods

@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter, each a flag; defaults are the papers'. Blocks count from 0, of 12 (at_depth)."""
    # every method, and zero-shot
    prompt: str = "a photo of a {}."   # text of a class, {} is its name
    scale: float = 100.0               # logits are this times the cosine
    augment: str = "crop"              # support pictures: none (257 -> 224 centre crop), crop, five views
    # training
    tune: str = "clip-lora"            # ways to tune, joined with +, where the method names none
    steps: int = 100                   # of an episode
    minibatch: int = 0                 # pictures a step, shuffled; 0: all of them
    weight_decay: float = 1e-2         # of AdamW
    cosine: float = 0.0                # schedule to 1e-6 over so many times the steps; 0: none
    crop_area: float = 0.5             # smallest area of a random crop
    bicubic: bool = False              # random crops are resampled bicubic, not bilinear
    # CLIP-LoRA
    lr: float = 2e-4
    rank: int = 16
    lora_alpha: float = 8.0            # scaled by lora_alpha / sqrt(rank)
    dropout: float = 0.25              # on its input
    lora: str = "vision"               # which tower: vision, text or both
    # CoOp
    context: int = 4                   # learned vectors in place of the prompt's first tokens
    context_lr: float = 2e-3
    prompt_schedule: bool = True       # CoOp's and MaPLe's: first step at 1e-5, then cosine
    # MaPLe
    maple_prompts: int = 2             # prompt vectors a block
    maple_depth: int = 9               # so many of the first blocks get them
    maple_lr: float = 3.5e-3
    # ATHA
    rho: float = 0.1                   # share of head tokens
    gamma: float = 0.1                 # share of tail tokens
    alpha: float = 0.8                 # first pull, at alpha_block alone
    alpha_block: int = 8
    beta: float = 0.01                 # first push, at every block
    token_lr: float = 1e-3             # learning rate of pull and push
    sgd: bool = False                  # pull and push by SGD, not AdamW
    copy_cls: bool = False             # before every block a copy of [CLS] joins the tokens
    text_to_tokens: str = "paper"      # formula of class texts in token space, or released
    text_block: int = -1               # text block that gives the tokens' class texts; -1: the last
    # TIR
    tir_blocks: tuple[int, ...] = (8, 10)  # blocks before which tokens are weighed
    tir_top: float = 0.3               # share of tokens that a class marks
    tir_rule: str = "linear"           # in the number of classes that mark a token, or simple
    # SVL, RA and LV
    extra_share: float = 0.6           # share of the steps in which the loss acts
    extra_last: bool = False           # the last steps, not the first
    svl_weight: float | None = None    # 0.1, or 0.001 where the text tower alone learns
    ra_weight: float = 3.0
    ra: str = "released"               # formula of the loss, or softmax
    lv_weight: float = 0.1


RELEASED_ATHA = Recipe(
    tune="clip-lora+coop", lora="both", scale=2.0, augment="none", text_block=10,
    text_to_tokens="released", rho=0.3, gamma=0.2, alpha_block=6, beta=0.0, copy_cls=True, sgd=True,
    prompt_schedule=False)
RECIPES = {    # at 1 shot; recipe_for knows what depends on the shot
    "paper": Recipe(),
    "released-atha": RELEASED_ATHA,
    "released-svl": replace(RELEASED_ATHA, tune="clip-lora", lora="vision", scale=100.0, augment="views",
                            steps=250, cosine=8.0),
    "clip-lora-fsl": Recipe(lora="both", rank=2, lora_alpha=1.0, steps=500, minibatch=32, cosine=1.0,
                            crop_area=0.08, bicubic=True),
}
CHOICES = {"augment": ["none", "crop", "views"], "text_to_tokens": ["paper", "released"],
           "tir_rule": ["linear", "simple"], "ra": ["released", "softmax"], "lora": ["vision", "text", "both"]}
ALWAYS, TRAINING = "prompt scale augment", "tune steps minibatch weight_decay cosine crop_area bicubic"
METHODS = ["zero-shot", *dict.fromkeys(name for part in PARTS for name in part.names)]


@cache
def own_part(place: str) -> type[Part]:
    """The class of a user's own method, "FILE.py:NAME". Raises UsageError."""
    file, _, name = place.rpartition(":")
    sys.path.append(os.path.dirname(os.path.abspath(file)))              # for what it imports from beside it
    part = runpy.run_path(file).get(name)
    if not (isinstance(part, type) and issubclass(part, Part)):
        raise UsageError(f"{file} has no class {name} that is an atha.Part")
    return part


def own_code(method: str) -> list[str]:
    """The text of the files of a user's own methods, so that results of two versions are not mixed."""
    return [Path(name.rpartition(":")[0]).read_text() for name in method.split("+") if ":" in name]


def parts_of(method: str, tune: str = "clip-lora") -> dict[type[Part], set[str]]:
    """What a method, or several joined with +, switches on, with the halves of each, in the order of acting.

    tune: the ways to tune where the method names none, or clip-lora alone. Raises UsageError.
    """
    on = {}
    for name in method.split("+") if method != "zero-shot" else ():
        named = [own_part(name)] if ":" in name else [part for part in PARTS if name in part.names]
        if not named:
            raise UsageError(f"unknown method {name!r}: choose from {', '.join(METHODS)}, FILE.py:NAME, "
                             "or join some with +")
        for part in named:
            on[part] = on.get(part, set()) | part.names.get(name, set())
    if on and tune and not any(part.tunes and "clip-lora" not in part.names for part in on):
        on = parts_of(tune, tune="") | on
    return {part: on[part] for part in [*PARTS, *on] if part in on}


def recipe_for(name: str, method: str, shot: int = 1, dataset: str = "") -> Recipe:
    """A recipe by its name for a method, a shot and a dataset: what the trainers set by hand."""
    recipe = RECIPES[name]
    if name == "released-atha" and shot > 1:
        return replace(recipe, scale=4.0)
    if name == "released-svl" and all(part.tunes for part in parts_of(method)):       # its own baseline
        return replace(recipe, minibatch=25)
    if name == "released-svl":
        return replace(recipe, steps=recipe.steps * shot // (2 if dataset == "chestx" else 1))
    return replace(recipe, steps=recipe.steps * shot) if name == "clip-lora-fsl" else recipe


def recipe_of(recipe: Recipe, given: dict[str, object]) -> Recipe:
    """The recipe with other fields; a list, as JSON and the command line have it, is a tuple."""
    return replace(recipe, **{name: tuple(x) if isinstance(x, list) else x for name, x in given.items()})


def fields_of(recipe: Recipe, method: str) -> dict[str, object]:
    """What of the recipe a method reads: two runs are alike if these are."""
    on, every = parts_of(method, recipe.tune), asdict(recipe)
    read = f"{ALWAYS} {TRAINING if on else ''}".split()
    for part in on:
        read += every if part.reads is None else part.reads.split()
    return {name: value for name, value in every.items() if name in read}


# ------------------------------------------------------------------------------------------------- adaptation

class Learner(nn.Module):
    """A backbone with what E episodes learn on it, in `parts`. token_ids (E, N, context)."""

    def __init__(self, clip: CLIP, token_ids: Tensor, method: str, recipe: Recipe):
        super().__init__()
        # what memo names counts as copied: old numbers, new modules, so what is learned leaves clip alone
        memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in clip.parameters()}
        self.clip, self.recipe, self.token_ids = copy.deepcopy(clip, memo), recipe, clip.trim(token_ids)
        self.parts = nn.ModuleList(part(self.clip, self.token_ids, recipe, halves)
                                   for part, halves in parts_of(method, recipe.tune).items())
        self.learns_text = any(part.learns_text for part in self.parts)
        self.losses = torch.zeros(0, len(token_ids))
        for name, p in self.learned().items():                # one for all episodes would mix what they learn
            if p.shape[:1] != (len(token_ids),):
                raise UsageError(f"{method}: {name} has shape {list(p.shape)}, but its first dimension is of "
                                 f"the episodes, {len(token_ids)}")

    def learned(self) -> dict[str, Tensor]:
        """What training changes, by name."""
        return {name: p.detach().contiguous() for name, p in self.named_parameters() if p.requires_grad}

    def text(self) -> tuple[Tensor, Tensor]:
        """Class texts (E, N, embed), twice: of unit length, for logits; as they come, for the vision hooks.

        Those for the hooks are read off the recipe's text_block, which is the last but in the releases.
        """
        ids, early = self.token_ids.flatten(0, 1), None                  # ids: (E*N, T)
        block = self.recipe.text_block * self.clip.config.text_layers // 12                # negative: last

        def before_block(x: Tensor, layer: int) -> Tensor:               # x: (E*N, T, D)
            nonlocal early
            if layer - 1 == block >= 0:
                early = x                                                # what that block gave
            for part in self.parts:
                x = part.text_hook(x, layer)
            return x
        last = self.clip.encode_text(ids, before_block)
        for_hooks = last if early is None else self.clip.read_text(early, ids)
        last, for_hooks = (text.unflatten(0, self.token_ids.shape[:2]) for text in (last, for_hooks))
        return F.normalize(last.float(), dim=-1), for_hooks

    def hook(self, hook_text: Tensor) -> Hook:
        """All vision hooks as one, for class texts (E, N, embed)."""
        hooks = [one for part in self.parts if (one := part.vision_hook(hook_text))]

        def enclosed(tokens: Tensor, layer: int) -> Tensor:
            for one in hooks:
                tokens = one(tokens, layer)
            return tokens
        for part in self.parts:
            enclosed = part.enclose(enclosed)
        return enclosed

    def features(self, images: Tensor, hook: Hook) -> Tensor:
        """(E, B, 3, S, S) normalised -> unit features (E, B, embed) float32."""
        flat = self.clip.visual(images.flatten(0, 1), hook)
        return F.normalize(flat.unflatten(0, images.shape[:2]).float(), dim=-1)

    def prepare(self, images: Tensor) -> Tensor:
        """Pictures (..., 3, S, S) uint8 -> (..., 3, size, size) normalised for this backbone and recipe."""
        return data.plain(images.to(self.token_ids.device), self.clip.config, self.recipe.augment == "none")

    @cached_property
    def text_and_hook(self) -> tuple[Tensor, Hook]:
        """Class texts of unit length and the hook, once nothing is learned any more."""
        text, hook_text = self.text()
        return text, self.hook(hook_text)

    @torch.no_grad()
    def logits(self, images: Tensor, chunk: int = 25) -> Tensor:
        """(E, Q, 3, S, S) normalised -> (E, Q, N) float32, scale times the cosine."""
        text, hook = self.text_and_hook
        features = [self.features(some, hook) for some in images.split(chunk, 1)]
        return self.recipe.scale * torch.cat(features, 1) @ text.mT


def drawn(clip: CLIP, token_ids: Tensor, method: str, recipe: Recipe, seeds: Sequence[object],
          rows: int) -> Learner:
    """A learner as it is before the first step, every episode's chance from its own seed; rows: B, of a step.

    To replay a recording, set what it drew before `train`: LoRA's A in learner.clip, picks of the part SVL.
    """
    learner, generators = Learner(clip, token_ids, method, recipe), [generator("learner", s) for s in seeds]
    for part in learner.parts:
        part.draw(generators, rows)
    return learner


def optimizers_of(learner: Learner) -> tuple[list, list]:
    """AdamW and SGD over what the parts learn, and AdamW's cosine schedule; each list holds what there is."""
    r, groups = learner.recipe, {"adamw": [], "sgd": []}
    for part in learner.parts:
        for kind, parameters, lr in part.groups():
            groups[kind].append({"params": parameters, "lr": lr})
    adamw = groups["adamw"] and [torch.optim.AdamW(groups["adamw"], weight_decay=r.weight_decay, fused=True)]
    # momentum and decay are the released trainer's, and CoOp's and MaPLe's
    sgd = groups["sgd"] and [torch.optim.SGD(groups["sgd"], momentum=0.9, weight_decay=5e-4)]
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    return adamw + sgd, [cosine(optimizer, r.cosine * r.steps, 1e-6) for optimizer in adamw if r.cosine]


def train(learner: Learner, batches: Callable[[int], tuple[Tensor, ...]], told: Callable = int) -> Learner:
    """The training loop. batches(number): as data.Batches gives them; told(number) hears of every step."""
    recipe, losses, text = learner.recipe, [], None
    optimizers, schedules = optimizers_of(learner)
    learner.train()
    for number in range(recipe.steps if learner.parts else 0):
        images, labels, plain, plain_labels = batches(number)                        # (E, B, 3, S, S), (E, B)
        if not any(part.wants_plain(number) for part in learner.parts):
            plain = plain[:, :0]                                                     # (E, K, 3, S, S), K = 0
        if text is None or learner.learns_text:     # class texts change only where the text tower learns
            with torch.set_grad_enabled(learner.learns_text):
                text, hook_text = learner.text()                                     # (E, N, embed)
        both = learner.features(torch.cat([images, plain], 1), learner.hook(hook_text))
        features, plain = both.split([images.shape[1], plain.shape[1]], 1)           # (E, B or K, embed)
        logits = recipe.scale * features @ text.mT       # cosines, as both are of unit length: (E, B, N)
        loss = F.cross_entropy(logits.mT, labels, reduction="none").mean(1)          # of (E, N, B): (E,)
        step = Step(number, features, labels, logits, text, plain, plain_labels)
        loss = loss + sum(part.loss(step) for part in learner.parts)
        loss.sum().backward()        # a mean would make an episode's steps depend on how many there are
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
        losses.append(loss.detach())
        told(number + 1)
    learner.losses = torch.stack(losses) if losses else learner.losses               # (steps, E)
    return learner.eval()


def adapt(clip: CLIP, support: Tensor, labels: Tensor, token_ids: Tensor, method: str = "atha",
          recipe: Recipe = Recipe(), batches: Callable[[int], tuple[Tensor, Tensor]] | None = None,
          seeds: Sequence[object] | None = None) -> Learner:
    """Fine-tune E episodes in one batch, each as it would go alone, but for dropout; clip stays as it was.

    support (E, M, 3, S, S) normalised, labels (E, M), token_ids (E, N, context) -> a Learner, with .losses
    (steps, E) and .logits. Every step sees the whole support set, or what batches(number) gives: pictures
    (E, B, 3, S, S) and labels (E, B). (The recipe's augment, minibatch, crop_area and bicubic are for
    data.Batches, and are not read.) seeds: one an episode, of all chance but dropout's, which is torch's.
    """
    shown = batches or (lambda number: (support, labels))
    seeds = range(len(token_ids)) if seeds is None else seeds
    learner = drawn(clip, token_ids, method, recipe, seeds, rows=shown(0)[1].shape[1])
    return train(learner, lambda number: (*shown(number), support, labels))


# -------------------------------------------------------------------------------------- a method on a dataset

def class_rows(tokenizer: Tokenizer, prompt: str, names: Sequence[str], clip: CLIP) -> Tensor:
    """Token rows (C, context) of class names in the prompt, _ as a space. Raises UsageError for twins."""
    texts = [prompt.replace("{}", name.replace("_", " ")) for name in names]
    rows = tokenizer(texts, clip.config.context)
    if len(rows.unique(dim=0)) < len(rows):
        raise UsageError(f"two classes have one text under the prompt {prompt!r}: nothing tells them apart")
    return rows.to(clip.logit_scale.device)


@dataclass
class Job:
    """A method under a recipe, on a pool's pictures: trains and tries tasks of it. token_ids (C, context)."""
    clip: CLIP
    pool: Pool
    token_ids: Tensor
    method: str
    recipe: Recipe

    def learn(self, tasks: Sequence[Task], seeds: Sequence[tuple], told: Callable = int) -> Learner:
        """Train tasks with equally many support pictures in one batch; told(number) hears of every step."""
        torch.manual_seed(generator("dropout", *seeds[0]).initial_seed())        # the same masks when resumed
        token_ids = self.token_ids[torch.stack([task.classes for task in tasks]).to(self.token_ids.device)]
        batches = Batches(self.pool.images, tasks, seeds, self.recipe, self.clip.config, token_ids.device)
        learner = drawn(self.clip, token_ids, self.method, self.recipe, seeds, rows=batches.shown)
        if not train(learner, batches, told).losses[-1:].isfinite().all():
            raise UsageError(f"the loss is not a number in one of the episodes {[n for *_, n in seeds]}: "
                             "lower --lr, or use --precision float32")
        return learner

    def logits(self, learner: Learner, tasks: Sequence[Task]) -> list[Tensor]:
        """One (Q, N) a task, on the CPU, in passes that fit memory."""
        rows = nn.utils.rnn.pad_sequence([task.query for task in tasks], batch_first=True)     # (E, Q)
        passes = [learner.logits(learner.prepare(self.pool.images[some])).cpu()
                  for some in rows.split(25, 1)]
        return [logits[: len(task.query)] for logits, task in zip(torch.cat(passes, 1), tasks)]


class Results:
    """One JSON line an episode, in a file named after a digest of all that makes them what they are.

    done: the accuracy of every finished episode, by its number. Processes of torchrun share the file.
    """

    def __init__(self, folder: str, name: str, header: dict):
        self.file, self.done = Path(folder, f"{name}-{data.digest(header)[:8]}.jsonl"), {}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = self.file.read_bytes() if self.file.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]                # without half a line of a run that was killed
        for line in whole.splitlines()[1:]:
            record = json.loads(line)
            self.done[record["episode"]] = record["accuracy"]
        self.done = gathered(self.done)                      # all have read before one writes
        if RANK == 0 and whole != text:
            os.truncate(self.file, len(whole))
        if RANK == 0 and not whole:
            self.append([header])
        gathered({})

    def append(self, records: list[dict]) -> None:
        with open(self.file, "ab", buffering=0) as file:
            file.write("".join(json.dumps(record) + "\n" for record in records).encode())


def gathered(mine: dict) -> dict:
    """What all processes of torchrun have, together; each waits for the others."""
    everyone = [mine] * WORLD
    if WORLD > 1:
        distributed.all_gather_object(everyone, mine)
    return {key: value for one in everyone for key, value in one.items()}


def run_job(args: argparse.Namespace, job: Job, dataset: str, shot: int) -> dict[int, float]:
    """Train what is not done yet, in batches of tasks; returns the accuracy of every task by its number."""
    def task(number: int) -> Task:
        if args.split:
            return job.pool.split(shot, args.seed + number)
        return job.pool.task(number, args.way, shot, args.query, args.seed)
    kind = "split" if args.split else f"{args.way}way{args.query}"
    method = "+".join(Path(name).name for name in job.method.split("+"))
    name = f"{Path(dataset).resolve().name}-{kind}-{shot}shot-{method}-{args.recipe}-seed{args.seed}"
    c, shown, done = job.clip.config, len(task(0).support), 0       # refused before a file is made, if it is
    results = Results(args.out, name, {
        "name": name, "method": job.method, "code": data.digest(own_code(job.method)),
        "recipe": fields_of(job.recipe, job.method), "precision": args.precision,
        "weights": job.clip.fingerprint, "data": job.pool.fingerprint})
    usual = 3 if args.split else 100 if dataset == "toy" else 800 if shot == 1 else 400
    episodes = range(args.episodes or usual)
    todo = [n for n in episodes if n not in results.done][RANK::WORLD]
    shown = min(shown, job.recipe.minibatch or shown)
    size = shown * c.vision_layers * c.vision_width * (c.image // c.patch) ** 2
    batch = args.batch or (128 if CUDA else min(16, max(1, 10 ** 7 // size)))      # ViT-B/16 on a CPU: one
    progress = Progress(name, len(todo))

    def told(step: int) -> None:
        known = f", {in_short(results.done.values())} %" if results.done else ""
        progress(done + len(numbers) * step / (job.recipe.steps + 1), known)
    while done < len(todo):
        numbers = todo[done: done + batch]
        tasks = [task(n) for n in numbers]
        try:
            logits = job.logits(job.learn(tasks, [(args.seed, n) for n in numbers], told), tasks)
        except RuntimeError as e:
            if "memory" not in str(e) or batch == 1:
                raise
            batch //= 2
            print(f"out of memory: {batch} at a time from here on", file=sys.stderr)
            continue
        right = [(x.argmax(-1) == task.truth).double().mean().item() for x, task in zip(logits, tasks)]
        results.append([{"episode": n, "accuracy": 100 * x} for n, x in zip(numbers, right)])
        results.done |= {n: 100 * x for n, x in zip(numbers, right)}
        done += len(numbers)
    results.done = gathered(results.done)
    return {n: results.done[n] for n in episodes}


# ----------------------------------------------------------------------------------------------------- tables

# What the papers report of a CLIP ViT-B/16, in %; a row a paper
PAPER = """
method       shot   isic   eurosat  cropdiseases  chestx
clip-lora    1      35.23  81.41    85.32         21.73
clip-lora    1      36.40  81.72    84.62         21.86
clip-lora    5      51.10  92.52    96.21         24.13
atha         1      38.86  82.56    87.99         24.00
tir          1      39.38  82.53    86.91         23.98
tir          5      56.73  93.49    97.42         26.12
svl          1      38.12  85.02    87.20         22.68
"""


def paper_figure(method: str, shot: int, dataset: str) -> str:
    """What the papers report, " (81.41 / 81.72)" where two do, or ""."""
    head, *rows = (line.split() for line in PAPER.strip().splitlines())
    told = [row[head.index(dataset)] for row in rows if row[:2] == [method, str(shot)] and dataset in head]
    return f" (paper {' / '.join(told)})" * bool(told)


def in_short(accuracies, sign: str = "") -> str:
    """Mean of accuracies in %, and of ten or more half the 95 % interval, 1.96 std / sqrt(n)."""
    a = torch.tensor([*accuracies], dtype=torch.float64)
    interval = f" ± {1.96 * a.std(correction=0).item() / len(a) ** 0.5:.2f}" if len(a) >= 10 else ""
    return f"{a.mean().item():{sign}.2f}{interval}"


def table(cells: dict, shot: int, paper: bool) -> str:
    """A row a method, a column a dataset; in brackets, minus clip-lora on the same episodes, and the papers'.

    cells: of each (method, shot, dataset) the accuracy of every episode by its number.
    """
    methods, datasets = (dict.fromkeys(key[i] for key in cells) for i in (0, 2))
    lines = [f"| {shot}-shot | {' | '.join(datasets)} |", "|---" * (len(datasets) + 1) + "|"]
    for method in methods:
        row = []
        for dataset in datasets:
            found, base = cells[method, shot, dataset], cells.get(("clip-lora", shot, dataset))
            text = in_short(found.values())
            if base and method != "clip-lora":
                text += f" (paired {in_short([found[n] - base[n] for n in found], '+')})"
            row.append(text + paper_figure(method, shot, dataset) * paper)
        lines.append(f"| {method} | {' | '.join(row)} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------- own pictures

MINI, STEPS = 16, 400     # --fit sees 16 pictures in every step, each of many pictures four times or more


def fit(args: argparse.Namespace, clip: CLIP, tokenizer: Tokenizer) -> int:
    """Fine-tune once on a folder of class folders, test on --holdout pictures a class, keep the result."""
    pool, method = data.load(os.path.join(args.fit, "")), args.method[0]
    if len(pool.classes) < 2:
        raise UsageError(f"{args.fit} has one class: there is nothing to tell apart")
    task = pool.holdout(args.holdout, args.seed)
    steps = max(STEPS, 4 * len(task.support) // MINI)
    recipe = flagged(args, replace(recipe_for(args.recipe, method), minibatch=MINI, steps=steps))
    job = Job(clip, pool, class_rows(tokenizer, recipe.prompt, pool.classes, clip), method, recipe)
    told = Progress(f"fitting {method} on {len(task.support)} pictures", recipe.steps)
    learner = job.learn([task], [("fit", args.seed)], told)
    if args.holdout:
        frozen = Learner(clip, learner.token_ids, "zero-shot", recipe)
        right = [100.0 * (job.logits(one, [task])[0].argmax(-1) == task.truth) for one in (frozen, learner)]
        print(f"{len(task.truth)} pictures held out: zero-shot {in_short(right[0])} %, {method} "
              f"{in_short(right[1])} %, paired {in_short(right[1] - right[0], '+')}")
    notes = {"classes": pool.classes, "method": method, "recipe": asdict(recipe), "weights": clip.fingerprint,
             "code": data.digest(own_code(method))}
    clip_min.save(learner.learned(), Path(args.save), {"notes": json.dumps(notes)})
    print(f"saved {args.save}")
    return 0


def load_tuned(path: str, clip: CLIP, tokenizer: Tokenizer, allowed: Sequence[str] = ()) -> Learner:
    """What --fit kept, on the weights that it was made with: a Learner with .classes. Raises UsageError.

    allowed: the user's own methods whose code may run; no code is run because a file says so.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            notes = json.loads(file.metadata()["notes"])
        classes, method, weights = (notes[key] for key in ("classes", "method", "weights"))
        recipe = recipe_of(Recipe(), notes["recipe"])
    except (SafetensorError, LookupError, TypeError, ValueError) as e:
        raise UsageError(f"{path} is not a file that --save wrote ({e})") from e
    if weights != clip.fingerprint:
        raise UsageError(f"{path} was fitted on other weights: give the right --weights")
    for name in f"{method}+{recipe.tune}".split("+"):
        if ":" in name and name not in allowed:
            raise UsageError(f"{path} runs code of yours: allow it by --method {name}")
    if notes["code"] != data.digest(own_code(method)):
        raise UsageError(f"{path} was fitted with other code of {method} than is there now")
    token_ids = class_rows(tokenizer, recipe.prompt, classes, clip)[None]
    learner = Learner(clip, token_ids, method, recipe)
    if tensors.keys() != learner.learned().keys():
        raise UsageError(f"{path} does not hold what {method} learns")
    learner.load_state_dict(tensors, strict=False)
    learner.classes = classes
    return learner.eval()


def predict(args: argparse.Namespace, learner: Learner) -> int:
    """A line a picture: path, class, probability, runner-up; returns 1 when something can't be read."""
    paths, known, right, skipped = [], 0, 0, 0
    for given in map(Path, args.predict[1:]):
        inside = [p for p in sorted(given.rglob("*")) if is_image_file(p.name) and p.name[0] != "."]
        paths += inside if given.is_dir() else [given]
    for start in range(0, len(paths), 64):
        with ThreadPoolExecutor() as threads:
            found = [*zip(paths[start: start + 64], threads.map(data.attempt, paths[start: start + 64]))]
        for error in [image for _, image in found if isinstance(image, DataError)]:
            print(f"skipped: {error}", file=sys.stderr)
            skipped += 1
        found = [(path, image) for path, image in found if isinstance(image, Tensor)]
        if not found:
            continue
        images = torch.stack([image for _, image in found])[None]
        for (path, _), chances in zip(found, learner.logits(learner.prepare(images))[0].softmax(-1)):
            best = chances.argsort(descending=True)
            name, second = (learner.classes[i] for i in best[:2])
            print(path, name, f"{chances.max():.6f}", second, sep="\t")
            known += path.parent.name in learner.classes
            right += path.parent.name == name
    if known:
        print(f"accuracy {100 * right / known:.2f} % of {known} pictures in folders named like classes")
    return int(skipped > 0)


def export(args: argparse.Namespace, learner: Learner, tokenizer: Tokenizer) -> int:
    """Write a folder that transformers loads: the model with LoRA merged, and the class texts."""
    target, r, c, clip = Path(args.export[1]), learner.recipe, learner.clip.config, learner.clip
    text, hook_text = learner.text()                                    # text: (1, N, embed), of unit length
    if c.family == "pe-core" or any(part.vision_hook(hook_text) or type(part).enclose is not Part.enclose
                                    for part in learner.parts):
        raise UsageError("only CLIP and SigLIP are exported, and no method that acts between the blocks of a "
                         "tower, as no weights can: use --predict, or fit with clip-lora, svl or coop")
    if target.exists():
        raise UsageError(f"{target} is there already: name a folder that is to be made")
    for path, adapter in [*clip.named_modules()]:
        if isinstance(adapter, LoRA):                                   # (out, in)
            product = adapter.scaling * adapter.B[0] @ adapter.A[0]
            weight = adapter.linear.weight + product.to(adapter.linear.weight.dtype)    # not in place: shared
            adapter.linear.weight = nn.Parameter(weight, requires_grad=False)
            clip.set_submodule(path, adapter.linear)
    clip.logit_scale.data = torch.tensor(r.scale).log()
    tensors, config = clip_min.hugging_face(clip)
    whole = round(c.image * 257 / 224) if r.augment == "none" else c.image           # as `prepare` has it
    pixels = {"image_processor_type": "CLIPImageProcessor", "size": {"height": whole, "width": whole},
              "crop_size": {"height": c.image, "width": c.image}, "resample": 2, "image_mean": c.mean,
              "image_std": c.std}
    clip_min.save(tensors, target / "model.safetensors", {"format": "pt"})
    clip_min.save({"embeddings": text[0].detach().contiguous()}, target / "classes.safetensors", {})
    notes = {"config": config, "preprocessor_config": pixels,
             "classes": {"classes": learner.classes, "scale": r.scale}}
    if c.family == "clip":
        notes["vocab"] = tokenizer.id
        (target / "merges.txt").write_text(f"#version: 0.2\n{tokenizer.metadata['merges']}\n")
    for name, content in notes.items():
        (target / f"{name}.json").write_text(json.dumps(content))
    print(f"wrote {target}")
    return 0


# ----------------------------------------------------------------------------------------------- command line

def flagged(args: argparse.Namespace, recipe: Recipe) -> Recipe:
    """The recipe with what was given on the command line."""
    given = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    return recipe_of(recipe, {name: x for name, x in given.items() if x is not None})


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with what follows from it filled in."""
    parser = argparse.ArgumentParser(
        prog="train.py", usage="train.py --dataset NAME | --fit FOLDER | --predict FILE PICTURES | --export "
        "FILE FOLDER, and flags: --help", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    use = parser.add_mutually_exclusive_group(required=True)
    use.add_argument("--dataset", nargs="+", default=[], help=f"{', '.join(data.DATASETS)}, toy, all (the "
                     "papers' four), all-fsl (the eleven few-shot sets), or a folder of class folders")
    use.add_argument("--fit", metavar="FOLDER", help="fine-tune once on a folder of class folders")
    use.add_argument("--predict", nargs="+", metavar="FILE", help="a saved file, then pictures or folders")
    use.add_argument("--export", nargs=2, metavar="FILE", help="a saved file, then the folder to make")
    add = parser.add_argument
    add("--method", nargs="+", help=f"{', '.join(METHODS)}; FILE.py:NAME, your own; some joined with +; or "
        "all (default zero-shot atha, with --fit clip-lora)")
    add("--recipe", choices=RECIPES, help="default paper, with --split clip-lora-fsl")
    add("--shot", nargs="+", type=int, default=[1], help="labelled pictures a class (default 1)")
    add("--split", action="store_true", help="all classes at once and the whole test split, by seeds")
    add("--episodes", type=int, help="default 800 at 1 shot, 400 otherwise, 100 on toy, 3 with --split")
    add("--way", type=int, default=5, help="classes an episode (default 5)")
    add("--query", type=int, default=15, help="query pictures a class (default 15)")
    add("--seed", type=int, default=1, help="draws the tasks and all chance in them (default 1)")
    add("--batch", type=int, help="episodes at once")
    add("--data", default="datasets", help="where the datasets are (default datasets)")
    add("--out", default="results", help="results, from which a rerun goes on (default results)")
    add("--weights", help="file, folder or hf-hub:org/name (default ViT-B/16, downloaded; toy has its own)")
    add("--device", default=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if CUDA else "cpu")
    add("--precision", choices=["float32", "bfloat16"], help="of the frozen weights and the arithmetic "
        "(default bfloat16 on CUDA, else float32)")
    add("--save", default="tuned.safetensors", help="where --fit keeps what it learns (tuned.safetensors)")
    add("--holdout", type=int, default=0, help="pictures a class that --fit is tested on, not fitted to")
    numbers = parser.add_argument_group("the recipe, by default the papers'")
    for f in fields(Recipe):
        how = {"action": argparse.BooleanOptionalAction} if isinstance(f.default, bool) else \
            {"type": int, "nargs": "+"} if isinstance(f.default, tuple) else \
            {"type": type(f.default), "choices": CHOICES.get(f.name)}
        numbers.add_argument(f"--{f.name.replace('_', '-')}", help=f"default {f.default}", **how)
    args = parser.parse_args(argv)
    sets = {"all": data.PAPERS, "all-fsl": data.FSL}
    args.dataset = [name for given in args.dataset for name in sets.get(given, [given])]
    usual = ["zero-shot", "atha"] if args.dataset else ["clip-lora"]
    args.method = args.method or usual
    args.method = "zero-shot clip-lora atha tir svl".split() if args.method == ["all"] else args.method
    args.recipe = args.recipe or ("clip-lora-fsl" if args.split else "paper")
    args.precision = args.precision or ("bfloat16" if CUDA and not args.export else "float32")
    if args.dataset == ["toy"] and not args.weights:
        args.weights = data.TOY / "toy_clip.safetensors"
    return args


def run(args: argparse.Namespace) -> int:
    """What was asked for; returns the exit code."""
    if WORLD > 1:
        distributed.init_process_group("gloo", timeout=timedelta(days=7))
    torch.set_flush_denormal(True)         # gradients below 1e-38 are 0: CPUs compute with them far slower
    clip, tokenizer = clip_min.load(args.weights, args.device, getattr(torch, args.precision))
    if args.fit:
        return fit(args, clip, tokenizer)
    if saved := args.predict or args.export:
        learner = load_tuned(saved[0], clip, tokenizer, args.method)
        return predict(args, learner) if args.predict else export(args, learner, tokenizer)
    cells, c = {}, clip.config
    paper = (c.family, c.vision_layers, c.vision_width, c.patch) == ("clip", 12, 768, 16) and not args.split
    for dataset in args.dataset:
        pool = data.load(dataset, args.data)
        for shot, method in product(args.shot, args.method):
            recipe = recipe_for(args.recipe, method, shot, dataset)
            if args.split:
                recipe = replace(recipe, prompt=pool.prompt or recipe.prompt)
            recipe = flagged(args, recipe)
            paper = paper and (recipe, args.way, args.query) == (Recipe(), 5, 15)
            job = Job(clip, pool, class_rows(tokenizer, recipe.prompt, pool.classes, clip), method, recipe)
            cells[method, shot, dataset] = run_job(args, job, dataset, shot)
    if RANK == 0:
        print("\n\n".join(table(cells, shot, paper) for shot in args.shot))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 2 for a request that cannot be met, said in one line."""
    args = parse(argv)
    try:
        return run(args)
    except (UsageError, DataError, WeightsError, OSError) as e:
        print(f"train.py: error: {e}", file=sys.stderr)
        return 2
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()                      # a process that ends last would abort


if __name__ == "__main__":
    sys.exit(main())
