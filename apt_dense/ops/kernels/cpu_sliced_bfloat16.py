"""``cpu_sliced`` in bfloat16, for CPUs that multiply in it: a head and a slice of queries at a time.

Where there is no matrix unit (AMX), PyTorch's fused kernel attends no faster in bfloat16 than in float32, although
products are three times as fast (two cores of Zen 4: 380 and 130 GFLOP/s).

Products return bfloat16, scores too, whose rounding grows with their size. Softmax does not see what a query adds to
all keys alike, so that this is left out: the mean of the keys, the means of what a query adds for rows and for columns,
and the median of the weights. With DINOv2's weights scores of 64 become 11, and its features are as near to float32's
as with the fused kernel (0.75 % of their norm away, fused 0.80 %; with the keys' mean left in 0.98 %). What is added to
scores, relative positions and weights of keys, is further channels of the products, which sum in float32.

Shape letters: R packed rows, H heads, L rows of a segment, L' the same filled up, Q queries of a slice, D channels of a
head, K rows + columns of cells, C channels of scores: D and those added, a multiple of 8.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from apt_dense.layout.tokens import Cells, Segments
from apt_dense.ops.bias import cover_of_keys
from apt_dense.ops.kernels.sliced_heads import attend_by_head, rows_of_segments
from apt_dense.ops.onednn_matmul import fill_up, whole_rows

_QUERIES = 256  # of a slice, whose scores stay in the cache
_NO_WEIGHT = -1e30  # in place of -inf, whose products are NaN
_CHANNELS = 8  # those added to scores are filled up to a multiple


class _Head(NamedTuple):
    """One head of one segment."""

    part: tuple[slice, int]  # its rows and its number
    length: int  # L of its rows are real
    q: Tensor  # (L', C)
    k: Tensor  # (L', C), scaled and without their mean
    v: Tensor  # (L', D)

    def attention(self, part: slice) -> Tensor:
        """Attention (Q, L') of some queries to all keys."""
        scores = self.q[part] @ self.k.T
        scores[:, self.length :] = -torch.inf
        return torch.softmax(scores, 1, out=scores)

    def attend(self) -> Tensor:
        """The head's outputs (L, D)."""
        outputs = []
        for part in _slices(len(self.q)):
            # A slice's scores are let go after the next ones are there, or allocators return the memory each time.
            attention = self.attention(part)
            outputs.append(attention @ self.v)
        return torch.cat(outputs)[: self.length]


class RowsInBfloat16(torch.autograd.Function):
    """Attention (R, H, D) of operands in bfloat16."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, queries: Tensor | None, cells: Cells | None, segments: Segments,
        logit_R: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out = attend_by_head(v, _heads((q, k, v), queries, cells, segments, logit_R))
        ctx.save_for_backward(q, k, v, queries, logit_R, out)
        ctx.cells, ctx.segments = cells, segments
        return out

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")  # without autocast, as the forward pass
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The attention of each slice once more, then what each operand adds to the loss."""
        q, k, v, queries, logit_R, out = ctx.saved_tensors
        grads = tuple(None if t is None else torch.empty_like(t) for t in (q, k, v, queries))
        for head in _heads((q, k, v), queries, ctx.cells, ctx.segments, logit_R):
            own_grad, own_out = (fill_up(t[head.part], len(head.k)) for t in (grad, out))
            for own, total in zip(_grads_of_head(head, own_grad, own_out), grads, strict=True):
                if total is not None:
                    total[head.part] = own[: head.length, : total.shape[-1]]
        return *grads, None, None, None


def _grads_of_head(head: _Head, grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (L', D) and of the further channels of q (L', C - D).

    Args:
        grad: (L', D), of the head's outputs.
        out: (L', D), these outputs.
    """
    # Softmax's gradient is a score's own less the mean, which is that of the output: two more channels of the product.
    inner = (grad.float() * out).sum(1)
    values = torch.cat([head.v, grad.new_ones(len(grad), 2)], 1)
    grads = torch.cat([grad, -_high_and_low(inner, grad.dtype)], 1)
    width = grad.shape[1]
    grad, queries = grad.contiguous(), head.q[:, :width].contiguous()  # products are slow where rows have gaps
    grad_q, grad_k, grad_v = [], *torch.zeros(2, len(grad), width)
    for part in _slices(len(grad)):
        attention = head.attention(part)
        score_grads = (grads[part] @ values.T).mul_(attention)
        grad_v += attention.T @ grad[part]
        grad_k += score_grads.T @ queries[part]
        grad_q.append(score_grads @ head.k)
    grad_q = torch.cat(grad_q)
    return grad_q[:, :width], grad_k.mul_(width**-0.5), grad_v, grad_q[:, width:]


def _heads(
    qkv: tuple[Tensor, Tensor, Tensor],
    queries: Tensor | None,
    cells: Cells | None,
    segments: Segments,
    logit_R: Tensor | None,
) -> Iterator[_Head]:
    """All heads of all segments that have rows."""
    q, k, v = qkv
    cover = q.new_zeros(len(q), 0) if queries is None else cover_of_keys(cells, q.dtype)
    added = None if queries is None else _without_means(queries, cells.size)
    for rows in rows_of_segments(segments):
        length = rows.stop - rows.start
        whole = whole_rows(length)
        own_keys = fill_up(_channels_of_keys(cover[rows], None if logit_R is None else logit_R[rows]), whole)
        for part in ((rows, number) for number in range(q.shape[1])):
            own_q = _channels_of_queries(q[part], None if added is None else added[part], own_keys.shape[1])
            wide = k[part].float()
            own_k = ((wide - wide.mean(0)) * q.shape[-1] ** -0.5).to(q.dtype)
            own_k = torch.cat([fill_up(own_k, whole), own_keys], 1)
            yield _Head(part, length, fill_up(own_q, whole), own_k, fill_up(v[part], whole).contiguous())


def _without_means(queries: Tensor, size: tuple[int, int]) -> Tensor:
    """Subtract from the biases of each query (R, H, K) their mean over rows and their mean over columns."""
    return torch.cat([part - part.mean(-1, keepdim=True) for part in queries.float().split(list(size), -1)], -1)


def _channels_of_keys(cover: Tensor, logits: Tensor | None) -> Tensor:
    """Build the extra channels of a segment's keys, padded to a multiple of 8: row and column coverage (L, K), and
    logits (L,) relative to their median, split into high and low parts."""
    parts = [cover]
    if logits is not None:
        finite = logits.float().clamp(min=_NO_WEIGHT)
        parts.append(_high_and_low(finite - finite.median(), cover.dtype))
    channels = torch.cat(parts, 1)
    return F.pad(channels, (0, -channels.shape[1] % _CHANNELS))


def _channels_of_queries(q: Tensor, added: Tensor | None, count: int) -> Tensor:
    """Append ``count`` channels to queries (L, D): their biases for rows and columns, then ones for keys' logits."""
    channels = q.new_ones(len(q), count)
    if added is not None:
        channels[:, : added.shape[1]] = added
    return torch.cat([q, channels], 1)


def _high_and_low(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Split numbers (N,) into two of a narrower type (N, 2) whose sum they are."""
    high = values.to(dtype)
    return torch.stack([high, (values - high.float()).to(dtype)], 1)


def _slices(length: int) -> Iterator[slice]:
    """Parts of that many queries."""
    return (slice(start, start + _QUERIES) for start in range(0, length, _QUERIES))
