"""Attention over packed segments: the one file that knows which kernels exist."""

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.layout import Segments


def packed_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Softmax attention inside each segment, by PyTorch's fused kernels.

    Args:
        q, k, v: (R, heads, head_dim), the rows of all segments one after the other.
        segments: lengths that sum to R.

    Returns:
        (R, heads, head_dim).
    """
    lengths = segments.lengths
    if len(q) != sum(lengths):
        raise ValueError(f"{len(q)} rows, but the segments hold {sum(lengths)}: the layout is of another batch")
    if len(set(lengths)) == 1 and lengths[0] > 0:
        q, k, v = (t.unflatten(0, (len(lengths), lengths[0])) for t in (q, k, v))
        return _dense(q, k, v).flatten(0, 1)
    parts = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
    return torch.cat([_dense(*(t[None] for t in part))[0] for part in parts if len(part[0])] or [v])


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(S, L, heads, head_dim) -> the same shape."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
