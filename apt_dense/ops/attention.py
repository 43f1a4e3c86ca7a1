"""Attention over packed segments: the one place that knows which kernels exist and which suits.

| backend | where | relative positions, padding key | backward |
|---|---|---|---|
| sdpa | everywhere: segments of about the same length as a batch | further channels of q and k | fused |
| mask | everywhere | a mask, part by part | keeps the mask |
| rows | CPU: long segments | looked up; a padding key leads to "mask" | of its own |
| varlen | CUDA, 16 bits: torch.nn.attention.varlen or flash-attn | further channels of q and k | fused |
| flex | CUDA: FlexAttention | looked up in the kernel | fused |
"""

import torch
from torch import Tensor

from apt_dense.layout.packed import Segments
from apt_dense.ops import flex, sdpa, sliced, varlen
from apt_dense.ops.bias import PaddingKey, RelativeBias
from apt_dense.ops.linear import is_enabled

_KERNELS = {
    "sdpa": sdpa.sdpa, "mask": sdpa.mask, "rows": sliced.rows, "varlen": varlen.varlen, "flex": flex.flex,
}  # fmt: skip
BACKENDS = ("auto", *_KERNELS)
_LONG_SEGMENT = 512  # rows from which "rows" is faster than "sdpa" and "mask" on a CPU


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    bias: RelativeBias | None = None,
    padding: PaddingKey | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention inside each segment.

    Args:
        q, k, v: (R, H, D), the rows of all segments one after the other.
        segments: of R rows in all.
        bias: added to the scaled logits; None for none.
        padding: an extra key; None for none.
        backend: one of ``BACKENDS``; "auto" chooses by device, type, length and whether gradients are wanted.

    Returns:
        (R, H, D).

    Raises:
        ValueError: for segments of another number of rows, and for a backend that does not exist or cannot run here.
    """
    if len(q) != segments.total:
        raise ValueError(f"{len(q)} rows, but the segments hold {segments.total}: the layout is of another batch")
    if len(q) == 0:
        return v
    backend = _suitable(q, k, v, segments, bias, padding) if backend == "auto" else backend
    _check(backend, q, k, v, bias, padding)
    return _KERNELS[backend](q, k, v, segments, bias, padding)


def _trains(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias | None) -> bool:
    inputs = (q, k, v) if bias is None else (q, k, v, bias.queries_RHK)
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


def _suitable(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, bias: RelativeBias | None, padding: PaddingKey | None
) -> str:
    """The backend that "auto" stands for."""
    on_cpu = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and padding is None and _are_long(segments) and is_enabled() and not _has_fast_fused_kernel(q.dtype):
        return "rows"
    if bias is None and padding is None and segments.is_even:
        return "sdpa"  # a plain batch
    if varlen.obstacle(q, bias, padding) is None:
        return "varlen"
    # "mask" works part by part: many launches on a GPU, and a compiler would unroll them.
    return "mask" if on_cpu and not _trains(q, k, v, bias) else "sdpa"


def _are_long(segments: Segments) -> bool:
    """Whether the segments whose outputs matter are long, by the mean."""
    count = sum(len(bucket.rows) for bucket in segments.buckets)
    return sum(bucket.rows.numel() for bucket in segments.buckets) >= _LONG_SEGMENT * count


def _has_fast_fused_kernel(dtype: torch.dtype) -> bool:
    """Whether PyTorch's fused attention uses a CPU's matrix unit (Intel's AMX), which has bfloat16 at least."""
    names = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}
    return dtype in names and getattr(torch.cpu, names[dtype], lambda: False)()


def _check(
    backend: str, q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias | None, padding: PaddingKey | None
) -> None:
    check_backend(backend)
    obstacle = None
    if backend == "varlen":
        obstacle = varlen.obstacle(q, bias, padding)
    if backend == "rows":
        obstacle = sliced.obstacle(q)
    if backend == "flex":
        obstacle = flex.obstacle(_trains(q, k, v, bias), q.device.type == "cpu")
    if obstacle:
        raise ValueError(f"attention backend {backend!r} cannot run: {obstacle}. 'auto' chooses one that can")


def check_backend(backend: str) -> str:
    """The name itself.

    Raises:
        ValueError: if it is not one of ``BACKENDS``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; expected one of {BACKENDS}")
    return backend
