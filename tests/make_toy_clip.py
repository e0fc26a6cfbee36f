"""Train the toy CLIP on clean coloured shapes: python tests/make_toy_clip.py [FILE]

CLIP's contrastive idea with a closed set of captions: each picture against one text a class, in three
wordings. FILE is toy_clip.safetensors beside this, if none is given.
"""
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from clip_min import CLIP, CLIPConfig, Tokenizer, save  # noqa: E402
from data import plain  # noqa: E402
from toy_world import TOY_CLASSES, toy_pictures  # noqa: E402

CONFIG = CLIPConfig(embed=64, image=48, patch=8, vision_width=128, vision_layers=4,
                    text_width=64, text_layers=2, context=40, vocab=514)
PROMPTS = ["a photo of a {}.", "a picture of a {}.", "a {}."]
STEPS, BATCH, RATE = 3000, 64, 1e-3


def encode(clip: CLIP, pictures: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> (B, embed) of unit length."""
    return F.normalize(clip.encode_image(plain(pictures, CONFIG)), dim=-1)


def train() -> CLIP:
    torch.manual_seed(0)
    torch.set_num_threads(2)                                           # other numbers round differently
    clip, tokenizer = CLIP(CONFIG), Tokenizer([])
    torch.nn.init.normal_(clip.visual.positional_embedding, std=0.5)   # CLIP's is faint beside strong colours
    token_ids = tokenizer([p.format(c) for c in TOY_CLASSES for p in PROMPTS], CONFIG.context)
    drawn = [toy_pictures(100, seed, "source") for seed in range(1000, 1020)]
    pictures, labels = map(torch.cat, zip(*drawn))
    optimiser = torch.optim.AdamW(clip.parameters(), RATE, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, STEPS, pct_start=0.1)
    start = time.perf_counter()
    for step in range(STEPS):
        pick = torch.randint(len(labels), (BATCH,))
        image = encode(clip, pictures[pick])                                             # (B, embed)
        text = F.normalize(clip.encode_text(token_ids), dim=-1)                          # (N * P, embed)
        logits = (clip.logit_scale.exp() * image @ text.T).unflatten(1, (-1, len(PROMPTS)))   # (B, N, P)
        loss = F.cross_entropy(logits, labels[pick, None].expand(-1, len(PROMPTS)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1:5d}  loss {loss:.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    return clip


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("toy_clip.safetensors"))
    weights = {name: tensor.half() for name, tensor in train().state_dict().items()}
    save(weights, target, {"config": json.dumps(asdict(CONFIG)), "merges": ""})
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")
