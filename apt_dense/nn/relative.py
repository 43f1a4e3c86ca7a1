"""Decomposed relative positions, the queries' side: what each query adds for keys in each row and column.

The keys' side is in ``ops/bias.py``. Shape letters: N patches, H heads, D channels of a head, K = rows + columns of
cells of a segment.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.layout.tokens import Cells, TokenLayout
from apt_dense.ops.bias import first_run, runs_by_scale
from apt_dense.ops.onednn_matmul import linear
from apt_dense.runtime import runs_on_host


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
    """Decomposed relative positions: the term that each query adds for a key in each row and in each column.

    A key in row j and column i gets out[..., j] + out[..., rows + i], in the order of ``ops.bias.cover_of_keys``. A
    query that covers several rows takes their mean.

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
    """Biases (N, H, size) per key position of queries that begin at first_N.

    Args:
        table: (2 * size - 1, D), by distance.
    """
    if layout.is_fixed or not runs_on_host(q_NHD):  # on GPUs, launches of kernels cost more than products
        return _per_axis_of_all_scales(q_NHD, table, first_N, layout)
    by_distance = linear(q_NHD, table)
    size = (by_distance.shape[-1] + 1) // 2
    key = torch.arange(size, device=first_N.device)
    parts = []
    for scale, chosen in enumerate(c.numbers for c in layout.candidates):
        values = by_distance if len(chosen) == len(first_N) else by_distance.index_select(0, chosen)
        for s in range(scale):  # the mean over the rows that the query covers, twice as many at each step
            values = (values[..., : -(2**s)] + values[..., 2**s :]) / 2
        distance = first_N[chosen, None] - key + size - 1
        parts.append(values.gather(-1, distance[:, None].expand(-1, values.shape[1], -1)))
    return layout.assemble(parts)


def _per_axis_of_all_scales(q_NHD: Tensor, table: Tensor, first_N: Tensor, layout: TokenLayout) -> Tensor:
    """As ``_per_axis`` in fixed shapes: every query against the tables of all scales, of which it takes its own."""
    size, cells = (len(table) + 1) // 2, layout.image_cells
    by_distance = linear(q_NHD, torch.cat(runs_by_scale(table.T, cells.num_scales), dim=-1).T)
    start = first_N + first_run(cells, len(table)) + size - 1
    distance = start[:, None] - torch.arange(size, device=first_N.device)
    return by_distance.gather(-1, distance[:, None].expand(-1, by_distance.shape[1], -1))


def bias_of_padding(bias_NHK: Tensor | None, cells: Cells) -> Tensor:
    """One logit per query that stands for all padded cells of its window: (N, 1 or H).

    Detectron2 fills windows that are cut short with zeros after the norm, so that each padded cell is a key
    k = bias_k with value bias_v (window_partition). These keys differ only in their relative position, so together
    they weigh as much as a single one whose bias is the log of the sum of exp(bias). That sum is over a full
    rectangle less the real cells, and the bias a sum of a row's and a column's part, so it factors.
    Queries of whole windows get -inf.

    Args:
        bias_NHK: from :func:`relative_bias_of_queries`; None without relative positions.
    """
    rows, columns = cells.size
    padded = (cells.rows_N < rows) | (cells.columns_N < columns)
    if bias_NHK is None:
        count = (rows * columns - cells.rows_N * cells.columns_N).clamp(min=1).float().log()
        return torch.where(padded, count, -torch.inf)[:, None]
    wide = bias_NHK if bias_NHK.dtype == torch.float64 else bias_NHK.float()
    along_y, along_x = wide.split([rows, columns], dim=-1)
    real_y = torch.arange(rows, device=padded.device) < cells.rows_N[:, None]
    real_x = torch.arange(columns, device=padded.device) < cells.columns_N[:, None]
    below_it = _log_sum(along_y, ~real_y) + along_x.logsumexp(-1)
    right_of_it = _log_sum(along_y, real_y) + _log_sum(along_x, ~real_x)
    logit = torch.logaddexp(below_it, right_of_it)
    return torch.where(padded[:, None], logit, -torch.inf).to(bias_NHK.dtype)


def _log_sum(logits_NHK: Tensor, chosen_NK: Tensor) -> Tensor:
    """The log of the sum of exp of the chosen logits (N, H); of none, a number far below all logits, but finite, so
    that gradients are."""
    return logits_NHK.masked_fill(~chosen_NK[:, None], -1e30).logsumexp(-1)
