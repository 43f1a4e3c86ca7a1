"""PatchSelector: the backbone's choice of patches without its weights, and the checks of what is asked for."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from apt_dense import APTViT, PatchSelector
from apt_dense.patches.partition import DROPPED

from support.references import is_partition, noise, normalise, tokens_of

CHOICES = {
    "uniform": {},
    "thresholds": {"thresholds": (4.0, 3.0)},
    "windows": {"thresholds": (4.0,), "window_size": 5},
    "padding": {"thresholds": (4.0, 3.0), "drop_padding": True},
    "uniform without padding": {"drop_padding": True},
    "budget": {"thresholds": (4.0, 3.0), "token_budget": 0.5},
    "budget without padding": {"thresholds": (4.0, 3.0), "token_budget": 60, "drop_padding": True},
    "cropped": {"thresholds": (4.0,), "partial_patches": "crop"},
    "scorer": {"thresholds": (0.2,), "scorer": "laplacian"},
}


def photos(rows: int = 50, columns: int = 38) -> Tensor:
    """Noise that is flat in places, the second image with padding at the right and bottom."""
    images = normalise(128 + 40 * noise(2, 3, rows, columns).clamp(-3, 3))
    images[:, :, : rows // 2, : columns // 2] = images[:, :, :1, :1]
    images[1, :, -13:] = 0
    images[1, :, :, -9:] = 0
    return images


@pytest.mark.parametrize("name", CHOICES)
def test_the_backbone_cuts_images_the_same_way(name: str) -> None:
    choice, images = CHOICES[name], photos()
    windows = {"window_block_indexes": (0,)} if "window_size" in choice else {}
    model = APTViT(img_size=64, patch_size=4, embed_dim=8, depth=1, num_heads=1, **choice, **windows)
    selector = PatchSelector(patch_size=4, **choice)
    scale_map = selector.scale_map(images)
    assert torch.equal(scale_map, model.partition(images)) and is_partition(scale_map, selector.num_scales)
    assert (scale_map == DROPPED).any() == selector.drop_padding
    tokens = tokens_of(scale_map)
    counts = [[sum(t.image == i and t.scale == s for t in tokens) for s in range(selector.num_scales)] for i in (0, 1)]
    assert selector.count(images).tolist() == counts
    shares = [sum(per_scale) / scale_map[0].numel() for per_scale in counts]
    torch.testing.assert_close(selector.tokens_kept(images), torch.tensor(shares))


def test_it_is_a_value() -> None:
    selector = PatchSelector(patch_size=8, thresholds=[5, 4])
    assert selector == PatchSelector(patch_size=8, thresholds=(5.0, 4.0)) == pickle.loads(pickle.dumps(selector))
    assert replace(selector, thresholds=(6.0,)).thresholds == (6.0,)
    with pytest.raises(AttributeError):
        selector.patch_size = 16


def test_images_are_checked() -> None:
    selector = PatchSelector(patch_size=4, thresholds=(4.0,))
    images = photos()
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"images \[1\] of the batch hold NaN"):
        selector.scale_map(images)
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        selector.count(images[:, :2])


# ---- thresholds


def selector(thresholds: object, img_size: tuple[int, int]) -> PatchSelector:
    return PatchSelector(thresholds=thresholds, img_size=img_size)


@pytest.mark.parametrize(
    "thresholds",
    [(), [], (5.5,), [5.5, 4], (4.0, 4.0), (np.float32(5.5), np.int64(4)), (Fraction(1, 2),), (math.inf, -math.inf)],
)
def test_sequences_of_numbers_become_floats(thresholds: list) -> None:
    checked = selector(thresholds, (512, 512)).thresholds
    assert checked == tuple(thresholds) and all(type(value) is float for value in checked)


@pytest.mark.parametrize("thresholds", [5.5, 3, "5.5", b"5", None, {5.5, 4.0}, {5.5: 1}, torch.tensor([5.5])])
def test_thresholds_that_are_no_sequence_are_refused(thresholds: object) -> None:
    with pytest.raises(TypeError, match=r"must be a sequence.*\(5\.5, 4\.0\)"):
        selector(thresholds, (512, 512))


@pytest.mark.parametrize("bad", [True, "4", None, float("nan"), 1j, [4.0]])
def test_thresholds_that_are_no_numbers_are_named(bad: object) -> None:
    with pytest.raises(TypeError, match="is not a number") as error:
        selector((5.5, bad), (512, 512))
    assert repr(bad) in str(error.value)


def test_thresholds_that_rise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4\.0, 5\.5\) rise"):
        selector((4.0, 5.5), (512, 512))


def test_as_many_thresholds_as_the_image_has_room_for() -> None:
    assert len(selector((3.0, 2.0), (64, 64)).thresholds) == 2
    with pytest.raises(ValueError, match="at most 2 thresholds"):
        selector((3.0, 2.0, 1.0), (64, 100))
    with pytest.raises(ValueError, match="at most 0 thresholds"):
        selector((3.0,), (8, 8))


def test_patches_are_no_larger_than_windows() -> None:
    with pytest.raises(ValueError, match=r"covers 8 cells, more than window_size=5; give at most 2 thresholds"):
        PatchSelector(thresholds=(4.0,) * 3, window_size=5)


# ---- budgets


@pytest.mark.parametrize(
    "budget, thresholds, error, message",
    [
        ("0.5", (1.0,), TypeError, "must be a fraction"),
        (True, (1.0,), TypeError, "must be a fraction"),
        (0.0, (1.0,), ValueError, r"fraction in \(0, 1\]"),
        (1.5, (1.0,), ValueError, r"fraction in \(0, 1\]"),
        (0, (1.0,), ValueError, "at least 1 token"),
        (math.nan, (1.0,), ValueError, r"fraction in \(0, 1\]"),
        (0.5, (), ValueError, "one positive threshold per scale"),
        (0.5, (1.0, 0.0), ValueError, "one positive threshold per scale"),
        (0.2, (1.0,), ValueError, "leave up to 16 tokens"),
        (15, (1.0,), ValueError, "budget of at least 16"),
    ],
)
def test_budgets_that_cannot_be_meant(
    budget: object, thresholds: tuple[float, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PatchSelector(thresholds=thresholds, token_budget=budget, patch_size=4, img_size=32)


def test_no_budget_is_none() -> None:
    assert PatchSelector(token_budget=None).token_budget is None


BAD_ARGUMENTS = {
    "patch_size": [0, -4, 1.5, "16", None, True],
    "window_size": [-1, 1.5, "4", None, True],
    "in_chans": [0, 1.5, "3", None],
    "img_size": [0, 64.0, (1, 2, 3), "64", (64,), True],
    "thresholds": [None, 5.5, (float("nan"),), (3.0, 4.0)],
    "drop_padding": ["no", 0, 1, 2, None],
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_by_name(name: str) -> None:
    for value in BAD_ARGUMENTS[name]:
        with pytest.raises((TypeError, ValueError), match=name):
            PatchSelector(**{name: value})
