"""How fast it is here: ViT-B/16 at full size with random weights (speed does not depend on them), through train.adapt itself.

    python tests/bench.py                         # 10 to 15 minutes on two CPU cores, a few on a GPU
    python tests/bench.py --peer                  # and against Hugging Face CLIP with PEFT's LoRA, where these are installed

What is compared is measured in the same run, in turns; every figure is a median after warm-up. A step's time is taken
where `adapt` asks for the step's pictures: on CUDA by events on the device, else by the host's clock.
"""
from __future__ import annotations

import argparse, gc, importlib.util, os, platform, re, resource, sys, time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import train  # noqa: E402
from clip_min import CLIP, CLIPConfig  # noqa: E402
from data import plain, support_batches  # noqa: E402

RECIPE = train.RECIPES["paper"]
ROWS = {(5, 1): (800, 75), (5, 5): (400, 75)}    # (way, shot) of a row of the papers' tables: episodes, queries of each


def flops(c: CLIPConfig) -> int:
    """Floating-point operations (a multiply-add is 2) of the vision tower for one picture: 35.1e9 for ViT-B/16."""
    patches, width = (c.image // c.patch) ** 2, c.vision_width
    tokens = patches + 1
    block = 2 * 12 * tokens * width ** 2 + 2 * 2 * tokens ** 2 * width        # q k v out and the MLP; scores and their use
    return c.vision_layers * block + 2 * patches * 3 * c.patch ** 2 * width + 2 * width * c.embed


class Clock:
    """Marks in the device's own order of work."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []

    def mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds from each mark to the next."""
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in pairwise(self.marks)]
        return [b - a for a, b in pairwise(self.marks)]


def seconds(call: Callable[[], object], device: torch.device, warm: int, repeats: int) -> float:
    clock = Clock(device)
    for _ in range(warm):
        call()
    clock.mark()
    for _ in range(repeats):
        call()
        clock.mark()
    return median(clock.laps())


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a large product of square matrices of random numbers."""
    n, (warm, repeats) = (8192, (10, 30)) if device.type == "cuda" else (2048, (2, 7))
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n ** 3 / seconds(lambda: a @ b, device, warm, repeats)


def random_clip(device: torch.device, dtype: torch.dtype) -> CLIP:
    torch.manual_seed(0)
    return CLIP(CLIPConfig()).to(device, dtype)


def class_rows(clip: CLIP, episodes: int, way: int) -> Tensor:
    """Token rows (E, way, context) as long as those of "a photo of a herbaceous vegetation land." """
    rows, end = torch.zeros(episodes, way, clip.config.context, dtype=torch.int64), clip.config.vocab - 1
    rows[..., 1:9], rows[..., 0], rows[..., 9] = torch.randint(end - 1, (episodes, way, 8)), end - 1, end
    return rows.to(clip.visual.proj.device)


def train_steps(clip: CLIP, method: str, episodes: int, way: int, shot: int, steps: int, warm: int, compile: bool,
                **changes) -> tuple[train.Learner, float, list[float]]:
    """Adapt to random pictures as train.py does: the learner, the seconds before the first step, and of each step after `warm`."""
    device, size, recipe = clip.visual.proj.device, clip.config.image, replace(RECIPE, steps=warm + steps, **changes)
    support = torch.randint(256, (episodes, way * shot, 3, 256, 256), dtype=torch.uint8, device=device)
    labels = torch.arange(way, device=device).repeat_interleave(shot).expand(episodes, -1)
    rows, clock = class_rows(clip, episodes, way), Clock(device)
    clock.mark()
    still, draw = support_batches(support, labels, recipe.augment, recipe.steps, size, range(episodes))

    def batches(step: int) -> tuple[Tensor, Tensor]:
        if step == 0:
            del clock.marks[1:]                                            # adapt looks at the first batch once before it starts
        clock.mark()
        return draw(step)
    learner = train.adapt(clip, still, labels, rows, method, recipe, batches=batches, compile=compile)
    clock.mark()
    before, *laps = clock.laps()
    return learner, before, laps[warm:]


def peak_memory(device: torch.device) -> float:
    """GB: on CUDA since the last reset, else of the whole process so far."""
    unit = 1 if sys.platform == "darwin" else 1024                         # ru_maxrss is in bytes there, elsewhere in kB
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9


def growth(args: argparse.Namespace, clip: CLIP, peak: float) -> dict[tuple[int, int], tuple[int, float, float]]:
    """Print images a second by way x shot and episodes at once; the best (E, seconds before, seconds a step) of each."""
    device, cuda, best, rate = args.device, args.device.type == "cuda", {}, None
    print("\n| way x shot | E | images a step | ms a step | images/s | share of peak | peak memory |\n|---|---|---|---|---|---|---|")
    for way, shot in ((5, 1), (10, 1), (5, 5), (10, 5)):
        for episodes in (1, 4, 16, 64, 128, 256) if cuda else (1, 2, 4) if shot == 1 and way == 5 else (1,):
            images, why = episodes * way * shot, ""
            if rate and images / rate > args.longest:
                why = f"a step would take {images / rate:.0f} s"
            elif not cuda and images > train.pictures_at_once(clip, device):
                why = "does not fit"
            else:
                try:
                    if cuda:
                        torch.cuda.reset_peak_memory_stats(device)
                    _, before, laps = train_steps(clip, "clip-lora", episodes, way, shot, args.repeats, args.warm, args.compile)
                except torch.cuda.OutOfMemoryError:
                    why = "does not fit"
            if why:
                print(f"| {way} x {shot} | {episodes} | {images} | {why} | | | |", flush=True)
                gc.collect(), cuda and torch.cuda.empty_cache()
                break
            step = median(laps)
            rate = images / step
            print(f"| {way} x {shot} | {episodes} | {images} | {1000 * step:.1f} | {rate:.4g} | {200 * rate * flops(clip.config) / peak:.0f} % "
                  f"| {peak_memory(device):.1f} GB |", flush=True)
            if (way, shot) not in best or step / episodes < best[way, shot][2] / best[way, shot][0]:
                best[way, shot] = episodes, before, step
            first = rate if (way, shot, episodes) == (5, 1, 1) else first
    if len(best) and best[5, 1][0] > 1:
        episodes, _, step = best[5, 1]
        print(f"\n{episodes} episodes at once train {5 * episodes / step / first:.1f} x as many images a second as one at a time")
    return best


def methods(args: argparse.Namespace, clip: CLIP, episodes: int) -> None:
    """Print what each method costs beside clip-lora, in turns; the second clip-lora shows how far off a figure may be."""
    names = {"clip-lora": "clip-lora", "clip-lora again": "clip-lora"} | {m: m for m in args.method if m != "clip-lora"}
    cost = {name: [] for name in names}
    for _ in range(args.repeats):
        for name, method in names.items():
            *_, laps = train_steps(clip, method, episodes, 5, 1, 3, args.warm, args.compile, extra_share=1.0)
            cost[name].append(median(laps))
    print(f"\n| method, 5 x 1, E = {episodes} | ms a step | relative to clip-lora |\n|---|---|---|")
    for name, method in names.items():
        share = RECIPE.extra_share if train.switches(method) & {"svl", "ra"} else 1.0        # SVL and RA act in a part of the steps
        relative = 1 - share + share * median(a / b for a, b in zip(cost[name], cost["clip-lora"]))
        print(f"| {name} | {relative * 1000 * median(cost['clip-lora']):.1f} | {relative:.3f} |", flush=True)


def peer_step(device: torch.device, dtype: torch.dtype, images: Tensor, labels: Tensor, way: int) -> Callable[[], None]:
    """One training step of the same network by transformers and peft, as they come."""
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    c = CLIPConfig()
    config = CLIPVisionConfig(hidden_size=c.vision_width, intermediate_size=4 * c.vision_width, num_hidden_layers=c.vision_layers,
                              num_attention_heads=c.vision_width // 64, image_size=c.image, patch_size=c.patch, projection_dim=c.embed)
    lora = LoraConfig(r=RECIPE.rank, lora_alpha=RECIPE.lora_alpha, use_rslora=True, lora_dropout=RECIPE.dropout, target_modules=["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(CLIPVisionModelWithProjection(config).to(device, dtype), lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RECIPE.lr, weight_decay=RECIPE.weight_decay, fused=True)
    texts, images = F.normalize(torch.randn(way, c.embed, device=device), dim=-1), images.to(dtype)

    def step() -> None:
        features = F.normalize(model(pixel_values=images).image_embeds.float(), dim=-1)
        F.cross_entropy(RECIPE.scale * features @ texts.T, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def against_peer(args: argparse.Namespace, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of our step and of the peer's, 5 images, clip-lora; a step of theirs runs before each of ours."""
    clip, clock = random_clip(args.device, dtype), Clock(args.device)
    images, labels = torch.randn(1, 5, 3, clip.config.image, clip.config.image, device=args.device), torch.arange(5, device=args.device)[None]
    theirs = peer_step(args.device, dtype, images[0], labels[0], 5)

    def mark() -> None:                                                    # what one queued must not be paid, nor hidden, by the other
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        clock.mark()

    def batches(step: int) -> tuple[Tensor, Tensor]:
        if step == 0:
            clock.marks.clear()
        mark()
        theirs()
        mark()
        return images, labels
    train.adapt(clip, images, labels, class_rows(clip, 1, 5), "clip-lora", replace(RECIPE, steps=args.warm + 3 * args.repeats), batches=batches, compile=args.compile)
    mark()
    laps = clock.laps()[2 * args.warm:]
    return median(laps[1::2]), median(laps[::2])


def duration(s: float) -> str:
    return f"{s:.0f} s" if s < 120 else f"{s / 60:.1f} min" if s < 7200 else f"{s / 3600:.1f} h"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="default bfloat16 on CUDA, else float32, as in train.py; the peer: both")
    parser.add_argument("--method", nargs="+", metavar="NAME", default=["atha", "tir", "svl", "atha+tir"], help="methods to compare with clip-lora (default atha tir svl atha+tir)")
    parser.add_argument("--repeats", type=int, metavar="N", help="measured steps a figure, three times as many with the peer (default 10 on CUDA, else 3)")
    parser.add_argument("--compile", action="store_true", help="torch.compile our blocks")
    parser.add_argument("--peer", action="store_true", help="also time the same step by transformers and peft")
    args = parser.parse_args()
    cuda = args.device.type == "cuda"
    args.repeats, args.warm, args.longest = args.repeats or (10 if cuda else 3), 3 if cuda else 1, 15.0    # longest: seconds a step
    try:
        [train.switches(method) for method in args.method]
    except train.UsageError as e:
        parser.error(str(e))
    if args.peer and (missing := [name for name in ("transformers", "peft") if not importlib.util.find_spec(name)]):
        parser.error(f"--peer needs {' and '.join(missing)}: pip install transformers peft")
    return args
