"""Positions: the trained embedding, resampled as the hosts do it, with coarse samples where the coarse patches are."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from apt_dense.layout.packed import Cells, TokenLayout, build_layout
from apt_dense.nn.positions import (
    MASKED,
    bias_of_padding,
    codes_of_keys,
    cover_of_keys,
    pooled_bias,
    positions_of_scale,
    relative_bias_of_queries,
    relative_table,
    resample_positions,
)

from support.references import bicubic, noise, random_scale_map, tokens_of

GRIDS = [(14, 14), (7, 7), (5, 9), (20, 3), (1, 7), (28, 28)]


def naive_positions(positions: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
    """Antialiased bicubic samples at the centres of the coarse patches, (grid >> scale, C), one by one."""
    rows, columns = [trained / cells for trained, cells in zip(positions.shape[:2], grid, strict=True)]
    side = 2**scale
    table = torch.zeros(grid[0] >> scale, grid[1] >> scale, positions.shape[2])
    for y in range(table.shape[0]):
        for x in range(table.shape[1]):
            weights_y = torch.tensor(bicubic((y + 0.5) * side * rows, positions.shape[0], side * rows))
            weights_x = torch.tensor(bicubic((x + 0.5) * side * columns, positions.shape[1], side * columns))
            table[y, x] = torch.einsum("h,w,hwc->c", weights_y, weights_x, positions)
    return table


@pytest.mark.parametrize("grid", GRIDS)
def test_resampling_with_antialias_is_timms(grid: tuple[int, int]) -> None:
    positions = noise(14, 14, 3)
    expected = resample_abs_pos_embed(positions.view(1, 196, 3), list(grid), [14, 14], num_prefix_tokens=0)
    torch.testing.assert_close(resample_positions(positions, grid).flatten(0, 1), expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [*GRIDS, (1, 1), (20, 1), (3, 1)])
def test_resampling_with_antialias_is_the_cubic_filter(grid: tuple[int, int]) -> None:
    """PyTorch's own antialiased interpolation is wrong on a CPU for a single column, so timm is no oracle there."""
    positions = noise(14, 10, 3)
    expected = naive_positions(positions, grid, 0)
    torch.testing.assert_close(resample_positions(positions, grid), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grid", GRIDS)
def test_resampling_without_antialias_is_plain_interpolation(grid: tuple[int, int]) -> None:
    positions = noise(14, 10, 3)
    # In float64, since PyTorch's float32 is off by more than the bound.
    expected = F.interpolate(positions.double().permute(2, 0, 1)[None], size=grid, mode="bicubic", align_corners=False)
    resampled = resample_positions(positions, grid, antialias=False)
    torch.testing.assert_close(resampled.double(), expected[0].permute(1, 2, 0), atol=1e-6, rtol=0)


def test_the_trained_grid_is_returned_as_it_is() -> None:
    positions = noise(3, 5, 2)
    assert resample_positions(positions, (3, 5)) is positions
    assert positions_of_scale(positions, (3, 5), 0) is positions


@pytest.mark.parametrize("trained", [(8, 8), (5, 7), (1, 1), (3, 12)])
@pytest.mark.parametrize("grid", [(8, 8), (9, 8), (7, 11), (5, 6), (16, 3), (17, 17)])
@pytest.mark.parametrize("scale", [1, 2])
def test_coarse_positions_lie_at_the_centres_of_coarse_patches(
    trained: tuple[int, int], grid: tuple[int, int], scale: int
) -> None:
    positions = noise(*trained, 2)
    table = positions_of_scale(positions, grid, scale)
    torch.testing.assert_close(table, naive_positions(positions, grid, scale), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", range(1, 40))
def test_no_sample_is_lost_to_rounding(size: int) -> None:
    for cells in range(1, 70):
        assert positions_of_scale(torch.ones(size, 3, 1), (cells, 6), 1).shape == (cells // 2, 3, 1)


@pytest.mark.parametrize("grid", [(1, 4), (4, 1), (1, 1)])
def test_grids_without_room_for_a_coarse_patch_have_no_positions(grid: tuple[int, int]) -> None:
    assert positions_of_scale(noise(4, 4, 2), grid, 1).shape == (grid[0] // 2, grid[1] // 2, 2)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("scale", [0, 1, 2])
def test_a_constant_embedding_stays_constant(antialias: bool, scale: int) -> None:
    table = positions_of_scale(torch.full((6, 6, 1), 2.5), (9, 14), scale, antialias)
    torch.testing.assert_close(table, torch.full_like(table, 2.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_embeddings_own_type_is_kept(dtype: torch.dtype) -> None:
    positions = noise(4, 4, 2).to(dtype)
    assert positions_of_scale(positions, (6, 6), 0).dtype == dtype
    expected = positions_of_scale(positions.float(), (7, 6), 1).to(dtype)
    assert torch.equal(positions_of_scale(positions, (7, 6), 1), expected)


def test_gradients_reach_the_embedding() -> None:
    positions = noise(4, 4, 2).requires_grad_()
    (positions_of_scale(positions, (5, 7), 1).sum() + positions_of_scale(positions, (5, 7), 0).sum()).backward()
    assert positions.grad.isfinite().all() and positions.grad.abs().sum() > 0


# ---- relative positions

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
            assert (logits[i] == MASKED).all()
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
