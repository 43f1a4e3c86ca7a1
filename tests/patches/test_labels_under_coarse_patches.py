"""What coarse patches hide, against a loop over the patches of a selector with the scaled thresholds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from apt_dense import PatchSelector
from apt_dense.patches.labels_under_coarse_patches import IGNORED, mixing_by_factor

from support.references import normalise

FACTORS = torch.tensor([0.3, 0.8, 1.0, 1.3, 2.0])


def pictures(seed: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A picture with blocks of several amounts of noise, and labels in blocks of other places."""
    generator = torch.Generator().manual_seed(seed)
    amount = torch.rand(1, 1, -(-height // 8), -(-width // 8), generator=generator) ** 2 * 40
    amount = amount.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :height, :width]
    grey = (128 + amount * torch.randn(1, 3, height, width, generator=generator)).round().clamp(0, 255)
    blocks = torch.randint(0, 3, (-(-height // 9), -(-width // 13)), generator=generator)
    labels = blocks.repeat_interleave(9, 0).repeat_interleave(13, 1)[:height, :width].clone()
    labels[torch.rand(height, width, generator=generator) < 0.05] = IGNORED
    return normalise(grey), labels


def by_hand(selector: PatchSelector, image: Tensor, labels: Tensor) -> tuple[int, int, int, int]:
    scale_map = selector.scale_map(image)[0]
    coarse = mixed = hidden = borders = 0
    for y in range(scale_map.shape[0]):
        for x in range(scale_map.shape[1]):
            scale = int(scale_map[y, x])
            if scale > 0 and y % 2**scale == x % 2**scale == 0:
                size = selector.patch_size << scale
                top, left = y * selector.patch_size, x * selector.patch_size
                held = set(labels[top : top + size, left : left + size].flatten().tolist()) - {IGNORED}
                coarse, mixed = coarse + 1, mixed + (len(held) > 1)
    height, width = labels.shape
    for y in range(height):
        for x in range(width):
            own = labels[y, x]
            others = [*labels[y, x + 1 : x + 2], *labels[y + 1 : y + 2, x]]
            if own != IGNORED and any(o not in (own, IGNORED) for o in others):
                borders += 1
                cell = y // selector.patch_size, x // selector.patch_size
                hidden += cell[0] < len(scale_map) and cell[1] < scale_map.shape[1] and bool(scale_map[cell] > 0)
    return coarse, mixed, int(hidden), borders


@settings(max_examples=15)
@given(
    st.integers(0, 50), st.integers(3, 40), st.integers(3, 40), st.sampled_from([(5.0,), (5.0, 4.0), (6.0, 5.0, 4.5)]),
    st.sampled_from(["pad", "crop"]),
)  # fmt: skip
def test_equal_to_a_loop_over_patches(
    seed: int, height: int, width: int, thresholds: tuple[float, ...], partial: str
) -> None:
    image, labels = pictures(seed, height + 4, width + 4)
    selector = PatchSelector(patch_size=4, thresholds=thresholds, partial_patches=partial)
    found = mixing_by_factor(selector, image, labels, FACTORS)
    for step, factor in enumerate(FACTORS.tolist()):
        scaled = replace(selector, thresholds=tuple(factor * t for t in thresholds))
        counts = found.coarse[step].item(), found.mixed[step].item(), found.border[step].item(), found.borders
        assert counts == by_hand(scaled, image, labels)


def test_one_class_mixes_nothing_and_sizes_must_agree() -> None:
    image, labels = pictures(0, 32, 32)
    selector = PatchSelector(patch_size=4, thresholds=(5.5, 4.0))
    for same in (torch.zeros_like(labels), torch.full_like(labels, IGNORED)):
        found = mixing_by_factor(selector, image, same, FACTORS)
        assert found.coarse[-1] > 0 and found.mixed.sum() == found.border.sum() == found.borders == 0
    with pytest.raises(ValueError, match="expected that of the image"):
        mixing_by_factor(selector, image, labels[1:], FACTORS)


@settings(max_examples=20, deadline=None)
@example(seed=0, height=8, width=8, thresholds=(5.0,), found=[(0.0, -5.0, 0.0, 0.0), (-9.0, 2.0, 4.0, 30.0)])
@given(
    st.integers(0, 50), st.integers(7, 40), st.integers(7, 40), st.sampled_from([(5.0,), (6.0, 5.0)]),
    st.lists(st.tuples(*[st.floats(-5, 45)] * 2, *[st.floats(0, 20)] * 2), max_size=6),
)  # fmt: skip
def test_boxes_under_coarse_patches_are_those_of_a_loop(
    seed: int, height: int, width: int, thresholds: tuple[float, ...], found: list[tuple[float, ...]]
) -> None:
    image, labels = pictures(seed, height, width)
    selector = PatchSelector(patch_size=4, thresholds=thresholds)
    boxes = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in found]).reshape(-1, 4)
    under = mixing_by_factor(selector, image, labels, FACTORS, boxes).boxes
    for step, factor in enumerate(FACTORS.tolist()):
        scale_map = replace(selector, thresholds=tuple(factor * t for t in thresholds)).scale_map(image)[0]
        expected = 0
        for left, top, right, bottom in (boxes / 4).tolist():
            cells = [
                bool(scale > 0)
                for (y, x), scale in np.ndenumerate(scale_map.numpy())
                if math.floor(top) <= y < max(math.ceil(bottom), math.floor(top) + 1)
                and math.floor(left) <= x < max(math.ceil(right), math.floor(left) + 1)
            ]
            expected += bool(cells) and 2 * sum(cells) >= len(cells)
        assert under[step] == expected
