"""Drawing patches: tints, outlines, contrast, cells beyond the image, and arguments that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt_dense import draw_patches
from apt_dense.drawing import DROPPED_LIGHT, FINE_EDGE, TINT, scale_colour

from support.fresh_python import run_fresh


def test_coarse_patches_are_tinted_and_fine_ones_are_not() -> None:
    image = np.full((32, 64, 3), 200, np.uint8)
    scale_map = np.array([[1, 1, 0, 0], [1, 1, 0, 0]])
    drawn = draw_patches(image, scale_map, 16)
    tinted = np.rint(200 + (np.array(scale_colour(1)) - 200) * TINT)
    assert (drawn[8, 8] == tinted).all() and (drawn[8, 40] == 200).all()
    assert (drawn[0, 8] != tinted).any() and (drawn[0, 40] != 200).any() and (image == 200).all()


def test_outlines_are_light_in_dark_cells_and_dark_in_light_ones() -> None:
    image = np.full((16, 32, 3), 200, np.uint8)
    image[:, :16] = 20
    drawn = draw_patches(image, np.zeros((1, 2), int), 16)
    assert (drawn[0, 8] == round(20 + (255 - 20) * FINE_EDGE)).all()
    assert (drawn[0, 24] == round(200 * (1 - FINE_EDGE))).all()


def test_the_contrast_of_a_cell_at_the_edge_is_that_of_its_part_inside() -> None:
    """Padding would darken the light cell on the right, of which a column is to be seen."""
    drawn = draw_patches(np.full((16, 17, 3), 100, np.uint8), np.zeros((1, 2), int), 16)
    assert (drawn[0] == round(100 * (1 - FINE_EDGE))).all()


def test_cells_without_a_token_are_dark() -> None:
    drawn = draw_patches(np.full((8, 8, 3), 100, np.uint8), np.full((1, 1), -1), 8, line=1)
    assert (drawn[4, 4] == round(100 * DROPPED_LIGHT)).all()


def test_wide_lines_and_every_scale_s_own_tint() -> None:
    image = np.full((32, 32, 3), 128, np.uint8)
    drawn = draw_patches(image, np.full((8, 8), 3), 4, line=3)
    assert (drawn[:3] == drawn[0, 0]).all() and (drawn[4, 4] != drawn[0, 0]).any()
    assert len({scale_colour(scale) for scale in range(5)}) == 5


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(1, 4), st.data())
def test_any_scale_map_that_covers_the_image(h: int, w: int, patch_size: int, line: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    image = rng.integers(0, 256, (h, w, 3), np.uint8)
    grid = -(-h // patch_size) + data.draw(st.integers(0, 2)), -(-w // patch_size) + data.draw(st.integers(0, 2))
    scale_map = rng.integers(-1, 3, grid)
    before = image.copy()
    drawn = draw_patches(image, scale_map, patch_size, line)
    assert drawn.shape == image.shape and drawn.dtype == np.uint8 and (image == before).all()
    larger = np.pad(scale_map, ((0, 2), (0, 1)), constant_values=2)  # cells beyond the image change nothing
    assert (draw_patches(image, larger, patch_size, line) == drawn).all()


@pytest.mark.parametrize(
    ("image", "scale_map", "patch_size", "message"),
    [
        (np.zeros((8, 8), np.uint8), np.zeros((1, 1), int), 8, r"image is uint8 of shape \(8, 8\)"),
        (np.zeros((8, 8, 3)), np.zeros((1, 1), int), 8, "image is float64"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((1, 1)), 8, "scale_map is float64"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((1, 1, 1), int), 8, r"shape \(1, 1, 1\)"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros((1, 1), int), 0, "patch_size=0"),
        (np.zeros((9, 8, 3), np.uint8), np.zeros((1, 1), int), 8, r"covers \(8, 8\) pixels, fewer than .*\(9, 8\)"),
    ],
)
def test_arguments_that_do_not_fit(image: np.ndarray, scale_map: np.ndarray, patch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_patches(image, scale_map, patch_size)


def test_tensors_are_drawn_as_arrays_are() -> None:
    image, scale_map = (
        torch.full((32, 32, 3), 90, dtype=torch.uint8),
        torch.tensor([[[1, 1], [1, 1]]], dtype=torch.int8),
    )
    drawn = draw_patches(image, scale_map[0], 16)
    assert np.array_equal(drawn, draw_patches(image.numpy(), scale_map[0].numpy(), 16)) and (image == 90).all()
    with pytest.raises(ValueError, match=r"shape \(1, 2, 2\); expected integers \(h, w\), such as scale_map\[0\]"):
        draw_patches(image, scale_map, 16)


def test_neither_opencv_nor_pillow_is_imported() -> None:
    code = (
        "import sys, apt_dense; before = set(sys.modules); import apt_dense.drawing; "
        "assert not {'cv2', 'PIL'} & (set(sys.modules) - before) and 'cv2' not in sys.modules"
    )
    assert run_fresh(code).returncode == 0


def test_outlines_of_less_strength_change_less() -> None:
    image, scale_map = np.full((64, 64, 3), 200, np.uint8), np.zeros((4, 4), np.int8)
    scale_map[:2, :2] = 1
    full, half, none = (draw_patches(image, scale_map, 16, strength=s).astype(int) for s in (1, 0.5, 0))
    for y, x in ((0, 5), (40, 48)):  # the outline of a large and of a small patch
        steps = [np.abs(picture[y, x] - none[y, x]).max() for picture in (half, full)]
        assert 0 < steps[0] < steps[1]
    assert (full[20, 20] == none[20, 20]).all() and (none[40, 48] == 200).all(), "tints stay"
    with pytest.raises(ValueError, match="strength=2"):
        draw_patches(image, scale_map, 16, strength=2)
