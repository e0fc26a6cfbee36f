"""CLIP, PE-Core and SigLIP by hand: towers, tokenizers, weights. Needs torch and safetensors.

    clip, tokenizer = load()                                   # OpenAI's ViT-B/16, fetched once
    image = clip.encode_image(images)                          # (B, 3, 224, 224) normalised -> (B, 512)
    text = clip.encode_text(tokenizer(["a photo of a cat."]))  # (N, 77) -> (N, 512)

    python clip_min.py classify cat.jpg "a cat" "a dog"
    python clip_min.py convert ViT-B-16.pt vit-b-16.safetensors

Parameter names are OpenAI's, but for the attention's input projection, which is split into q, k and v so that
an adapter can wrap each. Sources: Radford et al. 2021 (CLIP), Bolya et al. 2025 (PE-Core), Tschannen et al.
2025 (SigLIP 2), their weights. Reading pictures takes torchvision, SigLIP's text the package tokenizers.
"""
from __future__ import annotations

import argparse
import fnmatch
import gzip
import hashlib
import html
import json
import math
import os
import re
import socket
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

try:
    import fcntl
except ImportError:                      # Windows: processes that start at once may fetch the same file twice
    fcntl = None

class WeightsError(Exception):
    """Weights that cannot be had or used; the message is one line for the user."""


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Whatever goes wrong inside is a WeightsError of one line: what, then why."""
    try:
        yield
    except Exception as e:                     # what damaged files, servers and packages raise is manifold
        why = str(e) if isinstance(e, WeightsError) else f"{type(e).__name__}: {e}"
        if isinstance(e, (LookupError, TypeError, AttributeError, ArithmeticError)):    # of our own reading
            why = f"it is damaged, or not of a kind that is read here ({why})"
        raise WeightsError(textwrap.shorten(f"{what}: {why}", 500)) from e


def say(text: str) -> None:
    """A line on stderr, if anybody can hear it."""
    with suppress(AttributeError, OSError, ValueError):                  # None, full, closed
        sys.stderr.write(f"{text}\n")


def ordinary(path: str | Path) -> Path:
    """The path, if an ordinary file is there: a device or a pipe may never end. Raises WeightsError."""
    if not os.path.isfile(path):
        raise WeightsError(f"there is no ordinary file {path}")
    return Path(path)


# ------------------------------------------------------------------------------------------------------ model

# CLIPConfig, then the parts from small to large: Attention, MLP, Block, Transformer, VisionTransformer, CLIP.
# All three families are these classes; where they differ stands in the constructors of the last two.
MEAN = (0.48145466, 0.4578275, 0.40821073)    # of an RGB picture in 0..1, as CLIP takes it
STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
OPENAI_VOCAB = 49408
ACTIVATIONS = {    # (f, a) by Hugging Face's names: the activation of y is f(a·y) / a
    "quick_gelu": (F.silu, 1.702),    # y·sigmoid(1.702 y)
    "gelu": (F.gelu, 1.0),
    "gelu_pytorch_tanh": (partial(F.gelu, approximate="tanh"), 1.0),
}
FAMILIES = {    # what their own models have that differs from CLIPConfig's defaults
    "clip": {},
    "pe-core": {"activation": "gelu", "mean": HALF, "std": HALF},
    "siglip": {"activation": "gelu_pytorch_tanh", "eps": 1e-6, "mean": HALF, "std": HALF},
}

Weights = dict[str, Tensor]                  # by name
Between = Callable[[Tensor, int], Tensor]    # (tokens (B, T, D), layer) -> tokens, called before every block


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers and what else tells backbones apart (default ViT-B/16). An MLP is 4 x width wide.

    Raises WeightsError naming a value that no backbone here has.
    """
    embed: int = 512
    image: int = 224            # pixels a side
    patch: int = 16             # pixels a side
    vision_width: int = 768
    vision_layers: int = 12
    text_width: int = 512
    text_layers: int = 12
    context: int = 77           # tokens in a row of text, start and end included
    vocab: int = OPENAI_VOCAB
    family: str = "clip"        # clip, pe-core or siglip
    activation: str = "quick_gelu"
    eps: float = 1e-5           # of every LayerNorm
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    vision_head: int = 64       # channels of a head
    text_head: int = 64

    def __post_init__(self):
        most = {"vocab": 2 ** 21, "vision_layers": 256, "text_layers": 256}    # of other sizes 2 ** 13
        fits = {
            "patch": self.patch <= self.image <= 256 * self.patch,
            "vision_width": math.gcd(self.vision_width, self.vision_head) == self.vision_head,
            "text_width": math.gcd(self.text_width, self.text_head) == self.text_head,      # whole heads
            "context": self.context > 2,
            "family": self.family in FAMILIES,
            "activation": self.activation in ACTIVATIONS,
            "eps": 0 < self.eps < 1,
            "mean": [0 <= x <= 1 for x in self.mean] == [True] * 3,
            "std": [0 < x <= 1 for x in self.std] == [True] * 3,
        }
        for name, value in vars(self).items():
            size = isinstance(value, int)
            if size and not 0 < value <= most.get(name, 2 ** 13) or not fits.get(name, True):
                raise WeightsError(f"{name} {value!r}: no such backbone is built")

    @classmethod
    def from_weights(cls, weights: Weights) -> CLIPConfig:
        """Family and sizes by the tensors' names and shapes, the rest as the family's own models have it.

        Raises WeightsError, or LookupError or ValueError for tensors that are no backbone's.
        """
        family = "clip"
        if "visual.pool.query" in weights:
            family = "siglip" if "visual.conv1.bias" in weights else "pe-core"
        width, _, patch, _ = weights["visual.conv1.weight"].shape
        patches = len(weights["visual.positional_embedding"]) - (family != "siglip")
        vocab, text_width = weights["token_embedding.weight"].shape
        layers = fnmatch.filter(weights, "visual.transformer.resblocks.*.ln_1.weight")
        text_layers = fnmatch.filter(weights, "transformer.resblocks.*.ln_1.weight")
        return cls(
            embed=weights["text_projection"].shape[1], image=math.isqrt(max(patches, 0)) * patch, patch=patch,
            vision_width=width, vision_layers=len(layers),
            text_width=text_width, text_layers=len(text_layers),
            context=len(weights["positional_embedding"]), vocab=vocab, family=family, **FAMILIES[family],
        )


class Attention(nn.Module):
    """Multi-head attention: x's queries over the keys and values of the context."""

    def __init__(self, width: int, heads: int, causal: bool = False, rope: Tensor | None = None):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.register_buffer("rope", rope, persistent=False)                          # (2, T, C): cos, sin

    def forward(self, x: Tensor, context: Tensor) -> Tensor:                          # (B, T, D), (B, S, D)
        q, k, v = self.q_proj(x), self.k_proj(context), self.v_proj(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, T, C)
        if self.rope is not None:
            q, k = rotate(q, *self.rope), rotate(k, *self.rope)
        if x.is_cuda or self.causal or x.dtype == torch.float32:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:    # bfloat16 on a CPU: 59 ms against 112 ms (12 heads, 5 pictures, both ways, 1 thread)
            scores = q.shape[-1] ** -0.5 * q @ k.mT                                   # (B, heads, T, S)
            y = scores.softmax(-1) @ v
        return self.out_proj(y.transpose(1, 2).flatten(2))                            # (B, T, D)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of neighbouring channels by the token's angles; x (B, heads, T, C), cos and sin (T, C)."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)                    # (a, b) -> (-b, a)
    return x * cos + turned * sin


def rope_2d(grid: int, channels: int) -> Tensor:
    """Cosines and sines (2, 1 + grid², C) of PE-Core's rotary positions: half the channels by x, half by y.

    A token's q and k are turned by angles that grow with its place, so that q·k depends on how far two tokens
    are apart. Patches count from 1; [CLS] stands at the origin, so it is not turned.
    """
    exponent = torch.arange(0, 1, 4 / channels, device="cpu")                     # (C/4,); never on "meta"
    place = torch.arange(1, grid + 1, device="cpu")
    xy = F.pad(torch.cartesian_prod(place, place).flip(1), (0, 0, 1, 0))              # (1+L, 2)
    angle = (xy[:, :, None] * 10000 ** -exponent).flatten(1).repeat_interleave(2, 1)  # (1+L, C)
    return torch.stack([angle.cos(), angle.sin()])


class MLP(nn.Module):
    def __init__(self, width: int, activation: str):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.f, self.a = ACTIVATIONS[activation]

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:                         # both (…, D)
        """residual + c_proj(activation(c_fc(x)))."""
        if {type(self.c_fc), type(self.c_proj)} != {nn.Linear}:                       # an adapter is there
            return residual + self.c_proj(self.f(self.a * self.c_fc(x)) / self.a)
        # The same, but a rides on the first product and 1 / a on the sum: two passes less over (…, 4D)
        y = torch.addmm(self.a * self.c_fc.bias, x.flatten(0, -2), self.c_fc.weight.T, alpha=self.a)
        y = torch.addmm(self.a * self.c_proj.bias, self.f(y), self.c_proj.weight.T)
        return torch.add(residual, y.view_as(x), alpha=1 / self.a)


class Block(nn.Module):
    rows = slice(None)     # tokens given out: all; of the last block the pooled one alone

    def __init__(self, width: int, heads: int, config: CLIPConfig, **how):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width, config.eps), Attention(width, heads, **how)
        self.ln_2, self.mlp = nn.LayerNorm(width, config.eps), MLP(width, config.activation)

    def forward(self, x: Tensor) -> Tensor:                                       # (B, T, D) -> (B, rows, D)
        y = self.ln_1(x)
        x = x[:, self.rows] + self.attn(y[:, self.rows], y)
        return self.mlp(self.ln_2(x), residual=x)


class Transformer(nn.Module):
    """Blocks one after another; how: causal or rope, for their attention."""

    def __init__(self, width: int, heads: int, layers: int, config: CLIPConfig, **how):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, config, **how) for _ in range(layers))

    def forward(self, x: Tensor, between: Between | None = None) -> Tensor:
        for layer, block in enumerate(self.resblocks):
            x = block(x if between is None else between(x, layer))
        return x


class AttentionPool(nn.Module):
    """All tokens to one: a learned query attends to them, then an MLP (PE-Core, SigLIP)."""

    def __init__(self, width: int, heads: int, config: CLIPConfig):
        super().__init__()
        self.query = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.attn = Attention(width, heads)
        self.ln_2, self.mlp = nn.LayerNorm(width, config.eps), MLP(width, config.activation)

    def forward(self, x: Tensor) -> Tensor:                                              # (B, T, D) -> (B, D)
        x = self.attn(self.query.expand(len(x), 1, -1), x)[:, 0]
        return self.mlp(self.ln_2(x), residual=x)


class VisionTransformer(nn.Module):
    """ViT; `between(tokens (B, first_patch + L, D), layer)` may change the tokens before every block.

    CLIP's feature is the last [CLS]; PE-Core and SigLIP pool all tokens by attention. PE-Core turns q and k
    by their places (rope); SigLIP has no [CLS], and its tokens are in the texts' space already.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width, grid = config.vision_width, config.image // config.patch
        heads, std = width // config.vision_head, width ** -0.5
        pe_core, siglip = config.family == "pe-core", config.family == "siglip"
        self.first_patch = 0 if siglip else 1                  # [CLS] stands before the patches
        self.conv1 = nn.Conv2d(3, width, config.patch, config.patch, bias=siglip)
        self.class_embedding = None if siglip else nn.Parameter(std * torch.randn(width))
        self.positional_embedding = nn.Parameter(std * torch.randn(self.first_patch + grid ** 2, width))
        self.ln_pre = nn.Identity() if siglip else nn.LayerNorm(width, config.eps)
        self.ln_post = nn.LayerNorm(width, config.eps)
        rope = rope_2d(grid, config.vision_head) if pe_core else None
        self.transformer = Transformer(width, heads, config.vision_layers, config, rope=rope)
        self.pool = None
        if config.family == "clip":
            self.transformer.resblocks[-1].rows = slice(1)
        else:
            self.pool = AttentionPool(width, 8 if pe_core else heads, config)
        if siglip:
            self.register_buffer("proj", torch.eye(width, device="cpu"), persistent=False)
        else:
            self.proj = nn.Parameter(std * torch.randn(width, config.embed))
        self.proj_bias = nn.Parameter(torch.zeros(config.embed)) if pe_core else None

    def forward(self, images: Tensor, between: Between | None = None) -> Tensor:
        """(B, 3, S, S) normalised by the backbone's mean and std -> (B, embed), not of unit length."""
        x = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)     # (B, L, D)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)             # (B, 1+L, D)
        x = self.transformer(self.ln_pre(x + self.positional_embedding), between)
        x = self.ln_post(x[:, 0]) if self.pool is None else self.pool(self.ln_post(x))    # (B, D)
        return F.linear(x, self.proj.T, self.proj_bias)


class CLIP(nn.Module):
    """A backbone of any family under OpenAI's names of tensors; its images are normalised by mean and std."""
    fingerprint = ""          # of the stored weights, set by `load`: tells whether an adapter belongs to them

    def __init__(self, config: CLIPConfig = CLIPConfig()):
        super().__init__()
        self.config, self.mean, self.std = config, config.mean, config.std
        self.causal = config.family != "siglip"
        self.first_word = int(self.causal)             # after the start token, which SigLIP's rows don't have
        width = config.text_width
        self.visual = VisionTransformer(config)
        self.token_embedding = nn.Embedding(config.vocab, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context, width))
        self.transformer = Transformer(width, width // config.text_head, config.text_layers, config,
                                       causal=self.causal)
        self.ln_final = nn.LayerNorm(width, config.eps)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())                     # natural logarithm
        self.text_bias = self.logit_bias = None
        if not self.causal:
            self.transformer.resblocks[-1].rows = slice(-1, None)
            self.text_bias = nn.Parameter(torch.zeros(config.embed))
            self.logit_bias = nn.Parameter(torch.tensor(-10.0))                       # the same for all texts

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised by mean and std -> (B, embed), not of unit length."""
        return self.visual(images)

    def encode_text(self, token_ids: Tensor, between: Between | None = None) -> Tensor:
        """(N, T) int64, T <= context -> (N, embed), not of unit length. `between` as in the vision tower."""
        x = self.token_embedding(token_ids) + self.positional_embedding[: token_ids.shape[1]]
        return self.read_text(self.transformer(x, between), token_ids)

    def read_text(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """Text feature off any block's output (N, T, D), at the end, the row's highest id (SigLIP: last)."""
        if self.causal:
            x = x.gather(1, token_ids.argmax(-1)[:, None, None].expand(-1, 1, x.shape[-1]))  # (N, 1, D)
        return F.linear(self.ln_final(x[:, -1]), self.text_projection.T, self.text_bias)

    def trim(self, token_ids: Tensor) -> Tensor:
        """Rows (…, T) less the columns that can't change a feature (causal towers: those after the end)."""
        return token_ids[..., : int(token_ids.argmax(-1).max()) + 1] if self.causal else token_ids


# ------------------------------------------------------------------------------------------------- tokenizers

# A tokenizer makes rows of ids of texts. OpenAI's, which all CLIPs and PE-Core take, is written out below;
# SigLIP's is of another kind, so `encode` asks the package tokenizers and the rest stays.
BYTES_ONLY = 514            # ids of a byte-pair vocabulary without a merge


class Tokenizer:
    """OpenAI's byte-pair encoding, lower case, with the standard library only.

    merges: "left right" lines or (left, right) pairs in order of rank, or the path of a merges file; limit:
    how many ids the weights know. Ids: 256 byte symbols, the same at the end of a word (</w>), one for each
    merge, start, end. Raises WeightsError for merges that are none.
    """
    WORDS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\s\w]|_)+")

    def __init__(self, merges: Sequence[str | tuple[str, str]] | str | Path, limit: int | None = None):
        if isinstance(merges, (str, Path)):
            merges = read_merges(merges)
        pairs = [tuple(m.split()) if isinstance(m, str) else tuple(m) for m in merges]
        self.metadata = {"merges": "\n".join(map(" ".join, pairs))}      # what our file keeps of it
        printable = [b for b in range(33, 256) if chr(b).isprintable()]
        others = [b for b in range(256) if b not in printable]
        self.symbol = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        needed = max(limit - BYTES_ONLY, 0) if limit else len(pairs)
        if len(pairs) != needed:
            raise WeightsError(f"{len(pairs)} merges, the weights need {needed}")
        letters = list(self.symbol.values())
        self.vocab = letters + [c + "</w>" for c in letters]
        known = set(self.vocab)
        for pair in pairs:
            if len(pair) != 2 or not known.issuperset(pair):
                raise WeightsError(f"{' '.join(pair)[:80]!r} is not a merge of two known pieces")
            self.vocab.append("".join(pair))
            known.add(self.vocab[-1])
        self.vocab += ["<|startoftext|>", "<|endoftext|>"]
        self.rank = {pair: i for i, pair in enumerate(pairs)}
        self.id = {token: i for i, token in enumerate(self.vocab)}
        self.start, self.end = [len(self.vocab) - 2], len(self.vocab) - 1
        self.limit = limit or len(self.vocab)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without start and end. Any string will do, lone surrogates included."""
        text = html.unescape(html.unescape(text)).lower()                 # twice, as OpenAI's clean-up does
        # Python's \w counts number signs (superscript two, roman numerals) as letters, BPE's does not
        shadow = "".join("0" if c.isnumeric() and not c.isalpha() else c for c in text)
        return [i for m in self.WORDS.finditer(shadow) for i in self._word(text[m.start(): m.end()])]

    def __call__(self, texts: str | Sequence[str], context_length: int = 77) -> Tensor:
        """Rows (N, context_length) int64: start (SigLIP: none), text (cut if too long), end, zeros."""
        if self.limit <= self.end:
            raise WeightsError(f"the weights know {self.limit} tokens, text needs {self.end + 1} or more")
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(rows, texts):
            ids = [*self.start, *self.encode(text)][: context_length - 1] + [self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def _word(self, word: str) -> list[int]:
        if word in self.vocab[-2:]:                                                    # start, end
            return [self.id[word]]
        parts = [self.symbol[b] for b in word.encode("utf-8", "surrogatepass")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if best not in self.rank:
                break
            merged = parts[:1]
            for part in parts[1:]:
                if (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        return [self.id[p] for p in parts]


class SiglipTokenizer(Tokenizer):
    """Gemma's pieces off the text of a tokenizer.json, lower case. Raises WeightsError."""

    def __init__(self, stored: str, limit: int):
        with failing("SigLIP's texts need pip install tokenizers"):
            from tokenizers import Tokenizer as Pieces
        with failing("not a tokenizer.json"):
            self.pieces = Pieces.from_str(stored)
        self.pieces.no_truncation()
        self.pieces.no_padding()
        self.metadata, self.limit = {"tokenizer": stored}, limit
        self.start, self.end = [], self.pieces.token_to_id("<eos>")
        if self.end is None or self.pieces.get_vocab_size() > limit:
            raise WeightsError(f"tokenizer.json has no <eos>, or more than {limit} pieces")

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without the end. Any string will do (lone surrogates: question marks)."""
        text = text.lower().encode("utf-8", "replace").decode("utf-8")
        return self.pieces.encode(text, add_special_tokens=False).ids


def read_merges(path: str | Path) -> list[str]:
    """Merges of OpenAI's bpe_simple_vocab_16e6.txt.gz or a Hugging Face merges.txt (line 1: a version)."""
    with failing(f"cannot read the merges file {path}"):
        data = ordinary(path).read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    lines = text.splitlines()[1: OPENAI_VOCAB - BYTES_ONLY + 1]    # OpenAI's file has more than CLIP uses
    return [line for line in lines if line]


# ------------------------------------------------------------------------------------------ weights: reading

# `load` comes first and calls the others in the order in which they stand: which file holds the tensors
# (_file), the tensors (_tensors) under our names (_our_names), what is known of the model (_config), the
# model (_filled), its tokenizer (_tokenizer). Nothing that a config says is ignored: `_told` and CLIPConfig
# believe or refuse it, and a model takes all of its tensors and no others.

def load(path: str | Path | None = None, device: str | torch.device = "cpu",
         dtype: torch.dtype | None = torch.float32,
         merges: str | Path | None = None) -> tuple[CLIP, Tokenizer]:
    """Frozen backbone in eval mode and its tokenizer.

    path: our own safetensors, a Hugging Face or open_clip folder or its file, "hf-hub:org/name", OpenAI's
    .pt; None is ViT-B/16, downloaded once, checked, converted and kept in the cache. dtype None: as stored.
    merges: the file of merges (SigLIP: tokenizer.json), where it is not beside them. Raises WeightsError.
    """
    path = _vit_b16() if path is None else Path(path)
    if str(path).startswith("hf-hub:") and not path.exists():
        path = _from_hub(str(path).removeprefix("hf-hub:"))
    if not path.exists():
        raise WeightsError(f"no weights at {path}")
    with failing(f"cannot use {path}"):
        file = _file(path)
        tensors, metadata = _tensors(file)
        weights = _our_names(tensors)
        clip = _filled(weights, _config(weights, file, metadata))
        tokenizer = _tokenizer(clip.config, file.parent, metadata, merges)
    clip.fingerprint = _fingerprint(clip)
    return clip.to(device=device, dtype=dtype), tokenizer


def _from_hub(name: str) -> Path:
    """Folder with what `load` reads of the hub repository org/name, fetched at need. Raises WeightsError."""
    with failing(f"cannot fetch hf-hub:{name}; it takes pip install huggingface_hub, or by hand "
                 f"hf download {name} --local-dir DIR, then give DIR"):
        import huggingface_hub
        for weights in ("model.safetensors model-*.safetensors *.index.json", "open_clip_model.safetensors"):
            files = f"{weights} *config.json merges.txt tokenizer.json"
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=files.split()))
            if any(folder.glob("*.safetensors")):
                break
        return folder


FILES = ("model.safetensors", "open_clip_model.safetensors", "model.safetensors.index.json",
         "open_clip_model.safetensors.index.json")


def _file(path: Path) -> Path:
    """What holds the tensors of a folder: a file, or an index of files. A file is its own answer."""
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).exists():
            return path / name
    raise WeightsError("no model.safetensors or open_clip_model.safetensors in it (to read an older "
                       "pytorch_model.bin, give that file itself)")


def _tensors(file: Path) -> tuple[Weights, dict[str, str]]:
    """Tensors and metadata as stored. No file's code is run but that of OpenAI's own archives."""
    ordinary(file).open("rb").close()      # safetensors says of all that it may not open that it is not there
    if file.suffix == ".json":
        tensors = {}
        for shard in sorted(set(json.loads(file.read_bytes())["weight_map"].values())):
            tensors |= _tensors(file.with_name(shard))[0]
        return tensors, {}
    if not zipfile.is_zipfile(file):
        with safe_open(file, "pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata() or {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                              # TorchScript is old, but OpenAI's format
        if sha256_of(file) in OPENAI_SHA256:
            return torch.jit.load(file, map_location="cpu").state_dict(), {"config": "{}"}
        try:
            return torch.load(file, map_location="cpu", weights_only=True), {}
        except Exception as e:                      # torch's own words advise to run the code all the same
            raise WeightsError("not tensors alone, nor an archive of OpenAI's: its code is not run") from e


# Their name, ours, how the tensor differs (T: transposed; a number: so many leading axes of length 1 there).
# "*" stands for anything, the same in both names; [qkv] for three tensors that are one there.
SIGLIP = """
vision_model.head.probe                           visual.pool.query                               2
vision_model.head.attention.in_proj_*             visual.pool.attn.[qkv]_proj.*
vision_model.head.attention.out_proj.*            visual.pool.attn.out_proj.*
vision_model.head.layernorm.*                     visual.pool.ln_2.*
vision_model.head.mlp.fc1.*                       visual.pool.mlp.c_fc.*
vision_model.head.mlp.fc2.*                       visual.pool.mlp.c_proj.*
text_model.head.weight                            text_projection                                 T
text_model.head.bias                              text_bias
logit_scale                                       logit_scale                                     1
logit_bias                                        logit_bias                                      1
"""
HUGGING_FACE = """
vision_model.embeddings.class_embedding           visual.class_embedding
vision_model.embeddings.patch_embedding.*         visual.conv1.*
vision_model.embeddings.position_embedding.weight visual.positional_embedding
vision_model.pre_layrnorm.*                       visual.ln_pre.*
vision_model.encoder.layers.*.self_attn.*         visual.transformer.resblocks.*.attn.*
vision_model.encoder.layers.*.layer_norm1.*       visual.transformer.resblocks.*.ln_1.*
vision_model.encoder.layers.*.layer_norm2.*       visual.transformer.resblocks.*.ln_2.*
vision_model.encoder.layers.*.mlp.fc1.*           visual.transformer.resblocks.*.mlp.c_fc.*
vision_model.encoder.layers.*.mlp.fc2.*           visual.transformer.resblocks.*.mlp.c_proj.*
vision_model.post_layernorm.*                     visual.ln_post.*
visual_projection.weight                          visual.proj                                     T
text_model.embeddings.token_embedding.weight      token_embedding.weight
text_model.embeddings.position_embedding.weight   positional_embedding
text_model.encoder.layers.*.self_attn.*           transformer.resblocks.*.attn.*
text_model.encoder.layers.*.layer_norm1.*         transformer.resblocks.*.ln_1.*
text_model.encoder.layers.*.layer_norm2.*         transformer.resblocks.*.ln_2.*
text_model.encoder.layers.*.mlp.fc1.*             transformer.resblocks.*.mlp.c_fc.*
text_model.encoder.layers.*.mlp.fc2.*             transformer.resblocks.*.mlp.c_proj.*
text_model.final_layer_norm.*                     ln_final.*
text_projection.weight                            text_projection                                 T
"""
PE_CORE = """
visual.trunk.cls_token                            visual.class_embedding                          2
visual.trunk.pos_embed                            visual.positional_embedding                     1
visual.trunk.patch_embed.proj.*                   visual.conv1.*
visual.trunk.norm_pre.*                           visual.ln_pre.*
visual.trunk.blocks.*.attn.qkv.*                  visual.transformer.resblocks.*.attn.[qkv]_proj.*
visual.trunk.blocks.*.attn.proj.*                 visual.transformer.resblocks.*.attn.out_proj.*
visual.trunk.blocks.*.norm1.*                     visual.transformer.resblocks.*.ln_1.*
visual.trunk.blocks.*.norm2.*                     visual.transformer.resblocks.*.ln_2.*
visual.trunk.blocks.*.mlp.fc1.*                   visual.transformer.resblocks.*.mlp.c_fc.*
visual.trunk.blocks.*.mlp.fc2.*                   visual.transformer.resblocks.*.mlp.c_proj.*
visual.trunk.norm.*                               visual.ln_post.*
visual.trunk.attn_pool.latent                     visual.pool.query                               2
visual.trunk.attn_pool.q.*                        visual.pool.attn.q_proj.*
visual.trunk.attn_pool.kv.*                       visual.pool.attn.[kv]_proj.*
visual.trunk.attn_pool.proj.*                     visual.pool.attn.out_proj.*
visual.trunk.attn_pool.norm.*                     visual.pool.ln_2.*
visual.trunk.attn_pool.mlp.fc1.*                  visual.pool.mlp.c_fc.*
visual.trunk.attn_pool.mlp.fc2.*                  visual.pool.mlp.c_proj.*
visual.trunk.head.weight                          visual.proj                                     T
visual.trunk.head.bias                            visual.proj_bias
text.transformer.resblocks.*.attn.in_proj_*       transformer.resblocks.*.attn.[qkv]_proj.*
logit_scale                                       logit_scale
text.*                                            *
"""
OPENAI = "*resblocks.*.attn.in_proj_*             *resblocks.*.attn.[qkv]_proj.*"
NAMES = {"clip": HUGGING_FACE, "siglip": SIGLIP + HUGGING_FACE, "pe-core": PE_CORE}
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "position_ids")


def _rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines() if line]


def _renamed(name: str, rows: list[list[str]]) -> list[str]:
    """[new name, how the tensor differs] by the first row (old, new, how) that fits, else the name."""
    for old, new, *how in rows:
        found = re.fullmatch(old.replace(".", r"\.").replace("*", "(.*)"), name)
        if found:
            return [new.replace("*", "{}").format(*found.groups()), *how]
    return [name]


def _our_names(weights: Weights) -> Weights:
    """Any naming scheme -> ours. Raises WeightsError naming a tensor that holds no weights."""
    rows = _rows(SIGLIP + HUGGING_FACE + PE_CORE + OPENAI)
    ours = {}
    for name, tensor in weights.items():
        if name.endswith(NOT_WEIGHTS):
            continue
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise WeightsError(f"{name} holds {tensor.dtype} or what is not a number: not weights")
        new, *how = _renamed(name, rows)
        if how == ["T"]:
            tensor = tensor.t()
        elif how:
            tensor = tensor.reshape(tensor.shape[int(how[0]):])
        before, letters, after = re.fullmatch(r"(.*?)(?:\[(\w+)\](.*))?", new).groups("")
        parts = tensor.chunk(len(letters)) if letters else [tensor]                    # (3D, …) -> (D, …)
        for letter, part in zip(letters or [""], parts):
            ours[before + letter + after] = part.contiguous()
    return ours


# A field of CLIPConfig (heads: how many), and where the config of others tells it.
HUGGING_FACE_CONFIG = """
family         model_type
embed          projection_dim
image          vision_config.image_size
patch          vision_config.patch_size
vision_width   vision_config.hidden_size
vision_layers  vision_config.num_hidden_layers
vision_heads   vision_config.num_attention_heads
text_width     text_config.hidden_size
text_layers    text_config.num_hidden_layers
text_heads     text_config.num_attention_heads
context        text_config.max_position_embeddings
vocab          text_config.vocab_size
activation     vision_config.hidden_act
activation     text_config.hidden_act
eps            vision_config.layer_norm_eps
eps            text_config.layer_norm_eps
mean           image_mean
std            image_std
"""
OPEN_CLIP_CONFIG = """
embed          model_cfg.embed_dim
image          model_cfg.vision_cfg.image_size
patch          model_cfg.vision_cfg.patch_size
vision_width   model_cfg.vision_cfg.width
vision_layers  model_cfg.vision_cfg.layers
vision_head    model_cfg.vision_cfg.head_width
text_width     model_cfg.text_cfg.width
text_layers    model_cfg.text_cfg.layers
text_heads     model_cfg.text_cfg.heads
context        model_cfg.text_cfg.context_length
vocab          model_cfg.text_cfg.vocab_size
mean           preprocess_cfg.mean
std            preprocess_cfg.std
"""
# What open_clip's model may say besides: read in `_told`, without a meaning here, or all that is built.
OPEN_CLIP_BESIDES = """
model_cfg.quick_gelu
model_cfg.custom_text
model_cfg.vision_cfg.timm_model_name
model_cfg.vision_cfg.timm_pool=map
model_cfg.vision_cfg.timm_model_pretrained
model_cfg.vision_cfg.timm_drop
model_cfg.vision_cfg.timm_drop_path
model_cfg.vision_cfg.patch_dropout
model_cfg.vision_cfg.output_tokens
model_cfg.vision_cfg.mlp_ratio
model_cfg.vision_cfg.pool_type=tok
model_cfg.vision_cfg.pos_embed_type=learnable
model_cfg.text_cfg.output_tokens
model_cfg.text_cfg.mlp_ratio
model_cfg.text_cfg.pad_id
model_cfg.text_cfg.pool_type=argmax
model_cfg.text_cfg.proj_type=linear
"""


def _flat(config: dict, above: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return flat


def _config(weights: Weights, file: Path, metadata: dict[str, str]) -> CLIPConfig:
    """By the config beside the file, else in its metadata, and the tensors where that is silent."""
    config = asdict(CLIPConfig.from_weights(weights))
    beside = file.with_name("open_clip_config.json" if file.name.startswith("open_clip") else "config.json")
    if file.name.startswith(("model.", "pytorch_model.", "open_clip_")) and beside.exists():
        config |= _told(beside, config)
    elif "config" in metadata:
        config = config | json.loads(metadata["config"])
    else:
        say(f"{file} has no config: the activation {config['activation']} and heads of 64 channels are taken "
            "for granted")
    config |= {name: tuple(config[name]) for name in ("mean", "std")}
    return CLIPConfig(**config)


def _told(file: Path, usual: dict) -> dict:
    """What another's config tells of CLIPConfig. Where it is silent: usual, and heads as their code has them.

    Raises WeightsError naming what is not built.
    """
    config = json.loads(ordinary(file).read_bytes())
    if "model_cfg" in config:
        flat, rows = _flat(config), _rows(OPEN_CLIP_CONFIG)
        known = {*OPEN_CLIP_CONFIG.split(), *OPEN_CLIP_BESIDES.split()}
        for key, value in flat.items():
            if key.startswith("model_cfg.") and value and known.isdisjoint((key, f"{key}={value}")):
                raise WeightsError(f"{key} = {value!r} is not built")
        trunk, quick = flat.get("model_cfg.vision_cfg.timm_model_name"), flat.get("model_cfg.quick_gelu")
        if trunk and (quick or not trunk.startswith("vit_pe_core_")):
            raise WeightsError(f"timm_model_name {trunk!r} with this activation is not built")
        told = {"family": "pe-core" if trunk else "clip", "activation": "quick_gelu" if quick else "gelu"}
        heads = {"text_heads": 8}
    else:
        told, pixels = {"family": config["model_type"]}, file.with_name("preprocessor_config.json")
        flat = _flat(config | (json.loads(ordinary(pixels).read_bytes()) if pixels.exists() else {}))
        rows = _rows(HUGGING_FACE_CONFIG)
        heads = {"vision_heads": 12, "text_heads": {"clip": 8, "siglip": 12}[told["family"]]}
    for field, path in rows:
        section = path.rpartition(".")[0]
        if section in flat:
            raise WeightsError(f"its {section} is {flat[section]!r}")
        value = flat.get(path)
        if value is None:
            value = (usual | heads)[field]
        if told.setdefault(field, value) != value:
            raise WeightsError(f"{path} is {value!r} where the other tower has {told[field]!r}")
    for tower in ("vision", "text"):
        if f"{tower}_heads" in told:
            width, heads = told[f"{tower}_width"], told.pop(f"{tower}_heads")
            if width % heads:
                raise WeightsError(f"{heads} heads do not divide a {tower} width of {width}")
            told[f"{tower}_head"] = width // heads
    return told


def _filled(weights: Weights, config: CLIPConfig) -> CLIP:
    """Frozen CLIP in eval mode of all of its tensors, no others. Raises what PyTorch raises else."""
    with torch.device("meta"):
        clip = CLIP(config)
    if config.family == "pe-core":                                # zero in what was released, or left out
        weights.setdefault("visual.proj_bias", torch.zeros_like(weights["text_projection"][0]))
    clip.load_state_dict(weights, assign=True)
    return clip.requires_grad_(False).eval()


def _tokenizer(config: CLIPConfig, folder: Path, metadata: dict[str, str],
               given: str | Path | None) -> Tokenizer:
    """Off the given file, else our metadata, else a file in the folder. Raises WeightsError."""
    kept = {} if given else metadata
    if config.family == "siglip":
        file = given or folder / "tokenizer.json"
        stored = kept.get("tokenizer") or ordinary(file).read_text("utf-8", "replace")
        return SiglipTokenizer(stored, config.vocab)
    if given:
        merges = given
    elif "merges" in metadata:
        merges = metadata["merges"].splitlines()
    elif (folder / "merges.txt").exists():
        merges = folder / "merges.txt"
    elif config.vocab == OPENAI_VOCAB:
        with failing(f"{folder} has no merges.txt, and OpenAI's cannot be had"):
            merges = download(MERGES_URL, CACHE / MERGES_URL.rpartition("/")[2], MERGES_SHA256)
    else:
        merges = []
    return Tokenizer(merges, config.vocab)


def _fingerprint(clip: CLIP) -> str:
    """16 hex digits of tensors as stored, so the same in all formats, and of what they don't tell."""
    weights, digest = clip.state_dict(), hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    if clip.config != CLIPConfig.from_weights(weights):                  # the tensors alone tell another one
        digest.update(repr(clip.config).encode())
    return digest.hexdigest()[:16]


def from_weights(weights: Weights) -> CLIP:
    """Frozen backbone in eval mode of tensors under OpenAI's names or any others that `load` reads.

    What tensors can't tell (activation, pixels) is as the family's own models have it. Raises WeightsError.
    """
    with failing("cannot use the weights"):
        weights = _our_names(weights)
        return _filled(weights, CLIPConfig.from_weights(weights))


# ---------------------------------------------------------------------------------------- weights: giving out

# `convert` writes one file in our own format, which stands alone: our names, the config and the tokenizer in
# its metadata. `hugging_face` is the way back to the others' names and configs, by the same tables.

def convert(source: str | Path, target: str | Path, merges: str | Path | None = None) -> None:
    """Write weights of any format as our safetensors, with config and tokenizer in it. Raises WeightsError.

    merges: the file of merges (SigLIP: tokenizer.json), where the source has none.
    """
    clip, tokenizer = load(source, dtype=None, merges=merges)
    save(clip.state_dict(), target, {"config": json.dumps(asdict(clip.config)), **tokenizer.metadata})


def save(tensors: Weights, target: str | Path, metadata: dict[str, str]) -> None:
    """One safetensors file, there whole or not at all; a link stays one. Raises WeightsError."""
    target = Path(os.path.realpath(target))
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    with failing(f"cannot write {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file():
            raise WeightsError("there is something that is no ordinary file")
        try:
            part.write_bytes(safetensors_bytes(tensors, metadata))    # save_file's would be private
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def hugging_face(clip: CLIP) -> tuple[Weights, dict]:
    """State dict under Hugging Face's names and its config.json; PE-Core: open_clip's names and config.

    Hugging Face itself reads mean and std off another file, preprocessor_config.json (image_mean, image_std).
    """
    c, theirs, config = clip.config, {}, {}
    rows = [[ours, name, *how] for name, ours, *how in _rows(NAMES[c.family])]
    for name, tensor in clip.state_dict().items():
        new, *how = _renamed(name, rows)
        if how:
            tensor = tensor.T if how == ["T"] else tensor[(None,) * int(how[0])]
        if new in theirs:                                                # q, k and v are one there
            tensor = torch.cat([theirs[new], tensor])
        theirs[new] = tensor.contiguous()
    fields = asdict(c) | {"vision_heads": c.vision_width // c.vision_head,
                          "text_heads": c.text_width // c.text_head}
    if c.family == "pe-core":
        size = {192: "tiny", 384: "small", 1024: "large"}.get(c.vision_width, "base")
        trunk = f"vit_pe_core_{size}_patch{c.patch}_{c.image}"
        table, flat = OPEN_CLIP_CONFIG, {
            "model_cfg.custom_text": True, "model_cfg.vision_cfg.timm_model_name": trunk,
            "model_cfg.vision_cfg.timm_pool": "map", "model_cfg.vision_cfg.timm_proj": None}
    else:
        table, flat = HUGGING_FACE_CONFIG, {
            "vision_config.intermediate_size": 4 * c.vision_width,
            "text_config.intermediate_size": 4 * c.text_width, "text_config.eos_token_id": c.vocab - 1}
    flat |= {path: fields[field] for field, path in _rows(table)}
    for path, value in flat.items():
        *above, key = path.split(".")
        inner = config
        for part in above:
            inner = inner.setdefault(part, {})
        inner[key] = value
    return theirs, config


# ------------------------------------------------------------------------------------------ weights: fetching

# OpenAI's ViT-B/16 and its merges are fetched once, checked by their SHA-256 and kept in CACHE.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache").removeprefix("~/")) / "atha"
VIT_B16_SHA256 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
VIT_B16_URL = f"https://openaipublic.azureedge.net/clip/models/{VIT_B16_SHA256}/ViT-B-16.pt"
OPENAI_SHA256 = {    # what may be opened as TorchScript, which runs code: ViT-B/32, B/16, L/14, L/14@336
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", VIT_B16_SHA256,
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES_URL = "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz"


def _vit_b16() -> Path:
    kept = CACHE / "ViT-B-16.safetensors"
    if not kept.exists():                                  # the lock needs a folder that can be written
        with locked(kept):
            if not kept.exists():
                archive = download(VIT_B16_URL, CACHE / "ViT-B-16.pt", VIT_B16_SHA256)
                convert(archive, kept)
                archive.unlink()
    return kept


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Of several processes that want to make a file, the second waits for the first."""
    with failing(f"cannot write {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{target}.lock", "a")
    with lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(url: str, target: Path, sha256: str) -> Path:
    """Fetch url to target unless it is there. Says so, shows progress, leaves nothing half-written.

    What is there is checked too, as it may have been put there by hand. Raises WeightsError.
    """
    with locked(target):
        if target.exists():
            if not target.is_file() or sha256_of(target) != sha256:
                raise WeightsError(f"{target} is not what {url} holds (its SHA-256 differs): remove it")
            return target
        for old in target.parent.glob(f"{target.name}.*.partial"):       # of a process that was killed
            old.unlink()
        say(f"downloading {url} to {target}")
        patience = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(60)                            # torch.hub would wait for a silent server
            with failing(f"cannot download {url}; fetch it on another machine and put it at {target}, or "
                         "give --weights"):
                torch.hub.download_url_to_file(url, str(target), sha256, progress=sys.stderr is not None)
        finally:
            socket.setdefaulttimeout(patience)
    return target


# ----------------------------------------------------------------------------------------------- command line

PICTURES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")   # Pillow would hand others to other programs


def read_picture(path: str | Path, config: CLIPConfig) -> Tensor:
    """Picture -> (1, 3, S, S), prepared as the backbone's own rule has it.

    CLIP: shorter side to S (bicubic), centre crop; others: both sides to S (bilinear). Raises WeightsError.
    """
    from PIL import Image
    from torchvision.transforms.v2 import functional as TF
    with failing(f"cannot read the picture {path}"), Image.open(ordinary(path), formats=PICTURES) as image:
        if image.mode[0] in "IF":
            raise WeightsError("it has more than 8 bits a channel, which would be cut off")
        image = image.convert("RGB")
    size, way = [config.image, config.image], TF.InterpolationMode.BILINEAR
    if config.family == "clip":
        size, way = config.image, TF.InterpolationMode.BICUBIC
    image = TF.center_crop(TF.resize(image, size, way), config.image)
    pixels = TF.to_dtype(TF.pil_to_tensor(image), torch.float32, scale=True)[None]
    return TF.normalize(pixels, config.mean, config.std)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("clip_min.py", description="Convert weights, or classify a picture.")
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser("convert", help="any format -> one safetensors with config and tokenizer")
    c.add_argument("source")
    c.add_argument("target")
    c.add_argument("--merges", help="file of BPE merges (SigLIP: tokenizer.json), where the source has none")
    c = commands.add_parser("classify", help="probability of each text for a picture")
    c.add_argument("image")
    c.add_argument("texts", nargs="+")
    c.add_argument("--weights", help="file or folder of a backbone (default: ViT-B/16, downloaded)")
    args = parser.parse_args(argv)
    try:
        if args.command == "convert":
            return convert(args.source, args.target, args.merges)
        clip, tokenizer = load(args.weights)
        image = clip.encode_image(read_picture(args.image, clip.config))                          # (1, embed)
        text = clip.encode_text(tokenizer(args.texts, clip.config.context))                       # (N, embed)
        chances = (clip.logit_scale.exp() * F.cosine_similarity(image, text)).softmax(-1).tolist()
        for chance, label in sorted(zip(chances, args.texts), reverse=True):
            print(f"{100 * chance:6.2f} %  {label}")
    except WeightsError as e:
        parser.exit(2, f"clip_min.py: error: {e}\n")


if __name__ == "__main__":
    main()
