"""timm's plain ViTs and SAM's image encoder: which ``APTViT`` arguments rebuild a model, and a refusal of everything
that has none."""

import difflib
from collections.abc import Iterator
from typing import Any

import timm
from timm.layers import Attention, LayerNorm, Mlp, PatchEmbed
from timm.models import vision_transformer, vision_transformer_sam
from torch import nn


def create_timm_model(name: str, pretrained: bool, img_size: int | tuple[int, int] | None) -> nn.Module:
    """``timm.create_model`` without a classification head.

    Raises:
        ValueError: for a name timm does not know, with the closest ones.
    """
    if not timm.is_model(name.split(".")[0]):
        alike = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3)
        raise ValueError(f"timm has no model {name!r}; did you mean one of {alike}? timm.list_models() lists all")
    size = {} if img_size is None else {"img_size": img_size}
    return timm.create_model(name, pretrained=pretrained, num_classes=0, **size)


def apt_arguments(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of ``APTViT`` that rebuild a timm ViT.

    Raises:
        ValueError: if the model has a feature that ``APTViT`` does not, naming every one. Leaving one out would give
            silently wrong features.
    """
    features = list(_unsupported(model))
    if features:
        raise ValueError(
            f"APTViT does not support {', '.join(features)} of timm's {_name(model)}. Supported are plain pre-norm "
            f"ViTs with learned absolute positions (AugReg, DeiT without distillation, MAE) and SAM's image encoder"
        )
    own = _sam_arguments if isinstance(model, vision_transformer_sam.VisionTransformerSAM) else _vit_arguments
    return {**_common_arguments(model), **own(model)}


def _common_arguments(model: nn.Module) -> dict[str, Any]:
    block = model.blocks[0]
    config = getattr(model, "pretrained_cfg", None) or {}
    pixels = {f"pixel_{k}": tuple(255 * v for v in config[k]) for k in ("mean", "std") if k in config}
    return {
        "img_size": model.patch_embed.img_size,
        "patch_size": model.patch_embed.patch_size[0],
        "in_chans": model.patch_embed.proj.in_channels,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "patch_bias": model.patch_embed.proj.bias is not None,
        "norm_eps": block.norm1.eps,
        **pixels,
    }


def _vit_arguments(model: nn.Module) -> dict[str, Any]:
    return {
        "class_token": model.has_class_token,
        "no_embed_class": model.no_embed_class,
        "final_norm": isinstance(model.norm, nn.LayerNorm),
    }


def _sam_arguments(model: nn.Module) -> dict[str, Any]:
    """The trunk of SAM's image encoder; its neck is not part of the backbone."""
    windows = {i: block.window_size for i, block in enumerate(model.blocks) if block.window_size}
    return {
        "window_size": max(windows.values(), default=0),
        "window_block_indexes": tuple(windows),
        "use_rel_pos": model.blocks[0].attn.use_rel_pos,
    }


def _name(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _unsupported(model: nn.Module) -> Iterator[str]:
    """Names of the features of a timm model that ``APTViT`` cannot reproduce."""
    if type(model) not in (vision_transformer.VisionTransformer, vision_transformer_sam.VisionTransformerSAM):
        yield f"the architecture {type(model).__name__}"
        return
    if type(model.patch_embed) is not PatchEmbed or not _is_identity(model.patch_embed.norm):
        yield "its patch embedding"
    elif model.patch_embed.patch_size[0] != model.patch_embed.patch_size[1]:
        yield f"patches of {model.patch_embed.patch_size} pixels, which are not square"
    if getattr(model, "reg_token", None) is not None:
        yield "register tokens"
    if model.pos_embed is None:
        yield "the lack of absolute positions"
    if getattr(model, "rope_global", None) is not None:
        yield "rotary positions"
    if not _is_identity(model.norm_pre):
        yield "pre-norm (norm_pre)"
    norm = getattr(model, "norm", None)
    if not isinstance(norm, (nn.LayerNorm, nn.Identity, type(None))):
        yield f"the final norm {norm}"
    yield from dict.fromkeys(feature for block in model.blocks for feature in _unsupported_in_block(block))


def _unsupported_in_block(block: nn.Module) -> Iterator[str]:
    if type(block) not in (vision_transformer.Block, vision_transformer_sam.Block):
        yield f"blocks of type {type(block).__name__}"
        return
    attn, mlp = block.attn, block.mlp
    if type(attn) not in (Attention, vision_transformer_sam.Attention):
        yield f"attention of type {type(attn).__name__}"
        return
    if type(mlp) is not Mlp:
        yield f"an MLP of type {type(mlp).__name__}"
    elif type(mlp.act) is not nn.GELU or mlp.act.approximate != "none" or not _is_identity(mlp.norm):
        yield f"an MLP with {type(mlp.act).__name__} and {type(mlp.norm).__name__}"
    if not _is_identity(block.ls1) or not _is_identity(block.ls2):
        yield "LayerScale"
    if not _is_identity(attn.q_norm) or not _is_identity(attn.k_norm):
        yield "qk-norm"
    if not _is_identity(getattr(attn, "norm", None)):
        yield "a norm inside attention"
    if getattr(attn, "gate", None) is not None:
        yield "gated attention"
    if attn.num_heads * attn.head_dim != attn.qkv.in_features or attn.proj.bias is None:
        yield "its attention widths or biases"
    for norm in (block.norm1, block.norm2):
        if type(norm) not in (nn.LayerNorm, LayerNorm) or norm.eps != block.norm1.eps:
            yield f"the block norm {norm}"


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)
