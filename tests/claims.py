"""Which of the papers' claims hold here: a row a claim, judged by its interval over the same episodes alone.

  python tests/claims.py --dataset toy
  python tests/claims.py --dataset eurosat --weights FOLDER --source FOLDER --episodes 50 --draw pictures

Takes train.py's flags but --method, with one dataset and one shot (100 episodes of 15 queries a class), and
three of its own.
--source: a dataset of the domain that the weights come from, for claims about domains; toy has its own.
--draw: a folder for pictures of what is seen. --out: a JSON (tests/claims.json) to which this run is added,
a run a dataset, shot and seed; the table that is printed and the picture beside it show all that it holds.

Trains what the claims compare, on the same episodes with the same crops, and looks inside; every 16 episodes
are kept under results/, and a rerun goes on from there. How a thing is measured, on the queries of every
episode, is said beside it. Tokens are looked at before block 8, where ATHA pulls and TIR weighs first, ahead
of a method's own hook: what is learned counts, not the pull itself.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections import namedtuple
from math import exp, isqrt, nan, sqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402
import toy_world  # noqa: E402
import train  # noqa: E402
from atha import class_weights_loss, head_and_tail, linear_cka  # noqa: E402
from atha import text_to_tokens, tir_marks, tir_step  # noqa: E402

PAPER = train.RECIPES["paper"]


# ----------------------------------------------------------------------------------------------------- claims

# A claim says that a quantity of Look is higher under what is trained first than under what is trained
# second; of two trainings the mean counts, of none zero; % is of the second. within: instead, that both are
# nearer than so much, which is our choice. reported: by the paper, of ViT-B/16 and its four datasets.
Claim = namedtuple("Claim", "words paper reported unit quantity more less within", defaults=[""])
CLAIMS = [Claim(*map(str.strip, line.split("|"))) for line in """
ATHA is above CLIP-LoRA                   | ATHA, main table | +2.43 | points | accuracy | atha | clip-lora
push alone is above CLIP-LoRA             | ATHA, ablation | | points | accuracy | atha-push | clip-lora
pull and push are above push alone        | ATHA, ablation | | points | accuracy | atha | atha-push
push alone is over half way from CLIP-LoRA to ATHA \
    | ATHA, ablation | most of it | points | accuracy | atha-push | atha clip-lora
5 % of heads and tails do as well as 10 % \
    | ATHA | not critical | points | accuracy | atha@rho=0.05@gamma=0.05 | atha | 1
20 % of heads and tails do as well as 10 % \
    | ATHA | not critical | points | accuracy | atha@rho=0.2@gamma=0.2 | atha | 1
fine-tuning lowers domain similarity      | ATHA, CKA | | CKA | domain | zero-shot | clip-lora
push raises it again                      | ATHA, CKA | | CKA | domain | atha-push | clip-lora
fine-tuning moves tokens to texts         | ATHA, distributions | | cosine | m | clip-lora | zero-shot
push alone raises heads                   | ATHA, ablation | | cosine | head | atha-push | clip-lora
push alone lowers tails                   | ATHA, ablation | | cosine | tail | clip-lora | atha-push
ATHA raises heads                         | ATHA, distributions | | cosine | head | atha | clip-lora
ATHA lowers tails                         | ATHA, distributions | | cosine | tail | clip-lora | atha
TIR is above CLIP-LoRA                    | TIR, main table | +2.28 | points | accuracy | tir | clip-lora
inhibiting is above CLIP-LoRA   | TIR, ablation | +1.67, 5-shot | points | accuracy | tir-inhibit | clip-lora
enhancing is above CLIP-LoRA    | TIR, ablation | +1.24, 5-shot | points | accuracy | tir-enhance | clip-lora
inhibiting is above enhancing | TIR, ablation | +0.43, 5-shot | points | accuracy | tir-inhibit | tir-enhance
both are above inhibiting alone | TIR, ablation | +0.78, 5-shot | points | accuracy | tir | tir-inhibit
the simplified rule does as well          | TIR | similar | points | accuracy | tir@tir_rule=simple | tir | 1
fine-tuning lengthens patches that all classes mark | TIR, sinks | | length | length | clip-lora | zero-shot
fine-tuning lets classes mark the same patches | TIR, attention | | share | overlap | clip-lora | zero-shot
TIR separates them                        | TIR, attention | | share | overlap | clip-lora | tir
two new classes mark what all classes mark | TIR, probe | | share | new | clip-lora |
more so than before fine-tuning           | TIR, probe | | share | new | clip-lora | zero-shot
masking what all classes mark raises domain similarity | TIR, probe | | CKA | masking | clip-lora |
after TIR it lowers it                    | TIR, probe | | CKA | masking | | tir
after TIR, doubling what one class marks lowers it | TIR, probe | | CKA | enhancing | | tir
SVL + RA is above CLIP-LoRA               | SVL, main table | +2.19 | points | accuracy | svl | clip-lora
SVL alone is above CLIP-LoRA              | SVL, ablation | +1.48 | points | accuracy | svl-only | clip-lora
RA alone is above CLIP-LoRA               | SVL, ablation | +1.10 | points | accuracy | ra-only | clip-lora
SVL + RA early is above late              | SVL, when | | points | accuracy | svl | svl@extra_last=true
late is below none                        | SVL, when | | points | accuracy | clip-lora | svl@extra_last=true
visual learning is below CLIP-LoRA        | SVL, gap table | | points | accuracy | clip-lora | lv
visual learning widens gap shift          | SVL, gap table | +0.160 | nats | gap_shift | lv | clip-lora
SVL narrows gap shift                     | SVL, gap table | +0.087 | nats | gap_shift | clip-lora | svl-only
RA narrows it further                     | SVL, gap table | +0.008 | nats | gap_shift | svl-only | svl
SVL + RA narrows the modality gap         | SVL | | distance | modality_gap | clip-lora | svl
SVL + RA learns no more numbers           | SVL, cost | +0.0028 | % | parameters | svl | clip-lora | 1
SVL + RA encodes no more pictures (FLOPs) | SVL, cost | +0.000021 | % | pictures | svl | clip-lora | 1
""".replace("\\\n", "").strip().splitlines()]


def student(freedom):
    """Student's t, two-sided 95 %, by Wallace's formula: right to 6e-4 of it from 9 degrees on."""
    return sqrt(freedom * (exp((1.959964 * (8 * freedom + 3) / (8 * freedom + 1)) ** 2 / freedom) - 1))


def interval(x):
    """Mean and half the 95 % interval of values (n,); [] of fewer than 10."""
    return [x.mean().item(), student(len(x) - 1) * x.std().item() / sqrt(len(x))] if len(x) >= 10 else []


def judge(claim, columns):
    """Verdict, effect and half its interval, over the episodes in which all could be measured.

    columns: {training: {quantity: its value in every episode}}. A claim holds where all of its interval
    agrees, and does not where none of it does.
    """
    more, less = (torch.tensor([columns[name][claim.quantity] for name in names.split()] or [[0]]).double()
                  .mean(0) for names in (claim.more, claim.less))
    x = 100 * (more / less - 1) if claim.unit == "%" else more - less
    effect = interval(x[x.isfinite()])
    if not effect:
        return [f"measured in {x.isfinite().sum()} episodes"]
    agrees = float(claim.within) - abs(effect[0]) if claim.within else effect[0]
    verdict = "holds" if agrees > effect[1] else "does not hold" if agrees < -effect[1] else "undecided"
    return [verdict, *effect]


# ---------------------------------------------------------------------------------------------- a look inside

class World:
    """Queries of E episodes: images (E, Q, 3, size, size), truth (E, Q), class texts, not of unit length.

    text (E, 5, embed) are the frozen ones; more (E, 7, embed): with two classes of no query. seeds: (seed,
    number) an episode; rows: tokens of the pool's classes.
    """

    @torch.no_grad()
    def __init__(self, clip, seeds, rows, pool, shot, query):
        self.tasks, wider = ([pool.task(number, way, shot, query, seed) for seed, number in seeds]
                             for way in (5, min(7, len(rows))))           # which begins with the same five
        images, self.truth, ids = (torch.stack(x).to(rows.device) for x in zip(*(
            (pool.images[task.query], task.truth, rows[wide.classes])
            for task, wide in zip(self.tasks, wider))))
        self.images = data.plain(images, clip.config)
        self.more = clip.encode_text(clip.trim(ids).flatten(0, 1)).unflatten(0, ids.shape[:2])
        self.text = self.more[:, :5]


# What is seen of the patches before a block, mean of an episode. m: cosine to the nearest class text, of all,
# of heads and of tails. share: of those that all five classes mark under TIR; length of these, and of all.
# overlap: share of a class's marks that another class sets too. new: how often two classes that were not
# trained mark what all five mark, minus how often they mark any. Under ATHA alpha and beta, share of episodes
# in which that is negative, and how far a push goes: |beta T'| in % of the length of all
BLOCK = "m head tail share length all overlap new alpha beta negative push".split()


class Look:
    """What a learner shows of a world's queries: features (E, Q, embed) of unit length, blocks of BLOCK.

    blocks (E, layers, 12). Of B pictures with L patches: m (B, L) before the last block; before block 8 ends
    (B, L), 1 for heads and -1 for tails, and marks (B, L, 7), those of each class. source: the same learner's
    look at the source, or None. The methods from `accuracy` on are measurements: (E,), or a number.
    """

    def __init__(self, learner, world, source=None):
        self.learner, self.world, self.rows = learner, world, []
        self.visual, self.unit = learner.clip.visual, F.normalize(world.text.float(), dim=-1)
        self.weigh = [block * learner.clip.config.vision_layers // 12 for block in PAPER.tir_blocks]
        self.texts = text_to_tokens(world.text, self.visual.proj)
        self.features = self.see(self.keep)
        self.gap = self.features.mean(1, True) - self.unit.mean(1, True)             # (E, 1, embed)
        seen = torch.stack(self.rows).permute(2, 0, 1)                               # (E, layers, 8)
        alpha, beta = (getattr([None, *learner.parts][-1], name, 0 * seen[..., 0]).detach()
                       for name in ("alpha", "beta"))                                # ATHA acts last
        push = 100 * beta.abs() * self.texts.norm(dim=-1).mean(1, True) / seen[..., 5]
        self.blocks = torch.cat([seen, torch.stack([alpha, beta, beta < 0, push], -1)], -1)
        self.source = source and Look(learner, source)

    @torch.no_grad()
    def see(self, before):
        """Unit features (E, Q, embed) of the queries; `before`: a hook ahead of the method's own."""
        hook = self.learner.hook(self.world.text)
        return self.learner.features(self.world.images, lambda x, layer: hook(before(x, layer), layer))

    def keep(self, tokens, layer):
        """The hook that looks and changes nothing."""
        patches = tokens[:, self.visual.first_patch:].float()
        m, head, tail = head_and_tail(patches, self.texts, PAPER.rho, PAPER.gamma)
        marks = tir_marks(patches, self.world.more, self.visual.ln_post, self.visual.proj, PAPER.tir_top)
        head, tail, count, new = head.any(-1), tail.any(-1), marks[..., :5].sum(-1), marks[..., 5:].mean(-1)
        every, length = count == 5, patches.norm(dim=-1)
        self.rows.append(torch.stack([
            self.mean(m), self.mean(m, head), self.mean(m, tail),
            self.mean(every.float()), self.mean(length, every), self.mean(length),
            self.mean(count * (count - 1)) / self.mean(count) / 4, self.mean(new, every) - self.mean(new)]))
        self.m = m                                                        # the last block's stays
        if layer == self.weigh[0]:
            self.ends, self.marks = head.float() - tail.float(), marks
        return tokens

    def mean(self, values, which=None):
        """Mean over an episode's patches of values (B, L), where `which` (B, L) is, if given: (E,)."""
        values = values if which is None else values.where(which, nan)
        return values.reshape(len(self.unit), -1).nanmean(1)

    def measure(self, quantity):
        """A measurement, or one of BLOCK before block 8, as a list of the episodes'."""
        found = self.blocks[:, self.weigh[0], BLOCK.index(quantity)] if quantity in BLOCK \
            else getattr(self, quantity)()
        return (self.unit.new_ones(len(self.unit)) * found).tolist()

    def accuracy(self):
        """In %."""
        return 100 * ((self.features @ self.unit.mT).argmax(-1) == self.world.truth).double().mean(-1)

    def modality_gap(self):
        """Distance of the mean unit picture from the mean unit text."""
        return self.gap.norm(dim=-1)[:, 0]

    def gap_shift(self):
        """What cross-entropy is lost as pictures and texts lie apart (Liang et al. 2022); 0: no shift helps.

        That is cross-entropy now minus its minimum when both move towards each other by half of -2, -1.9,
        ..., 2 times the line between their means, of unit length again.
        """
        move = torch.linspace(-1, 1, 41).to(self.gap).view(-1, 1, 1, 1) * self.gap         # (41, E, 1, embed)
        losses = class_weights_loss(
            F.normalize(self.features - move, dim=-1), self.world.truth.expand(41, -1, -1),
            F.normalize(self.unit + move, dim=-1), PAPER.scale)
        return losses[20] - losses.amin(0)

    def domain(self, rule=None):
        """Domain similarity: linear CKA of 50 target and 50 source features, mean of 20 random pairings.

        Each world is looked at with its own classes' texts; NaN without a source. rule: of marks, which
        weighs patches before the blocks where TIR acts.
        """
        def features(look):
            return look.see(lambda tokens, layer: tokens if layer not in self.weigh else tir_step(
                tokens, look.world.text, self.visual.ln_post, self.visual.proj, top=PAPER.tir_top, rule=rule,
                first_patch=self.visual.first_patch)) if rule else look.features
        if self.source is None:
            return nan
        pair, g = [features(self), features(self.source)], torch.Generator()
        return sum(linear_cka(*(x[:, torch.randperm(x.shape[1], generator=g)[:50]] for x in pair))
                   for _ in range(20)) / 20

    def masking(self):
        """What domain similarity gains when patches that all five classes mark are made zero."""
        return self.domain(lambda marks: 1 - marks.prod(-1)) - self.domain()

    def enhancing(self):
        """What it gains when patches that one class marks are doubled."""
        return self.domain(lambda marks: 1.0 + (marks.sum(-1) == 1)) - self.domain()

    def parameters(self):
        """Learned, in all episodes."""
        return sum(p.numel() for p in self.learner.learned().values())

    def pictures(self):
        """Encoded in training, which is what the FLOPs go to, in multiples of a step's."""
        return sum(1 + any(part.wants_plain(number) for part in self.learner.parts)
                   for number in range(self.learner.recipe.steps))


# ------------------------------------------------------------------------------------------------------ a run

def collect(args, source, draw, asked):
    """Train and measure: asked {training: quantities} -> {training: {quantity: values}}, and looks to draw.

    Every 16 episodes are a file; with `draw` the first ones, which are looked at, are trained again.
    """
    clip, tokenizer = train.load_clip(args)
    jobs = dict(zip(asked, train.plan(args, clip, tokenizer).values()))
    frozen, columns, looks = jobs["zero-shot"], {}, {}
    sides = [(frozen.token_ids, frozen.pool, *args.shot, 15)]
    if source or args.dataset == ["toy"]:
        pool = data.load(source, args.data, clip.config.image) if source else data.Pool(
            *toy_world.toy_pictures(100, 1, "source"), toy_world.TOY_CLASSES, "toy source")
        sides.append((train.class_rows(tokenizer, PAPER.prompt, pool.classes, clip), pool, 0, 10))
    settings = (asked, PAPER, args.values, args.precision, clip.fingerprint,
                [side[1].fingerprint for side in sides])
    Path(args.out).mkdir(exist_ok=True)
    for first in range(0, args.episodes, 16):
        seeds = [(args.seed, number) for number in range(first, min(first + 16, args.episodes))]
        file = Path(args.out, f"claims-{data.digest(seeds, settings)}.json")
        if draw and not first or not file.exists():
            found, worlds = {}, [World(clip, seeds, *side) for side in sides]
            for name, job in jobs.items():
                data.say(f"{args.dataset[0]}, seed {args.seed}, from episode {first}: {name}")
                look = Look(job.learn(worlds[0].tasks, seeds), *worlds)
                found[name] = {"blocks": look.blocks.tolist(), **{x: look.measure(x) for x in asked[name]}}
                looks.setdefault(name, look)
            file.write_text(json.dumps(found))
        for name, of in json.loads(file.read_text()).items():
            for quantity, values in of.items():
                columns.setdefault(name, {}).setdefault(quantity, []).extend(values)
    return columns, looks


def summary(claims, columns):
    """What is kept of a run: accuracy minus clip-lora's, claims, and what is seen by block."""
    right = {name: torch.tensor(of["accuracy"]) for name, of in columns.items()}
    # the first two are zero-shot and clip-lora
    return {"effects": {name: interval(x - right["clip-lora"]) for name, x in [*right.items()][2:]},
            "claims": {claim.words: judge(claim, columns) for claim in claims},
            "blocks": {name: torch.tensor(columns[name]["blocks"]).nanmean(0).tolist()
                       for name in COLOURS if name in columns}}


def tables(runs, title):
    """Print a row a claim and a column a run; then of one run what is seen, a row a block. Markdown."""
    print(f"| claim | paper | reported | {' | '.join(runs)} |\n{'|---' * (3 + len(runs))}|")
    for claim in CLAIMS:
        print(f"| {claim.words} ({claim.unit}) | {claim.paper} | {claim.reported}", end=" |")
        for run in runs.values():
            said, *effect = run["claims"].get(claim.words, [""])
            print(f" {' ± '.join(f'{x:.2g}' for x in effect)} {said} |", end="")
        print()
    print(f"\n| {title} | block | {' | '.join(BLOCK)} |\n{'|---' * 14}|")
    for name, blocks in runs[title]["blocks"].items():
        for i, row in enumerate(blocks):
            print(f"| {name} | {i} | {' | '.join(f'{x:.4g}' for x in row)} |")


# --------------------------------------------------------------------------------------------------- pictures

# to be read on light and on dark pages
COLOURS = {"zero-shot": "#8a8f98", "clip-lora": "#2f80d8", "atha": "#e0662f", "tir": "#2b9a5b"}


def svg(width, height, parts):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" fill="#7a828c" '
            f'font-family="sans-serif" font-size="13" stroke-width="3">{"".join(parts)}</svg>')


def draw_effects(runs):
    """SVG: a row a method, a column a run: accuracy minus clip-lora's, its interval; faint if undecided."""
    parts, scale = [], 80 / max(1, *(sum(map(abs, effect)) for run in runs.values()
                                     for effect in run["effects"].values()))        # pixels a point
    for x, (title, run) in enumerate(runs.items()):
        x = 280 + 190 * x
        parts.append(f'<text x="{x}" y="16" text-anchor="middle">{title}</text>'
                     f'<path d="M{x} 24v290m-80 0v-5h160v5" fill="none" stroke="#7a828c" stroke-width="1"/>'
                     f'<text x="{x}" y="332" text-anchor="middle">± {80 / scale:.2g} points</text>')
        for y, (name, effect) in enumerate(run["effects"].items(), 2):
            parts.append(f'<text x="8" y="{20 * y + 4}">{name}</text>')
            if effect:
                mean, half = (scale * value for value in effect)
                parts.append(f'<g fill="#2f80d8" stroke="#2f80d8" opacity="{1 if abs(mean) > half else 0.6}">'
                             f'<path d="M{x + mean - half:.1f} {20 * y}h{2 * half:.1f}"/>'
                             f'<circle cx="{x + mean:.1f}" cy="{20 * y}" r="3"/></g>')
    return svg(190 + 190 * len(runs), 340, parts)


def draw_similarities(looks):
    """SVG: how m is distributed over the source's and the target's patches; a curve a training."""
    parts, (low, high) = [], looks["atha"].m.aminmax()
    for y, (name, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="290" y="{40 + 20 * y}" style="fill:{colour}">{name}</text>')
        for x, look in enumerate((looks[name].source, looks[name])):
            heights = torch.histc(look.m, 60, low, high) if look else ()
            line = " ".join(f"{10 + 400 * x + 6 * i},{210 - 180 * h / max(heights):.1f}"
                            for i, h in enumerate(heights))
            parts.append(f'''<text x="{10 + 400 * x}" y="20">{("source", "target")[x]}</text>
                <text x="{10 + 400 * x}" y="232">cosine {low:.2f}</text>
                <text x="{364 + 400 * x}" y="232" text-anchor="end">{high:.2f}</text>
                <polyline points="{line}" fill="none" stroke="{colour}"/>''')
    return svg(780, 240, parts)


def draw_patches(looks, file):
    """PNG, a row a class: a picture; heads orange and tails blue, frozen and under ATHA; then patches, from
    blue where no class marks them to orange where all do, frozen, tuned and under TIR."""
    frozen, tuned, atha, tir = map(looks.get, COLOURS)
    images, side = F.interpolate(frozen.world.images[0, ::15], 144), isqrt(frozen.m.shape[1])
    tints = [2 * look.marks[..., :5].mean(-1) - 1 for look in (frozen, tuned, tir)]            # (B, L)
    panels = [images + F.interpolate(tint[:75:15].view(5, 1, side, side), 144)
              * images.new_tensor([2, 0, -2])[:, None, None] for tint in (frozen.ends, atha.ends, *tints)]
    save_image(torch.stack([images, *panels], 1).flatten(0, 1), file, nrow=6, normalize=True)


def main(argv=None, claims=CLAIMS):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source")
    parser.add_argument("--draw", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("claims.json"))
    ours, rest = parser.parse_known_args(argv)
    asked = {}
    for claim in claims:
        for name in f"zero-shot clip-lora {claim.more} {claim.less}".split():
            asked.setdefault(name, {"accuracy": 0})[claim.quantity] = 0
    args = train.parse(["--episodes", "100", *rest, "--method", *asked])
    torch.set_flush_denormal(True)
    columns, looks = collect(args, ours.source, ours.draw, asked)
    title = f"{Path(args.dataset[0]).name}, {args.shot[0]}-shot, seed {args.seed}"
    runs = json.loads(ours.out.read_text()) if ours.out.exists() else {}
    runs[title] = summary(claims, columns)
    ours.out.write_text(json.dumps(runs))
    ours.out.with_suffix(".svg").write_text(draw_effects(runs))
    tables(runs, title)
    print("""
claims.svg: accuracy minus clip-lora's on the same episodes. A bar that crosses the line decides nothing.
similarities.svg: how many patches have which cosine to their nearest class text, before the last block. If
the paper is right, the source has few heads and many tails, and the target is flat; ATHA makes a hump, right.
patches.png: target pictures; heads orange, tails blue, frozen and under ATHA: are heads on the object? Then
how many classes mark a patch, from none, blue, to all, orange, frozen, tuned and under TIR: sinks would be
orange in every picture.""")
    if ours.draw:
        ours.draw.mkdir(exist_ok=True)
        (ours.draw / "similarities.svg").write_text(draw_similarities(looks))
        draw_patches(looks, ours.draw / "patches.png")


if __name__ == "__main__":
    main()
