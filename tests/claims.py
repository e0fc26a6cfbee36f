"""Which of the papers' claims hold here: one row a claim, judged by its 95 % interval alone.

  python tests/claims.py --dataset toy
  python tests/claims.py --dataset eurosat --source FOLDER --episodes 100

Takes train.py's options but --method, with one dataset and one shot, and --source: a folder of class folders
with pictures of the domain that the weights come from, for the claims about domain similarity (toy has its
own). Trains what the claims need, each once, on the same episodes, looks inside, and keeps both under --out
(default results/claims): a rerun goes on from there. Writes the rows as claims-*.json and, as effects with
their intervals about zero, claims-*.svg there too.

A claim says that an effect, paired over episodes, is above zero. It holds when the whole 95 % interval is,
does not hold when the whole interval is below, and is undecided otherwise. Where what it is about is missing
(no gain to halve, no sinks) there is nothing to see. Of some twenty rows, one is off by chance.

How it is measured, on the queries of every episode:
- Tokens are looked at before a method's own hook adds to them, at the first block where ATHA pulls (cosines)
  or TIR weighs (sinks), so that a pull is not counted as learning.
- Sinks are the patches that all classes mark. Our choice: there are some when, after fine-tuning, these are
  at least 1.5 times as long as the other patches.
- Domain similarity is the linear CKA of features of equally many source and target pictures through the same
  model. Our choice: mean of 20 random pairings, the same ones for every model.
- Masking sets the sinks to zero before TIR's blocks, there also before TIR weighs the rest.
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from html import escape
from math import isfinite, nan
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import clip_min  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402
from atha import Probe, domain_similarity, gap_shift, mask_sinks  # noqa: E402
from train import UsageError, mean_and_interval  # noqa: E402

Effect = dict[tuple[str, str], float]        # (what is trained, quantity) -> its weight in a sum
Seen = dict[str, dict[int, dict]]            # what is trained -> episode -> quantities

# trained beside the methods by name: name -> method and fields of its recipe
TRAINED = {"svl-late": ("svl", {"extra_last": True}),
           "atha-still": ("atha", {"alpha": 0.0, "beta": 0.0, "token_lr": 0.0})}
UNITS = {"accuracy": "points", "gap_shift": "nats", "domain": "CKA", "domain_masked": "CKA",
         "similarity": "cosine", "head": "cosine", "tail": "cosine",
         "sink_share": "share", "sink_norm": "length", "sink_length": "times the others"}


# ----------------------------------------------------------------------------------------------------- claims

@dataclass(frozen=True)
class Claim:
    """An effect that a paper says is above zero; there is nothing to see unless `needs` is above `least`."""
    said: str
    paper: str
    reported: str                            # the paper's figure, where it gives one
    effect: Effect
    needs: Effect | None = None
    least: float = 0.0
    without: str = ""                        # said where there is nothing to see; {} is what was needed


def above(more: str, less: str, quantity: str = "accuracy") -> Effect:
    return {(more, quantity): 1.0, (less, quantity): -1.0}


GAIN = above("atha", "clip-lora")
sinks = partial(Claim, paper="TIR", reported="", needs={("clip-lora", "sink_length"): 1.0}, least=1.5,
                without="patches that all classes mark are {} times as long as the others")
CLAIMS = [
    Claim("ATHA is above CLIP-LoRA", "ATHA", "+2.43, 1 shot", GAIN),
    Claim("TIR is above CLIP-LoRA", "TIR", "+2.45, 5 shot", above("tir", "clip-lora")),
    Claim("SVL + RA is above CLIP-LoRA", "SVL + RA", "+2.19, 1 shot", above("svl", "clip-lora")),
    Claim("push alone gives at least half of ATHA's gain", "ATHA", "most of it",
          {("atha-push", "accuracy"): 1.0, ("atha", "accuracy"): -0.5, ("clip-lora", "accuracy"): -0.5},
          needs=GAIN, without="ATHA's gain is {}"),
    Claim("TIR: inhibiting is above enhancing", "TIR", "+0.43, 5 shot", above("tir-inhibit", "tir-enhance")),
    Claim("SVL alone is above CLIP-LoRA", "SVL + RA", "+1.48, 1 shot", above("svl-only", "clip-lora")),
    Claim("RA alone is above CLIP-LoRA", "SVL + RA", "+1.10, 1 shot", above("ra-only", "clip-lora")),
    Claim("SVL + RA early is above late", "SVL + RA", "", above("svl", "svl-late")),
    Claim("visual learning widens gap shift", "SVL + RA", "+0.160", above("lv", "clip-lora", "gap_shift")),
    Claim("SVL narrows gap shift", "SVL + RA", "+0.087", above("clip-lora", "svl-only", "gap_shift")),
    Claim("RA narrows it further", "SVL + RA", "+0.008", above("svl-only", "svl", "gap_shift")),
    Claim("fine-tuning lowers domain similarity", "ATHA", "", above("zero-shot", "clip-lora", "domain")),
    Claim("push raises it again", "ATHA", "", above("atha-push", "clip-lora", "domain")),
    Claim("fine-tuning moves tokens to texts", "ATHA", "", above("clip-lora", "zero-shot", "similarity")),
    Claim("ATHA raises heads against that", "ATHA", "", above("atha", "clip-lora", "head")),
    Claim("ATHA lowers tails against that", "ATHA", "", above("clip-lora", "atha", "tail")),
    sinks("fine-tuning makes sinks longer", effect=above("clip-lora", "zero-shot", "sink_norm")),
    sinks("fine-tuning makes more sinks", effect=above("clip-lora", "zero-shot", "sink_share")),
    sinks("TIR makes sinks shorter", effect=above("clip-lora", "tir", "sink_norm")),
    sinks("TIR makes fewer sinks", effect=above("clip-lora", "tir", "sink_share")),
    sinks("masking sinks raises domain similarity", effect={("clip-lora", "domain_masked"): 1.0,
                                                            ("clip-lora", "domain"): -1.0}),
    sinks("after TIR it lowers it", effect={("tir", "domain"): 1.0, ("tir", "domain_masked"): -1.0}),
]


def measured(effect: Effect, seen: Seen) -> list[float]:
    """The effect in every episode in which all its quantities could be measured."""
    terms = [[nan if record[quantity] is None else weight * record[quantity]
              for _, record in sorted(seen[name].items())] for (name, quantity), weight in effect.items()]
    return [total for total in map(sum, zip(*terms, strict=True)) if isfinite(total)]


def judge(values: list[float]) -> tuple[float, float, str]:
    """Mean of an effect over episodes, half its 95 % interval, and the verdict that it is above zero."""
    mean, half = mean_and_interval(values)
    below = "does not hold" if mean + half < 0 else "undecided"
    return mean, half, "holds" if mean - half > 0 else below


def row_of(claim: Claim, seen: Seen) -> dict:
    """A row of the table, ready for JSON, without an effect if fewer than two episodes measured it."""
    values, needed = measured(claim.effect, seen), measured(claim.needs or claim.effect, seen)
    row = {"claim": claim.said, "paper": claim.paper, "reported": claim.reported, "episodes": len(values),
           "unit": UNITS[next(iter(claim.effect))[1]], "effect": None, "interval": None, "because": ""}
    if len(values) > 1:
        row["effect"], row["interval"], row["verdict"] = judge(values)
    if claim.needs and len(needed) > 1:
        mean, half = mean_and_interval(needed)
        if not mean - half > claim.least:
            row["because"] = claim.without.format(f"{mean:.2f} ± {half:.2f}")
    elif len(needed) < 2 or len(values) < 2:
        asked = row["unit"] == "CKA" and not (claim.needs and len(needed) < 2)
        row["because"] = "give --source" if asked else "there are none"
    return row | ({"verdict": "nothing to see here"} if row["because"] else {})


# ------------------------------------------------------------------------------------------ train and measure

def tokens_seen(probe: Probe, pull: int, weigh: int, episode: int) -> dict[str, float]:
    """Quantities of an episode off a probe, at the first block where ATHA pulls or TIR weighs."""
    norm, share = (probe.rows[weigh][name][episode].tolist() for name in ("norm", "share"))
    total = sum(n * s for n, s in zip(norm[:-1], share[:-1]) if s)        # of none it is NaN, its share 0
    others = total / (1 - share[-1]) if share[-1] < 1 else nan
    similar = {name: probe.rows[pull][of][episode].item()
               for name, of in (("similarity", "all"), ("head", "head"), ("tail", "tail"))}
    return {**similar, "sink_share": share[-1], "sink_norm": norm[-1], "sink_length": norm[-1] / others}


@torch.no_grad()
def measure(job: train.Job, learner: train.Learner, tasks: list[data.Task], seeds: list[tuple],
            source: Tensor | None = None) -> list[dict]:
    """What the claims compare beside accuracies, in each episode of a learner. source (n, 3, S, S) uint8."""
    r, visual, (text, hook_text) = job.recipe, learner.backbone.visual, learner.eval().text()
    layers = learner.backbone.config.vision_layers
    pull, *weigh = (block * layers // 12 for block in (r.alpha_block, *r.tir_blocks))
    probe, mask = Probe(hook_text, visual, r), mask_sinks(hook_text, visual, blocks=weigh, top=r.tir_top)
    queries = learner.prepare(job.pictures(torch.stack([task.query for task in tasks])))
    queries = queries.expand(len(tasks), -1, -1, -1, -1)                 # (E, Q, 3, S, S)
    features = learner.features(queries, learner.hook(hook_text, probe))                      # (E, Q, embed)
    records = [{"domain": None, "domain_masked": None, **tokens_seen(probe, pull, weigh[0], e),
                "gap_shift": gap_shift(f, t, task.truth.to(f.device), scale=r.scale).item()}
               for e, (f, t, task) in enumerate(zip(features, text, tasks))]
    if source is not None:
        order = [torch.randperm(len(source), generator=data.generator("source", *seed)) for seed in seeds]
        rows = torch.stack(order)[:, : queries.shape[1]]
        pictures = learner.prepare(source[rows].to(text.device))          # (E, Q, 3, S, S)
        for name, before in (("domain", None), ("domain_masked", mask)):
            hook = learner.hook(hook_text, before)
            theirs, ours = (learner.features(images, hook) for images in (pictures, queries))
            for seed, record, x, y in zip(seeds, records, theirs, ours):
                record[name] = domain_similarity(x, y, data.generator("pairings", *seed)).item()
    return [{name: x if x is not None and isfinite(x) else None for name, x in record.items()}
            for record in records]


class Measured(train.Job):
    """A job that also looks inside what it has trained, and keeps it: a JSON line an episode."""
    source: Tensor | None
    inside: train.Results

    def learn(self, tasks, seeds, **kwargs):
        self.seeds = seeds
        return super().learn(tasks, seeds, **kwargs)

    def logits(self, learner, tasks, told=int):
        answers = super().logits(learner, tasks, told)
        records = measure(self, learner, tasks, self.seeds, self.source)
        for (_, number), record, logits, task in zip(self.seeds, records, answers, tasks):
            right = (logits.argmax(-1) == task.truth).double().mean().item()
            record |= {"episode": number, "accuracy": 100 * right}
        self.inside.append(records)
        self.inside.done |= {record["episode"]: record for record in records}
        return answers


def stem_of(args: argparse.Namespace) -> str:
    return f"{Path(args.dataset[0]).name}-{args.way}way-{args.shot[0]}shot-{args.recipe}-seed{args.seed}"


def trained(args: argparse.Namespace, name: str, loaded: tuple, source: data.Pool | None) -> dict[int, dict]:
    """Train a method, or one of TRAINED, where it is not done yet; returns what was measured by episode."""
    (dataset,), (shot,), (method, changed) = args.dataset, args.shot, TRAINED.get(name, (name, {}))
    args = argparse.Namespace(**vars(args) | {"out": str(Path(args.out) / name)})
    recipe = replace(train.flagged(args, train.recipe_for(args.recipe, method, shot, dataset)), **changed)
    plain = train.make_job(args, *loaded, recipe, method)
    job = Measured(**{f.name: getattr(plain, f.name) for f in fields(plain)})
    job.source = source and source.images
    header = {"source": source and source.fingerprint, "recipe": asdict(recipe)}
    job.inside = train.Results(Path(args.out) / f"{stem_of(args)}-inside", header)
    accuracies = train.run_job(args, job, dataset, shot)
    if accuracies.keys() - job.inside.done.keys():
        raise UsageError(f"{args.out} has results that were not looked into: give another --out")
    return {number: job.inside.done[number] for number in accuracies}


# ---------------------------------------------------------------------------------------------------- results

def shown(row: dict) -> str:
    """An effect with its interval and unit."""
    plus, form = ("+.2f", ".2f") if row["unit"] == "points" else ("+.2g", ".2g")
    return "" if row["effect"] is None else f"{row['effect']:{plus}} ± {row['interval']:{form}} {row['unit']}"


def table(rows: list[dict]) -> str:
    lines = ["| claim | paper | reported | here | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        verdict = f"{row['verdict']}: {row['because']}" if row["because"] else row["verdict"]
        lines.append(f"| {row['claim']} | {row['paper']} | {row['reported']} | {shown(row)} | {verdict} |")
    return "\n".join(lines)


def picture(rows: list[dict], title: str) -> str:
    """SVG of effects with their intervals about zero, a scale a unit, in colours for light and dark pages."""
    colours = {"holds": "#1a9850", "does not hold": "#e0542f"}
    zero, half, y, parts = 600, 110, 20, []

    def say(x: float, words: str, more: str = "") -> None:
        parts.append(f'<text x="{x}" y="{y}" {more}>{escape(words)}</text>')
    say(10, title, 'font-weight="bold"')
    for unit in dict.fromkeys(row["unit"] for row in rows):
        some = [row for row in rows if row["unit"] == unit]
        widest = max(abs(row["effect"] or 0) + (row["interval"] or 1e-9) for row in some)
        y += 28
        say(zero, unit, 'text-anchor="middle" font-style="italic"')
        for row in some:
            y += 20
            colour = colours.get(row["verdict"], "#808080")
            say(10, row["claim"])
            say(zero + half + 10, row["verdict"], f'style="fill:{colour}"')
            if row["effect"] is not None:
                middle, reach = (half * row[key] / widest for key in ("effect", "interval"))
                faint = 0.4 if row["because"] else 1
                say(zero - half - 10, shown(row), 'text-anchor="end"')
                parts.append(f'<path d="M{zero} {y - 15}v20" stroke="#808080"/>'
                             f'<g opacity="{faint}" fill="{colour}">'
                             f'<rect x="{zero + middle - reach:.1f}" y="{y - 6}" width="{2 * reach:.1f}" '
                             'height="3"/>'
                             f'<circle cx="{zero + middle:.1f}" cy="{y - 4.5}" r="4"/></g>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {zero + half + 150} {y + 12}"'
    return "\n".join([f'{head} fill="#808080" font-family="sans-serif" font-size="13">', *parts, "</svg>\n"])


# ----------------------------------------------------------------------------------------------- command line

def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--source")
    ours, rest = parser.parse_known_args(argv)
    args = train.parse(["--out", "results/claims", *rest])
    if len(args.dataset) != 1 or len(args.shot) != 1 or args.episodes == 1:
        raise UsageError("the claims need one --dataset, one --shot and --episodes of two or more")
    if args.split or args.probe or args.draw or args.recipe == "released" or {"--method"} & set(rest):
        raise UsageError("the claims take no --split, --probe, --draw or --method, and a trainer's --recipe")
    args.source = ours.source
    return args


def run(args: argparse.Namespace, claims: list[Claim] = CLAIMS) -> list[dict]:
    """Train, measure, print the table, write rows and picture. Returns the rows."""
    (dataset,), source = args.dataset, None
    backbone, tokenizer = train.begin(args)
    if args.source:
        source = data.load_folder(args.source)
    elif dataset == "toy":
        source = data.Pool(*data.toy_pictures(100, seed=1, domain="source"), data.TOY_CLASSES, "toy source")
    if source and len(source.labels) < args.way * args.query:
        raise UsageError(f"--source {args.source} has {len(source.labels)} pictures, fewer than an episode's "
                         f"{args.way * args.query} queries")
    needed = dict.fromkeys(term for claim in claims for term in [*claim.effect, *(claim.needs or ())])
    compared = {name for name, quantity in needed if quantity == "domain"}
    loaded = backbone, tokenizer, data.load(dataset, args.data)
    seen = {name: trained(args, name, loaded, source if name in compared else None)
            for name in dict.fromkeys(name for name, _ in needed)}
    rows = [row_of(claim, seen) for claim in claims]
    accuracies = {name: mean_and_interval([record["accuracy"] for record in of.values()])
                  for name, of in seen.items()}
    kept = {"episodes": len(next(iter(seen.values()))), "accuracies": accuracies, "rows": rows}
    title = f"{stem_of(args)}, {kept['episodes']} episodes: effects with 95 % intervals"
    stem = Path(args.out) / f"claims-{stem_of(args)}"
    Path(f"{stem}.json").write_text(json.dumps(kept, indent=1))
    Path(f"{stem}.svg").write_text(picture(rows, title))
    for name, (mean, half) in accuracies.items():
        print(f"{name:12s} {mean:6.2f} ± {half:.2f} %")
    few = "\n\nfewer than 20 episodes: the intervals are too narrow to judge by" * (kept["episodes"] < 20)
    print(f"\n{table(rows)}{few}\n\nwrote {stem}.json and {stem}.svg")
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 2 for a request that cannot be met, said in one line."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        run(parse(argv))
        return 0
    except (UsageError, clip_min.WeightsError, data.DataError, OSError) as e:
        data.progress(f"claims.py: error: {' '.join(str(e).split())}")
        return 2
    except KeyboardInterrupt:
        data.progress("stopped; finished episodes are kept, the same command goes on from there")
        return 130


if __name__ == "__main__":
    sys.exit(main())
