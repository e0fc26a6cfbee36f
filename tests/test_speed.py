"""What a step costs, counted, and that no step waits for the host: as on a GPU, on any machine. What is faster on a CPU."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench import Count, HostError, as_gpu, counted
from conftest import refused

import clip_min
import train
from clip_min import CLIP, CLIPConfig

SMALL = CLIPConfig(embed=64, image=32, vision_width=64, vision_layers=2, text_width=64, text_layers=2)
PE_CORE = replace(SMALL, family="pe-core", activation="gelu")


@pytest.mark.parametrize("method, kernels, tflop, gigabytes", [
    ("clip-lora", 970, 0.338, 1.75),
    ("atha", 1545, 0.342, 1.99),
])
def test_cost_of_a_step(method, kernels, tflop, gigabytes):
    found = counted(method)[0].total()
    for value, limit in zip(found, (kernels, tflop, gigabytes)):
        assert 0.97 * limit < value <= limit, f"kernels, TFLOP, GB: {found}"


def test_the_count_of_known_operations():
    shapes = (64, 8), (8, 16), (16,)
    x, weight, bias = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    count = Count()
    with as_gpu(count):
        count.on = True
        y = torch.addmm(bias, x, weight)                         # one, 2 * 64 * 8 * 16 FLOP
        y.view(8, 8, 16).transpose(0, 1)                         # none
        (y + 1).mul_(2)                                          # two, each reads and writes y
        torch._foreach_add_([x] * 111, 1)                        # two: 110 tensors a kernel
    kernels, tflop, gigabytes = count.total()
    assert kernels == 5 and tflop == 2 * 64 * 8 * 16 / 1e12
    assert gigabytes * 1e9 == 2 * (16 + 64 * 8 + 8 * 16 + 64 * 16) + 2 * 2 * 2 * 64 * 16 + 2 * 64 * 8
    assert not torch.ones(1, device="meta").is_cuda, "as_gpu ends"


@pytest.mark.parametrize("method", "clip-lora coop maple atha tir svl lv coop+atha+tir".split())
@pytest.mark.parametrize("recipe", list(train.RECIPES))
def test_no_step_meets_the_host(method, recipe):
    """A wait, a copy and a mix of devices raise HostError; only mini-batches have to be copied."""
    config = PE_CORE if method == "svl" else SMALL
    step, evaluation = counted(method, recipe, episodes=2, config=config, dtype=torch.float32, minibatch=0)
    assert step.total()[0] and evaluation.total()[0]


@pytest.mark.parametrize("wrong", [
    lambda x: x.sum().item(),
    lambda x: bool((x > 0).any()),
    lambda x: x.cpu(),
    lambda x: torch.ones(5).to(x.device),
    lambda x: torch.ones(5).add(x.new_ones(5)),
    lambda x: x + torch.tensor([1.0, 2.0], device=x.device).sum(),
])
def test_meeting_the_host_is_seen(wrong, monkeypatch):
    def loss(self, step):
        wrong(step.features)
        return 0.0
    monkeypatch.setattr(train.PARTS[0], "loss", loss)
    with pytest.raises((HostError, RuntimeError)):
        counted("clip-lora", config=SMALL)


@pytest.mark.parametrize("share, precision", [(0.5, "bfloat16"), (0.9, "float32"), (30, "float32")])
def test_the_trial_of_precisions_survives_a_load(share, precision, monkeypatch, capsys):
    """All tries but one of each are disturbed, those of the faster one most."""
    times = [t for k in range(20) for t in ((1.0 if k == 3 else 5.0), (share if k == 11 else 40.0))]
    marks = iter([mark for t in times for mark in (0.0, t)])
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(marks))
    threads = torch.get_num_threads()
    assert train.faster_precision(8) == precision and torch.get_num_threads() == threads
    assert f"in {precision}: products in bfloat16 take {share:.2f} of" in capsys.readouterr().err


def test_the_precision_of_a_cpu(toy, monkeypatch, capsys):
    """What a trial says for a wide backbone, unless it is given; a small one is not tried."""
    small, tokenizer = toy
    wide = CLIP(replace(small.config, vision_width=512, vision_layers=1)).eval()
    monkeypatch.setattr(clip_min, "load", lambda path, device: (wide, tokenizer))
    monkeypatch.setattr(train, "faster_precision", lambda width: {512: "bfloat16"}[width])
    monkeypatch.setattr(train, "multiply_fast", int)
    argv = "--dataset toy --method zero-shot --episodes 1 --query 1".split()
    assert train.main(argv) == 0 and wide.logit_scale.dtype == torch.bfloat16
    part, = Path("results").iterdir()
    assert json.loads(part.read_text().splitlines()[0])["precision"] == "bfloat16"
    refused(capsys, [*argv, "--precision", "float32"], part, "precision 'bfloat16', this run has 'float32'; give that, or another --out")
    monkeypatch.setattr(clip_min, "load", lambda path, device: (small, tokenizer))
    assert train.main([*argv, "--out", "small"]) == 0 and small.logit_scale.dtype == torch.float32
