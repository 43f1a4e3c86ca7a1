"""Attention by variable-length kernels: all segments in one launch, no padding (CUDA, float16 or bfloat16).

``torch.nn.attention.varlen`` where this PyTorch has it, else the flash-attn package; neither is needed elsewhere.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from apt_dense.layout.tokens import Segments
from apt_dense.ops.bias import Channels, PaddingKey, augment, bias_channels
from apt_dense.ops.kernels.interface import Inputs, Kernel
from apt_dense.runtime import has_16_bits

_MAX_WIDTH = 256  # channels of a head that flash kernels take
#: (q, k, v, offsets of queries, offsets of keys, longest queries, longest keys, scale) -> out, all (R, H, D)
VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]


def _find_kernel() -> VarlenKernel | None:
    """The kernel of this installation; None if it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return _flash_attn_package()
    if "scale" not in inspect.signature(varlen_attn).parameters:  # its first release
        return _flash_attn_package()

    def kernel(*operands: Tensor | int | float) -> Tensor:
        return varlen_attn(*operands[:-1], scale=operands[-1])

    return kernel


def _flash_attn_package() -> VarlenKernel | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def kernel(*operands: Tensor | int | float) -> Tensor:
        return flash_attn_varlen_func(*operands[:-1], softmax_scale=operands[-1])

    return kernel


_KERNEL = _find_kernel()  # once, when this file is imported: compiled graphs cannot hold an import


def varlen(inputs: Inputs) -> Tensor:
    """Terms as further channels of q and k; the key for padding becomes the last row of every segment."""
    return run(_KERNEL, inputs)


def run(kernel: VarlenKernel, inputs: Inputs) -> Tensor:
    """``varlen`` with a given kernel."""
    q, k, v, segments, bias, padding, logit_R = inputs
    offsets, longest, width = segments.offsets, segments.longest, q.shape[-1]
    if not inputs.has_terms and width % 8 == 0:
        return kernel(q, k, v, offsets, offsets, longest, longest, width**-0.5)
    channels = bias_channels(q, bias, padding, logit_R)
    if padding is None:
        q, k, v = augment(q, k, v, channels.queries_RHK, channels.keys_RK)
        return kernel(q, k, v, offsets, offsets, longest, longest, 1.0)[..., :width]
    k, v, keys = _with_padding_rows(k, v, channels, segments, padding)
    q, k, v = augment(q, k, v, channels.queries_RHK, keys)
    one_more = torch.arange(len(offsets), dtype=offsets.dtype, device=offsets.device)
    return kernel(q, k, v, offsets, offsets + one_more, longest, longest + 1, 1.0)[..., :width]


def _obstacle(inputs: Inputs) -> str | None:
    q, bias = inputs.q, inputs.bias
    if q.device.type != "cuda":
        return f"the tensors are on {q.device.type}, not cuda"
    if not has_16_bits(q.dtype):
        return f"they are {q.dtype}; use autocast to float16 or bfloat16"
    if _KERNEL is None:
        return "neither torch.nn.attention.varlen nor the flash-attn package is installed"
    width = q.shape[-1] + (0 if bias is None else bias.queries_RHK.shape[-1])
    width += 2 * (inputs.padding is not None) + (inputs.logit_R is not None)
    if width > _MAX_WIDTH:
        return f"heads of {q.shape[-1]} channels and their relative positions are {width} wide, over {_MAX_WIDTH}"
    return None


KERNEL = Kernel(varlen, _obstacle, suits=lambda inputs: True)


def _with_padding_rows(
    k: Tensor, v: Tensor, channels: Channels, segments: Segments, padding: PaddingKey
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v and the keys' channels with one more row at the end of each segment."""
    count = len(segments.offsets) - 1
    last = segments.offsets[1:].long() + torch.arange(count, device=k.device)
    place = torch.arange(len(k), device=k.device) + segment_of_rows(segments)
    return tuple(
        rows.new_zeros(len(rows) + count, *rows.shape[1:])
        .index_copy(0, place, rows)
        .index_copy(0, last, extra.to(rows.dtype).expand(count, *extra.shape))
        for rows, extra in ((k, padding.k_HD), (v, padding.v_HD), (channels.keys_RK, channels.padding_K))
    )


def segment_of_rows(segments: Segments) -> Tensor:
    """The number (R,) of each row's segment, without waiting for the device."""
    lengths = segments.offsets.diff().long()
    return torch.repeat_interleave(lengths, output_size=segments.total)
