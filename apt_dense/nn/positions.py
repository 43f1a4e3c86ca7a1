"""Absolute positions: the learned embedding, resampled to the grid of each scale.

Shape letters: gh x gw the grid that the embedding is trained for, C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from apt_dense.runtime import without_autocast


class AbsolutePositions(NamedTuple):
    """A learned embedding on the grid that it is trained for, and how it is resampled to others."""

    table: Tensor  # (gh, gw, C)
    antialias: bool = True  # of the base grid: as timm does (True), or MMSeg and Detectron2 (False)

    def at_scale(self, grid: tuple[int, int], scale: int) -> Tensor:
        """Embeddings of the complete patches of a scale: (grid rows >> scale, grid columns >> scale, C)."""
        return positions_of_scale(self.table, grid, scale, self.antialias)


def resample_positions(positions: Tensor, grid: tuple[int, int], antialias: bool = True) -> Tensor:
    """Bicubic resampling of a position grid (gh, gw, C) to (*grid, C).

    ``antialias=True`` is timm's way (``resample_abs_pos_embed``), False that of MMSeg's and Detectron2's ViT.
    """
    if tuple(positions.shape[:2]) == tuple(grid):
        return positions
    return _cubic_samples(positions, grid, grid, antialias)


def positions_of_scale(positions: Tensor, grid: tuple[int, int], scale: int, antialias: bool = True) -> Tensor:
    """Position embeddings of the complete patches of a scale: (grid[0] >> scale, grid[1] >> scale, C).

    Coarse patches take the trained embedding resampled to their own grid, bicubic and antialiased as in the released
    code. Where 2**scale does not divide the base grid, their grid covers only part of the image, and so do the
    samples taken here.

    Args:
        positions: (gh, gw, C), the embedding on the grid it was trained for.
        grid: rows and columns of the base grid.
        antialias: how the base grid is resampled, if it is not the trained one.
    """
    if scale == 0:
        return resample_positions(positions, grid, antialias)
    whole = tuple(cells / 2**scale for cells in grid)
    return _cubic_samples(positions, tuple(cells >> scale for cells in grid), whole)


def _cubic_samples(
    positions: Tensor, counts: tuple[int, int], whole: tuple[float, float], antialias: bool = True
) -> Tensor:
    """The first ``counts`` of ``whole`` evenly spaced samples along each axis: (gh, gw, C) -> (*counts, C).

    A matrix per axis, in float32. Not F.interpolate, which is slower by far, on a CPU wrong for a single column, and
    skips an axis whose number of samples stays although their spacing does not (torch 2.15, with antialiasing).
    """
    with without_autocast(positions):
        along_y, along_x = (
            _cubic_weights(size, count, size / samples, positions.device)
            if antialias
            else _plain_cubic_weights(size, count, positions.device)
            for size, count, samples in zip(positions.shape, counts, whole, strict=False)
        )
        rows = (along_y @ positions.float().flatten(1)).unflatten(1, positions.shape[1:])
        return (along_x @ rows).to(positions.dtype)


def _cubic_weights(size: int, count: int, spacing: float, device: torch.device) -> Tensor:
    """Weights (count, size) of a cubic filter (a = -0.5), widened to the spacing of its samples if that exceeds 1."""
    sample = (torch.arange(count, device=device, dtype=torch.float32)[:, None] + 0.5) * spacing
    x = (torch.arange(size, device=device, dtype=torch.float32) + 0.5 - sample).abs() / max(spacing, 1.0)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


def _plain_cubic_weights(size: int, count: int, device: torch.device) -> Tensor:
    """Weights (count, size) of F.interpolate's bicubic filter (a = -0.75), which repeats the first and last sample.

    Places are counted in whole numbers of 1 / (2 * count), so that they are exact for large grids, too.
    """
    place = (2 * torch.arange(count, device=device)[:, None] + 1) * size - count
    offsets = torch.arange(-1, 3, device=device)  # the four samples around each place
    taps = place.div(2 * count, rounding_mode="floor") + offsets
    x = (place.remainder(2 * count).float() / (2 * count) - offsets).abs()
    near, far = (1.25 * x - 2.25) * x * x + 1, -0.75 * (x - 1) * (x - 2) ** 2
    weights = torch.where(x < 1, near, far)
    return weights.new_zeros(count, size).scatter_add(1, taps.clamp(0, size - 1), weights)
