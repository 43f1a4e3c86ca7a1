"""Convolutions of enlarged maps: PyTorch's interpolation and convolution, to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apt_dense.ops.enlarged_conv import conv_of_enlarged, conv_of_levels

SIDES = st.integers(1, 7)


def reference(x: Tensor, weight: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return F.conv2d(F.interpolate(x, size, mode="bilinear", align_corners=align_corners), weight, padding=1)


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@given(
    batch=st.integers(1, 3),
    h=SIDES,
    w=SIDES,
    size=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    corners=st.booleans(),
)
def test_values_and_gradients(batch: int, h: int, w: int, size: tuple[int, int], corners: bool) -> None:
    """Of any sizes, also where a side shrinks."""
    x, weight = drawn(batch, 5, h, w), drawn(4, 5, 3, 3)
    results = [function(x, weight, size, corners) for function in (conv_of_enlarged, reference)]
    upstream = drawn(*results[1].shape)
    gradients = [torch.autograd.grad(result, (x, weight), upstream) for result in results]
    torch.testing.assert_close(*results, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=1e-10)


def test_second_derivatives() -> None:
    x, weight = drawn(1, 2, 2, 3), drawn(2, 2, 3, 3)
    assert torch.autograd.gradgradcheck(lambda x, weight: conv_of_enlarged(x, weight, (4, 5)), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_of_the_size_of_pytorchs_own(dtype: torch.dtype) -> None:
    """Sums of nine taps are rounded once more than those inside of a convolution."""
    x, w = drawn(2, 64, 6, 8, dtype=dtype), drawn(64, 64, 3, 3, dtype=dtype)
    exact = reference(x.double(), w.double(), (24, 32), False)
    errors = [(f(x, w, (24, 32), False).double() - exact).norm() for f in (conv_of_enlarged, reference)]
    assert errors[0] < 2 * errors[1] + 1e-5 * exact.norm()


def test_maps_that_are_not_contiguous() -> None:
    x, weight = drawn(2, 5, 4, 6), drawn(4, 5, 3, 3)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(conv_of_enlarged(last, weight, (8, 12)), reference(x, weight, (8, 12), False))
    flipped = conv_of_enlarged(x.transpose(2, 3), weight, (8, 12))
    torch.testing.assert_close(flipped, reference(x.transpose(2, 3), weight, (8, 12), False))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("corners", [True, False])
def test_levels_are_convolved_as_if_concatenated(bias: bool, corners: bool) -> None:
    levels = [drawn(2, 3, 13, 9), drawn(2, 4, 7, 5), drawn(2, 2, 1, 1)]
    weight, add = drawn(6, 9, 3, 3), drawn(6) if bias else None
    enlarged = [F.interpolate(x, (13, 9), mode="bilinear", align_corners=corners) for x in levels[1:]]
    expected = F.conv2d(torch.cat([levels[0], *enlarged], 1), weight, add, padding=1)
    torch.testing.assert_close(conv_of_levels(levels, weight, add, corners), expected)
    torch.testing.assert_close(
        conv_of_levels(levels[:1], weight[:, :3], add), F.conv2d(levels[0], weight[:, :3], add, padding=1)
    )
