"""Scatter: each cell takes its token, and gathering goes back."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apt_dense.layout.packed import build_layout
from apt_dense.layout.scatter import gather_tokens, scatter_tokens
from apt_dense.layout.tokens import TokenLayout

from support.references import noise, random_scale_map, tokens_of

CASES = given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    dropped=st.sampled_from([0.0, 0.3, 1.0]),
    num_prefix=st.integers(0, 1),
    rng=st.randoms(use_true_random=False),
)


def whole_rows(layout: TokenLayout, width: int = 2) -> Tensor:
    """Rows of whole numbers, whose means are exact, none of them zero."""
    return torch.arange(1.0, len(layout.image_R) * width + 1).view(-1, width)


@CASES
def test_each_cell_takes_its_token(
    batch: int, grid: tuple[int, int], dropped: float, num_prefix: int, rng: random.Random
) -> None:
    scale_map = random_scale_map(rng, batch, *grid, dropped=dropped)
    layout = build_layout(scale_map, 3, num_prefix=num_prefix)
    rows = whole_rows(layout)
    expected = torch.zeros(batch, 2, *grid)
    for patch, token in enumerate(tokens_of(scale_map)):
        for image, y, x in token.cells():
            expected[image, :, y, x] = rows[patch + num_prefix * (image + 1)]
    scattered = scatter_tokens(rows, layout)
    assert torch.equal(scattered, expected) and scattered.is_contiguous()


@CASES
def test_gathering_undoes_scattering(
    batch: int, grid: tuple[int, int], dropped: float, num_prefix: int, rng: random.Random
) -> None:
    layout = build_layout(random_scale_map(rng, batch, *grid, dropped=dropped), 3, num_prefix=num_prefix)
    rows = whole_rows(layout)
    rows[layout.images.offsets[:-1].long().repeat(num_prefix)] = 0
    assert torch.equal(gather_tokens(scatter_tokens(rows, layout), layout), rows)


@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    window_size=st.integers(1, 5),
    rng=st.randoms(use_true_random=False),
)
def test_round_trip_in_windows(grid: tuple[int, int], window_size: int, rng: random.Random) -> None:
    layout = build_layout(random_scale_map(rng, 2, *grid, window_size=window_size), 3, window_size)
    rows = whole_rows(layout)
    assert torch.equal(gather_tokens(scatter_tokens(rows, layout), layout), rows)


def test_a_fine_grid_survives_gathering_and_scattering() -> None:
    layout = build_layout(torch.zeros(2, 3, 4), 1)
    feature_map = noise(2, 5, 3, 4)
    assert torch.equal(scatter_tokens(gather_tokens(feature_map, layout), layout), feature_map)


def test_gathering_takes_the_mean() -> None:
    layout = build_layout(torch.ones(1, 2, 2), 2)
    assert gather_tokens(torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]]), layout).tolist() == [[3.0]]


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_gradient_of_a_row_counts_its_cells(scale: int) -> None:
    layout = build_layout(torch.full((1, 4, 4), scale), 3, num_prefix=1)
    rows = torch.zeros(len(layout.image_R), 1, requires_grad=True)
    scatter_tokens(rows, layout).sum().backward()
    assert rows.grad.flatten().tolist() == [0.0] + [4.0**scale] * (16 // 4**scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_are_kept(dtype: torch.dtype) -> None:
    layout = build_layout(torch.tensor([[[1, 1, 0], [1, 1, -1]]]), 2)
    feature_map = scatter_tokens(torch.ones(2, 3, dtype=dtype), layout)
    assert feature_map.dtype == dtype and gather_tokens(feature_map, layout).dtype == dtype


def test_nothing_to_scatter() -> None:
    layout = build_layout(torch.full((2, 2, 3), -1), 1)
    feature_map = scatter_tokens(torch.zeros(0, 4), layout)
    assert feature_map.shape == (2, 4, 2, 3) and not feature_map.any()
    assert gather_tokens(feature_map, layout).shape == (0, 4)
