"""Attention over packed segments: the one file that knows which kernels exist.

Shape letters: R packed rows, H heads, D channels of a head, n segments of L places in a bucket, M keys (L, or L + 1
with a key for padding), K bias channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.layout import Bucket, Segments
from apt_dense.positions import MASKED

_QUERIES = 128  # so many at once that the scores of a head stay in the cache
_BIAS_ENTRIES = 2**21  # most entries of the bias held at once: 8 MiB in float32


class RelativeBias(NamedTuple):
    """An additive bias of the logits in factored form: bias[q, k] = queries[q] . keys[k], never stored as a whole."""

    queries_RHK: Tensor
    keys_RK: Tensor
    aligned: "AlignedBias | None" = None  # the same bias in a form that suits long segments on a CPU


class AlignedBias(NamedTuple):
    """The bias of a key as the sum of two channels of its query: bias[q, k] = queries[q, codes[k, 0]] + ...[k, 1]."""

    queries_RHK: Tensor
    codes_R2: Tensor


class PaddingKey(NamedTuple):
    """One more key for every segment, standing for its padding."""

    logit_RH: Tensor  # bias of each query for it (1 or H wide); MASKED where a segment has no padding
    k_HD: Tensor
    v_HD: Tensor


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    bias: RelativeBias | None = None,
    padding: PaddingKey | None = None,
) -> Tensor:
    """Softmax attention inside each segment, by PyTorch's fused kernels.

    Args:
        q, k, v: (R, H, D), the rows of all segments one after the other.
        segments: lengths that sum to R.
        bias: added to the scaled logits; None for none.
        padding: an extra key; None for none.

    Returns:
        (R, H, D).
    """
    lengths = segments.lengths
    if len(q) != sum(lengths):
        raise ValueError(f"{len(q)} rows, but the segments hold {sum(lengths)}: the layout is of another batch")
    if bias is None and padding is None and len(set(lengths)) == 1 and lengths[0] > 0:
        q, k, v = (t.unflatten(0, (len(lengths), lengths[0])) for t in (q, k, v))
        return _plain(q, k, v).flatten(0, 1)
    parts = [_in_bucket(q, k, v, bucket, bias, padding).flatten(0, 1) for bucket in segments.buckets]
    return torch.cat([*parts, v[:0]]).index_select(0, segments.place_R)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(n, L, H, D) -> the same shape."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _in_bucket(
    q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, bias: RelativeBias | None, padding: PaddingKey | None
) -> Tensor:
    """The outputs (n, L, H, D) of a bucket; those of padded places mean nothing."""
    q, k, v = (_take(t, bucket.rows) for t in (q, k, v))
    if bias is None and padding is None and bucket.valid is None:
        return _plain(q, k, v)
    if bias is not None and bias.aligned is not None and padding is None and bucket.valid is None:
        codes = _take(bias.aligned.codes_R2, bucket.rows)
        return _one_head_at_a_time(q, k, v, _take(bias.aligned.queries_RHK, bucket.rows), codes)
    queries, keys = _bias_factors(bucket, bias, padding, q)
    if padding is not None:
        k, v = (torch.cat([t, extra.expand(len(t), 1, -1, -1)], 1) for t, extra in ((k, padding.k_HD), (v, padding.v_HD)))
    q, k, v, queries = (t.transpose(1, 2) for t in (q, k, v, queries))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, queries)):
        return _augmented(q, k, v, queries, keys).transpose(1, 2)
    return _chunked(q, k, v, queries, keys).transpose(1, 2)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape)


def _bias_factors(
    bucket: Bucket, bias: RelativeBias | None, padding: PaddingKey | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries (n, L, H, K) and keys (n, M, K) whose product is the whole bias: relative positions, the padding key's
    logit, and ``MASKED`` at padded places, one channel each beside those of the relative positions."""
    n, length, heads = like.shape[:3]
    queries, keys = [], []
    if bias is not None:
        queries.append(_take(bias.queries_RHK, bucket.rows))
        keys.append(F.pad(_take(bias.keys_RK, bucket.rows), (0, 0, 0, int(padding is not None))))
    if padding is not None:
        logit = _take(padding.logit_RH, bucket.rows)
        queries.append(logit.expand(n, length, heads)[..., None].to(like.dtype))
        keys.append(F.pad(like.new_zeros(n, length, 1), (0, 0, 0, 1), value=1.0))
    if bucket.valid is not None:
        queries.append(like.new_ones(n, length, heads, 1))
        masked = torch.where(bucket.valid, 0.0, MASKED).to(like.dtype)[..., None]
        keys.append(F.pad(masked, (0, 0, 0, int(padding is not None))))
    return torch.cat(queries, -1), torch.cat([key.to(like.dtype) for key in keys], -1)


def _augmented(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The bias as further channels of q and k, so that the fused kernels and their backward apply.

    q, v (n, H, L or M, D), queries (n, H, L, K), keys (n, M, K) -> (n, H, L, D). Nothing of size L x M is kept.
    """
    width = q.shape[-1]
    fill = -(width + queries.shape[-1]) % 8  # fused kernels want a multiple of 8, and v as wide as q and k
    q = torch.cat([q * width**-0.5, queries, q.new_zeros(*q.shape[:-1], fill)], -1)
    keys = F.pad(keys, (0, fill))[:, None].expand(-1, k.shape[1], -1, -1)
    k = torch.cat([k, keys], -1)
    v = F.pad(v, (0, q.shape[-1] - width))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :width]


def _chunked(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """The same with the bias as a mask, a bounded part of it at a time: faster, but its backward would keep it all."""
    n, heads, length, _ = q.shape
    out = torch.empty_like(q)
    per_query = heads * k.shape[2]
    rows = max(1, min(length, _BIAS_ENTRIES // per_query))
    batch = max(1, _BIAS_ENTRIES // (per_query * rows))
    for i in range(0, n, batch):
        transposed = keys[i : i + batch, None].transpose(-2, -1)
        for j in range(0, length, rows):
            part = slice(i, i + batch), slice(None), slice(j, j + rows)
            mask = queries[part] @ transposed
            out[part] = F.scaled_dot_product_attention(q[part], k[i : i + batch], v[i : i + batch], attn_mask=mask)
    return out


def suits_aligned_bias(q: Tensor) -> bool:
    """Whether :class:`AlignedBias` is worth making: without gradients, in float32, on a CPU."""
    return not (torch.is_grad_enabled() and q.requires_grad) and q.dtype == torch.float32 and q.device.type == "cpu"


def _one_head_at_a_time(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, codes: Tensor) -> Tensor:
    """Attention (n, L, H, D) with an aligned bias, queries (n, L, H, K) and codes (n, L, 2).

    The scores of a slice of queries are first filled with their bias, which embedding_bag adds up row by row at the
    speed of memory, and then accumulate the product of keys and queries. At 2400 tokens this took 1.35 times as long as
    fused attention without a bias, and the fused kernel with a mask, however the mask was made, 2.4 times or more.
    """
    out = torch.empty_like(q)
    width = q.shape[-1] ** -0.5
    for image in range(len(q)):
        for head in range(q.shape[2]):
            keys, values = k[image, :, head] * width, v[image, :, head]
            table = queries[image, :, head].T.contiguous()
            for start in range(0, q.shape[1], _QUERIES):
                part = slice(start, start + _QUERIES)
                scores = F.embedding_bag(codes[image], table[:, part], mode="sum")  # (keys, queries)
                weights = scores.addmm_(keys, q[image, part, head].T).softmax(0)
                out[image, part, head] = weights.T @ values
    return out
