"""Segments of about the same length as batches, for kernels that know batches only.

Shape letters: R packed rows, H heads, D channels of a head, n segments of L places in a bucket, M keys (L, or L + 1
with a key for padding), K bias channels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.layout.tokens import Bucket, Segments
from apt_dense.ops.bias import bias_channels
from apt_dense.ops.kernels.interface import Inputs


class Batch(NamedTuple):
    """The operands of a bucket."""

    q: Tensor  # (n, L, H, D)
    k: Tensor  # (n, M, H, D)
    v: Tensor  # (n, M, H, D)
    queries: Tensor  # (n, L, H, K), the bias as products: bias[q, k] = queries[q] . keys[k]
    keys: Tensor  # (n, M, K)
    valid: Tensor | None  # (n, L) bool, False at padded places but the first; None if there are none
    logits: Tensor | None  # (n, M) in the type of q, added for each key whatever the query; None for none


def attend_by_bucket(inputs: Inputs, attend: Callable[[Batch], Tensor]) -> Tensor:
    """Run ``attend``, a Batch -> (n, L, H, D), on each bucket: (R, H, D). Outputs of padded places mean nothing."""
    q, k, v, segments, bias, padding, logit_R = inputs
    channels, parts = bias_channels(q, bias, padding), []
    for bucket in segments.buckets:
        batch = Batch(
            *(_take(t, bucket, segments) for t in (q, k, v, *channels[:2])),
            _never_empty(bucket.valid),
            None if logit_R is None else _take(logit_R.to(q.dtype), bucket, segments),
        )
        if padding is not None:
            batch = _with_key(batch, padding.k_HD, padding.v_HD, channels.padding_K)
        is_plain = batch.valid is None and batch.queries.shape[-1] == 0 and batch.logits is None
        parts.append((_plain if is_plain else attend)(batch).flatten(0, 1))
    return _unpacked(parts, v, segments)


def _never_empty(valid: Tensor | None) -> Tensor | None:
    """Let segments without rows, whose outputs nobody takes, attend to one: attention to nothing is not a number."""
    return None if valid is None else torch.cat([torch.ones_like(valid[:, :1]), valid[:, 1:]], 1)


def _with_key(batch: Batch, k: Tensor, v: Tensor, keys: Tensor) -> Batch:
    logits = None if batch.logits is None else F.pad(batch.logits, (0, 1))
    return batch._replace(k=_append(batch.k, k), v=_append(batch.v, v), keys=_append(batch.keys, keys), logits=logits)


def _unpacked(parts: list[Tensor], v: Tensor, segments: Segments) -> Tensor:
    """Outputs of all buckets -> packed rows."""
    if segments.is_even:
        return parts[0]
    return torch.cat([*parts, v[:0]]).index_select(0, segments.place_R)


def _plain(batch: Batch) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in batch[:3])
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _take(rows: Tensor, bucket: Bucket, segments: Segments) -> Tensor:
    """Packed rows (R, ...) -> those of a bucket (n, L, ...)."""
    if segments.is_even:
        return rows.unflatten(0, bucket.rows.shape)  # contiguous already, without a copy
    return rows.index_select(0, bucket.rows.flatten()).unflatten(0, bucket.rows.shape)


def _append(values: Tensor, last: Tensor) -> Tensor:
    """One more place (n, L, ...) -> (n, L + 1, ...) for every segment."""
    return torch.cat([values, last.expand(len(values), 1, *last.shape)], 1)
