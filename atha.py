"""The ideas: LoRA with an episode axis, ATHA, TIR, SVL, RA, and the papers' diagnostics. Needs torch only (`draw_patches`: torchvision).

    lora = add_lora(vit)                                       # every q, k, v projection, in place
    atha = ATHA(layers=12)
    features = vit(images, between=atha.between(text_to_tokens(class_texts, vit.proj)))

Shapes: E episodes, B images (E divides B, rows grouped by episode), L patch tokens after one [CLS] token, D token width,
N classes. Whatever is per episode has a leading E; with E = 1 it is the plain case. Which token is chosen is decided in
float32 and carries no gradient. Sources: ATHA (arXiv 2605.29776), TIR (2605.25799), SVL + RA (2603.13341),
CLIP-LoRA (CVPRW 2024); "released" means the authors' published code where it differs from the paper.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Between = Callable[[Tensor, int], Tensor]    # (tokens (B, 1+L, D), layer) -> tokens, called before every block


# ----------------------------------------------------------------------------------------------------------- LoRA

def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """F.dropout; on a CPU, where drawing is what costs, from 16 random bits an element instead of 64."""
    if x.is_cuda or torch.compiler.is_compiling() or not training or p == 0:
        return F.dropout(x, p, training)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)     # -2^15 .. 2^15 - 1, evenly
    return x.masked_fill(bits[: x.numel()].view(x.shape) < round(p * 2 ** 16) - 2 ** 15, 0) / (1 - p)


class LoRA(nn.Module):
    """A frozen nn.Linear plus scaling * B A dropout(x), one (A, B) an episode (CLIP-LoRA; rank-stabilised LoRA).

    Parameters A (E, rank, in) Kaiming uniform and B (E, out, rank) zeros, float32 whatever the linear's dtype.
    """

    def __init__(self, linear: nn.Linear, rank: int = 16, alpha: float = 8, dropout: float = 0.25, episodes: int = 1):
        super().__init__()
        self.linear, self.dropout, self.scaling = linear.requires_grad_(False), dropout, alpha / sqrt(rank)
        device = linear.weight.device
        bound = linear.in_features ** -0.5                                # Kaiming uniform with a = sqrt(5)
        self.A = nn.Parameter(torch.empty(episodes, rank, linear.in_features, device=device).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(episodes, linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:                               # (B, ..., in) -> (B, ..., out)
        y = self.linear(x)
        h = dropout(x, self.dropout, self.training).reshape(len(self.A), -1, x.shape[-1])     # (E, rows, in)
        h = h @ self.A.mT.to(h.dtype)                                     # (E, rows, rank)
        y_grouped = y.view(len(self.A), -1, y.shape[-1])                  # (E, rows, out)
        return torch.baddbmm(y_grouped, h, self.B.mT.to(h.dtype), alpha=self.scaling).view_as(y)      # y + scaling * h B^T


def add_lora(tower: nn.Module, rank: int = 16, alpha: float = 8, dropout: float = 0.25, episodes: int = 1,
             targets: Sequence[str] = ("q_proj", "k_proj", "v_proj")) -> dict[str, LoRA]:
    """Freeze a tower and wrap, in place, each nn.Linear whose name is a target. Returns them by module name.

    Raises ValueError when there is none.
    """
    tower.requires_grad_(False)
    found = [(parent, name, f"{path}.{name}".lstrip(".")) for path, parent in tower.named_modules()
             for name, child in parent.named_children() if name in targets and isinstance(child, nn.Linear)]
    if not found:
        raise ValueError(f"no nn.Linear named {', '.join(targets)} in {type(tower).__name__}")
    for parent, name, _ in found:
        setattr(parent, name, LoRA(getattr(parent, name), rank, alpha, dropout, episodes))
    return {path: getattr(parent, name) for parent, name, path in found}


# ------------------------------------------------------------------------------------------------- tokens and texts

def per_image(x: Tensor, batch: int) -> Tensor:
    """What an episode shares, (E, ...), repeated for each of its images: (B, ...)."""
    return x.repeat_interleave(batch // len(x), 0)


def cosines(tokens: Tensor, texts: Tensor) -> Tensor:
    """(B, L, D) and (N, D) or (E, N, D) -> (B, L, N) float32, without gradient."""
    with torch.no_grad():
        texts = F.normalize(texts.float(), dim=-1).view(-1, *texts.shape[-2:])
        return F.normalize(tokens.float(), dim=-1) @ per_image(texts, len(tokens)).mT


def count_of(share: float, length: int) -> int:
    """floor(share * length), safe against 0.29 * 100 = 28.999..."""
    return int(share * length + 1e-6)


def mark_top(scores: Tensor, count: int, largest: bool = True) -> Tensor:
    """Mark the `count` highest (or lowest) scores along dimension 1, as 1.0 among zeros; shape of scores."""
    return torch.zeros_like(scores).scatter_(1, scores.topk(count, 1, largest, sorted=False).indices, 1.0)


# ----------------------------------------------------------------------------------------------------------- ATHA

def text_to_tokens(text: Tensor, proj: Tensor, ln_post: nn.LayerNorm | None = None, recipe: str = "paper",
                   inverse: Tensor | None = None) -> Tensor:
    """Class texts (..., N, embed) -> token space (..., N, D), with CLIP's visual projection (D, embed) (ATHA, section 3).

    recipe "paper": LayerNorm(T) proj^T, no learned affine. "released": undo proj by least squares, then ln_post's
    affine; `inverse` is pinv(proj), if it is at hand.
    """
    if recipe == "paper":
        return F.layer_norm(text, text.shape[-1:]) @ proj.T
    inverse = torch.linalg.pinv(proj.float()).to(text.dtype) if inverse is None else inverse
    return (text @ inverse - ln_post.bias) / ln_post.weight


def head_and_tail(tokens: Tensor, texts: Tensor, rho: float, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of patch tokens (B, L, D): m (B, L) = max_j cosine, head (B, L, N), tail (B, L, N) (ATHA, section 3).

    head is one-hot at the nearest text of the floor(rho L) tokens with the largest m, zero for other tokens; tail at the
    farthest text of the floor(gamma L) with the smallest.
    """
    similarity = cosines(tokens, texts)                                   # (B, L, N)
    classes = torch.arange(similarity.shape[-1], device=tokens.device)
    best, nearest = similarity.max(-1)                                    # (B, L)
    farthest, length = similarity.argmin(-1), tokens.shape[1]
    head = mark_top(best, count_of(rho, length))[..., None] * (nearest[..., None] == classes)
    tail = mark_top(best, count_of(gamma, length), largest=False)[..., None] * (farthest[..., None] == classes)
    return best, head, tail


def atha_step(tokens: Tensor, texts: Tensor, alpha: Tensor | float, beta: Tensor | float, rho: float = 0.1, gamma: float = 0.1) -> Tensor:
    """Pull head tokens to their nearest text by alpha, push tail tokens off their farthest by beta (ATHA, section 3).

    tokens (B, 1+L, D), texts in token space (N, D) or (E, N, D), alpha and beta scalars or (E,). [CLS] is not touched.
    """
    _, head, tail = head_and_tail(tokens[:, 1:], texts, rho, gamma)       # (B, L, N)
    alpha, beta = (per_image(torch.as_tensor(x, device=tokens.device).view(-1, 1, 1), len(tokens)) for x in (alpha, beta))
    weight = F.pad(alpha * head - beta * tail, (0, 0, 1, 0))              # (B, 1+L, N), 0 for [CLS]
    texts = per_image(texts.view(-1, *texts.shape[-2:]), len(tokens))     # (B, N, D)
    return torch.baddbmm(tokens, weight.to(tokens.dtype), texts.to(tokens.dtype))


class ATHA(nn.Module):
    """alpha and beta (E, layers), one a block; `between` makes the hook. pull=False or push=False keeps that side at 0.

    copy_cls: what the released code does, by a flag that is never set: before every block a copy of [CLS] joins the
    tokens that may be pulled and pushed, so that the sequence grows by one a block.
    """

    def __init__(self, layers: int = 12, episodes: int = 1, alpha: float = 0.8, alpha_block: int = 8, beta: float = 0.01,
                 rho: float = 0.1, gamma: float = 0.1, pull: bool = True, push: bool = True, copy_cls: bool = False):
        super().__init__()
        self.rho, self.gamma, self.copy_cls = rho, gamma, copy_cls
        self.alpha = nn.Parameter(torch.zeros(episodes, layers), requires_grad=pull)
        self.beta = nn.Parameter(torch.full((episodes, layers), beta if push else 0.0), requires_grad=push)
        if pull:
            self.alpha.data[:, alpha_block] = alpha

    def between(self, texts: Tensor) -> Between:
        """Hook for class texts in token space, (N, D) or (E, N, D)."""
        def between(tokens: Tensor, layer: int) -> Tensor:
            tokens = torch.cat([tokens[:, :1], tokens], 1) if self.copy_cls else tokens
            return atha_step(tokens, texts, self.alpha[:, layer], self.beta[:, layer], self.rho, self.gamma)
        return between


# ------------------------------------------------------------------------------------------------------------ TIR

def tir_marks(tokens: Tensor, text: Tensor, ln_post: nn.LayerNorm, proj: Tensor, top: float = 0.3) -> Tensor:
    """Which of the patch tokens (B, L, D) are among the floor(top L) most similar to each class: (B, L, N), 0 or 1."""
    with torch.no_grad():
        similarity = cosines(ln_post(tokens) @ proj, text)                # (B, L, N)
    return mark_top(similarity, count_of(top, tokens.shape[1]))


def tir_weights(marks: Tensor) -> Tensor:
    """Weight (B, L) of each patch from how many of N classes marked it (TIR, section 3.2): sinks -> 0, class-specific -> 2."""
    n, count = marks.shape[-1], marks.sum(-1)                             # count: (B, L), 0..N
    weight = 1 - 2 / max(n - 1, 1) * (count - (n + 1) / 2)                # 5-way: 1 - 0.5 (count - 3); 1-way: 1
    return weight.where(count > 0, 1.0)


def tir_step(tokens: Tensor, text: Tensor, ln_post: nn.LayerNorm, proj: Tensor, top: float = 0.3, inhibit: bool = True, enhance: bool = True) -> Tensor:
    """Scale patch tokens by `tir_weights` (TIR, section 3): inhibit those that most classes mark, enhance the specific.

    tokens (B, 1+L, D), class texts (N, embed) or (E, N, embed), the tower's ln_post and (D, embed) projection.
    """
    weight = tir_weights(tir_marks(tokens[:, 1:], text, ln_post, proj, top))
    weight = weight.clamp(None if inhibit else 1, None if enhance else 1) if not (inhibit and enhance) else weight
    return tokens * F.pad(weight, (1, 0), value=1.0)[..., None].to(tokens.dtype)           # [CLS] keeps weight 1


# ------------------------------------------------------------------------------------------------------- SVL and RA

def svl_loss(features: Tensor, labels: Tensor, index: Tensor, scale: float) -> Tensor:
    """Suppress visual learning: cross-entropy against randomly drawn features as class weights (SVL, section 3).

    features (..., B, D), labels (..., B), index (..., N) rows drawn -> loss (...). Gradients flow through the weights too.
    """
    features = F.normalize(features, dim=-1)
    weights = features.gather(-2, index[..., None].expand(*index.shape, features.shape[-1]))   # (..., N, D)
    logits = scale * features @ weights.mT                                # (..., B, N)
    return F.cross_entropy(logits.movedim(-1, 1) if logits.dim() > 2 else logits, labels, reduction="none").mean(-1)


def ra_loss(relation: Tensor, fused: Tensor, recipe: str = "paper") -> Tensor:
    """Relationship alignment: KL(A_v || A_fuse) of two cosine matrices (..., M, K) -> (...) (SVL, section 3).

    recipe "paper": softmax over each row, mean over rows. "released": the raw cosines through KLDivLoss(log_target=True).
    """
    if recipe == "paper":
        p, q = relation.log_softmax(-1), fused.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean(-1)
    return (fused.exp() * (fused - relation)).mean((-2, -1))


# ----------------------------------------------------------------------------------------------------- diagnostics

def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA (centred) of two feature sets over the same n images, (..., n, D) and (..., n, D') -> (...), 0 to 1."""
    x, y = (z.float() - z.float().mean(-2, keepdim=True) for z in (x, y))
    norm = torch.linalg.matrix_norm
    return norm(x.mT @ y) ** 2 / (norm(x.mT @ x) * norm(y.mT @ y))


def modality_gap(image: Tensor, text: Tensor) -> Tensor:
    """Distance between the mean unit image feature (..., n, D) and the mean unit text feature (..., N, D) -> (...)."""
    return (F.normalize(image, dim=-1).mean(-2) - F.normalize(text, dim=-1).mean(-2)).norm(dim=-1)


def gap_shift(image: Tensor, text: Tensor, labels: Tensor, scale: float, reach: float = 2.0, steps: int = 41) -> Tensor:
    """What is lost by the modality gap (after Liang et al. 2022): 0 when no shift along the gap lowers the cross-entropy.

    image (n, D), text (N, D), labels (n,) -> scalar: cross-entropy now minus its minimum when both sets move half of
    -reach..reach times the gap vector towards each other and are normalised again.
    """
    image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    half_gap = (image.mean(0) - text.mean(0)) / 2

    def loss(shift: float) -> Tensor:
        a, b = F.normalize(image - shift * half_gap, dim=-1), F.normalize(text + shift * half_gap, dim=-1)
        return F.cross_entropy(scale * a @ b.T, labels)
    return loss(0.0) - torch.stack([loss(s) for s in [0.0, *torch.linspace(-reach, reach, steps).tolist()]]).min()


class Probe:
    """A `between` that changes nothing and keeps, by block, what the papers plot; give it the hook whose effect it is to see.

    texts: class texts in token space (E, N, D); text: class texts (E, N, embed) for TIR's marks.
    Lists with one entry a block: `head`, `neutral`, `tail`: mean m of these tokens; `share` (N+1,): part of the tokens that
    0..N classes mark, `norm` (N+1,): their mean length; `pooled` (B, D): mean token of each image; `masks`: head and tail (B, L).
    """

    def __init__(self, texts: Tensor, text: Tensor, ln_post: nn.LayerNorm, proj: Tensor, rho: float, gamma: float, top: float,
                 hook: Between | None = None):
        self.texts, self.text, self.ln_post, self.proj, self.hook = texts, text, ln_post, proj, hook
        self.rho, self.gamma, self.top = rho, gamma, top
        self.head, self.neutral, self.tail, self.share, self.norm, self.pooled, self.masks = ([] for _ in range(7))

    @torch.no_grad()
    def __call__(self, tokens: Tensor, layer: int) -> Tensor:
        tokens = tokens if self.hook is None else self.hook(tokens, layer)
        patches = tokens[:, 1:]
        best, head, tail = head_and_tail(patches, self.texts, self.rho, self.gamma)
        head, tail = head.sum(-1) > 0, tail.sum(-1) > 0                   # (B, L)
        self.head.append(best[head].mean()), self.tail.append(best[tail].mean())
        self.neutral.append(best[~head & ~tail].mean())
        count = tir_marks(patches, self.text, self.ln_post, self.proj, self.top).sum(-1)       # (B, L), 0..N
        is_count = F.one_hot(count.long(), self.text.shape[-2] + 1).float()                   # (B, L, N+1)
        length = patches.float().norm(dim=-1, keepdim=True)
        self.share.append(is_count.mean((0, 1)))
        self.norm.append((is_count * length).sum((0, 1)) / is_count.sum((0, 1)))               # nan where no token has that count
        self.pooled.append(tokens.float().mean(1)), self.masks.append((head, tail))
        return tokens


def compare(before: Probe, after: Probe, episodes: int) -> list[dict]:
    """What two probes of the same images saw, a row a block, ready for JSON; `cka` of the pooled tokens is a mean over episodes."""
    rows = []
    for layer in range(len(before.head)):
        row = {"block": layer, "cka": linear_cka(*(p.pooled[layer].unflatten(0, (episodes, -1)) for p in (before, after))).mean().item()}
        for name, p in (("before", before), ("after", after)):
            row |= {f"{part}_{name}": getattr(p, part)[layer].item() for part in ("head", "neutral", "tail")}
            row |= {f"share_{name}": p.share[layer].tolist(), f"norm_{name}": [None if x != x else x for x in p.norm[layer].tolist()]}
        rows.append(row)
    return rows


def probe_table(rows: list[dict], whole: dict, episodes: int) -> str:
    """The diagnostics as text: cosine of tokens to their nearest text, alpha, beta, tokens that all classes mark, CKA."""
    lines = [f"mean over {episodes} episodes, before -> after tuning",
             "block  head           neutral        tail             alpha    beta  marked by all classes: share and length  CKA"]
    for row in rows:
        tokens = "  ".join(f"{row[f'{part}_before']:5.3f} -> {row[f'{part}_after']:5.3f}" for part in ("head", "neutral", "tail"))
        norms = " -> ".join("    -" if row[key][-1] is None else f"{row[key][-1]:5.1f}" for key in ("norm_before", "norm_after"))
        sinks = f"{100 * row['share_before'][-1]:5.1f} % -> {100 * row['share_after'][-1]:5.1f} %, {norms}"
        lines.append(f"{row['block']:5d}  {tokens}  {row.get('alpha', 0):6.3f}  {row.get('beta', 0):6.3f}  {sinks:40s}  {row['cka']:.3f}")
    gaps = "; ".join(f"{name.replace('_', ' ')} {whole[f'{name}_before']:.3f} -> {whole[f'{name}_after']:.3f}" for name in ("modality_gap", "gap_shift"))
    return "\n".join([*lines, f"features: CKA of frozen and tuned {whole['cka_features']:.3f}; {gaps}"])


def draw_patches(target: str, images: Tensor, masks: list[list[Tensor]], side: int, said: list[str], legend: str) -> None:
    """PNG of pictures (n, 3, S, S) uint8 with a line of text each; beside each picture it once more for every [head, tail] of masks.

    head and tail are (n, L) bool, the last side * side of L being the patches; head is tinted orange, tail blue.
    """
    from torchvision.utils import draw_bounding_boxes, save_image
    size, orange, blue = 192, torch.tensor([255, 140, 0]), torch.tensor([0, 110, 255])
    gap, width = torch.full((3, size, 4), 255.0), (size + 4) * (1 + len(masks)) - 4

    def caption(text: str) -> Tensor:
        strip = torch.full((3, 24, width), 255, dtype=torch.uint8)
        return draw_bounding_boxes(strip, torch.zeros(1, 4), [text], colors="white", label_colors="black").float()
    rows = [caption(legend)]
    for i, text in enumerate(said):
        panels = [F.interpolate(images[i: i + 1].float(), (size, size), mode="bilinear", antialias=True)[0]]
        for pair in masks:
            tinted = panels[0]
            for mask, colour in zip(pair, (orange, blue)):
                tint = F.interpolate(mask[i, -side * side:].view(1, 1, side, side).float().cpu(), (size, size))[0] / 2    # (1, size, size)
                tinted = tinted * (1 - tint) + colour.view(3, 1, 1) * tint
            panels += [gap, tinted]
        rows += [torch.cat(panels, 2), caption(text)]
    save_image(torch.cat(rows, 1) / 255, target)
