"""How fast it is here: ViT-B/16 at full size with random weights (speed does not depend on them), through train.adapt itself.

    python tests/bench.py --peer      without --peer it needs no transformers and peft

Figures are medians after warm-up; what is compared is run in turns. A step lasts from one call of adapt's `batches` to
the next. E episodes train at once. FLOP a picture: forward; in training twice that, as frozen weights need no gradient.
"""
import argparse, contextlib, importlib.util, os, platform, re, resource, sys, time
from dataclasses import replace
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

RECIPE, VIT = train.RECIPES["paper"], CLIPConfig()


def flops(c: CLIPConfig) -> int:
    """Floating-point operations of the vision tower for one picture, two a multiply-add."""
    patches, width = (c.image // c.patch) ** 2, c.vision_width
    block = 24 * (patches + 1) * width ** 2 + 4 * (patches + 1) ** 2 * width       # q, k, v, out and the MLP; scores and what they weigh
    return c.vision_layers * block + 2 * patches * 3 * c.patch ** 2 * width + 2 * width * c.embed


def class_rows(episodes: int, way: int, device: torch.device) -> Tensor:
    """Token rows (E, way, 10), as long as those of the prompts."""
    return F.pad(torch.randint(VIT.vocab - 2, (episodes, way, 9), device=device), (0, 1), value=VIT.vocab - 1)


class Clock:
    """Marks, by CUDA events or the host's time; `laps` gives the seconds from each to the next."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []

    def mark(self, wait: bool = False) -> None:
        if self.cuda and wait:
            torch.cuda.synchronize()
        self.marks.append(torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)) if self.cuda else time.perf_counter())

    def laps(self) -> list[float]:
        if self.cuda:
            torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairwise(self.marks)]

    def time(self, call, repeats: int) -> float:
        """Seconds of a call, after as many that do not count."""
        for _ in range(2 * repeats):
            self.mark(), call()
        self.mark()
        return median(self.laps()[repeats:])


class Bench:
    def __init__(self, args: argparse.Namespace, precision: str):
        self.device, self.dtype, self.compile, self.cuda = args.device, getattr(torch, precision), args.compile, args.device.type == "cuda"
        self.repeats, self.warm = args.repeats or (10 if self.cuda else 3), 3 if self.cuda else 1
        self.clip, n = CLIP(VIT).to(self.device, self.dtype), 8192 if self.cuda else 2048
        a, b = torch.randn(2, n, n, device=self.device).to(self.dtype)
        self.peak = 2 * n ** 3 / Clock(self.device).time(lambda: a @ b, 20 if self.cuda else 5)      # FLOP a second

    def train(self, method: str, episodes: int, way: int, shot: int, steps: int, **changes) -> tuple[train.Learner, float, list[float]]:
        """Adapt to random pictures as train.py does: the learner, the seconds before its first step, and of each step."""
        recipe, clock = replace(RECIPE, steps=self.warm + steps, **changes), Clock(self.device)
        support = torch.randint(256, (episodes, way * shot, 3, 256, 256), dtype=torch.uint8, device=self.device)
        labels = torch.arange(way, device=self.device).repeat_interleave(shot).expand(episodes, -1)
        clock.mark()
        still, draw = support_batches(support, labels, recipe.augment, recipe.steps, VIT.image, range(episodes))

        def batches(step: int) -> tuple[Tensor, Tensor]:
            if step == 0:
                del clock.marks[1:]                                                # adapt asks once more before it starts
            clock.mark()
            return draw(step)
        learner = train.adapt(self.clip, still, labels, class_rows(episodes, way, self.device), method, recipe, batches=batches, compile=self.compile)
        clock.mark()
        before, *laps = clock.laps()
        return learner, before, laps[self.warm:]

    def growth(self) -> dict[int, list[tuple[float, int, float]]]:
        """Print how speed grows with E and way x shot; returns, by shot of 5 ways, (pictures a second, E, seconds before the first step)."""
        found, rate = {1: [], 5: []}, float("inf")
        print("\n| way x shot | E | pictures a step | ms a step | pictures/s | share of peak | peak memory, GB |\n|" + "---|" * 7)
        for way, shot in ((5, 1), (10, 1), (5, 5), (10, 5)):
            for episodes in (1, 4, 16, 64, 128, 256) if self.cuda else (1, 2, 4) if way * shot == 5 else (1,):
                pictures, laps = episodes * way * shot, []
                if self.cuda:
                    torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
                with contextlib.suppress(torch.cuda.OutOfMemoryError):
                    if pictures < 20 * rate and (self.cuda or pictures <= train.pictures_at_once(self.clip, self.device)):
                        _, before, laps = self.train("clip-lora", episodes, way, shot, self.repeats)
                if not laps:
                    print(f"| {way} x {shot} | {episodes} | {pictures} | too large or too slow here | | | |")
                    break
                memory = torch.cuda.max_memory_allocated() if self.cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                rate = pictures / median(laps)
                found[shot] += [(rate, episodes, before)] if way == 5 else []
                print(f"| {way} x {shot} | {episodes} | {pictures} | {1000 * median(laps):.1f} | {rate:.4g} | {200 * rate * flops(VIT) / self.peak:.0f} % | {memory / 1e9:.1f} |", flush=True)
        return found

    def methods(self, names: list[str], episodes: int) -> None:
        """Print the cost of methods in turns with clip-lora's; the second clip-lora shows how far a figure may be off."""
        names = ["clip-lora", "clip-lora", *names]
        turns = [[median(self.train(name, episodes, 5, 1, 3, extra_share=1.0)[2]) for name in names] for _ in range(self.repeats)]
        print(f"\n| 5 x 1, E = {episodes} | cost of a step |\n|---|---|")
        for name, *ratios in zip(names, *[[cost / turn[0] for cost in turn] for turn in turns]):
            share = RECIPE.extra_share if train.switches(name) & {"svl", "ra"} else 1.0              # SVL and RA act in the first steps only
            print(f"| {name} | {1 - share + share * median(ratios):.3f} |", flush=True)

    def peer(self) -> tuple[float, float]:
        """Seconds of a step of ours and of one by transformers and peft: one episode, 5 pictures without augmentation, in turns."""
        from peft import LoraConfig, get_peft_model
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
        vit = CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=16, projection_dim=512)
        lora = LoraConfig(r=16, lora_alpha=8, use_rslora=True, lora_dropout=0.25, target_modules=["q_proj", "k_proj", "v_proj"])
        model = get_peft_model(CLIPVisionModelWithProjection(vit).to(self.device, self.dtype), lora).train()
        adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RECIPE.lr, weight_decay=RECIPE.weight_decay, fused=True)
        images, labels = torch.randn(1, 5, 3, VIT.image, VIT.image, device=self.device), torch.arange(5, device=self.device)[None]
        texts, clock = F.normalize(torch.randn(5, VIT.embed, device=self.device), dim=-1), Clock(self.device)

        def batches(step: int) -> tuple[Tensor, Tensor]:
            clock.mark(wait=True)                                                  # neither may hide in the other's queue
            features = F.normalize(model(pixel_values=images[0].to(self.dtype)).image_embeds.float(), dim=-1)
            F.cross_entropy(RECIPE.scale * features @ texts.T, labels[0]).backward()
            adamw.step()
            adamw.zero_grad()
            clock.mark(wait=True)
            return images, labels
        train.adapt(self.clip, images, labels, class_rows(1, 5, self.device), "clip-lora", replace(RECIPE, steps=self.warm + 1 + 3 * self.repeats),
                    batches=batches, compile=self.compile)
        laps = clock.laps()[2 * self.warm + 2:]                                    # adapt asks once more before it starts
        return median(laps[1::2]), median(laps[::2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu", help="default cuda where there is one, else cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="default bfloat16 on CUDA, else float32; beside the peer, both")
    parser.add_argument("--method", nargs="+", metavar="NAME", default=["atha", "tir", "svl", "atha+tir"], help="to compare with clip-lora (default atha tir svl atha+tir)")
    parser.add_argument("--repeats", type=int, metavar="N", help="steps that a figure is the median of, three times as many beside the peer (default 10 on CUDA, else 3)")
    parser.add_argument("--compile", action="store_true", help="torch.compile our blocks")
    parser.add_argument("--peer", action="store_true", help="the same step by transformers with peft, in turns with ours")
    args = parser.parse_args()
    if args.peer and not all(map(importlib.util.find_spec, ("transformers", "peft"))):
        parser.error("--peer needs two packages: pip install transformers peft")
    if not all(map(train.METHODS.get, "+".join(args.method).split("+"))):
        parser.error(f"--method takes {', '.join(list(train.METHODS)[1:])}, or some joined with +")
    cuda, cpuinfo = args.device.type == "cuda", Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)|$", cpuinfo.read_text() if cpuinfo.exists() else "")[1] or platform.processor()
    print(f"{torch.cuda.get_device_name() + ', ' if cuda else ''}{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    if not cuda:
        train.multiply_fast()
    bench = Bench(args, precision := args.precision or ("bfloat16" if cuda else "float32"))
    print(f"ViT-B/16 in {precision}, {flops(VIT) / 1e9:.1f} GFLOP a picture; matrix products reach {bench.peak / 1e12:.3g} TFLOP/s")
    bench.train("clip-lora", 1, 5, 1, 1)                                           # what is set up but once
    found = bench.growth()
    rate, episodes, _ = max(found[1])
    print(f"\nE = {episodes} trains {rate / found[1][0][0]:.1f} x as many pictures a second as E = 1")
    learner, *_ = bench.train("clip-lora", at_once := min(episodes, 64), 5, 1, 1)
    query = torch.randint(256, (at_once, 25, 3, 256, 256), dtype=torch.uint8, device=args.device)     # 25 of each at once, as in train.py
    queries = 25 * at_once / Clock(args.device).time(lambda: learner.logits(plain(query, VIT.image)), bench.repeats)
    print(f"evaluation: {queries:.4g} pictures/s, {100 * queries * flops(VIT) / bench.peak:.0f} % of the peak")
    for shot, total in ((1, 800), (5, 400)):
        for rate, at_once, before in sorted(found[shot])[-1:]:
            minutes = total / 60 * (before / at_once + RECIPE.steps * 5 * shot / rate + 75 / queries)
            print(f"a {shot}-shot row, {total} episodes {at_once} at a time, is projected to take {minutes:.1f} minutes")
    bench.methods(args.method, min(episodes, 64) if cuda else 1)
    for name in ([args.precision] if args.precision else ["float32", "bfloat16"]) if args.peer else []:
        ours, theirs = Bench(args, name).peer()
        print(f"\n{name}, 5 pictures a step: ours {1000 * ours:.1f} ms, transformers with peft {1000 * theirs:.1f} ms, ratio {ours / theirs:.3f}", flush=True)


if __name__ == "__main__":
    main()
