"""Attention of long segments on CPUs, faster than PyTorch's fused kernel: a head and a slice of queries at a time,
whose scores stay in the cache, with oneDNN's products. Computed in float32, 16-bit operands too, but for bfloat16
where the CPU multiplies in it (``cpu_sliced_bfloat16``).

At 2450 rows of 12 heads it takes 70 ms on two cores of Zen 5, fused attention 100 ms (in bfloat16 no less), and 102 to
120 ms with relative positions. On Zen 4, which has less to gain from oneDNN, it takes 140 ms and fused attention 115;
with relative positions 183, and "sdpa" 306 (tools/benchmark_kernels.py). Neither the forward nor the backward pass
holds more than the scores of two slices.

Shape letters: R packed rows, H heads, L rows of a segment, L' the same filled up, Q queries of a slice, D channels of a
head, K rows + columns of cells, K' the same with those of coarse keys (``bias.pooled_bias``).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from apt_dense.layout.tokens import Cells, Segments
from apt_dense.ops.bias import codes_of_keys, cover_of_keys, pooled_bias
from apt_dense.ops.kernels.cpu_sliced_bfloat16 import RowsInBfloat16
from apt_dense.ops.kernels.interface import Inputs, Kernel
from apt_dense.ops.kernels.sdpa_bias_as_mask import mask
from apt_dense.ops.kernels.sliced_heads import attend_by_head, rows_of_segments
from apt_dense.ops.onednn_matmul import fill_up, is_enabled, product, whole_rows
from apt_dense.runtime import (
    has_16_bits,
    has_matrix_unit,
    has_slow_mkl,
    is_transformed,
    multiplies_bfloat16,
    runs_on_host,
    without_autocast,
)

# Queries of a slice: in all, and for each thread, whose scores then stay in its cache (1 MiB in float32).
_FEWEST_QUERIES, _QUERIES, _SCORES = 256, 128, 2**18
# Mean number of rows from which this is faster than "sdpa" and "mask": where MKL is slow; with relative positions
# anywhere (twice as many in training in 16 bits, in which the others compute).
_LONG_SEGMENT, _LONG_WITH_BIAS = 512, 1536
# Where the CPU multiplies bfloat16, with AMX for relative positions only; and in training without such positions.
_LONG_IN_BFLOAT16, _LONG_IN_TRAINING = 768, 2048


def rows(inputs: Inputs) -> Tensor:
    """In float32 the bias is looked up, not multiplied out. ``mask`` where there is a padding key."""
    if inputs.padding is not None:
        return mask(inputs)
    queries, cells = (None, None) if inputs.bias is None else inputs.bias
    kind = RowsInBfloat16 if _in_bfloat16(inputs) else _Rows
    with without_autocast(inputs.q):
        return kind.apply(inputs.q, inputs.k, inputs.v, queries, cells, inputs.segments, inputs.logit_R)


def _in_bfloat16(inputs: Inputs) -> bool:
    """Check whether the slices compute in bfloat16."""
    is_narrow = all(t.dtype == torch.bfloat16 for t in (inputs.q, inputs.k, inputs.v))
    has_onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return is_narrow and has_onednn and multiplies_bfloat16()


def _obstacle(inputs: Inputs) -> str | None:
    if inputs.q.device.type != "cpu":
        return f"it loops over segments on the host, and the tensors are on {inputs.q.device.type}"
    if is_transformed():
        return "it has no derivatives of torch.func or of forward mode"
    return "a compiler cannot follow its loop over segments" if torch.compiler.is_compiling() else None


def _suits(inputs: Inputs) -> bool:
    """Check whether segments are long, and PyTorch's kernels compute in a slower type or with slower products."""
    length, has_bias = inputs.segments.mean_length, inputs.bias is not None
    if inputs.padding is not None or not runs_on_host(inputs.q):
        return False
    if _in_bfloat16(inputs):
        trains_plainly = inputs.trains and not (has_bias or has_slow_mkl())
        least = _LONG_IN_TRAINING if trains_plainly else _LONG_IN_BFLOAT16
        return length >= least and (has_bias or not has_matrix_unit(torch.bfloat16))
    if has_matrix_unit(inputs.q.dtype):
        return False
    if has_slow_mkl() and is_enabled():
        return length >= _LONG_SEGMENT
    factor = 2 if has_16_bits(inputs.q.dtype) and inputs.trains else 1
    return has_bias and length >= _LONG_WITH_BIAS * factor


KERNEL = Kernel(rows, _obstacle, _suits)


class _Head(NamedTuple):
    """One head of one segment, filled up to L' rows (``linear.whole_rows``)."""

    part: tuple[slice, int]  # its rows and its number
    length: int  # L of its rows are real
    q: Tensor  # (L', D)
    k: Tensor  # (L', D), scaled
    v: Tensor  # (L', D)
    table: Tensor | None  # (K', L') biases of the queries
    codes: Tensor | None  # (L', 2) which two of them each key gets
    logits: Tensor | None  # (L',) added for each key

    def by_query(self, part: slice) -> Tensor:
        """Attention (Q, L') of some queries to all keys, without a bias. Softmax is faster along rows."""
        scores = product(self.q[part], self.k)
        if self.logits is not None:
            scores += self.logits
        scores[:, self.length :] = -torch.inf
        return torch.softmax(scores, 1, out=scores)

    def by_key(self, part: slice) -> Tensor:
        """Attention (L', Q) of some queries to all keys. Here the bias is whole rows of a table."""
        bias = None if self.table is None else F.embedding_bag(self.codes, self.table[:, part], mode="sum")
        scores = product(self.k, self.q[part], bias)
        if self.logits is not None:
            scores += self.logits[:, None]
        scores[self.length :] = -torch.inf
        return torch.softmax(scores, 0, out=scores)

    def attend(self) -> Tensor:
        """The head's outputs (L, D)."""
        values, outputs = self.v.T.contiguous(), []
        for part in _slices(len(self.q)):
            # A slice's scores are let go after the next ones are there, or allocators return the memory each time.
            scores = self.by_query(part) if self.table is None else self.by_key(part)
            outputs.append(product(scores, values) if self.table is None else product(values, scores.T).T)
        return torch.cat(outputs)[: self.length]


class _Rows(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, queries: Tensor | None, cells: Cells | None, segments: Segments,
        logit_R: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out = attend_by_head(v, _heads((q, k, v), queries, cells, segments, logit_R))
        ctx.save_for_backward(q, k, v, queries, logit_R)
        ctx.cells, ctx.segments = cells, segments
        return out

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")  # without autocast, as the forward pass
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The attention of each slice once more, then what each operand adds to the loss."""
        q, k, v, queries, logit_R = ctx.saved_tensors
        grads = tuple(None if t is None else torch.empty_like(t) for t in (q, k, v, queries))
        covers = None if queries is None else _wide(cover_of_keys(ctx.cells, q.dtype))
        for head in _heads((q, k, v), queries, ctx.cells, ctx.segments, logit_R):
            own_grad = _wide(fill_up(grad[head.part], len(head.k)))
            cover = None if covers is None else fill_up(covers[head.part[0]], len(head.k)).T.contiguous()
            for own, total in zip(_grads_of_head(head, own_grad, cover), grads, strict=True):
                if total is not None:
                    total[head.part] = own.T[: head.length]
        return *grads, None, None, None


def _grads_of_head(head: _Head, grad: Tensor, cover: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v (D, L') and of the queries' biases (K, L'), if any.

    Args:
        grad: (L', D), of the head's outputs.
        cover: (K, L'), the shares of keys in rows and columns; None without a bias.
    """
    keys, scale = head.k.T.contiguous(), head.q.shape[-1] ** -0.5
    grad_q, grad_bias = [], []
    grad_k, grad_v = torch.zeros_like(keys), torch.zeros_like(keys)
    for part in _slices(len(head.q)):
        attention = head.by_key(part)  # (L', Q)
        grad_v += product(grad[part].T.contiguous(), attention)
        score_grads = product(head.v, grad[part]).mul_(attention)
        score_grads.addcmul_(attention, score_grads.sum(0), value=-1)  # softmax's
        grad_k += product(head.q[part].T.contiguous(), score_grads)
        grad_q.append(product(keys, score_grads.T))
        if cover is not None:
            grad_bias.append(product(cover, score_grads.T))
    return torch.cat(grad_q, 1), grad_k.mul_(scale), grad_v, torch.cat(grad_bias, 1) if grad_bias else None


def _heads(
    qkv: tuple[Tensor, Tensor, Tensor],
    queries: Tensor | None,
    cells: Cells | None,
    segments: Segments,
    logit_R: Tensor | None,
) -> Iterator[_Head]:
    """All heads of all segments that have rows."""
    q = qkv[0]
    codes = None if queries is None else codes_of_keys(cells)
    for own_rows in rows_of_segments(segments):
        length = own_rows.stop - own_rows.start
        whole = whole_rows(length)
        own_codes = None if codes is None else fill_up(codes[own_rows], whole)
        logits = None if logit_R is None else fill_up(logit_R[own_rows].to(_wide(q[:0]).dtype), whole)
        for part in ((own_rows, number) for number in range(q.shape[1])):
            own_q, own_k, own_v = (_wide(fill_up(t[part], whole)).contiguous() for t in qkv)
            table = None
            if queries is not None:
                table = pooled_bias(_wide(fill_up(queries[part], whole)), cells.size, cells.num_scales).T.contiguous()
            yield _Head(part, length, own_q, own_k * q.shape[-1] ** -0.5, own_v, table, own_codes, logits)


def _wide(t: Tensor) -> Tensor:
    """The operand in the type that slices compute in."""
    return t if t.dtype == torch.float64 else t.float()


def _slices(length: int) -> Iterator[slice]:
    """Parts of that many queries."""
    count = max(_FEWEST_QUERIES, torch.get_num_threads() * min(_QUERIES, _SCORES // max(length, 1)))
    return (slice(start, start + count) for start in range(0, length, count))
