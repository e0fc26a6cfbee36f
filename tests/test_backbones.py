"""Backbones that others made, recorded in tests/golden/backbones, and everything that `load` must refuse."""
import gzip
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import HERE, REPO, TOY_CLIP, same
from PIL import Image
from safetensors.torch import load_file, save, save_file
from test_clip import OPENAI, as_torchscript
from torchvision.utils import save_image

import clip_min
from clip_min import CLIP, CLIPConfig, WeightsError, convert, from_weights, load

GOLDEN, FOLDER = HERE / "golden" / "backbones", None       # FOLDER: a copy, and one more made of it
NAMES = ["hf-clip-gelu", "hf-siglip2", "open_clip-gelu", "open_clip-pe-core"]


OPEN_CLIP = {    # what open_clip calls the tensors of hf-clip-gelu: OpenAI's names
    "vision_model.": "visual.", "text_model.": "",
    "embeddings.patch_embedding": "conv1", "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post", "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks",
    "self_attn": "attn", "layer_norm": "ln_", "fc1": "c_fc", "fc2": "c_proj",
    "embeddings.position_embedding.weight": "positional_embedding", "embeddings.token": "token",
    "embeddings.class": "class", "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
}


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory):
    """The golden folders, and hf-clip-gelu as open_clip would store it: the same model, the same features."""
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("backbones") / "all"
    shutil.copytree(GOLDEN, FOLDER)
    target, tensors = FOLDER / "open_clip-gelu", {}
    target.mkdir()
    shutil.copy(FOLDER / "hf-clip-gelu" / "expected.safetensors", target)
    for name, tensor in load_file(FOLDER / "hf-clip-gelu" / "model.safetensors").items():
        for theirs, ours in OPEN_CLIP.items():
            name = name.replace(theirs, ours)
        tensors[name] = tensor.T.contiguous() if name in ("visual.proj", "text_projection") else tensor
    for name in [name for name in tensors if ".q_proj." in name]:
        parts = [tensors.pop(name.replace(".q_", f".{letter}_")) for letter in "qkv"]
        tensors[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    save_file(tensors, target / "open_clip_model.safetensors")
    vision = {"image_size": 32, "layers": 2, "width": 128, "head_width": 64, "patch_size": 8}
    text = {"context_length": 12, "vocab_size": 514, "width": 64, "heads": 1, "layers": 2}
    config = {"model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text},
              "preprocess_cfg": {"mean": clip_min.MEAN, "std": clip_min.STD}}
    (target / "open_clip_config.json").write_text(json.dumps(config))


def normalised(pictures, backbone):
    mean, std = (torch.tensor(x)[:, None, None] for x in (backbone.mean, backbone.std))
    return (pictures - mean) / std


def check(backbone, tokenizer, name, tolerance=1e-5):
    """Features, tokens before every block and token ids are those of the model's own code."""
    expected, seen = load_file(FOLDER / name / "expected.safetensors"), {}
    same(torch.tensor([backbone.mean, backbone.std]), torch.stack([expected["mean"], expected["std"]]), 1e-6)
    image = backbone.visual(normalised(expected["pictures"], backbone),
                            lambda tokens, layer: seen.setdefault(layer, tokens))
    same(image, expected["image_features"], tolerance)
    same(backbone.encode_text(backbone.trim(expected["token_ids"])), expected["text_features"], tolerance)
    for layer, tokens in seen.items():
        same(tokens, expected[f"tokens_before_block.{layer}"], tolerance)
    assert len(seen) == len(backbone.visual.transformer.resblocks) == 2
    assert tokens.shape[1] == backbone.visual.first_patch + (32 // 8) ** 2
    if (FOLDER / name / "sentences.json").exists():
        sentences = json.loads((FOLDER / name / "sentences.json").read_text())
        assert torch.equal(tokenizer(sentences, 12), expected["token_ids"])


@pytest.mark.parametrize("name", NAMES)
def test_features_equal_their_own_codes(name, tmp_path):
    """Through the folder, the file in it, the converted file (which stands alone), and shards."""
    shutil.copytree(FOLDER / name, tmp_path / "there")
    file, = (tmp_path / "there").glob("*model.safetensors")
    convert(tmp_path / "there", tmp_path / "ours.safetensors")
    tensors = load_file(file)
    shards = {f"part-{i}.safetensors": dict(list(tensors.items())[i::2]) for i in (0, 1)}
    shutil.copytree(tmp_path / "there", tmp_path / "shards", ignore=lambda *_: [file.name])
    for shard, part in shards.items():
        save_file(part, tmp_path / "shards" / shard)
    index = {"weight_map": {tensor: shard for shard, part in shards.items() for tensor in part}}
    (tmp_path / "shards" / f"{file.name}.index.json").write_text(json.dumps(index))
    prints = set()
    for path in (tmp_path / "there", file, tmp_path / "ours.safetensors", tmp_path / "shards"):
        backbone, tokenizer = load(path)
        check(backbone, tokenizer, name)
        prints.add(backbone.fingerprint)
    assert len(prints) == 1, "the same model, the same fingerprint"


def test_interface_where_backbones_differ():
    facts = {}
    for name in NAMES:
        backbone, _ = load(FOLDER / name)
        vision, ids = backbone.visual, torch.tensor([[512, 5, 513, 0, 0, 0], [512, 513, 0, 0, 0, 0]]) % 300
        facts[name] = vision.first_patch, backbone.first_word, backbone.trim(ids).shape[1], backbone.mean[0]
        assert vision.proj.shape == (128, backbone.config.embed) and backbone.logit_scale.dim() == 0
        names = {n.rpartition(".")[2] for n, _ in vision.transformer.named_modules() if n.endswith("_proj")}
        assert names == {"q_proj", "k_proj", "v_proj", "out_proj", "c_proj"}
    assert facts["hf-siglip2"] == (0, 0, 6, 0.5) and facts["open_clip-pe-core"] == (1, 1, 3, 0.5)
    assert facts["hf-clip-gelu"] == facts["open_clip-gelu"] == (1, 1, 3, clip_min.MEAN[0])
    assert torch.equal(load(FOLDER / "hf-siglip2")[0].visual.proj, torch.eye(128))


@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16_and_from_tensors_alone(name):
    low, _ = load(FOLDER / name, dtype=torch.bfloat16)
    assert {p.dtype for p in [*low.parameters(), *low.buffers()]} == {torch.bfloat16}
    expected = load_file(FOLDER / name / "expected.safetensors")
    image = low.encode_image(normalised(expected["pictures"], low))
    assert torch.cosine_similarity(image.float(), expected["image_features"]).min() > 0.999
    text = low.encode_text(expected["token_ids"])
    assert torch.cosine_similarity(text.float(), expected["text_features"]).min() > 0.999
    if name in ("open_clip-pe-core", "hf-siglip2"):                      # whose tensors tell what they are
        file, = (FOLDER / name).glob("*model.safetensors")
        backbone = from_weights({n: t.float() for n, t in load_file(file).items()})
        check(backbone, load(FOLDER / name)[1], name)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_config_of_others_and_back(name, tmp_path):
    """What `hugging_face` gives out are the tensors that came in, and a folder of it is the same model."""
    backbone, _ = load(FOLDER / name)
    state, config = clip_min.hugging_face(backbone)
    file, = (FOLDER / ("hf-clip-gelu" if name == "open_clip-gelu" else name)).glob("*model.safetensors")
    wanted = load_file(file)
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in wanted.items()}
    assert name == "open_clip-gelu" or all(torch.equal(state[n], wanted[n].float()) for n in wanted)
    for more in ("preprocessor_config.json", "tokenizer.json"):
        if (FOLDER / name / more).exists():
            shutil.copy(FOLDER / name / more, tmp_path)
    save_file(state, tmp_path / file.name)
    place = "open_clip_config.json" if "model_cfg" in config else "config.json"
    (tmp_path / place).write_text(json.dumps(config))
    check(*load(tmp_path), name)


@pytest.mark.parametrize("name", ["hf-clip-gelu", "hf-siglip2"])
def test_transformers_opens_what_is_given_out(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    backbone, _ = load(FOLDER / name)
    state, config = clip_min.hugging_face(backbone)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    kind = transformers.SiglipModel if "siglip" in name else transformers.CLIPModel
    model = kind.from_pretrained(tmp_path).eval()
    expected = load_file(FOLDER / name / "expected.safetensors")
    pixels = normalised(expected["pictures"], backbone)
    with torch.no_grad():
        out = model(pixel_values=pixels, input_ids=expected["token_ids"])
    unit = torch.nn.functional.normalize
    same(out.image_embeds, unit(expected["image_features"], dim=-1))
    same(out.text_embeds, unit(expected["text_features"], dim=-1))


def test_rotary_positions_twin():
    """Pair i of the first half of the channels turns by x / 10000^(i/16), of the second half by y."""
    cos, sin = clip_min.rope_2d(3, 64)
    x = torch.randn(1, 1, 10, 64)
    turned = clip_min.rotate(x, cos, sin)[0, 0]
    for token in range(10):
        place = ((token - 1) % 3 + 1, (token - 1) // 3 + 1) if token else (0, 0)
        pairs = torch.view_as_complex(x[0, 0, token].view(2, 16, 2))
        angles = torch.tensor([[p / 10000 ** (i / 16) for i in range(16)] for p in place])
        wanted = torch.view_as_real(pairs * torch.polar(torch.ones(2, 16), angles)).flatten()
        same(turned[token], wanted, 1e-6)


@pytest.mark.parametrize("family", clip_min.FAMILIES)
def test_sizes_and_family_are_read_off_the_tensors(family):
    sizes = dict(embed=768 if family == "siglip" else 1024, context=64, vocab=1000, text_width=768)
    config = CLIPConfig(family=family, **sizes, **clip_min.FAMILIES[family])
    with torch.device("meta"):
        assert CLIPConfig.from_weights(CLIP(config).state_dict()) == config


# -------------------------------------------------------------------------------------------- what is refused

WHOLE = TOY_CLIP.read_bytes()


def altered(change):
    """The toy CLIP with its tensors changed, as bytes of a safetensors file."""
    def make():
        tensors = load_file(TOY_CLIP)
        change(tensors)
        return save(tensors)
    return make


def with_(name, tensor):
    return altered(lambda t: t.update({name: tensor}))


def each(change):
    return altered(lambda t: t.update({name: change(name, tensor) for name, tensor in t.items()}))


def without(start):
    return altered(lambda t: [t.pop(name) for name in [*t] if name.startswith(start)])


def ours(**metadata):
    return lambda: save(load_file(TOY_CLIP), {"config": "{}", "merges": "", **metadata})


WEIGHTS = {    # what the file holds, what must be said
    "cut in a tensor": (lambda: WHOLE[:-5], "SafetensorError"),
    "garbage": (lambda: random.Random(0).randbytes(5000), "SafetensorError"),
    "a zip of nothing": (lambda: b"PK" + bytes(500), "SafetensorError"),
    "another model": (altered(lambda t: (t.clear(), t.update(b=torch.ones(3)))), "KeyError: 'visual.conv1"),
    "a tensor less": (without("ln_final.bias"), 'Missing key(s) in state_dict: "ln_final.bias"'),
    "a block less": (without("transformer.resblocks.0."), "transformer.resblocks."),
    "misshapen": (with_("visual.ln_pre.weight", torch.zeros(7)), "size mismatch for visual.ln_pre.weight"),
    "flat": (with_("visual.conv1.weight", torch.zeros(7)), "ValueError"),
    "LayerScale": (with_("visual.transformer.resblocks.0.ls_1.gamma", torch.ones(128)), 'Unexpected key(s)'),
    "a tensor more": (with_("head.weight", torch.ones(3)), 'Unexpected key(s) in state_dict: "head.weight"'),
    "integers": (each(lambda n, t: t.int()), "int32"),
    "complex": (with_("ln_final.bias", torch.zeros(64, dtype=torch.complex64)), "bias holds torch.complex64"),
    "not a number": (with_("ln_final.bias", torch.full((64,), torch.nan)), "ln_final.bias"),
    "no blocks": (without("visual.transformer."), "cannot use"),
    "patch 0": (with_("visual.conv1.weight", torch.zeros(128, 3, 0, 0)), "cannot use"),
    "width 0": (with_("visual.conv1.weight", torch.zeros(0, 3, 8, 8)), "cannot use"),
    "no positions": (with_("visual.positional_embedding", torch.zeros(0, 128)), "image 0"),
    "context 2": (with_("positional_embedding", torch.zeros(2, 64)), "no such backbone"),
    "width 80": (with_("visual.conv1.weight", torch.zeros(80, 3, 8, 8)), "vision_width 80"),
    "text width 32": (with_("token_embedding.weight", torch.zeros(514, 32)), "text_width 32"),
    "own config: damaged": (ours(config="{"), "JSONDecodeError"),
    "own config: a list": (ours(config="[1]"), "TypeError"),
    "own config: unknown field": (ours(config='{"depth": 3}'), "unexpected keyword argument 'depth'"),
    "own config: at odds": (ours(config='{"vision_layers": 3}'), "visual.transformer.resblocks.3."),
    "own config: activation": (ours(config='{"activation": "relu"}'), "activation 'relu'"),
    "own config: eps": (ours(config='{"eps": 0}'), "eps 0"),
    "own config: std": (ours(config='{"std": [1, 1, 0]}'), "std"),
    "own config: mean": (ours(config='{"mean": [1, 1]}'), "mean"),
    "own merges": (ours(merges="a b"), "1 merges, the weights need 0"),
}


def refuses(path, *words):
    """`load` says in one line what is wrong with the path."""
    with pytest.raises(WeightsError) as error:
        load(path)
    line = str(error.value)
    assert "\n" not in line and str(path) in line, line
    for word in words:
        assert word in line, line


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_cannot_be_used(case, tmp_path):
    content, words = WEIGHTS[case]
    (tmp_path / "w").write_bytes(content())
    refuses(tmp_path / "w", words)


CONFIGS = {    # golden folder, where in its config, the value put there, what must be said
    "activation": ("hf-clip-gelu", "vision_config.hidden_act", "relu", "hidden_act is 'gelu' where"),
    "activations": ("hf-clip-gelu", "*.hidden_act", "relu", "activation 'relu'"),
    "eps of one tower": ("hf-clip-gelu", "text_config.layer_norm_eps", 1e-6, "layer_norm_eps is 1e-06 where"),
    "heads": ("hf-clip-gelu", "vision_config.num_attention_heads", 3, "3 heads do not divide a vision width of 128"),
    "no heads": ("hf-clip-gelu", "text_config.num_attention_heads", 0, "ZeroDivisionError"),
    "blocks": ("hf-clip-gelu", "vision_config.num_hidden_layers", 3, "visual.transformer.resblocks.2."),
    "pixels": ("hf-clip-gelu", "vision_config.image_size", 64, "mismatch for visual.positional_embedding"),
    "kind": ("hf-clip-gelu", "model_type", "siglip", "Missing key(s)"),
    "NaFlex": ("hf-siglip2", "model_type", "siglip2", "siglip2"),
    "kind of SigLIP": ("hf-siglip2", "model_type", "clip", "Missing key(s)"),
    "no dictionary": ("hf-siglip2", "vision_config", 7, "its vision_config is 7"),
    "average pooling": ("open_clip-gelu", "model_cfg.vision_cfg.pool_type", "avg", "pool_type = 'avg'"),
    "no ln_pre": ("open_clip-gelu", "model_cfg.vision_cfg.no_ln_pre", True, "no_ln_pre = True"),
    "heads of 80": ("open_clip-gelu", "model_cfg.vision_cfg.head_width", 80, "vision_width 128: no such"),
    "norm": ("open_clip-gelu", "model_cfg.text_cfg.norm_kwargs", {"eps": 1e-6}, "norm_kwargs.eps = 1e-06"),
    "another text tower": ("open_clip-gelu", "model_cfg.text_cfg.hf_model_name", "roberta", "hf_model_name"),
    "another trunk": ("open_clip-pe-core", "model_cfg.vision_cfg.timm_model_name", "vit_base_patch16_siglip",
                      "timm_model_name 'vit_base_patch16_siglip'"),
    "another pooling": ("open_clip-pe-core", "model_cfg.vision_cfg.timm_pool", "avg", "timm_pool = 'avg'"),
    "PE with QuickGELU": ("open_clip-pe-core", "model_cfg.quick_gelu", True, "is not built"),
    "std": ("open_clip-pe-core", "preprocess_cfg.std", [0, 1, 1], "std (0, 1, 1)"),
}


def altered_config(name, place, value, target):
    """A golden folder with one value of its config changed (None: left out)."""
    shutil.copytree(FOLDER / name, target)
    file = target / ("open_clip_config.json" if "open_clip" in name else "config.json")
    config = json.loads(file.read_text())
    for part in ("vision_config", "text_config") if place.startswith("*") else (place.partition(".")[0],):
        *above, key = place.replace("*", part).split(".")
        inner = config
        for step in above:
            inner = inner[step]
        inner[key] = value
        if value is None:
            del inner[key]
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_not_built(case, tmp_path):
    name, place, value, words = CONFIGS[case]
    altered_config(name, place, value, tmp_path / "w")
    refuses(tmp_path / "w", words)


@pytest.mark.parametrize("name, place, value, vision, text", [
    ("hf-clip-gelu", "vision_config.num_attention_heads", 4, 4, 1),
    ("hf-clip-gelu", "text_config.num_attention_heads", 2, 2, 2),
    ("hf-clip-gelu", "text_config.num_attention_heads", None, 2, 8),     # what transformers takes then
    ("hf-siglip2", "vision_config.num_attention_heads", 4, 4, 2),
    ("open_clip-gelu", "model_cfg.vision_cfg.head_width", 32, 4, 1),
    ("open_clip-gelu", "model_cfg.text_cfg.heads", 4, 2, 4),
])
def test_heads_are_as_the_config_tells(name, place, value, vision, text, tmp_path):
    """And stay so in our own file and in what is given out."""
    altered_config(name, place, value, tmp_path / "w")
    convert(tmp_path / "w", tmp_path / "ours.safetensors")
    prints = {load(FOLDER / name)[0].fingerprint}
    for path in (tmp_path / "w", tmp_path / "ours.safetensors"):
        backbone, _ = load(path)
        assert {block.attn.heads for block in backbone.visual.transformer.resblocks} == {vision}
        assert {block.attn.heads for block in backbone.transformer.resblocks} == {text}
        prints.add(backbone.fingerprint)
    assert len(prints) == 2, "other heads, another model, in whatever format"
    if name == "hf-clip-gelu":
        config = clip_min.hugging_face(backbone)[1]
        heads = [config[f"{tower}_config"]["num_attention_heads"] for tower in ("vision", "text")]
        assert heads == [vision, text]


def test_what_a_bare_file_is_taken_for_is_said(tmp_path, capsys):
    shutil.copy(FOLDER / "hf-clip-gelu" / "model.safetensors", tmp_path / "model.safetensors")
    load(tmp_path)
    line, = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line and "quick_gelu and heads of 64 channels are taken" in line
    load(FOLDER / "hf-clip-gelu")
    load(TOY_CLIP)
    assert capsys.readouterr().err == ""


def test_older_files_are_read_when_named(tmp_path):
    """A folder of pickled tensors is not opened by itself; the file is, and its config counts."""
    torch.save(load_file(FOLDER / "hf-clip-gelu" / "model.safetensors"), tmp_path / "pytorch_model.bin")
    shutil.copy(FOLDER / "hf-clip-gelu" / "config.json", tmp_path)
    refuses(tmp_path, "no model.safetensors", "pytorch_model.bin", "give that file itself")
    check(*load(tmp_path / "pytorch_model.bin"), "hf-clip-gelu")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "no model.safetensors")
    for index in ("{", "[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "none.safetensors"}}'):
        (tmp_path / "empty" / "model.safetensors.index.json").write_text(index)
        refuses(tmp_path / "empty", "none.safetensors" if "none" in index else "cannot use")


class Evil:
    """Unpickled, it makes a file."""
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return type(self.marker).touch, (self.marker,)


@pytest.mark.parametrize("how", ["pickle", "zip", "old"])
def test_pickled_code_is_not_run(how, tmp_path):
    marker, file = tmp_path / "marker", tmp_path / "w.pt"
    if how == "pickle":
        file.write_bytes(pickle.dumps(Evil(marker)))
    else:
        torch.save({"visual.conv1.weight": Evil(marker)}, file, _use_new_zipfile_serialization=how == "zip")
    refuses(file, "its code is not run" if how == "zip" else "SafetensorError")
    assert not marker.exists()
    torch.load(file, weights_only=False) if how != "pickle" else pickle.loads(file.read_bytes())
    assert marker.exists()                                               # the code was live


def test_torchscript_is_opened_only_where_openai_published_it(tmp_path, monkeypatch):
    as_torchscript(tmp_path / "w.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("its code would have been run"))
    refuses(tmp_path / "w.pt", "its code is not run")
    torch.save({"a": {"b": 1}}, tmp_path / "w.pt")
    refuses(tmp_path / "w.pt", "cannot use")


def test_a_hub_repository(tmp_path, monkeypatch):
    """The hub's function is asked for the files that are needed; a local path of that name wins."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        folder = FOLDER / name.partition("/")[2]
        fetched = [file for file in folder.glob("*.safetensors") if file.name in allow_patterns]
        return str(folder if fetched else tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    for name in NAMES:
        check(*load(f"hf-hub:org/{name}"), name)
    assert [name for name, _ in asked] == [f"org/{NAMES[i]}" for i in (0, 1, 2, 2, 3, 3)]
    assert not any("bin" in pattern or "*" == pattern for _, patterns in asked for pattern in patterns)
    shutil.copytree(FOLDER / NAMES[0], "hf-hub:org/local")
    check(*load("hf-hub:org/local"), NAMES[0])
    assert len(asked) == 6
    with pytest.raises(WeightsError, match="cannot fetch .*hf download org/none --local-dir DIR"):
        monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", lambda *_, **__: 1 / 0)
        load("hf-hub:org/none")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match="pip install huggingface_hub"):
        load("hf-hub:org/none")


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refuses(tmp_path / "pipe", "ordinary file")
    with pytest.raises(WeightsError, match="ordinary file"):
        convert(TOY_CLIP, tmp_path / "b", tmp_path / "pipe")
    with pytest.raises(WeightsError, match="ordinary file"):
        convert(TOY_CLIP, tmp_path / "pipe")
    with pytest.raises(WeightsError, match="ordinary file"):
        clip_min.read_picture(tmp_path / "pipe", CLIPConfig())
    shutil.copytree(FOLDER / "hf-siglip2", tmp_path / "w")
    (tmp_path / "w" / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "w" / "tokenizer.json")
    refuses(tmp_path / "w", "ordinary file")


# ------------------------------------------------------------------------------------------------------ texts

PAIRS = [f"{a} {b}" for a in "abcdefghijklmnopqrstuvw" for b in "abcdefghijklmnopqrstuvw"]
MERGES = {    # what the file of merges holds where 30 are needed, what must be said
    "cut": (gzip.compress("\n".join(["#version", *PAIRS]).encode())[:40], "cannot read the merges file"),
    "not text": (b"\xff" * 40, "cannot read the merges file"),
    "empty": (b"", "0 merges, the weights need 30"),
    "one line": (b"#version\n", "0 merges, the weights need 30"),
    "too few": (b"#version\na b\nc d\n", "2 merges, the weights need 30"),
    "too many": ("\n".join(["#version", *PAIRS]).encode(), "529 merges, the weights need 30"),
    "no space": ("\n".join(["#version", *PAIRS[:29], "ab"]).encode(), "'ab' is not a merge"),
    "unknown piece": ("\n".join(["#version", *PAIRS[:29], "xx yy"]).encode(), "'xx yy' is not a merge"),
}


@pytest.mark.parametrize("case", [*MERGES, "missing"])
def test_merges_that_cannot_be_used(case, tmp_path):
    """With ids shifted, CLIP would go wrong without a word."""
    weights = load_file(TOY_CLIP)
    weights["token_embedding.weight"] = torch.zeros(514 + 30, weights["token_embedding.weight"].shape[1])
    save_file(weights, tmp_path / "model.safetensors")
    content, words = MERGES.get(case, (None, "0 merges, the weights need 30"))
    if content is not None:
        (tmp_path / "merges.txt").write_bytes(content)
    refuses(tmp_path, words)
    save_file(weights, tmp_path / "b.safetensors", {"config": "{}", "merges": "\n".join(PAIRS[:29])})
    refuses(tmp_path / "b.safetensors", "29 merges, the weights need 30")


def test_a_vocabulary_too_small_for_text(tmp_path):
    """The picture tower is of use all the same."""
    save_file(OPENAI, tmp_path / "w.safetensors")
    clip, tokenizer = load(tmp_path / "w.safetensors")
    assert clip.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 48)
    with pytest.raises(WeightsError, match="know 128 tokens, text needs 514"):
        tokenizer(["a"])


def test_siglips_texts(tmp_path, monkeypatch):
    tokenizer = load(FOLDER / "hf-siglip2")[1]
    rows = tokenizer(["A Photo", "a photo", "a photo " * 99, "\ud800", ""], 64)
    assert rows.shape == (5, 64) and torch.equal(rows[0], rows[1]) and rows[2, -1] == 1 and rows[4, 0] == 1
    for content, words in (("{}", "not a tokenizer.json"), (None, "tokenizer.json")):
        shutil.copytree(FOLDER / "hf-siglip2", tmp_path / words)
        (tmp_path / words / "tokenizer.json").unlink()
        if content:
            (tmp_path / words / "tokenizer.json").write_text(content)
        refuses(tmp_path / words, words)
    stored = json.loads((FOLDER / "hf-siglip2" / "tokenizer.json").read_text())
    stored["model"]["vocab"] |= {f"more{i}": 295 + i for i in range(9)}
    (tmp_path / "tokenizer.json" / "tokenizer.json").write_text(json.dumps(stored))
    refuses(tmp_path / "tokenizer.json", "more than 300 pieces")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refuses(FOLDER / "hf-siglip2", "pip install tokenizers")


# ------------------------------------------------------------------------------------------- the command line

def test_classify_with_other_backbones(tmp_path, capsys):
    save_image(torch.rand(3, 60, 90), tmp_path / "a.png")
    for name in NAMES:
        clip_min.main(["classify", f"{tmp_path}/a.png", "a cat", "a dog", "--weights", str(FOLDER / name)])
        chances = [float(line.split("%")[0]) for line in capsys.readouterr().out.splitlines()]
        assert sum(chances) == pytest.approx(100, abs=0.1)


def test_pictures_that_cannot_be_used(tmp_path, monkeypatch):
    """A picture that would fill the memory, PostScript that Pillow would hand on, no picture."""
    save_image(torch.rand(3, 60, 90), tmp_path / "bomb.png")
    (tmp_path / "script.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    (tmp_path / "text.png").write_text("no picture")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name in ("bomb.png", "script.jpg", "text.png", "none.png"):
        with pytest.raises(WeightsError, match=f"cannot read .*{name}"):
            clip_min.read_picture(tmp_path / name, CLIPConfig())


def test_without_a_home_it_can_be_imported(tmp_path):
    """A user id without a name and no HOME."""
    code = "import pathlib\ndef home():\n raise RuntimeError\npathlib.Path.home = home\nimport clip_min"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


def test_a_file_placed_by_hand_is_checked(tmp_path):
    (tmp_path / "file").write_bytes(b"by hand")
    good = hashlib.sha256(b"by hand").hexdigest()
    assert clip_min.download("http://none.invalid/x", tmp_path / "file", good) == tmp_path / "file"
    with pytest.raises(WeightsError, match="SHA-256 differs.*remove it"):
        clip_min.download("http://none.invalid/x", tmp_path / "file", "0" * 64)
