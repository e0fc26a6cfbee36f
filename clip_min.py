"""CLIP by hand: vision transformer, text transformer, BPE tokenizer, weights. Needs torch and safetensors (to read pictures, torchvision).

    clip, tokenizer = load()                                   # OpenAI's ViT-B/16, fetched once
    image = clip.encode_image(images)                          # (B, 3, 224, 224) normalised -> (B, 512)
    text = clip.encode_text(tokenizer(["a photo of a cat."]))  # (N, 77) -> (N, 512)

    python clip_min.py classify cat.jpg "a cat" "a dog"
    python clip_min.py convert ViT-B-16.pt vit-b-16.safetensors

Parameter names are OpenAI's, but for the attention's input projection, which is split into q, k and v so that an
adapter can wrap each. Source: Radford et al. 2021 and OpenAI's released weights.
"""
from __future__ import annotations

import argparse, fcntl, gzip, hashlib, html, http.client, json, os, re, sys, urllib.request, warnings, zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)    # of an RGB picture in 0..1
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atha"
VIT_B16_SHA256 = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
VIT_B16_URL = f"https://openaipublic.azureedge.net/clip/models/{VIT_B16_SHA256}/ViT-B-16.pt"
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES_URL = "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz"
MERGES_FILE, OPENAI_VOCAB = "bpe_simple_vocab_16e6.txt.gz", 49408

Between = Callable[[Tensor, int], Tensor]    # (tokens (B, T, D), layer) -> tokens, called before every block


class WeightsError(Exception):
    """Weights that cannot be had or used; the message is one line for the user."""


# ---------------------------------------------------------------------------------------------------------- model

@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers (default ViT-B/16). Heads are width / 64, the MLP is 4 x width, as in all of OpenAI's ViTs."""
    embed: int = 512
    image: int = 224            # pixels a side
    patch: int = 16             # pixels a side
    vision_width: int = 768
    vision_layers: int = 12
    text_width: int = 512
    text_layers: int = 12
    context: int = 77           # tokens in a row of text, start and end included
    vocab: int = OPENAI_VOCAB

    @classmethod
    def from_weights(cls, weights: dict[str, Tensor]) -> CLIPConfig:
        """Read the sizes off the tensors' shapes. Raises WeightsError naming a tensor that is missing or misshapen."""
        def shape(name: str, dims: int) -> torch.Size:
            if name not in weights:
                raise WeightsError(f"not CLIP weights: tensor {name} is missing")
            if weights[name].dim() != dims:
                raise WeightsError(f"not CLIP weights: {name} has shape {tuple(weights[name].shape)}")
            return weights[name].shape

        def layers(tower: str) -> int:
            return len({m[1] for m in (re.match(rf"{tower}transformer\.resblocks\.(\d+)\.", name) for name in weights) if m})

        width, _, patch, _ = shape("visual.conv1.weight", 4)
        grid = round((shape("visual.positional_embedding", 2)[0] - 1) ** 0.5)
        vocab, text_width = shape("token_embedding.weight", 2)
        return cls(shape("visual.proj", 2)[1], grid * patch, patch, width, layers("visual."), text_width, layers(""),
                   shape("positional_embedding", 2)[0], vocab)


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.heads = width // 64
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)                      # (B, heads, T, 64)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        if x.is_cuda or x.dtype == torch.float32:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        else:                                                # in bfloat16 on a CPU its backward takes five times as long as this
            scores = 64 ** -0.5 * q @ k.mT                                                # (B, heads, T, T)
            y = (scores + torch.full_like(scores[0, 0], -torch.inf).triu(1) if causal else scores).softmax(-1) @ v
        return self.out_proj(y.transpose(1, 2).flatten(2))                                # (B, T, D)


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.silu(1.702 * self.c_fc(x)) / 1.702)    # QuickGELU x * sigmoid(1.702 x); silu keeps one tensor for backward


class Block(nn.Module):
    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width)
        self.ln_2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor) -> Tensor:                                               # (B, T, D) -> (B, T, D)
        x = x + self.attn(self.ln_1(x), self.causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, causal: bool = False):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, causal) for _ in range(layers))

    def forward(self, x: Tensor, between: Between | None = None) -> Tensor:
        for layer, block in enumerate(self.resblocks):
            x = block(x if between is None else between(x, layer))
        return x


class VisionTransformer(nn.Module):
    """ViT with a [CLS] token first; `between(tokens (B, 1+L, D), layer)` may change the tokens before every block."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        width, length = config.vision_width, (config.image // config.patch) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, config.patch, config.patch, bias=False)
        self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(length, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, config.embed))

    def forward(self, images: Tensor, between: Between | None = None) -> Tensor:
        """(B, 3, S, S) normalised by MEAN and STD -> (B, embed), not of unit length."""
        x = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)     # (B, L, D)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)                 # (B, 1+L, D)
        x = self.transformer(self.ln_pre(x + self.positional_embedding), between)
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    fingerprint = ""            # of the stored weights, set by `load`: tells whether an adapter belongs to them

    def __init__(self, config: CLIPConfig = CLIPConfig()):
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config)
        self.token_embedding = nn.Embedding(config.vocab, config.text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context, config.text_width))
        self.transformer = Transformer(config.text_width, config.text_layers, causal=True)
        self.ln_final = nn.LayerNorm(config.text_width)
        self.text_projection = nn.Parameter(config.text_width ** -0.5 * torch.randn(config.text_width, config.embed))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())                     # natural logarithm

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, embed), not normalised."""
        return self.visual(images)

    def encode_text(self, token_ids: Tensor, between: Between | None = None) -> Tensor:
        """(N, T) int64, T <= context -> (N, embed), not normalised. `between` as in the vision tower."""
        x = self.token_embedding(token_ids) + self.positional_embedding[: token_ids.shape[1]]
        return self.read_text(self.transformer(x, between), token_ids)

    def read_text(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """Text feature off any block's output (N, T, D): at the end-of-text token, which has the highest id of its row."""
        x = x.gather(1, token_ids.argmax(-1)[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]  # (N, D)
        return self.ln_final(x) @ self.text_projection


# ------------------------------------------------------------------------------------------------------ tokenizer

class Tokenizer:
    """OpenAI's byte-pair encoding, lower case, with the standard library only.

    merges: "left right" lines or (left, right) pairs in order of rank, or the path of a merges file.
    Ids: 256 byte symbols, the same ending a word (</w>), one for each merge, start of text, end of text.
    """
    WORDS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\s\w]|_)+")

    def __init__(self, merges: Sequence[str | tuple[str, str]] | str | Path):
        if isinstance(merges, (str, Path)):
            merges = read_merges(merges)
        pairs = [tuple(m.split()) if isinstance(m, str) else tuple(m) for m in merges]
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        self.symbol = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        letters = list(self.symbol.values())
        vocab = letters + [c + "</w>" for c in letters] + ["".join(p) for p in pairs] + ["<|startoftext|>", "<|endoftext|>"]
        self.rank = {pair: i for i, pair in enumerate(pairs)}
        self.id = {token: i for i, token in enumerate(vocab)}
        self.vocab, self.start, self.end = vocab, len(vocab) - 2, len(vocab) - 1

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without start and end tokens. Any string will do, lone surrogates included."""
        text = html.unescape(html.unescape(text)).lower()                 # twice, as OpenAI's clean-up does
        # Python's \w counts number signs such as the superscript two or roman numerals as letters; BPE's pattern does not
        shadow = "".join("0" if c.isnumeric() and not c.isalpha() else c for c in text)
        return [i for m in self.WORDS.finditer(shadow) for i in self._word(text[m.start(): m.end()])]

    def __call__(self, texts: str | Sequence[str], context_length: int = 77) -> Tensor:
        """Rows (N, context_length) int64: start, text (cut if too long), end, zeros."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(rows, texts):
            ids = [self.start, *self.encode(text)[: context_length - 2], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def _word(self, word: str) -> list[int]:
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return [self.id[word]]
        parts = [self.symbol[b] for b in word.encode("utf-8", "surrogatepass")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if best not in self.rank:
                break
            merged, i = [], 0
            while i < len(parts):
                step = 2 if tuple(parts[i: i + 2]) == best else 1
                merged.append("".join(parts[i: i + step]))
                i += step
            parts = merged
        return [self.id[p] for p in parts]


def read_merges(path: str | Path, count: int = OPENAI_VOCAB - 514) -> list[str]:
    """The first `count` merges of OpenAI's bpe_simple_vocab_16e6.txt.gz or a Hugging Face merges.txt (line 1 is a version)."""
    try:
        data = Path(path).read_bytes()
        lines = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8").splitlines()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as e:
        raise WeightsError(f"cannot read the merges file {path}: {e}") from e
    return [line for line in lines[1: count + 1] if line]


# -------------------------------------------------------------------------------------------------------- weights

HUGGING_FACE = [    # (its name, ours), each a regular expression, applied in turn
    (r"^vision_model\.", "visual."), (r"^text_model\.", ""), (r"encoder\.layers", "transformer.resblocks"), (r"self_attn", "attn"),
    (r"layer_norm(\d)", r"ln_\1"), (r"fc1", "c_fc"), (r"fc2", "c_proj"), (r"embeddings\.(class|token)", r"\1"),
    (r"embeddings\.patch_embedding", "conv1"), (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"pre_layrnorm", "ln_pre"), (r"post_layernorm", "ln_post"), (r"final_layer_norm", "ln_final"),
    (r"^visual_projection\.weight", "visual.proj"), (r"^text_projection\.weight", "text_projection"),
]
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "position_ids")


def _our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any of the three naming schemes -> ours."""
    ours = {}
    for name, tensor in weights.items():
        new = name
        for pattern, ours_is in HUGGING_FACE:
            new = re.sub(pattern, ours_is, new)
        if name in ("visual_projection.weight", "text_projection.weight"):
            tensor = tensor.T                                            # nn.Linear there, a matrix on the right here
        if ".attn.in_proj_" in name:                                     # (3D, D) or (3D,)
            for letter, part in zip("qkv", tensor.chunk(3)):
                ours[new.replace("in_proj_", f"{letter}_proj.")] = part
        elif not name.endswith(NOT_WEIGHTS):
            ours[new] = tensor
    return {name: tensor.contiguous() for name, tensor in ours.items()}


def _read(path: Path, merges: str | Path | None) -> tuple[dict[str, Tensor], list[str]]:
    """Stored tensors under our names, and the merges, from any of the three formats."""
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"no weights at {path}")
    file, folder = (path / "model.safetensors", path) if path.is_dir() else (path, path.parent)
    if not file.is_file():
        raise WeightsError(f"{path} has no model.safetensors")
    lines = None
    try:
        if file.open("rb").read(2) == b"PK":                             # a zip: OpenAI's TorchScript archive
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)           # the format is old, but it is the one OpenAI's weights are in
                weights = dict(torch.jit.load(file, map_location="cpu").state_dict())
        else:
            with safe_open(file, "pt") as f:
                weights = {name: f.get_tensor(name) for name in f.keys()}
                lines = (f.metadata() or {}).get("merges")
    except (SafetensorError, RuntimeError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise WeightsError(f"cannot read {file}: neither whole safetensors nor a TorchScript archive ({reason})") from e
    weights = _our_names(weights)
    try:
        vocab = CLIPConfig.from_weights(weights).vocab
    except WeightsError as e:
        raise WeightsError(f"{file}: {e}") from e
    if merges is None and lines is not None:
        return weights, lines.splitlines()
    merges = merges or next((p for p in (folder / "merges.txt", folder / MERGES_FILE) if p.exists()), None)
    if vocab == OPENAI_VOCAB and merges is None:
        merges = download(MERGES_URL, CACHE / MERGES_FILE, MERGES_SHA256)
    lines = read_merges(merges, vocab - 514) if merges and vocab > 514 else []
    if lines and len(lines) + 514 != vocab:
        raise WeightsError(f"{merges or path} holds {len(lines)} merges, the weights need {vocab - 514}")
    return weights, lines


def _build(weights: dict[str, Tensor], source: str) -> CLIP:
    """CLIP that holds the given tensors. Raises WeightsError naming the first tensor that is missing or misshapen."""
    with torch.device("meta"):
        clip = CLIP(CLIPConfig.from_weights(weights))
    for name, wanted in clip.state_dict().items():
        if name not in weights:
            raise WeightsError(f"{source} is not CLIP: tensor {name} is missing")
        if weights[name].shape != wanted.shape:
            raise WeightsError(f"{source} is not CLIP: {name} has shape {tuple(weights[name].shape)}, expected {tuple(wanted.shape)}")
    clip.load_state_dict(weights, strict=False, assign=True)
    return clip.requires_grad_(False).eval()


def load(path: str | Path | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> tuple[CLIP, Tokenizer]:
    """Frozen CLIP in eval mode and its tokenizer.

    path: our own safetensors, a Hugging Face folder, or OpenAI's .pt; None is ViT-B/16, downloaded once, checked
    against its SHA-256, converted and kept in the cache folder. Raises WeightsError.
    """
    path = _vit_b16() if path is None else path
    weights, merges = _read(path, None)
    digest = hashlib.sha256()
    for name in sorted(weights):                                         # as stored, so the same in all three formats
        digest.update(name.encode())
        digest.update(weights[name].reshape(-1).view(torch.uint8).numpy())
    clip = _build({n: t.to(device, dtype if t.is_floating_point() else None) for n, t in weights.items()}, str(path))
    clip.fingerprint = digest.hexdigest()[:16]
    return clip, Tokenizer(merges)


def convert(source: str | Path, target: str | Path, merges: str | Path | None = None) -> None:
    """Write any of the three formats as our safetensors, which also carries config and merges. Raises WeightsError."""
    weights, lines = _read(Path(source), merges)
    config = _build(weights, str(source)).config
    save(weights, target, {"config": json.dumps(asdict(config)), "merges": "\n".join(lines)})


def save(tensors: dict[str, Tensor], target: str | Path, metadata: dict[str, str]) -> None:
    """One safetensors file, there whole or not at all."""
    target = Path(target)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(safetensors_bytes(tensors, metadata))           # save_file would make it readable to its owner alone
        os.replace(part, target)
    except (OSError, SafetensorError) as e:
        raise WeightsError(f"cannot write {target}: {e}") from e
    finally:
        if part.exists():                                                # not unlink(missing_ok): its folder may be a file
            part.unlink()


def _vit_b16() -> Path:
    kept = CACHE / "ViT-B-16.safetensors"
    if kept.exists():                                                    # perhaps where nothing can be written
        return kept
    with locked(kept):
        if not kept.exists():
            archive = download(VIT_B16_URL, CACHE / "ViT-B-16.pt", VIT_B16_SHA256)
            convert(archive, kept)
            archive.unlink()
    return kept


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Of several processes that want to make a file, the second waits for the first."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{target}.lock", "a")
    except OSError as e:
        raise WeightsError(f"cannot write {target}: {e}") from e
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def download(url: str, target: Path, sha256: str) -> Path:
    """Fetch url to target unless it is there. Says so, shows progress; leaves nothing half-written. Raises WeightsError."""
    part, digest, done = target.with_name(f"{target.name}.part"), hashlib.sha256(), 0
    with locked(target):
        if target.exists():
            return target
        print(f"downloading {url} to {target}", file=sys.stderr)
        try:
            with urllib.request.urlopen(url, timeout=60) as response, part.open("wb") as file:
                total = int(response.headers.get("Content-Length") or 0)
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    print(f"\r{done / 1e6:8.1f} MB of {total / 1e6:.1f}", end="", file=sys.stderr)
            if done < total:
                raise WeightsError(f"the download of {url} broke off after {done} of {total} bytes: run the command again")
            if digest.hexdigest() != sha256:
                raise WeightsError(f"{url} has SHA-256 {digest.hexdigest()}, expected {sha256}: nothing was kept")
            os.replace(part, target)
        except (OSError, ValueError, http.client.HTTPException) as e:
            reason = " ".join(str(e).split()) or repr(e)
            raise WeightsError(f"cannot download {url} ({reason}): fetch it on another machine and put it at {target}, or give --weights") from e
        finally:
            if done:
                print(file=sys.stderr)                                   # ends the line of progress, before a message too
            part.unlink(missing_ok=True)
    return target


# --------------------------------------------------------------------------------------------------- command line

def read_picture(path: str | Path, size: int) -> Tensor:
    """Picture -> (1, 3, size, size) normalised, by CLIP's own rule: shorter side to size (bicubic), centre crop."""
    from torchvision.datasets.folder import pil_loader
    from torchvision.transforms.v2 import functional as TF
    try:
        image = TF.center_crop(TF.resize(pil_loader(str(path)), size, TF.InterpolationMode.BICUBIC), size)
    except OSError as e:
        raise WeightsError(f"cannot read the picture {path}: {e}") from e
    return TF.normalize(TF.to_dtype(TF.pil_to_tensor(image), torch.float32, scale=True), MEAN, STD)[None]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="clip_min.py", description="Convert CLIP weights, or classify a picture with CLIP.")
    commands = parser.add_subparsers(dest="command", required=True)
    c = commands.add_parser("convert", help="OpenAI's .pt or a Hugging Face folder -> one safetensors with config and merges")
    c.add_argument("source")
    c.add_argument("target")
    c.add_argument("--merges", help="BPE merges file, where the source has none")
    c = commands.add_parser("classify", help="probability of each text for a picture")
    c.add_argument("image")
    c.add_argument("texts", nargs="+")
    c.add_argument("--weights", help="our safetensors, a Hugging Face folder or OpenAI's .pt (default: ViT-B/16, downloaded)")
    args = parser.parse_args(argv)
    try:
        if args.command == "convert":
            return convert(args.source, args.target, args.merges)
        clip, tokenizer = load(args.weights)
        image = F.normalize(clip.encode_image(read_picture(args.image, clip.config.image)), dim=-1)
        text = F.normalize(clip.encode_text(tokenizer(args.texts, clip.config.context)), dim=-1)
        for p, label in sorted(zip((clip.logit_scale.exp() * image @ text.T).softmax(-1)[0].tolist(), args.texts), reverse=True):
            print(f"{100 * p:6.2f} %  {label}")
    except WeightsError as e:
        parser.exit(2, f"clip_min.py: error: {e}\n")


if __name__ == "__main__":
    main()
