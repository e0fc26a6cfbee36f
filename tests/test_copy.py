"""atha.py in other people's towers: LoRA, ATHA and TIR there give the features of the project's own tower."""
import copy

import pytest
import torch
from conftest import same
from torch import nn
from torchvision.models import VisionTransformer

import atha
import clip_min
from atha import SplitAttention, add_lora, before_blocks, split_attention

CONFIG = clip_min.CLIPConfig(embed=48, image=32, patch=8, vision_width=128, vision_layers=3, text_width=64,
                             text_layers=2, context=16, vocab=520)


def a_hook(text, ln_post, proj):
    """ATHA and TIR before every block."""
    pull = atha.atha_hook(atha.text_to_tokens(text, proj), torch.full((3,), 0.8), torch.full((3,), 0.1))
    return lambda tokens, layer: atha.tir_step(pull(tokens, layer), text, ln_post, proj)


class OpenAIBlock(nn.Module):
    """As OpenAI's own code has it: tokens (T, B, D), nn.MultiheadAttention."""

    def __init__(self, ours):
        super().__init__()
        self.ln_1, self.ln_2, self.mlp = ours.ln_1, ours.ln_2, ours.mlp
        self.attn = nn.MultiheadAttention(128, 2)
        weights = ours.attn.state_dict()
        for kind in ("weight", "bias"):
            weights[f"in_proj_{kind}"] = torch.cat([weights.pop(f"{which}_proj.{kind}") for which in "qkv"])
        self.attn.load_state_dict(weights)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=None)[0]
        return x + self.mlp(self.ln_2(x))


class OpenAITransformer(nn.Module):
    def __init__(self, ours):
        super().__init__()
        self.resblocks = nn.Sequential(*map(OpenAIBlock, ours.resblocks))

    def forward(self, x, between):
        return self.resblocks(x.transpose(0, 1)).transpose(0, 1)


# each: pictures to features, the module for LoRA, its blocks, of a clip's weights
def openai_tower(clip):
    visual = copy.deepcopy(clip.visual)
    visual.transformer = split_attention(OpenAITransformer(visual.transformer))
    return visual, visual.transformer, visual.transformer.resblocks


def open_clip_tower(clip):
    open_clip = pytest.importorskip("open_clip")
    vision = dict(layers=3, width=128, patch_size=8, image_size=32)
    text = dict(context_length=16, vocab_size=520, width=64, heads=1, layers=2)
    theirs = open_clip.model.CLIP(48, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    theirs.load_state_dict(clip_min.openai_names(clip), strict=False)
    visual = theirs.visual
    return visual, split_attention(visual.transformer), visual.transformer.resblocks


def transformers_tower(clip):
    transformers = pytest.importorskip("transformers")
    tensors, config = clip_min.hugging_face(clip)
    theirs = transformers.CLIPModel(transformers.CLIPConfig.from_dict(config))
    theirs.load_state_dict(tensors, strict=False)
    vision = theirs.vision_model

    def features(images):
        return theirs.visual_projection(vision(images).pooler_output)
    return features, vision.encoder, vision.encoder.layers


@pytest.mark.parametrize("theirs", [openai_tower, open_clip_tower, transformers_tower])
def test_lora_atha_and_tir_in_another_tower_are_those_of_our_own(theirs):
    torch.manual_seed(0)
    clip, images, text = clip_min.CLIP(CONFIG).eval(), torch.randn(4, 3, 32, 32), torch.randn(5, 48)
    tower, inside, blocks = theirs(clip)
    adapters = add_lora(inside, dropout=0)
    same(tower(images), clip.visual(images))
    for path, ours in add_lora(clip.visual.transformer, dropout=0).items():
        nn.init.normal_(ours.B, std=0.02)
        if theirs is transformers_tower:
            path = path.replace("resblocks", "layers").replace("attn", "self_attn")
        adapters[path].load_state_dict(ours.state_dict(), strict=False)
    hook = a_hook(text, clip.visual.ln_post, clip.visual.proj.detach())
    handles = before_blocks(blocks, hook, batch_first=theirs is not openai_tower)
    same(tower(images), clip.visual(images, hook))
    for handle in handles:
        handle.remove()
    same(tower(images), clip.visual(images))


def test_tokens_may_come_by_keyword():
    block, x = nn.Identity(), torch.ones(2, 3, 4)
    block.forward = lambda x, scale: x * scale
    before_blocks([block], lambda tokens, layer: tokens + 1)
    assert block(x, scale=3).eq(6).all() and block(x=x, scale=2).eq(4).all()


@pytest.mark.parametrize("batch_first", [True, False])
def test_split_attention_gives_the_numbers_of_multihead_attention(batch_first):
    torch.manual_seed(0)
    old = nn.MultiheadAttention(32, 4, batch_first=batch_first)
    nn.init.normal_(old.in_proj_bias)
    new, x, other = SplitAttention(old), torch.randn(5, 5, 32), torch.randn(5, 5, 32)
    mask = torch.full((5, 5), -torch.inf).triu(1)
    for how in ({}, {"attn_mask": mask}, {"attn_mask": mask < 0}, {"attn_mask": mask, "is_causal": True}):
        same(*(attention(x, other, x + 1, need_weights=False, **how)[0] for attention in (new, old)))
    with pytest.raises(ValueError, match="need_weights=False"):
        new(x, x, x)
    for how in ({"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 8}, {"bias": False}):
        with pytest.raises(ValueError, match="split_attention takes"):
            split_attention(nn.Sequential(nn.MultiheadAttention(32, 4, **how)))


def test_torchvision_s_vit_has_layers_for_lora_after_split_attention():
    vit, images = VisionTransformer(32, 8, 2, 4, 64, 128), torch.randn(2, 3, 32, 32)
    nn.init.normal_(vit.heads.head.weight)
    want = vit(images)
    with pytest.raises(ValueError, match="no nn.Linear named q_proj, .* split_attention"):
        add_lora(vit)
    assert len(add_lora(split_attention(vit))) == 6
    same(vit.eval()(images), want)


def test_a_dino_of_timm_with_registers_and_fused_qkv():
    timm = pytest.importorskip("timm")
    dino = timm.models.VisionTransformer(32, 8, embed_dim=64, depth=2, num_heads=4, reg_tokens=2)
    with pytest.raises(ValueError, match="no nn.Linear named q_proj"):
        add_lora(dino)
    added, alpha = add_lora(dino, targets=("qkv",)), torch.full((2,), 0.8, requires_grad=True)
    before_blocks(dino.blocks, atha.atha_hook(torch.randn(5, 64), alpha, alpha, first_patch=3))
    dino(torch.randn(2, 3, 32, 32))[:, 0].sum().backward()
    assert alpha.grad.ne(0).all() and all(adapter.B.grad.ne(0).any() for adapter in added.values())
