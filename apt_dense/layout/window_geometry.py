"""Geometry that the builders of layouts share: the order of windows, cells inside them, and the rows of patches.

Shape letters: h x w cells of the base grid, P = h * w of them in packed order, N patches.
"""

import torch
from torch import Tensor

from apt_dense.layout.tokens import Cells


def check_prefix_rows(num_prefix: int, window_size: int) -> None:
    """Raise a ValueError for prefix rows together with windows."""
    if window_size and num_prefix:
        raise ValueError(f"num_prefix={num_prefix} with window_size={window_size}: a prefix row belongs to no window")


def scale_of_rows(scale_N: Tensor, image_N: Tensor, batch: int, num_prefix: int) -> Tensor:
    """Scales (R,) of packed rows, from those of patches in packed order; 0 for prefix rows, which begin each image."""
    if not num_prefix:
        return scale_N
    row_N = torch.arange(len(scale_N), device=scale_N.device) + num_prefix * (image_N + 1)
    return scale_N.new_zeros(len(scale_N) + batch * num_prefix).index_copy(0, row_N, scale_N)


def window_major_order(h: int, w: int, window_size: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """Cells (h * w,) window by window, and the number of cells of each window."""
    if not window_size:
        return torch.arange(h * w, device=device), [h * w]
    order = window_of_cells(h, w, window_size, device).argsort(stable=True)
    rows, columns = ([min(window_size, size - first) for first in range(0, size, window_size)] for size in (h, w))
    return order, [row * column for row in rows for column in columns]


def window_of_cells(h: int, w: int, window_size: int, device: torch.device) -> Tensor:
    """The number (h * w,) of the window that each cell lies in, windows row by row."""
    windows_per_row = -(-w // window_size)
    window_row, window_column = (torch.arange(size, device=device) // window_size for size in (h, w))
    return (window_row[:, None] * windows_per_row + window_column).flatten()


def at_corners(values: Tensor, scale_map: Tensor) -> Tensor:
    """Give each cell the value (B, h, w) at the top left cell of the patch that its scale says it lies in."""
    batch, h, w = scale_map.shape
    corner = -(1 << scale_map.clamp(min=0))  # as a bit mask: clears the place inside the patch
    y = torch.arange(h, device=scale_map.device)[:, None] & corner
    x = torch.arange(w, device=scale_map.device) & corner
    return values[torch.arange(batch, device=scale_map.device).view(-1, 1, 1), y, x]


def window_cells(image_cells: Cells, window_size: int) -> Cells | None:
    """The patches of a grid inside their windows; the last windows of a grid that does not divide are cut short."""
    if not window_size:
        return None
    (rows, columns), y_N, x_N = image_cells.size, image_cells.y_N, image_cells.x_N
    inside_y, inside_x = y_N % window_size, x_N % window_size
    cells = image_cells._replace(size=(window_size, window_size), y_N=inside_y, x_N=inside_x)
    if rows % window_size == 0 and columns % window_size == 0:
        return cells
    return cells._replace(
        rows_N=(rows - y_N + inside_y).clamp(max=window_size),
        columns_N=(columns - x_N + inside_x).clamp(max=window_size),
    )
