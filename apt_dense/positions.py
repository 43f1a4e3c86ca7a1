"""Positions of tokens of any scale: the learned absolute embedding, resampled to the grid of each scale."""

import torch.nn.functional as F
from torch import Tensor


def resample_positions(positions: Tensor, grid: tuple[int, int], antialias: bool = True) -> Tensor:
    """Bicubic resampling of a position grid (gh, gw, C) to (*grid, C), in float32.

    ``antialias=True`` is timm's way (``resample_abs_pos_embed``), False that of MMSeg's and Detectron2's ViT.
    """
    if tuple(positions.shape[:2]) == tuple(grid):
        return positions
    table = positions.permute(2, 0, 1)[None].float()
    table = F.interpolate(table, size=grid, mode="bicubic", antialias=antialias, align_corners=False)
    return table[0].permute(1, 2, 0).to(positions.dtype)


def positions_of_scale(positions: Tensor, grid: tuple[int, int], scale: int, antialias: bool = True) -> Tensor:
    """Position embeddings of the complete patches of a scale: (grid[0] >> scale, grid[1] >> scale, C).

    Coarse patches take the trained embedding resampled to their own grid, bicubic and antialiased as in the released
    code. Where the base grid is no multiple of 2**scale, their grid covers only part of the image, and so do the
    samples taken here.

    Args:
        positions: (gh, gw, C), the embedding on the grid it was trained for.
        grid: rows and columns of the base grid.
        antialias: how the base grid is resampled, if it is not the trained one.
    """
    if scale == 0:
        return resample_positions(positions, grid, antialias)
    coarse = tuple(cells >> scale for cells in grid)
    if 0 in coarse:
        return positions.new_zeros(*coarse, positions.shape[-1])
    if all(cells == size << scale for cells, size in zip(grid, coarse, strict=True)):
        return resample_positions(positions, coarse)
    # Enlarge the sampled area to whole patches instead of squeezing the image into fewer: with an explicit scale
    # factor, interpolate takes floor(size * factor) samples at a spacing of 1 / factor. The nudge keeps rounding from
    # losing the last sample of an axis that does divide.
    factors = [cells / 2**scale / size * (1 + 1e-9) for cells, size in zip(grid, positions.shape[:2], strict=True)]
    table = positions.permute(2, 0, 1)[None].float()
    table = F.interpolate(table, scale_factor=factors, mode="bicubic", antialias=True, align_corners=False)
    return table[0, :, : coarse[0], : coarse[1]].permute(1, 2, 0).to(positions.dtype)
