"""Train the toy CLIP on clean coloured shapes: python tests/make_toy_clip.py [FILE, default toy_clip.safetensors beside it]

CLIP's contrastive idea with a closed set of captions: each picture against one text for every class, in three wordings.
"""
import json, sys, time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from clip_min import CLIP, MEAN, STD, CLIPConfig, Tokenizer, load, save
from data import TOY_CLASSES, toy_pictures

CONFIG = CLIPConfig(embed=64, image=48, patch=8, vision_width=128, vision_layers=4,
                    text_width=64, text_layers=2, context=40, vocab=514)
PROMPTS = ["a photo of a {}.", "a picture of a {}.", "a {}."]
STEPS, BATCH, RATE = 3000, 64, 1e-3


def encode(clip: CLIP, pictures: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> (B, embed) of unit length."""
    return F.normalize(clip.encode_image(normalize(pictures / 255, MEAN, STD)), dim=-1)


def train() -> CLIP:
    torch.manual_seed(0)
    torch.set_num_threads(2)                                               # other numbers round differently
    clip, tokenizer = CLIP(CONFIG), Tokenizer([])
    torch.nn.init.normal_(clip.visual.positional_embedding, std=0.5)       # CLIP's own is faint beside strong colours
    token_ids = tokenizer([p.format(c) for c in TOY_CLASSES for p in PROMPTS], CONFIG.context)         # (N·P, context)
    pictures, labels = map(torch.cat, zip(*(toy_pictures(100, seed, "source") for seed in range(1000, 1020))))
    optimiser = torch.optim.AdamW(clip.parameters(), RATE, (0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, STEPS, pct_start=0.1)
    start = time.perf_counter()
    for step in range(STEPS):
        pick = torch.randint(len(labels), (BATCH,))
        image = encode(clip, pictures[pick])                                                                   # (B, embed)
        text = F.normalize(clip.encode_text(token_ids), dim=-1)                                                # (N·P, embed)
        logits = (clip.logit_scale.exp() * image @ text.T).unflatten(1, (-1, len(PROMPTS)))                    # (B, N, P)
        loss = F.cross_entropy(logits, labels[pick, None].expand(-1, len(PROMPTS)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1:5d}  loss {loss:.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    return clip


@torch.no_grad()
def report(path: Path, trials: int = 500) -> None:
    """Zero-shot accuracy, and nearest-centroid accuracy of the image features, on pictures not trained on."""
    clip, tokenizer = load(path)
    text = F.normalize(clip.encode_text(tokenizer([PROMPTS[0].format(c) for c in TOY_CLASSES], CONFIG.context)), dim=-1)
    for domain in ("source", "target"):
        pictures, labels = toy_pictures(200, 1, domain)
        image = torch.cat([encode(clip, part) for part in pictures.split(400)])                                # (N·200, embed)
        generator, totals = torch.Generator().manual_seed(0), torch.zeros(3)
        for _ in range(trials):
            classes = torch.randperm(len(TOY_CLASSES), generator=generator)[:5]
            shots = image.view(len(TOY_CLASSES), 200, -1)[classes][:, torch.randperm(200, generator=generator)]
            for i, centre in enumerate((text[classes], shots[:, 0], shots[:, :5].mean(1))):                   # (5, embed)
                found = (shots[:, 5:] @ F.normalize(centre, dim=-1).T).argmax(-1)                              # (5, 195)
                totals[i] += (found == torch.arange(5)[:, None]).float().mean() / trials
        right = ((image @ text.T).argmax(-1) == labels).float().mean()
        print(f"{domain}: zero-shot {right:.1%} {len(TOY_CLASSES)}-way, {totals[0]:.1%} 5-way; "
              f"nearest centroid 5-way {totals[1]:.1%} at 1 shot, {totals[2]:.1%} at 5")


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("toy_clip.safetensors"))
    weights = {name: tensor.half() for name, tensor in train().state_dict().items()}
    save(weights, target, {"config": json.dumps(asdict(CONFIG)), "merges": ""})
    print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")
    report(target)
