"""What attention adds to plain dot products, in factored form: relative positions and a key for padding.

Shape letters: R packed rows, H heads, D channels of a head, K bias channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from apt_dense.layout.packed import Cells
from apt_dense.nn.positions import cover_of_keys


class RelativeBias(NamedTuple):
    """Decomposed relative positions: a key gets the mean, over its cells, of what the query adds for their rows and
    columns (``positions.relative_bias_of_queries``). Never stored as a whole."""

    queries_RHK: Tensor  # K = rows + columns of a segment
    cells: Cells  # where the keys lie


class PaddingKey(NamedTuple):
    """One more key for every segment, standing for its padding."""

    logit_RH: Tensor  # bias of each query for it (1 or H wide); MASKED where a segment has no padding
    k_HD: Tensor
    v_HD: Tensor


class Channels(NamedTuple):
    """The bias as products: bias[q, k] = queries[q] . keys[k]."""

    queries_RHK: Tensor
    keys_RK: Tensor
    padding_K: Tensor  # the keys of a padding key


def bias_channels(q: Tensor, bias: RelativeBias | None, padding: PaddingKey | None) -> Channels:
    """Channels of both terms, in the type of q (R, H, D); none where both are None."""
    rows, heads = q.shape[:2]
    queries, keys, of_padding = [q.new_zeros(rows, heads, 0)], [q.new_zeros(rows, 0)], [q.new_zeros(0)]
    if bias is not None:
        queries.append(bias.queries_RHK)
        keys.append(cover_of_keys(bias.cells, q.dtype))
        of_padding.append(q.new_zeros(keys[-1].shape[1]))
    if padding is not None:
        queries.append(padding.logit_RH.expand(rows, heads)[..., None].to(q.dtype))
        keys.append(q.new_zeros(rows, 1))
        of_padding.append(q.new_ones(1))
    return Channels(torch.cat(queries, -1), torch.cat(keys, -1), torch.cat(of_padding))


def augment(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bias as further channels, so that kernels without one apply, with a scale of 1 and their own backward.

    q, k, v (..., H, D), queries (..., H, K) and keys (..., K) -> all (..., H, D'), D' a multiple of 8 as fused kernels
    want it, v as wide as q and k.
    """
    width, channels = q.shape[-1], queries.shape[-1]
    fill = -(width + channels) % 8
    q = torch.cat([q * width**-0.5, queries, q.new_zeros(*q.shape[:-1], fill)], -1)
    keys = torch.nn.functional.pad(keys, (0, fill))[..., None, :].expand(*k.shape[:-1], channels + fill)
    k = torch.cat([k, keys], -1)
    return q, k, torch.nn.functional.pad(v, (0, channels + fill))
