"""Convolutions of enlarged maps: PyTorch's interpolation and convolution, to rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from apt_dense.ops import enlarged_conv
from apt_dense.ops.enlarged_conv import conv_of_enlarged, conv_of_levels

from support.references import Convolutions

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(24, 32), (25, 19)])  # the weights of the second are rounded
def test_rounding_is_of_the_size_of_pytorchs_own(dtype: torch.dtype, size: tuple[int, int]) -> None:
    """Sums of nine taps are rounded once more than those inside of a convolution."""
    x, w = drawn(2, 64, 6, 8, dtype=dtype), drawn(64, 64, 3, 3, dtype=dtype)
    exact = reference(x.double(), w.double(), size, False)
    errors = [(f(x, w, size, False).double() - exact).norm() for f in (conv_of_enlarged, reference)]
    assert errors[0] < 2.5 * errors[1] + 1e-5 * exact.norm()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (5, 6)])
def test_no_convolution_of_pytorchs_makes_a_single_row_in_16_bits(shape: tuple[int, int]) -> None:
    """There it may read memory that is not its own; see ``ops/cpu_layers.py``."""
    x, w = drawn(2, 16, *shape, dtype=torch.bfloat16), drawn(16, 16, 3, 3, dtype=torch.bfloat16)
    with Convolutions() as made:
        conv_of_enlarged(x, w, (9, 11))
    assert not made.sides


def test_maps_that_are_not_contiguous() -> None:
    x, weight = drawn(2, 5, 4, 6), drawn(4, 5, 3, 3)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(conv_of_enlarged(last, weight, (8, 12)), reference(x, weight, (8, 12), False))
    flipped = conv_of_enlarged(x.transpose(2, 3), weight, (8, 12))
    torch.testing.assert_close(flipped, reference(x.transpose(2, 3), weight, (8, 12), False))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("corners", [True, False])
def test_levels_are_convolved_as_if_concatenated(bias: bool, corners: bool) -> None:
    """Of the same size, nearly the same, and small ones, in any order."""
    sides = (13, 9), (13, 9), (7, 5), (12, 9), (1, 1)
    levels = [drawn(2, 4 + i, *side) for i, side in enumerate(sides)]
    weight, add = drawn(6, sum(x.shape[1] for x in levels), 3, 3), drawn(6) if bias else None
    enlarged = [F.interpolate(x, (13, 9), mode="bilinear", align_corners=corners) for x in levels[1:]]
    expected = F.conv2d(torch.cat([levels[0], *enlarged], 1), weight, add, padding=1)
    torch.testing.assert_close(conv_of_levels(levels, weight, add, corners), expected)
    alone = weight[:, : levels[0].shape[1]]
    torch.testing.assert_close(conv_of_levels(levels[:1], alone, add), F.conv2d(levels[0], alone, add, padding=1))


def test_only_levels_that_gain_are_convolved_at_their_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the operations that PyTorch counts."""
    own, plain = [], enlarged_conv.conv_of_enlarged
    monkeypatch.setattr(enlarged_conv, "conv_of_enlarged", lambda x, *rest: own.append(x.shape[2]) or plain(x, *rest))
    for channels, expected in ((64, [8, 4]), (8, [4])):
        levels = [drawn(1, channels, side, side) for side in (16, 16, 14, 8, 4)]
        weight = drawn(32, channels * len(levels), 3, 3)
        own.clear()
        with FlopCounterMode(display=False) as counter:
            conv_of_levels(levels, weight, None)
        assert own == expected
        for side in (14, 8, 4):
            with FlopCounterMode(display=False) as small:
                plain(drawn(1, channels, side, side), weight[:, :channels], (16, 16))
            assert (small.get_total_flops() < 2 * 9 * channels * 32 * 16 * 16) == (side in expected)
        assert counter.get_total_flops() < 2 * 9 * channels * len(levels) * 32 * 16 * 16
