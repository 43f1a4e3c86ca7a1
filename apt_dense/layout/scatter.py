"""Scatter: packed tokens -> feature map, and back.

Shape letters: B images, h x w cells of the base grid, R packed rows, C channels.
"""

import torch
from torch import Tensor

from apt_dense.layout.tokens import TokenLayout


def scatter_tokens(rows: Tensor, layout: TokenLayout) -> Tensor:
    """Rows (R, C) -> feature map (B, C, h, w): each cell takes the token that covers it, dropped cells are zero."""
    index = layout.row_Bhw
    if not layout.every_cell_has_its_row:
        # One spare row of zeros, the last, stands for dropped cells (index -1).
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        index = torch.where(index < 0, len(rows) - 1, index)
    cells = rows.index_select(0, index.flatten())  # not rows[index], whose backward is many times slower
    return cells.view(*index.shape, -1).permute(0, 3, 1, 2).contiguous()


def scatter_tiles(tiles: Tensor, layout: TokenLayout, channels_last: bool = True) -> Tensor:
    """Tiles of packed rows -> (B, C, h * th, w * tw): each cell becomes its token's tile.

    Args:
        tiles: (R + 1, th, tw, C), the last one for dropped cells, or (R + B, th, tw, C), the last ones for those of
            each image.
        channels_last: the order in memory; else contiguous.
    """
    batch, h, w = layout.row_Bhw.shape
    _, th, tw, channels = tiles.shape
    index = tile_of_cells(layout, len(tiles))
    cells = tiles.flatten(1).index_select(0, index.flatten()).view(batch, h, w, th, tw, channels)
    if not channels_last:
        return cells.permute(0, 5, 1, 3, 2, 4).contiguous().view(batch, channels, h * th, w * tw)
    return cells.transpose(2, 3).reshape(batch, h * th, w * tw, channels).permute(0, 3, 1, 2)


def tile_of_cells(layout: TokenLayout, count: int) -> Tensor:
    """The tile, out of ``count``, that each cell shows: (B, h, w). See :func:`scatter_tiles`."""
    row_Bhw, spare = layout.row_Bhw, count - layout.images.total
    if spare <= 1:
        return torch.where(row_Bhw < 0, count - 1, row_Bhw)
    last = torch.arange(count - layout.batch, count, device=row_Bhw.device).view(-1, 1, 1)
    return torch.where(row_Bhw < 0, last, row_Bhw)


def gather_tokens(feature_map: Tensor, layout: TokenLayout, count: int | None = None) -> Tensor:
    """Feature map (B, C, h, w) -> rows (R, C): each token takes the mean of the cells it covers, prefix rows are zero.

    Inverse of :func:`scatter_tokens` up to prefix rows. With a ``count`` rows of zeros follow, up to so many.
    """
    index = layout.row_Bhw.flatten()
    cells = feature_map.permute(0, 2, 3, 1).flatten(0, 2)
    total = len(layout.image_R) if count is None else count
    index = torch.where(index < 0, total, index)
    sums = cells.new_zeros(total + 1, cells.shape[1]).index_add_(0, index, cells)[:total]
    counts = cells.new_zeros(total + 1).index_add_(0, index, torch.ones_like(index, dtype=cells.dtype))[:total]
    return sums / counts.clamp(min=1)[:, None]
