"""How fast it is here, or what a step costs anywhere: ViT-B/16 with random weights, through train.adapt.

    python tests/bench.py --peer      timed; without --peer it needs no transformers and peft
    python tests/bench.py --count     counted, as a GPU would run it, on any machine: no arithmetic is done

Timed figures are medians after warm-up; what is compared is run in turns. A step lasts from one call of
adapt's `batches` to the next. E episodes train at once. FLOP a picture: forward; in training twice that, as
frozen weights need no gradient.

Counted: `as_gpu` and `Count` run a step on tensors without numbers (PyTorch's device "meta") on the paths
that CUDA takes: flash attention, fused dropout, fused optimizers. A kernel is an operation of PyTorch's that
is no view; GB are what it reads and writes, but for attention and for products of 100 FLOP a byte and more,
which are bound by arithmetic.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from math import ceil
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import adam, optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))
import train  # noqa: E402
from clip_min import CLIP, CLIPConfig  # noqa: E402
from data import Batches, plain  # noqa: E402

RECIPE, VIT = train.RECIPES["paper"], CLIPConfig()
QUERIES = 25                 # of each episode at once, as in train.py


# ---------------------------------------------------------------------------------------------------- counted

OURS = tuple(str(REPO / f"{name}.py") for name in ("atha", "clip_min", "data", "train"))
NO_KERNEL = {"detach", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty",
             "new_empty_strided"}
PICKS = {"gather", "index", "embedding", "index_select"}        # read as much as they write, not all
TENSORS_A_KERNEL = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}         # of operations on so many lists


class GPUPaths(TorchFunctionMode):
    """Calls that PyTorch itself decides by the device, for tensors without numbers as for CUDA's.

    Raises HostError where a tensor of the device is made of numbers of the host, while `count` is on.
    """

    def __init__(self, count: Count):
        super().__init__()
        self.count = count

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout and args[0].is_meta:
            p, training = kwargs.get("p", 0.5), kwargs.get("training", True)
            return torch.native_dropout(args[0], p, True)[0] if training and p else args[0]
        if function is F.scaled_dot_product_attention and args[0].is_meta:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(*args, 0.0, kwargs.get("is_causal", False))[0]
        if function in (torch.tensor, torch.as_tensor) and self.count.on and not isinstance(args[0], Tensor):
            if torch.device(kwargs.get("device") or "cpu").type == "meta":
                raise HostError(f"{args[0]!r} is copied to the device")
        return function(*args, **kwargs)


@contextlib.contextmanager
def as_gpu(count: Count) -> Iterator[None]:
    """Within: tensors on "meta" say that they are CUDA's, PyTorch believes it, and count counts."""
    def devices() -> list[str]:
        return ["cuda", "meta"]
    known = [(module, f"_get_{kind}_kernels_supported_devices") for kind in ("foreach", "fused")
             for module in (_foreach_utils, adam, optimizer)]
    saved = [(module, name, getattr(module, name)) for module, name in known if hasattr(module, name)]
    for module, name, _ in saved:
        setattr(module, name, devices)
    torch.Tensor.is_cuda = property(lambda tensor: tensor.is_meta)
    try:
        with count, GPUPaths(count):
            yield
    finally:
        del torch.Tensor.is_cuda                                 # the one that it inherits
        for module, name, function in saved:
            setattr(module, name, function)


class HostError(AssertionError):
    """The device waits for the host, or gets something from it."""


class Count(TorchDispatchMode):
    """While `on`: kernels, FLOP and bytes moved, by the function of ours (or the module) that asks for them.

    Raises HostError at a synchronisation with the host, a copy from or to it, and a mix of devices.
    """

    def __init__(self):
        super().__init__()
        self.on = False
        self.rows = defaultdict(lambda: [0, 0, 0])               # place -> kernels, FLOP, bytes
        self.places = {}                                         # autograd's number of a node -> place

    def total(self) -> tuple[int, float, float]:
        """Kernels, TFLOP, GB."""
        kernels, flop, moved = map(sum, zip(*self.rows.values()))
        return kernels, flop / 1e12, moved / 1e9

    def place(self) -> str:
        node = torch._C._current_autograd_node()
        if node:
            return self.places.get(node._sequence_nr(), "autograd") + ", backward"
        frame = sys._getframe(2)
        while frame:
            code = frame.f_code
            file = code.co_filename
            module = "torch/nn/modules" in file and not code.co_name.startswith("_")
            if module or file.startswith(OURS) or "torch/optim" in file:
                owner = frame.f_locals.get("self")
                name = f"{type(owner).__name__}.{code.co_name}" if owner is not None else code.co_name
                self.places[torch.autograd._get_sequence_nr() - 1] = name
                return name
            frame = frame.f_back
        return "elsewhere"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.split("::")[1]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name == "_local_scalar_dense" and inputs[0].is_meta:
            if self.on:
                raise HostError("the host waits for a number of the device")
            return False                                         # asked before the steps: is anything wrong
        out = function(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        devices = {x.device.type for x in inputs if x.dim() or x.is_meta} | {x.device.type for x in made}
        if not self.on or "meta" not in devices:
            return out
        if len(devices) > 1:
            raise HostError(f"{name} with tensors on {' and '.join(sorted(devices))}")
        place = self.place()                                     # of views too: their backward is none
        if name in NO_KERNEL or function.is_view:
            return out
        moved = sum(map(self.size, {id(x): x for x in inputs}.values())) + sum(map(self.size, made))
        if name in PICKS:
            moved = 2 * sum(map(self.size, made))
        formula = flop_registry.get(function._overloadpacket, lambda *_, **__: 0)
        flop = formula(*args, **kwargs, out_val=out)
        kernels = 1
        if name.startswith(("_foreach", "_fused")):
            lists = sum(isinstance(x, list) and len(x) == len(args[0]) for x in args)
            kernels = ceil(len(args[0]) / TENSORS_A_KERNEL[min(lists, 4)])
        bound_by_arithmetic = "flash" in name or flop > 100 * moved
        counted = kernels, flop, 0 if bound_by_arithmetic else moved
        self.rows[place] = [a + b for a, b in zip(self.rows[place], counted)]
        return out

    @staticmethod
    def size(x: Tensor) -> int:
        """Bytes of its elements; what is expanded counts once."""
        count = 1
        for length, stride in zip(x.shape, x.stride()):
            count *= length if stride else 1
        return count * x.element_size()


def counted(method: str, recipe: str = "paper", episodes: int = 1, shot: int = 1, way: int = 5,
            config: CLIPConfig = VIT, dtype: torch.dtype = torch.bfloat16, **changes) -> tuple[Count, Count]:
    """One training step, with its pictures' augmentation, and one evaluation of QUERIES an episode.

    The step counted is the second of three, in which SVL and RA act. changes: of the recipe.
    """
    r = replace(train.recipe_for(recipe, method, shot), steps=3, extra_share=1.0, **changes)
    with torch.device("meta"):
        clip = CLIP(config)
    clip = clip.to("meta", dtype)                                # rotary positions are numbers until here
    clip.trim = lambda token_ids: token_ids                      # where the texts end is told by `class_rows`
    size, step, evaluation = config.image, Count(), Count()
    support = torch.arange(way * shot).expand(episodes, -1)
    token_ids = torch.zeros(episodes, way, 10, dtype=torch.int64, device="meta")

    def told(number: int) -> None:
        step.on = number == 1
    with as_gpu(step):
        batches = Batches(
            torch.zeros(way * shot, 3, 256, 256, dtype=torch.uint8), support, support // shot, size=size,
            steps=r.steps, seeds=range(episodes), augment=r.augment, minibatch=r.minibatch, area=r.crop_area,
            bicubic=r.bicubic, device="meta", told=told,
        )
        learner = train.adapt(clip, *batches.plain(0), token_ids, method, r, batches=batches)
    with as_gpu(evaluation):
        images = torch.empty(episodes, QUERIES, 3, 256, 256, dtype=torch.uint8, device="meta")
        learner.text_and_hook                                    # the class texts, once
        evaluation.on = True
        learner.logits(learner.prepare(images))
    return step, evaluation


def print_counts(methods: list[str], recipe: str) -> None:
    """A table of methods, at E = 1 and what each further episode adds; then where the first's step goes."""
    print(f"one training step (5 pictures an episode) and one evaluation ({QUERIES}), ViT-B/16, bfloat16,\n"
          f"{recipe} recipe, counted as a GPU would run it; + what one more episode adds\n")
    print("| method | kernels | TFLOP | GB moved | evaluation: kernels | TFLOP | GB |\n|" + "---|" * 7)
    for method in methods:
        pairs = zip(counted(method, recipe), counted(method, recipe, episodes=2))
        cells = [f"{one:.{digits}f} + {two - one:.{digits}f}" for alone, both in pairs
                 for one, two, digits in zip(alone.total(), both.total(), (0, 3, 2))]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)
    print(f"\n| where, in a step of {methods[0]} | kernels | GFLOP | MB |\n|---|---|---|---|")
    rows = counted(methods[0], recipe)[0].rows
    for place, (kernels, flop, moved) in sorted(rows.items(), key=lambda row: -row[1][2]):
        print(f"| {place} | {kernels} | {flop / 1e9:.2f} | {moved / 1e6:.1f} |")


# ------------------------------------------------------------------------------------------------------ timed

def flops(c: CLIPConfig) -> int:
    """Floating-point operations of the vision tower for one picture, two a multiply-add."""
    patches, width = (c.image // c.patch) ** 2, c.vision_width
    products, attention = 24 * (patches + 1) * width ** 2, 4 * (patches + 1) ** 2 * width
    ends = 2 * patches * 3 * c.patch ** 2 * width + 2 * width * c.embed
    return c.vision_layers * (products + attention) + ends


def class_rows(episodes: int, way: int, device: torch.device) -> Tensor:
    """Token rows (E, way, 10), as long as those of the prompts."""
    ids = torch.randint(VIT.vocab - 2, (episodes, 1, 9), device=device).repeat(1, way, 1)
    ids[..., -1] = torch.arange(way, device=device)                                # the class
    return F.pad(ids, (0, 1), value=VIT.vocab - 1)


class Clock:
    """Marks, by CUDA events or the host's time; `laps` gives the seconds from each to the next."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []

    def mark(self, wait: bool = False) -> None:
        if not self.cuda:
            self.marks.append(time.perf_counter())
            return
        if wait:
            torch.cuda.synchronize()
        event = torch.cuda.Event(enable_timing=True)
        self.marks.append(torch.cuda.current_stream().record_event(event))

    def laps(self) -> list[float]:
        if not self.cuda:
            return [b - a for a, b in pairwise(self.marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(self.marks)]

    def time(self, call: Callable, repeats: int) -> float:
        """Seconds of a call, after as many that do not count."""
        for _ in range(2 * repeats):
            self.mark()
            call()
        self.mark()
        return median(self.laps()[repeats:])


class Bench:
    def __init__(self, args: argparse.Namespace, precision: str):
        self.device, self.dtype, self.compile = args.device, getattr(torch, precision), args.compile
        self.cuda = args.device.type == "cuda"
        self.repeats, self.warm = args.repeats or (10 if self.cuda else 3), 3 if self.cuda else 1
        self.clip, n = CLIP(VIT).to(self.device, self.dtype), 8192 if self.cuda else 2048
        a, b = torch.randn(2, n, n, device=self.device).to(self.dtype)
        taken = Clock(self.device).time(lambda: a @ b, 20 if self.cuda else 5)
        self.peak = 2 * n ** 3 / taken                                             # FLOP a second

    def train(self, method: str, episodes: int, way: int, shot: int, steps: int,
              **changes) -> tuple[train.Learner, float, list[float]]:
        """Adapt to random pictures as train.py does: the learner, seconds before the steps, and of each."""
        recipe, clock = replace(RECIPE, steps=self.warm + steps, **changes), Clock(self.device)
        pool = torch.randint(256, (way * shot, 3, 256, 256), dtype=torch.uint8)
        support = torch.arange(way * shot).expand(episodes, -1)

        def told(step: int) -> None:
            if step == 0:
                del clock.marks[1:]
            clock.mark()
        clock.mark()
        batches = Batches(pool, support, support // shot, size=VIT.image, steps=recipe.steps,
                          seeds=range(episodes), augment=recipe.augment, device=self.device, told=told)
        rows = class_rows(episodes, way, self.device)
        learner = train.adapt(self.clip, *batches.plain(0), rows, method, recipe, batches=batches,
                              compile=self.compile)
        clock.mark()
        before, *laps = clock.laps()
        return learner, before, laps[self.warm:]

    def growth(self) -> dict[int, list[tuple[float, int, float]]]:
        """Print how speed grows with E and way x shot; by shot of 5 ways (pictures/s, E, seconds before)."""
        found, rate = {1: [], 5: []}, float("inf")
        head = "| way x shot | E | pictures a step | ms a step | pictures/s | share of peak | memory, GB |\n|"
        print("\n" + head + "---|" * 7)
        for way, shot in ((5, 1), (10, 1), (5, 5), (10, 5)):
            on_cpu = (1, 2, 4) if way * shot == 5 else (1,)
            for episodes in (1, 4, 16, 64, 128, 256) if self.cuda else on_cpu:
                pictures, laps = episodes * way * shot, []
                if self.cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                fits = self.cuda or pictures <= train.pictures_at_once(self.clip, self.device)
                with contextlib.suppress(torch.cuda.OutOfMemoryError):
                    if fits and pictures < 20 * rate:
                        _, before, laps = self.train("clip-lora", episodes, way, shot, self.repeats)
                if not laps:
                    print(f"| {way} x {shot} | {episodes} | {pictures} | too large or too slow here | | | |")
                    break
                memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                memory = torch.cuda.max_memory_allocated() if self.cuda else memory
                rate = pictures / median(laps)
                found[shot] += [(rate, episodes, before)] if way == 5 else []
                share = 200 * rate * flops(VIT) / self.peak
                print(f"| {way} x {shot} | {episodes} | {pictures} | {1000 * median(laps):.1f} | "
                      f"{rate:.4g} | {share:.0f} % | {memory / 1e9:.1f} |", flush=True)
        return found

    def methods(self, names: list[str], episodes: int) -> None:
        """Print the cost of methods in turns with clip-lora's, which comes twice: how far off it may be."""
        names, extra = ["clip-lora", "clip-lora", *names], {"SVL", "RA", "LV"}
        turns = [[median(self.train(name, episodes, 5, 1, 3, extra_share=1.0)[2]) for name in names]
                 for _ in range(self.repeats)]
        print(f"\n| 5 x 1, E = {episodes} | cost of a step |\n|---|---|")
        for name, *ratios in zip(names, *[[cost / turn[0] for cost in turn] for turn in turns]):
            acts_early = extra & {part.__name__ for part in train.parts_of(name)}
            share = RECIPE.extra_share if acts_early else 1.0
            print(f"| {name} | {1 - share + share * median(ratios):.3f} |", flush=True)

    def peer(self) -> tuple[float, float]:
        """Seconds of a step of ours and of one by transformers and peft: 5 pictures as they are, in turns."""
        from peft import LoraConfig, get_peft_model
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
        vit = CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                               num_attention_heads=12, image_size=224, patch_size=16, projection_dim=512)
        lora = LoraConfig(r=16, lora_alpha=8, use_rslora=True, lora_dropout=0.25,
                          target_modules=["q_proj", "k_proj", "v_proj"])
        model = CLIPVisionModelWithProjection(vit).to(self.device, self.dtype)
        model = get_peft_model(model, lora).train()
        learned = [p for p in model.parameters() if p.requires_grad]
        adamw = torch.optim.AdamW(learned, lr=RECIPE.lr, weight_decay=RECIPE.weight_decay, fused=True)
        images = torch.randn(1, 5, 3, VIT.image, VIT.image, device=self.device)
        labels = torch.arange(5, device=self.device)[None]
        texts = F.normalize(torch.randn(5, VIT.embed, device=self.device), dim=-1)
        clock = Clock(self.device)

        def batches(step: int) -> tuple[Tensor, Tensor]:
            clock.mark(wait=True)                                # neither may hide in the other's queue
            features = model(pixel_values=images[0].to(self.dtype)).image_embeds
            features = F.normalize(features.float(), dim=-1)
            F.cross_entropy(RECIPE.scale * features @ texts.T, labels[0]).backward()
            adamw.step()
            adamw.zero_grad()
            clock.mark(wait=True)
            return images, labels
        recipe = replace(RECIPE, steps=self.warm + 1 + 3 * self.repeats)
        train.adapt(self.clip, images, labels, class_rows(1, 5, self.device), "clip-lora", recipe,
                    batches=batches, compile=self.compile)
        laps = clock.laps()[2 * self.warm + 2:]                  # adapt asks once more before it starts
        return median(laps[1::2]), median(laps[::2])


def parse() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--count", action="store_true", help="count kernels, FLOP and traffic of a step; nothing is timed")
    add("--recipe", choices=list(train.RECIPES), default="paper", help="of what is counted (default paper)")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="default cuda where there is one, else cpu")
    add("--precision", choices=["float32", "bfloat16"],
        help="default bfloat16 on CUDA, else float32; beside the peer, both")
    add("--method", nargs="+", metavar="NAME", default=["atha", "tir", "svl", "atha+tir"],
        help="beside clip-lora (default atha tir svl atha+tir)")
    add("--repeats", type=int, metavar="N", help="steps that a figure is the median of, three times as many "
        "beside the peer (default 10 on CUDA, else 3)")
    add("--compile", action="store_true", help="torch.compile our blocks")
    add("--peer", action="store_true", help="the same step by transformers with peft, in turns with ours")
    args = parser.parse_args()
    if args.peer and not all(map(importlib.util.find_spec, ("transformers", "peft"))):
        parser.error("--peer needs two packages: pip install transformers peft")
    try:
        all(map(train.parts_of, args.method))
    except train.UsageError as e:
        parser.error(str(e))
    return args


def main() -> None:
    args = parse()
    if args.count:
        print_counts(["clip-lora", *args.method], args.recipe)
        return
    cuda, cpuinfo = args.device.type == "cuda", Path("/proc/cpuinfo")
    said = cpuinfo.read_text() if cpuinfo.exists() else ""
    chips = [torch.cuda.get_device_name()] if cuda else []
    chips.append(re.search(r"model name\s*: (.*)|$", said)[1] or platform.processor())
    print(f"{', '.join(chips)}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    if not cuda:
        train.multiply_fast()                                    # as train.py does, for the peer too
        torch.set_flush_denormal(True)
    precision = args.precision or ("bfloat16" if cuda else "float32")
    bench = Bench(args, precision)
    print(f"ViT-B/16 in {precision}, {flops(VIT) / 1e9:.1f} GFLOP a picture; matrix products reach "
          f"{bench.peak / 1e12:.3g} TFLOP/s")
    bench.train("clip-lora", 1, 5, 1, 1)                         # what is set up but once
    found = bench.growth()
    rate, episodes, _ = max(found[1])
    print(f"\nE = {episodes} trains {rate / found[1][0][0]:.1f} x as many pictures a second as E = 1")
    at_once = min(episodes, 64)
    learner = bench.train("clip-lora", at_once, 5, 1, 1)[0]
    query = torch.randint(256, (at_once, QUERIES, 3, 256, 256), dtype=torch.uint8, device=args.device)
    taken = Clock(args.device).time(lambda: learner.logits(plain(query, VIT.image)), bench.repeats)
    queries = QUERIES * at_once / taken
    share = 100 * queries * flops(VIT) / bench.peak
    print(f"evaluation: {queries:.4g} pictures/s, {share:.0f} % of the peak")
    for shot, total in ((1, 800), (5, 400)):
        for rate, at_once, before in sorted(found[shot])[-1:]:
            minutes = total / 60 * (before / at_once + RECIPE.steps * 5 * shot / rate + 75 / queries)
            print(f"a {shot}-shot row, {total} episodes {at_once} at a time, is projected to take "
                  f"{minutes:.1f} minutes")
    bench.methods(args.method, min(episodes, 64) if cuda else 1)
    for name in ([args.precision] if args.precision else ["float32", "bfloat16"]) if args.peer else []:
        ours, theirs = Bench(args, name).peer()
        print(f"\n{name}, 5 pictures a step: ours {1000 * ours:.1f} ms, transformers with peft "
              f"{1000 * theirs:.1f} ms, ratio {ours / theirs:.3f}", flush=True)


if __name__ == "__main__":
    main()
