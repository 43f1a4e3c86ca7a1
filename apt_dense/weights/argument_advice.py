"""Which arguments of a model to change so that a checkpoint fits."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from apt_dense.weights.arguments_from_file import told_by
from apt_dense.weights.arguments_in_own_metadata import options_of
from apt_dense.weights.formats import OURS, StateDict
from apt_dense.weights.resize import Grid

#: Arguments that change no parameter, or whose parameters are resampled.
_NEVER = {
    "img_size", "pretrain_img_size", "window_size", "window_block_indexes", "norm_eps", "act_layer", "rotary"
}  # fmt: skip


def advice(state: StateDict, model: nn.Module, resize_patches: bool = False, grid: Grid | None = None) -> str:
    """Name the arguments of an ``APTViT`` that keep a state dict from fitting, with both values: "set init_values=1e-05
    (now None)". "" if there is none, or the state dict is not that of a whole ViT.

    Args:
        state: with our names, without tables that the model has no use for.
        resize_patches: whether patches of another size are resampled.
        grid: rows and columns of its positions, if they are known.
    """
    try:
        told = told_by({name: value for name, value in state.items() if OURS.match(name)}, grid=grid).arguments
    except (ValueError, LookupError):
        return ""
    own = options_of(model)
    differing = [name for name in told if told[name] != own[name] and name not in _NEVER]
    differing = [name for name in differing if _matters(name, told, own, model)]
    if resize_patches and "patch_size" in differing:
        differing.remove("patch_size")
    return (
        "set " + " and ".join(f"{name}={told[name]!r} (now {own[name]!r})" for name in differing) if differing else ""
    )


def _matters(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], model: nn.Module) -> bool:
    """Check whether a difference keeps weights from fitting. Some parts may be left out, added or folded."""
    match name:
        case "class_token" | "final_norm":
            return ours[name]
        case "use_rel_pos":
            return theirs[name]
        case "pretrain_use_cls_token":
            return ours[name] and not theirs["class_token"]
        case "no_embed_class":
            return model.num_prefix > 0 if theirs[name] else theirs["class_token"] + theirs["reg_tokens"] > 1
        case "init_values":
            return None in (theirs[name], ours[name])
        case "depth":
            return not len(model.blocks) <= theirs[name] <= ours[name]
        case "mlp_ratio":
            return round(model.embed_dim * theirs[name]) != int(model.embed_dim * ours[name] + 1e-6)
        case "k_bias":
            return theirs["qkv_bias"]
        case _:
            return True
