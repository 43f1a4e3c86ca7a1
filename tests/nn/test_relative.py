"""Relative positions: the mean over all pairs of cells of two patches, from the queries' and from the keys' side."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.layout.packed import build_layout
from apt_dense.layout.tokens import Cells, TokenLayout
from apt_dense.nn.relative import bias_of_padding, relative_bias_of_queries, relative_table
from apt_dense.ops.bias import codes_of_keys, cover_of_keys, pooled_bias

from support.references import noise, random_scale_map, tokens_of

HEADS, DIM = 2, 4


def case_of(window_size: int) -> tuple[list, TokenLayout, Cells]:
    """Tokens of all scales on a grid of 7 x 10 cells, their layout, and where they lie in their window or image."""
    scale_map = random_scale_map(random.Random(2), 2, 7, 10, window_size=window_size)
    layout = build_layout(scale_map, 3, window_size)
    return tokens_of(scale_map, window_size), layout, layout.window_cells if window_size else layout.image_cells


def tables(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return noise(2 * size[0] - 1, DIM, seed=1), noise(2 * size[1] - 1, DIM, seed=2)


def naive_bias(q: Tensor, query: list, key: list, rel_pos: tuple[Tensor, Tensor], size: tuple[int, int]) -> Tensor:
    """The mean, over all pairs of cells (y, x) of a query and a key, of q . Rh[dy] + q . Rw[dx]: (H,)."""
    values = [
        q @ rel_pos[0][yq - yk + size[0] - 1] + q @ rel_pos[1][xq - xk + size[1] - 1]
        for yq, xq in query
        for yk, xk in key
    ]
    return torch.stack(values).mean(0)


@pytest.mark.parametrize("window_size", [0, 4, 5])
def test_relative_bias_is_the_mean_over_pairs_of_cells(window_size: int) -> None:
    tokens, layout, cells = case_of(window_size)
    modulus = window_size or 100
    places = [[(y % modulus, x % modulus) for _, y, x in token.cells()] for token in tokens]
    windows = [(token.image, token.y // modulus, token.x // modulus) for token in tokens]
    q, rel_pos = noise(len(tokens), HEADS, DIM), tables(cells.size)
    queries = relative_bias_of_queries(q, *rel_pos, cells, layout)
    keys = cover_of_keys(cells, torch.float32)
    assert {token.scale for token in tokens} == {0, 1, 2}
    bias = torch.einsum("qhk,nk->qnh", queries, keys)
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            if windows[i] == windows[j]:
                expected = naive_bias(q[i], query, key, rel_pos, cells.size)
                torch.testing.assert_close(bias[i, j], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("relative", [True, False])
def test_padding_weighs_as_much_as_all_padded_cells(relative: bool) -> None:
    window_size = 4
    tokens, layout, cells = case_of(window_size)
    q, rel_pos = 3 * noise(len(tokens), HEADS, DIM), tables(cells.size)
    queries = relative_bias_of_queries(q, *rel_pos, cells, layout) if relative else None
    logits = bias_of_padding(queries, cells).expand(-1, HEADS)
    for i, token in enumerate(tokens):
        top, left = token.y // window_size * window_size, token.x // window_size * window_size
        padded = [
            [(y - top, x - left)]
            for y in range(top, top + window_size)
            for x in range(left, left + window_size)
            if y >= layout.grid[0] or x >= layout.grid[1]
        ]
        query = [(y - top, x - left) for _, y, x in token.cells()]
        if not padded:
            assert (logits[i] == -math.inf).all()
            continue
        biases = [naive_bias(q[i], query, key, rel_pos, cells.size) * relative for key in padded]
        torch.testing.assert_close(logits[i], torch.stack(biases).logsumexp(0), atol=1e-4, rtol=1e-4)


def test_relative_tables_are_interpolated_to_other_sizes() -> None:
    rel_pos = noise(13, DIM)
    assert relative_table(rel_pos, 7) is rel_pos
    for size in (3, 10, 1):
        expected = F.interpolate(rel_pos.T[None], size=2 * size - 1, mode="linear")[0].T
        torch.testing.assert_close(relative_table(rel_pos, size), expected)


@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (4, 13), (1, 3)])
@pytest.mark.parametrize("num_scales", [1, 3])
@pytest.mark.parametrize("window_size", [0, 5])
def test_two_channels_of_the_pooled_bias_are_the_bias_of_a_key(
    grid: tuple[int, int], num_scales: int, window_size: int
) -> None:
    scale_map = random_scale_map(random.Random(3), 2, *grid, num_scales, window_size)
    layout = build_layout(scale_map, num_scales, window_size)
    cells = layout.window_cells if window_size else layout.image_cells
    bias = noise(len(layout.image_N), 2, sum(cells.size))
    cover = cover_of_keys(cells, torch.float32)
    codes = codes_of_keys(cells)
    pooled = pooled_bias(bias, cells.size, num_scales)
    torch.testing.assert_close(pooled[..., codes].sum(-1), bias @ cover.T)
