"""Convert the state dict of a backbone between projects. Pure functions on dictionaries of tensors; our form is the one
in between. Weights are renamed and positions rearranged without changing a value, so that there and back gives the same
bits.
"""

import re
from collections.abc import Container, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from apt_dense.weights.formats import (
    FORMATS,
    NOT_BACKBONE,
    OURS,
    WRITABLE,
    Place,
    StateDict,
    is_table,
    rename,
    translate,
    translate_back,
)
from apt_dense.weights.parameter_rules import COARSE, is_new
from apt_dense.weights.resize import Grid, join_prefix, noted_grid, prefix_counts, source_grid, split_prefix
from apt_dense.weights.tensor_checks import check_kinds, check_names

_DIGITS = 6  # of the number of a block, at most


class Converted(NamedTuple):
    """A state dict in another form."""

    state: StateDict
    left_out: list[str]  # weights that the target cannot hold, by our names
    added: list[str]  # zeros that it requires, by our names


def to_apt(state: StateDict, source: str | None = None) -> StateDict:
    """Rename the weights of a backbone to our names; unknown names stay.

    Positions that have the shape of a grid (1, rows, columns, C), as SAM's have, keep it, since nothing else says what
    grid they are of. ``load_backbone`` and ``from_apt`` take them as they are.

    Args:
        source: one of ``FORMATS``; None takes the names of all.

    Raises:
        ValueError: if two names of one weight hold different values, or one is no dense tensor of real numbers, or
            positions have other axes than the project's.
    """
    if source not in (None, *FORMATS):
        raise ValueError(f"unknown format {source!r}; expected one of {', '.join(FORMATS)}")
    renamed: StateDict = {}
    check_names(state)
    for name, value in state.items():
        value = _with_axes(name, value)
        ours = rename(name, state) if source is None else translate_back(name, FORMATS[source].table)
        if ours in renamed and not torch.equal(renamed[ours], value):
            raise ValueError(f"the checkpoint holds two different values of {ours}, one of them as {name}")
        renamed[ours] = value
    check_kinds(renamed)
    _check_channels(renamed)
    renamed = _join_projections(renamed)
    if "dist_token" in renamed:
        raise ValueError(
            "the checkpoint is of a distilled DeiT: its dist_token, an extra token with a position, has no place of "
            "that name. Take the DeiT without distillation, or rename dist_token to reg_token and set reg_tokens=1"
        )
    return renamed


def _check_channels(state: StateDict) -> None:
    """Raise ValueError for positions whose last axis is not that of channels, such as (1, channels, rows, columns)."""
    positions, patches = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if positions is None or patches is None or positions.ndim not in (3, 4):
        return
    if positions.shape[-1] != len(patches):
        raise ValueError(
            f"the checkpoint's pos_embed is {tuple(positions.shape)}, but its patch embedding has {len(patches)} "
            f"channels; expected (1, positions, {len(patches)}) or (1, rows, columns, {len(patches)})"
        )


def _join_projections(state: StateDict) -> StateDict:
    """Join the projections that transformers has for queries, keys and values, where there are all three."""
    joined = {}
    for name, value in state.items():
        parts = [name.replace(".attn.query.", f".attn.{part}.") for part in ("query", "key", "value")]
        if ".attn.query." in name and all(part in state for part in parts):
            joined[name.replace(".attn.query.", ".attn.qkv.")] = torch.cat([state[part] for part in parts])
        else:
            joined[name] = value
    whole = [name for name in joined if ".attn.qkv." in name]
    used = {name.replace(".qkv.", f".{part}.") for name in whole for part in ("key", "value")}
    return {name: value for name, value in joined.items() if name not in used}


def _with_axes(name: str, value: Tensor) -> Tensor:
    """Give a class token (C) and positions (N, C), as CLIP has them, the axes that those of others have."""
    if name.endswith("class_embedding") and value.ndim == 1:
        return value[None, None]
    if name.endswith(("positional_embedding", "position_embedding.weight")) and value.ndim == 2:
        return value[None]
    return value


def split_backbone(state: StateDict) -> tuple[StateDict, list[str]]:
    """Split a state dict with our names into the backbone's part and the names of heads and tables.

    DINOv3's biases become those of queries and values, as in a model with ``k_bias=False``.
    """
    masked = {name.removesuffix("qkv.bias_mask") + "q_bias" for name in state if name.endswith("qkv.bias_mask")}
    state = without_key_biases(state, masked)
    others = {name: None for name, value in state.items() if NOT_BACKBONE.match(name) or _is_foreign_table(name, value)}
    return {name: value for name, value in state.items() if name not in others}, list(others)


def _is_foreign_table(name: str, value: Tensor) -> bool:
    return is_table(name, value) and not OURS.match(name)


def without_key_biases(state: StateDict, targets: Container[str]) -> StateDict:
    """Split DINOv3's ``attn.qkv.bias`` into ``q_bias`` and ``v_bias``, for models whose keys have none.

    Only where ``targets`` has those names, and that of the keys is masked out by ``qkv.bias_mask`` or zero.
    """
    split = {}
    for name, value in state.items():
        attn = name.removesuffix("qkv.bias")
        if not name.endswith("attn.qkv.bias") or name in targets or attn + "q_bias" not in targets:
            split[name] = value
            continue
        q_bias, k_bias, v_bias = value.chunk(3)
        if attn + "qkv.bias_mask" in state or not k_bias.any():
            split |= {attn + "q_bias": q_bias, attn + "v_bias": v_bias}
        else:
            split[name] = value
    return split


def problems(state: StateDict) -> tuple[list[str], list[str]]:
    """List the names that a state dict with our names lacks to be a backbone, and those that no backbone has."""
    unexpected: list[str] = []
    blocks: dict[int, set[str]] = {}
    for name in state:
        found = re.match(r"blocks\.(\d+)\.(.*)", name)
        if not OURS.match(name) or (found and len(found[1]) > _DIGITS):
            unexpected.append(name)
        elif found and not found[2].startswith("residual."):
            blocks.setdefault(int(found[1]), set()).add(found[2])
    return list(_missing(state, blocks)), unexpected


def _missing(state: StateDict, blocks: dict[int, set[str]]) -> Iterator[str]:
    if "patch_embed.proj.weight" not in state:
        yield "patch_embed.proj.weight"
    required = {"norm1.weight", "attn.proj.weight", "norm2.weight", "mlp.fc2.weight"}.union(*blocks.values())
    for index in range(max(len(blocks), 1)):  # blocks of higher numbers leave one of these out
        yield from (f"blocks.{index}.{name}" for name in sorted(required - blocks.get(index, set())))


def from_apt(state: StateDict, target: str, drop_coarse: bool = False, grid: Grid | None = None) -> Converted:
    """Convert a state dict with our names to the form of one of ``WRITABLE``.

    "timm" is VisionTransformer or Eva, as the names suggest; an Eva with absolute positions, LayerScale and one bias
    for queries, keys and values looks like a VisionTransformer and needs "timm_eva".

    Detectron2's, EVA-02's and MMSeg's positions get a row of zeros for a class token where ours have none; it is not
    read then. Detectors and SAM have neither class token nor final norm, which are left out.

    Args:
        drop_coarse: leave out a trained ``coarse_embed``, for which no other project has a place. One that still is
            neutral is left out anyway.
        grid: rows and columns of ``pos_embed``; None takes those that the state dict says, or a square.

    Raises:
        ValueError: for an unknown target, a weight that has no place there, or positions whose grid the target needs
            and that cannot be told.
    """
    place = FORMATS[target].place if target in FORMATS else None
    if place is None:
        raise ValueError(f"cannot write the format {target!r}; expected one of {', '.join(WRITABLE)}")
    left_out = [name for name in state if re.match(place.leaves_out, name)]
    if target != "apt":
        left_out += _coarse_to_leave_out(state, target, drop_coarse)
    without = set(left_out)
    kept = {name: value for name, value in state.items() if name not in without}
    _check_places([name for name in kept if not place.names.match(name)], target)
    added = _add_class_token(kept, place)
    if "pos_embed" in kept:
        kept["pos_embed"], new = _place_positions(state, place, source_grid(state, grid, noted_grid(state)))
        added += new
    table = FORMATS[_timm_class(state) if target == "timm" else target].table
    return Converted({translate(name, table): value for name, value in kept.items()}, left_out, added)


def _check_places(strange: list[str], target: str) -> None:
    if strange:
        raise ValueError(
            f"{FORMATS[target].title} has no place for {len(strange)} weights: {', '.join(strange[:4])}"
            f"{', ...' if len(strange) > 4 else ''}"
        )


def _coarse_to_leave_out(state: StateDict, target: str, drop_coarse: bool) -> list[str]:
    coarse = [name for name in state if is_new(name)]
    trained = [name for name in coarse if name.startswith(f"{COARSE}zero.") and state[name].any()]
    if trained and not drop_coarse:
        raise ValueError(
            f"{FORMATS[target].title} has no place for {trained[0]}, which was trained for coarse patches and is not "
            f"zero; drop_coarse=True (--drop-coarse) writes the model without it"
        )
    return coarse


def _timm_class(state: StateDict) -> str:
    """Tell timm's Eva from its VisionTransformer: only an Eva lacks positions or a bias of keys."""
    eva = re.compile(r"blocks\.\d+\.(attn\.([qkv]_proj|[qv]_bias)|mlp\.fc1_g)")
    return "timm_eva" if "pos_embed" not in state or any(eva.match(name) for name in state) else "timm"


def _add_class_token(kept: StateDict, place: Place) -> list[str]:
    """Add a class token of zeros in place if the target requires one; return the name of what was added."""
    if not place.class_token or "cls_token" in kept:
        return []
    weight = kept["patch_embed.proj.weight"]
    kept["cls_token"] = weight.new_zeros(1, 1, len(weight))
    return ["cls_token"]


def _place_positions(state: StateDict, place: Place, grid: Grid | None) -> tuple[Tensor, list[str]]:
    """Bring positions into the shape that a target has for them, and name the rows of zeros that were added."""
    positions = state["pos_embed"]
    if not (place.position_grid or place.class_position):  # prefix and grid need not be told apart
        return (positions.flatten(1, 2) if positions.ndim == 4 else positions), []
    prefix, cells = split_prefix(positions, prefix_counts(state), grid)
    if place.position_grid:
        return cells, []
    if prefix.shape[1]:
        return positions, []
    return join_prefix(cells.new_zeros(1, 1, cells.shape[-1]), cells), ["pos_embed[:, 0]"]
