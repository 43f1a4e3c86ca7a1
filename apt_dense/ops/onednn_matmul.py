"""Matrix products by oneDNN, in float32 on CPUs, and the row counts that it likes.

PyTorch leaves these products to MKL, which on AMD's CPUs runs AVX2 code: 210 GFLOP/s on two cores of Zen 5, where
oneDNN reaches 450. On Zen 4, which takes two cycles for 512 bits, oneDNN is a tenth ahead in forward passes and behind
in training; on Intel's MKL is the faster one, and is left alone (``is_faster``). PyTorch's other types go to oneDNN
anyway. PyTorch's own switch ``torch.backends.mkldnn.flags(enabled=False)`` leads back to MKL (in compiled code as it
was when compiled).

oneDNN compiles a kernel for every new shape, about 0.7 MB each, and keeps hundreds of them. Adaptive patches make a new
row count with every image, so rows are filled up to :func:`whole_rows`, of which there are few.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function
from torch.utils.flop_counter import flop_registry, register_flop_formula

from apt_dense.ops.measured_kernel_choice import Case, fastest
from apt_dense.runtime import computes_in_16_bits, has_avx512, has_slow_mkl, is_amd, is_transformed, runs_on_host

# PyTorch's internal operator, which its compiler uses; builds without oneDNN lack it.
_EXISTS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

PRODUCTS = "pytorch", "onednn"
_FEW_PRODUCTS = 2**22  # smaller products are faster through F.linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``F.linear``, up to rounding: x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    if x.numel() * len(weight) < _FEW_PRODUCTS or not _suits(x, weight, bias):
        return F.linear(x, weight, bias)
    return onednn_linear(x, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear`, by oneDNN on any processor: float32 operands on a CPU."""
    return _linear(x.reshape(-1, x.shape[-1]), weight, bias).reshape(*x.shape[:-1], -1)


def whole_rows(count: int) -> int:
    """Round a row count up to one of the few sizes that kernels are compiled for: multiples of 16, and from 512 on 32
    sizes between powers of two, so that it adds at most a thirty-second."""
    step = 1 << max(4, count.bit_length() - 6)
    return -(-count // step) * step


def fill_up(rows: Tensor, count: int) -> Tensor:
    """Rows (R, ...), followed by rows of zeros up to that count."""
    if len(rows) == count:
        return rows
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def fill_rows(rows: Tensor, spare: int = 0) -> Tensor:
    """Rows (R, ...), followed by rows of zeros, ``spare`` at least, up to a count that kernels are compiled for, where
    that matters: on CPUs, for products of oneDNN's, which has those of 16 bits anyway."""
    if not runs_on_host(rows):
        return rows
    by_onednn = is_enabled(rows.requires_grad) or computes_in_16_bits(rows)
    return fill_up(rows, whole_rows(len(rows) + spare) if by_onednn else len(rows) + spare)


def product(x: Tensor, w: Tensor, addend: Tensor | None = None) -> Tensor:
    """x (M, K) @ w.T (K, N) + addend (M, N), without a backward."""
    if not _suits(x, w):
        return x @ w.T if addend is None else torch.addmm(addend, x, w.T)
    if addend is None:
        return _product(x, w)
    return torch.ops.mkldnn._linear_pointwise.binary(x, addend, _without_gaps(w), None, "add")


@torch.library.custom_op("apt_dense::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """An operator of our own, for compilers to leave alone: theirs takes PyTorch's apart for constant weights only."""
    return _product(fill_up(x, whole_rows(len(x))), weight, bias)[: len(x)]


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Linear layers again, so that there are derivatives of any order."""
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    return (
        linear(grad, weight.T) if needs_x else None,
        _across_rows(grad.contiguous(), x) if needs_weight else None,
        grad.sum(0) if needs_bias else None,
    )


_linear.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("apt_dense::across_rows", mutates_args=(), device_types="cpu")
def _across_rows(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient grad.T @ x of weights, of (R, out) and (R, in): (out, in)."""
    grad, x = (fill_up(t, whole_rows(len(t))) for t in (grad, x))
    # oneDNN copies the left operand, so that should be the smaller one.
    if grad.shape[1] < x.shape[1]:
        return _product(grad.T, x.T)
    return _product(x.T, grad.T).T.contiguous()


@_across_rows.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(grad.shape[1], x.shape[1])


def _backward_across_rows(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad_outputs, x = ctx.saved_tensors
    return linear(x, grad), linear(grad_outputs, grad.T)


_across_rows.register_autograd(
    _backward_across_rows, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def _product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, _without_gaps(w), bias, "none", [], "")


def _without_gaps(w: Tensor) -> Tensor:
    """oneDNN takes minutes over rows with gaps between them."""
    return w if w.is_contiguous() or w.T.is_contiguous() else w.contiguous()


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Check whether this is a product that oneDNN takes over: not an empty one, nor one of quantised or distributed
    weights, nor one with a mistake in it, which PyTorch names better."""
    trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and is_enabled(trains)
        and not torch.is_autocast_enabled("cpu")
        and x.shape[-1] == weight.shape[-1]
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == torch.float32))
        and not has_torch_function((x, weight) if bias is None else (x, weight, bias))
    )


@torch.compiler.assume_constant_result
def is_enabled(trains: bool = False) -> bool:
    """Check whether oneDNN takes over anything at all: where its products are the faster ones, but not in what
    ``is_transformed``.

    Args:
        trains: whether a backward pass follows.
    """
    return _EXISTS and is_faster(trains) and torch.backends.mkldnn.enabled and not is_transformed()


def is_faster(trains: bool = False) -> bool:
    """Check whether oneDNN's float32 products beat PyTorch's on this machine, without or with a backward pass: by what
    was measured there, else by facts about the processor."""
    found = fastest(Case("linear", "float32", 0, "", trains), "pytorch", PRODUCTS)
    if found is not None:
        return found == "onednn"
    return has_slow_mkl() or (is_amd() and has_avx512() and not trains)


_LINEAR = [torch.ops.apt_dense.linear, *([torch.ops.mkldnn._linear_pointwise] if _EXISTS else [])]


@register_flop_formula([operator for operator in _LINEAR if operator not in flop_registry])
def _(x_shape: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    return 2 * x_shape[-1] * math.prod(out_shape)


@register_flop_formula(torch.ops.apt_dense.across_rows)
def _(grad_shape: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    return 2 * grad_shape[0] * math.prod(out_shape)
