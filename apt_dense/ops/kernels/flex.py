"""Attention by FlexAttention: relative positions looked up inside the kernel, blocks of other segments skipped.

Compiled on CUDA. On a CPU PyTorch runs it without compiling and without a backward, which serves as a check only.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from apt_dense.ops.bias import PaddingKey, codes_of_keys, pooled_by_axis
from apt_dense.ops.kernels.interface import Inputs, Kernel
from apt_dense.ops.kernels.varlen import segment_of_rows

try:
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
except ImportError:  # an older PyTorch
    flex_attention = None

_BLOCK = 128  # rows of a block of the mask, FlexAttention's default


def flex(inputs: Inputs) -> Tensor:
    """One launch for all segments."""
    q, k, v, segments, bias, padding, logit_R = inputs
    attend = _compiled() if q.is_cuda and not torch.compiler.is_compiling() else _attend
    segment_R = segment_of_rows(segments)
    by_axis = codes = None
    if bias is not None:
        by_axis = pooled_by_axis(bias.queries_RHK, bias.cells.size, bias.cells.num_scales)
        codes = codes_of_keys(bias.cells)
    out, lse = attend(q, k, v, segment_R, segments.offsets, by_axis, codes, logit_R)
    return out if padding is None else _merge(out, lse, q, padding)


def _obstacle(inputs: Inputs) -> str | None:
    if flex_attention is None:
        return "this PyTorch has no FlexAttention that returns sums; 2.9 has"
    if inputs.trains and inputs.q.device.type == "cpu":
        return "it has no backward on a CPU; use it under torch.no_grad()"
    return None


KERNEL = Kernel(flex, _obstacle, suits=lambda inputs: False)


@cache
def _compiled() -> Any:
    return torch.compile(_attend, dynamic=True)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, segment_R: Tensor, offsets: Tensor, by_axis: list[Tensor] | None,
    codes: Tensor | None, logit_R: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs (R, H, D) and the logarithms (R, H) of the sums of exponentials."""
    # The backward takes one index into a tensor that needs gradients, so rows and columns are two.
    rows, columns = by_axis or (None, None)

    def add_terms(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if rows is not None:
            column = codes[key, 1] - rows.shape[-1]
            score = score + rows[query, head, codes[key, 0]] + columns[query, head, column]
        return score if logit_R is None else score + logit_R[key]

    block_mask = _block_mask(segment_R, offsets)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    score_mod = None if rows is None and logit_R is None else add_terms
    out, aux = flex_attention(q, k, v, score_mod, block_mask, return_aux=AuxRequest(lse=True))
    return out[0].transpose(0, 1), aux.lse[0].T


def _block_mask(segment_R: Tensor, offsets: Tensor) -> "BlockMask":
    """The blocks of keys that each block of queries needs: from the first row of its first segment to the last row of
    its last. Arithmetic on the offsets, so that nothing of R x R is made."""
    total = len(segment_R)
    blocks = -(-total // _BLOCK)
    first = torch.arange(blocks, device=segment_R.device) * _BLOCK
    last = (first + _BLOCK - 1).clamp(max=total - 1)
    low = offsets[segment_R[first]] // _BLOCK
    high = (offsets[segment_R[last] + 1] - 1) // _BLOCK
    indices = (low[:, None] + torch.arange(blocks, device=low.device)).clamp(max=blocks - 1)
    return BlockMask.from_kv_blocks(
        (high - low + 1).int()[None, None],
        indices.int()[None, None],
        BLOCK_SIZE=_BLOCK,
        mask_mod=lambda batch, head, query, key: segment_R[query] == segment_R[key],
        seq_lengths=(total, total),
    )


def _merge(out: Tensor, lse: Tensor, q: Tensor, padding: PaddingKey) -> Tensor:
    """Add a key to a finished softmax: its share is the sigmoid of its logit against the others' log-sum-exp."""
    logit = (q * padding.k_HD).sum(-1) * q.shape[-1] ** -0.5 + padding.logit_RH
    share = torch.sigmoid(logit.float() - lse.float())[..., None].to(out.dtype)
    return out * (1 - share) + padding.v_HD * share
