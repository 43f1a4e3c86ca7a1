"""Calls of modules, with some of their products and convolutions computed in another way on CPUs.

Modules are called as such, so that hooks, pruning, adapters and quantisation work.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from apt_dense.ops.onednn_matmul import linear
from apt_dense.runtime import computes_in_16_bits, is_compiling, is_exporting

Result = TypeVar("Result")


def call_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """Call a module; its linear layers run by :func:`linear`, and so do convolutions of disjoint blocks."""
    if x.device.type != "cpu" or _is_inside_products():
        return layer(x)
    with _Products():
        return layer(x)


def call_on_map(layer: nn.Module, x: Tensor) -> Tensor:
    """Call a module on feature maps (n, C, h, w), whose convolutions are PyTorch's where these are right.

    In 16 bits on CPUs they are not for all maps of one column or row: there values come from memory that nobody wrote,
    or rows are mixed up, with processors and PyTorch versions.
    """
    if x.device.type != "cpu" or not computes_in_16_bits(x) or _is_inside_products():
        return layer(x)
    with _SafeConvolutions():
        return layer(x)


def checkpointed(function: Callable[..., Result], x: Tensor, *args: Any) -> Result:
    """``function(x, *args)``, which calls layers as above, with activations that the backward pass recomputes; those of
    exported graphs are kept."""
    if is_exporting():  # a program that records the recomputation cannot be run
        return function(x, *args)
    # The compiler takes no mode that is entered inside such a function.
    with _Products() if x.device.type == "cpu" and is_compiling() else nullcontext():
        return checkpoint(function, x, *args, use_reentrant=False)


def _is_inside_products() -> bool:
    """Check whether the compiler follows a checkpointed function."""
    return is_compiling() and any(isinstance(mode, _Products) for mode in _get_current_function_mode_stack())


class _SafeConvolutions(TorchFunctionMode):
    """Inside, convolutions in 16 bits are right for narrow maps too."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs or func not in (F.conv2d, F.conv_transpose2d) or not computes_in_16_bits(args[0]):
            return func(*args, **(kwargs or {}))
        return _conv2d(_Convolution(*args)) if func is F.conv2d else _conv_transpose2d(*args)


class _Products(_SafeConvolutions):
    """Inside, linear layers and convolutions of disjoint blocks are products by :func:`linear`."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return linear(*args, **(kwargs or {}))
        if func is F.conv2d and not kwargs and _takes_blocks(_Convolution(*args)) and _lies_in_blocks(*args[:2]):
            return _conv_of_blocks(*_Convolution(*args)[:3])
        return super().__torch_function__(func, types, args, kwargs)


class _Convolution(NamedTuple):
    """The arguments of ``F.conv2d``, with its defaults."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Sequence[int] | int = 1
    padding: Sequence[int] | str | int = 0
    dilation: Sequence[int] | int = 1
    groups: int = 1


def _conv2d(conv: _Convolution) -> Tensor:
    """``F.conv2d``, for narrow outputs as a product or with a row and a column more."""
    sides = None if isinstance(conv.padding, str) else _sides_after(conv)
    if sides is None or 1 not in sides or min(sides) < 1:
        return F.conv2d(*conv)
    if _takes_blocks(conv):
        return _conv_of_blocks(conv.x, conv.weight, conv.bias)
    # Zeros like those of the padding: what was there stays as it was.
    below, right = (step if side == 1 else 0 for side, step in zip(sides, _pair(conv.stride), strict=True))
    wide = F.conv2d(F.pad(conv.x, (0, right, 0, below)), *conv[1:])
    return wide[..., : sides[0], : sides[1]]


def _pair(value: Sequence[int] | int) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _sides_after(conv: _Convolution) -> list[int]:
    """Rows and columns of a convolution's output."""
    settings = (_pair(value) for value in (conv.stride, conv.padding, conv.dilation))
    sides = zip(conv.x.shape[-2:], conv.weight.shape[2:], *settings, strict=True)
    return [(side + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for side, kernel, step, pad, gap in sides]


def _conv_transpose2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sequence[int] | int = 1, *settings: Any
) -> Tensor:
    """``F.conv_transpose2d``, for narrow inputs with a row and a column of zeros more, which add nothing."""
    below, right = (int(side == 1) for side in x.shape[-2:])
    if not below and not right:
        return F.conv_transpose2d(x, weight, bias, stride, *settings)
    rows, columns = _pair(stride)
    wide = F.conv_transpose2d(F.pad(x, (0, right, 0, below)), weight, bias, stride, *settings)
    return wide[..., : wide.shape[-2] - below * rows, : wide.shape[-1] - right * columns]


def _takes_blocks(conv: _Convolution) -> bool:
    """Check whether a convolution takes each pixel of a batch of maps once."""
    if isinstance(conv.padding, str):
        return False
    x, kernel = conv.x, tuple(conv.weight.shape[2:])
    is_plain = _pair(conv.padding) == (0, 0) and _pair(conv.dilation) == (1, 1) and conv.groups == 1
    covers = _pair(conv.stride) == kernel and x.ndim == 4
    return is_plain and covers and all(side % k == 0 for side, k in zip(x.shape[2:], kernel, strict=True))


def _lies_in_blocks(x: Tensor, weight: Tensor) -> bool:
    """Check whether maps lie channels last in memory, or are single blocks, so that a product is the faster way."""
    return x.stride(1) == 1 or x.shape[2:] == weight.shape[2:]


def _conv_of_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of disjoint blocks as one product: x (n, C, h * kh, w * kw) -> (n, out, h, w)."""
    kh, kw = weight.shape[2:]
    if x.stride(1) != 1 and x.shape[2:] == weight.shape[2:]:  # a single block per image, channels first
        return linear(x.flatten(1), weight.flatten(1), bias)[:, :, None, None]
    n, channels, height, width = x.shape
    blocks = x.permute(0, 2, 3, 1).reshape(n, height // kh, kh, width // kw, kw, channels).transpose(2, 3)
    rows = linear(
        blocks.reshape(n, height // kh, width // kw, kh * kw * channels), weight.permute(0, 2, 3, 1).flatten(1), bias
    )
    return rows.permute(0, 3, 1, 2)
