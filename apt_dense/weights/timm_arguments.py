"""Rebuild timm's plain ViTs, EVAs and SAM's image encoder: the ``APTViT`` arguments of a model, or an error that names
each feature without one."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import eva, vision_transformer, vision_transformer_sam
from torch import Tensor, nn

from apt_dense.option_checks import defaults_of
from apt_dense.options import BlockOptions, ModelOptions, PositionOptions
from apt_dense.weights.resize import note_grid
from apt_dense.weights.timm_block_arguments import (
    block_arguments,
    is_identity,
    norms_of_block,
    rotary_arguments,
    unsupported_in_block,
    unsupported_in_rotary,
    unsupported_norms,
)

_ARCHITECTURES = vision_transformer.VisionTransformer, eva.Eva, vision_transformer_sam.VisionTransformerSAM
#: Arguments that ``apt_arguments`` leaves out where a model has these values, ...
_OPTIONAL = "embed_norm", "reg_tokens", "pre_norm", "rotary", "use_abs_pos"
_USUAL = defaults_of(BlockOptions) | {
    name: value for name, value in defaults_of(ModelOptions, PositionOptions).items() if name in _OPTIONAL
}
#: ... except for those that tell families of models apart.
_ALWAYS = "mlp_ratio", "qkv_bias", "norm_eps"


def create_timm_model(
    name: str, pretrained: bool, img_size: int | tuple[int, int] | None, patch_size: int | None = None
) -> nn.Module:
    """Create a timm model without a classification head.

    Args:
        img_size: pixels, or (H, W); None takes the model's own. timm resamples positions to it.
        patch_size: pixels; None takes the model's own. timm resamples the patch embedding to it.

    Raises:
        ValueError: for a name timm does not know, with the closest ones.
    """
    if not timm.is_model(name.split(".")[0]):
        alike = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3)
        hint = f"did you mean one of {alike}? " if alike else ""
        raise ValueError(f"timm has no model {name!r}; {hint}timm.list_models() lists all")
    sizes = {"img_size": img_size, "patch_size": patch_size}
    sizes = {option: size for option, size in sizes.items() if size is not None}
    return timm.create_model(name, pretrained=pretrained, num_classes=0, **sizes)


def timm_model_without_weights(name: str, **sizes: Any) -> nn.Module:
    """A timm model on the meta device, whose arguments and shapes can be looked at before anything is loaded. Arguments
    and errors as for :func:`create_timm_model`."""
    with torch.device("meta"):
        return create_timm_model(name, False, sizes.pop("img_size", None), **sizes)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a timm model, with a note of the grid of its positions."""
    state, grid = model.state_dict(), getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is not None:
        note_grid(state, "", grid)
    return state


def apt_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the keyword arguments of ``APTViT`` that rebuild a timm ViT.

    Raises:
        ValueError: if the model has features that ``APTViT`` lacks, naming all of them. Leaving one out would silently
            give wrong features.
    """
    features = list(_unsupported(model))
    if features:
        raise ValueError(
            f"APTViT does not support {', '.join(features)} of timm's {_name(model)}. Supported are pre-norm ViTs of "
            f"timm's VisionTransformer and Eva (AugReg, DeiT without distillation, DeiT-3, MAE, CLIP, SigLIP, DINOv2, "
            f"EVA-02, DINOv3, PE, AIMv2) and SAM's image encoder"
        )
    sam = isinstance(model, vision_transformer_sam.VisionTransformerSAM)
    arguments = {**_common_arguments(model), **(_sam_arguments(model) if sam else _token_arguments(model))}
    return {k: v for k, v in arguments.items() if k in _ALWAYS or k not in _USUAL or v != _USUAL[k]}


def _common_arguments(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "pretrained_cfg", None) or {}
    pixels = {f"pixel_{k}": tuple(255 * v for v in config[k]) for k in ("mean", "std") if k in config}
    return {
        "img_size": model.patch_embed.img_size,
        "patch_size": model.patch_embed.patch_size[0],
        "in_chans": model.patch_embed.proj.in_channels,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        **block_arguments(model.blocks[0]),
        "patch_bias": model.patch_embed.proj.bias is not None,
        "embed_norm": not is_identity(model.patch_embed.norm),
        "use_abs_pos": model.pos_embed is not None,
        "pre_norm": not is_identity(model.norm_pre),
        **pixels,
    }


def _token_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the arguments for what SAM's encoder lacks: prefix tokens, a final norm, rotary positions."""
    rotate_half = getattr(model.blocks[0].attn, "rotate_half", False)
    return {
        "class_token": model.cls_token is not None,
        "reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "no_embed_class": model.no_embed_class,
        "rotary": rotary_arguments(getattr(model, "rope", None), rotate_half),
        "final_norm": not is_identity(model.norm),
    }


def _sam_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the arguments for the trunk of SAM's image encoder; its neck is not part of the backbone."""
    windows = {i: block.window_size for i, block in enumerate(model.blocks) if block.window_size}
    return {
        "window_size": max(windows.values(), default=0),
        "window_block_indexes": tuple(windows),
        "use_rel_pos": model.blocks[0].attn.use_rel_pos,
    }


def _name(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _unsupported(model: nn.Module) -> Iterator[str]:
    """Name the features of a timm model that ``APTViT`` cannot reproduce."""
    if type(model) not in _ARCHITECTURES:
        yield f"the architecture {type(model).__name__}"
        return
    if type(model.patch_embed) is not PatchEmbed:
        yield "its patch embedding"
    elif model.patch_embed.patch_size[0] != model.patch_embed.patch_size[1]:
        yield f"patches of {model.patch_embed.patch_size} pixels, which are not square"
    if getattr(model, "rope_global", None) is not None:
        yield "rotary positions of SAM's encoder"
    yield from unsupported_in_rotary(getattr(model, "rope", None))
    in_blocks = dict.fromkeys(feature for block in model.blocks for feature in unsupported_in_block(block))
    yield from in_blocks or _unsupported_norms(model) or _differences(model.blocks)


def _unsupported_norms(model: nn.Module) -> dict[str, None]:
    """Name the norms of an unknown kind or unlike the others, each once."""
    norms = [norm for block in model.blocks for norm in norms_of_block(block)]
    norms += [getattr(model.patch_embed, "norm", None), model.norm_pre, getattr(model, "norm", None)]
    return dict.fromkeys(unsupported_norms(norms, model.blocks[0].norm1))


def _differences(blocks: Iterable[nn.Module]) -> Iterator[str]:
    """Name the arguments in which blocks differ that are each supported."""
    arguments = [block_arguments(block) for block in blocks]
    for each in arguments:
        each["LayerScale"] = each.pop("init_values") is not None
    names = [name for name in arguments[0] if any(each[name] != arguments[0][name] for each in arguments)]
    if names:
        yield f"blocks that differ in {', '.join(names)}"
