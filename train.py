"""Few-shot adaptation of CLIP to far-away domains: ATHA, TIR, SVL + RA on CLIP-LoRA, CoOp and MaPLe.

  python train.py --dataset toy --shot 1          no download, no GPU, a minute or two on two cores
  python train.py --dataset eurosat --shot 1      the real thing: ATHA, 800 episodes, fetched at need
  python train.py --dataset all --shot 1 5 --method all          the papers' tables
  python train.py --dataset dtd --split --shot 16 --method clip-lora             all classes, whole test split
  python train.py --dataset eurosat --method mine.py:Mine        a method of your own
  python train.py --fit FOLDER --save mine.safetensors           your own pictures
  python train.py --predict mine.safetensors PICTURES
  python train.py --export mine.safetensors OUT                  for transformers, open_clip, peft
  python train.py --help                          everything else

In a program, `adapt` is the whole of training in one function.
"""
from __future__ import annotations

import argparse
import copy
import gc
import glob
import json
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
if __name__ == "__main__":                       # Ctrl-C while torch is being imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from datetime import timedelta
from difflib import get_close_matches
from functools import cache, cached_property
from itertools import product
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file
from torchvision.transforms.functional import to_pil_image

import atha
import clip_min
import data
from atha import (PARTS, Hook, LoRA, Part, Probe, Step, compare, draw_patches, gap_shift, linear_cka,
                  modality_gap, probe_table)
from clip_min import CLIP, Tokenizer, save
from data import DATASETS, Batches, DataError, Pool, Task, decode, generator, printable, progress


class UsageError(Exception):
    """A request that cannot be met; the message is one line for the user."""


# ---------------------------------------------------------------------------------------- recipes and methods

def option(groups: str, default, text: str, low: float = 0, high: float = 1e300, choices: Sequence[str] = ()):
    """A field of Recipe: the parts that read it (or `all`), its default, what it is, and what it may be."""
    return field(default=default, metadata={"groups": groups.split(), "help": text, "low": low, "high": high,
                                            "choices": choices})


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter; defaults are the papers'. Blocks count from 0, of 12 (see Part.at_depth)."""
    # every method, and zero-shot
    prompt: str = option("all", "a photo of a {}.", "text of a class, {} is its name")
    scale: float = option("all", 100.0, "logits are this times the cosine")
    augment: str = option("all", "crop", "support pictures: none (257 -> 224 centre crop), crop (random "
                          "crop and flip), views (five fixed views)", choices=("none", "crop", "views"))
    # training
    tune: str = option("training", "clip-lora", "ways to tune, joined with +, where the method names none")
    steps: int = option("training", 100, "training steps of an episode", low=1)
    minibatch: int = option("training", 0, "pictures a step, shuffled; 0: all of them")
    weight_decay: float = option("training", 1e-2, "weight decay of AdamW")
    cosine: float = option("training", 0.0, "cosine schedule to 1e-6 over so many times the steps; 0: none")
    crop_area: float = option("training", 0.5, "smallest area of a random crop", low=1e-4, high=1)
    bicubic: bool = option("training", False, "random crops are resampled bicubic, not bilinear")
    # CLIP-LoRA
    lr: float = option("cliplora", 2e-4, "learning rate of its AdamW")
    rank: int = option("cliplora", 16, "rank", low=1, high=4096)
    lora_alpha: float = option("cliplora", 8.0, "scaled by lora-alpha / sqrt(rank)")
    dropout: float = option("cliplora", 0.25, "dropout on its input", high=1)
    text_lora: bool = option("cliplora", False, "in the text tower too")
    # CoOp
    context: int = option("coop", 4, "learned vectors in place of the prompt's first tokens", low=1, high=999)
    context_lr: float = option("coop", 2e-3, "learning rate of its SGD")
    # MaPLe
    maple_prompts: int = option("maple", 2, "prompt vectors a block", low=1, high=999)
    maple_depth: int = option("maple", 9, "so many of the first blocks get them", low=1, high=999)
    maple_lr: float = option("maple", 3.5e-3, "learning rate of its SGD")
    # ATHA
    rho: float = option("atha", 0.1, "share of head tokens", high=1)
    gamma: float = option("atha", 0.1, "share of tail tokens", high=1)
    alpha: float = option("atha", 0.8, "first pull, at alpha-block alone", low=-1e300)
    alpha_block: int = option("atha", 8, "block whose pull starts at alpha", high=11)
    beta: float = option("atha", 0.01, "first push, at every block", low=-1e300)
    token_lr: float = option("atha", 1e-3, "learning rate of pull and push")
    sgd: bool = option("atha", False, "pull and push by SGD, not AdamW")
    copy_cls: bool = option("atha", False, "before every block a copy of [CLS] joins the tokens")
    text_to_tokens: str = option("atha", "paper", "formula of class texts in token space",
                                 choices=("paper", "released"))
    text_block: int = option("atha tir", -1, "text block that gives the tokens' class texts; -1: the last",
                             low=-1, high=11)
    # TIR
    tir_blocks: tuple[int, ...] = option("tir", (8, 10), "blocks before which tokens are weighed", high=11)
    tir_top: float = option("tir", 0.3, "share of tokens that a class marks", high=1)
    tir_rule: str = option("tir", "linear", "linear in the number of classes that mark a token, or simple: "
                           "only sinks and specific tokens are weighed", choices=("linear", "simple"))
    # SVL, RA and LV
    extra_share: float = option("svl ra lv", 0.6, "share of the steps in which the loss acts", high=1)
    extra_last: bool = option("svl ra lv", False, "the last steps, not the first")
    svl_weight: float = option("svl", 0.1, "weight of the loss")
    ra_weight: float = option("ra", 3.0, "weight of the loss")
    ra: str = option("ra", "paper", "formula of the loss", choices=("paper", "released"))
    lv_weight: float = option("lv", 0.1, "weight of the loss")


RELEASED_ATHA = Recipe(
    tune="clip-lora+coop", text_lora=True, scale=2.0, augment="none", text_block=10,
    text_to_tokens="released", rho=0.3, gamma=0.2, alpha_block=6, beta=0.0, copy_cls=True, sgd=True,
    ra="released")
RECIPES = {    # at 1 shot; recipe_for knows what depends on the shot
    "paper": Recipe(),
    "released-atha": RELEASED_ATHA,
    "released-svl": replace(RELEASED_ATHA, tune="clip-lora", text_lora=False, scale=100.0, augment="views",
                            steps=250, cosine=8.0),
    "clip-lora-fsl": Recipe(text_lora=True, rank=2, lora_alpha=1.0, steps=500, minibatch=32, cosine=1.0,
                            crop_area=0.08, bicubic=True),
}
METHODS = ["zero-shot", *dict.fromkeys(name for part in PARTS for name in part.names)]


@cache
def own_part(place: str) -> type[Part]:
    """The class of a user's own method, "FILE.py:NAME". Raises UsageError."""
    file, _, name = place.rpartition(":")
    try:
        data.ordinary(file)
        sys.path.append(str(Path(file).resolve().parent))         # for what it imports from beside it
        part = runpy.run_path(file)[name]
        if not issubclass(part, Part):
            raise TypeError(f"{name} is not a subclass of atha.Part")
        if not vars(part).keys() & {"vision_hook", "text_hook", "enclose", "loss"}:
            raise TypeError(f"{name} overrides no hook and no loss, so it would change nothing")
        for made in vars(part):
            if not hasattr(Part, made) and (meant := get_close_matches(made, dir(Part), n=1, cutoff=0.9)):
                raise TypeError(f"nothing calls {made}: is {meant[0]} meant?")
        if taken := part.fields.keys() & asdict(Recipe()).keys():
            raise TypeError(f"{name}'s field {min(taken)} is one of Recipe already")
    except (Exception, SystemExit) as e:                        # it is the user's code: anything may be wrong
        raise UsageError(f"--method {place}: {type(e).__name__}: {' '.join(str(e).split())}") from e
    return part


def parts_of(method: str, tune: str = "clip-lora") -> dict[type[Part], set[str]]:
    """What a method, or several joined with +, switches on, with the halves of each, in the order of acting.

    tune: the ways to tune where the method names none, or clip-lora alone. Raises UsageError.
    """
    on = {}
    for name in method.split("+") if method != "zero-shot" else ():
        named = [own_part(name)] if ":" in name else [part for part in PARTS if name in part.names]
        if not named:
            raise UsageError(f"unknown method {method!r}: choose from {', '.join(METHODS)}, FILE.py:NAME, "
                             "or join some with +")
        for part in named:
            on[part] = on.get(part, set()) | part.names.get(name, set())
    if on and tune and not any(part.tunes and "clip-lora" not in part.names for part in on):
        on = parts_of(tune, tune="") | on
    return {part: on[part] for part in [*PARTS, *on] if part in on}


def extended(recipe: Recipe, on: Iterable[type[Part]]) -> Recipe:
    """The recipe with the fields that parts of the user's own add; those of one name are one."""
    new = {name: (name, type(default), option(part.__name__.lower(), default, text, low=-1e300))
           for part in on for name, (default, text) in part.fields.items() if not hasattr(recipe, name)}
    if not new:
        return recipe
    return make_dataclass("Recipe", new.values(), bases=(type(recipe),), frozen=True)(**asdict(recipe))


def trainer_of(name: str, method: str) -> str:
    """The name of a recipe; `released` means the trainer that the method came with."""
    kinds = {part.__name__ for part in parts_of(method)}
    from_svl = kinds & {"SVL", "RA", "LV"} and not kinds & {"ATHA", "TIR"}
    released = "released-svl" if from_svl else "released-atha"
    return released if name == "released" else name


def recipe_for(name: str, method: str, shot: int = 1, dataset: str = "") -> Recipe:
    """A recipe by its name for a method, a shot and a dataset. Raises UsageError."""
    on, name = parts_of(method), trainer_of(name, method)
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}: choose from {', '.join(RECIPES)}, released")
    recipe = RECIPES[name]
    if name == "released-atha" and shot > 1:
        recipe = replace(recipe, scale=4.0)
    if name == "released-svl" and all(part.tunes for part in on):     # its own baseline, whatever the shot
        recipe = replace(recipe, minibatch=25)
    elif name == "released-svl":
        recipe = replace(recipe, steps=recipe.steps * shot // (2 if dataset == "chestx" else 1))
    if name == "clip-lora-fsl":
        recipe = replace(recipe, steps=recipe.steps * shot)
    return extended(recipe, on)


def checked(recipe: Recipe) -> Recipe:
    """The recipe, if every field is of its kind and within its limits. Raises UsageError naming the flag."""
    for f in fields(recipe):
        value, kind, m = getattr(recipe, f.name), type(f.default), f.metadata
        several = type(value) is tuple is kind
        kinds = (int,) if several else (kind, int) if kind is float else (kind,)
        limited, high = {int, float} & {*kinds}, m["high"] if float in kinds else min(m["high"], 2 ** 31 - 1)
        what = f"a number from {m['low']:g} to {high:g}" if limited else f"a {kind.__name__}"
        what = f"one of {', '.join(m['choices'])}" if m["choices"] else what
        for one in value if several else (value,):
            fits = type(one) in kinds and (not limited or m["low"] <= one <= high)
            if not fits or m["choices"] and one not in m["choices"]:
                raise UsageError(f"--{f.name.replace('_', '-')} {one!r} is not {what}")
    if "{}" not in recipe.prompt:
        raise UsageError(f"--prompt {recipe.prompt!r} has no {{}}, where the class name goes")
    parts_of(recipe.tune)
    return recipe


def fields_of(recipe: Recipe, method: str) -> dict[str, object]:
    """What of the recipe a method reads: two runs are alike if these are."""
    on = parts_of(method, recipe.tune)
    read = {"all", "training"} if on else {"all"}
    read |= {cls.__name__.lower() for part in on for cls in part.__mro__}
    return {f.name: getattr(recipe, f.name) for f in fields(recipe) if read & set(f.metadata["groups"])}


# ------------------------------------------------------------------------------------------------- adaptation

def share_weights(backbone: CLIP) -> CLIP:
    """A second backbone over the same, frozen, tensors: what is learned in it leaves the first alone."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in backbone.parameters()}
    return copy.deepcopy(backbone, memo)          # what memo names counts as copied: old numbers, new modules


def fitting(part: Part, where: str, made: object, like: Tensor) -> Tensor | float:
    """What a part made, if the loop can go on with it: it may be the user's own. Raises UsageError.

    It is as `like` is, but that a vision hook may make more or fewer tokens, and a loss may be a number.
    """
    def kind(x: Tensor) -> tuple:
        return x.dtype, x.dim(), x.shape[::2] if where == "vision_hook" else x.shape
    alike = isinstance(made, Tensor) and kind(made) == kind(like)
    if alike or where == "loss" and type(made) in (int, float):
        return made
    got, wanted = (f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x) for x in (made, like))
    raise UsageError(f"{type(part).__name__}.{where} gave {got} where {wanted} is wanted")


class Learner(nn.Module):
    """A backbone with what E episodes learn on it, in `parts`. token_ids (E, N, context)."""

    def __init__(self, backbone: CLIP, token_ids: Tensor, method: str, recipe: Recipe):
        super().__init__()
        on = parts_of(method, recipe.tune)
        self.recipe, self.backbone = extended(recipe, on), share_weights(backbone)
        self.methods = "+".join(part.__name__ for part in on)
        self.token_ids = backbone.trim(token_ids)
        try:
            self.parts = nn.ModuleList(part(self.backbone, self.token_ids, self.recipe, halves)
                                       for part, halves in on.items())
        except ValueError as e:
            raise UsageError(str(e)) from e
        if any(p.needs_vision for p in self.parts) and not any(p.learns_vision for p in self.parts):
            raise UsageError(f"{method}: its loss acts on picture features, and "
                             "nothing that shapes them learns")
        self.learns_text = any(part.learns_text for part in self.parts)
        self.names = [name for name, p in self.named_parameters() if p.requires_grad]
        self.losses = torch.zeros(0, len(token_ids))

    def learned(self) -> dict[str, Tensor]:
        """What training changed, by name."""
        return {name: p.detach().contiguous() for name, p in self.named_parameters() if name in self.names}

    def text(self) -> tuple[Tensor, Tensor]:
        """Class texts (E, N, embed), twice: of unit length, for logits; as they come, for the vision hooks.

        Those for the hooks are read off the recipe's text_block, which is the last but in the releases.
        """
        ids, early = self.token_ids.flatten(0, 1), None                  # ids: (E*N, T)
        block = self.recipe.text_block * self.backbone.config.text_layers // 12            # negative: last

        def before_block(x: Tensor, layer: int) -> Tensor:               # x: (E*N, T, D)
            nonlocal early
            if layer - 1 == block >= 0:
                early = x                                                # what that block gave
            for part in self.parts:
                x = fitting(part, "text_hook", part.text_hook(x, layer), like=x)
            return x
        last = self.backbone.encode_text(ids, before_block)
        for_hooks = last if early is None else self.backbone.read_text(early, ids)
        last, for_hooks = (text.unflatten(0, self.token_ids.shape[:2]) for text in (last, for_hooks))
        return F.normalize(last.float(), dim=-1), for_hooks

    def hook(self, hook_text: Tensor, probe: Hook | None = None) -> Hook:
        """All vision hooks as one, for class texts (E, N, embed); a probe sees the tokens first."""
        hooks = [(part, one) for part in self.parts if (one := part.vision_hook(hook_text))]

        def all_in_turn(tokens: Tensor, layer: int) -> Tensor:
            tokens = probe(tokens, layer) if probe else tokens
            for part, one in hooks:
                tokens = fitting(part, "vision_hook", one(tokens, layer), like=tokens)
            return tokens
        enclosed = all_in_turn
        for part in self.parts:
            enclosed = part.enclose(enclosed)
        return enclosed

    def with_extra_losses(self, loss: Tensor, step: Step) -> Tensor:
        """A loss (E,) and what the parts add to it."""
        for part in self.parts:
            loss = loss + fitting(part, "loss", part.loss(step), like=loss)
        return loss

    def prepare(self, images: Tensor) -> Tensor:
        """Pictures (..., 3, S, S) uint8 -> (..., 3, size, size) normalised for this backbone and recipe."""
        b, centre = self.backbone, self.recipe.augment == "none"
        return data.plain(images, b.config.image, centre=centre, mean=b.mean, std=b.std)

    def features(self, images: Tensor, hook: Hook, chunk: int = 0) -> Tensor:
        """(E, B, 3, S, S) -> unit features (E, B, embed) float32; backward keeps `chunk` an episode."""
        def encode(some: Tensor) -> Tensor:
            return self.backbone.visual(some.flatten(0, 1), hook).unflatten(0, some.shape[:2])
        if not chunk or chunk >= images.shape[1]:
            return F.normalize(encode(images).float(), dim=-1)
        chunks = [checkpoint(encode, some, use_reentrant=False) for some in images.split(chunk, 1)]
        return F.normalize(torch.cat(chunks, 1).float(), dim=-1)

    @cached_property
    def text_and_hook(self) -> tuple[Tensor, Hook]:
        """Class texts of unit length and the hook, once nothing is learned any more."""
        text, hook_text = self.text()
        return text, self.hook(hook_text)

    @torch.no_grad()
    def logits(self, images: Tensor, chunk: int = 25) -> Tensor:
        """(E, Q, 3, S, S) normalised -> (E, Q, N) float32, scale times the cosine."""
        text, hook = self.text_and_hook
        return self.recipe.scale * self.features(images, hook, chunk) @ text.mT


class GivenBatches:
    """What `adapt` asks of data.Batches, for a support set (E, M, 3, S, S) that is at hand.

    Every step sees all of it, or what `batches(number)` gives. With RA, that must be the same pictures in the
    same order in every step, as it compares each with what it was before.
    """

    def __init__(self, support: Tensor, labels: Tensor, batches: Callable | None):
        self.batches, self.plain = batches, lambda number: (support, labels)
        of_first = self(0)[1]                                            # (E, B)
        self.shown = of_first.shape[1]
        self.all = torch.arange(self.shown, device=labels.device).expand(len(of_first), -1)

    def __call__(self, number: int) -> tuple[Tensor, Tensor]:
        return (self.batches or self.plain)(number)

    def rows(self, number: int) -> Tensor:
        return self.all


def optimizers_of(learner: Learner) -> tuple[list, list]:
    """AdamW and SGD over what the parts learn, and AdamW's cosine schedule; each list holds what there is.

    Raises UsageError for a part (it may be the user's own) whose parameters would not be learned as it means.
    """
    r, groups, grouped = learner.recipe, {"adamw": [], "sgd": []}, set()
    learned = {id(learner.get_parameter(name)): name for name in learner.names}
    for part in learner.parts:
        for kind, parameters, lr in part.groups():
            parameters = list(parameters)
            if kind not in groups or not learned.keys() >= {*map(id, parameters)}:
                raise UsageError(f"{type(part).__name__}.groups takes adamw or sgd, and parameters of the "
                                 "part that its __init__ made, as no others are saved")
            groups[kind].append({"params": parameters, "lr": lr})
            grouped |= {*map(id, parameters)}
    for one, name in learned.items():
        shape, episodes = list(learner.get_parameter(name).shape), len(learner.token_ids)
        if one not in grouped:
            raise UsageError(f"{learner.methods}: {name} is in no group, so nothing would learn it")
        if shape[:1] != [episodes]:      # one for all episodes would let them learn from each other
            raise UsageError(f"{learner.methods}: {name} has shape {shape}, but its first dimension is the "
                             f"episodes', {episodes}")
    adamw = groups["adamw"] and [torch.optim.AdamW(groups["adamw"], weight_decay=r.weight_decay, fused=True)]
    # momentum and decay are the released trainer's, and CoOp's and MaPLe's
    sgd = groups["sgd"] and [torch.optim.SGD(groups["sgd"], momentum=0.9, weight_decay=5e-4)]
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    return adamw + sgd, [cosine(optimizer, r.cosine * r.steps, 1e-6) for optimizer in adamw if r.cosine]


def adapt(clip: CLIP, support: Tensor, labels: Tensor, token_ids: Tensor, method: str = "atha",
          recipe: Recipe | str = "paper", *, batches: Callable[[int], tuple[Tensor, Tensor]] | None = None,
          seeds: Sequence[object] | None = None, lora_A: dict[str, Tensor] | None = None,
          picks: Tensor | None = None, chunk: int = 0, compile: bool = False) -> Learner:
    """Fine-tune E episodes in one batch, each as it would go alone, but for dropout; clip stays as it was.

    support (E, M, 3, S, S) normalised, labels (E, M), token_ids (E, N, context) -> a frozen Learner, with
    .losses (steps, E) and .logits. method: as on the command line. recipe: a Recipe, or a name as there,
    which takes M / N for the shot. seeds: one an episode, of all that is drawn but dropout, which is torch's.
    batches(number): the pictures (E, B, 3, S, S) and labels (E, B) of a step, the same when asked again;
    without it every step sees the whole support set. (The recipe's augment, minibatch, crop_area and bicubic
    are for data.Batches, which may be given here, and are not read.) With RA, all steps must show the same
    pictures in the same order, those of the support set first.

    To replay a recording: lora_A {module name: (rank, in) or (E, rank, in)}, LoRA's first A (B starts at 0),
    and picks (steps, N) or (steps, E, N), the rows of a step's pictures that SVL draws. To save memory:
    chunk, pictures of an episode held for backward at once, 0 for all; the result is that of all.
    """
    if isinstance(recipe, str):
        recipe = recipe_for(recipe, method, shot=support.shape[1] // token_ids.shape[1])
    learner = Learner(clip, token_ids, method, recipe)
    if not learner.parts:
        return learner.eval()
    batches = batches if isinstance(batches, Batches) else GivenBatches(support, labels, batches)
    generators = [generator("learner", seed) for seed in (range(len(token_ids)) if seeds is None else seeds)]
    for part in learner.parts:
        part.draw(generators, batches.rows(0).shape[1], {"lora_A": lora_A, "picks": picks})
    optimizers, schedules = optimizers_of(learner)
    if compile:
        for block in learner.backbone.visual.transformer.resblocks:              # one graph serves all blocks
            block.compile()

    learner.train()
    losses, text = [], None
    for number in range(recipe.steps):
        images, wanted = batches(number)                                             # (E, B, 3, S, S), (E, B)
        plain, plain_labels = images[:, :0], wanted[:, :0]                           # none: an empty tensor
        if any(part.wants_plain(number) for part in learner.parts):
            plain, plain_labels = batches.plain(number)                              # (E, K, 3, S, S), (E, K)
        if text is None or learner.learns_text:     # class texts change only where the text tower learns
            with torch.set_grad_enabled(learner.learns_text):
                text, hook_text = learner.text()                                     # (E, N, embed)
        inputs = torch.cat([images, plain], 1) if plain.shape[1] else images
        features = learner.features(inputs, learner.hook(hook_text), chunk)          # (E, B + K, embed)
        features, plain_features = features.split([images.shape[1], plain.shape[1]], 1)
        logits = recipe.scale * features @ text.mT       # cosines, as both are of unit length: (E, B, N)
        loss = F.cross_entropy(logits.mT, wanted, reduction="none").mean(1)          # of (E, N, B): (E,)
        step = Step(number, features=features, labels=wanted, logits=logits, text=text, plain=plain_features,
                    plain_labels=plain_labels, rows=batches.rows(number), total=batches.shown)
        loss = learner.with_extra_losses(loss, step)
        loss.sum().backward()        # a mean would make an episode's steps depend on how many there are
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
        losses.append(loss.detach())
    moved = {p for optimizer in optimizers for p in optimizer.state}
    if still := [name for name in learner.names if learner.get_parameter(name) not in moved]:
        raise UsageError(f"{learner.methods}: {still[0]} never got a gradient, so no loss depends on it")
    learner.losses = torch.stack(losses)
    return learner.requires_grad_(False).eval()


# ----------------------------------------------------------------------------------------- memory, processes

MEMORY = re.compile("out of ?memory|start new thread|MemoryError|allocate memory|"
                    "CUBLAS_STATUS_(ALLOC|NOT_)|HostAlloc", re.I)


def halving(work: Callable, at_once: int, what: str) -> tuple[object, int]:
    """work(at_once), again with half as many while memory runs out; its result, and how many it was."""
    while True:
        try:
            return work(at_once), at_once
        except (RuntimeError, MemoryError) as e:
            if not MEMORY.search(repr(e)):
                raise
        if at_once == 1:                                    # out here the traceback no longer holds the batch
            raise UsageError(f"out of memory with one {what} at a time")
        at_once //= 2
        progress(f"out of memory: {at_once} {what}s at a time from here on")


def ahead(call: Callable, items: Sequence) -> Iterator:
    """call(item) for every item in turn, the next one in a thread while the last is being used."""
    with ThreadPoolExecutor(1) as background:
        coming = None
        for item in items:
            coming, ready = background.submit(call, item), coming
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()


def pictures_at_once(backbone: CLIP, device: torch.device) -> int:
    """How many pictures fit into free memory in training."""
    c, size = backbone.config, backbone.visual.proj.element_size()
    if device.type == "cuda":
        torch.cuda.empty_cache()                                 # what PyTorch keeps in reserve is free to us
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = 4 * 2 ** 30                                   # where nothing tells, a small machine is assumed
        with suppress(OSError, TypeError):
            known = Path("/proc/meminfo").read_text()
            free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", known)[1])
    numbers = 15 if device.type == "cuda" else 30  # that backward keeps a token, block and channel: measured
    per_picture = numbers * size * c.vision_width * c.vision_layers * ((c.image // c.patch) ** 2 + 1)
    return max(1, int(0.7 * free / per_picture))


def join_others() -> None:
    """Where torchrun started several processes: to gather results, and wait for each other. DataError."""
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        with data.refusing("cannot join the other processes", ValueError, RuntimeError):
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))


def rank_and_size() -> tuple[int, int]:
    """This process's number, and how many have joined."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gathered(mine: object) -> list:
    """What every process has, in the order of their ranks. Raises DataError when one of them has ended."""
    everyone = [mine] * rank_and_size()[1]
    if len(everyone) > 1:
        with data.refusing("another process has ended (finished episodes are kept, and the same command goes "
                           "on from there)", RuntimeError):
            torch.distributed.all_gather_object(everyone, mine)
    return everyone


# -------------------------------------------------------------------------------------- a method on a dataset

def class_rows(tokenizer: Tokenizer, prompt: str, names: Sequence[str], context: int) -> Tensor:
    """Token rows (C, context) of class names in the prompt, _ as a space. Raises UsageError for twins."""
    rows, seen = tokenizer([prompt.replace("{}", name.replace("_", " ")) for name in names], context), {}
    for name, row in zip(names, map(tuple, rows.tolist())):
        if row in seen:
            raise UsageError(f"classes {seen[row]!r} and {name!r} have the same text, so nothing can tell "
                             f"them apart: rename one, or change the prompt {prompt!r}")
        seen[row] = name
    return rows


def check_numbers(what: str, seeds: Sequence[tuple], found: Iterable[Tensor]) -> None:
    """Raises UsageError, with the episodes' numbers, where what was found is not finite."""
    if broken := [str(number) for (*_, number), x in zip(seeds, found) if not x.isfinite().all()]:
        raise UsageError(f"{what} not a number in episode or fold {', '.join(broken)}: lower --lr or "
                         "--dropout, or use --precision float32")


@dataclass
class Job:
    """A method under a recipe, on a pool's pictures: trains and tries tasks of it. token_ids (C, context)."""
    backbone: CLIP
    pool: Pool
    token_ids: Tensor
    method: str
    recipe: Recipe
    compile: bool = False

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def shown(self, task: Task) -> int:
        """Pictures of a task that a step holds in memory."""
        r, plain = self.recipe, len(task.support)
        whole = plain * (5 if r.augment == "views" else 1)
        shown = min(r.minibatch or whole, whole)
        wants_plain = any(part.wants_plain is not Part.wants_plain for part in parts_of(self.method, r.tune))
        return shown + wants_plain * min(plain, shown)

    def learn(self, tasks: Sequence[Task], seeds: Sequence[tuple], told: Callable = int, chunk: int = 0,
              ) -> Learner:
        """Train tasks with equally many support pictures in one batch; told(step) is called before a step."""
        r, b = self.recipe, self.backbone
        support, labels = (torch.stack([task[i] for task in tasks]) for i in (1, 2))           # (E, M)
        batches = Batches(self.pool.images, support, labels, size=b.config.image, steps=r.steps, seeds=seeds,
                          augment=r.augment, minibatch=r.minibatch, area=r.crop_area, bicubic=r.bicubic,
                          mean=b.mean, std=b.std, device=self.device, told=told)
        torch.manual_seed(generator("dropout", *seeds[0]).initial_seed())        # the same masks when resumed
        token_ids = self.token_ids[torch.stack([task.classes for task in tasks]).to(self.device)]
        learner = adapt(b, *batches.plain(0), token_ids, self.method, r, batches=batches, seeds=seeds,
                        chunk=chunk, compile=self.compile)
        check_numbers("the loss is", seeds, learner.losses[-1:].T)
        return learner

    def pictures(self, rows: Tensor) -> Tensor:
        """Pictures (1 or E, n, 3, S, S) uint8 on the device; rows (E, n) that tasks share are copied once."""
        images = self.pool.images[rows[:1] if rows.eq(rows[:1]).all() else rows]
        images = images.pin_memory() if self.device.type == "cuda" else images
        return images.to(self.device, non_blocking=True)

    def logits(self, learner: Learner, tasks: Sequence[Task], told: Callable = int) -> list[Tensor]:
        """One (Q, N) a task, on the CPU, in passes that fit memory; told(n): queries that are done."""
        rows = nn.utils.rnn.pad_sequence([task.query for task in tasks], batch_first=True)     # (E, Q)
        passes = []
        for images in ahead(self.pictures, rows.split(25, 1)):
            images = learner.prepare(images).expand(len(tasks), -1, -1, -1, -1)
            passes.append(learner.logits(images).cpu())
            told(25 * len(passes))
        return [logits[: len(task.query)] for logits, task in zip(torch.cat(passes, 1), tasks)]


def make_job(args: Namespace, backbone: CLIP, tokenizer: Tokenizer, pool: Pool, recipe: Recipe,
             method: str, phrases: Sequence[str] | None = None) -> Job:
    """A job whose classes are called as the pool has them, or by these phrases."""
    token_ids = class_rows(tokenizer, recipe.prompt, phrases or pool.classes, backbone.config.context)
    return Job(backbone, pool, token_ids.to(backbone.logit_scale.device), method, recipe, args.compile)


def trained(job: Job, tasks: Sequence[Task], seeds: Sequence[tuple], what: str,
            at_once: int | None = None) -> Learner:
    """A learner of tasks in one batch, so many pictures of each at once, or as memory allows."""
    steps, shown = job.recipe.steps, job.shown(tasks[0])
    clock, fits = data.Clock(what, steps), pictures_at_once(job.backbone, job.device) // len(tasks)

    def work(chunk):
        return job.learn(tasks, seeds, chunk=chunk, told=lambda step: clock.tell(
            step, f"step {step}/{steps} of {shown} pictures"))
    learner, _ = halving(work, at_once or min(max(1, fits), shown), "picture")
    if learner.parts:                                            # zero-shot learns nothing
        clock.tell(steps, f"{steps} steps", last=True)
    return learner


# ---------------------------------------------------------------------------------------------------- results

def check_writable(target: str) -> None:
    """Raises DataError before the work is done rather than after."""
    real = Path(os.path.realpath(target))                        # links are followed
    with data.refusing(f"cannot write {target}", OSError, DataError):
        if real.exists():
            data.ordinary(real)
        real.parent.mkdir(parents=True, exist_ok=True)
        part = real.with_name(f"{real.name}.{os.getpid()}.part")         # a name as long as `save` needs
        part.touch()
        part.unlink()


@contextmanager
def new_file(target: str | Path) -> Iterator[Path]:
    """A file to write beside the target, whose place it takes when that is done. Raises DataError."""
    real = Path(os.path.realpath(target))
    part = real.with_name(f"{os.getpid()}.part{real.suffix}")
    with data.refusing(f"cannot write {target}", OSError):
        try:
            yield part
            os.replace(part, real)
        finally:
            part.unlink(missing_ok=True)


class Results:
    """One JSON line a task, after a first line that tells what made them; every process writes its own part.

    done: every finished task, of all parts, by its number. Raises UsageError for a part that is damaged, of
    other settings, or being written.
    """

    def __init__(self, stem: Path, header: dict, rank: int = 0):
        self.header, self.done = header, {}
        part = stem.with_name(f"{stem.name}.part{rank}.jsonl")
        with data.refusing(f"cannot keep results in {stem.parent}"):
            stem.parent.mkdir(parents=True, exist_ok=True)
            if part.exists():
                data.ordinary(part)
            self.file = part.open("a+b")
        if not data.try_lock(self.file):
            raise UsageError(f"{part}: another run is writing it")
        for one in sorted(part.parent.glob(glob.escape(stem.name) + ".part*.jsonl")):
            self.read(one)
        whole = whole_lines(part)
        self.file.truncate(sum(len(line) + 1 for line in whole))
        if not whole:
            self.append([header])

    def read(self, part: Path) -> None:
        for number, line in enumerate(whole_lines(part), 1):
            try:
                record = json.loads(line)
                if number == 1:
                    self.compare(part, record)
                elif type(record["episode"]) is int and 0 <= record["accuracy"] <= 100:
                    self.done[record["episode"]] = record
                else:
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                raise UsageError(f"{part}, line {number}, is damaged: remove it, or give another "
                                 "--out") from e

    def compare(self, part: Path, header: dict) -> None:
        """Refuses a part that was made in another way; a field that it does not know had its default."""
        ours, defaults = json.loads(json.dumps([self.header, asdict(Recipe())]))     # a tuple is a list there
        old, new = ({**x, **defaults, **x["recipe"], "recipe": ""} for x in (header, ours))
        for key in {**new, **old}:
            if old.get(key) != new.get(key):
                raise UsageError(f"{part} was made with {key} {old.get(key)!r}, this run has "
                                 f"{new.get(key)!r}; give that, or another --out, or remove it")

    def append(self, records: list[dict]) -> None:
        with data.refusing(f"cannot write {self.file.name}"):
            self.file.write("".join(json.dumps(record) + "\n" for record in records).encode())
            self.file.flush()
        self.done |= {record["episode"]: record for record in records if "episode" in record}


def whole_lines(part: Path) -> list[bytes]:
    """Lines of a part, without half a one of a killed run; none if the first is alone: that run failed."""
    data.ordinary(part)
    lines = part.read_bytes().split(b"\n")[:-1]
    return lines if len(lines) > 1 else []


def own_code(method: str) -> dict[str, str]:
    """What the code of a user's own methods is, so that results of two versions are not mixed.

    Of the files that are named, not of what these import.
    """
    code = [Path(name.rpartition(":")[0]).read_bytes() for name in method.split("+") if ":" in name]
    return {"code": data.digest(*code)} if code else {}


@cache
def program() -> str:
    """What this program's own code is, which every record tells as it has no version that is kept up."""
    return data.digest(*(Path(module.__file__).read_bytes() for module in (atha, clip_min, data)),
                       Path(__file__).read_bytes())


# ----------------------------------------------------------------------------------------------------- tables

# What the papers report, in %, on a family of backbones (PE-Core-B/16: SVL's best rows); a row a paper
PAPER = """
family   method       shot   isic   eurosat  cropdiseases  chestx  mean
clip     clip-lora    1      35.23  81.41    85.32         21.73   55.92
clip     clip-lora    1      36.40  81.72    84.62         21.86   56.07
clip     clip-lora    5      51.10  92.52    96.21         24.13   65.99
clip     atha         1      38.86  82.56    87.99         24.00   58.35
clip     tir          1      39.38  82.53    86.91         23.98   58.20
clip     tir          5      56.73  93.49    97.42         26.12   68.44
clip     svl          1      38.12  85.02    87.20         22.68   58.26
clip     tir-inhibit  5      -      -        -             -       67.66
clip     tir-enhance  5      -      -        -             -       67.23
clip     svl-only     1      -      -        -             -       57.55
clip     ra-only      1      -      -        -             -       57.17
pe-core  clip-lora    1      40.89  84.49    91.75         22.02   59.78
pe-core  clip-lora    5      -      -        -             -       68.64
pe-core  svl          1      45.01  86.83    93.03         23.66   62.14
pe-core  svl          5      -      -        -             -       70.29
"""


def paper_figure(method: str, shot: int, column: str, family: str = "clip") -> str:
    """What the papers report on this family of backbones, " (81.41 / 81.72)" where two do, or ""."""
    head, *rows = (line.split() for line in PAPER.strip().splitlines())
    told = [dict(zip(head, row)).get(column, "-") for row in rows if row[:3] == [family, method, str(shot)]]
    known = " / ".join(figure for figure in told if figure != "-")
    return f" ({known})" if known else ""


def mean_and_interval(accuracies: Iterable[float]) -> tuple[float, float]:
    """Mean and half the 95 % interval, 1.96 std / sqrt(n), of accuracies in %."""
    a = torch.tensor(list(accuracies), dtype=torch.float64)
    return a.mean().item(), 1.96 * a.std(correction=0).item() / len(a) ** 0.5 if len(a) > 1 else float("nan")


def in_short(accuracies: Iterable[float], sign: str = "") -> str:
    """Mean and interval as text, "81.41 ± 0.42"."""
    mean, interval = mean_and_interval(accuracies)
    return f"{mean:{sign}.2f}" + f" ± {interval:.2f}" * (interval == interval)      # nobody knows that of one


def table(title: str, found: dict, sign: str = "", shot: int = 0, family: str = "") -> list[str]:
    """Lines of a Markdown table of (method, dataset) -> accuracies; shot, family: of the papers' figures."""
    methods, datasets = (list(dict.fromkeys(names)) for names in zip(*found))
    columns = [*datasets, "mean"] if len(datasets) > 1 else datasets
    rows = [[title, *columns], ["---"] * (len(columns) + 1)]
    for method in methods:
        texts = [in_short(found[method, dataset], sign) for dataset in datasets]
        means = [mean_and_interval(found[method, dataset])[0] for dataset in datasets]
        texts.append(f"{sum(means) / len(means):{sign}.2f}")
        cells = [text + paper_figure(method, shot, column, family) for text, column in zip(texts, columns)]
        rows.append([method, *cells])
    return ["", *(printable(f"| {' | '.join(row)} |") for row in rows)]


def markdown(cells: dict, family: str = "clip", recipe: str = "paper") -> str:
    """The papers' tables, one a shot, their figures for a family in brackets; below, paired differences.

    cells: of each (method, shot, dataset) the accuracy of every episode by its number. recipe: its name; what
    another trainer than the baseline's gave is not compared with it.
    """
    lines = []
    for shot in sorted({shot for _, shot, _ in cells}):
        found = {(method, dataset): x for (method, of_shot, dataset), x in cells.items() if of_shot == shot}
        lines += table(f"{shot}-shot", {key: x.values() for key, x in found.items()}, "", shot, family)
        base = {dataset: x for (method, dataset), x in found.items() if method == "clip-lora"}
        paired = {(method, dataset): [x[n] - base[dataset][n] for n in x]
                  for (method, dataset), x in found.items() if base and method != "clip-lora"
                  and trainer_of(recipe, method) == trainer_of(recipe, "clip-lora")}
        lines += table("minus clip-lora, paired", paired, sign="+") if paired else []
        others = {method for method, _ in found} - {method for method, _ in paired} - {"clip-lora"}
        if base and others:
            lines += ["", f"not paired, as another trainer made it: {', '.join(sorted(others))}"]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- protocols

OWN_FILE = re.compile("[^+]*:")      # of a user's own method; files of results are named without it


def called(dataset: str) -> str:
    """A dataset's name, or its folder's, however that is spelled."""
    return os.path.basename(os.path.abspath(dataset))


def task_of(args: Namespace, pool: Pool, shot: int, number: int) -> Task:
    """A task of a protocol, by its number: an episode, or all classes and the whole test split."""
    if args.split:
        return pool.split(shot, args.seed + number)
    return pool.task(number, way=args.way, shot=shot, query=args.query, seed=args.seed)


def name_and_header(args: Namespace, job: Job, dataset: str, shot: int) -> tuple[str, dict]:
    """The name of a file of results, and what makes them what they are: a run goes on only with its like."""
    kind, protocol = f"{args.way}way", {"way": args.way, "query": args.query}
    if args.split:
        kind = "split"
        protocol = {"split": data.digest(job.pool.train.tolist(), job.pool.test.tolist())}
    name = f"{called(dataset)}-{kind}-{shot}shot-{OWN_FILE.sub('', job.method)}-{args.recipe}-seed{args.seed}"
    return name, {
        "dataset": called(dataset), **protocol, "shot": shot, "seed": args.seed, "method": job.method,
        "recipe": fields_of(job.recipe, job.method), **own_code(job.method), "precision": args.precision,
        "weights": job.backbone.fingerprint, "data": job.pool.fingerprint}


def try_tasks(job: Job, tasks: Sequence[Task], seeds: Sequence[tuple], told: Callable) -> list[dict]:
    """Train and test tasks in one batch: a record each, accuracy in %; told(share of the work done)."""
    if job.compile:
        gc.collect()                                             # a compiled learner refers to itself
    learner = job.learn(tasks, seeds, told=lambda step: told(0.9 * step / job.recipe.steps))
    most = max(len(task.query) for task in tasks)
    logits = job.logits(learner, tasks, told=lambda done: told(0.9 + 0.1 * done / most))
    check_numbers("an answer is", seeds, logits)
    losses = learner.losses[-1:].sum(0).tolist()                 # 0 where nothing was trained
    right = [(x.argmax(-1) == task.truth).double() for x, task in zip(logits, tasks)]
    return [{"episode": number, "accuracy": 100 * x.mean().item(), "loss": loss}
            for (_, number), x, loss in zip(seeds, right, losses)]


def share(results: Results) -> None:
    """Make known to all processes what each has done: other machines may keep their files to themselves."""
    for theirs in gathered(results.done):
        results.done |= theirs


def run_job(args: Namespace, job: Job, dataset: str, shot: int) -> dict[int, float]:
    """Train what is not done yet, in batches of tasks; returns the accuracy of every task by its number."""
    rank, size = rank_and_size()
    first = task_of(args, job.pool, shot, 0)                 # refused before a file is made, if it cannot be
    (name, header), episodes = name_and_header(args, job, dataset, shot), args.episodes
    if not episodes:
        episodes = 3 if args.split else 100 if dataset == "toy" else 800 if shot == 1 else 400
    if gathered((header, episodes)) != [(header, episodes)] * size:
        raise UsageError("the processes were not started with the same command")
    results = Results(Path(args.out) / name, header, rank)
    share(results)
    missing = [n for n in range(episodes) if n not in results.done]
    fits = pictures_at_once(job.backbone, job.device) // job.shown(first)
    at_once = args.batch or min(128 if job.device.type == "cuda" else 16, max(1, fits))
    if rank == 0 and missing:
        progress(f"{name}: {episodes - len(missing)} of {episodes} {args.task}s are done, "
                 f"the others {at_once} at a time")
    work_off(args, job, shot, missing[rank::size], results, name, at_once)
    share(results)
    return {n: results.done[n]["accuracy"] for n in range(episodes)}


def work_off(args: Namespace, job: Job, shot: int, todo: list[int], results: Results, name: str, at_once: int,
             ) -> None:
    """Train tasks by their numbers, so many at once or as memory allows, and keep what each batch gives."""
    rank, size = rank_and_size()
    before, clock = 0, data.Clock(name, len(todo))
    made_by = {"device": str(job.device), "ranks": size, "compile": job.compile, "torch": torch.__version__,
               "program": program()}
    if job.compile:
        torch.compiler.reset()                               # other shapes: old graphs would only count

    def told(done):
        if rank == 0 and done:                               # what is to be done was said before
            accuracies = [record["accuracy"] for record in results.done.values()]
            so_far = f", {in_short(accuracies)} %" if accuracies else ""
            clock.tell(done, f"{before}/{len(todo)}{so_far}", last=before == len(todo))

    def batch(at_once):
        numbers = todo[before: before + at_once]
        tasks = [task_of(args, job.pool, shot, n) for n in numbers]
        return try_tasks(job, tasks, [(args.seed, n) for n in numbers],
                         told=lambda share: told(before + len(tasks) * share))
    while before < len(todo):
        records, at_once = halving(batch, at_once, args.task)
        made_by |= {"batch": len(records), "elapsed": round(time.monotonic() - clock.begun, 2)}
        results.append([record | made_by for record in records])
        before += len(records)
        told(before)


# ----------------------------------------------------------------------------------------------- own pictures

AT_ONCE, MINI = 64, 16   # --fit sees up to 64 pictures in every step; of more, 16, in four times the steps
SHEET = 48               # pictures on the sheet that --predict draws
VERDICTS = ("within noise: these pictures cannot tell whether tuning helps", "tuning helps", "tuning harms")
NOTES = {                # what --save notes beside the tensors, and of what kind it is
    "classes": list, "phrases": list, "method": str, "recipe": dict, "weights": str, "code": dict,
    "place": str | None, "temperature": float | None, "size": int,
}


def read_names(path: str, classes: Sequence[str]) -> list[str]:
    """Phrase of each class: what a JSON object says of the folder, or its name. UsageError or DataError."""
    with data.refusing(f"--names {path}", ValueError, RecursionError):
        names = json.loads(data.read_text(Path(path)))
        if not isinstance(names, dict) or not all(isinstance(phrase, str) for phrase in names.values()):
            raise ValueError('it must hold one JSON object of texts, {"folder": "phrase", ...}')
    if unknown := names.keys() - classes:
        raise UsageError(f"--names {path}: no class folder {min(unknown)!r}; there are {', '.join(classes)}")
    return [names.get(name, name) for name in classes]


def own_tasks(pool: Pool, holdout: int, folds: int, seed: int) -> list[Task]:
    """The task to be fitted, with `holdout` pictures a class as queries; after it one for each fold.

    The queries of the folds together are all pictures; they have equally many to learn from.
    """
    def task(support, query):
        return Task(torch.arange(len(pool.classes)), support, pool.labels[support], query, pool.labels[query])
    order = [rows[torch.randperm(len(rows), generator=generator("holdout", seed, label))]
             for label, rows in enumerate(pool.rows)]
    kept, held = torch.cat([rows[holdout:] for rows in order]), torch.cat([rows[:holdout] for rows in order])
    rows = torch.cat(sorted(order, key=len))                     # what is cut off is of the largest class
    fold = torch.arange(len(rows)) % max(folds, 1)
    least = int((fold > 0).sum())
    return [task(kept, held), *(task(rows[fold != k][:least], rows[fold == k]) for k in range(folds))]


def own_pool(args: Namespace) -> Pool:
    """The folder of --fit, if there is enough in it. Raises UsageError."""
    pool, needed = data.load_folder(args.fit), max(args.holdout + 1, args.folds)
    if len(pool.classes) < 2:
        raise UsageError(f"{args.fit} has one class, {pool.classes[0]!r}: there is nothing to tell apart")
    if short := [f"{name!r} has {len(r)}" for name, r in zip(pool.classes, pool.rows) if len(r) < needed]:
        flag = f"--folds {args.folds}" if args.folds else f"--holdout {args.holdout}"
        raise UsageError(f"{flag} takes {needed} pictures of every class or more: {', '.join(short)}")
    if pool.train is not None:
        progress(f"{args.fit} has a split: of its {len(pool.labels)} pictures, the {len(pool.train)} of its "
                 "training part are used")
    return pool


def fit(args: Namespace, backbone: CLIP, tokenizer: Tokenizer) -> int:
    """Fine-tune once on a folder of class folders, tell how far to trust what comes out, and keep it."""
    pool, method, place = own_pool(args), args.method[0], args.weights
    phrases = read_names(args.names, pool.classes) if args.names else pool.classes
    whole, *folds = own_tasks(pool, args.holdout, args.folds, args.seed)
    trials = folds or [whole]
    shown = len(trials[0].support)
    recipe = recipe_for(args.recipe, method, shot=min(5, max(1, shown // len(pool.classes))))
    if shown > AT_ONCE and not recipe.minibatch:
        recipe = replace(recipe, minibatch=MINI, steps=4 * max(recipe.steps, shown // MINI))
    job = make_job(args, backbone, tokenizer, pool, flagged(args, recipe), method, phrases)

    def fitted(tasks):
        seeds = [("fit", args.seed, k) for k in range(len(tasks))]
        what = f"fitting {method}" + f" on {len(tasks)} folds, one fit more follows" * (len(tasks) > 1)
        return trained(job, tasks, seeds, what, args.batch)
    learner = fitted(trials)
    temperature = trust(job, learner, trials) if len(trials[0].query) else None
    learner = fitted([whole]) if folds else learner
    notes = {"classes": pool.classes, "phrases": phrases, "method": method, "recipe": asdict(job.recipe),
             "weights": backbone.fingerprint, "code": own_code(method), "temperature": temperature,
             "place": os.path.abspath(place) if place and os.path.exists(place) else place,
             "size": pool.images.shape[-1]}
    save(learner.learned(), args.save, {key: json.dumps(value) for key, value in notes.items()})
    print(printable(f"saved {args.save}"))
    return 0


def trust(job: Job, learner: Learner, tasks: Sequence[Task]) -> float:
    """Print how the tasks' queries are answered, tuned and not; returns the temperature of the answers."""
    truth, classes = torch.cat([task.truth for task in tasks]), job.pool.classes     # (n,)
    frozen = Learner(job.backbone, learner.token_ids, "zero-shot", job.recipe)
    plain, logits = (torch.cat(job.logits(model, tasks)) for model in (frozen, learner))       # (n, N)
    before, after = (100 * (x.argmax(-1) == truth).double() for x in (plain, logits))
    best, folds = 100 * int(truth.bincount().max()) / len(truth), f" in {len(tasks)} folds" * (len(tasks) > 1)
    print(f"{len(truth)} pictures held out{folds}; chance, the most frequent class: {best:.2f} %")
    for name, right in (("zero-shot", before), (job.method, after)):
        interval = mean_and_interval([*right, 0, 0, 100, 100])[1]    # as if two more were right, two wrong
        print(f"{name + ':':{len(job.method) + 10}s} {right.mean():6.2f} ± {interval:.2f} %")
    gains = after - before
    gain, noise = gains.mean().item(), mean_and_interval([*gains, -100, 100])[1]
    verdict = VERDICTS[(gain > noise) - (gain < -noise)]
    print(f"difference: {gain:+.2f} ± {noise:.2f} points, picture by picture: {verdict}")
    say_confusions(classes, confusion_of(truth, logits.argmax(-1), len(classes)))
    temperature = temperature_of(logits, truth)
    off, less = (100 * calibration_error((logits / t).softmax(-1), truth) for t in (1, temperature))
    print(f"percentages are off by {off:.1f} points, {less:.1f} with temperature {temperature:.3g}, "
          "which was fitted to the same pictures")
    return temperature


def temperature_of(logits: Tensor, truth: Tensor) -> float:
    """What logits (n, N) are divided by to give the best probabilities of the truth (n,) (Guo et al. 2017).

    Labels are no surer than n pictures allow (Platt 1999), as a faultless few would make it nothing.
    """
    temperatures = torch.logspace(-2, 2, 801)
    losses = [F.cross_entropy(logits / t, truth, label_smoothing=1 / (len(truth) + 2)) for t in temperatures]
    return temperatures[torch.stack(losses).argmin()].item()


def calibration_error(probabilities: Tensor, truth: Tensor, bins: int = 10) -> float:
    """Expected calibration error, 0 to 1, of (n, N): share right against mean probability, bin by bin."""
    best, said = probabilities.double().max(-1)
    off = (best * bins).long().clamp(max=bins - 1).bincount((said == truth).double() - best)
    return (off.abs().sum() / len(truth)).item()


def confusion_of(truth: Tensor, said: Tensor, classes: int) -> Tensor:
    """How many of each class (rows) were taken for which (columns): (classes, classes) int64."""
    return (truth * classes + said).bincount(minlength=classes ** 2).view(classes, classes)


def terminal_width() -> int:
    """Columns that a row may take, as good as endless where the output is no terminal."""
    return shutil.get_terminal_size((10 ** 6, 0)).columns - 1


def clipped(text: object, width: int) -> str:
    """A text as it may be printed, filled up to a width; if it is too long its end, where names differ."""
    text = printable(text)
    return text.ljust(width) if len(text) <= width else "..." + text[3 - width:]


def say_confusions(classes: Sequence[str], confusion: Tensor) -> None:
    """A line for each class, no wider than the terminal: pictures, share known, what others passed for."""
    width = terminal_width()
    named = min(max(map(len, ("true class", *classes))), max(10, width // 3))
    print(f"{'true class':{named}s}  pictures    right  taken for"[:width])
    for label, (name, row) in enumerate(zip(classes, confusion.tolist())):
        if pictures := sum(row):
            right, row[label] = 100 * row[label] / pictures, 0
            others = sorted((-n, other) for n, other in zip(row, classes) if n)
            others = ", ".join(f"{other} {-n}" for n, other in others)
            print(f"{clipped(name, named)}  {pictures:8d} {right:6.1f} %  {printable(others)}"[:width])


# ----------------------------------------------------------------------------------------------- saved files

def read_saved(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and notes of a file that --save wrote, the notes of their kinds. Raises UsageError."""
    try:
        data.ordinary(path)
        open(path, "rb").close()           # safetensors says of all that it may not open: not there
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            stored = file.metadata() or {}
        notes = {key: json.loads(stored[key]) for key in NOTES}
        classes, phrases = notes["classes"], notes["phrases"]
        fits = [isinstance(notes[key], kind) for key, kind in NOTES.items()]
        fits += [isinstance(name, str) for name in [*classes, *phrases]]
        fits += [1 < len(set(classes)) == len(classes) == len(phrases), 0 < notes["size"] <= 4096,
                 0.01 <= (notes["temperature"] or 1) <= 100]
        if not all(fits):
            raise ValueError
        return tensors, notes
    except (OSError, RuntimeError, SafetensorError) as e:
        raise UsageError(f"cannot read {path} as a file that --save wrote: {e}") from e
    except (KeyError, TypeError, ValueError) as e:
        raise UsageError(f"{path} is not a file that --save wrote, or of another version") from e


def load_tuned(path: str | Path, backbone: CLIP, tokenizer: Tokenizer, own: Sequence[str] = ()) -> Learner:
    """What --save kept, on the weights that it was made with: a Learner with .prepare, .logits and .classes.

    .size: pixels a side that pictures are decoded to; .temperature: what logits are divided by for
    probabilities, None where they are not calibrated. own: methods that the file names, all of the user's own
    among them, as no code is run because a file says so. Raises UsageError, or DataError for what is no
    ordinary file.
    """
    tensors, notes = read_saved(path)
    method, recipe = notes["method"], notes["recipe"]
    if notes["weights"] != backbone.fingerprint:
        raise UsageError(f"{path} was fitted on the weights {notes['weights']}, these are "
                         f"{backbone.fingerprint}: give the right --weights")
    theirs = {name for name in f"{method}+{recipe.get('tune')}".split("+") if ":" in name}
    asked = {name for given in own for name in given.split("+")}
    if missing := theirs - asked:
        raise UsageError(f"{path} was fitted with {min(missing)}, a method of your own: name it by --method "
                         "so that its code may run")
    if others := asked - theirs - {*method.split("+")}:
        raise UsageError(f"{path} was fitted with {method}, not with {min(others)}")
    if notes["code"] != own_code(method):
        raise UsageError(f"{path} was fitted with other code of {method} than is there now")
    blank = extended(Recipe(), parts_of(method))
    if unknown := recipe.keys() ^ asdict(blank).keys():
        raise UsageError(f"{path} is of another version: field {min(unknown)} of its recipe")
    recipe = {key: tuple(value) if isinstance(value, list) else value for key, value in recipe.items()}
    recipe = checked(replace(blank, **recipe))
    token_ids = class_rows(tokenizer, recipe.prompt, notes["phrases"], backbone.config.context)[None]
    learner = Learner(backbone, token_ids.to(backbone.logit_scale.device), method, recipe)
    kinds = [{name: (t.shape, t.dtype) for name, t in held.items()} for held in (tensors, learner.learned())]
    if kinds[0] != kinds[1] or not all(t.isfinite().all() for t in tensors.values()):
        raise UsageError(f"{path} does not hold what {method} learns: parts are missing, not numbers, "
                         "or of another version")
    learner.load_state_dict(tensors, strict=False)
    learner.classes, learner.size, learner.temperature = notes["classes"], notes["size"], notes["temperature"]
    return learner.requires_grad_(False).eval()


# ---------------------------------------------------------------------------------------------- new pictures

def pictures_in(folder: Path, skip: Callable, seen: set[Path], endings: Counter) -> Iterator[Path]:
    """Pictures in a folder and all below, links too, each folder once; skip hears of what cannot be read.

    endings counts those of files that are not taken for pictures.
    """
    real = folder.resolve()
    if real not in seen:
        seen.add(real)
        try:
            folders, files = data.visible(folder)
        except DataError as e:
            folders, files = [], []
            skip(e)
        endings.update(os.path.splitext(name)[1] or name for name in files if not is_image_file(name))
        yield from (folder / name for name in files if is_image_file(name))
        for name in folders:
            yield from pictures_in(folder / name, skip, seen, endings)


def classified(learner: Learner, paths: Sequence[Path], skip: Callable) -> Iterator[tuple[Path, Tensor]]:
    """Pictures with their probabilities (N,); threads decode the next ones meanwhile; skip as above."""
    def attempt(path):
        try:
            return path, decode(path, learner.size)
        except DataError as e:
            skip(e)
    chunks = [paths[i: i + 64] for i in range(0, len(paths), 64)]
    with ThreadPoolExecutor() as threads:
        for found in ahead(lambda chunk: list(filter(None, threads.map(attempt, chunk))), chunks):
            if found:
                readable, images = zip(*found)
                images = learner.prepare(torch.stack(images)[None].to(learner.token_ids.device))
                logits = learner.logits(images)[0].cpu() / (learner.temperature or 1)            # (n, N)
                if not logits.isfinite().all():
                    raise UsageError("the answers are not numbers: use --precision float32")
                yield from zip(readable, logits.softmax(-1))


def say_json(path: Path, best: list[tuple[str, float]], top: int) -> None:
    """A picture and what it may be, for programs."""
    (name, p), (second, q) = best[:2]
    print(json.dumps({"picture": str(path), "class": name, "probability": p, "runner_up": second,
                      "runner_up_probability": q, "top": best[:top]}))


Answers = list[tuple[Path, str | None, str, float]]  # picture, its class folder, what was said, how surely


def say_accuracy(classes: list[str], answers: Answers, as_json: bool) -> None:
    """How many of the pictures in folders that have a class's name were right, and what others passed for."""
    known = [(classes.index(true), classes.index(said)) for _, true, said, _ in answers if true]
    if not known:
        return
    confusion = confusion_of(*torch.tensor(known).T, len(classes))
    accuracy = 100 * int(confusion.trace()) / len(known)
    if as_json:
        print(json.dumps({"accuracy": accuracy, "pictures": len(known), "classes": classes,
                          "confusion": confusion.tolist()}))
    else:
        print(f"\naccuracy {accuracy:.2f} % of {len(known)} pictures\n")
        say_confusions(classes, confusion)


def predict(args: Namespace, learner: Learner) -> int:
    """Classify pictures and folders, a line each; returns 1 when something can't be read."""
    classes, top, paths, skipped, answers = learner.classes, min(args.top, len(learner.classes)), [], [], []

    def skip(reason):
        skipped.append(reason)
        progress(f"skipped: {reason}")
    seen, endings = set(), Counter()
    for path in map(Path, args.predict[1:]):
        paths += pictures_in(path, skip, seen, endings) if path.is_dir() else [path]
    if endings:
        data.say_no_pictures(endings)
    if not paths:
        raise UsageError("no pictures to classify: name pictures or folders after the saved file")
    if not learner.temperature:
        progress("the percentages are not calibrated: --fit with --holdout or --folds does that")
    named = min(max(map(len, ("runner-up", *classes))), max(9, (terminal_width() - 16) // top - 9))
    wide = min(max(len(printable(path)) for path in paths), max(16, terminal_width() - top * (named + 9)))
    if not args.json:
        ranks = ["class", "runner-up", *(f"{rank}." for rank in range(3, top + 1))]
        print("picture".ljust(wide) + "".join(f"  {rank:{named}s}      %" for rank in ranks[:top]))
    for path, chances in data.told(classified(learner, paths, skip), len(paths), "classifying"):
        best = sorted(zip(classes, chances.tolist()), key=lambda one: -one[1])
        answers.append((path, path.parent.name if path.parent.name in classes else None, *best[0]))
        if args.json:
            say_json(path, best, top)
        else:
            said = "".join(f"  {clipped(name, named)}  {100 * p:5.1f}" for name, p in best[:top])
            print(clipped(path, wide) + said)
    say_accuracy(classes, answers, args.json)
    if args.draw and answers:
        draw_sheet(args.draw, answers, learner.size)
    return 1 if skipped else 0


def draw_sheet(target: str, answers: Answers, size: int) -> None:
    """Pictures with what was said and how surely: wrong ones first, the surest first; then the least sure."""
    def order(answer):
        _, true, said, sure = answer
        right = true in (said, None)
        return right, sure if right else -sure
    shown, side, high, across = sorted(answers, key=order)[:SHEET], 192, 236, 6          # pixels; in a row
    sheet = Image.new("RGB", (across * side, ceil(len(shown) / across) * high), "white")
    for i, (path, true, said, sure) in enumerate(shown):
        x, y = i % across * side, i // across * high
        sheet.paste(to_pil_image(decode(path, size)).resize((side - 4, side - 4)), (x, y))
        lines = f"{said} {100 * sure:.0f} %", f"truth: {true}" * bool(true), path.name
        lines = "\n".join(clipped(line, 30) for line in lines)
        lines = lines.encode("latin-1", "replace").decode("latin-1")     # Pillow's own font has these
        ImageDraw.Draw(sheet).text((x, y + side - 2), lines, "black")
    with new_file(target) as part:
        sheet.save(part)
    progress(f"drew {target}")


# ----------------------------------------------------------------------------------------------------- export

def merge(backbone: CLIP) -> None:
    """Take LoRA out of a backbone, adding each product to the weights beside it."""
    adapters = {path: module for path, module in backbone.named_modules() if isinstance(module, LoRA)}
    for path, adapter in adapters.items():
        weight = adapter.linear.weight                                                   # (out, in)
        product = adapter.scaling * adapter.B[0] @ adapter.A[0]
        adapter.linear.weight = nn.Parameter(weight + product.to(weight.dtype), requires_grad=False)
        backbone.set_submodule(path, adapter.linear)


def peft_adapter(learner: Learner) -> tuple[dict[str, Tensor], dict]:
    """LoRA alone as peft keeps it for a model of transformers: tensors and config."""
    r, (tensors, config) = learner.recipe, clip_min.hugging_face(learner.backbone)
    targets = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
    if not targets or "model_cfg" in config:
        raise UsageError("there is no LoRA for a model of transformers, which --format peft writes")
    tensors = {f"base_model.model.{path}.lora_{letter}.weight": tensors[f"{path}.{letter}"][0].contiguous()
               for path in targets for letter in "AB"}
    return tensors, {"peft_type": "LORA", "target_modules": targets, "r": r.rank, "use_rslora": True,
                     "lora_alpha": r.lora_alpha, "lora_dropout": r.dropout, "inference_mode": True}


def export(args: Namespace, learner: Learner, tokenizer: Tokenizer) -> int:
    """Write a folder for others' libraries: the model with LoRA merged, or LoRA alone; and class texts."""
    (saved, target), r, c = map(Path, args.export), learner.recipe, learner.backbone.config
    text, hook_text = learner.text()                                    # text: (1, N, embed), of unit length
    if inside := [type(part).__name__ for part in learner.parts
                  if part.vision_hook(hook_text) or type(part).enclose is not Part.enclose]:
        raise UsageError(f"{saved}: {' and '.join(inside)} acts between the blocks of a tower, as no weights "
                         "can: classify with --predict, or fit with clip-lora, svl or coop")
    if os.path.lexists(target):
        raise UsageError(f"{target} is there already: name a folder that is to be made")
    if args.format == "peft":
        prefix, (tensors, config) = "adapter_", peft_adapter(learner)
    else:
        merge(learner.backbone)
        scale = torch.tensor(r.scale / (learner.temperature or 1)).log()                 # as --predict has it
        learner.backbone.logit_scale = nn.Parameter(scale, requires_grad=False)
        tensors, config = clip_min.hugging_face(learner.backbone)
        prefix = "open_clip_" if "model_cfg" in config else ""
    whole = round(c.image * 257 / 224) if r.augment == "none" else c.image           # as `prepare` has it
    notes = {
        f"{prefix}config": config,
        "preprocessor_config": {
            "image_processor_type": "CLIPImageProcessor", "size": {"height": whole, "width": whole},
            "crop_size": {"height": c.image, "width": c.image}, "resample": 2, "image_mean": c.mean,
            "image_std": c.std},
        "classes": {"classes": learner.classes, "scale": r.scale, "temperature": learner.temperature},
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        folder = Path(place) / "whole"
        save(tensors, folder / f"{prefix}model.safetensors", {"format": "pt"})
        save({"embeddings": text[0].contiguous()}, folder / "classes.safetensors", {})
        for name, content in notes.items():
            (folder / f"{name}.json").write_text(json.dumps(content, indent=1))
        if not prefix and c.family == "clip":                    # the others' libraries bring theirs
            (folder / "vocab.json").write_text(json.dumps(tokenizer.id))
            (folder / "merges.txt").write_text(f"#version: 0.2\n{tokenizer.metadata['merges']}\n")
        os.replace(folder, target)
    print(printable(f"wrote {target}"))
    return 0


# ------------------------------------------------------------------------------------------------ look inside

Seen = tuple[Probe, Tensor, Tensor]      # of a learner: its tokens, picture features (E, Q, embed) and texts


@torch.no_grad()
def look(args: Namespace, job: Job, dataset: str, shot: int) -> None:
    """Train the first tasks, four or fewer, once more; --probe and --draw show what changed inside."""
    numbers = range(min(4, args.batch or 4, args.episodes or 4))
    tasks = [task_of(args, job.pool, shot, n) for n in numbers]
    with torch.enable_grad():
        seeds = [(args.seed, n) for n in numbers]
        tuned = trained(job, tasks, seeds, "training once more to look inside")
    images = tuned.prepare(job.pictures(torch.stack([task.query for task in tasks])))
    images, seen = images.expand(len(tasks), -1, -1, -1, -1), []
    for learner in (Learner(job.backbone, tuned.token_ids, "zero-shot", job.recipe), tuned):
        text, hook_text = learner.text()
        probe = Probe(hook_text, job.backbone.visual, job.recipe)
        seen.append((probe, learner.features(images, learner.hook(hook_text, probe)), text))
    if args.probe:
        rows, whole = changes(tuned, tasks, *seen)
        lines = [json.dumps(row).replace("NaN", "null") + "\n" for row in [*rows, whole]]    # JSON has no NaN
        name = f"{called(dataset)}-{shot}shot-{OWN_FILE.sub('', job.method)}-{args.recipe}.probe.jsonl"
        with new_file(Path(args.out, name)) as part:
            part.write_text("".join(lines))
        print(probe_table(rows, whole, len(tasks)))
    if args.draw:
        draw_first(args, job, tasks[0], *seen)


def changes(tuned: Learner, tasks: Sequence[Task], *seen: Seen) -> tuple[list[dict], dict]:
    """What tuning changed: a row a block, and what is told of the features."""
    probes, features, texts = zip(*seen)
    rows, whole = compare(*probes), {"cka_features": linear_cka(*features).mean().item()}
    for row in rows:
        for part in tuned.parts:
            row |= part.report(row["block"])
    for when, pictures, text in zip(("before", "after"), features, texts):
        shifts = [gap_shift(x, y, task.truth.to(x.device), tuned.recipe.scale)
                  for x, y, task in zip(pictures, text, tasks)]
        whole[f"modality_gap_{when}"] = modality_gap(pictures, text).mean().item()
        whole[f"gap_shift_{when}"] = sum(shifts).item() / len(tasks)
    return rows, whole


def draw_first(args: Namespace, job: Job, task: Task, *seen: Seen) -> None:
    """Draw a query a class of the first task with its head and tail patches, and what it passed for."""
    c, truth = job.backbone.config, task.truth.tolist()
    before, after = ((features[0] @ text[0].T).argmax(-1).tolist() for _, features, text in seen)
    names = [job.pool.classes[label].replace("_", " ") for label in task.classes]
    order = sorted(range(len(truth)), key=lambda i: before[i] == after[i])           # changed ones first
    some = [next(i for i in order if truth[i] == label) for label in sorted({*truth})]
    said = [f"{names[truth[i]]}: zero-shot says {names[before[i]]}, tuned {names[after[i]]}" for i in some]
    block = job.recipe.alpha_block * c.vision_layers // 12 if args.draw_block is None else args.draw_block
    masks = [probe.masks[block][some] for probe, _, _ in seen]
    with new_file(args.draw) as part:
        draw_patches(str(part), job.pool.images[task.query[some]], masks,
                     side=c.image // c.patch, said=said, titles=["picture", "zero-shot", "tuned"])
    print(f"drew {args.draw}")


# ----------------------------------------------------------------------------------------------- command line

TOY_CLIP = Path(__file__).resolve().parent / "tests" / "toy_clip.safetensors"
TABLE = "zero-shot clip-lora atha tir svl".split()
USES = "dataset fit predict export".split()         # of the program: each is asked for by a flag of its name
# Initials of the uses that read a flag, its name, its value as the help shows it, its default, its help
FLAGS = f"""
d     dataset     NAME ...    -  {', '.join(DATASETS)}, all (the papers' four), all-fsl (the eleven few-shot \
sets), toy, or a folder of class folders
d     shot        N ...       -  labelled pictures a class (default 1)
dfpe  method      NAME ...    -  {', '.join(METHODS)}; FILE.py:NAME, your own; some joined with +; \
or all: {', '.join(TABLE)} (default atha, with --fit clip-lora)
df    recipe      {'|'.join(RECIPES)}|released  -  released: the trainer that the method came \
with (default paper; with --split clip-lora-fsl)
d     split       -           -  all classes at once and the whole test split, by seeds, not episodes
d     episodes    N           -  default 800 at 1 shot, 400 otherwise, 100 on toy, 3 with --split
d     way         N           5  classes an episode (default 5)
d     query       N          15  query pictures a class (default 15)
df    seed        NUMBER       1  draws the tasks and all chance in them (default 1)
d     data        DIR         datasets  where the datasets are (default datasets)
dfpe  weights     PLACE       -  a file or folder of weights, or hf-hub:org/name (default ViT-B/16, \
downloaded once; toy has its own)
d     out         DIR         results  results, from which a rerun goes on (default results)
dfpe  device      NAME        {"cuda" if torch.cuda.is_available() else "cpu"}  cpu, cuda, cuda:N, or, \
untried, mps (default cuda where there is one)
dfpe  precision   float32|bfloat16  -  of the frozen weights and the arithmetic (default bfloat16 on CUDA, \
and on a CPU for a backbone 512 wide or wider if a short trial is faster; else float32)
df    batch       N           -  episodes at once; with --fit: pictures (default by free memory)
df    compile     -           -  torch.compile the vision tower's blocks
d     probe       -           -  after a run, a table of what changed inside, by block
dp    draw        FILE.png    -  after a run, a picture of head and tail patches; with --predict, a sheet of \
pictures, wrong ones first
d     draw_block  NUMBER       -  the block to draw (default where ATHA pulls first)
f     fit         FOLDER      -  fine-tune once on a folder of class folders
f     save        FILE        -  where --fit keeps what it learned
f     holdout     NUMBER       0  pictures a class that --fit is tested on, not fitted to
f     folds       NUMBER       0  before --fit, cross-validate: what to expect of it
f     names       FILE.json   -  folder name -> phrase for the prompt
p     predict     FILE ...    -  a saved file, then pictures or folders to classify
p     json        -           -  --predict prints JSON lines
p     top         N           2  classes that --predict names (default 2)
e     export      FILE ...    -  a saved file, then the folder to make of it for other libraries
e     format      hugging-face|peft  hugging-face  of --export: the whole model, or LoRA alone (default \
hugging-face)
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:                       # one line, not the usage of fifty flags too
        raise UsageError(message.removeprefix("argument "))


def counting(least: int) -> Callable:
    """The type of a flag whose value is a whole number, `least` or more."""
    def number(text):
        if not least <= int(text) < 2 ** 31:
            raise argparse.ArgumentTypeError(f"must be from {least} to 2^31 - 1")
        return int(text)
    return number


def nonempty(text: str) -> str:
    """The type of a flag whose value is a name."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return text


VALUES = {"N": counting(1), "NUMBER": counting(0), "INT": int, "X": float, "TEXT": str}    # others are names


def add_flag(group, name: str, value: str, default: str, text: str) -> None:
    """A flag of the command line as a row of FLAGS has it; value -: --name and --no-name; default -: None."""
    kind = value.removesuffix(" ...")
    convert = VALUES.get(kind, nonempty)
    how = {"metavar": kind, "type": convert, "nargs": "+" if kind != value else None}
    if "|" in value:
        how = {"choices": value.split("|")}
    if value == "-":
        how = {"action": argparse.BooleanOptionalAction}
    default = None if default == "-" else convert(default)
    group.add_argument(f"--{name.replace('_', '-')}", default=default, help=text, **how)


def add_fields(parser: Parser, recipe: Recipe) -> None:
    """A flag for every field of a recipe, grouped as the parts are."""
    groups, values = {}, {bool: "-", int: "INT", float: "X", str: "TEXT", tuple: "INT ..."}
    for f in fields(recipe):
        whose = "defaults are the paper's" if hasattr(Recipe, f.name) else "a method of your own"
        title = f"recipe of {', '.join(f.metadata['groups'])} ({whose})"
        group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        value = "|".join(f.metadata["choices"]) or values[type(f.default)]
        add_flag(group, f.name, value, "-", f"{f.metadata['help']} ({str(f.default).strip('()')})")


def flagged(args: Namespace, recipe: Recipe) -> Recipe:
    """The recipe with what was given on the command line."""
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in vars(args).items()
             if hasattr(recipe, name) and x is not None}
    return checked(replace(recipe, **given))


USAGE = """train.py --dataset NAME [--shot N] [--method NAME] [options]
       train.py --fit FOLDER --save FILE [options]
       train.py --predict FILE PICTURE_OR_FOLDER ..."""


def parser_for(use: str, method: Sequence[str] = ()) -> Parser:
    """Of the flags that a use of the program reads, or of all; method: whose fields are flags as well."""
    parser = Parser(prog="train.py", usage=USAGE, description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for initials, *flag in (re.split("  +", line, maxsplit=4) for line in FLAGS.strip().splitlines()):
        parser.set_defaults(**{flag[0]: None})
        if use[:1] in initials:
            add_flag(parser, *flag)
    if use[:1] in "df":
        own = [own_part(name) for name in "+".join(method).split("+") if ":" in name]
        with data.refusing(f"--method {' '.join(method)}: its fields cannot be flags", Exception):
            add_fields(parser, extended(Recipe(), own))
    return parser


def parse(argv: list[str]) -> Namespace:
    """The command line, with what follows from it filled in. Raises UsageError for what cannot be meant."""
    words = [word.partition("=")[0] for word in argv]
    use = next((use for use in USES if f"--{use}" in words), "")         # none: all flags, for their help
    asked = [word for word in argv if word not in ("-h", "--help")]
    method = parser_for(use).parse_known_args(asked)[0].method or ()
    args, others = parser_for(use, method).parse_known_args(argv)
    if not use:
        raise UsageError(f"give one of --{', --'.join(USES)}; --help tells more")
    if others:
        flags = parser_for("")._option_string_actions
        meant = get_close_matches(others[0], flags, n=1) if others[0] not in flags else []
        hint = "".join(f"; is {flag} meant?" for flag in meant)
        raise UsageError(f"--{use} does not take {others[0]}{hint}")
    sets, usual = {"all": data.PAPERS, "all-fsl": data.FSL}, {"dataset": ["atha"], "fit": ["clip-lora"]}
    args.dataset = [name for given in args.dataset or () for name in sets.get(given, [given])]
    if {*args.dataset} == {"toy"}:
        usual["dataset"] = ["zero-shot", "atha"]
    args.method = [name for given in args.method or usual.get(use, [])
                   for name in (TABLE if given == "all" else [given])]
    args.shot = args.shot or [1]
    args.recipe = args.recipe or ("clip-lora-fsl" if args.split else "paper")
    args.task = "seed" if args.split else "episode"
    check(args)
    return args


def check(args: Namespace) -> None:
    """Refuse what cannot be meant."""
    pictures = len(args.dataset) * len(args.shot) * len({*args.method} - {"zero-shot"})
    target = Path(os.path.realpath(args.save or args.draw or ""))
    read = filter(None, [args.weights, args.names, *filter(os.path.isfile, args.predict or ())])
    wrong = {
        "--folds is a number from 2 up, and takes the place of --holdout":
            args.folds == 1 or args.folds and args.holdout,
        "--split takes all classes and the whole test split, so neither --way nor --query":
            args.split and (args.way, args.query) != (5, 15),
        "--fit needs --save FILE": args.fit and not args.save,
        "--fit takes one method": args.fit and len(args.method) > 1,
        "--draw makes one picture: give one dataset, one shot and one method":
            args.draw and args.dataset and pictures != 1,
        "--draw-block goes with --draw": args.draw_block is not None and not args.draw,
        "--draw takes a name such as look.png":
            args.draw and Path(args.draw).suffix.lower() not in IMG_EXTENSIONS,
        "--save takes a name such as leaf.safetensors":
            args.save and Path(args.save).suffix.lower() in IMG_EXTENSIONS,
        f"cannot write {target}: it is read here, and would be lost":
            target.is_file() and any(target.is_relative_to(os.path.realpath(one)) for one in read),
        "--export takes a saved file and the folder to make": args.export and len(args.export) != 2,
    }
    for message in filter(wrong.get, wrong):
        raise UsageError(message)
    for method in args.method:
        parts_of(method)


def device_of(name: str) -> torch.device:
    """The device of this name, if it works. Raises UsageError."""
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        number = torch.zeros(1, device=name)
        number.item()                                            # a device without numbers (meta) is none
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        first = re.split(r"\. |\n", str(e))[0]                   # torch goes on with all that it can do
        raise UsageError(f"--device {name} cannot be used: {first}") from e
    return number.device


def weights_of(args: Namespace) -> str | Path | None:
    """Where the weights are: as asked, or where the saved file remembers them; None for ViT-B/16."""
    saved = args.predict or args.export
    if args.weights or not saved:
        return args.weights or (TOY_CLIP if args.dataset == ["toy"] else None)
    weights = read_saved(saved[0])[1]["place"]
    if weights and not os.path.exists(weights):                  # nothing is fetched because a file says so
        raise UsageError(f"{saved[0]} was fitted on the weights {weights}, which are not there: "
                         "give --weights")
    return weights


def begin(args: Namespace) -> tuple[CLIP, Tokenizer]:
    """The weights on their device; what can be refused before the work is refused here. Raises UsageError."""
    device = device_of(args.device)
    if args.fit and not Path(args.fit).is_dir():                 # a slip should not cost a download
        raise UsageError(f"--fit {args.fit}: there is no such folder")
    for dataset in args.dataset:
        data.check(dataset, args.data, split=args.split)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(data.CACHE / "compiled"))       # not /tmp
    args.compile = bool(args.compile and compile_works(device))
    torch.backends.cudnn.allow_tf32 = False                      # float32 means float32
    torch.set_flush_denormal(True)         # gradients below 1e-38 are 0: CPUs compute with them far slower
    backbone, tokenizer = clip_min.load(weights_of(args), device)
    width, usual = backbone.config.vision_width, "float32"
    if device.type == "cuda" and not args.export:
        usual = "bfloat16"
    if device.type == "cpu" and width >= 512:                    # small matrices gain little
        multiply_fast()
        usual = usual if args.precision or args.export else faster_precision(width)
    args.precision = gathered(args.precision or usual)[0]        # results are of one: the first process's
    backbone.to(getattr(torch, args.precision))
    for target in filter(None, (args.save, args.draw)):
        check_writable(target)
    if (args.draw_block or 0) >= backbone.config.vision_layers:
        raise UsageError(f"--draw-block takes 0 to {backbone.config.vision_layers - 1}")
    return backbone, tokenizer


def run(args: Namespace) -> int:
    """What was asked for; returns the exit code."""
    backbone, tokenizer = begin(args)
    if args.fit:
        return fit(args, backbone, tokenizer)
    if saved := args.predict or args.export:
        learner = load_tuned(saved[0], backbone, tokenizer, own=args.method)
        return predict(args, learner) if args.predict else export(args, learner, tokenizer)
    cells, first = {}, rank_and_size()[0] == 0
    family = "" if args.split or args.way != 5 else backbone.config.family           # whose figures compare
    for dataset in args.dataset:
        pool = data.load(dataset, args.data)
        for shot, method in product(args.shot, args.method):
            recipe, begun = recipe_for(args.recipe, method, shot, dataset), time.monotonic()
            if args.split and pool.prompt:
                recipe = replace(recipe, prompt=pool.prompt)
            job = make_job(args, backbone, tokenizer, pool, flagged(args, recipe), method)
            found = cells[method, shot, dataset] = run_job(args, job, dataset, shot)
            if first:
                kind = "all classes" if args.split else f"{args.way}-way"
                line = f"{dataset} {kind} {shot}-shot {method} ({args.recipe}): {in_short(found.values())} % "
                paper = paper_figure(method, shot, dataset, family).replace("(", "(paper: ")
                took = time.monotonic() - begun
                print(printable(f"{line}over {len(found)} {args.task}s, {took:.0f} s{paper}"), flush=True)
            if first and (args.probe or args.draw) and method != "zero-shot":
                look(args, job, dataset, shot)
    if first and len(cells) > 1:
        print(markdown(cells, family, args.recipe))
    return 0


def multiply_fast() -> None:
    """Multiply float32 matrices in the faster of two exact ways: on AMD's CPUs oneDNN is twice MKL's speed.

    Its switch is named for bfloat16, and on CPUs with matrix units it does round: there it is set back.
    """
    torch.set_float32_matmul_precision("medium")
    a, b = torch.randn(2, 512, 512, generator=generator("multiply"))
    exact = a.double() @ b.double()
    if (a @ b - exact).norm() > 1e-6 * exact.norm():
        torch.set_float32_matmul_precision("highest")


def faster_precision(width: int) -> str:
    """bfloat16 if this CPU multiplies matrices of a width well faster in it, else float32; says which.

    One thread, the best of many tries in turns: what else the machine does must not decide, as results of
    two precisions are not mixed.
    """
    a, b = torch.ones(128, width), torch.ones(width, width)
    best, threads = {torch.float32: float("inf"), torch.bfloat16: float("inf")}, torch.get_num_threads()
    torch.set_num_threads(1)
    for dtype in [*best] * 20:
        x, y = a.to(dtype), b.to(dtype)
        begun = time.perf_counter()
        x @ y
        best[dtype] = min(best[dtype], time.perf_counter() - begun)
    torch.set_num_threads(threads)
    share = best[torch.bfloat16] / best[torch.float32]
    precision = "bfloat16" if share < 0.75 else "float32"
    if rank_and_size()[0] == 0:
        progress(f"in {precision}: products in bfloat16 take {share:.2f} of float32's time here; "
                 "--precision decides")
    return precision


def compile_works(device: torch.device) -> bool:
    """Whether torch.compile has all that it needs here; says so if not."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
        return True
    except Exception as e:                                   # whatever is missing here, plain PyTorch goes on
        progress(f"--compile does not work here ({str(e).split(chr(10))[0]}): going on without")
        return False


def in_one_line(error: Exception, methods: Sequence[str]) -> str | None:
    """What went wrong, for the user; None where that is a fault of ours. methods: whose code may have run."""
    if isinstance(error, (UsageError, clip_min.WeightsError, DataError, OSError)):
        return str(error)
    if isinstance(error, (RuntimeError, MemoryError)) and MEMORY.search(repr(error)):
        return "out of memory"
    own = [name.rpartition(":")[0] for name in "+".join(methods).split("+") if ":" in name]
    if not own:
        return None
    frames = traceback.extract_tb(error.__traceback__)
    at = next((frame for frame in reversed(frames) if frame.filename in own), frames[-1])
    where = f"{os.path.basename(at.filename)}, line {at.lineno}, in {at.name}"
    return f"--method {' '.join(methods)}: {where}: {type(error).__name__}: {' '.join(str(error).split())}"


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 2 for a request that cannot be met, said in one line."""
    argv = sys.argv[1:] if argv is None else argv
    args = Namespace(method=[])
    try:
        args = parse(argv)
        join_others()
        return run(args)
    except BrokenPipeError:                                      # ... | head
        return 1
    except Exception as e:
        said = in_one_line(e, args.method)
        if not said:
            raise
        progress(f"train.py: error: {said}")
        return 2
    except KeyboardInterrupt:
        kept = "what is finished is kept, and the same command goes on from there"
        progress(f"stopped; {kept if '--dataset' in ' '.join(argv) else 'nothing was saved'}")
        return 130
    finally:
        if rank_and_size()[1] > 1:
            torch.distributed.destroy_process_group()                # a process that ends last would abort


def command_line() -> None:
    """`main` as a process: a polite request to end is Ctrl-C, and nobody listening any more is no error."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stdout:                                               # stderr does so by itself
        sys.stdout.reconfigure(errors="backslashreplace")        # a file's name need not be text
    code = main()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:                                          # full or closed: Python would try again
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


if __name__ == "__main__":
    command_line()
