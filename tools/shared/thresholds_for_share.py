"""Thresholds by which photos keep a share of their tokens."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from apt_dense import PatchSelector
from apt_dense.patches.image_preparation import filled_region
from apt_dense.patches.partition import Bounds, count_tokens, partition_by_thresholds

_STEPS = 40  # of the bisection


class Scores(NamedTuple):
    """The scores of an image (1, H, W), from which all thresholds can be tried."""

    maps: tuple[Tensor, ...]
    bounds: Bounds


def scores_of(selector: PatchSelector, image: Tensor) -> Scores:
    """Score one normalised image (1, 3, H, W)."""
    image = selector.whole_patches(image)
    grid = image.shape[-2] // selector.patch_size, image.shape[-1] // selector.patch_size
    bounds = Bounds(filled_region(image), grid, selector.patch_size, selector.window_size)
    return Scores(selector.scores(image), bounds)


def mean_share(scores: Iterable[Scores], thresholds: Sequence[float]) -> float:
    """Tokens of all images as a share of their cells, where padding is not dropped."""
    tokens = cells = 0
    for maps, bounds in scores:
        scale_map = partition_by_thresholds(maps, thresholds, bounds)
        tokens += int(count_tokens(scale_map, len(maps) + 1).sum())
        cells += scale_map.numel()
    return tokens / cells


def thresholds_for(scores: Sequence[Scores], ratios: Sequence[float], share: float) -> tuple[float, ...]:
    """The lowest multiple of ``ratios`` by which images keep at most that share of their tokens together.

    Raises:
        ValueError: if merging everything leaves more.
    """
    fewest = mean_share(scores, [math.inf if ratio > 0 else 0 for ratio in ratios])
    if fewest > share:
        raise ValueError(
            f"a share of {share:g} of the tokens cannot be reached: patches of up to {2 ** len(ratios)} times the "
            f"smallest leave {fewest:.3f}; give one threshold more"
        )
    high = 1.0
    while mean_share(scores, [high * ratio for ratio in ratios]) > share:
        high *= 2
    low = 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        enough = mean_share(scores, [middle * ratio for ratio in ratios]) <= share
        low, high = (low, middle) if enough else (middle, high)
    return tuple(high * ratio for ratio in ratios)


def short(threshold: float) -> str:
    """A threshold with four digits, as configs and command lines take it; those of some scorers are thousandths."""
    return f"{threshold:.4g}"
