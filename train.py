"""Few-shot adaptation of CLIP to far-away domains: ATHA, TIR, SVL + RA on CLIP-LoRA.

  python train.py --dataset toy --shot 1          no download, no GPU, a minute or two on two cores
  python train.py --dataset eurosat --shot 1      the real thing: ATHA, 800 episodes, everything fetched at need
  python train.py --dataset all --shot 1 5 --method all          the papers' tables
  python train.py --fit FOLDER --save mine.safetensors           your own pictures
  python train.py --predict mine.safetensors PICTURES
  python train.py --help                          everything else

In a program, `adapt` is the whole of training in one function.
"""
from __future__ import annotations

import argparse, copy, fcntl, gc, glob, json, os, sys, tempfile, time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.datasets.folder import IMG_EXTENSIONS

import clip_min
import data
from atha import (ATHA, Between, LoRA, Probe, add_lora, compare, draw_patches, gap_shift, linear_cka, modality_gap, per_image,
                  probe_table, ra_loss, svl_loss, text_to_tokens, tir_step)
from clip_min import CLIP, Tokenizer, save
from data import DATASETS, DataError, Pool, decode, generator, plain, support_batches


class UsageError(Exception):
    """A request that cannot be met; the message is one line for the user."""


# -------------------------------------------------------------------------------------------- methods and recipes

METHODS = {    # what each switches on
    "zero-shot": set(), "clip-lora": {"lora"},
    "atha": {"lora", "pull", "push"}, "atha-pull": {"lora", "pull"}, "atha-push": {"lora", "push"},
    "tir": {"lora", "inhibit", "enhance"}, "tir-inhibit": {"lora", "inhibit"}, "tir-enhance": {"lora", "enhance"},
    "svl": {"lora", "svl", "ra"}, "svl-only": {"lora", "svl"}, "ra-only": {"lora", "ra"},
}


def switches(method: str) -> set[str]:
    """What a method, or several joined with +, switches on. Raises UsageError."""
    parts = method.split("+")
    for part in parts:
        if part not in METHODS or (part == "zero-shot" and len(parts) > 1):
            raise UsageError(f"unknown method {method!r}: choose from {', '.join(METHODS)}, or join some with +")
    return set().union(*(METHODS[part] for part in parts))


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter; the defaults are the papers'. Block numbers are given for towers of 12 blocks."""
    steps: int = option(100, "training steps of an episode")
    scale: float = option(100.0, "logits are this times the cosine")
    lr: float = option(2e-4, "learning rate of LoRA's AdamW")
    weight_decay: float = option(1e-2, "weight decay of AdamW")
    cosine: bool = option(False, "cosine schedule towards 1e-6 over 8 x steps")
    augment: str = option("crop", "support pictures: none (257 -> 224 centre crop), crop (random crop and flip), views (five fixed views)")
    minibatch: int = option(0, "pictures a step, shuffled; 0: all of them")
    prompt: str = option("a photo of a {}.", "text of a class, {} is its name")
    rank: int = option(16, "rank of LoRA")
    lora_alpha: float = option(8.0, "LoRA is scaled by lora-alpha / sqrt(rank)")
    dropout: float = option(0.25, "dropout on LoRA's input")
    text_lora: bool = option(False, "LoRA in the text tower too")
    context: int = option(0, "learned CoOp context vectors in place of the prompt's first tokens")
    context_lr: float = option(2e-3, "learning rate of the context's SGD")
    text_block: int = option(-1, "text block whose output gives the tokens their class texts; -1: the last")
    text_to_tokens: str = option("paper", "class texts to token space by the paper's or the released formula")
    rho: float = option(0.1, "ATHA: share of head tokens")
    gamma: float = option(0.1, "ATHA: share of tail tokens")
    alpha: float = option(0.8, "ATHA: first pull, at alpha-block alone")
    alpha_block: int = option(8, "ATHA: block whose pull starts at alpha")
    beta: float = option(0.01, "ATHA: first push, at every block")
    token_lr: float = option(1e-3, "ATHA: learning rate of alpha and beta")
    copy_cls: bool = option(False, "ATHA: before every block a copy of [CLS] joins the tokens")
    sgd: bool = option(False, "ATHA: alpha and beta by SGD, not AdamW")
    tir_blocks: tuple[int, ...] = option((8, 10), "TIR: blocks before which tokens are weighed")
    tir_top: float = option(0.3, "TIR: share of tokens that a class marks")
    svl_weight: float = option(0.1, "SVL: weight of its loss")
    ra_weight: float = option(3.0, "RA: weight of its loss")
    ra: str = option("paper", "RA: the paper's or the released formula")
    extra_share: float = option(0.6, "SVL and RA act in this first share of the steps")


_released_atha = Recipe(scale=2.0, augment="none", text_lora=True, context=4, text_block=10, text_to_tokens="released",
                        rho=0.3, gamma=0.2, alpha_block=6, beta=0.0, copy_cls=True, sgd=True, ra="released")
RECIPES = {    # at 1 shot; recipe_for knows what depends on the shot
    "paper": Recipe(),
    "released-atha": _released_atha,
    "released-svl": replace(_released_atha, scale=100.0, augment="views", text_lora=False, context=0, steps=250, cosine=True),
}


def recipe_for(name: str, method: str, shot: int = 1, dataset: str = "") -> Recipe:
    """The recipe as it stands for a method, a shot and a dataset; `released` is the trainer that the method came with."""
    if name == "released":
        name = "released-svl" if method.startswith(("svl", "ra-")) else "released-atha"
    recipe = RECIPES[name]
    if name == "released-atha" and shot > 1:
        recipe = replace(recipe, scale=4.0)
    if name == "released-svl" and switches(method) <= {"lora"}:          # that trainer's own baseline: 250 steps whatever the shot
        recipe = replace(recipe, minibatch=25)
    elif name == "released-svl":
        recipe = replace(recipe, steps=recipe.steps * shot // (2 if dataset == "chestx" else 1))
    return recipe


# ----------------------------------------------------------------------------------------------------- adaptation

def share_weights(clip: CLIP) -> CLIP:
    """A second CLIP over the same, frozen, tensors: what is wrapped or learned in it leaves the first alone."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in clip.parameters()}
    return copy.deepcopy(clip, memo)                                     # takes what is in memo as copied; detach shares the numbers


def at_depth(block: int, layers: int) -> int:
    """A block number given for 12 blocks, in a tower of `layers`."""
    return block * layers // 12


class Learner(nn.Module):
    """CLIP with what E episodes learn: adapters, ATHA's alpha and beta, the context. token_ids (E, N, context)."""

    def __init__(self, clip: CLIP, token_ids: Tensor, method: str, recipe: Recipe):
        super().__init__()
        self.on, self.recipe, self.clip = switches(method), recipe, share_weights(clip)
        self.token_ids = token_ids[..., : int(token_ids.argmax(-1).max()) + 1]       # the text tower is causal: nothing after the end counts
        episodes, device = len(token_ids), token_ids.device
        vision, text, layers = self.clip.visual, self.clip.transformer, clip.config.vision_layers
        self.context = self.atha = self.inverse = None
        if "lora" in self.on:
            for tower in (vision, text) if recipe.text_lora else (vision,):
                add_lora(tower, recipe.rank, recipe.lora_alpha, recipe.dropout, episodes)
            if recipe.context:
                replaced = self.token_ids[:, :, 1: 1 + recipe.context]
                if replaced.shape[-1] < recipe.context or (replaced != replaced[:, :1]).any():
                    raise UsageError(f"the {recipe.context} context vectors would replace class names: give a --prompt with as many tokens before {{}}, or --context 0")
                context = clip.token_embedding(self.token_ids[:, 0, 1: 1 + recipe.context]).float()
                self.context = nn.Parameter(context.detach().clone())                # (E, context, D)
        if self.on & {"pull", "push"}:
            self.atha = ATHA(layers, episodes, recipe.alpha, at_depth(recipe.alpha_block, layers), recipe.beta,
                             recipe.rho, recipe.gamma, "pull" in self.on, "push" in self.on, recipe.copy_cls).to(device)
            if recipe.text_to_tokens == "released":
                self.inverse = torch.linalg.pinv(vision.proj.float()).to(vision.proj.dtype)
        self.losses = torch.zeros(0, episodes)

    def lora(self) -> dict[str, LoRA]:
        return {name: module for name, module in self.clip.named_modules() if isinstance(module, LoRA)}

    def learned(self) -> dict[str, Tensor]:
        """What training changed, by name."""
        return {name: t for name, t in self.state_dict().items() if name.endswith((".A", ".B")) or name.startswith(("atha.", "context"))}

    def texts(self) -> tuple[Tensor, Tensor]:
        """Class texts (E, N, embed), not normalised: for the logits, and for the tokens (of text_block)."""
        ids, outputs = self.token_ids.flatten(0, 1), {}                              # (E*N, T)

        def between(x: Tensor, layer: int) -> Tensor:                                # x: (E*N, T, D)
            if layer == 0 and self.context is not None:
                n = self.context.shape[1]
                context = per_image(self.context, len(x)) + self.clip.positional_embedding[1: 1 + n]
                x = torch.cat([x[:, :1], context.to(x.dtype), x[:, 1 + n:]], 1)
            outputs[layer - 1] = x                                                   # of the block before; none comes after the last
            return x
        final = self.clip.encode_text(ids, between)
        block = at_depth(self.recipe.text_block, self.clip.config.text_layers)
        early = self.clip.read_text(outputs[block], ids) if 0 <= block and block in outputs else final
        return final.unflatten(0, self.token_ids.shape[:2]), early.unflatten(0, self.token_ids.shape[:2])

    def between(self, token_texts: Tensor) -> Between:
        """The methods' hook for class texts (E, N, embed)."""
        r, vision, hooks = self.recipe, self.clip.visual, []
        if self.atha is not None:
            hooks.append(self.atha.between(text_to_tokens(token_texts, vision.proj, vision.ln_post, r.text_to_tokens, self.inverse)))
        if self.on & {"inhibit", "enhance"}:
            blocks = {at_depth(block, self.clip.config.vision_layers) for block in r.tir_blocks}
            hooks.append(lambda tokens, layer: tokens if layer not in blocks else tir_step(
                tokens, token_texts, vision.ln_post, vision.proj, r.tir_top, "inhibit" in self.on, "enhance" in self.on))

        def between(tokens: Tensor, layer: int) -> Tensor:
            for hook in hooks:
                tokens = hook(tokens, layer)
            return tokens
        return between

    def features(self, images: Tensor, between: Between, chunk: int = 0) -> Tensor:
        """(E, B, 3, S, S) -> unit features (E, B, embed) float32; at most `chunk` images an episode are kept for backward."""
        def encode(part: Tensor) -> Tensor:
            return self.clip.visual(part.flatten(0, 1), between).unflatten(0, part.shape[:2])
        if chunk and chunk < images.shape[1]:
            return F.normalize(torch.cat([checkpoint(encode, p, use_reentrant=False) for p in images.split(chunk, 1)], 1).float(), dim=-1)
        return F.normalize(encode(images).float(), dim=-1)

    @torch.no_grad()
    def logits(self, images: Tensor, chunk: int = 25) -> Tensor:
        """(E, Q, 3, S, S) normalised -> (E, Q, N) float32, scale times the cosine."""
        self.eval()
        final, token_texts = self.texts()
        between = self.between(token_texts)
        features = torch.cat([self.features(part, between) for part in images.split(chunk, 1)], 1)
        return self.recipe.scale * features @ F.normalize(final.float(), dim=-1).mT


def adapt(clip: CLIP, support: Tensor, labels: Tensor, token_ids: Tensor, method: str = "atha", recipe: Recipe | str = "paper", *,
          batches: Callable[[int], tuple[Tensor, Tensor]] | None = None, seeds: Sequence[object] | None = None,
          lora_A: dict[str, Tensor] | None = None, picks: Tensor | None = None, chunk: int = 0, compile: bool = False) -> Learner:
    """Fine-tune E episodes in one batch, each as it would be alone but for dropout's masks; clip itself is left as it was.

    support (E, M, 3, S, S) normalised, labels (E, M), token_ids (E, N, context) -> Learner with .losses (steps, E) and .logits.
    batches(step): the step's pictures (E, B, 3, S, S) and labels (E, B), the same whenever asked, default the support set.
    Chance: seeds (one an episode) draw LoRA's first A and SVL's picks; or give lora_A {module name: (rank, in) or
    (E, rank, in)} and picks (steps, N) or (steps, E, N), rows of the step's pictures. Dropout uses torch's own generator.
    chunk: pictures an episode held for backward at once, 0 for all; the result is that of the full batch.
    """
    recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
    learner = Learner(clip, token_ids, method, recipe)
    episodes, ways, device = len(support), token_ids.shape[1], support.device
    if not learner.on:
        return learner
    if recipe.minibatch and "ra" in learner.on:
        raise UsageError("--minibatch does not go with RA, which compares each step's pictures with those of the step before")
    adapters = learner.lora()
    generators = [generator("learner", seed) for seed in (range(episodes) if seeds is None else seeds)]
    with torch.no_grad():
        for name, adapter in adapters.items():
            bound = adapter.A.shape[-1] ** -0.5
            drawn = lora_A[name] if lora_A else torch.stack([torch.empty(adapter.A.shape[1:]).uniform_(-bound, bound, generator=g) for g in generators])
            adapter.A.copy_(drawn.expand_as(adapter.A))
    batches = batches or (lambda step: (support, labels))
    rows = batches(0)[0].shape[1]
    if picks is None:
        picks = torch.stack([torch.randint(rows, (recipe.steps, ways), generator=g) for g in generators], 1)
    picks = (picks[:, None] if picks.dim() == 2 else picks).expand(-1, episodes, -1).to(device)   # (steps, E, N)
    if compile:
        for block in learner.clip.visual.transformer.resblocks:                      # one graph serves all blocks
            block.compile()

    lora_parameters = [p for adapter in adapters.values() for p in (adapter.A, adapter.B)]
    token_group = {"params": [p for p in (learner.atha.parameters() if learner.atha else ()) if p.requires_grad], "lr": recipe.token_lr}
    context_group = {"params": [p for p in (learner.context,) if p is not None], "lr": recipe.context_lr}
    adamw = torch.optim.AdamW([{"params": lora_parameters}, *([] if recipe.sgd else [token_group])], lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    # momentum and decay are the released trainer's, for the context and (recipe.sgd) alpha and beta
    sgd = torch.optim.SGD([context_group, *([token_group] if recipe.sgd else [])], lr=recipe.token_lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 8 * recipe.steps, 1e-6) if recipe.cosine else None

    learner.train()
    text_learns, texts = bool(recipe.text_lora or recipe.context), None
    losses, relation, extra_steps = [], None, recipe.extra_share * recipe.steps
    each = torch.arange(episodes, device=device)[:, None, None]
    for step in range(recipe.steps):
        images, wanted = batches(step)
        if text_learns or texts is None:
            with torch.set_grad_enabled(text_learns):
                final, token_texts = learner.texts()
                texts = F.normalize(final.float(), dim=-1)                           # (E, N, embed)
        extra = learner.on & {"svl", "ra"} if step < extra_steps else set()
        inputs = torch.cat([images, support], 1) if "ra" in extra else images
        features = learner.features(inputs, learner.between(token_texts), chunk)     # (E, B [+ M], embed)
        features, unchanged = features[:, : images.shape[1]], features[:, images.shape[1]:]
        logits = recipe.scale * features @ texts.mT                                  # (E, B, N)
        loss = F.cross_entropy(logits.mT, wanted, reduction="none").mean(1)          # (E,)
        if "svl" in extra:
            loss = loss + recipe.svl_weight * svl_loss(features, wanted, picks[step], recipe.scale)
        if "ra" in extra:
            previous, relation = relation, features @ unchanged.mT                   # (E, B, M)
            if previous is not None:
                c = 1 - step / extra_steps
                of_class = (texts @ texts.mT).detach()                               # (E, N, N)
                of_text = of_class[each, wanted[..., None], labels[:, None]]         # (E, B, M)
                loss = loss + recipe.ra_weight * ra_loss(relation, c * previous.detach() + (1 - c) * of_text, recipe.ra)
        loss.sum().backward()
        for optimizer in (adamw, sgd):
            optimizer.step()
            optimizer.zero_grad()
        if schedule:
            schedule.step()
        losses.append(loss.detach())
    learner.losses = torch.stack(losses)
    return learner.requires_grad_(False)


# -------------------------------------------------------------------------------------------------------- results

PAPER = {    # (method, shot) -> reported accuracies, %: isic, eurosat, cropdiseases, chestx, mean; one row a paper
    ("clip-lora", 1): [(35.23, 81.41, 85.32, 21.73, 55.92), (36.40, 81.72, 84.62, 21.86, 56.07)],
    ("clip-lora", 5): [(51.10, 92.52, 96.21, 24.13, 65.99)],
    ("atha", 1): [(38.86, 82.56, 87.99, 24.00, 58.35)],
    ("tir", 1): [(39.38, 82.53, 86.91, 23.98, 58.20)],
    ("tir", 5): [(56.73, 93.49, 97.42, 26.12, 68.44)],
    ("svl", 1): [(38.12, 85.02, 87.20, 22.68, 58.26)],
    ("tir-inhibit", 5): [(None, None, None, None, 67.66)],
    ("tir-enhance", 5): [(None, None, None, None, 67.23)],
    ("svl-only", 1): [(None, None, None, None, 57.55)],
    ("ra-only", 1): [(None, None, None, None, 57.17)],
}
COLUMNS = ("isic", "eurosat", "cropdiseases", "chestx", "mean")


def paper_figure(method: str, shot: int, column: str) -> str:
    """What the papers report, "81.41 / 81.72" where two do, or ""."""
    figures = [row[COLUMNS.index(column)] for row in PAPER.get((method, shot), []) if column in COLUMNS]
    return " / ".join(f"{f:.2f}" for f in figures if f is not None)


def mean_and_interval(accuracies: Sequence[float]) -> tuple[float, float]:
    """Mean and half the 95 % interval, 1.96 std / sqrt(n), of accuracies in %."""
    a = torch.tensor(accuracies, dtype=torch.float64)
    return a.mean().item(), 1.96 * a.std(correction=0).item() / len(a) ** 0.5 if len(a) > 1 else float("nan")


class Results:
    """One JSON line an episode, after a first line that tells what made them; every process writes a part of its own."""

    def __init__(self, stem: Path, header: dict, rank: int = 0):
        self.stem, self.header = stem, json.loads(json.dumps(header))
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            self.file = stem.with_name(f"{stem.name}.part{rank}.jsonl").open("a+b")
        except OSError as e:
            raise UsageError(f"cannot write to {stem.parent}: {e}") from e
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UsageError(f"{self.file.name}: another run is writing it") from e
        self.done = self.read()
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)             # a killed run may have left half a line
        self.file.seek(0)
        if len(self.file.readlines()) < 2:
            self.file.truncate(0)
            self.append([self.header])

    def read(self) -> dict[int, dict]:
        """Every finished episode, of all parts. Raises UsageError when a part was made in another way."""
        done = {}
        for part in sorted(self.stem.parent.glob(glob.escape(self.stem.name) + ".part*.jsonl")):
            lines = [json.loads(line) for line in part.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            for key in self.header if len(lines) > 1 else ():        # a first line alone is of a run that failed
                if lines[0].get(key) != self.header[key]:
                    raise UsageError(f"{part} was made with {describe(key, lines[0].get(key), self.header[key])}; "
                                     "give another --out, or remove it")
            done |= {record["episode"]: record for record in lines[1:]}
        return done

    def append(self, records: list[dict]) -> None:
        self.file.write("".join(json.dumps(r) + "\n" for r in records).encode())
        self.file.flush()


def describe(key: str, old: object, new: object) -> str:
    """The first difference of two header fields, in words."""
    if isinstance(old, dict):
        key = next(k for k in {**new, **old} if old.get(k) != new.get(k))
        old, new = old.get(key), new.get(key)
    return f"{key} {old!r}, this run has {new!r}"


def markdown(cells: dict[tuple[str, int, str], tuple[float, float]]) -> str:
    """(method, shot, dataset) -> (mean, interval) as the papers' tables, one a shot, the paper's figure in brackets."""
    lines = []
    for shot in sorted({shot for _, shot, _ in cells}):
        methods = list(dict.fromkeys(m for m, s, _ in cells if s == shot))
        columns = list(dict.fromkeys(d for _, s, d in cells if s == shot))
        columns += ["mean"] if len(columns) > 1 else []
        lines += ["", f"| {shot}-shot | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for method in methods:
            row = {d: cells[method, shot, d] for d in columns if (method, shot, d) in cells}
            shown = {d: f"{mean:.2f} ± {interval:.2f}" for d, (mean, interval) in row.items()}
            shown["mean"] = f"{sum(mean for mean, _ in row.values()) / len(row):.2f}"
            paper = {d: paper_figure(method, shot, d) for d in columns}
            lines.append(f"| {method} | " + " | ".join(shown.get(d, "") + (f" ({paper[d]})" if paper[d] else "") for d in columns) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ runs

def rank_and_size() -> tuple[int, int]:
    """This process and the number of them, as torchrun sets them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pictures_at_once(clip: CLIP, device: torch.device) -> int:
    """How many pictures fit into free memory in training."""
    c, size = clip.config, clip.visual.proj.element_size()
    if device.type == "cuda":                                            # what PyTorch keeps in reserve is free to us
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = next(1024 * int(line.split()[1]) for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
    per_picture = 30 * size * c.vision_width * c.vision_layers * ((c.image // c.patch) ** 2 + 1)    # measured: about 30 numbers kept a token, block and channel
    return max(1, int(0.7 * free / per_picture))


class Cell:
    """One dataset, shot and method: what it takes to train any batch of its episodes."""

    def __init__(self, args: argparse.Namespace, clip: CLIP, tokenizer: Tokenizer, pool: Pool, dataset: str, shot: int, method: str):
        self.args, self.clip, self.pool, self.dataset, self.shot, self.method = args, clip, pool, dataset, shot, method
        self.recipe = flagged(args, recipe_for(args.recipe, method, shot, dataset))
        self.device = clip.visual.proj.device
        self.token_ids = class_rows(tokenizer, self.recipe.prompt, pool.classes, clip.config.context)      # (C, context)

    def fetch(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Token rows (E, way, context), support (E, way * shot, 3, S, S) and queries, uint8, on the device."""
        a = self.args
        drawn = [self.pool.episode(n, a.way, self.shot, a.query, a.seed) for n in numbers]
        classes, support, query = (torch.stack(part) for part in zip(*drawn))
        parts = self.token_ids[classes], self.pool.images[support.flatten(1)], self.pool.images[query.flatten(1)]
        return tuple((p.pin_memory() if self.device.type == "cuda" else p).to(self.device, non_blocking=True) for p in parts)

    def adapt(self, numbers: Sequence[int], token_ids: Tensor, support: Tensor, method: str | None = None) -> Learner:
        a, r = self.args, self.recipe
        seeds = [(a.seed, n) for n in numbers]
        labels = torch.arange(a.way, device=self.device).repeat_interleave(self.shot).expand(len(numbers), -1)
        still, batches = support_batches(support, labels, r.augment, r.steps, self.clip.config.image, seeds, r.minibatch)
        torch.manual_seed(generator("dropout", *seeds[0]).initial_seed())         # a resumed run, with the same --batch, draws the same masks
        return adapt(self.clip, still, labels, token_ids, method or self.method, r, batches=batches, seeds=seeds, compile=a.compile)

    def queries(self, query: Tensor) -> Tensor:
        return plain(query, self.clip.config.image, centre=self.recipe.augment == "none")

    def train(self, numbers: Sequence[int], fetched: tuple[Tensor, Tensor, Tensor]) -> list[dict]:
        """One record an episode: its accuracy on the queries in % and its last loss."""
        token_ids, support, query = fetched
        if self.args.compile:
            gc.collect()                                                 # a compiled learner refers to itself, so the last one may still be here
        learner = self.adapt(numbers, token_ids, support)
        wanted = torch.arange(self.args.way, device=self.device).repeat_interleave(self.args.query)
        logits = torch.cat([learner.logits(self.queries(part)) for part in query.split(25, 1)], 1)    # (E, Q, N)
        if broken := [n for n, fine in zip(numbers, logits.isfinite().flatten(1).all(1).tolist()) if not fine]:
            raise UsageError(f"the loss is not a number in episodes {', '.join(map(str, broken))}: lower --lr, or use --precision float32")
        right = (logits.argmax(-1) == wanted).double().mean(1).tolist()
        last = (learner.losses[-1] if len(learner.losses) else torch.zeros(len(numbers))).tolist()
        return [{"episode": n, "accuracy": 100 * a, "loss": loss} for n, a, loss in zip(numbers, right, last)]

    def run(self) -> list[float]:
        """Train what is not done yet, in batches of episodes; returns the accuracies of all, in order."""
        a, (rank, size) = self.args, rank_and_size()
        episodes = a.episodes or (100 if self.dataset == "toy" else 800 if self.shot == 1 else 400)
        header = {"dataset": self.dataset, "way": a.way, "shot": self.shot, "query": a.query, "seed": a.seed, "method": self.method,
                  "recipe": asdict(self.recipe), "weights": self.clip.fingerprint, "data": self.pool.fingerprint, "precision": a.precision}
        name = f"{Path(self.dataset).name}-{a.way}way-{self.shot}shot-{self.method}-{a.recipe}-seed{a.seed}"
        results = Results(Path(a.out) / name, header, rank)
        if a.compile:
            torch.compiler.reset()                                       # other shapes than the last cell's: its graphs would only count to the limit
        mine = range(rank, episodes, size)
        todo = [n for n in mine if n not in results.done]
        support = a.way * self.shot
        shown = support * (5 if self.recipe.augment == "views" else 1)
        shown = min(self.recipe.minibatch or shown, shown) + support * ("ra" in switches(self.method))     # RA adds the plain pictures
        at_once = a.batch or min(128 if self.device.type == "cuda" else 16, max(1, pictures_at_once(self.clip, self.device) // shown))
        accuracies, begun, total = [results.done[n]["accuracy"] for n in mine if n in results.done], time.monotonic(), len(todo)
        if rank == 0 and todo:
            progress(f"{name}: {len(accuracies)} of {len(mine)} episodes are done, the others {min(at_once, total)} at a time")
        with ThreadPoolExecutor(1) as background:
            ahead = background.submit(self.fetch, todo[:at_once]) if todo else None
            while todo:
                numbers, fetched, records = todo[:at_once], None, None
                try:
                    fetched = ahead.result()
                    ahead = background.submit(self.fetch, todo[at_once: 2 * at_once]) if todo[at_once:] else None     # while this batch trains
                    records = self.train(numbers, fetched)
                except torch.cuda.OutOfMemoryError:
                    fetched = ahead = None                               # in here the traceback still holds the batch's memory
                if records is None:
                    if len(numbers) == 1:
                        raise UsageError("out of GPU memory with one episode at a time")
                    at_once = len(numbers) // 2
                    print(f"\nout of GPU memory: {at_once} episodes at once from here on", file=sys.stderr)
                    ahead = background.submit(self.fetch, todo[:at_once])
                    continue
                elapsed = time.monotonic() - begun
                results.append([r | {"elapsed": round(elapsed, 2)} for r in records])
                todo = todo[at_once:]
                accuracies += [r["accuracy"] for r in records]
                if rank == 0:
                    mean, interval = mean_and_interval(accuracies)
                    speed = (total - len(todo)) / elapsed
                    progress(f"{name}: {len(accuracies)}/{len(mine)} episodes, {mean:.2f} ± {interval:.2f} %, "
                             f"{speed:.2f} episodes/s, {len(todo) / speed:.0f} s left", last=not todo)
        if size > 1:
            torch.distributed.barrier()                                  # now every part is complete
        done = results.read()
        return [done[n]["accuracy"] for n in range(episodes)]


def progress(text: str, last: bool = False) -> None:
    """A line that is written over on a terminal, and one of many in a log."""
    on_terminal = sys.stderr.isatty()
    print(f"\r\x1b[K{text}" if on_terminal else text, end="" if on_terminal and not last else "\n", file=sys.stderr, flush=True)


def class_rows(tokenizer: Tokenizer, prompt: str, names: Sequence[str], context: int) -> Tensor:
    """Token rows (C, context) of the prompts of class names, underscores as spaces."""
    return tokenizer([prompt.replace("{}", name.replace("_", " ")) for name in names], context)


def flagged(args: argparse.Namespace, recipe: Recipe) -> Recipe:
    """The recipe with what was given on the command line."""
    given = {f.name: getattr(args, f.name) for f in fields(Recipe) if getattr(args, f.name) is not None}
    recipe = replace(recipe, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    if "{}" not in recipe.prompt:
        raise UsageError(f"--prompt {recipe.prompt!r} has no {{}}, where the class name goes")
    for name, value in asdict(recipe).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if name in ("rho", "gamma", "tir_top", "dropout", "extra_share") and not 0 <= value <= 1:
            raise UsageError(f"{flag} is not a share from 0 to 1")
        if isinstance(value, int | float) and name not in ("alpha", "beta", "text_block") and not 0 <= value < float("inf"):
            raise UsageError(f"{flag} is not a number from 0 up")
    for block in (recipe.alpha_block, *recipe.tir_blocks, 11 if recipe.text_block == -1 else recipe.text_block):
        if not 0 <= block < 12:
            raise UsageError(f"there is no block {block}: they are given for towers of 12, 0 to 11")
    return recipe


# -------------------------------------------------------------------------------------------------- own pictures

def read_names(path: str, classes: Sequence[str]) -> list[str]:
    """Phrase of each class: as a JSON object says of the folder, else the folder's name. Raises UsageError."""
    try:
        names = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise UsageError(f"cannot read --names {path}: {e.strerror}") from e
    except ValueError as e:
        raise UsageError(f"--names {path} is not JSON: {e}") from e
    if not isinstance(names, dict) or not all(isinstance(phrase, str) for phrase in names.values()):
        raise UsageError(f'--names {path} must hold one object of texts, {{"folder": "phrase", ...}}')
    if unknown := [name for name in names if name not in classes]:
        raise UsageError(f"--names {path}: no class folder {unknown[0]!r}; there are {', '.join(classes)}")
    return [names.get(name, name) for name in classes]


def check_writable(path: Path) -> None:
    """Raises UsageError before the work is done rather than after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            reason = "it is a folder" if path.is_dir() else ""
    except OSError as e:
        reason = e.strerror
    if reason:
        raise UsageError(f"cannot write {path}: {reason}")


def fit(args: argparse.Namespace, clip: CLIP, tokenizer: Tokenizer) -> None:
    """Fine-tune once on a folder of class folders: one episode whose classes are all and whose support is everything."""
    pool, device, method = data.load(args.fit, args.data), clip.visual.proj.device, args.method[0]
    phrases = read_names(args.names, pool.classes) if args.names else pool.classes
    check_writable(Path(args.save))
    if len(pool.classes) < 2:
        raise UsageError(f"{args.fit} has one class, {pool.classes[0]!r}: there is nothing to tell apart")
    short = [f"{name!r} has {len(rows)}" for name, rows in zip(pool.classes, pool.rows) if len(rows) <= args.holdout]
    if short:
        raise UsageError(f"--holdout {args.holdout} leaves no picture to fit on: {', '.join(short)}")
    recipe = flagged(args, recipe_for(args.recipe, method, min(5, max(1, len(pool.labels) // len(pool.classes)))))
    order = [rows[torch.randperm(len(rows), generator=generator("holdout", args.seed, label))] for label, rows in enumerate(pool.rows)]
    kept, held = (torch.cat(part) for part in zip(*[(rows[args.holdout:], rows[: args.holdout]) for rows in order]))
    size, seeds = clip.config.image, [("fit", args.seed)]
    token_ids = class_rows(tokenizer, recipe.prompt, phrases, clip.config.context)[None].to(device)
    labels = pool.labels[kept][None].to(device)                          # (1, M)
    still, batches = support_batches(pool.images[kept][None].to(device), labels, recipe.augment, recipe.steps, size, seeds, recipe.minibatch)
    chunk = args.batch or pictures_at_once(clip, device)
    pictures = batches(0)[0].shape[1]
    print(f"fitting {method} on {len(kept)} pictures of {len(pool.classes)} classes, {recipe.steps} steps"
          + (f", {chunk} of {pictures} pictures at a time (each step still sees them all)" if chunk < pictures else ""), file=sys.stderr)
    begun, every = time.monotonic(), 1 if sys.stderr.isatty() else max(1, recipe.steps // 10)

    def told(step: int) -> tuple[Tensor, Tensor]:                        # adapt asks for a step's pictures when the steps before are done
        if step and step % every == 0:
            progress(f"step {step}/{recipe.steps}, {(time.monotonic() - begun) / step * (recipe.steps - step):.0f} s left")
        return batches(step)
    learner = None
    while learner is None:
        torch.manual_seed(args.seed)
        try:
            learner = adapt(clip, still, labels, token_ids, method, recipe, batches=told, seeds=seeds, chunk=chunk, compile=args.compile)
        except torch.cuda.OutOfMemoryError as e:
            if chunk == 1:
                raise UsageError("out of GPU memory with one picture at a time") from e
            chunk = min(chunk, pictures) // 2
            print(f"\nout of GPU memory: {chunk} pictures at a time from here on", file=sys.stderr)
    progress(f"fitted in {time.monotonic() - begun:.0f} s", last=True)
    if len(learner.losses) and not learner.losses[-1].isfinite().all():
        raise UsageError("the loss is not a number: lower --lr, or use --precision float32")
    metadata = {"classes": pool.classes, "phrases": phrases, "method": method, "recipe": asdict(recipe), "weights": clip.fingerprint}
    save(learner.learned(), args.save, {key: json.dumps(value) for key, value in metadata.items()})
    print(f"saved {args.save}")
    if args.holdout:
        plain_held = plain(pool.images[held].to(device), size, centre=recipe.augment == "none")[None]
        zero_shot = adapt(clip, still, labels, token_ids, "zero-shot", recipe)
        counts = []
        for name, model in (("zero-shot", zero_shot), (method, learner)):
            right = model.logits(plain_held)[0].argmax(-1).cpu() == pool.labels[held]
            counts.append(int(right.sum()))
            print(f"{name + ':':{len(method) + 10}s} {100 * right.double().mean():6.2f} % ({counts[-1]} of {len(held)} pictures held out)")
        if counts[1] <= counts[0]:
            print("tuning did not help on these pictures: plain CLIP does as well")


def load_tuned(path: str | Path, clip: CLIP, tokenizer: Tokenizer) -> Learner:
    """What --save kept, on the CLIP that it was made with: a Learner with .classes and .logits. Raises UsageError."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            stored = file.metadata() or {}
        classes, phrases, method, weights, recipe = (json.loads(stored[key]) for key in ("classes", "phrases", "method", "weights", "recipe"))
        recipe = Recipe(**{key: tuple(v) if isinstance(v, list) else v for key, v in recipe.items()})
    except (OSError, SafetensorError) as e:
        raise UsageError(f"cannot read {path} as a file that --save wrote: {e}") from e
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise UsageError(f"{path} is not a file that --save wrote, or of another version") from e
    if weights != clip.fingerprint:
        raise UsageError(f"{path} was fitted on the weights {weights}, these are {clip.fingerprint}: give the right --weights")
    token_ids = class_rows(tokenizer, recipe.prompt, phrases, clip.config.context)[None].to(clip.visual.proj.device)
    learner = Learner(clip, token_ids, method, recipe)
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in learner.learned().items()}:
        raise UsageError(f"{path} does not hold what {method} learns: parts are missing, or it is of another version")
    learner.load_state_dict(tensors, strict=False)
    learner.classes = classes
    return learner.requires_grad_(False).eval()


def predict(args: argparse.Namespace, clip: CLIP, tokenizer: Tokenizer) -> int:
    """Classify pictures and folders with a saved learner; prints a table, returns the exit code: 1 when pictures were skipped."""
    learner = load_tuned(args.predict[0], clip, tokenizer)
    paths = []
    for path in map(Path, args.predict[1:]):
        paths += [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMG_EXTENSIONS and not p.name.startswith(".")] if path.is_dir() else [path]
    if not paths:
        raise UsageError("no pictures to classify: name pictures or folders after the saved file")
    wide, named = (max(map(len, x)) for x in (map(str, paths), learner.classes))
    if not args.json:
        print(f"{'picture':{wide}s}  {'class':{named}s}      %  {'runner-up':{named}s}      %")
    confusion, skipped = torch.zeros(len(learner.classes), len(learner.classes), dtype=torch.int64), 0
    for start in range(0, len(paths), 64):
        found = []
        for path in paths[start: start + 64]:
            try:
                found.append((path, decode(path, 256)))
            except DataError as e:
                print(f"skipped: {e}", file=sys.stderr)
                skipped += 1
        if found:
            images = plain(torch.stack([image for _, image in found]).to(clip.visual.proj.device), clip.config.image, centre=learner.recipe.augment == "none")
            top = learner.logits(images[None])[0].softmax(-1).topk(min(2, len(learner.classes)))
            for (path, _), values, indices in zip(found, top.values.tolist(), top.indices.tolist()):
                names = [learner.classes[i] for i in indices]
                if args.json:
                    print(json.dumps({"picture": str(path), "class": names[0], "probability": values[0], "runner_up": names[1], "runner_up_probability": values[1]}))
                else:
                    print(f"{path!s:{wide}s}  " + "  ".join(f"{name:{named}s}  {100 * value:5.1f}" for name, value in zip(names, values)))
                if path.parent.name in learner.classes:
                    confusion[learner.classes.index(path.parent.name), indices[0]] += 1
        if len(paths) > 64 and not sys.stdout.isatty():                  # on a terminal the table itself tells how far
            progress(f"{min(start + 64, len(paths))}/{len(paths)} pictures", last=start + 64 >= len(paths))
    if labelled := int(confusion.sum()):
        accuracy = 100 * int(confusion.trace()) / labelled
        if args.json:
            print(json.dumps({"accuracy": accuracy, "pictures": labelled, "classes": learner.classes, "confusion": confusion.tolist()}))
        else:
            print(f"\naccuracy {accuracy:.2f} % of {labelled} pictures\n\n{'true class':{named + 4}s}  right  predicted as")
            print(" " * (named + 13) + "".join(f"{i + 1:5d}" for i in range(len(confusion))))
            for i, (name, row) in enumerate(zip(learner.classes, confusion.tolist())):
                right = f"{100 * row[i] / sum(row):4.0f} %" if sum(row) else "     -"
                print(f"{i + 1:3d} {name:{named}s}  {right} " + "".join(f"{n or '.':>5}" for n in row))
    return 1 if skipped else 0


# ----------------------------------------------------------------------------------------------------- look inside

@torch.no_grad()
def look(cell: Cell, probe_file: Path | None, picture: str | None, block: int) -> None:
    """Train the first episodes, four or fewer, once more, and show what changed inside: a table, JSON lines, a picture."""
    a, clip = cell.args, cell.clip
    numbers = list(range(min(4, a.batch or 4, a.episodes or 4)))
    token_ids, support, query = cell.fetch(numbers)
    with torch.enable_grad():
        tuned = cell.adapt(numbers, token_ids, support)
    frozen = cell.adapt(numbers, token_ids, support, method="zero-shot")
    images, vision, r = cell.queries(query), clip.visual, cell.recipe
    seen = []
    for learner in (frozen.eval(), tuned.eval()):
        final, token_texts = learner.texts()
        texts = text_to_tokens(token_texts, vision.proj, vision.ln_post, r.text_to_tokens)
        probe = Probe(texts, token_texts, vision.ln_post, vision.proj, r.rho, r.gamma, r.tir_top, learner.between(token_texts))
        seen.append((probe, learner.features(images, probe), F.normalize(final.float(), dim=-1)))
    (before, features, text), (after, tuned_features, tuned_text) = seen
    if probe_file is not None:
        rows = compare(before, after, len(numbers))
        for row in rows if tuned.atha is not None else ():
            row |= {"alpha": tuned.atha.alpha[:, row["block"]].mean().item(), "beta": tuned.atha.beta[:, row["block"]].mean().item()}
        wanted = torch.arange(a.way, device=images.device).repeat_interleave(a.query)
        whole = {"cka_features": linear_cka(features, tuned_features).mean().item()}
        for name, f, t in (("before", features, text), ("after", tuned_features, tuned_text)):
            whole[f"modality_gap_{name}"] = modality_gap(f, t).mean().item()
            whole[f"gap_shift_{name}"] = sum(gap_shift(x, y, wanted, r.scale).item() for x, y in zip(f, t)) / len(numbers)
        with probe_file.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in [*rows, whole])
        print(probe_table(rows, whole, len(numbers)))
    if picture is not None:
        names = [cell.pool.classes[c].replace("_", " ") for c in cell.pool.episode(0, a.way, cell.shot, a.query, a.seed)[0]]
        some = range(0, len(query[0]), a.query)                                      # one query a class
        said = [f"true: {names[i // a.query]}, predicted: {names[tuned_label]}"
                for i, tuned_label in zip(some, tuned.logits(images)[0, some].argmax(-1).tolist())]
        masks = [[m[some] for m in probe.masks[block]] for probe in (before, after)]
        legend = f"orange: head patches, blue: tail patches, at block {block}; left: picture, middle: before tuning, right: after"
        draw_patches(picture, query[0, some].cpu(), masks, clip.config.image // clip.config.patch, said, legend)
        print(f"drew {picture}")


# --------------------------------------------------------------------------------------------------- command line

TOY_CLIP = Path(__file__).parent / "tests" / "toy_clip.safetensors"
TABLE = ("zero-shot", "clip-lora", "atha", "tir", "svl")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", usage="train.py --dataset NAME [--shot N] [--method NAME] [options]\n       train.py --fit FOLDER --save FILE [options]\n       train.py --predict FILE PICTURE_OR_FOLDER ...", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help=f"{', '.join(DATASETS)}, all of these, toy, or a folder of class folders")
    parser.add_argument("--shot", nargs="+", type=int, metavar="N", default=[1], help="labelled pictures a class (default 1)")
    parser.add_argument("--method", nargs="+", metavar="NAME", help=f"{', '.join(METHODS)}; some joined with +; or all: {', '.join(TABLE)} (default atha)")
    parser.add_argument("--recipe", default="paper", choices=["paper", "released", *list(RECIPES)[1:]], help="released: the trainer that the method came with (default paper)")
    parser.add_argument("--episodes", type=int, metavar="N", help="default 800 at 1 shot, 400 otherwise, 100 on toy")
    parser.add_argument("--way", type=int, metavar="N", default=5, help="classes an episode (default 5)")
    parser.add_argument("--query", type=int, metavar="N", default=15, help="query pictures a class (default 15)")
    parser.add_argument("--seed", type=int, metavar="N", default=1, help="draws the episodes and all chance in them (default 1)")
    parser.add_argument("--data", default="datasets", metavar="DIR", help="where the datasets are (default datasets)")
    parser.add_argument("--weights", metavar="FILE", help="our safetensors, a Hugging Face folder or OpenAI's .pt (default ViT-B/16, downloaded once; toy has its own)")
    parser.add_argument("--out", default="results", metavar="DIR", help="one JSON line an episode goes here; a rerun goes on from it (default results)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N (default cuda where there is one)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="of the frozen weights and the arithmetic (default bfloat16 on CUDA, else float32)")
    parser.add_argument("--batch", type=int, metavar="N", help="episodes at once; with --fit: pictures at once (default from free memory)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the vision tower's blocks")
    parser.add_argument("--probe", action="store_true", help="after a run, a table of what changed inside, by block")
    parser.add_argument("--draw", metavar="FILE.png", help="after a run, a picture of head and tail patches")
    parser.add_argument("--draw-block", type=int, metavar="N", help="the block to draw (default: where ATHA pulls first)")
    own = parser.add_argument_group("your own pictures")
    own.add_argument("--fit", metavar="FOLDER", help="fine-tune once on a folder of class folders")
    own.add_argument("--save", metavar="FILE", help="where --fit keeps what it learned")
    own.add_argument("--holdout", type=int, default=0, metavar="N", help="pictures a class that --fit keeps back, to report accuracy on")
    own.add_argument("--names", metavar="FILE.json", help="folder name -> phrase for the prompt")
    own.add_argument("--predict", nargs="+", metavar="FILE", help="a saved file, then pictures or folders to classify")
    own.add_argument("--json", action="store_true", help="--predict prints JSON lines")
    group = parser.add_argument_group("recipe (defaults shown are the paper's)")
    choices = {"augment": ["none", "crop", "views"], "text_to_tokens": ["paper", "released"], "ra": ["paper", "released"]}
    kinds = {"bool": {"action": argparse.BooleanOptionalAction}, "tuple[int, ...]": {"type": int, "nargs": "+", "metavar": "N"},
             "int": {"type": int, "metavar": "N"}, "float": {"type": float, "metavar": "X"}, "str": {"metavar": "TEXT"}}
    for f in fields(Recipe):
        kind = {"choices": choices[f.name]} if f.name in choices else kinds[f.type]
        default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        group.add_argument(f"--{f.name.replace('_', '-')}", help=f"{f.metadata['help']} ({default})", **kind)
    if not argv:
        parser.exit(0, __doc__)

    def refuse(message: str) -> None:                                    # one line, not the usage of fifty flags before it
        raise UsageError(message)
    parser.error = refuse
    args = parser.parse_args(argv)
    if bool(args.dataset) + bool(args.fit) + bool(args.predict) != 1:
        parser.error("give one of --dataset, --fit and --predict")
    for name, least in {"way": 1, "query": 1, "shot": 1, "episodes": 1, "batch": 1, "steps": 1, "rank": 1, "minibatch": 0, "holdout": 0}.items():
        given = getattr(args, name)
        if given is not None and min(given if isinstance(given, list) else [given]) < least:
            parser.error(f"--{name} must be at least {least}")
    args.dataset = list(DATASETS) if args.dataset == ["all"] else args.dataset or []
    default = ["zero-shot", "atha"] if args.dataset == ["toy"] else ["atha"]
    args.method = list(TABLE) if args.method == ["all"] else args.method or default
    for method in args.method:
        switches(method)
    if args.fit and not args.save:
        parser.error("--fit needs --save FILE")
    if args.fit and len(args.method) > 1:
        parser.error("--fit takes one method")
    for name in ("save", "holdout", "names"):
        if getattr(args, name) and not args.fit:
            parser.error(f"--{name} goes with --fit")
    if args.draw and len(args.dataset) * len(args.shot) * len(set(args.method) - {"zero-shot"}) != 1:
        parser.error("--draw makes one picture: give one dataset, one shot and one method")
    args.precision = args.precision or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def run(args: argparse.Namespace) -> int:
    name = f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" and "LOCAL_RANK" in os.environ else args.device
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise UsageError(f"--device {name} cannot be used: {str(e).splitlines()[0]}") from e
    for path in filter(None, (args.fit, args.predict and args.predict[0])):          # a slip of the pen should not cost a download
        if not Path(path).exists():
            raise UsageError(f"there is no {path}")
    if args.fit and not Path(args.fit).is_dir():
        raise UsageError(f"--fit {args.fit}: it takes a folder of class folders")
    args.compile = args.compile and compile_works(device)
    torch.backends.cudnn.allow_tf32 = False                                          # float32 means float32
    for dataset in args.dataset:
        data.check(dataset, args.data)
    weights = args.weights or (TOY_CLIP if args.dataset == ["toy"] else None)
    clip, tokenizer = clip_min.load(weights, device, getattr(torch, args.precision))
    if device.type == "cpu" and clip.config.vision_width >= 512:                     # small matrices gain nothing
        multiply_fast()
    if args.draw:
        check_writable(Path(args.draw))
        if Path(args.draw).suffix.lower() not in IMG_EXTENSIONS or not 0 <= (args.draw_block or 0) < clip.config.vision_layers:
            raise UsageError(f"--draw takes a name such as look.png, and --draw-block 0 to {clip.config.vision_layers - 1}")
    if args.predict:
        return predict(args, clip, tokenizer)
    if args.fit:
        return fit(args, clip, tokenizer) or 0
    cells, first = {}, rank_and_size()[0] == 0
    for dataset in args.dataset:
        pool = data.load(dataset, args.data)
        for shot in args.shot:
            for method in args.method:
                begun = time.monotonic()
                cell = Cell(args, clip, tokenizer, pool, dataset, shot, method)
                accuracies = cell.run()
                mean, interval = cells[method, shot, dataset] = mean_and_interval(accuracies)
                if first:
                    paper = paper_figure(method, shot, dataset)
                    print(f"{dataset} {args.way}-way {shot}-shot {method} ({args.recipe}): {mean:.2f} ± {interval:.2f} % over {len(accuracies)} episodes, "
                          f"{time.monotonic() - begun:.0f} s" + (f" (paper: {paper})" if paper and args.way == 5 else ""), flush=True)
                    if (args.probe or args.draw) and method != "zero-shot":
                        block = at_depth(cell.recipe.alpha_block, clip.config.vision_layers) if args.draw_block is None else args.draw_block
                        look(cell, Path(args.out) / f"{Path(dataset).name}-{shot}shot-{method}-{args.recipe}.probe.jsonl" if args.probe else None, args.draw, block)
    if first and len(cells) > 1:
        print(markdown(cells))
    return 0


def multiply_fast() -> None:
    """Let oneDNN multiply float32 matrices where that is still float32: on AMD's CPUs it is twice as fast as MKL for large ones.

    The switch is named for bfloat16, and on CPUs with matrix units it does round: there it is set back.
    """
    torch.set_float32_matmul_precision("medium")
    a, b = torch.randn(2, 512, 512, generator=generator("multiply"))
    exact = a.double() @ b.double()
    if (a @ b - exact).norm() > 1e-6 * exact.norm():
        torch.set_float32_matmul_precision("highest")


def compile_works(device: torch.device) -> bool:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
        return True
    except Exception as e:                                               # whatever is missing here, plain PyTorch goes on
        print(f"--compile does not work here ({str(e).strip().splitlines()[0]}): going on without", file=sys.stderr)
        return False


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 2 for a request that cannot be met, said in one line."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        if rank_and_size()[1] > 1:
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))      # only to wait: the parts never talk
        return run(args)
    except (UsageError, clip_min.WeightsError, DataError) as e:
        progress(f"train.py: error: {e}", last=True)                     # takes the place of an unfinished line
        return 2
    except BrokenPipeError:                                              # ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        kept = "finished episodes are kept, and the same command goes on from there" if any(word.startswith("--dataset") for word in argv) else "nothing was saved"
        print(f"\nstopped; {kept}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
