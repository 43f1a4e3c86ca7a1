"""Matrix products by oneDNN, in float32 on CPUs.

PyTorch leaves these to MKL, whose float32 products on CPUs of other makers than Intel use half of their vector width:
210 GFLOP/s on two cores of Zen 5, where oneDNN reaches 460. Its other types go to oneDNN anyway. The switch is PyTorch's
own: ``torch.backends.mkldnn.flags(enabled=False)`` leads back to MKL.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function
from torch.utils.flop_counter import register_flop_formula

_FEW_ENTRIES = 2**15  # of the input: below, PyTorch keeps convolutions from oneDNN, and nothing is gained


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What ``F.linear`` gives, to rounding: x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    if x.numel() < _FEW_ENTRIES or not _suits(x, weight):
        return F.linear(x, weight, bias)
    # Of PyTorch's ways to oneDNN the one that has a backward, and that compilers and FLOP counters know: a convolution
    # of an image one pixel high. Its rows are channels last as they lie.
    image = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    # A kernel of one pixel has nothing to dilate, but with one thread PyTorch keeps undilated ones from oneDNN.
    out = F.conv2d(image, weight[:, :, None, None], bias, dilation=2)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def product(x: Tensor, w: Tensor, addend: Tensor | None = None) -> Tensor:
    """x (M, K) @ w.T (K, N) + addend (M, N), without a backward."""
    if not (_HAS_PRODUCT and _suits(x, w)):
        return x @ w.T if addend is None else torch.addmm(addend, x, w.T)
    if not (w.is_contiguous() or w.T.is_contiguous()):
        w = w.contiguous()  # oneDNN takes minutes over rows with gaps between them
    if addend is None:
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, addend, w, None, "add")


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a product that oneDNN takes over: not one of quantised or distributed weights."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and _is_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not has_torch_function((x, weight))
    )


@torch.compiler.assume_constant_result
def _is_enabled() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


# Smaller products than a linear layer's pay for the way through a convolution, so they take PyTorch's internal one.
_HAS_PRODUCT = hasattr(torch.ops.mkldnn, "_linear_pointwise")
if _HAS_PRODUCT:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape: torch.Size, *_: object, out_shape: torch.Size, **__: object) -> int:
        return 2 * x_shape[-1] * math.prod(out_shape)
