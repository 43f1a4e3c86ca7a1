"""Partition: score maps -> scale map, the one drawable tensor that says which patches an image is cut into.

A **scale map** is (B, h, w) int8 on the base grid: the scale of the patch that covers each cell. Every aligned
2**s x 2**s block of cells marked s is one token. ``DROPPED`` (-1) marks cells without a token.

A **region** says how much of each image its host filled: (B, 2) int64, rows and columns in pixels from the top left.
"""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

DROPPED = -1


def check_thresholds(
    thresholds: Sequence[float], patch_size: int, img_size: tuple[int, int], window_size: int = 0
) -> tuple[float, ...]:
    """Thresholds as a tuple of floats, one per scale from 1 up.

    Raises:
        TypeError: if it is not a sequence of numbers, or one is NaN.
        ValueError: for values that rise with the scale, and for a scale larger than the image the model is made for
            or than an attention window (``window_size`` cells; 0 for none).
    """
    if isinstance(thresholds, (str, bytes, Real)) or not isinstance(thresholds, Sequence):
        raise TypeError(
            f"thresholds={thresholds!r} must be a sequence with one number per scale from 1 up, such as (5.5, 4.0); "
            f"() is the plain ViT"
        )
    for value in thresholds:
        if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
            raise TypeError(f"thresholds={tuple(thresholds)!r}: {value!r} is not a number")
    if any(coarse > fine for fine, coarse in zip(thresholds, thresholds[1:], strict=False)):
        raise ValueError(
            f"thresholds={tuple(thresholds)!r} rise with the scale, so a large patch would count as flat while its "
            f"quarters do not; give them from scale 1 (smallest) up, none greater than the one before"
        )
    coarsest = patch_size * 2 ** len(thresholds)
    if thresholds and coarsest > max(img_size):
        raise ValueError(
            f"thresholds={tuple(thresholds)!r}: the patch of scale {len(thresholds)} is {coarsest} pixels wide, more "
            f"than img_size={img_size}; give at most {max(0, int(math.log2(max(img_size) / patch_size)))} thresholds"
        )
    if thresholds and window_size and 2 ** len(thresholds) > window_size:
        raise ValueError(
            f"thresholds={tuple(thresholds)!r}: the patch of scale {len(thresholds)} covers {2 ** len(thresholds)} "
            f"cells, more than window_size={window_size}; give at most {int(math.log2(window_size))} thresholds"
        )
    return tuple(float(value) for value in thresholds)


@torch.no_grad()
def filled_region(images: Tensor) -> Tensor:
    """Rows and columns (B, 2) that hold an image: up to the last row and column with a non-zero pixel.

    Hosts pad right and bottom with 0 after normalising, and 8-bit images whose mean is no whole number never give
    an exact 0 in all channels (HOSTS: all 256 levels checked), so this finds their padding exactly. Zeros inside an
    image are part of it. An image of nothing but zeros counts as filled: no host makes padding alone.
    """
    filled = (images != 0).any(dim=1)
    extents = []
    for dim in (2, 1):  # rows: any column is filled; columns: any row is
        line = filled.any(dim=dim)
        place = torch.arange(1, line.shape[1] + 1, device=images.device)
        extent = (line * place).amax(1)
        extents.append(torch.where(extent > 0, extent, line.shape[1]))
    return torch.stack(extents, dim=1)


def uncut_blocks(region: Tensor, grid: tuple[int, int], scale: int, patch_size: int, window_size: int = 0) -> Tensor:
    """Which patches of a scale cross neither the region's edge nor a window's border.

    Args:
        region: (B, 2) filled rows and columns in pixels.
        grid: rows and columns of the base grid.
        window_size: cells of an attention window, counted from the top left; 0 for none.

    Returns:
        (B, grid rows >> scale, grid columns >> scale) bool.
    """
    (rows_in, rows_out), (columns_in, columns_out) = (
        _uncut_intervals(region[:, axis], cells >> scale, patch_size * 2**scale) for axis, cells in enumerate(grid)
    )
    inside = rows_in[:, :, None] & columns_in[:, None, :]
    outside = rows_out[:, :, None] | columns_out[:, None, :]
    return (inside | outside) & within_windows(grid, scale, window_size, region.device)


def _uncut_intervals(extent: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Along one axis, which of ``count`` patches end before the extent (B,), and which begin after it: (B, count)."""
    start = torch.arange(count, device=extent.device) * size
    return start + size <= extent[:, None], start >= extent[:, None]


def within_windows(grid: tuple[int, int], scale: int, window_size: int, device: torch.device) -> Tensor:
    """Which patches (grid rows >> scale, grid columns >> scale) of a scale lie in a single window."""
    rows, columns = (torch.arange(cells >> scale, device=device) << scale for cells in grid)
    if not window_size:
        return torch.ones(len(rows), len(columns), dtype=torch.bool, device=device)
    last = 2**scale - 1
    row_ok, column_ok = (first // window_size == (first + last) // window_size for first in (rows, columns))
    return row_ok[:, None] & column_ok[None, :]


def partition_by_thresholds(
    scores: Sequence[Tensor],
    thresholds: Sequence[float],
    region: Tensor,
    grid: tuple[int, int],
    patch_size: int,
    window_size: int = 0,
) -> Tensor:
    """Keep a patch whole where its score is below its scale's threshold, largest scale first (paper, section 3).

    Args:
        scores: for scales 1, 2, ...: (B, grid rows >> s, grid columns >> s).
        thresholds: one per score map.
        region: (B, 2) filled rows and columns in pixels; no patch crosses its edge.
        grid: rows and columns of the base grid.
        window_size: cells of an attention window, which no patch crosses either; 0 for none.

    Returns:
        Scale map (B, *grid) int8.
    """
    scale_map = torch.zeros(len(region), *grid, dtype=torch.int8, device=region.device)
    for scale, (score, threshold) in enumerate(zip(scores, thresholds, strict=True), start=1):
        flat = (score < threshold) & uncut_blocks(region, grid, scale, patch_size, window_size)
        # From small to large: where a larger patch is flat it overwrites the smaller ones.
        paint_blocks(scale_map, flat, scale)
    return scale_map


def paint_blocks(scale_map: Tensor, chosen: Tensor, scale: int) -> None:
    """Mark, in place, the cells of the chosen patches (B, h >> scale, w >> scale) with their scale."""
    cells = chosen.repeat_interleave(2**scale, dim=1).repeat_interleave(2**scale, dim=2)
    scale_map[:, : cells.shape[1], : cells.shape[2]].masked_fill_(cells, scale)


def drop_padding(scale_map: Tensor, region: Tensor, patch_size: int) -> Tensor:
    """Mark ``DROPPED`` the cells that lie wholly outside the filled region (B, 2), in pixels."""
    return torch.where(begin_inside(region, scale_map.shape[1:], patch_size), scale_map, DROPPED)


def begin_inside(region: Tensor, counts: Sequence[int], size: int) -> Tensor:
    """Which of (B, *counts) patches of ``size`` pixels begin inside the region (B, 2)."""
    rows, columns = (
        torch.arange(count, device=region.device) * size < region[:, axis, None] for axis, count in enumerate(counts)
    )
    return rows[:, :, None] & columns[:, None, :]
