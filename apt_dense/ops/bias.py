"""Terms that attention adds to plain dot products, in factored form: relative positions (the keys' side), a key for
padding, and the weight of coarse keys.

Shape letters: N patches, R packed rows, H heads, D channels of a head, K bias channels.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.layout.tokens import Cells


def mask_factor(dtype: torch.dtype) -> float:
    """The number whose negative square is the logit of keys that take no part: far below all real ones, so that their
    weight is exactly 0. A product of two channels, since no single one of float16 goes that far, and finite, so that
    gradients are."""
    return 2.0**15 if dtype == torch.float16 else 2.0**50


class RelativeBias(NamedTuple):
    """Decomposed relative positions: a key gets the mean, over its cells, of what the query adds for their rows and
    columns (``nn.relative.relative_bias_of_queries``). Never stored as a whole."""

    queries_RHK: Tensor  # K = rows + columns of a segment
    cells: Cells  # where the keys lie


class PaddingKey(NamedTuple):
    """One more key for every segment, standing for its padding."""

    logit_RH: Tensor  # bias of each query for it (1 or H wide); -inf where a segment has no padding
    k_HD: Tensor
    v_HD: Tensor


def proportional_logits(scale_R: Tensor, power: float) -> Tensor:
    """Logits (R,) by which a key of 4**scale cells weighs (4**scale) ** power."""
    return scale_R.float() * (power * math.log(4))


class Channels(NamedTuple):
    """The bias as products: bias[q, k] = queries[q] . keys[k]."""

    queries_RHK: Tensor
    keys_RK: Tensor
    padding_K: Tensor  # the keys of a padding key


def bias_channels(
    q: Tensor, bias: RelativeBias | None, padding: PaddingKey | None, logit_R: Tensor | None = None
) -> Channels:
    """Channels of all terms, in the type of q (R, H, D); none where all are None.

    Args:
        logit_R: what all queries add for each key, but not for a padding key.
    """
    rows, heads = q.shape[:2]
    queries, keys, padding_keys = [q.new_zeros(rows, heads, 0)], [q.new_zeros(rows, 0)], [q.new_zeros(0)]
    if bias is not None:
        queries.append(bias.queries_RHK)
        keys.append(cover_of_keys(bias.cells, q.dtype))
        padding_keys.append(q.new_zeros(keys[-1].shape[1]))
    if padding is not None:
        factor, logit = mask_factor(q.dtype), padding.logit_RH.expand(rows, heads)[..., None]
        masked = logit == -torch.inf
        queries += [logit.masked_fill(masked, 0).to(q.dtype), torch.where(masked, -factor, 0.0).to(q.dtype)]
        keys.append(q.new_zeros(rows, 2))
        padding_keys += [q.new_ones(1), q.new_full((1,), factor)]
    if logit_R is not None:
        queries.append(q.new_ones(rows, heads, 1))
        keys.append(logit_R[:, None].to(q.dtype))
        padding_keys.append(q.new_zeros(1))
    return Channels(torch.cat(queries, -1), torch.cat(keys, -1), torch.cat(padding_keys))


def augment(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bias as further channels, so that kernels without one apply, with a scale of 1 and their own backward.

    q, k, v (..., H, D), queries (..., H, K) and keys (..., K) -> all (..., H, D'), D' a multiple of 8 as fused kernels
    want it, v as wide as q and k.
    """
    width, channels = q.shape[-1], queries.shape[-1]
    fill = -(width + channels) % 8
    q = torch.cat([q * width**-0.5, queries, q.new_zeros(*q.shape[:-1], fill)], -1)
    keys = F.pad(keys, (0, fill))[..., None, :].expand(*k.shape[:-1], channels + fill)
    k = torch.cat([k, keys], -1)
    return q, k, F.pad(v, (0, channels + fill))


def cover_of_keys(cells: Cells, dtype: torch.dtype) -> Tensor:
    """The share of each patch that lies in each row and in each column of its segment: (N, rows + columns).

    One-hot for patches of scale 0; its product with the queries' part (``nn/relative.py``) is the bias of attention,
    the mean over the cells of a key.
    """
    parts = []
    span = (1 << cells.scale_N)[:, None]
    for size, first in zip(cells.size, (cells.y_N, cells.x_N), strict=True):
        place = torch.arange(size, device=first.device) - first[:, None]
        parts.append(((place >= 0) & (place < span)).to(dtype) / span)
    return torch.cat(parts, dim=-1).to(dtype)


def pooled_bias(bias: Tensor, size: tuple[int, int], num_scales: int) -> Tensor:
    """Bias channels (..., rows + columns) -> also those of coarse keys: for every scale, the mean of each run of 2**s
    rows or columns. See :func:`codes_of_keys`."""
    return torch.cat(pooled_by_axis(bias, size, num_scales), dim=-1)


def pooled_by_axis(bias: Tensor, size: tuple[int, int], num_scales: int) -> list[Tensor]:
    """The two parts of :func:`pooled_bias`, of rows and of columns."""
    return [torch.cat(runs_by_scale(part, num_scales), dim=-1) for part in bias.split(list(size), dim=-1)]


def runs_by_scale(values: Tensor, num_scales: int) -> list[Tensor]:
    """Means (..., size - 2**s + 1) of the runs of 2**s along the last axis (..., size), for each scale."""
    runs = [values]
    for scale in range(1, num_scales):
        step = 2 ** (scale - 1)
        runs.append((runs[-1][..., :-step] + runs[-1][..., step:]) / 2)
    return runs


def codes_of_keys(cells: Cells) -> Tensor:
    """The two channels (N, 2) of :func:`pooled_bias` that add up to the bias of each key."""
    rows, columns = cells.size
    row_channels = sum(_run_counts(rows, cells.num_scales))
    return torch.stack(
        [cells.y_N + first_run(cells, rows), cells.x_N + first_run(cells, columns) + row_channels], dim=1
    )


def _run_counts(size: int, num_scales: int) -> list[int]:
    """Count the runs that :func:`runs_by_scale` makes of each scale."""
    return [max(0, size - 2**scale + 1) for scale in range(num_scales)]


def first_run(cells: Cells, size: int) -> Tensor:
    """Place at which the runs of each patch's scale begin when listed scale after scale: (N,)."""
    # A sum of Python numbers, so that nothing is copied to the device.
    first = torch.zeros_like(cells.scale_N)
    for scale, count in enumerate(_run_counts(size, cells.num_scales)[:-1], start=1):
        first = first + (cells.scale_N >= scale) * count
    return first
