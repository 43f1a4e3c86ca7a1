"""Partition: every cell is covered exactly once, by the largest patch that is flat and crosses no border."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apt_dense.patches.image_preparation import filled_region
from apt_dense.patches.partition import DROPPED, Bounds, paint_blocks, partition_by_thresholds

from support.references import is_partition, within_window

PATCH = 4


def naive_uncut(region: Tensor, y: int, x: int, scale: int, window_size: int) -> bool:
    """Whether the patch with that top left cell is wholly inside the region or wholly outside, in one window."""
    side, size = 2**scale, PATCH * 2**scale
    (rows, columns), top, left = region.tolist(), y * PATCH, x * PATCH
    inside = top + size <= rows and left + size <= columns
    outside = top >= rows or left >= columns
    return (inside or outside) and within_window(y, x, side, window_size)


def naive_scale(scores: list[Tensor], thresholds: list[float], region: Tensor, y: int, x: int, window: int) -> int:
    """The scale of the patch over a cell: the largest one that may stay whole."""
    for scale in range(len(thresholds), 0, -1):
        row, column = y >> scale, x >> scale
        if row >= scores[scale - 1].shape[0] or column >= scores[scale - 1].shape[1]:
            continue
        flat = scores[scale - 1][row, column].item() < thresholds[scale - 1]
        if flat and naive_uncut(region, row << scale, column << scale, scale, window):
            return scale
    return 0


def maps_of(grid: tuple[int, int], scales: int, values: list[float], rng: random.Random) -> list[Tensor]:
    """Random score maps (2, grid >> s) with values of a short list, so that ties with thresholds occur."""
    shapes = [(2, grid[0] >> s, grid[1] >> s) for s in range(1, scales + 1)]
    return [
        torch.tensor(rng.choices(values, k=math.prod(shape) or 1)[: math.prod(shape)]).view(shape) for shape in shapes
    ]


# ---- thresholds -> scale map


@given(
    grid=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    scales=st.integers(0, 3),
    window_size=st.sampled_from([0, 0, 1, 2, 3, 4, 5, 7]),
    rng=st.randoms(use_true_random=False),
)
def test_each_cell_takes_the_largest_patch_allowed(
    grid: tuple[int, int], scales: int, window_size: int, rng: random.Random
) -> None:
    scores = maps_of(grid, scales, [0.0, 1.0, 2.0, float("nan")], rng)
    thresholds = sorted(rng.choices([-1.0, 0.0, 1.0, 1.5, 3.0], k=scales), reverse=True)
    region = torch.tensor([[rng.randint(1, cells * PATCH) for cells in grid] for _ in range(2)])
    scale_map = partition_by_thresholds(scores, thresholds, Bounds(region, grid, PATCH, window_size))
    assert scale_map.dtype == torch.int8 and scale_map.shape == (2, *grid)
    expected = [
        [
            [naive_scale([s[b] for s in scores], thresholds, region[b], y, x, window_size) for x in range(grid[1])]
            for y in range(grid[0])
        ]
        for b in range(2)
    ]
    assert scale_map.tolist() == expected
    assert is_partition(scale_map, scales + 1)


def test_small_example() -> None:
    scores = [torch.tensor([[[1.0, 9.0], [1.0, 1.0]]]), torch.tensor([[[5.0]]])]
    region = torch.tensor([[16, 16]])
    mixed = partition_by_thresholds(scores, (2.0, 2.0), Bounds(region, (4, 4), PATCH))
    assert mixed.tolist() == [[[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]]
    whole = partition_by_thresholds(scores, (2.0, 6.0), Bounds(region, (4, 4), PATCH))
    assert (whole == 2).all()


def test_a_score_that_equals_the_threshold_is_not_flat() -> None:
    region = torch.tensor([[8, 8]])
    assert (partition_by_thresholds([torch.tensor([[[3.0]]])], (3.0,), Bounds(region, (2, 2), PATCH)) == 0).all()


@pytest.mark.parametrize("grid", [(1, 1), (1, 8), (3, 1), (0, 4), (2, 0)])
def test_grids_without_room_for_coarse_patches_stay_fine(grid: tuple[int, int]) -> None:
    scores = [torch.zeros(1, grid[0] >> s, grid[1] >> s) for s in (1, 2)]
    region = torch.tensor([[grid[0] * PATCH, grid[1] * PATCH]])
    scale_map = partition_by_thresholds(scores, (1.0, 1.0), Bounds(region, grid, PATCH))
    assert scale_map.tolist() == torch.zeros(1, *grid).tolist()


def test_empty_batch() -> None:
    region = torch.zeros(0, 2, dtype=torch.long)
    scale_map = partition_by_thresholds([torch.zeros(0, 2, 2)], (1.0,), Bounds(region, (4, 4), PATCH))
    assert scale_map.shape == (0, 4, 4)


def test_score_maps_and_thresholds_must_pair_up() -> None:
    with pytest.raises(ValueError, match="zip"):
        partition_by_thresholds([torch.zeros(1, 2, 2)], (1.0, 1.0), Bounds(torch.tensor([[16, 16]]), (4, 4), PATCH))


@given(
    grid=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    scale=st.integers(0, 3),
    window_size=st.integers(0, 6),
    rng=st.randoms(use_true_random=False),
)
def test_uncut_blocks_cross_no_edge(grid: tuple[int, int], scale: int, window_size: int, rng: random.Random) -> None:
    region = torch.tensor([[rng.randint(0, cells * PATCH) for cells in grid] for _ in range(3)])
    uncut = Bounds(region, grid, PATCH, window_size).uncut(scale)
    rows, columns = grid[0] >> scale, grid[1] >> scale
    assert uncut.shape == (3, rows, columns)
    for image in range(3):
        for y in range(rows):
            for x in range(columns):
                expected = naive_uncut(region[image], y << scale, x << scale, scale, window_size)
                assert uncut[image, y, x].item() == expected


def test_paint_blocks_leaves_the_other_cells() -> None:
    scale_map = torch.zeros(1, 3, 5, dtype=torch.int8)
    paint_blocks(scale_map, torch.tensor([[[False, True]]]), 1)
    assert scale_map.tolist() == [[[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]]


# ---- padding


def naive_region(image: Tensor) -> list[int]:
    """Last row and column, counted from 1, with a pixel that is not 0; all of them if there is none."""
    _, height, width = image.shape
    filled = [(y, x) for y in range(height) for x in range(width) if any(image[:, y, x] != 0)]
    if not filled:
        return [height, width]
    return [max(y for y, _ in filled) + 1, max(x for _, x in filled) + 1]


@given(size=st.tuples(st.integers(1, 6), st.integers(1, 6)), rng=st.randoms(use_true_random=False))
def test_filled_region_ends_at_the_last_pixel(size: tuple[int, int], rng: random.Random) -> None:
    values = [rng.choices([0.0, 0.0, 0.0, -1.0, 1.0, float("nan")], k=size[0] * size[1] * 3) for _ in range(3)]
    images = torch.tensor(values).view(3, 3, *size)
    assert filled_region(images).tolist() == [naive_region(image) for image in images]


def test_pixels_that_cancel_out_are_no_padding() -> None:
    images = torch.zeros(1, 3, 4, 4)
    images[0, :, 2, 3] = torch.tensor([1.0, -1.0, 0.0])
    assert filled_region(images).tolist() == [[3, 4]]


def test_padding_takes_part_in_large_patches_but_not_across_its_edge() -> None:
    images = torch.zeros(1, 3, 16, 16)
    images[..., :, :6] = 1.0  # ends inside the second column of cells
    scores = [torch.zeros(1, 2, 2), torch.zeros(1, 1, 1)]
    bounds = Bounds(filled_region(images), (4, 4), PATCH)
    scale_map = partition_by_thresholds(scores, (1.0, 1.0), bounds)
    assert scale_map[0].tolist() == [[0, 0, 1, 1]] * 4
    assert bounds.drop_padding(scale_map)[0].tolist() == [[0, 0, -1, -1]] * 4


@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    scales=st.integers(0, 2),
    rng=st.randoms(use_true_random=False),
)
def test_dropping_keeps_exactly_the_cells_with_a_filled_pixel(
    grid: tuple[int, int], scales: int, rng: random.Random
) -> None:
    region = torch.tensor([[rng.randint(1, cells * PATCH) for cells in grid] for _ in range(2)])
    scores = maps_of(grid, scales, [0.0, 2.0], rng)
    bounds = Bounds(region, grid, PATCH)
    whole = partition_by_thresholds(scores, [1.0] * scales, bounds)
    kept = bounds.drop_padding(whole)
    for (image, y, x), scale in np.ndenumerate(kept.numpy()):
        filled = y * PATCH < region[image, 0] and x * PATCH < region[image, 1]
        assert scale == (whole[image, y, x] if filled else DROPPED)
    assert kept.dtype == torch.int8 and is_partition(kept, scales + 1)


@pytest.mark.parametrize("window, shares", [(14, [1.0, 0.77, 0.39]), (16, [1.0] * 3), (32, [1.0] * 3)])
def test_blocks_from_each_window_s_corner_would_cover_no_more(window: int, shares: list[float]) -> None:
    """The figures of docs/THRESHOLDS.md: ViTDet's grid of 64 x 64 cells."""
    bounds = Bounds(torch.tensor([[64, 64]]), (64, 64), 1, window)
    for scale, share in enumerate(shares, start=1):
        side = 2**scale
        from_corners = sum((min(window, 64 - corner) // side) for corner in range(0, 64, window))
        assert bounds.within_windows(scale).sum() == from_corners**2
        assert (from_corners * side / 64) ** 2 == pytest.approx(share, abs=0.005)
