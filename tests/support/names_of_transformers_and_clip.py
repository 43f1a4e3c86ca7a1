"""Rename state dicts of timm's models as the converters of transformers, OpenAI's CLIP and open_clip do."""

from __future__ import annotations

import torch
from torch import Tensor

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
