"""Attention of long segments on CPUs, faster than PyTorch's fused kernel: a head and a slice of queries at a time, whose
scores stay in the cache, with oneDNN's products. Computed in float32, 16-bit operands too.

At 2450 rows of 12 heads (Zen 5, two cores) without relative positions 67 ms against 100 ms of fused attention (in
bfloat16 no faster), with them 100 ms (tools/benchmark_kernels.py). Neither the forward nor the backward pass holds more than the scores of a slice.

Shape letters: R packed rows, H heads, L rows of a segment, Q queries of a slice, D channels of a head, K rows +
columns of cells, K' the same with those of coarse keys (``positions.pooled_bias``).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from apt_dense.kernels.bucketed import mask
from apt_dense.kernels.onednn import product
from apt_dense.kernels.terms import PaddingKey, RelativeBias
from apt_dense.layout import Cells, Segments
from apt_dense.positions import codes_of_keys, cover_of_keys, pooled_bias

# Queries of a slice: in all, and for each thread, whose scores then stay in its cache (1 MiB in float32).
_FEWEST_QUERIES, _QUERIES, _SCORES = 128, 64, 2**18


def rows(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, bias: RelativeBias | None, padding: PaddingKey | None
) -> Tensor:
    """The bias is looked up, not multiplied out. ``mask`` where there is a padding key."""
    if padding is not None:
        return mask(q, k, v, segments, bias, padding)
    queries, cells = (None, None) if bias is None else (_wide(bias.queries_RHK), bias.cells)
    with torch.autocast(q.device.type, enabled=False):
        return _Rows.apply(_wide(q), _wide(k), _wide(v), queries, cells, segments).to(v.dtype)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


class _Head(NamedTuple):
    """One head of one segment."""

    part: tuple[slice, int]  # its rows and its number
    k: Tensor  # (L, D), scaled
    v: Tensor  # (L, D)
    table: Tensor | None  # (K', L) biases of the queries
    codes: Tensor | None  # (L, 2) which two of them each key gets

    def scores_of(self, q: Tensor, part: slice) -> Tensor:
        """Attention (L, Q) of queries (Q, D), which are that part of the segment, to all keys."""
        added = None if self.table is None else F.embedding_bag(self.codes, self.table[:, part], mode="sum")
        scores = product(self.k, q, added)
        return torch.softmax(scores, 0, out=scores)


class _Rows(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, queries: Tensor | None, cells: Cells | None, segments: Segments
    ) -> Tensor:
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        for head in _heads(q, k, v, queries, cells, segments):
            values = head.v.T.contiguous()
            for part in _slices(len(head.k)):
                of_queries = q[head.part][part]
                if queries is None:  # queries by keys: softmax is faster along rows
                    scores = product(of_queries.contiguous(), head.k)
                    out[head.part][part] = product(torch.softmax(scores, 1, out=scores), values)
                else:  # keys by queries: so the bias is whole rows of a table
                    out[head.part][part] = product(values, head.scores_of(of_queries, part).T).T
        ctx.save_for_backward(q, k, v, queries, out)
        ctx.cells, ctx.segments = cells, segments
        return out

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")  # without autocast, as the forward pass
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The scores of each slice once more, then what each operand adds to the loss."""
        q, k, v, queries, out = ctx.saved_tensors
        of_q, of_k, of_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        of_queries = None if queries is None else torch.empty_like(queries)
        covers = None if queries is None else cover_of_keys(ctx.cells, q.dtype)
        inner = (grad * out).sum(-1)  # (R, H)
        scale = q.shape[-1] ** -0.5
        for head in _heads(q, k, v, queries, ctx.cells, ctx.segments):
            keys = head.k.T.contiguous()
            cover = None if queries is None else covers[head.part[0]].T.contiguous()
            sum_k, sum_v = torch.zeros_like(keys), torch.zeros_like(keys)  # (D, L)
            for part in _slices(len(head.k)):
                some_q, some_grad = q[head.part][part], grad[head.part][part]
                scores = head.scores_of(some_q, part)  # (L, Q)
                sum_v += product(some_grad.T.contiguous(), scores)
                of_scores = product(head.v, some_grad).sub_(inner[head.part][part]).mul_(scores)
                sum_k += product(some_q.T.contiguous(), of_scores)
                of_q[head.part][part] = product(keys, of_scores.T).T
                if queries is not None:
                    of_queries[head.part][part] = product(cover, of_scores.T).T
            of_k[head.part], of_v[head.part] = sum_k.mul_(scale).T, sum_v.T
        return of_q, of_k, of_v, of_queries, None, None


def _heads(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor | None, cells: Cells | None, segments: Segments
) -> Iterator[_Head]:
    """All heads of all segments."""
    codes = None if queries is None else codes_of_keys(cells)
    offsets = segments.offsets.tolist()
    for start, stop in zip(offsets, offsets[1:]):
        for number in range(q.shape[1]):
            part, table = (slice(start, stop), number), None
            if queries is not None:
                table = pooled_bias(queries[part], cells.size, cells.num_scales).T.contiguous()
            keys = k[part] * q.shape[-1] ** -0.5
            yield _Head(part, keys, v[part].contiguous(), table, None if codes is None else codes[start:stop])


def _slices(length: int) -> Iterator[slice]:
    """Parts of that many queries."""
    count = max(_FEWEST_QUERIES, torch.get_num_threads() * min(_QUERIES, _SCORES // max(length, 1)))
    return (slice(start, start + count) for start in range(0, length, count))
