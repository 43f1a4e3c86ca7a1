"""Attention by PyTorch's fused kernel on batches of segments, the bias as a mask, a bounded part of it at a time.

Faster than ``sdpa`` without gradients; its backward pass would keep the whole mask. Shape letters are those of
length_buckets.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.ops.kernels.interface import Inputs, Kernel
from apt_dense.ops.kernels.length_buckets import Batch, attend_by_bucket
from apt_dense.runtime import is_amd, runs_on_host

_BIAS_ENTRIES = 2**21  # most entries of the bias held at once: 8 MiB in float32


def mask(inputs: Inputs) -> Tensor:
    return attend_by_bucket(inputs, _masked)


def _masked(batch: Batch) -> Tensor:
    q, k, v, queries, keys, _, _ = batch
    of_keys = _mask_of_keys(batch)
    q, k, v, queries = (t.transpose(1, 2) for t in (q, k, v, queries))
    if queries.shape[-1] == 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=of_keys).transpose(1, 2)
    return _chunked(q, k, v, queries, keys[:, None].transpose(-2, -1), of_keys).transpose(1, 2)


def _mask_of_keys(batch: Batch) -> Tensor | None:
    """What all queries add for each key (n, 1, 1, M), -inf at padded places; bool if that is all; None for nothing."""
    valid, logits = batch.valid, batch.logits
    if valid is not None:
        valid = F.pad(valid, (0, batch.k.shape[1] - valid.shape[1]), value=True)
    if logits is None:
        return None if valid is None else valid[:, None, None]
    return (logits if valid is None else logits.masked_fill(~valid, -torch.inf))[:, None, None]


def _chunked(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, of_keys: Tensor | None) -> Tensor:
    """q, k, v (n, H, L or M, D), queries (n, H, L, K), keys (n, 1, K, M), of_keys (n, 1, 1, M) -> (n, H, L, D)."""
    n, heads, length, _ = q.shape
    per_query = heads * k.shape[2]
    rows = max(1, min(length, _BIAS_ENTRIES // per_query))
    batch = max(1, _BIAS_ENTRIES // (per_query * rows))
    images = []
    for i in (slice(first, first + batch) for first in range(0, n, batch)):
        parts = []
        for j in range(0, length, rows):
            bias = queries[i, :, j : j + rows] @ keys[i]
            if of_keys is not None:
                own = of_keys[i]
                bias = bias.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else bias + own
            parts.append(F.scaled_dot_product_attention(q[i, :, j : j + rows], k[i], v[i], attn_mask=bias))
        images.append(torch.cat(parts, 2))
    return torch.cat(images)


def _suits(inputs: Inputs) -> bool:
    """Check whether parts cost nothing and masks little: on a GPU parts would be many launches, a compiler would unroll
    them, and on Intel's CPUs further channels are faster."""
    return runs_on_host(inputs.q) and is_amd() and not inputs.trains


KERNEL = Kernel(mask, lambda inputs: None, _suits)
