"""Every method on PE-Core and SigLIP: batched equals alone, where patches begin, what is not defined; the whole protocol."""
import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import HERE, draw_pictures, refused, same

import clip_min
import train
from train import Recipe, UsageError, adapt, recipe_for

BACKBONES = {"pe-core": HERE / "golden" / "backbones" / "open_clip-pe-core", "siglip": HERE / "golden" / "backbones" / "hf-siglip2"}


@pytest.fixture(params=BACKBONES)
def backbone(request):
    if request.param == "siglip":
        pytest.importorskip("tokenizers", reason="SigLIP's text needs the package tokenizers")
    backbone, tokenizer = clip_min.load(BACKBONES[request.param])
    return copy.deepcopy(backbone).double(), tokenizer, request.param


def world(tokenizer):
    torch.manual_seed(0)
    support, query = torch.randn(2, 4, 3, 32, 32).double(), torch.randn(2, 3, 3, 32, 32).double()
    return support, torch.tensor([[0, 0, 1, 1]] * 2), tokenizer(["a photo of a cat.", "a photo of a dog."], 12)[None].repeat(2, 1, 1), query


@pytest.mark.parametrize("method", ["clip-lora", "svl", "atha", "tir", "coop", "lv", "atha+tir"])
def test_batched_equals_alone_on_other_backbones(backbone, method):
    clip, tokenizer, _ = backbone
    support, labels, ids, query = world(tokenizer)
    recipe = replace(Recipe(), steps=3, dropout=0.0, text_lora=method == "clip-lora", context=2)
    both = adapt(clip, support, labels, ids, method, recipe, seeds=[5, 6])
    alone = adapt(clip, support[1:], labels[1:], ids[1:], method, recipe, seeds=[6])
    same(both.losses[:, 1:], alone.losses)
    same(both.logits(query)[1:], alone.logits(query[1:]))
    assert both.losses[0].ne(both.losses[-1]).all(), "something is learned"


@pytest.mark.parametrize("method", ["atha", "tir"])
def test_every_token_of_a_tower_without_cls_is_a_patch(backbone, method):
    clip, tokenizer, name = backbone
    learner = train.Learner(clip, world(tokenizer)[2][:1], method, replace(Recipe(), alpha_block=0, rho=1.0, tir_blocks=(0,)))
    tokens = torch.randn(3, 16 + (name == "pe-core"), 128).double()
    changed = (learner.hook(learner.text()[1])(tokens, 0) != tokens).any(-1)
    assert changed[:, 0].any().item() == (name == "siglip") and changed[:, 1:].any()


def test_what_is_not_defined_there_is_refused(backbone):
    clip, tokenizer, _ = backbone
    support, labels, ids, _ = world(tokenizer)
    for method, name in (("maple", "paper"), ("atha", "released-atha")):
        with pytest.raises(UsageError, match="CLIP's own towers alone"):
            adapt(clip, support, labels, ids, method, recipe_for(name, method))


@pytest.mark.parametrize("name", [*BACKBONES])
def test_the_whole_protocol_and_own_pictures(name, tmp_path, capsys):
    """It runs, it goes on, it saves and predicts; the weights are random, so nothing is said of accuracy."""
    if name == "siglip":
        pytest.importorskip("tokenizers", reason="SigLIP's text needs the package tokenizers")
    argv = ["--dataset", "toy", "--weights", str(BACKBONES[name]), "--steps", "2", "--query", "2", "--out", str(tmp_path)]
    argv += ["--way", "2", "--prompt", "{}", "--method", "svl"]
    assert train.main([*argv, "--episodes", "1"]) == 0 and train.main([*argv, "--episodes", "2"]) == 0
    header, *records = map(json.loads, next(tmp_path.glob("*.jsonl")).open())
    assert [record["episode"] for record in records] == [0, 1] and header["weights"]
    folder, weights = draw_pictures(tmp_path / "p", 2, 3), ["--weights", str(BACKBONES[name])]
    assert train.main(["--fit", str(folder), "--save", str(tmp_path / "s"), "--steps", "2", *weights, "--prompt", "{}"]) == 0
    assert train.main(["--predict", str(tmp_path / "s"), str(folder), *weights]) == 0 and "accuracy" in capsys.readouterr().out
    shutil.copytree(BACKBONES["pe-core"], tmp_path / "other")
    if name == "siglip":
        refused(capsys, ["--predict", tmp_path / "s", folder, "--weights", tmp_path / "other"], "was fitted on the weights")
