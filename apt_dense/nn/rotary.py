"""Rotary positions of tokens of any scale: each is rotated by the position of its centre.

A patch of scale s that begins at cell y covers the cells y ... y + 2**s - 1; its centre lies at y + (2**s - 1) / 2 in
units in which the cell i lies at i. So patches of scale 0 are rotated as the host rotates them.

Shape letters: N patches, R packed rows, H heads, D channels of a head.
"""

import math
from dataclasses import dataclass

import torch
from timm.layers import apply_rot_embed_cat
from timm.layers.pos_embed_sincos import freq_bands
from torch import Tensor

from apt_dense.layout.tokens import Cells, TokenLayout
from apt_dense.options import Rotary


@dataclass(frozen=True, eq=False)  # not a tuple: torch.compile would guard the shape of every tensor in it
class RotaryTables:
    """Sines and then cosines for each row (R, 2 D); prefix rows are not rotated."""

    images: Tensor  # for blocks that attend over the image
    windows: Tensor | None  # for blocks with windows
    rotate_half: bool

    def rotate(self, x_RHD: Tensor, windowed: bool) -> Tensor:
        """Queries or keys (R, H, D) -> rotated ones, of the same type."""
        table = self.windows if windowed else self.images
        return apply_rot_embed_cat(x_RHD, table[:, None], half=self.rotate_half).to(x_RHD.dtype)


def rotary_tables(rotary: Rotary, head_dim: int, layout: TokenLayout) -> RotaryTables:
    """The tables of all rows of a batch."""
    images, windows = (
        None if cells is None else _row_table(_patch_table(rotary, head_dim, cells), layout)
        for cells in (layout.image_cells, layout.window_cells)
    )
    return RotaryTables(images, windows, rotary.rotate_half)


def _patch_table(rotary: Rotary, head_dim: int, cells: Cells) -> Tensor:
    """Sines and cosines (N, 2 D) of patches in their segments."""
    bands = freq_bands(head_dim // 4, rotary.temperature, step=1, device=cells.scale_N.device)
    angles = torch.cat([place_N[:, None] * bands for place_N in places(rotary, cells)], dim=1)
    angles = torch.cat([angles, angles], dim=1) if rotary.rotate_half else angles.repeat_interleave(2, dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def places(rotary: Rotary, cells: Cells) -> tuple[Tensor, Tensor]:
    """Places of the centres of patches along the two axes, in the order of ``grid_indexing``: twice (N,) float."""
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


def _row_table(table_N: Tensor, layout: TokenLayout) -> Tensor:
    """Tables of patches (N, 2 D) -> of rows (R, 2 D), those of prefix rows with sines of 0 and cosines of 1."""
    if not layout.num_prefix:
        return table_N
    row_N = torch.arange(len(table_N), device=table_N.device) + layout.num_prefix * (layout.image_N + 1)
    sines, cosines = table_N.new_zeros(2, len(layout.image_R), table_N.shape[1] // 2).unbind()
    return torch.cat([sines, cosines + 1], dim=1).index_copy(0, row_N, table_N)
