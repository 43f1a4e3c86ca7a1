"""Positions of tokens of any scale: learned absolute ones, resampled to each scale's grid, and decomposed relative
ones, averaged over the cells that a token covers.

Shape letters: N patches, H heads, D channels of a head, C channels, K = rows + columns of a segment.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.layout.packed import Cells, TokenLayout
from apt_dense.ops.linear import linear

#: The logit of a key that takes no part. Finite, so that gradients stay finite, and within float16.
MASKED = -1e4


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
    code. Where the base grid is no multiple of 2**scale, their grid covers only part of the image, and so do the
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
    with torch.autocast(positions.device.type, enabled=False):
        along_y, along_x = (
            _cubic_weights(size, count, size / samples, positions.device)
            if antialias
            else _plain_cubic_weights(size, count, positions.device)
            for size, count, samples in zip(positions.shape, counts, whole, strict=False)
        )
        rows = (along_y @ positions.float().flatten(1)).unflatten(1, positions.shape[1:])
        return (along_x @ rows).to(positions.dtype)


def _cubic_weights(size: int, count: int, spacing: float, device: torch.device) -> Tensor:
    """Weights (count, size) of a cubic filter (a = -0.5), widened to the spacing of its samples where that exceeds 1."""
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


def relative_table(rel_pos: Tensor, size: int) -> Tensor:
    """Relative positions (L, d) along one axis -> (2 * size - 1, d) for distances 1 - size ... size - 1.

    Interpolated linearly if the table was trained for another size, as Detectron2 does
    (detectron2/modeling/backbone/utils.py, get_rel_pos).
    """
    if len(rel_pos) == 2 * size - 1:
        return rel_pos
    table = F.interpolate(rel_pos.T[None].float(), size=2 * size - 1, mode="linear", align_corners=False)
    return table[0].T.to(rel_pos.dtype)


def relative_bias_of_queries(
    q_NHD: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor, cells: Cells, layout: TokenLayout
) -> Tensor:
    """Decomposed relative positions: what each query adds for a key in each row and in each column.

    A key in row j and column i gets out[..., j] + out[..., rows + i], in the order of :func:`cover_of_keys`. A query
    that covers several rows takes their mean.

    Args:
        q_NHD: unscaled queries of N patches, H heads of D channels.
        rel_pos_h, rel_pos_w: (L, D) trained tables.
        cells: where the patches lie.
        layout: without prefix rows.

    Returns:
        (N, H, rows + columns).
    """
    rows, columns = cells.size
    along_y = _per_axis(q_NHD, relative_table(rel_pos_h, rows), cells.y_N, layout)
    along_x = _per_axis(q_NHD, relative_table(rel_pos_w, columns), cells.x_N, layout)
    return torch.cat([along_y, along_x], dim=-1)


def _per_axis(q_NHD: Tensor, table: Tensor, first_N: Tensor, layout: TokenLayout) -> Tensor:
    """Biases (N, H, size) per key position of queries that begin at first_N, by a table (2 * size - 1, D) of distances."""
    if layout.is_fixed:
        return _per_axis_of_all_scales(q_NHD, table, first_N, layout)
    by_distance = linear(q_NHD, table)
    size = (by_distance.shape[-1] + 1) // 2
    key = torch.arange(size, device=first_N.device)
    parts = []
    for scale, chosen in enumerate(layout.by_scale):
        values = by_distance if len(chosen) == len(first_N) else by_distance.index_select(0, chosen)
        for s in range(scale):  # the mean over the rows that the query covers, twice as many at each step
            values = (values[..., : -(2**s)] + values[..., 2**s :]) / 2
        distance = first_N[chosen, None] - key + size - 1
        parts.append(values.gather(-1, distance[:, None].expand(-1, values.shape[1], -1)))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts).index_select(0, layout.source_R)


def _per_axis_of_all_scales(q_NHD: Tensor, table: Tensor, first_N: Tensor, layout: TokenLayout) -> Tensor:
    """The same in fixed shapes: every query against the tables of all scales, of which it then takes its own."""
    size, cells = (len(table) + 1) // 2, layout.image_cells
    by_distance = linear(q_NHD, torch.cat(_runs(table.T, cells.num_scales), dim=-1).T)
    start = first_N + _first_of_scale(cells, len(table)) + size - 1
    distance = start[:, None] - torch.arange(size, device=first_N.device)
    return by_distance.gather(-1, distance[:, None].expand(-1, by_distance.shape[1], -1))


def cover_of_keys(cells: Cells, dtype: torch.dtype) -> Tensor:
    """The share of each patch that lies in each row and in each column of its segment: (N, rows + columns).

    One-hot for patches of scale 0; its product with :func:`relative_bias_of_queries` is the bias of attention, the
    mean over the cells of a key.
    """
    parts = []
    span = (1 << cells.scale_N)[:, None]
    for size, first in zip(cells.size, (cells.y_N, cells.x_N), strict=True):
        place = torch.arange(size, device=first.device) - first[:, None]
        parts.append(((place >= 0) & (place < span)).to(dtype) / span)
    return torch.cat(parts, dim=-1).to(dtype)


def pooled_bias(bias: Tensor, size: tuple[int, int], num_scales: int) -> Tensor:
    """Bias channels (..., rows + columns) with those of coarse keys beside them: for every scale, the mean of each run
    of 2**s rows or columns. See :func:`codes_of_keys`."""
    return torch.cat([run for part in bias.split(list(size), dim=-1) for run in _runs(part, num_scales)], dim=-1)


def _runs(values: Tensor, num_scales: int) -> list[Tensor]:
    """For each scale, the means (..., size - 2**s + 1) of the runs of 2**s along the last axis (..., size)."""
    runs = [values]
    for scale in range(1, num_scales):
        step = 2 ** (scale - 1)
        runs.append((runs[-1][..., :-step] + runs[-1][..., step:]) / 2)
    return runs


def codes_of_keys(cells: Cells) -> Tensor:
    """For each key the two channels (N, 2) of :func:`pooled_bias` that add up to its bias."""
    rows, columns = cells.size
    of_rows = sum(_run_counts(rows, cells.num_scales))
    return torch.stack(
        [cells.y_N + _first_of_scale(cells, rows), cells.x_N + _first_of_scale(cells, columns) + of_rows], dim=1
    )


def _run_counts(size: int, num_scales: int) -> list[int]:
    """How many runs :func:`_runs` makes of each scale."""
    return [max(0, size - 2**scale + 1) for scale in range(num_scales)]


def _first_of_scale(cells: Cells, size: int) -> Tensor:
    """For each patch, where the runs of its scale begin when listed scale after scale: (N,)."""
    # A sum of Python numbers, so that nothing is copied to the device.
    first = torch.zeros_like(cells.scale_N)
    for scale, count in enumerate(_run_counts(size, cells.num_scales)[:-1], start=1):
        first = first + (cells.scale_N >= scale) * count
    return first


def bias_of_padding(bias_NHK: Tensor | None, cells: Cells) -> Tensor:
    """One logit per query that stands for all padded cells of its window: (N, 1 or H).

    Detectron2 fills windows that are cut short with zeros after the norm, so that each padded cell is a key
    k = bias_k with value bias_v (window_partition). These keys differ only in their relative position, so together
    they weigh as much as a single one whose bias is the log of the sum of exp(bias). That sum is over a full
    rectangle less the real cells, and the bias a sum of a row's and a column's part, so it factors.
    Queries of whole windows get ``MASKED``.

    Args:
        bias_NHK: from :func:`relative_bias_of_queries`; None without relative positions.
    """
    rows, columns = cells.size
    padded = (cells.rows_N < rows) | (cells.columns_N < columns)
    if bias_NHK is None:
        count = (rows * columns - cells.rows_N * cells.columns_N).clamp(min=1).float().log()
        return torch.where(padded, count, MASKED)[:, None]
    along_y, along_x = bias_NHK.float().split([rows, columns], dim=-1)
    top_y, top_x = along_y.amax(-1, keepdim=True).detach(), along_x.amax(-1, keepdim=True).detach()
    exp_y, exp_x = (along_y - top_y).exp(), (along_x - top_x).exp()
    real_y = torch.arange(rows, device=padded.device) < cells.rows_N[:, None]
    real_x = torch.arange(columns, device=padded.device) < cells.columns_N[:, None]
    below = (exp_y * ~real_y[:, None]).sum(-1) * exp_x.sum(-1)
    beside = (exp_y * real_y[:, None]).sum(-1) * (exp_x * ~real_x[:, None]).sum(-1)
    logit = (below + beside).clamp(min=1e-30).log() + top_y[..., 0] + top_x[..., 0]
    return torch.where(padded[:, None], logit, MASKED).to(bias_NHK.dtype)
