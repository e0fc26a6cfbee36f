"""--export: what others' libraries make of the folder, against our own answers, where those libraries are installed."""
import json

import pytest
import torch
from conftest import from_environment, refused, same
from safetensors.torch import load_file

import clip_min
import data
import train

BACKBONES = train.Path(__file__).parent / "golden" / "backbones"


def saved(where, weights, pool, method="clip-lora", **fields):
    """A saved file of a learner whose every number was drawn: (file, learner)."""
    backbone, tokenizer = clip_min.load(weights)
    recipe = train.replace(train.recipe_for("paper", method), **fields)
    rows = train.class_rows(tokenizer, recipe.prompt, pool.classes, backbone.config.context)
    learner = train.Learner(backbone, rows[None], method, recipe)
    for name, p in learner.learned().items():
        noise = 0.05 * torch.randn(p.shape, generator=data.generator(name))
        learner.get_parameter(name).data.copy_(p + noise)
    notes = {"classes": pool.classes, "phrases": pool.classes, "method": method, "recipe": train.asdict(recipe),
             "weights": backbone.fingerprint, "code": {}, "place": str(weights), "temperature": 2.0, "size": pool.images.shape[-1]}
    clip_min.save(learner.learned(), where / "saved", {key: json.dumps(value) for key, value in notes.items()})
    return where / "saved", train.load_tuned(where / "saved", backbone, tokenizer)


def exported(where, *options):
    assert train.main(["--export", str(where / "saved"), str(where / "out"), *options]) == 0
    about = json.loads((where / "out" / "classes.json").read_text())
    return where / "out", about, load_file(where / "out" / "classes.safetensors")["embeddings"]


def logits_of(features, about, texts):
    """What a program makes of another library's image features (n, embed): (n, N)."""
    return about["scale"] * torch.nn.functional.normalize(features.detach(), dim=-1) @ texts.T


@pytest.fixture(scope="module")
def toys():
    images, labels = data.toy_pictures(2)
    return data.Pool(images[:12], labels[:12], data.TOY_CLASSES[:6], "toy")


@pytest.fixture
def leaves():
    """Real leaves, eight classes, two of each."""
    folder = from_environment("ATHA_DATA", "real samples of the datasets") / "CropDiseases" / "train"
    files = [file for place in sorted(folder.iterdir()) for file in sorted(place.iterdir())[:2]]
    images = torch.stack([data.decode(file, 256) for file in files])
    return data.Pool(images, torch.arange(8).repeat_interleave(2), sorted({f.parent.name for f in files}), "leaves")


@pytest.mark.parametrize("method, fields", [("clip-lora", {}), ("svl", {"text_lora": True}), ("coop", {}),
                                            ("clip-lora+coop+lv", {"augment": "none"}), ("zero-shot", {})])
def test_transformers_answers_as_we_do_on_real_leaves(tmp_path, leaves, method, fields):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    weights = from_environment("ATHA_WEIGHTS", "a small trained CLIP in Hugging Face form")
    _, learner = saved(tmp_path, weights, leaves, method, **fields)
    images = learner.prepare(leaves.images[None])
    folder, about, texts = exported(tmp_path)
    model = transformers.AutoModel.from_pretrained(folder)
    assert type(model) is transformers.CLIPModel
    logits = logits_of(model.get_image_features(pixel_values=images[0]).pooler_output, about, texts)
    same(logits, learner.logits(images)[0])
    assert (about["classes"], about["temperature"]) == (leaves.classes, 2.0)
    assert model.logit_scale.exp().item() == pytest.approx(about["scale"] / 2, rel=1e-5), "for those who use it whole"
    # pictures as its own processor prepares them: from one resize, not two, so nearly the same
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(list(leaves.images), return_tensors="pt")["pixel_values"]
    assert pixels.shape == images[0].shape and (pixels - images[0]).abs().mean() < 0.02


def test_the_exported_tokenizer_is_ours(tmp_path, toys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    weights = from_environment("ATHA_WEIGHTS", "a CLIP with OpenAI's vocabulary")
    saved(tmp_path, weights, toys)
    folder, _, _ = exported(tmp_path)
    theirs, (_, ours) = transformers.AutoTokenizer.from_pretrained(folder), clip_min.load(weights)
    texts = ["a photo of a leaf.", "Don't panic: 42 naive cafes!"]
    for text, ids in zip(texts, ours(texts).tolist()):
        assert theirs(text)["input_ids"] == ids[: ids.index(ours.end) + 1]



@pytest.mark.parametrize("name", ["hf-clip-gelu", "hf-siglip2"])
def test_transformers_opens_the_other_backbones(tmp_path, toys, name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if name == "hf-siglip2":
        pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    _, learner = saved(tmp_path, BACKBONES / name, toys, "clip-lora", prompt="{}")
    images = learner.prepare(toys.images[None])
    folder, about, texts = exported(tmp_path)
    model = transformers.AutoModel.from_pretrained(folder)
    same(logits_of(model.get_image_features(pixel_values=images[0]).pooler_output, about, texts),
         learner.logits(images)[0])
    assert type(model).__name__ == {"hf-clip-gelu": "CLIPModel", "hf-siglip2": "SiglipModel"}[name]


def test_open_clip_opens_pe_core(tmp_path, toys, monkeypatch):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    timm = pytest.importorskip("timm", reason="timm is not installed")
    _, learner = saved(tmp_path, BACKBONES / "open_clip-pe-core", toys, "clip-lora", prompt="{}")
    images, c, create = learner.prepare(toys.images[None]), learner.backbone.config, timm.create_model

    def small(name, **options):                                  # the golden trunk is smaller than those with a name
        assert name == f"vit_pe_core_base_patch{c.patch}_{c.image}"
        sizes = {"img_size": c.image, "patch_size": c.patch, "embed_dim": c.vision_width, "depth": c.vision_layers}
        grid = (c.image // c.patch,) * 2                         # coordinates of patches are counted on it
        return create("vit_pe_core_base_patch16_224", num_heads=c.vision_width // 64, ref_feat_shape=grid, **sizes,
                      **options)
    monkeypatch.setattr(timm, "create_model", small)
    folder, about, texts = exported(tmp_path)
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    same(logits_of(model.encode_image(images[0]), about, texts), learner.logits(images)[0])


def test_peft_puts_lora_on_the_model_that_it_belongs_to(tmp_path, leaves):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    weights = from_environment("ATHA_WEIGHTS", "a small trained CLIP in Hugging Face form")
    _, learner = saved(tmp_path, weights, leaves, "clip-lora", rank=3, text_lora=True)
    images = learner.prepare(leaves.images[None])
    folder, about, texts = exported(tmp_path, "--format", "peft")
    model = transformers.CLIPModel.from_pretrained(weights, dtype=torch.float32)
    frozen = logits_of(model.get_image_features(pixel_values=images[0]).pooler_output, about, texts)
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    tuned = logits_of(model.get_image_features(pixel_values=images[0]).pooler_output, about, texts)
    same(tuned, learner.logits(images)[0])
    assert (frozen - tuned).abs().max() > 1


@pytest.mark.parametrize("method", ["atha", "tir", "maple", "svl+atha-push", "{tmp}/mine.py:Mine"])
def test_what_acts_between_the_blocks_is_refused_with_what_to_use_instead(tmp_path, toys, toy, capsys, method):
    (tmp_path / "mine.py").write_text("from atha import Part\nclass Mine(Part):\n"
                                      "    def vision_hook(self, text):\n        return lambda x, layer: x\n")
    method = method.format(tmp=tmp_path)
    recipe = train.recipe_for("paper", method)
    rows = train.class_rows(toy[1], recipe.prompt, toys.classes, toy[0].config.context)
    learner = train.Learner(toy[0], rows[None], method, recipe)
    notes = {"classes": toys.classes, "phrases": toys.classes, "method": method, "recipe": train.asdict(recipe),
             "weights": toy[0].fingerprint, "code": train.own_code(method), "place": str(train.TOY_CLIP), "temperature": None, "size": 48}
    clip_min.save(learner.learned(), tmp_path / "saved", {key: json.dumps(value) for key, value in notes.items()})
    refused(capsys, ["--export", tmp_path / "saved", tmp_path / "out", "--method", method], tmp_path / "saved",
            "acts between the blocks", "--predict", "clip-lora, svl or coop")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method, options, words", [
    ("coop", "--format peft", ["no LoRA"]), ("clip-lora", "--weights {tmp}/nowhere", ["{tmp}/nowhere"]),
    ("clip-lora", "--json", ["--export does not take --json"]), ("clip-lora", "--rank 3", ["--export does not take --rank"])])
def test_exports_that_cannot_be_are_said_in_one_line_and_leave_nothing(tmp_path, toys, capsys, method, options, words):
    saved(tmp_path, train.TOY_CLIP, toys, method)
    before = sorted(tmp_path.iterdir())
    refused(capsys, ["--export", tmp_path / "saved", tmp_path / "out", *options.format(tmp=tmp_path).split()],
            *(word.format(tmp=tmp_path) for word in words))
    assert sorted(tmp_path.iterdir()) == before


def test_an_export_replaces_nothing(tmp_path, toys, capsys):
    saved(tmp_path, train.TOY_CLIP, toys)
    (tmp_path / "out").mkdir()
    refused(capsys, ["--export", tmp_path / "saved", tmp_path / "out"], "is there already")


def test_merged_weights_are_those_of_the_formula_and_ours_to_load(tmp_path, toys, toy):
    file, learner = saved(tmp_path, train.TOY_CLIP, toys, rank=4)
    folder, _, _ = exported(tmp_path)
    tensors = clip_min.from_weights(load_file(folder / "model.safetensors")).state_dict()
    stored, name = load_file(file), "visual.transformer.resblocks.1.attn.k_proj"
    product = stored[f"backbone.{name}.B"][0] @ stored[f"backbone.{name}.A"][0]
    same(tensors[f"{name}.weight"], toy[0].state_dict()[f"{name}.weight"] + 8 / 4 ** 0.5 * product)
    assert not any(path.name.startswith("tmp") for path in tmp_path.iterdir())
