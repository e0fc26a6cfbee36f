"""What a training step costs, beside other libraries' and on a new GPU.

    python tests/bench.py --peer           ViT-B/16, random weights, beside transformers with peft; on a
                                           CPU in float32, or with --precision bfloat16
    python tests/bench.py --gpu            a report on this GPU, in eight minutes at most
    python tests/bench.py --gpu --small    the same with the toy CLIP, to try it on any machine

What is compared runs in turns, so that other work on the machine slows both alike; figures are medians.
Pictures are the toy world's, about as large as EuroSAT's. FLOP are PyTorch's count, which on a CPU leaves out
attention, 4 % of ViT-B/16's.
"""
import os
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import train    # before torch: it says how threads wait
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import clip_min
import data

CUDA = torch.cuda.is_available()
DEVICE, POOL = "cuda" if CUDA else "cpu", data.load("toy")
DTYPE = torch.bfloat16 if CUDA or "bfloat16" in sys.argv else torch.float32
TOY, TOKENIZER = clip_min.load(HERE / "toy_clip.safetensors", DEVICE)
CLIP = (TOY if "--small" in sys.argv else clip_min.CLIP()).to(DEVICE, DTYPE)
SIZES = (1, 2, 4) if CLIP is TOY else (1, 32, 128)                       # episodes at once


def now():
    """Wall and CPU time in seconds, once the GPU has done what it was asked to."""
    torch.get_device_module(DEVICE).synchronize()
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def in_turns(**calls):
    """Run calls that time themselves, print medians and ratios to the first; the medians of wall time."""
    times = torch.stack([torch.stack([call() for call in calls.values()]) for _ in range(6)])[1:]
    middle, ratios = times.median(0)[0], (times / times[:, :1]).median(0)[0]        # the first turn warms up
    for name, ms, ratio in zip(calls, 1000 * middle, ratios):
        print(f"  {name:10s} {ms[0]:9.2f} ms = {ratio[0]:.3f}, CPU {ms[1]:9.2f} = {ratio[1]:.3f}")
    return middle[:, 0]


def product():
    a, begun = torch.randn(4096, 4096, device=DEVICE, dtype=DTYPE), now()
    a @ a
    return now() - begun


def work_of(clip, method, episodes=1, shot=1, **recipe):
    """A job, E tasks for it, their seeds."""
    rows = train.class_rows(TOKENIZER, "a photo of a {}.", POOL.classes, clip)
    job = train.Job(clip, POOL, rows, method, train.Recipe(**recipe))
    return job, [POOL.task(number, shot=shot) for number in range(episodes)], range(episodes)


def training(method, episodes=1, **recipe):
    """A call that trains E episodes for some steps: seconds of one but for the first, wall and CPU, (2,)."""
    job, *work = work_of(CLIP, method, episodes, steps=4, extra_share=1.0, **recipe)

    def call():
        marks = []
        job.learn(*work, lambda number: marks.append(now()))
        return torch.stack(marks).diff(dim=0).median(0)[0]

    return call


def say_speed(call, seconds):
    """FLOP a second of a step of `training`, beside those of a large product, and memory."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    with FlopCounterMode(display=False) as counter:
        call()
    speed = counter.get_total_flops() / 4 / seconds / 1e12                       # of 4 steps
    print(f"  {speed:.3g} TFLOP/s, {speed / PEAK:.0%} of the product's; "
          f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def peer():
    """A step of clip-lora on 5 pictures without augmentation, and transformers with peft at the same work."""
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    config = CLIPVisionConfig(**clip_min.hugging_face(CLIP)[1]["vision_config"])
    lora = LoraConfig(r=16, lora_alpha=8, use_rslora=True, lora_dropout=0.25,
                      target_modules="q_proj k_proj v_proj".split())
    model = CLIPVisionModelWithProjection(config).to(DEVICE, DTYPE)
    model = get_peft_model(model, lora).train()
    adamw = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    images = torch.randn(5, 3, *[CLIP.config.image] * 2).to(DEVICE, DTYPE)
    text = torch.eye(CLIP.config.embed, 5, device=DEVICE)

    def theirs():
        begun = now()
        logits = 100 * F.normalize(model(images).image_embeds.float(), dim=-1) @ text
        F.cross_entropy(logits, torch.arange(5, device=DEVICE)).backward()
        adamw.step()
        adamw.zero_grad()
        return now() - begun

    ours = training("clip-lora", augment="none")
    say_speed(ours, in_turns(theirs=theirs, ours=ours)[1])


def error(ours, theirs):
    return (ours - theirs).abs().max() / theirs.abs().max()


def named(tensors, start):
    return {name.removeprefix(start): x.float() for name, x in tensors.items() if name.startswith(start)}


def golden():
    """Runs of the authors' code and ours in float32: largest difference of answers, of the largest answer."""
    run = load_file(HERE / "golden/released_atha_tir.safetensors", DEVICE)
    clip = clip_min.from_weights(named(run, "weights.")).to(DEVICE)
    given = [run[name][None] for name in "images labels token_ids".split()]
    for method in ("atha", "tir"):
        recipe = train.recipe_for("released-atha", method, steps=10, dropout=0.0)
        learner = train.adapt(clip, *given, method, recipe, lora_A=named(run, "lora_A."))
        print(f"  {method}", error(learner.logits(run["queries"][None])[0], run[f"{method}.query_logits"]))


def toy():
    """Episodes in a batch of 14 and the first alone; how many zero-shot answers differ in bfloat16."""
    job, tasks, seeds = work_of(TOY.float(), "atha+svl", 14, steps=10, dropout=0.0)
    print("  losses", error(job.learn(tasks, seeds).losses[:, :1], job.learn(tasks[:1], seeds[:1]).losses))
    job, answers = work_of(TOY, "zero-shot")[0], []
    for dtype in (torch.float32, torch.bfloat16, DTYPE):
        TOY.to(dtype)
        answers.append(job.logits(job.learn(tasks, seeds), tasks).argmax(-1))
    print(f"  {(answers[0] != answers[1]).sum()} of {answers[0].numel()}")


def steps():
    """A step by method (svl with its losses in every step: in training in 60 %) and how fast both are."""
    for episodes in SIZES:
        for name in "atha tir svl".split():                              # svl last: it may not fit memory
            print(f"  E = {episodes}")
            calls = {each: training(each, episodes) for each in ("clip-lora", name)}
            for call, seconds in zip(calls.values(), in_turns(**calls)):
                say_speed(call, seconds)


def compiled():
    """A step of clip-lora with torch.compile on the blocks, at the largest E."""
    clip_min.Block.forward = torch.compile(clip_min.Block.forward)
    call = training("clip-lora", SIZES[2])
    in_turns(eager=torch.compiler.set_stance("force_eager")(call), compiled=call)


def table_rows():
    """How long atha's row of the papers' tables would take, from 3 batches."""
    for shot, total, episodes in (1, 800, SIZES[2]), (5, 400, SIZES[1]):
        job, tasks, seeds = work_of(CLIP, "atha", episodes, shot)
        begun = now()[0]
        for _ in range(3):
            job.logits(job.learn(tasks, seeds), tasks)
        seconds = (now()[0] - begun) / 3 / episodes
        print(f"  {total} episodes of {shot} shot, {episodes} at once: {total * seconds / 60:.1f} minutes")


def command_line():
    """train.py killed early, then let finish: episodes; how many are there how often. Out of memory."""
    os.system(f"""
        cd {HERE.parent}
        out=$(mktemp -d)
        run="{sys.executable} train.py --dataset toy --method clip-lora --query 1 --device {DEVICE}"
        forty="$run --episodes 40 --batch 4 --steps 40 --out $out"
        $forty 2> $out/log &
        until grep -qs accuracy $out/*.jsonl; do sleep 0.1; done; kill -9 $!
        grep -h accuracy $out/*.jsonl | wc -l
        $forty 2>> $out/log
        grep -h accuracy $out/*.jsonl | sort | uniq -c | cut -c-8 | uniq -c
        export PYTORCH_CUDA_ALLOC_CONF=per_process_memory_fraction:0.004
        [ {DEVICE} = cuda ] || ulimit -v 6000000
        $run --episodes 512 --batch 512 --steps 1 --out $out/small 2>&1 | grep -v Warning
        rm -r $out""")


torch.backends.cudnn.allow_tf32 = False                                  # float32 means float32
torch.set_flush_denormal(True)
sys.stdout.reconfigure(line_buffering=True)
os.system(f"""nvidia-smi -L 2> /dev/null; grep -m 1 'model name' /proc/cpuinfo; date +%F
              echo torch {torch.__version__}, {DTYPE}, {torch.get_num_threads()} threads""")
PEAK = 0.13744 / in_turns(product=product)[0]                            # TFLOP a second
REPORT = golden, toy, steps, peer, table_rows, command_line, compiled
for section in REPORT if "--gpu" in sys.argv else [peer]:
    print(f"{time.process_time():.0f} s: {section.__doc__}")
    try:
        section()
    except Exception:                                                    # the others go on
        traceback.print_exc()
