"""Positions: the trained embedding, resampled as the hosts do it, with coarse samples where the coarse patches are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from apt_dense.nn.positions import positions_of_scale, resample_positions

from support.references import bicubic, noise

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
