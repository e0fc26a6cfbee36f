"""Towers, tokenizers, weights: golden vectors of others' code, every format and kind of fault, fetching."""
import http.server
import json
import pickle
import re
import shutil
import threading
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import HERE, TOY_CLIP, command, from_environment, same
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import clip_min
from clip_min import CLIP, CLIPConfig, Tokenizer, WeightsError, convert, load

GOLDEN = HERE / "golden" / "backbones"
NAMES = ["hf-clip-gelu", "hf-siglip2", "open_clip-pe-core"]
TINY = load_file(HERE / "golden" / "clip_openai_tiny.safetensors")
OPENAI = {name[8:]: tensor for name, tensor in TINY.items() if name.startswith("weights.")}
TENSORS = load_file(GOLDEN / "hf-clip-gelu" / "model.safetensors")


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Nothing that stands elsewhere on this machine counts, and no test reaches further than this machine."""
    monkeypatch.setattr(clip_min, "ARCHIVE", tmp_path / "openai" / "ViT-B-16.pt")
    monkeypatch.setattr(clip_min, "HUB", "http://127.0.0.1:9")
    monkeypatch.setattr(clip_min, "VIT_B16_URL", "http://127.0.0.1:9/ViT-B-16.pt")
    monkeypatch.setattr(clip_min, "MERGES_URL", "http://127.0.0.1:9/merges.txt.gz")


def expected(name: str) -> tuple:
    """What the model's own code computed: inputs and outputs, and the pictures normalised."""
    told = load_file(GOLDEN / name / "expected.safetensors")
    return told, (told["pictures"] - told["mean"][:, None, None]) / told["std"][:, None, None]


def check(path, name: str, tolerance: float = 1e-5) -> CLIP:
    """What is loaded gives the golden features, and the tokens before every block."""
    clip, tokenizer = load(path)
    told, pixels = expected(name)
    seen = {}
    same(torch.tensor([*clip.mean, *clip.std]), torch.cat([told["mean"], told["std"]]), 1e-6)
    same(clip.visual(pixels, lambda x, layer: seen.setdefault(layer, x)), told["image_features"], tolerance)
    same(clip.encode_text(clip.trim(told["token_ids"])), told["text_features"], tolerance)
    assert len(seen) == 2 and seen[0].shape[1] == clip.visual.first_patch + 16
    for layer, tokens in seen.items():
        same(tokens, told[f"tokens_before_block.{layer}"], tolerance)
    assert tokenizer("a").shape == (1, 12)    # the backbone's own length
    return clip


def as_torchscript(target: Path) -> None:
    """OpenAI's weights as OpenAI ships them: a TorchScript archive, with scalars beside the tensors."""
    class Holder(nn.Module):
        def forward(self, x):
            return x
    root = Holder()
    for name, tensor in (OPENAI | {"input_resolution": torch.tensor(32)}).items():
        module, *path = root, *name.split(".")
        for part in path[:-1]:
            if not hasattr(module, part):
                module.add_module(part, Holder())
            module = getattr(module, part)
        module.register_buffer(path[-1], tensor)
    torch.jit.script(root).save(str(target))


# ------------------------------------------------------------------------------------------ formats, features

FORMATS = {
    "safetensors": lambda path: save_file(OPENAI, path),
    "archive.pt": as_torchscript,
    "legacy.bin": lambda path: torch.save(OPENAI, path, _use_new_zipfile_serialization=False),
    "epoch.pt": lambda path: torch.save(
        {"epoch": 3, "state_dict": {f"module.{n}": t for n, t in OPENAI.items()}, "optimizer": {}}, path),
    "float16": lambda path: save_file({name: tensor.half() for name, tensor in OPENAI.items()}, path),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_openais_features_through_every_format(kind, tmp_path, monkeypatch, capsys):
    path = tmp_path / kind
    FORMATS[kind](path)
    if kind == "archive.pt":                                             # as if OpenAI had published it
        monkeypatch.setattr(clip_min, "OPENAI_SHA256", {clip_min.sha256_of(path)})
    convert(path, tmp_path / "ours.safetensors")
    said = capsys.readouterr().err
    assert said == "" if kind == "archive.pt" else "no config: quick_gelu" in said
    prints = set()
    for form in (path, tmp_path / "ours.safetensors"):
        clip, _ = load(form)
        image, text = clip.encode_image(TINY["images"]), clip.encode_text(TINY["token_ids"])
        tolerance = 2e-3 if kind == "float16" else 1e-5
        same(image, TINY["image_features"], tolerance)
        same(text, TINY["text_features"], tolerance)
        same(clip.logit_scale, OPENAI["logit_scale"], tolerance)
        prints.add(clip.fingerprint)
    FORMATS["safetensors"](tmp_path / "plain")
    assert prints == {load(tmp_path / "plain")[0].fingerprint}, "the same weights, whatever holds them"


@pytest.mark.parametrize("name", NAMES)
def test_features_of_their_own_codes(name, tmp_path):
    """Through the folder, the file in it, the converted file (it stands alone), pickled tensors, bfloat16."""
    folder = shutil.copytree(GOLDEN / name, tmp_path / "there")
    file, = folder.glob("*model.safetensors")
    convert(folder, tmp_path / "ours.safetensors")
    prints = {check(path, name).fingerprint for path in (folder, file, tmp_path / "ours.safetensors")}
    pickled = "open_clip_pytorch_model.bin" if "open" in name else "pytorch_model.bin"
    torch.save(load_file(file), folder / pickled)
    file.unlink()
    assert {check(folder, name).fingerprint} == prints, "the same weights, the same fingerprint"
    told, pixels = expected(name)
    low, _ = load(folder, dtype=torch.bfloat16)
    for got, wanted in ((low.encode_image(pixels), told["image_features"]),
                        (low.encode_text(told["token_ids"]), told["text_features"])):
        assert torch.cosine_similarity(got.float(), wanted).min() > 0.999


def test_names_of_other_libraries_and_back(tmp_path):
    """Hugging Face's, OpenAI's, open_clip's: the tensors that came in; a folder of them is that model."""
    clip = check(GOLDEN / "hf-clip-gelu", "hf-clip-gelu")
    state, config = clip_min.hugging_face(clip)
    assert state.keys() == TENSORS.keys() and all(torch.equal(state[n], TENSORS[n].float()) for n in TENSORS)
    save_file(clip_min.openai_names(clip), tmp_path / "open_clip_model.safetensors")
    told = {"model_cfg": {"embed_dim": 64, "vision_cfg": {}, "text_cfg": {"heads": 1}},
            "preprocess_cfg": {"mean": clip.mean, "std": clip.std}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
    assert check(tmp_path, "hf-clip-gelu").fingerprint == clip.fingerprint
    assert clip_min.openai_names(clip_min.from_weights(OPENAI)).keys() == OPENAI.keys()


# -------------------------------------------------------------------------------------------------- the model

@pytest.mark.parametrize("family", clip_min.FAMILIES)
def test_sizes_and_family_are_read_off_the_tensors(family):
    sizes = dict(image=336, patch=14, vision_width=1024, vision_layers=24, text_layers=3, context=64)
    config = CLIPConfig(family=family, embed=1024, vocab=1000, **sizes, **clip_min.FAMILIES[family])
    with torch.device("meta"):
        assert CLIPConfig.from_weights(CLIP(config).state_dict()) == config


def test_attention_by_hand_in_bfloat16_is_the_same(monkeypatch):
    attention, x = clip_min.Attention(128, 2).bfloat16(), torch.randn(2, 9, 128).bfloat16()
    got = attention(x, x)
    same(got, attention.float()(x.float(), x.float()).bfloat16(), 0.03)
    monkeypatch.setattr(clip_min.F, "scaled_dot_product_attention", None)                   # slower there
    assert torch.equal(attention.bfloat16()(x, x), got)


@pytest.mark.parametrize("path", [TOY_CLIP, GOLDEN / "hf-siglip2"])
def test_the_last_block_gives_out_only_what_is_pooled(path):
    """Exactly what all tokens would give, and less work."""
    clip, tokenizer = load(path)
    tower, run, inputs = clip.visual, clip.encode_image, torch.randn(2, 3, 48, 48)
    if clip.visual.pool:
        tower, run, inputs = clip, clip.encode_text, tokenizer(["a ring"])
    last, seen = tower.transformer.resblocks[-1], []
    last.mlp.register_forward_hook(lambda _, x, y: seen.append(y.shape[1]))
    few, last.rows = run(inputs), slice(None)
    same(few, run(inputs), 1e-6)
    assert seen[0] == 1 < seen[1]


def test_pictures_of_another_size_are_refused_by_name(toy):
    for shape in ((1, 3, 224, 224), (3, 48, 48)):
        with pytest.raises(ValueError, match="this backbone takes .3, 48, 48"):
            toy[0].encode_image(torch.zeros(shape))


@pytest.mark.parametrize("wide", [(90, 60), (60, 90), (48, 48)])
def test_pictures_are_prepared_as_others_do(wide, toy):
    """OpenAI's transform, and Hugging Face's of SigLIP."""
    from torchvision import transforms as T
    image = Image.effect_noise(wide, 80).convert("RGB")
    c = toy[0].config
    theirs = T.Compose([T.Resize(48, T.InterpolationMode.BICUBIC), T.CenterCrop(48), T.ToTensor(),
                        T.Normalize(c.mean, c.std)])
    same(toy[0].preprocess(image.convert("P")), theirs(image.convert("P").convert("RGB")), 1e-6)
    clip = load(GOLDEN / "hf-siglip2")[0]
    same(clip.preprocess(image), T.ToTensor()(image.resize((32, 32), 3)) * 2 - 1, 1e-6)


# ------------------------------------------------------------------------------------------------- tokenizers

def test_tokens_equal_openais():
    path = from_environment("ATHA_MERGES", "OpenAI's bpe_simple_vocab_16e6.txt.gz")
    tokenizer = Tokenizer(clip_min.read_merges(path))
    rows = json.loads((HERE / "golden" / "tokenizer.json").read_text())
    assert [tokenizer.encode(row["text"]) for row in rows] == [row["ids"] for row in rows]
    assert tokenizer(["hi"]).tolist() == [[49406, *tokenizer.encode("hi"), 49407] + [0] * (77 - 3)]


def test_tokenizer_merges_by_rank_and_knows_number_signs():
    tokenizer = Tokenizer(["l o", "lo w</w>", "o w</w>"])
    pieces = {i: piece for piece, i in tokenizer.id.items()}
    assert [pieces[i] for i in tokenizer.encode("LOW  blow_²'s")] == ["low</w>", "b", "low</w>", "_</w>", *[
        tokenizer.symbol[b] + end for b, end in zip("²".encode(), ("", "</w>"))], "'", "s</w>"]
    assert tokenizer(["low " * 100]).argmax(-1).item() == 76  # a long text is cut, its end token kept
    assert tokenizer("low", 5).shape == (1, 5)
    for text in ("pêche", "Ångström", "각"):                # typed, and as a Mac's files spell it
        assert tokenizer.encode(unicodedata.normalize("NFD", text)) == tokenizer.encode(text)


def test_siglips_texts():
    """SigLIP 2's <eos> closes a row that zeros fill up; SigLIP 1's </s> does both."""
    told, _ = expected("hf-siglip2")
    tokenizer, sentences = load(GOLDEN / "hf-siglip2")[1], (GOLDEN / "hf-siglip2/sentences.json").read_text()
    assert torch.equal(tokenizer(json.loads(sentences)), told["token_ids"])
    rows = tokenizer(["A Photo", "a photo", "a photo " * 99, ""], 64)
    assert torch.equal(rows[0], rows[1]) and rows[2, -1] == 1 and rows[3].tolist() == [1] + [0] * 63
    stored = json.loads(tokenizer.metadata["tokenizer"].replace("<eos>", "</s>"))
    assert clip_min.SiglipTokenizer(json.dumps(stored))("", 4).tolist() == [[1, 1, 1, 1]]


# --------------------------------------------------------------------------------- what configs and files say

def changed(target: Path, folder: str, changes: str) -> Path:
    """A golden folder with values of configs in it changed: [file:]section.key=JSON, "-" for left out."""
    shutil.copytree(GOLDEN / folder, target)
    for change in changes.split():
        path, value = change.split("=", 1)
        name, _, path = path.rpartition(":")
        file = target / f"{name or ('' if 'hf' in folder else 'open_clip')}_config.json".removeprefix("_")
        config = json.loads(file.read_text()) if file.exists() else {}
        *above, key = path.split(".")
        inner = config
        for part in above:
            inner = inner.setdefault(part, {})
        inner.pop(key, None) if value == "-" else inner.update({key: json.loads(value)})
        file.write_text(json.dumps(config))
    return target


def rows_of(table: str) -> list[list[str]]:
    return [re.split(" {2,}", line) for line in table.splitlines() if line]


BELIEVED = """
hf-clip-gelu  vision_config.num_attention_heads=4  vision_head=32
hf-clip-gelu  text_config.num_attention_heads=-  text_head=8
hf-siglip2  vision_config.num_attention_heads=4  vision_head=32
hf-clip-gelu  vision_config.layer_norm_eps=1e-6 text_config.layer_norm_eps=1e-6  eps=1e-6
hf-clip-gelu  vision_config.hidden_act=- text_config.hidden_act=-  activation="quick_gelu"
hf-clip-gelu  vision_config_dict.hidden_act="gelu" vision_config_dict.num_attention_heads=1  vision_head=128
hf-clip-gelu  preprocessor:image_std=[1,1,1] preprocessor:resample=2  std=[1,1,1] resample=2
hf-clip-gelu  preprocessor:size={"height":32,"width":32}  resize="squash" resample=3
hf-clip-gelu  preprocessor:size=32 preprocessor:crop_size=32  resize="shortest"
hf-clip-gelu  preprocessor:size={"shortest_edge":32}  resize="shortest"
hf-clip-gelu  processor:image_processor.image_mean=[1] preprocessor:image_mean=[2]  mean=[1]
open_clip-pe-core  model_cfg.quick_gelu=true  activation="quick_gelu"
open_clip-pe-core  model_cfg.vision_cfg.head_width=32 model_cfg.text_cfg.heads=4  vision_head=32 text_head=32
open_clip-pe-core  preprocess_cfg.resize_mode="shortest"  resize="shortest" resample=3
open_clip-pe-core  preprocess_cfg.interpolation="bilinear"  resize="squash" resample=2
"""
NOT_BUILT = """
hf-clip-gelu  vision_config.hidden_act="relu" text_config.hidden_act="relu"  "relu"
hf-clip-gelu  vision_config.hidden_act="quick_gelu"  hidden_act is gelu in one tower, quick_gelu in the other
hf-clip-gelu  text_config.hidden_act=-  hidden_act is quick_gelu in one tower
hf-clip-gelu  vision_config_dict.num_attention_heads=1  hidden_act is gelu in one tower
hf-clip-gelu  text_config.layer_norm_eps=1e-6  layer_norm_eps is 1e-06
hf-clip-gelu  vision_config.num_hidden_layers=3  visual.transformer.resblocks.2.
hf-clip-gelu  text_config.eos_token_id=5  "eos_token_id": 5
hf-clip-gelu  model_type="clipseg"  "clipseg"
hf-clip-gelu  quantization_config.bits=4  "quantization_config"
hf-clip-gelu  preprocessor:size.shortest_edge=40  "shortest_edge": 40
hf-clip-gelu  preprocessor:size=40 preprocessor:crop_size=32  "size": 40
hf-siglip2  model_type="siglip2"  "siglip2"
hf-siglip2  preprocessor:do_normalize=false  "do_normalize": false
hf-siglip2  preprocessor:rescale_factor=0.0078  "rescale_factor": 0.0078
hf-siglip2  preprocessor:resample=1  "resample": 1
open_clip-pe-core  model_cfg.text_cfg.pool_type="last"  "pool_type": "last"
open_clip-pe-core  model_cfg.text_cfg.no_causal_mask=true  "no_causal_mask": true
open_clip-pe-core  model_cfg.text_cfg.norm_kwargs.eps=1e-6  "norm_kwargs"
open_clip-pe-core  model_cfg.text_cfg.tokenizer_kwargs.clean="lower"  "tokenizer_kwargs"
open_clip-pe-core  model_cfg.vision_cfg.timm_model_name="vit_base_patch16_224"  "timm_model_name": "vit_base
open_clip-pe-core  model_cfg.vision_cfg.timm_pool="avg"  "timm_pool": "avg"
open_clip-pe-core  model_cfg.vision_cfg.image_size=[32,48]  cannot use
open_clip-pe-core  preprocess_cfg.interpolation="random"  "interpolation": "random"
"""


@pytest.mark.parametrize("folder, changes, wanted", rows_of(BELIEVED))
def test_what_a_config_says_is_believed(folder, changes, wanted, tmp_path, capsys):
    """And stays so in our own file, and the weights have another fingerprint then."""
    clip, _ = load(changed(tmp_path / "w", folder, changes))
    for pair in wanted.split():
        field, value = pair.split("=")
        assert getattr(clip.config, field) == json.loads(value)
    convert(tmp_path / "w", tmp_path / "ours.safetensors")
    assert load(tmp_path / "ours.safetensors")[0].fingerprint == clip.fingerprint
    untouched = load(GOLDEN / folder)[0]
    assert (clip.fingerprint == untouched.fingerprint) == (str(clip.config) == str(untouched.config))
    assert capsys.readouterr().err == ""


def refuses(path, *words: str) -> str:
    """`load` says in one line what is wrong with the path."""
    with pytest.raises(WeightsError) as error:
        load(path)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in (str(path), *words)), line
    return line


@pytest.mark.parametrize("folder, changes, words", rows_of(NOT_BUILT))
def test_what_is_not_built_is_refused(folder, changes, words, tmp_path):
    refuses(changed(tmp_path / "w", folder, changes), words)


class Evil:
    """Unpickled, it makes a file."""
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return type(self.marker).touch, (self.marker,)


def toy_with(**changes):
    """Writes the toy CLIP with tensors changed (None: left out)."""
    tensors = load_file(TOY_CLIP) | changes
    return lambda path: save_file({name: x for name, x in tensors.items() if x is not None}, path)


FILES = {    # what is written, what must be said
    "cut": (lambda path: path.write_bytes(TOY_CLIP.read_bytes()[:-5]), "it is cut"),
    "a pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html><title>Sign in</title>"), "a web page"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Evil(path.with_name("marker")))), "is not run"),
    "code": (lambda path: torch.save({"a": Evil(path.with_name("marker"))}, path), "is not run"),
    "a stranger's archive": (as_torchscript, "is not run"),
    "one tower": (lambda path: save_file({n: TENSORS[n] for n in TENSORS if "vis" in n}, path), "both its"),
    "a ResNet": (toy_with(**{"visual.positional_embedding": None}), "both its towers"),
    "an adapter": (lambda path: save_file({"q_proj.lora_A.weight": torch.ones(2)}, path), "both its towers"),
    "a tensor more": (toy_with(**{"visual.layer.ls_1.gamma": torch.ones(3)}), "ls_1.gamma"),
    "8 bits": (toy_with(**{"ln_final.bias": torch.zeros(64, dtype=torch.int8)}), "ln_final.bias is no"),
    "not a number": (toy_with(**{"ln_final.bias": torch.full((64,), torch.nan)}), "ln_final.bias is no"),
    "missing merges": (toy_with(**{"token_embedding.weight": torch.zeros(544, 64)}), "0 merges of text"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_be_used(case, tmp_path):
    write, words = FILES[case]
    write(tmp_path / "w.bin")
    line = refuses(tmp_path / "w.bin", words)
    assert not (tmp_path / "marker").exists() and "KeyError" not in line and "attribute" not in line


def test_where_the_merges_come_from(tmp_path):
    """tokenizer.json of either spelling, merges.txt before it; with ids shifted CLIP would err."""
    pairs = [f"{a} {b}" for a in "abcde" for b in "abcdef"]
    toy_with(**{"token_embedding.weight": torch.zeros(544, 64)})(tmp_path / "model.safetensors")
    for merges in (pairs, [pair.split() for pair in pairs]):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"merges": merges}}))
        assert load(tmp_path)[1].encode("abde") == Tokenizer(pairs).encode("abde")
    convert(tmp_path, tmp_path / "ours" / "w")
    assert load(tmp_path / "ours" / "w")[1].encode("abde") == Tokenizer(pairs).encode("abde")
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs[:-1]]))
    refuses(tmp_path, "29 merges of text where its vocabulary needs 30")


def test_what_may_be_given_is_said():
    for name in ("openai/clip-vit-base-patch16", "ViT-B/16", HERE):
        refuses(name, "hf-hub:org/name", "model.safetensors")


def test_tensors_alone(tmp_path):
    """A state dict of any naming, without a file."""
    clip = clip_min.from_weights(load_file(GOLDEN / "open_clip-pe-core" / "open_clip_model.safetensors"))
    told, pixels = expected("open_clip-pe-core")
    same(clip.float().encode_image(pixels), told["image_features"])
    with pytest.raises(WeightsError, match="visual.conv1"):
        clip_min.from_weights({})


# --------------------------------------------------------------------------------------------------- fetching

@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub on this machine: `files` by path, `asked` for, `broken` ones end in the middle."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hub.asked.append(self.path)
            content = hub.files.get(self.path)
            if content is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if self.path in hub.broken else content)

        def log_message(self, *_):
            pass
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.files, hub.asked, hub.broken = {}, [], set()
    address = f"http://127.0.0.1:{hub.server_port}"
    for name in ("HUB", "VIT_B16_URL", "MERGES_URL"):
        monkeypatch.setattr(clip_min, name, getattr(clip_min, name).replace("http://127.0.0.1:9", address))
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()


def offer(hub, repository: str, folder: Path, *leave: str) -> None:
    for file in folder.iterdir():
        if file.is_file() and file.name not in leave:
            hub.files[f"/{repository}/resolve/main/{file.name}"] = file.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_hub_repository_is_fetched_once(name, server, capsys, own_cache):
    offer(server, "org/name", GOLDEN / name, "expected.safetensors")
    check("hf-hub:org/name", name)
    said = capsys.readouterr().err
    assert "model.safetensors (" in said.replace("to ", "(") and str(own_cache) in said and "MiB" in said
    del server.asked[:]
    check("hf-hub:org/name", name)
    assert server.asked == [] and not [*own_cache.rglob("tmp*")]
    with pytest.raises(WeightsError, match="org/none/resolve/main/ gives none of open_clip_model"):
        load("hf-hub:org/none")


def test_a_connection_that_breaks_leaves_nothing_half(server, own_cache):
    offer(server, "org/name", GOLDEN / "hf-clip-gelu")
    server.broken.add("/org/name/resolve/main/model.safetensors")
    with pytest.raises(WeightsError, match="cannot fetch .*model.safetensors .*retrieval incomplete"):
        load("hf-hub:org/name")
    assert not [*own_cache.rglob("*model*")] and not [*own_cache.rglob("tmp*")]
    server.broken.clear()
    check("hf-hub:org/name", "hf-clip-gelu")


def test_default_weights_come_from_the_first_that_has_them(server, own_cache, tmp_path, monkeypatch):
    """Ours, openai/CLIP's if its SHA-256 is right, the hub's, OpenAI's; with no network one line says all."""
    archive, hub = clip_min.ARCHIVE, own_cache / "hub" / clip_min.VIT_B16
    as_torchscript(tmp_path / "w.pt")
    digest = clip_min.sha256_of(tmp_path / "w.pt")
    monkeypatch.setattr(clip_min, "VIT_B16_SHA256", digest)
    monkeypatch.setattr(clip_min, "OPENAI_SHA256", {digest})
    with pytest.raises(WeightsError) as error:
        load()
    for word in (clip_min.HUB, clip_min.VIT_B16, hub, clip_min.VIT_B16_URL, archive.parent,
                 clip_min.MERGES_URL, own_cache, "--dataset toy", "--weights tests/toy_clip.safetensors"):
        assert str(word) in str(error.value)
    assert "\n" not in str(error.value)
    server.files["/ViT-B-16.pt"] = b"not the archive"
    with pytest.raises(WeightsError, match="its SHA-256"):
        load()
    assert not archive.exists()
    server.files["/ViT-B-16.pt"] = (tmp_path / "w.pt").read_bytes()
    assert load()[0].config.image == 32 and archive.is_file(), "OpenAI's, where openai/CLIP looks for it too"
    assert load()[0].config.image == 32 and server.asked[-1] == "/ViT-B-16.pt"  # it is there
    archive.write_bytes(b"something else")
    save_file(OPENAI, tmp_path / "open_clip_model.safetensors")
    told = {"model_cfg": {"quick_gelu": True, "vision_cfg": {}, "text_cfg": {"heads": 1}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
    offer(server, clip_min.VIT_B16, tmp_path, "w.pt")
    same(load()[0].encode_image(TINY["images"]), TINY["image_features"])
    assert (hub / "open_clip_model.safetensors").is_file()
    shutil.copy(TOY_CLIP, own_cache / "ViT-B-16.safetensors")
    assert load()[0].config.image == 48    # what an earlier version kept


# ------------------------------------------------------------------------------------------- the command line

def test_classify_and_convert_on_the_command_line(tmp_path, capsys):
    Image.effect_noise((90, 60), 80).save(tmp_path / "a.png")
    for name in ("toy", *NAMES):
        weights = TOY_CLIP if name == "toy" else GOLDEN / name
        clip_min.main(["classify", f"{tmp_path}/a.png", "a ring", "a star", "--weights", str(weights)])
        lines = [line.split("%") for line in capsys.readouterr().out.splitlines()]
        chances = [float(chance) for chance, _ in lines]
        assert sorted(label.strip() for _, label in lines) == ["a ring", "a star"]
        assert chances[0] >= chances[1]
        assert (abs(sum(chances) - 100) < 0.02) == ("siglip" not in name), "SigLIP's are each by itself"
    done = command("convert", TOY_CLIP, tmp_path / "b.safetensors", program="clip_min.py")
    assert done.returncode == 0 and load(tmp_path / "b.safetensors")[0].config.image == 48
    for argv, word in ((["convert", "none.pt", "b"], "no weights at none.pt"),
                       (["convert", str(TOY_CLIP), str(tmp_path)], "irectory"),
                       (["classify", str(TOY_CLIP), "a", "--weights", str(TOY_CLIP)], "cannot read")):
        with pytest.raises(SystemExit, match="2"):
            clip_min.main(argv)
        error = capsys.readouterr().err
        assert error.startswith("clip_min.py: error: ") and error.count("\n") == 1 and word in error
