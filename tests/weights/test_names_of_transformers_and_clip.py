"""Files of transformers, OpenAI's CLIP and open_clip: timm's models, renamed as these projects' converters do it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from apt_dense import APTViT, load_backbone
from apt_dense.weights.arguments_from_file import told_by
from apt_dense.weights.find_backbone_weights import unwrap

from support.families import HEADS, timm_model
from support.references import noise

State = dict[str, Tensor]
LAYER = "weight", "bias"


def renamed(state: State, blocks: str, whole: dict[str, str], parts: dict[str, str]) -> State:
    """Rename what is around the blocks, and the parts of each block."""
    names = dict(whole)
    for number in {name.split(".")[1] for name in state if name.startswith("blocks.")}:
        names |= {f"blocks.{number}.{ours}": f"{blocks}.{number}.{theirs}" for ours, theirs in parts.items()}
    pairs = [(f"{a}.{end}", f"{b}.{end}") for a, b in names.items() for end in LAYER] + list(names.items())
    return {theirs: state[ours] for ours, theirs in pairs if ours in state}


def split(state: State, blocks: str, projection: str) -> State:
    """The joined projections, which are the first third, the second and the last."""
    found = {}
    for name, value in state.items():
        if ".qkv." in name:
            _, number, *_, end = name.split(".")
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[f"{blocks}.{number}.{projection.format(part, part[0])}.{end}"] = third.clone()
    return found


def transformers_vit(state: State) -> State:
    """ViTForImageClassification."""
    whole = {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm",
    }  # fmt: skip
    parts = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    found = renamed(state, "encoder.layer", whole, parts)
    found |= split(state, "encoder.layer", "attention.attention.{0}") | {"pooler.dense.weight": torch.ones(3, 3)}
    return {f"vit.{name}": value for name, value in found.items()} | {"classifier.weight": torch.ones(2, 3)}


def transformers_dinov2(state: State) -> State:
    """Dinov2Model and Dinov2WithRegistersModel, also with their SwiGLU."""
    whole = {
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "reg_token": "embeddings.register_tokens", "norm": "layernorm",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
    }  # fmt: skip
    swiglu = state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
    parts = {
        "norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1",
        "mlp.fc1": "mlp.weights_in" if swiglu else "mlp.fc1", "mlp.fc2": "mlp.weights_out" if swiglu else "mlp.fc2",
    }  # fmt: skip
    found = renamed(state, "encoder.layer", whole, parts) | {"embeddings.mask_token": torch.ones(1, 3)}
    return found | split(state, "encoder.layer", "attention.attention.{0}")


def transformers_clip(state: State) -> State:
    """CLIPModel and SiglipModel, each with its text tower."""
    whole = {
        "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed.proj": "embeddings.patch_embedding", "norm_pre": "pre_layrnorm", "norm": "post_layernorm",
    }  # fmt: skip
    parts = {
        "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    found = renamed(state, "encoder.layers", whole, parts) | split(state, "encoder.layers", "self_attn.{1}_proj")
    found["embeddings.position_ids"] = torch.arange(3)[None]
    text = {"text_model.encoder.layers.0.layer_norm1.weight": torch.ones(3), "logit_scale": torch.ones(())}
    text["text_model.embeddings.position_embedding.weight"] = torch.ones(7, 3)
    return text | {f"vision_model.{name}": value for name, value in as_lists(found).items()}


def openai_clip(state: State) -> State:
    """CLIP as OpenAI and open_clip name it, with its text tower."""
    whole = {
        "cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj": "conv1",
        "norm_pre": "ln_pre", "norm": "ln_post",
    }  # fmt: skip
    parts = {
        "norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj", "attn.qkv.weight": "attn.in_proj_weight", "attn.qkv.bias": "attn.in_proj_bias",
    }  # fmt: skip
    found = as_lists(renamed(state, "transformer.resblocks", whole, parts)) | {"proj": torch.ones(3, 3)}
    text = {"positional_embedding": torch.ones(7, 3), "transformer.resblocks.0.ln_1.weight": torch.ones(3)}
    return text | {f"visual.{name}": value for name, value in found.items()}


def as_lists(state: State) -> State:
    """CLIP's class token is (C), and its positions are (N, C)."""
    names = {"class_embedding": 2, "positional_embedding": 1, "position_embedding.weight": 1}
    axes = {name: next((n for end, n in names.items() if name.endswith(end)), 0) for name in state}
    return {name: value[(0,) * axes[name]] if axes[name] else value for name, value in state.items()}


CLIP = {"act_layer": "quick_gelu", "rotary": None}
CASES = {
    "ViT": (transformers_vit, "augreg", {}, "transformers"),
    "DINOv2": (transformers_dinov2, "dinov2", {}, "transformers"),
    "DINOv2 with registers": (transformers_dinov2, "dinov2 reg", {}, "transformers"),
    "DINOv2 giant": (transformers_dinov2, "dinov2 giant", {}, "transformers"),
    "CLIP": (transformers_clip, "openai clip", CLIP, "transformers"),
    "SigLIP": (transformers_clip, "siglip", {"act_layer": "gelu"}, "transformers"),
    "CLIP itself": (openai_clip, "openai clip", CLIP, "OpenAI's CLIP"),
}


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_values_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    convert, family, answers, title = CASES[name]
    theirs: nn.Module = timm_model(family)
    torch.save(convert(theirs.state_dict()), tmp_path / "pytorch_model.bin")
    ours = APTViT.from_weights(tmp_path / "pytorch_model.bin", num_heads=HEADS, **answers).eval()
    images = noise(1, 3, 3 * ours.patch_size, 5 * ours.patch_size)
    expected = theirs.forward_features(images)[:, theirs.num_prefix_tokens :].mT
    torch.testing.assert_close(ours(images)[0].flatten(2), expected, atol=1e-4, rtol=0)
    plain = APTViT.from_timm(theirs)
    weights = plain.state_dict()
    report = load_backbone(plain, tmp_path / "pytorch_model.bin")
    assert not report.missing and not report.unexpected
    assert all(torch.equal(value, weights[key]) for key, value in plain.state_dict().items())
    assert f"names of {title}" in told_by(unwrap(convert(theirs.state_dict()))).title


def test_a_missing_projection_is_named() -> None:
    state = transformers_vit(timm_model("augreg").state_dict())
    del state["vit.encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(ValueError, match=r"lacks blocks\.1\.attn\.qkv\.weight.*blocks\.1\.attn\.query\.weight"):
        APTViT.from_weights(state, num_heads=HEADS)


def test_open_clip_around_a_timm_model() -> None:
    state = {f"visual.trunk.{name}": value for name, value in timm_model("siglip").state_dict().items()}
    state["text.transformer.resblocks.0.ln_1.weight"] = torch.ones(3)
    assert APTViT.from_weights(state, num_heads=HEADS, act_layer="gelu").depth == 2
