"""Token curves equal the counts of a selector with the scaled thresholds, factor by factor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apt_dense import PatchSelector
from apt_dense.patches.token_curve import patches_by_factor

from support.references import noise, normalise, pictures

FACTORS = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0, 1.1, 1.7, 3.0])


def expected(selector: PatchSelector, images: Tensor, factors: Tensor) -> Tensor:
    """Each factor by a selector of its own."""
    scaled = [tuple(float(f) * t for t in selector.thresholds) for f in factors.float()]
    return torch.stack([replace(selector, thresholds=own, token_budget=None).count(images) for own in scaled], 1)


@given(
    seed=st.integers(0, 99),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    thresholds=st.lists(st.floats(0.5, 8), min_size=1, max_size=3),
    scorer=st.sampled_from(["entropy", "laplacian"]),
    window=st.sampled_from([0, 8, 11]),
    drop=st.booleans(),
)
def test_equal_to_a_selector_for_each_factor(
    seed: int, height: int, width: int, thresholds: list[float], scorer: str, window: int, drop: bool
) -> None:
    images = pictures(seed, (height, width))
    if height > 20:
        images[0, :, 17:] = 0  # padding
    selector = PatchSelector(
        patch_size=4,
        thresholds=tuple(sorted(thresholds, reverse=True)),
        scorer=scorer,
        window_size=window,
        drop_padding=drop,
    )
    assert torch.equal(patches_by_factor(selector, images, FACTORS), expected(selector, images, FACTORS))


def test_scores_on_a_threshold_do_not_merge() -> None:
    """A checkerboard of two levels has an entropy of one bit exactly."""
    levels = torch.tensor([[0.0, 255.0], [255.0, 0.0]]).repeat(8, 8).expand(1, 3, 16, 16)
    selector = PatchSelector(patch_size=4, thresholds=(1.0, 0.5))
    factors = torch.tensor([0.5, 1.0, torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item(), 2.0, 2.001])
    found = patches_by_factor(selector, normalise(levels.clone()), factors)[0].tolist()
    assert found == [[16, 0, 0], [16, 0, 0], [0, 4, 0], [0, 4, 0], [0, 0, 1]]


def test_a_budget_is_not_regarded_and_nan_scores_never_merge() -> None:
    images = pictures(0, (32, 32))
    selector = PatchSelector(patch_size=4, thresholds=(5.0, 4.0), token_budget=0.5)
    assert torch.equal(patches_by_factor(selector, images, FACTORS), expected(selector, images, FACTORS))
    none = replace(selector, scorer=lambda pixels, size, scales: tuple(
        pixels.new_full((len(pixels), pixels.shape[2] // (size << s), pixels.shape[3] // (size << s)), torch.nan)
        for s in scales
    ))  # fmt: skip
    assert patches_by_factor(none, images, FACTORS)[..., 1:].sum() == 0


def test_bad_arguments_are_named() -> None:
    selector = PatchSelector(patch_size=4)
    for factors in ([], [1.0, 1.0], [2.0, 1.0], [-1.0, 1.0]):
        with pytest.raises(ValueError, match="ascending"):
            patches_by_factor(selector, pictures(0, (8, 8)), torch.tensor(factors))
    with pytest.raises(ValueError, match="expected"):
        patches_by_factor(selector, noise(1, 2, 8, 8), FACTORS)
