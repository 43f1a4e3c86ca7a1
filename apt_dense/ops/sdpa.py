"""Attention by PyTorch's fused kernel on batches of segments of about the same length. Runs everywhere.

Shape letters: R packed rows, H heads, D channels of a head, n segments of L places in a bucket, M keys (L, or L + 1
with a key for padding), K bias channels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.layout.packed import Bucket, Segments
from apt_dense.nn.positions import MASKED
from apt_dense.ops.bias import Channels, PaddingKey, RelativeBias, augment, bias_channels

_BIAS_ENTRIES = 2**21  # most entries of the bias held at once: 8 MiB in float32


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, bias: RelativeBias | None, padding: PaddingKey | None
) -> Tensor:
    """The bias as further channels of q and k: nothing of the size of the scores is made, in the backward neither."""
    return _by_bucket(q, k, v, segments, bias, padding, _augmented)


def mask(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, bias: RelativeBias | None, padding: PaddingKey | None
) -> Tensor:
    """The bias as a mask, a bounded part of it at a time: faster than ``sdpa`` without gradients; its backward would
    keep the whole mask."""
    return _by_bucket(q, k, v, segments, bias, padding, _masked)


def _by_bucket(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, bias: RelativeBias | None, padding: PaddingKey | None,
    attend: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    channels, parts = bias_channels(q, bias, padding), []
    for bucket in segments.buckets:
        taken = (_take(t, bucket, segments) for t in (q, k, v, channels.queries_RHK, channels.keys_RK))
        parts.append(_in_bucket(*taken, bucket.valid, channels, padding, attend).flatten(0, 1))
    return _unpacked(parts, v, segments)


def _unpacked(parts: list[Tensor], v: Tensor, segments: Segments) -> Tensor:
    """Outputs of all buckets -> packed rows."""
    if segments.is_even:
        return parts[0]
    return torch.cat([*parts, v[:0]]).index_select(0, segments.place_R)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(n, L, H, D) -> the same shape."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _in_bucket(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, valid: Tensor | None, channels: Channels,
    padding: PaddingKey | None, attend: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """The outputs (n, L, H, D) of a bucket; those of padded places mean nothing."""
    if valid is None and queries.shape[-1] == 0:
        return _plain(q, k, v)
    if padding is not None:
        k, v = (_append(t, extra) for t, extra in ((k, padding.k_HD), (v, padding.v_HD)))
        keys = _append(keys, channels.padding_K)
    return attend(q, k, v, queries, keys, valid)


def _take(rows: Tensor, bucket: Bucket, segments: Segments) -> Tensor:
    """Packed rows (R, ...) -> those of a bucket (n, L, ...)."""
    if segments.is_even:
        return rows.unflatten(0, bucket.rows.shape)  # as they lie, without a copy
    return rows.index_select(0, bucket.rows.flatten()).unflatten(0, bucket.rows.shape)


def _append(values: Tensor, last: Tensor) -> Tensor:
    """One more place (n, L, ...) -> (n, L + 1, ...) for every segment."""
    return torch.cat([values, last.expand(len(values), 1, *last.shape)], 1)


def _augmented(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, valid: Tensor | None) -> Tensor:
    """q (n, L, H, D), k and v (n, M, H, D), queries (n, L, H, K), keys (n, M, K) -> (n, L, H, D)."""
    width = q.shape[-1]
    if valid is not None:  # one more channel, which masks padded places
        masked = F.pad(torch.where(valid, 0.0, MASKED).to(q.dtype), (0, k.shape[1] - valid.shape[1]))
        queries, keys = F.pad(queries, (0, 1), value=1.0), torch.cat([keys, masked[..., None]], -1)
    q, k, v = (t.transpose(1, 2) for t in augment(q, k, v, queries, keys))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2)[..., :width]


def _masked(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, valid: Tensor | None) -> Tensor:
    """Shapes as for ``_augmented``."""
    if valid is not None:
        valid = F.pad(valid, (0, k.shape[1] - valid.shape[1]), value=True)[:, None, None]
    q, k, v, queries = (t.transpose(1, 2) for t in (q, k, v, queries))
    if queries.shape[-1] == 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=valid).transpose(1, 2)
    return _chunked(q, k, v, queries, keys[:, None].transpose(-2, -1), valid).transpose(1, 2)


def _chunked(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, valid: Tensor | None) -> Tensor:
    """q, k, v (n, H, L or M, D), queries (n, H, L, K), keys (n, 1, K, M), valid (n, 1, 1, M) -> (n, H, L, D)."""
    n, heads, length, _ = q.shape
    per_query = heads * k.shape[2]
    rows = max(1, min(length, _BIAS_ENTRIES // per_query))
    batch = max(1, _BIAS_ENTRIES // (per_query * rows))
    images = []
    for i in (slice(first, first + batch) for first in range(0, n, batch)):
        parts = []
        for j in range(0, length, rows):
            bias = queries[i, :, j : j + rows] @ keys[i]
            bias = bias if valid is None else bias.masked_fill(~valid[i], MASKED)
            parts.append(F.scaled_dot_product_attention(q[i, :, j : j + rows], k[i], v[i], attn_mask=bias))
        images.append(torch.cat(parts, 2))
    return torch.cat(images)
