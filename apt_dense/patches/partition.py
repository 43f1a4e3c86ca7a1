"""Partition: score maps -> scale map, the one drawable tensor that says which patches an image is cut into.

A **scale map** is (B, h, w) int8 on the base grid: the scale of the patch that covers each cell. Every aligned
2**s x 2**s block of cells marked s is one token. ``DROPPED`` (-1) marks cells without a token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apt_dense.patches.blocks_of_pixels import enlarged
from apt_dense.patches.regions import Regions

DROPPED = -1


class Bounds(NamedTuple):
    """The lines that no patch may cross: the edges of images inside their padding, and the borders of windows."""

    region: Tensor  # (B, 2) filled rows and columns of each image, in pixels from the top left
    grid: tuple[int, int]  # rows and columns of the base grid
    patch_size: int  # pixels
    window_size: int = 0  # cells of an attention window, counted from the top left; 0 for none

    def uncut(self, scale: int) -> Tensor:
        """Mark the patches of a scale that cross none of them: (B, grid rows >> scale, grid columns >> scale) bool."""
        (rows_in, rows_out), (columns_in, columns_out) = (
            _uncut_intervals(self.region[:, axis], cells >> scale, self.patch_size * 2**scale)
            for axis, cells in enumerate(self.grid)
        )
        inside = rows_in[:, :, None] & columns_in[:, None, :]
        outside = rows_out[:, :, None] | columns_out[:, None, :]
        return (inside | outside) & self.within_windows(scale)

    def within_windows(self, scale: int) -> Tensor:
        """Mark the patches (grid rows >> scale, grid columns >> scale) of a scale that lie in a single window."""
        rows, columns = (torch.arange(cells >> scale, device=self.region.device) << scale for cells in self.grid)
        if not self.window_size:
            return torch.ones(len(rows), len(columns), dtype=torch.bool, device=self.region.device)
        last = 2**scale - 1
        row_ok, column_ok = (
            first // self.window_size == (first + last) // self.window_size for first in (rows, columns)
        )
        return row_ok[:, None] & column_ok[None, :]

    def begin_inside(self, scale: int) -> Tensor:
        """Mark the patches (B, grid rows >> scale, grid columns >> scale) that begin inside the filled region."""
        size = self.patch_size << scale
        rows, columns = (
            torch.arange(cells >> scale, device=self.region.device) * size < self.region[:, axis, None]
            for axis, cells in enumerate(self.grid)
        )
        return rows[:, :, None] & columns[:, None, :]

    def filled_cells(self) -> Tensor:
        """Rows and columns (B, 2) of cells that hold a filled pixel."""
        return -(-self.region // self.patch_size)

    def drop_padding(self, scale_map: Tensor) -> Tensor:
        """Mark ``DROPPED`` the cells that lie wholly outside the filled region."""
        return torch.where(self.begin_inside(0), scale_map, DROPPED)


def _uncut_intervals(extent: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Along one axis, which of ``count`` patches end before the extent (B,), and which begin after it: (B, count)."""
    start = torch.arange(count, device=extent.device) * size
    return start + size <= extent[:, None], start >= extent[:, None]


def partition_by_thresholds(
    scores: Sequence[Tensor], thresholds: Sequence[float], bounds: Bounds, regions: Regions | None = None
) -> Tensor:
    """Keep a patch whole where its score is below its scale's threshold, largest scale first (paper, section 3).

    Args:
        scores: for scales 1, 2, ...: (B, grid rows >> s, grid columns >> s).
        thresholds: one per score map.
        regions: what must stay fine is cut into the smallest patches; what shall be coarse counts as flat.

    Returns:
        Scale map (B, *grid) int8.
    """
    scale_map = torch.zeros(len(bounds.region), *bounds.grid, dtype=torch.int8, device=bounds.region.device)
    for scale, (score, threshold) in enumerate(zip(scores, thresholds, strict=True), start=1):
        # From small to large: where a larger patch is flat it overwrites the smaller ones.
        flat = score < threshold
        if regions is not None:
            flat = (flat | regions.shall_be_coarse(scale)) & regions.may_be_coarse(scale)
        paint_blocks(scale_map, flat & bounds.uncut(scale), scale)
    return scale_map


def paint_blocks(scale_map: Tensor, chosen: Tensor, scale: int) -> None:
    """Mark, in place, the cells of the chosen patches (B, h >> scale, w >> scale) with their scale."""
    cells = enlarged(chosen, 2**scale)
    scale_map[:, : cells.shape[1], : cells.shape[2]].masked_fill_(cells, scale)


def anchors_of(scale_map: Tensor) -> Tensor:
    """The top left cell of every patch of a scale map (B, h, w): (B, h, w) bool."""
    _, h, w = scale_map.shape
    y = torch.arange(h, device=scale_map.device)[:, None]
    x = torch.arange(w, device=scale_map.device)
    within = (1 << scale_map.clamp(min=0)) - 1
    return (scale_map > DROPPED) & ((y & within) == 0) & ((x & within) == 0)


def count_tokens(scale_map: Tensor, num_scales: int) -> Tensor:
    """Patches of each scale (B, num_scales) int64 in scale maps (B, h, w)."""
    anchors = anchors_of(scale_map.long())
    return torch.stack([(anchors & (scale_map == s)).sum((1, 2)) for s in range(num_scales)], dim=1)
