"""Few-shot adaptation of CLIP to far-away domains: ATHA, TIR, SVL + RA on CLIP-LoRA, CoOp and MaPLe.

  python train.py --dataset toy --shot 1          no download, no GPU, a minute or two on two cores
  python train.py --dataset eurosat --shot 1      the real thing: ATHA, 800 episodes, fetched at need
  python train.py --dataset all --shot 1 5 --method all          the papers' tables
  python train.py --dataset dtd --split --shot 16 --method clip-lora             all classes, whole test split
  python train.py --dataset eurosat --method atha atha@rho=0.2   two settings of one method, paired
  python train.py --dataset eurosat --method mine.py:Mine        a method of your own
  python train.py --fit FOLDER --save mine.safetensors           your own pictures
  python train.py --predict mine.safetensors PICTURES            (--export mine.safetensors OUT: transformers)

Results are a JSON line an episode, in a file whose name ends in a digest of all settings: the same command
goes on where it stopped, another setting is another file. In a program, `adapt` is all of training.
"""
from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import re
import runpy
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property, partial
from glob import escape
from itertools import product
from math import cos, pi
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")   # spinning threads: 8 times as slow if others are busy
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import clip_min
import data
from atha import PARTS, Hook, LoRA, Part, Step, UsageError
from clip_min import CLIP, Tokenizer, WeightsError
from data import Batches, DataError, Pool, Progress, Task, generator

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))           # torchrun's
CUDA = torch.cuda.is_available()
Batch = Callable[[int], tuple[Tensor, ...]]      # step -> its pictures, labels, plain pictures, their labels


# ----------------------------------------------------------------------------------------------------- recipe

@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter, each a flag; defaults are the papers'. Blocks count from 0, of 12 (at_depth)."""
    # every method, and zero-shot
    prompt: str = "a photo of a {}."   # text of a class, {} is its name; coop: the dataset's own in CoOp
    scale: float = 100.0               # logits are this times the cosine
    augment: str = "crop"              # support pictures: none (257 -> 224 centre crop), crop, five views
    # training
    tune: str = "clip-lora"            # ways to tune, joined with +, where the method names none
    steps: int = 100                   # of an episode
    minibatch: int = 0                 # pictures a step, shuffled; 0: all of them
    weight_decay: float = 1e-2         # of AdamW
    cosine: float = 0.0                # schedule to 1e-6 over so many times the steps; 0: none
    crop_area: float = 0.08            # smallest area of a random crop
    bicubic: bool = False              # random crops are resampled bicubic, not bilinear
    # CLIP-LoRA
    lr: float = 2e-4
    rank: int = 16
    lora_alpha: float = 8.0            # scaled by lora_alpha / sqrt(rank)
    dropout: float = 0.25              # on its input
    lora: str = "vision"               # tower: vision, text or both
    # CoOp and MaPLe
    prompt_schedule: bool = True       # their SGD (ATHA's, too): one step at 1e-5, then cosine to 0
    context: int = 4                   # CoOp: learned vectors in place of the prompt's first tokens
    context_lr: float = 2e-3
    maple_prompts: int = 2             # MaPLe: prompt vectors a block
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


# ------------------------------------------------------------------------------------------------- adaptation

def adapt(clip: CLIP, support: Tensor, labels: Tensor, token_ids: Tensor, method: str = "atha",
          recipe: Recipe | str = "paper", batches: Batch | None = None, seeds: Sequence | None = None,
          lora_A: dict[str, Tensor] | None = None, picks: Tensor | None = None) -> Learner:
    """Fine-tune E episodes in one batch, each as it would go alone, but for dropout; clip stays as it was.

    support (E, M, 3, S, S) normalised, labels (E, M), token_ids (E, N, context) -> a Learner, with .losses
    (steps, E) and .logits. recipe: a Recipe, or a name, which takes M / N for the shot. Every step sees the
    whole support set, or what batches(number) gives: pictures (E, B, 3, S, S) and labels (E, B), or a
    data.Batches. (The recipe's augment, minibatch, crop_area and bicubic are for data.Batches, and are not
    read.) seeds: one an episode, of all chance (0, 1, ...; dropout's is torch's generator, set by the first).

    To replay a recording: lora_A {module name: (rank, in) or (E, rank, in)}, LoRA's first A (B starts at 0),
    and picks (steps, N) or (steps, E, N), the rows of a step's pictures that SVL draws.
    """
    def batch(number: int) -> tuple[Tensor, ...]:                        # plain ones too, unless they come
        return (*(batches(number) if batches else (support, labels)), support, labels)[:4]
    if isinstance(recipe, str):
        recipe = recipe_for(recipe, method, support.shape[1] // token_ids.shape[1])
    seeds = seeds or range(len(token_ids))
    learner = start(clip, token_ids, method, recipe, seeds, batch(0)[1].shape[1])
    for name, first in (lora_A or {}).items():
        learner.clip.get_submodule(name).A.data.copy_(first)
    for part in learner.parts:
        if picks is not None and hasattr(part, "picks"):
            part.picks.copy_(picks.reshape(len(picks), -1, picks.shape[-1]))
    return train(learner, batch)

def start(clip: CLIP, token_ids: Tensor, method: str, recipe: Recipe, seeds: Sequence, rows: int) -> Learner:
    """A learner before its first step, with what each episode draws by its seed. rows: B, pictures a step."""
    learner, generators = Learner(clip, token_ids, method, recipe), [generator("learner", s) for s in seeds]
    torch.manual_seed(generator("dropout", seeds[0]).initial_seed())
    for part in learner.parts:
        part.draw(generators, rows)
    return learner

def train(learner: Learner, batches: Batch, report: Callable = int) -> Learner:
    """The training loop. batches(number): as data.Batches gives them; report(number) hears of every step."""
    recipe, losses, text = learner.recipe, [], None
    optimizers = make_optimizers(learner)
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
            optimizer.param_groups[0]["lr"] = learning_rate(optimizer, recipe, number)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        report(number)
    learner.losses = torch.stack(losses) if losses else torch.zeros(0, len(learner.token_ids))    # (steps, E)
    learner.__dict__.pop("text_and_hook", None)                          # of before, if it was asked then
    return learner.eval()

def make_optimizers(learner: Learner) -> list[torch.optim.Optimizer]:
    """One for each group of parameters that a part learns."""
    kinds = {    # momentum and decay of SGD are the released trainer's, and CoOp's and MaPLe's
        "adamw": partial(torch.optim.AdamW, weight_decay=learner.recipe.weight_decay, fused=True),
        "sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)}
    return [kinds[kind](parameters, lr) for part in learner.parts for kind, parameters, lr in part.groups()]

def learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, number: int) -> float:
    """Of step `number`: AdamW's cosine to 1e-6; CoOp's and MaPLe's 1e-5, then cosine to 0; or constant."""
    first, last, prompts = optimizer.defaults["lr"], 0.0, isinstance(optimizer, torch.optim.SGD)
    if prompts and recipe.prompt_schedule:
        done = (number - 1) / recipe.steps
    elif not prompts and recipe.cosine:
        last, done = 1e-6, number / recipe.cosine / recipe.steps
    else:
        return first
    return 1e-5 if done < 0 else last + (first - last) * (1 + cos(pi * done)) / 2

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
        for name, p in self.learned().items():                # one for all episodes would mix what they learn
            if p.shape[:1] != (len(token_ids),):
                raise UsageError(f"{method}: {name} has shape {list(p.shape)}, but its first dimension is of "
                                 f"the episodes, {len(token_ids)}")

    def learned(self) -> dict[str, Tensor]:
        """What training changes, by name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

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
    def logits(self, images: Tensor) -> Tensor:
        """(E, Q, 3, S, S) normalised -> (E, Q, N) float32, scale times the cosine."""
        text, hook = self.text_and_hook
        return self.recipe.scale * self.features(images, hook) @ text.mT


# ---------------------------------------------------------------------------------------- methods and recipes

METHODS = ["zero-shot", *dict.fromkeys(name for part in PARTS for name in part.names)]
RECIPES = {    # at 1 shot; recipe_for knows what depends on the shot
    "paper": Recipe(),
    "released-atha": Recipe(
        tune="clip-lora+coop", lora="both", prompt_schedule=False, scale=2.0, augment="none", text_block=10,
        text_to_tokens="released", rho=0.3, gamma=0.2, alpha_block=6, beta=0.0, copy_cls=True, sgd=True),
    "clip-lora-fsl": Recipe(lora="both", rank=2, lora_alpha=1.0, steps=500, minibatch=32, cosine=1.0,
                            bicubic=True)}
RECIPES["released-svl"] = replace(RECIPES["released-atha"], tune="clip-lora", lora="vision", scale=100.0,
                                  augment="views", steps=250, cosine=8.0)
CHOICES = {name: words.split() for name, words in {
    "recipe": f"{' '.join(RECIPES)} released", "precision": "float32 bfloat16", "augment": "none crop views",
    "lora": "vision text both", "text_to_tokens": "paper released", "tir_rule": "linear simple",
    "ra": "released softmax"}.items()}
ALWAYS, TRAINING = "prompt scale augment", "tune steps minibatch weight_decay cosine crop_area bicubic"

@cache
def load_own(place: str) -> type[Part]:
    """The class of a user's own method, "FILE.py:NAME", with its code. Raises UsageError."""
    file, _, name = place.rpartition(":")
    sys.path.append(str(Path(file).resolve().parent))                    # for what it imports from beside it
    part = runpy.run_path(file).get(name)
    if part is None:
        raise UsageError(f"{file} has no class {name}")
    part.code = Path(file).read_text()
    return part

def names_in(method: str) -> list[str]:
    """"a+b@x=1@y=2": the names a and b, before the settings."""
    return method.partition("@")[0].split("+")

def parts_of(method: str, tune: str = "clip-lora") -> dict[type[Part], set[str]]:
    """What a method, or several joined with +, switches on, with the halves of each, in the order of acting.

    tune: the ways to tune where the method names none, or clip-lora alone. Raises UsageError.
    """
    on = {}
    for name in filter("zero-shot".__ne__, names_in(method)):
        parts = [load_own(name)] if ":" in name else [part for part in PARTS if name in part.names]
        if not parts:
            raise UsageError(f"unknown method {name!r}: choose from {', '.join(METHODS)}, FILE.py:NAME, "
                             "or join some with +")
        on |= {part: on.get(part, set()) | part.names.get(name, set()) for part in parts}
    if on and tune and not any(part.tunes and "clip-lora" not in part.names for part in on):
        on = parts_of(tune, tune="") | on
    return {part: on[part] for part in [*PARTS, *on] if part in on}

def recipe_for(name: str, method: str, shot: int = 1, dataset: str = "", **values: object) -> Recipe:
    """A recipe by its name for a method, a shot and a dataset: what the trainers set by hand.

    `released` is the trainer that the method came with. values: fields to change; METHOD@FIELD=VALUE changes
    more. Raises UsageError.
    """
    on = parts_of(method)
    kinds = {part.__name__ for part in on}
    if name == "released":
        from_svl = kinds & {"SVL", "RA", "LV"} and not kinds & {"ATHA", "TIR"}
        name = "released-svl" if from_svl else "released-atha"
    recipe = RECIPES[name]
    if name == "released-atha" and shot > 1:
        recipe = replace(recipe, scale=4.0)
    elif name == "released-svl" and all(part.tunes for part in on):     # its own baseline
        recipe = replace(recipe, minibatch=25)
    elif name == "released-svl":
        recipe = replace(recipe, steps=recipe.steps * shot // (2 if dataset == "chestx" else 1))
    elif name == "clip-lora-fsl":
        recipe = replace(recipe, steps=recipe.steps * shot)
    for setting in method.split("@")[1:]:
        field, _, value = setting.partition("=")
        with suppress(ValueError):                            # a word is itself
            value = json.loads(value)
        values[field] = value
    return change(recipe, values)

def change(recipe: Recipe, values: dict[str, object]) -> Recipe:
    """The recipe with other values; a list, as JSON and flags have it, is a tuple. Raises UsageError."""
    for name, value in values.items():
        if not hasattr(recipe, name) or value not in CHOICES.get(name, [value]):
            raise UsageError(f"no recipe has {name}={value}: {' '.join(CHOICES.get(name, ['see --help']))}")
    return replace(recipe, **{name: tuple(x) if isinstance(x, list) else x for name, x in values.items()})

def settings_of(clip: CLIP, method: str, recipe: Recipe) -> dict:
    """What makes a learner what it is, but for its pictures: two are alike if these are.

    Of the recipe the fields that the method's parts read; of a user's own methods the text of their files.
    """
    on, every = parts_of(method, recipe.tune), asdict(recipe)
    read = f"{ALWAYS} {TRAINING if on else ''}".split()
    for part in on:
        read += every if part.reads is None else part.reads.split()
    return {"method": method, "recipe": {name: value for name, value in every.items() if name in read},
            "code": data.digest([getattr(part, "code", "") for part in on]), "weights": clip.fingerprint}


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
    """A method under a recipe, on a pool's pictures: trains and tests tasks of it. token_ids (C, context)."""
    clip: CLIP
    pool: Pool
    token_ids: Tensor
    method: str
    recipe: Recipe

    def learn(self, tasks: Sequence[Task], seeds: Sequence[tuple], report: Callable = int) -> Learner:
        """Train tasks with equally many support pictures in one batch; report(number) hears of every step."""
        device = self.token_ids.device
        token_ids = self.token_ids[torch.stack([task.classes for task in tasks]).to(device)]
        batches = Batches(self.pool, tasks, seeds, self.recipe, self.clip.config, device)
        learner = start(self.clip, token_ids, self.method, self.recipe, seeds, batches.shown)
        if not train(learner, batches, report).losses[-1:].isfinite().all():
            raise UsageError(f"the loss is not a number in one of the episodes {[n for *_, n in seeds]}: "
                             "lower --lr, use --precision float32, or look at your own method's loss")
        return learner

    def logits(self, learner: Learner, tasks: Sequence[Task]) -> Tensor:
        """(E, Q, N) on the CPU, in passes that fit memory."""
        images = self.pool.images if self.pool.queries is None else self.pool.queries
        passes = torch.stack([task.query for task in tasks]).split(25, 1)            # (E, 25), ...
        return torch.cat([learner.logits(learner.prepare(images[rows])).cpu() for rows in passes], 1)

def task_of(args: Namespace, pool: Pool, shot: int, number: int) -> Task:
    """The task of a number, 0, 1, ...: an episode, or with --split all classes."""
    if args.split:
        return pool.split(shot, args.seed + number)
    return pool.task(number, args.way, shot, args.query, args.seed)

def run_job(args: Namespace, job: Job, shot: int, dataset: str) -> tuple[Path, range]:
    """Train this process's share of what is not done yet, in batches of tasks.

    Returns the file of results, one JSON line an episode, and the numbers of all episodes. The file's name
    ends in a digest of the settings. Of torchrun's processes each takes every WORLD-th episode and adds to a
    file of its own, as two that write to one are not safe on a network's disks.
    """
    c, kind = job.clip.config, "split" if args.split else f"{args.way}way{args.query}"
    method = job.method.replace(os.sep, "_")
    name = f"{Path(dataset).resolve().name}-{kind}-{shot}shot-{method}-{args.recipe}-seed{args.seed}"
    settings = settings_of(job.clip, job.method, job.recipe) | {
        "name": name, "data": job.pool.fingerprint, "precision": args.precision}
    file = Path(args.out, f"{name}-{data.digest(settings)[:8]}.jsonl")
    own = file.with_stem(f"{file.stem}-rank{RANK}") if RANK else file
    usual = 3 if args.split else 100 if dataset == "toy" else 800 if shot == 1 else 400
    episodes, accuracies = range(args.episodes or usual), read_results(file)
    begin_file(own, settings)
    todo, done = [n for n in episodes if n % WORLD == RANK and n not in accuracies], 0
    pictures = job.recipe.minibatch or shot * args.way
    size = pictures * c.vision_layers * c.vision_width * (c.image // c.patch) ** 2
    batch = args.batch or (128 if CUDA else min(16, 10 ** 7 // size or 1))      # ViT-B/16 on a CPU: one
    progress = Progress(name, len(todo))

    def report(step: int):
        known = f", {mean_text(accuracies.values())} %" if accuracies else ""
        progress(done + len(numbers) * step / job.recipe.steps, known)
    while done < len(todo):
        numbers = todo[done: done + batch]
        tasks = [task_of(args, job.pool, shot, n) for n in numbers]
        try:
            logits = job.logits(job.learn(tasks, [(args.seed, n) for n in numbers], report), tasks)
        except RuntimeError as e:                              # on a GPU torch.OutOfMemoryError
            if "memory" not in str(e) or batch == 1:
                raise
            batch = (len(numbers) + 1) // 2
            print(f"out of memory: {batch} at a time from here on", file=sys.stderr)
            continue
        right = logits.argmax(-1) == torch.stack([task.truth for task in tasks])                     # (E, Q)
        new = dict(zip(numbers, (100 * right.double().mean(1)).tolist()))
        append(own, *({"episode": n, "accuracy": x} for n, x in new.items()))
        accuracies |= new
        done += len(numbers)
    return file, episodes

def begin_file(file: Path, settings: dict) -> None:
    """Make a file of results ready for the next line: half a line of a run that was killed is cut off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    if whole := file.read_bytes().rfind(b"\n") + 1:
        os.truncate(file, whole)
    else:
        append(file, settings)

def append(file: Path, *records: dict) -> None:
    with open(file, "ab", buffering=0) as out:
        out.write("".join(json.dumps(record) + "\n" for record in records).encode())

def read_results(file: Path) -> dict[int, float]:
    """The accuracy of every finished episode, by its number, of all processes' files."""
    lines = [line for part in file.parent.glob(f"{escape(file.stem)}*.jsonl")
             for line in part.read_bytes().splitlines(keepends=True)[1:] if line.endswith(b"\n")]
    return {record["episode"]: record["accuracy"] for record in map(json.loads, lines)}

def wait_for_all(file: Path, episodes: range) -> dict[int, float]:
    """read_results of these episodes, once the other processes have done theirs too."""
    while missing := {*episodes} - (accuracies := read_results(file)).keys():
        print(f"{file.stem}: {len(missing)} episodes of other processes to wait for", file=sys.stderr)
        time.sleep(10)
    return {n: accuracies[n] for n in episodes}


# ----------------------------------------------------------------------------------------------------- tables

# What the papers report of a ViT-B/16 of each family, in %; two papers have each a baseline of their own
PAPER = """
family   method       shot  isic         eurosat      cropdiseases  chestx       mean
clip     clip-lora    1     35.23/36.40  81.41/81.72  85.32/84.62   21.73/21.86  55.92/56.07
clip     clip-lora    5     51.10        92.52        96.21         24.13        65.99
clip     atha         1     38.86        82.56        87.99         24.00        58.35
clip     tir          1     39.38        82.53        86.91         23.98        58.20
clip     tir          5     56.73        93.49        97.42         26.12        68.44
clip     tir-inhibit  5     -            -            -             -            67.66
clip     tir-enhance  5     -            -            -             -            67.23
clip     svl          1     38.12        85.02        87.20         22.68        58.26
clip     svl-only     1     -            -            -             -            57.55
clip     ra-only      1     -            -            -             -            57.17
pe-core  clip-lora    1     40.89        84.49        91.75         22.02        59.78
pe-core  clip-lora    5     -            -            -             -            68.64
pe-core  svl          1     45.01        86.83        93.03         23.66        62.14
pe-core  svl          5     -            -            -             -            70.29
"""

def paper_figure(column: str, *row: object) -> str:
    """What the papers report of a (family, method, shot) on a dataset, or the mean; "" if nothing."""
    head, *rows = map(str.split, PAPER.strip().splitlines())
    figures = {tuple(cells[:3]): dict(zip(head, cells)) for cells in rows}.get((*map(str, row),), {})
    return "paper " + figures[column] if figures.get(column, "-") != "-" else ""

def mean_text(values: Sequence[float], sign: str = "") -> str:
    """Mean, and of ten values or more half the 95 % interval, 1.96 std / sqrt(n)."""
    a = torch.tensor([*values], dtype=torch.float64)
    interval = f" ± {1.96 * a.std(correction=0).item() / len(a) ** 0.5:.2f}" if len(a) >= 10 else ""
    return f"{a.mean().item():{sign}.2f}{interval}"

def table(cells: dict, shot: int, family: str) -> str:
    """A row a method, a column a dataset; in brackets, minus the first method on the same episodes.

    cells: {(method, shot, dataset): accuracy of every episode by its number}. The first method is clip-lora,
    where it is there. family: of the backbone, whose figures in the papers stand beside; "": none do.
    """
    methods, datasets = ([*dict.fromkeys(key[i] for key in cells)] for i in (0, 2))
    first = "clip-lora" if "clip-lora" in methods else methods[0]
    lines = [f"in brackets: minus {first}, paired by episode", "",
             f"| {shot}-shot | {' | '.join(datasets)} |", "|---" * (len(datasets) + 1) + "|"]
    for method in methods:
        row = []
        for dataset in datasets:
            of_method, of_first = (cells[name, shot, dataset] for name in (method, first))
            paired = mean_text([of_method[n] - of_first[n] for n in of_method], "+")
            notes = ", ".join(filter(None, [
                paired if method != first else "", paper_figure(dataset, family, method, shot)]))
            row.append(f"{mean_text(of_method.values())} ({notes})".replace(" ()", ""))
        lines.append(f"| {method} | {' | '.join(row)} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------- own pictures

# --fit sees up to 64 pictures a step; of more, 16, in four times the steps; under 30 tested tell little
AT_ONCE, MINI, FEW = 64, 16, 30

def fit(args: Namespace, clip: CLIP, tokenizer: Tokenizer) -> int:
    """Fine-tune once on a folder of class folders, test on --holdout pictures a class, keep the result.

    Returns 1 if pictures were left out as they cannot be read.
    """
    broken, method = [], args.method[0]
    pool = data.load(f"{args.fit}/", size=clip.config.image, broken=broken)
    if len(pool.classes) < 2:
        raise UsageError(f"{args.fit} has one class: there is nothing to tell apart")
    task = pool.holdout(args.holdout, args.seed)
    shown, tested = len(task.support), len(task.truth)
    values = {"minibatch": MINI, "steps": 4 * max(Recipe.steps, shown // MINI)} if shown > AT_ONCE else {}
    recipe = recipe_for(args.recipe, method, min(5, shown // len(pool.classes)), **values | args.values)
    job = Job(clip, pool, class_rows(tokenizer, recipe.prompt, pool.classes, clip), method, recipe)
    progress = Progress(f"fitting {method} on {shown} pictures", recipe.steps)
    learner = job.learn([task], [("fit", args.seed)], progress)
    if tested:
        both = Learner(clip, learner.token_ids, "zero-shot", recipe), learner
        before, after = (100.0 * (job.logits(one, [task])[0].argmax(-1) == task.truth) for one in both)
        print(f"tested on {tested} pictures{', which tell little' if tested < FEW else ''}: zero-shot "
              f"{mean_text(before)} %, {method} {mean_text(after)} %, paired difference "
              f"{mean_text(after - before, '+')}")
    notes = {"classes": pool.classes, "method": method, "recipe": asdict(recipe), "place": args.weights,
             "settings": data.digest(settings_of(clip, method, recipe)), "size": pool.images.shape[-1]}
    clip_min.save(learner.learned(), Path(args.save), {"notes": json.dumps(notes)})
    print(f"saved {args.save}")
    return bool(broken)

def load_tuned(path: str, args: Namespace) -> tuple[Learner, Tokenizer]:
    """What --save kept, on the weights that it was made with: a Learner with .classes and .size, of pictures.

    Raises UsageError. No code is run because a file says so: methods of one's own must be named by --method.
    """
    try:
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["notes"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, LookupError, TypeError, ValueError) as e:
        raise UsageError(f"{path} is not a file that --save wrote ({e})") from e
    clip, tokenizer = load_clip(args, notes["place"])
    method, recipe = notes["method"], change(Recipe(), notes["recipe"])
    for name in names_in(f"{recipe.tune}+{method}"):
        if ":" in name and name not in args.method:
            raise UsageError(f"{path} runs code of yours: allow it by --method {name}")
    if notes["settings"] != data.digest(settings_of(clip, method, recipe)):
        raise UsageError(f"{path} was fitted on {notes['place'] or 'ViT-B/16'}: these are other --weights, "
                         f"or the code of {method} has changed")
    token_ids = class_rows(tokenizer, recipe.prompt, notes["classes"], clip)[None]
    learner = Learner(clip, token_ids, method, recipe)
    learner.load_state_dict(tensors, strict=False)
    learner.classes, learner.size = notes["classes"], notes["size"]
    return learner.eval(), tokenizer

def predict(args: Namespace, learner: Learner) -> int:
    """A line a picture: path, class, probability, runner-up, its probability; 1 if one cannot be read."""
    right, code = [], 0
    paths = [path for place in map(Path, args.predict[1:])
             for path in (data.pictures_in(place) if place.is_dir() else [place])]
    for path in paths:
        try:
            images = learner.prepare(data.decode(path, learner.size))[None, None]    # (1, 1, 3, S, S)
        except DataError as e:
            print(f"skipped: {e}", file=sys.stderr)
            code = 1
            continue
        (p, q), best = (x.tolist() for x in learner.logits(images)[0, 0].softmax(-1).topk(2))
        name, second = (learner.classes[i] for i in best)
        print(path, name, f"{p:.6f}", second, f"{q:.6f}", sep="\t")
        if (folder := data.nfc(path.parent.name)) in learner.classes:
            right.append(folder == name)
    if right:
        print(f"accuracy {100 * sum(right) / len(right):.2f} % of {len(right)} pictures", file=sys.stderr)
    return code

def export(args: Namespace, learner: Learner, tokenizer: Tokenizer) -> int:
    """Write a folder that transformers loads: the model with LoRA merged, and the class texts."""
    folder, c, clip = Path(args.export[1]), learner.clip.config, learner.clip
    text, hook_text = learner.text()                                    # text: (1, N, embed), of unit length
    if c.family == "pe-core" or any(part.vision_hook(hook_text) or type(part).enclose is not Part.enclose
                                    for part in learner.parts):
        raise UsageError("only CLIP and SigLIP are exported, and no method that acts between the blocks of a "
                         "tower, as no weights can: use --predict, or fit with clip-lora, svl or coop")
    for path, module in [*clip.named_modules()]:
        if isinstance(module, LoRA):
            clip.set_submodule(path, module.merged())
    clip.logit_scale.data = torch.tensor(learner.recipe.scale).log()
    tensors, config = clip_min.hugging_face(clip)
    whole = round(c.image * 257 / 224) if learner.recipe.augment == "none" else c.image  # as `prepare` has it
    pixels = {"image_processor_type": "CLIPImageProcessor", "size": {"height": whole, "width": whole},
              "crop_size": c.image, "resample": 2, "image_mean": c.mean, "image_std": c.std}
    files = {"config.json": json.dumps(config), "preprocessor_config.json": json.dumps(pixels)}
    folder.mkdir(parents=True)                                           # an error if it is there
    for name, content in (files | clip_min.tokenizer_files(tokenizer)).items():
        (folder / name).write_text(content, "utf-8")
    clip_min.save({"embeddings": text[0].detach()}, folder / "classes.safetensors",
                  {"classes": json.dumps(learner.classes)})
    clip_min.save(tensors, folder / "model.safetensors", {"format": "pt"})                # last: then all is
    print(f"wrote {folder}")
    return 0


# ----------------------------------------------------------------------------------------------- command line

ALL = "zero-shot clip-lora atha tir svl"

@dataclass
class Options:
    """What to run, each a flag, beside the recipe's."""
    dataset: tuple[str, ...] = ()      # names, a folder of class folders, all (the papers' four), all-fsl
    fit: str = ""                      # a folder of class folders: fine-tune once on your own pictures
    predict: tuple[str, ...] = ()      # a saved file, then pictures or folders of them
    export: tuple[str, ...] = ()       # a saved file, then the folder to make
    method: tuple[str, ...] = ()       # names, some joined with +, METHOD@FIELD=VALUE, FILE.py:NAME, or all
    recipe: str = ""                   # paper, with --split clip-lora-fsl; released: the method's own trainer
    shot: tuple[int, ...] = (1,)       # labelled pictures a class
    split: bool = False                # all classes at once and the whole test split, seed by seed
    episodes: int = 0                  # 800 at 1 shot, 400 otherwise, 100 on toy, 3 seeds with --split
    way: int = 5                       # classes an episode
    query: int = 15                    # query pictures a class
    seed: int = 1                      # draws the tasks and all chance in them
    batch: int = 0                     # episodes at once; 0: by the backbone's size
    data: str = "datasets"             # where the datasets are
    out: str = "results"               # results, from which a rerun goes on
    weights: str = ""                  # file, folder or hf-hub:org/name; ViT-B/16, fetched; toy has its own
    device: str = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if CUDA else "cpu"
    precision: str = "bfloat16" if CUDA else "float32"     # of the frozen weights and the arithmetic
    save: str = "tuned.safetensors"    # where --fit keeps what it learns
    holdout: int = 0                   # pictures a class that --fit is tested on, not fitted to

class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message}; --help lists all, --dataset toy needs no download")

    def add_fields(self, title: str, kind: type):
        """A flag for every field of a dataclass, of which the comment beside it is the help."""
        comments = dict(re.findall(r"(\w+): .*?  # (.*)", inspect.getsource(kind)))
        group = self.add_argument_group(title)
        for f in fields(kind):
            how = {"action": argparse.BooleanOptionalAction} if f.type == "bool" else {
                "type": next((x for x in (int, str) if x.__name__ in f.type), float),
                "choices": CHOICES.get(f.name), "nargs": "+" if "tuple" in f.type else None}
            group.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS, **how,
                               help=f"{comments.get(f.name, '')} (default {f.default})")

def parse(argv: list[str] | None = None) -> Namespace:
    """The command line, and what follows from it; .values: the fields of the recipe that it gives."""
    parser = Parser("train.py", "train.py --dataset | --fit | --predict | --export ..., and flags", __doc__,
                    f"methods: {', '.join(METHODS)}\ndatasets: toy, {', '.join(data.DATASETS)}",
                    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_fields("what to run", Options)
    parser.add_fields("the recipe", Recipe)
    given = vars(parser.parse_args(argv))
    args = Namespace(**vars(Options()) | given)
    args.values = {name: value for name, value in given.items() if hasattr(Recipe, name)}
    uses = args.dataset, args.fit, args.predict, args.export
    if sum(map(bool, uses)) != 1 or len(args.export) not in (0, 2) or len(args.predict) == 1:
        parser.error("give one of --dataset NAMES, --fit FOLDER, --predict FILE PICTURES, --export FILE OUT")
    args.dataset = [name for word in args.dataset for name in data.GROUPS.get(word, [word])]
    usual = "zero-shot atha" if args.dataset else "clip-lora"
    args.method = [name for word in args.method or usual.split()
                   for name in (ALL.split() if word == "all" else [word])]
    args.recipe = args.recipe or ("clip-lora-fsl" if args.split else "paper")
    if args.dataset == ["toy"] and not args.weights:
        args.weights = str(data.TOY / "toy_clip.safetensors")
    return args

def plan(args: Namespace, clip: CLIP, tokenizer: Tokenizer) -> dict:
    """The job of every (method, shot, dataset) asked for, each tried as far as it can be without training."""
    pools = {name: data.load(name, args.data, clip.config.image, args.split) for name in args.dataset}
    jobs = {}
    for dataset, shot, method in product(args.dataset, args.shot, args.method):
        pool, recipe = pools[dataset], recipe_for(args.recipe, method, shot, dataset, **args.values)
        if recipe.prompt == "coop":
            recipe = replace(recipe, prompt=pool.prompt or Recipe.prompt)
        rows = class_rows(tokenizer, recipe.prompt, pool.classes, clip)
        task_of(args, pool, shot, 0)
        jobs[method, shot, dataset] = Job(clip, pool, rows, method, recipe)
    return jobs

def compare(args: Namespace, clip: CLIP, tokenizer: Tokenizer) -> int:
    """Run every method on every dataset at every shot, and print the tables."""
    files = {key: run_job(args, job, *key[1:]) for key, job in plan(args, clip, tokenizer).items()}
    if RANK:
        return 0
    cells = {key: wait_for_all(*of_job) for key, of_job in files.items()}
    if sorted(args.dataset) == sorted(data.GROUPS["all"]):
        for method, shot in product(args.method, args.shot):
            of_sets = [cells[method, shot, dataset] for dataset in args.dataset]
            cells[method, shot, "mean"] = {n: sum(of_set[n] for of_set in of_sets) / 4 for n in of_sets[0]}
    untouched = args.recipe == "paper" and not args.values and (args.way, args.query) == (5, 15)
    c = clip.config
    papers = (c.vision_layers, c.vision_width, c.patch) == (12, 768, 16) and untouched and not args.split
    print("\n\n".join(table(cells, shot, c.family if papers else "") for shot in args.shot))
    return 0

def load_clip(args: Namespace, place: str = "") -> tuple[CLIP, Tokenizer]:
    """--weights, or those at a place."""
    dtype = getattr(torch, "float32" if args.export else args.precision)
    clip, tokenizer = clip_min.load(args.weights or place or None, args.device, dtype)
    if args.precision == "float32" and torch.cpu._is_avx512_bf16_supported():
        data.say("this CPU multiplies bfloat16: on it --precision bfloat16 takes two thirds of the time")
    if clip.config.vision_width < 512:     # on two quiet cores as fast as two threads, in 0.6 of the CPU time
        torch.set_num_threads(1)
    return clip, tokenizer

def run(argv: list[str] | None) -> int:
    """What was asked for; returns the exit code."""
    args = parse(argv)
    data.find(args.dataset, args.data, args.split)         # all that is missing is told before a download
    torch.set_flush_denormal(True)         # gradients below 1e-38 are 0: CPUs compute with them far slower
    torch.backends.cudnn.allow_tf32 = False          # float32 means float32, in the patch convolution too
    if args.predict:
        return predict(args, load_tuned(args.predict[0], args)[0])
    if args.export:
        return export(args, *load_tuned(args.export[0], args))
    return fit(args, *load_clip(args)) if args.fit else compare(args, *load_clip(args))

def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 2 for a request that cannot be met, said in one line."""
    try:
        return run(argv)
    except (UsageError, DataError, WeightsError, OSError, torch.OutOfMemoryError) as e:
        if isinstance(e, OSError) and load_own.cache_info().currsize:
            raise                                             # from the user's own code: where, is wanted
        print("train.py: error:", *str(e).split(), file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
