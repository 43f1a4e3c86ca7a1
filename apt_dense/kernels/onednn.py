"""Matrix products by oneDNN, in float32 on CPUs.

PyTorch leaves these to MKL, whose float32 products on CPUs of other makers than Intel use half of their vector width:
210 GFLOP/s on two cores of Zen 5, where oneDNN reaches 450. Its other types go to oneDNN anyway. The switch is PyTorch's
own: ``torch.backends.mkldnn.flags(enabled=False)`` leads back to MKL.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function
from torch.utils.flop_counter import register_flop_formula

# PyTorch's internal operator, which its compiler uses; builds without oneDNN lack it.
_EXISTS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

_FEW_PRODUCTS = 2**22  # below, a linear layer is over before ours has begun


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What ``F.linear`` gives, to rounding: x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    if x.numel() * len(weight) < _FEW_PRODUCTS or not _suits(x, weight):
        return F.linear(x, weight, bias)
    return _linear(x.reshape(-1, x.shape[-1]), weight, bias).unflatten(0, x.shape[:-1])


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
    return _product(x, weight, bias)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Linear layers again, so that there are derivatives of any order."""
    x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias = ctx.needs_input_grad
    return (
        linear(grad, weight.T) if of_x else None,
        _across_rows(grad, x) if of_weight else None,
        grad.sum(0) if of_bias else None,
    )


_linear.register_autograd(_backward, setup_context=_keep)


def _across_rows(grad: Tensor, x: Tensor) -> Tensor:
    """grad.T @ x of (R, out) and (R, in). oneDNN copies the left operand, so that should be the smaller one."""
    return linear(grad.T, x.T) if grad.shape[1] < x.shape[1] else linear(x.T, grad.T).T


def _product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, _without_gaps(w), bias, "none", [], "")


def _without_gaps(w: Tensor) -> Tensor:
    """oneDNN takes minutes over rows with gaps between them."""
    return w if w.is_contiguous() or w.T.is_contiguous() else w.contiguous()


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a product that oneDNN takes over: not an empty one, nor one of quantised or distributed weights."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and _is_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not has_torch_function((x, weight))
    )


@torch.compiler.assume_constant_result
def _is_enabled() -> bool:
    return _EXISTS and torch.backends.mkldnn.enabled


@register_flop_formula([torch.ops.apt_dense.linear, *([torch.ops.mkldnn._linear_pointwise] if _EXISTS else [])])
def _flops(x_shape: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
    return 2 * x_shape[-1] * math.prod(out_shape)
