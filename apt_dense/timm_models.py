"""timm's plain ViTs: which ``APTViT`` arguments rebuild a model, and a refusal of everything that has none."""

import difflib
from collections.abc import Iterator
from typing import Any

import timm
from timm.layers import Attention, LayerNorm, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn


def create_timm_model(name: str, pretrained: bool, img_size: int | tuple[int, int] | None) -> nn.Module:
    """``timm.create_model`` without a classification head.

    Raises:
        ValueError: for a name timm does not know, with the closest ones.
    """
    if not timm.is_model(name.split(".")[0]):
        alike = difflib.get_close_matches(name.split(".")[0], timm.list_models("*vit*"), 3)
        raise ValueError(f"timm has no model {name!r}; did you mean one of {alike}? timm.list_models('*vit*') lists all")
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
            f"ViTs with learned absolute positions: AugReg, DeiT (not distilled), MAE"
        )
    block = model.blocks[0]
    config = model.pretrained_cfg or {}
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
        "class_token": model.has_class_token,
        "no_embed_class": model.no_embed_class,
        "norm_eps": block.norm1.eps,
        "final_norm": isinstance(model.norm, nn.LayerNorm),
        **pixels,
    }


def _name(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _unsupported(model: nn.Module) -> Iterator[str]:
    """Names of the features of a timm model that ``APTViT`` cannot reproduce."""
    if type(model) is not VisionTransformer:
        yield f"the architecture {type(model).__name__}"
        return
    if type(model.patch_embed) is not PatchEmbed or not isinstance(model.patch_embed.norm, nn.Identity):
        yield "its patch embedding"
    elif model.patch_embed.patch_size[0] != model.patch_embed.patch_size[1]:
        yield f"patches of {model.patch_embed.patch_size} pixels, which are not square"
    if model.reg_token is not None:
        yield "register tokens"
    if model.pos_embed is None:
        yield "the lack of absolute positions"
    if not isinstance(model.norm_pre, nn.Identity):
        yield "pre-norm (norm_pre)"
    if not isinstance(model.norm, (nn.LayerNorm, nn.Identity)):
        yield f"the final norm {type(model.norm).__name__}"
    blocks: dict[str, None] = {}
    for block in model.blocks:
        blocks.update(dict.fromkeys(_unsupported_in_block(block)))
    yield from blocks


def _unsupported_in_block(block: nn.Module) -> Iterator[str]:
    if type(block) is not Block:
        yield f"blocks of type {type(block).__name__}"
        return
    attn, mlp = block.attn, block.mlp
    if type(attn) is not Attention:
        yield f"attention of type {type(attn).__name__}"
        return
    if type(mlp) is not Mlp:
        yield f"an MLP of type {type(mlp).__name__}"
    elif type(mlp.act) is not nn.GELU or mlp.act.approximate != "none" or not isinstance(mlp.norm, nn.Identity):
        yield f"an MLP with {type(mlp.act).__name__} and {type(mlp.norm).__name__}"
    if not isinstance(block.ls1, nn.Identity) or not isinstance(block.ls2, nn.Identity):
        yield "LayerScale"
    if not isinstance(attn.q_norm, nn.Identity) or not isinstance(attn.k_norm, nn.Identity):
        yield "qk-norm"
    if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        yield "a norm inside attention"
    if getattr(attn, "gate", None) is not None:
        yield "gated attention"
    if attn.num_heads * attn.head_dim != attn.qkv.in_features or attn.proj.bias is None:
        yield "its attention widths or biases"
    if type(block.norm1) not in (nn.LayerNorm, LayerNorm):
        yield f"the block norm {type(block.norm1).__name__}"
