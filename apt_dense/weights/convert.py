"""Conversions: the state dict of a backbone in one project's form -> in another's. Pure functions on dictionaries of
tensors; ours is the form in between. Weights are renamed and positions rearranged, and none changes its value, so that
there and back gives the same bits.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from apt_dense.weights.formats import (
    FORMATS,
    NOT_BACKBONE,
    StateDict,
    is_table,
    rename,
    translate,
    translate_back,
    without_key_biases,
)

_LAYER = r"\.(weight|bias)$"
_PLAIN_BLOCK = rf"(norm[12]|attn\.(qkv|proj)|mlp\.fc[12]){_LAYER}"
_VIT_BLOCK = (
    rf"{_PLAIN_BLOCK}|(attn\.([qkv]_proj|norm|[qk]_norm)|mlp\.(fc1_[gx]|norm)){_LAYER}|attn\.[qv]_bias$|ls[12]\.gamma$"
)
_EVA02_BLOCK = rf"(norm[12]|attn\.([qv]_proj|proj)|mlp\.(fc1_[gx]|norm|fc2)){_LAYER}|attn\.k_proj\.weight$"
_REL_POS = r"attn\.rel_pos_[hw]$"
_RESIDUAL = rf"residual\.(conv|norm)[123]{_LAYER}"


def _names(block: str, *others: str) -> re.Pattern:
    """The names of a backbone whose blocks and other parts are those."""
    return re.compile("|".join([rf"patch_embed\.proj{_LAYER}|pos_embed$", rf"blocks\.\d+\.({block})", *others]))


_OURS = _names(
    rf"{_VIT_BLOCK}|{_REL_POS}|{_RESIDUAL}",
    r"cls_token$|reg_token$", rf"norm(_pre)?{_LAYER}", rf"coarse_embed\.(down|zero){_LAYER}",
)  # fmt: skip
_TIMM = _names(_VIT_BLOCK, r"cls_token$|reg_token$", rf"norm(_pre)?{_LAYER}")


class Target(NamedTuple):
    """What a project's ViT has a place for, in our names."""

    names: re.Pattern
    class_position: bool = False  # pos_embed has a place for a class position, also without a class token
    class_token: bool = False  # there is a class token, also where none runs along
    leaves_out: str = r"(?!)"  # what its users do without


_NO_CLASS = rf"cls_token$|norm{_LAYER}"
TARGETS = {
    "apt": Target(_OURS),
    "timm": Target(_TIMM),
    "timm_eva": Target(_TIMM),
    "mmseg": Target(_names(_PLAIN_BLOCK, "cls_token$", rf"norm(_pre)?{_LAYER}"), True, True),
    "detectron2": Target(_names(rf"{_PLAIN_BLOCK}|{_REL_POS}|{_RESIDUAL}"), True, leaves_out=_NO_CLASS),
    "sam": Target(_names(rf"{_PLAIN_BLOCK}|{_REL_POS}"), leaves_out=_NO_CLASS),
    "eva02_det": Target(_names(rf"{_EVA02_BLOCK}|{_RESIDUAL}"), True, leaves_out=_NO_CLASS),
}


class Converted(NamedTuple):
    """A state dict in another form, our names of what it lacks, and their names of zeros that it needed."""

    state: StateDict
    left_out: list[str]
    added: list[str]


def to_apt(state: StateDict, source: str | None = None) -> StateDict:
    """The state dict of a backbone with our names and shapes of positions; unknown names stay.

    Args:
        source: one of ``FORMATS``; None takes the names of all.

    Raises:
        ValueError: if two names of one weight hold different values.
    """
    if source not in (None, *FORMATS):
        raise ValueError(f"unknown format {source!r}; expected one of {', '.join(FORMATS)}")
    renamed: StateDict = {}
    for name, value in state.items():
        ours = rename(name, state) if source is None else translate_back(name, FORMATS[source].table)
        if ours in renamed and not torch.equal(renamed[ours], value):
            raise ValueError(f"the checkpoint holds two different values of {ours}, one of them as {name}")
        renamed[ours] = value
    if "pos_embed" in renamed and renamed["pos_embed"].ndim == 4:  # SAM keeps a grid (1, h, w, C)
        renamed["pos_embed"] = renamed["pos_embed"].flatten(1, 2)
    return renamed


def split_backbone(state: StateDict) -> tuple[StateDict, list[str]]:
    """A state dict with our names -> its backbone's part, and the names of heads and tables that are none.

    DINOv3's biases become those of queries and values, as in a model with ``k_bias=False``.
    """
    masked = {name.removesuffix("qkv.bias_mask") + "q_bias" for name in state if name.endswith("qkv.bias_mask")}
    state = without_key_biases(state, masked)
    others = [name for name, value in state.items() if NOT_BACKBONE.match(name) or _is_rotary_table(name, value)]
    return {name: value for name, value in state.items() if name not in others}, others


def _is_rotary_table(name: str, value: Tensor) -> bool:
    return is_table(name, value) and not _OURS.match(name)


def problems(state: StateDict) -> tuple[list[str], list[str]]:
    """Of a state dict with our names: those that a backbone must have besides, and those that none has."""
    unexpected = [name for name in state if not _OURS.match(name)]
    blocks: dict[int, set[str]] = {}
    for name in state:
        found = re.match(r"blocks\.(\d+)\.(.*)", name)
        if found and name not in unexpected and not found[2].startswith("residual."):
            blocks.setdefault(int(found[1]), set()).add(found[2])
    return list(_missing(state, blocks)), unexpected


def _missing(state: StateDict, blocks: dict[int, set[str]]) -> Iterator[str]:
    if "patch_embed.proj.weight" not in state:
        yield "patch_embed.proj.weight"
    of_all = {"norm1.weight", "attn.proj.weight", "norm2.weight", "mlp.fc2.weight"}.union(*blocks.values())
    for index in range(max(blocks, default=0) + 1):
        yield from (f"blocks.{index}.{name}" for name in sorted(of_all - blocks.get(index, set())))


def from_apt(
    state: StateDict, target: str, drop_coarse: bool = False, grid: tuple[int, int] | None = None
) -> Converted:
    """A state dict with our names in the form of one of ``TARGETS``.

    "timm" is VisionTransformer or Eva, as the names suggest; an Eva with absolute positions, LayerScale and one bias
    for queries, keys and values looks like a VisionTransformer and needs "timm_eva".

    Detectron2's, EVA-02's and MMSeg's positions get one of zero for a class token where ours have none; theirs is not
    read then. Detectors and SAM have neither class token nor final norm, which are left out.

    Args:
        drop_coarse: leave out a trained ``coarse_embed``, for which no other project has a place. One that still is
            neutral is left out anyway.
        grid: rows and columns of ``pos_embed``; None for a square.

    Raises:
        ValueError: for an unknown target, a weight that has no place there, or positions that are no grid.
    """
    if target not in TARGETS:
        raise ValueError(f"cannot write the format {target!r}; expected one of {', '.join(TARGETS)}")
    goal = TARGETS[target]
    left_out = [name for name in state if re.match(goal.leaves_out, name)]
    if target != "apt":
        left_out += _coarse_to_leave_out(state, target, drop_coarse)
    kept = {name: value for name, value in state.items() if name not in left_out}
    strange = [name for name in kept if not goal.names.match(name)]
    if strange:
        raise ValueError(
            f"{FORMATS[target].title} has no place for {len(strange)} weights: {', '.join(strange[:4])}"
            f"{', ...' if len(strange) > 4 else ''}"
        )
    has_class = "pos_embed" in kept and _has_class_position(state, grid)
    kept, added = _add_class(kept, goal, has_class)
    if target == "sam" and "pos_embed" in kept:
        kept["pos_embed"] = _as_grid(kept["pos_embed"], has_class, grid)
    table = FORMATS[_timm_class(state) if target == "timm" else target].table
    return Converted({translate(name, table): value for name, value in kept.items()}, left_out, added)


def _coarse_to_leave_out(state: StateDict, target: str, drop_coarse: bool) -> list[str]:
    coarse = [name for name in state if name.startswith("coarse_embed.")]
    trained = [name for name in coarse if name.startswith("coarse_embed.zero.") and state[name].any()]
    if trained and not drop_coarse:
        raise ValueError(
            f"{FORMATS[target].title} has no place for {trained[0]}, which was trained for coarse patches and is not "
            f"zero; drop_coarse=True (--drop-coarse) writes the model without it"
        )
    return coarse


def _timm_class(state: StateDict) -> str:
    """timm's Eva and VisionTransformer differ in a name; only an Eva does without positions or a bias of keys."""
    eva = re.compile(r"blocks\.\d+\.(attn\.([qkv]_proj|[qv]_bias)|mlp\.fc1_g)")
    return "timm_eva" if "pos_embed" not in state or any(eva.match(name) for name in state) else "timm"


def _add_class(kept: StateDict, goal: Target, has_class_position: bool) -> tuple[StateDict, list[str]]:
    """Class token and class position as zeros where the target wants what ours have not."""
    kept, added = dict(kept), []
    if goal.class_token and "cls_token" not in kept:
        weight = kept["patch_embed.proj.weight"]
        kept["cls_token"] = weight.new_zeros(1, 1, len(weight))
        added.append("cls_token")
    if goal.class_position and "pos_embed" in kept and not has_class_position:
        positions = kept["pos_embed"]
        kept["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
        added.append("pos_embed[:, 0]")
    return kept, added


def _has_class_position(state: StateDict, grid: tuple[int, int] | None) -> bool:
    """Whether ``pos_embed`` begins with the position of a class token. Without a grid, told by what is a square."""
    length = state["pos_embed"].shape[1]
    if grid is not None:
        return length > math.prod(grid)
    if math.isqrt(length) ** 2 == length:
        return False
    return math.isqrt(length - 1) ** 2 == length - 1 or "cls_token" in state


def _as_grid(pos_embed: Tensor, has_class: bool, grid: tuple[int, int] | None) -> Tensor:
    """Positions (1, P + n, C) -> (1, rows, columns, C)."""
    positions = pos_embed[:, int(has_class) :]
    grid = grid or (math.isqrt(positions.shape[1]),) * 2
    if math.prod(grid) != positions.shape[1]:
        raise ValueError(f"pos_embed of shape {tuple(pos_embed.shape)} is no grid of {grid}; say of which image size")
    return positions.unflatten(1, grid)
