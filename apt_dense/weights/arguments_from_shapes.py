"""The arguments of ``APTViT`` that the names and shapes of its weights tell. All state dicts here have our names."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from apt_dense.weights.convert import problems
from apt_dense.weights.formats import StateDict
from apt_dense.weights.resize import Grid, prefix_counts, split_prefix

_INIT_VALUES = 1e-5  # where LayerScale would start; the weights replace it
_BLOCK = re.compile(r"blocks\.(\d+)\.")
#: EVA-02's rotary tables: one row per cell of a window or of the image.
_TABLE_OF_CELLS = re.compile(r"(.*\.)?rope(_win|_glb)?\.freqs_cos$")
_TABLE_OF_BLOCK = re.compile(r"blocks\.(\d+)\.attn\.rope\.freqs_cos$")


def check_whole(state: StateDict) -> None:
    """Raise ValueError if a state dict is not that of a whole ViT, alike in all blocks."""
    count = len(_numbers(_BLOCK, state))
    if any(int(found[1]) >= count for name in state if (found := _BLOCK.match(name))):
        raise ValueError(f"the checkpoint is not a whole ViT: of its {count} blocks, some before the last are missing")
    missing, unexpected = problems(state)
    parts = [
        f"{word} {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for word, names in (("it lacks", missing), ("no known ViT has", unexpected))
        if names
    ]
    if parts:
        raise ValueError(f"the checkpoint is not a whole ViT: {'; '.join(parts)}")
    shape = tuple(state["patch_embed.proj.weight"].shape)
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(f"patch_embed.proj.weight is {shape}; expected (channels, image channels, pixels, pixels)")


def _numbers(pattern: re.Pattern, state: Mapping[str, Any]) -> list[int]:
    """The numbers of the blocks in names of a pattern, ascending."""
    return sorted({int(found[1]) for name in state if (found := pattern.match(name))})


def frame_arguments(state: StateDict) -> dict[str, Any]:
    """Arguments for what is around the blocks, and their number."""
    width, channels, _, patch_size = state["patch_embed.proj.weight"].shape
    return {
        "embed_dim": width,
        "in_chans": channels,
        "patch_size": patch_size,
        "depth": len(_numbers(_BLOCK, state)),
        "patch_bias": "patch_embed.proj.bias" in state,
        "embed_norm": "patch_embed.norm.weight" in state,
        "class_token": "cls_token" in state,
        "reg_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0,
        "pre_norm": "norm_pre.weight" in state,
        "final_norm": "norm.weight" in state,
        "residual_block_indexes": tuple(_numbers(re.compile(r"blocks\.(\d+)\.residual\."), state)),
        "use_rel_pos": "blocks.0.attn.rel_pos_h" in state,
    }


def block_arguments(state: StateDict) -> dict[str, Any]:
    """Arguments for the blocks."""
    has = {name.removeprefix("blocks.0.") for name in state}
    width, hidden = state["blocks.0.mlp.fc2.weight"].shape
    q_bias = not has.isdisjoint(("attn.qkv.bias", "attn.q_bias", "attn.q_proj.bias"))
    k_bias = not has.isdisjoint(("attn.qkv.bias", "attn.k_proj.bias"))
    return {
        "mlp_ratio": hidden / width,
        "mlp_layer": _mlp_layer(state, hidden),
        "qkv_fused": "attn.qkv.weight" in has,
        "qkv_bias": q_bias,
        "k_bias": k_bias or not q_bias,
        "qk_norm": "attn.q_norm.weight" in has,
        "proj_bias": "attn.proj.bias" in has,
        "init_values": _INIT_VALUES if "ls1.gamma" in has else None,
        "scale_attn_norm": "attn.norm.weight" in has,
        "scale_mlp_norm": "mlp.norm.weight" in has,
        "norm_layer": "layernorm" if "norm1.bias" in has else "rmsnorm",
    }


def _mlp_layer(state: StateDict, hidden: int) -> str:
    first = state.get("blocks.0.mlp.fc1.weight")
    if first is None:
        return "swiglu"
    return "swiglu_packed" if len(first) == 2 * hidden else "mlp"


def position_arguments(state: StateDict, grid: Grid | None) -> tuple[dict[str, Any], Grid | None]:
    """Arguments for absolute positions, and the rows and columns of their grid; None if there are none.

    Raises:
        ValueError: if prefix and grid cannot be told apart; see ``resize.split_prefix``.
    """
    if "pos_embed" not in state:
        return {"use_abs_pos": False, "no_embed_class": False, "pretrain_use_cls_token": False}, None
    counts = prefix_counts(state)
    prefix, cells = split_prefix(state["pos_embed"], counts, grid)
    tokens = counts[-1] if {"cls_token", "reg_token"} & state.keys() else 0
    return {
        "use_abs_pos": True,
        # Next to registers, a position of the class token alone goes into that token as it is loaded.
        "no_embed_class": prefix.shape[1] < tokens,
        "pretrain_use_cls_token": not tokens and prefix.shape[1] == 1,
    }, tuple(cells.shape[1:3])


def num_heads(state: StateDict, width: int) -> int | None:
    """The number of heads, where the shape of a weight or table shows the channels of one."""
    dims = set()
    for name, value in state.items():
        if name.endswith(("attn.rel_pos_h", "attn.q_norm.weight")):
            dims.add(value.shape[-1])
        elif _TABLE_OF_CELLS.match(name) and value.ndim == 2:
            dims.add(value.shape[1])
        elif name == "rope_embed.periods" and value.ndim == 1:  # DINOv3's: a quarter of the channels
            dims.add(4 * len(value))
    whole = [dim for dim in dims if 0 < dim < width and width % dim == 0]
    return width // whole[0] if len(whole) == 1 else None


# ---- windows


def window_arguments(
    state: StateDict, tables: Mapping[str, Tensor], class_position: bool
) -> tuple[dict[str, Any] | None, Grid | None]:
    """Arguments for windows, None where a detector's ViT may have some that nothing shows, and the rows and columns of
    the image that blocks without windows attend over, if anything shows them.

    Args:
        tables: what is in the file next to the weights.
        class_position: whether there are positions for a class token and no such token, as in detectors.

    Raises:
        ValueError: if blocks attend over areas of more than two sizes.
    """
    if "blocks.0.attn.rel_pos_h" in state:
        positions = state.get("pos_embed")
        whole = tuple(positions.shape[1:3]) if positions is not None and positions.ndim == 4 else None
        return _windows_of(_relative_sizes(state), whole)
    sizes = {block: _rows_and_columns(table) for block, table in _block_tables(tables).items() if table.ndim == 2}
    if "rope_win.freqs_cos" in tables and len(sizes) == len(_numbers(_BLOCK, state)):
        return _windows_of(sizes, None)
    detector = class_position or "rope_win.freqs_cos" in tables or any(".residual." in name for name in state)
    return (None if detector else {}), None


def _windows_of(sizes: Mapping[int, Grid], image: Grid | None) -> tuple[dict[str, Any] | None, Grid | None]:
    """Windows, and the image, from the rows and columns that each block attends over and those of the image, if they
    are known."""
    # Windows are squares, so a rectangle is the image, and may be the smaller one.
    kinds = sorted({*sizes.values()} - {image}, key=lambda size: (size[0] != size[1], math.prod(size)))
    if not kinds:
        return {}, image
    if image is None:
        image = kinds.pop()
    if not kinds:  # of one size: that of the image, or that of windows in all blocks
        return None, image
    window = kinds[0]
    if len(kinds) > 1 or window[0] != window[1]:
        raise ValueError(
            f"blocks attend over {image} and {kinds} rows and columns of patches; expected the image and square "
            f"windows of one size"
        )
    inside = tuple(sorted(block for block, size in sizes.items() if size == window))
    return {"window_size": window[0], "window_block_indexes": inside}, image


def _relative_sizes(state: StateDict) -> dict[int, Grid]:
    """Rows and columns of the relative positions of each block."""
    blocks = _numbers(re.compile(r"blocks\.(\d+)\.attn\.rel_pos_h$"), state)
    return {i: tuple((len(state[f"blocks.{i}.attn.rel_pos_{axis}"]) + 1) // 2 for axis in "hw") for i in blocks}


def _block_tables(tables: Mapping[str, Tensor]) -> dict[int, Tensor]:
    return {int(found[1]): table for name, table in tables.items() if (found := _TABLE_OF_BLOCK.match(name))}


def _rows_and_columns(table: Tensor) -> Grid:
    """Rows and columns of cells that a rotary table has a row for each of: the angles in the first half of its channels
    stay the same along a row of cells. A table without such a change tells its square alone."""
    first, side = table[:, : table.shape[1] // 2], math.isqrt(len(table))
    changes = (first != first[:1]).any(dim=1).nonzero().flatten().tolist()
    columns = changes[0] if changes else side
    if columns and len(table) % columns == 0 and (changes or side**2 == len(table)):
        return len(table) // columns, columns
    raise ValueError(f"a rotary table of {len(table)} rows is not that of a grid of cells")
