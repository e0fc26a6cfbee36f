"""CLIP, its tokenizer and its weights against OpenAI's own, recorded in tests/golden."""
import json
import random
import runpy
import sys

import pytest
import torch
from conftest import HERE, TOY_CLIP, from_environment, same
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.utils import save_image

import clip_min
from atha import add_lora
from clip_min import CLIP, CLIPConfig, Tokenizer, convert, load

GOLDEN = load_file(HERE / "golden" / "clip_openai_tiny.safetensors")
OPENAI = {name[8:]: tensor for name, tensor in GOLDEN.items() if name.startswith("weights.")}


def as_torchscript(target):
    """OpenAI's weights as OpenAI ships them: a TorchScript archive, with three scalars beside the tensors."""
    class Holder(nn.Module):
        def forward(self, x):
            return x
    root = Holder()
    for name, tensor in (OPENAI | {"input_resolution": torch.tensor(32), "context_length": torch.tensor(24)}).items():
        module, *path = root, *name.split(".")
        for part in path[:-1]:
            if not hasattr(module, part):
                module.add_module(part, Holder())
            module = getattr(module, part)
        module.register_buffer(path[-1], tensor)
    torch.jit.script(root).save(str(target))


def as_hugging_face(target):
    """The same in Hugging Face's names, q, k and v apart, projections transposed."""
    target.mkdir()
    ours = clip_min._our_names(OPENAI)
    other = {"conv1": "embeddings.patch_embedding", "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm", "ln_final": "final_layer_norm",
             "transformer.resblocks": "encoder.layers", ".attn.": ".self_attn.", ".ln_": ".layer_norm", "c_fc": "fc1", "c_proj": "fc2",
             "positional_embedding": "embeddings.position_embedding.weight", "token_embedding": "embeddings.token_embedding",
             "class_embedding": "embeddings.class_embedding"}
    state = {"visual_projection.weight": ours.pop("visual.proj").T, "text_projection.weight": ours.pop("text_projection").T,
             "logit_scale": ours.pop("logit_scale"), "text_model.embeddings.position_ids": torch.arange(24)[None]}
    for name, tensor in ours.items():
        new = name.removeprefix("visual.")
        for a, b in other.items():
            new = new.replace(a, b)
        state[("vision_model." if name.startswith("visual.") else "text_model.") + new] = tensor
    save_file({k: v.contiguous() for k, v in state.items()}, target / "model.safetensors")


def source(kind, folder):
    if kind == "torchscript":
        as_torchscript(folder / "tiny.pt")
        return folder / "tiny.pt"
    if kind == "hugging-face":
        as_hugging_face(folder / "tiny")
        return folder / "tiny"
    save_file(OPENAI, folder / "tiny.safetensors")
    return folder / "tiny.safetensors"


@pytest.mark.parametrize("kind", ["torchscript", "hugging-face", "safetensors"])
@pytest.mark.parametrize("converted", [False, True])
def test_features_equal_openais_through_every_format(kind, converted, tmp_path, monkeypatch):
    path = source(kind, tmp_path)
    if kind == "torchscript":                                            # as if OpenAI had published it
        monkeypatch.setattr(clip_min, "OPENAI_SHA256", {clip_min.sha256_of(path)})
    if converted:
        convert(path, tmp_path / "ours.safetensors")
        path = tmp_path / "ours.safetensors"
    clip, _ = load(path)
    image, text = clip.encode_image(GOLDEN["images"]), clip.encode_text(GOLDEN["token_ids"])
    same(image, GOLDEN["image_features"])
    same(text, GOLDEN["text_features"])
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (image, text)]
    same(clip.logit_scale.exp() * unit[0] @ unit[1].T, GOLDEN["logits_per_image"])
    save_file(OPENAI, tmp_path / "plain.safetensors")
    assert clip.fingerprint == load(tmp_path / "plain.safetensors")[0].fingerprint, "the same weights, the same fingerprint"


@pytest.mark.parametrize("config", [CLIPConfig(), CLIPConfig(patch=32), CLIPConfig(768, 224, 14, 1024, 24, 768, 12)])
def test_sizes_are_read_off_the_tensors(config):
    with torch.device("meta"):
        assert CLIPConfig.from_weights(CLIP(config).state_dict()) == config


def test_bfloat16_on_a_cpu_takes_another_road_to_the_same_features(toy):
    low, _ = load(TOY_CLIP, dtype=torch.bfloat16)
    images, rows = torch.randn(4, 3, 48, 48), toy[1](["a ring.", "a photo of a star."], 40)
    assert torch.cosine_similarity(low.encode_image(images).float(), toy[0].encode_image(images)).min() > 0.999
    assert torch.cosine_similarity(low.encode_text(rows).float(), toy[0].encode_text(rows)).min() > 0.999


def test_hook_sees_the_tokens_before_every_block(toy):
    seen = {}
    toy[0].visual(torch.randn(2, 3, 48, 48), lambda tokens, layer: seen.setdefault(layer, tokens))
    assert list(seen) == [0, 1, 2, 3] and seen[0].shape == (2, 37, 128)
    for layer, block in enumerate(toy[0].visual.transformer.resblocks[:3]):
        same(block(seen[layer]), seen[layer + 1], 1e-6)


def test_tokens_equal_openais():
    tokenizer = Tokenizer(from_environment("ATHA_MERGES", "OpenAI's bpe_simple_vocab_16e6.txt.gz"))
    rows = json.loads((HERE / "golden" / "tokenizer.json").read_text())
    assert [tokenizer.encode(row["text"]) for row in rows] == [row["ids"] for row in rows]
    assert tokenizer(["hi"]).tolist() == [[49406, *tokenizer.encode("hi"), 49407] + [0] * (77 - 3)]


def test_tokenizer_merges_by_rank_and_knows_number_signs():
    tokenizer = Tokenizer(["l o", "lo w</w>", "o w</w>"])
    assert [tokenizer.vocab[i] for i in tokenizer.encode("LOW  blow_²'s")] == ["low</w>", "b", "low</w>", "_</w>", *[
        tokenizer.symbol[b] + end for b, end in zip("²".encode(), ("", "</w>"))], "'", "s</w>"]
    assert tokenizer(["low " * 100]).argmax(-1).item() == 76, "a long text is cut, its end token kept"


@pytest.fixture(params=["bytes", "merges"])
def tokenizer(request):
    return Tokenizer([] if request.param == "bytes" else from_environment("ATHA_MERGES", "OpenAI's BPE merges file"))


SPECIAL = ["&#xd800;", "&amp;", "&#0;", "<|endoftext|>", "</w>", "²", "Ⅻ", "İ", "\u0301", "\x00", "'ll", "_", "\u200d", "\U0010ffff"]


def test_tokenizer_takes_any_text(tokenizer):
    """10,000 random texts, some of 10,000 characters: any code point, lone surrogates, controls, what means something to it."""
    chance = random.Random(0)
    draws = (lambda: chr(chance.randrange(0x110000)), lambda: chr(chance.randrange(0xd800, 0xe000)), lambda: chr(chance.randrange(256)),
             lambda: chance.choice("abc ABC 123 '"), lambda: chance.choice(SPECIAL))
    for length in [10000] * 10 + [int(chance.expovariate(1 / 15)) for _ in range(9990)]:
        some = chance.sample(draws, chance.randrange(1, 6))
        text = "".join(chance.choice(some)() for _ in range(length))
        assert tokenizer(text).max() == tokenizer.end


def test_classify_and_convert_on_the_command_line(tmp_path, monkeypatch, capsys):
    save_image(torch.rand(3, 60, 90), tmp_path / "a.png")
    monkeypatch.setattr(sys, "argv", ["clip_min.py", "classify", str(tmp_path / "a.png"), "a ring", "a star", "--weights", str(TOY_CLIP)])
    runpy.run_path(clip_min.__file__, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split("%")[1].strip() for line in lines) == ["a ring", "a star"]
    assert abs(sum(float(line.split("%")[0]) for line in lines) - 100) < 0.02
    with pytest.raises(SystemExit, match="2"):
        clip_min.main(["convert", str(tmp_path / "none.pt"), str(tmp_path / "b")])
    error = capsys.readouterr().err
    assert error.startswith("clip_min.py: error: no weights at") and error.count("\n") == 1


@pytest.mark.parametrize("name", [None, "hf-siglip2"])
def test_the_last_block_gives_out_only_what_is_pooled(name, toy):
    """Exactly what all tokens would give, and less work."""
    backbone, _ = toy if name is None else load(HERE / "golden" / "backbones" / name)
    size, ids = backbone.config.image, torch.tensor([[5, 7, 513 if name is None else 1, 0, 0, 0]])
    images, tower = torch.randn(2, 3, size, size), backbone.visual if name is None else backbone
    run = (lambda: backbone.visual(images)) if name is None else (lambda: backbone.encode_text(ids))
    last = tower.transformer.resblocks[-1]
    seen, handle = [], last.mlp.register_forward_hook(lambda _, x, y: seen.append(y.shape[1]))
    few, last.rows, rows = run(), slice(None), last.rows
    same(few, run(), 1e-6)
    last.rows = rows
    handle.remove()
    assert seen == [1, 37 if name is None else 6]


@pytest.mark.parametrize("activation", clip_min.ACTIVATIONS)
def test_activations_and_their_gradients(activation):
    """The MLP with the activation as it is written down, in double precision."""
    written = {"quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
               "gelu": lambda y: y * torch.special.ndtr(y),
               "gelu_pytorch_tanh": lambda y: y * torch.sigmoid((8 / torch.pi) ** 0.5 * (y + 0.044715 * y ** 3))}
    mlp, x = clip_min.MLP(8, activation).double(), torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 3, 8, dtype=torch.float64)
    wanted = residual + mlp.c_proj(written[activation](mlp.c_fc(x)))
    same(mlp(x, residual), wanted, 1e-12)
    same(torch.autograd.grad(mlp(x, residual).sin().sum(), x)[0], torch.autograd.grad(wanted.sin().sum(), x)[0], 1e-12)


def test_the_mlp_takes_adapters():
    """In one of its layers or both; they start from zero, so nothing changes yet, and then it does."""
    x = torch.randn(2, 3, 8)
    for targets in (["c_fc"], ["c_proj"], ["c_fc", "c_proj"]):
        mlp = clip_min.MLP(8, "quick_gelu")
        wanted = mlp(x, x)
        adapters = add_lora(mlp, rank=2, dropout=0, targets=targets)
        same(mlp(x, x), wanted, 1e-5)
        nn.init.ones_(adapters[targets[0]].B)
        assert not torch.allclose(mlp(x, x), wanted, atol=1e-3)
