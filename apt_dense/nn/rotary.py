"""Rotary positions of tokens of any scale: each is rotated by the position of its centre.

A patch of scale s that begins at cell y covers the cells y ... y + 2**s - 1; its centre lies at y + (2**s - 1) / 2 in
units in which the cell i lies at i. So patches of scale 0 are rotated as the host rotates them.

Shape letters: N patches, R packed rows, H heads, D channels of a head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import apply_rot_embed_cat
from timm.layers.pos_embed_sincos import freq_bands
from torch import Tensor

from apt_dense.layout.packed import Cells, TokenLayout
from apt_dense.nn.layers import BlockOptions
from apt_dense.options import one_of, pair


class Rotary(NamedTuple):
    """How a model rotates queries and keys; names and values as in timm (``timm.models.eva.Eva``).

    In blocks with windows positions begin anew in each window, and the window takes the place of the grid below.
    """

    rope_type: str = "cat"  # "cat" counts cells (EVA-02, PE); "dinov3" places cell centres in [-1, 1] along each axis
    temperature: float = 10000.0  # of the frequencies temperature**(-4 i / D)
    ref_feat_shape: tuple[int, int] | None = None  # "cat": rows and columns that the grid is scaled to; None: it is not
    grid_offset: float = 0.0  # added to each cell's position
    grid_indexing: str = "ij"  # rows take the first half of the frequencies; "xy": columns do
    rotate_half: bool = False  # channel i is rotated with i + D / 2, else with its neighbour


@dataclass(frozen=True, eq=False)  # no tuple: torch.compile would guard the shape of every tensor in it
class RotaryTables:
    """Sines and then cosines for each row (R, 2 D); prefix rows are not rotated."""

    images: Tensor  # for blocks that attend over the image
    windows: Tensor | None  # for blocks with windows
    rotate_half: bool

    def rotate(self, x_RHD: Tensor, windowed: bool) -> Tensor:
        """Queries or keys (R, H, D) -> rotated ones, of the same type."""
        table = self.windows if windowed else self.images
        return apply_rot_embed_cat(x_RHD, table[:, None], half=self.rotate_half).to(x_RHD.dtype)


def check_rotary(
    rotary: Rotary | Mapping[str, Any] | None, dim: int, options: BlockOptions, windowed: bool, use_rel_pos: bool
) -> Rotary | None:
    """Rotary positions, given as such or as a dictionary of the fields of :class:`Rotary`, for a model of these options.

    Args:
        windowed: whether any block has windows.
    """
    if rotary is None:
        return None
    head_dim = dim // options.num_heads
    rotary = Rotary(**rotary) if isinstance(rotary, Mapping) else rotary
    one_of("rotary.rope_type", rotary.rope_type, "cat", "dinov3")
    one_of("rotary.grid_indexing", rotary.grid_indexing, "ij", "xy")
    if head_dim % 4:
        raise ValueError(f"rotary positions need head channels in fours; embed_dim / num_heads is {head_dim}")
    if use_rel_pos:
        raise ValueError("rotary positions together with use_rel_pos=True are not defined; give one of them")
    if windowed and (options.qk_norm or (options.qkv_bias and options.k_bias)):
        raise ValueError(
            "rotary positions with windows need keys without a bias and qk_norm=False: in windows that are cut short, "
            "each padded cell would have another key; set qkv_bias=False or k_bias=False, as in EVA-02 and DINOv3"
        )
    if rotary.rope_type == "dinov3" and rotary.ref_feat_shape is not None:
        raise ValueError(f"ref_feat_shape={rotary.ref_feat_shape} has no meaning for rope_type='dinov3'; leave it out")
    shape = rotary.ref_feat_shape
    return rotary._replace(ref_feat_shape=None if shape is None else pair(shape))


def rotary_tables(rotary: Rotary, head_dim: int, layout: TokenLayout) -> RotaryTables:
    """The tables of all rows of a batch."""
    images, windows = (
        None if cells is None else _of_rows(_of_patches(rotary, head_dim, cells), layout)
        for cells in (layout.image_cells, layout.window_cells)
    )
    return RotaryTables(images, windows, rotary.rotate_half)


def _of_patches(rotary: Rotary, head_dim: int, cells: Cells) -> Tensor:
    """Sines and cosines (N, 2 D) of patches in their segments."""
    bands = freq_bands(head_dim // 4, rotary.temperature, step=1, device=cells.scale_N.device)
    angles = torch.cat([place_N[:, None] * bands for place_N in places(rotary, cells)], dim=1)
    angles = torch.cat([angles, angles], dim=1) if rotary.rotate_half else angles.repeat_interleave(2, dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def places(rotary: Rotary, cells: Cells) -> tuple[Tensor, Tensor]:
    """Where the centres of patches lie along the two axes, in the order of ``grid_indexing``: twice (N,) float."""
    to_centre = ((1 << cells.scale_N) - 1) / 2 + rotary.grid_offset
    along_axes = []
    for axis, first_N in enumerate((cells.y_N, cells.x_N)):
        place = (first_N + to_centre).float()
        if rotary.rope_type == "dinov3":
            place = 2 * math.pi * (2 * (place + 0.5) / cells.size[axis] - 1)
        elif rotary.ref_feat_shape is not None:
            place = place / cells.size[axis] * rotary.ref_feat_shape[axis]
        along_axes.append(place)
    return tuple(along_axes if rotary.grid_indexing == "ij" else reversed(along_axes))


def _of_rows(table_N: Tensor, layout: TokenLayout) -> Tensor:
    """Tables of patches (N, 2 D) -> of rows (R, 2 D), those of prefix rows with sines of 0 and cosines of 1."""
    if not layout.num_prefix:
        return table_N
    row_N = torch.arange(len(table_N), device=table_N.device) + layout.num_prefix * (layout.image_N + 1)
    sines, cosines = table_N.new_zeros(2, len(layout.image_R), table_N.shape[1] // 2).unbind()
    return torch.cat([sines, cosines + 1], dim=1).index_copy(0, row_N, table_N)
