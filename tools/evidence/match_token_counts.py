"""Equal numbers of tokens: by thresholds for adaptive patches, by size for smaller images."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apt_dense import PatchSelector
from apt_dense.patches.image_preparation import filled_region
from apt_dense.patches.partition import Bounds, count_tokens, partition_by_thresholds

from shared.normalise import normalise

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
    """Tokens as a share of all cells, on average over images, where padding is not dropped."""
    shares = []
    for maps, bounds in scores:
        scale_map = partition_by_thresholds(maps, thresholds, bounds)
        shares.append(count_tokens(scale_map, len(maps) + 1).sum().item() / scale_map.numel())
    return sum(shares) / len(shares)


def thresholds_for(scores: Sequence[Scores], ratios: Sequence[float], share: float) -> tuple[float, ...]:
    """The lowest multiple of ``ratios`` by which images keep at most that share of their tokens on average.

    Raises:
        ValueError: if merging everything leaves more.
    """
    fewest = mean_share(scores, [math.inf] * len(ratios))
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


def smaller_grid(grid: tuple[int, int], share: float) -> tuple[int, int]:
    """Rows and columns of an image of about the same shape whose tokens are nearest to that share."""
    side = math.sqrt(share)
    rows, columns = ({max(1, math.floor(n * side)), max(1, math.ceil(n * side))} for n in grid)
    wanted = share * grid[0] * grid[1]
    return min(((r, c) for r in sorted(rows) for c in sorted(columns)), key=lambda g: abs(g[0] * g[1] - wanted))


def model_input(grey_levels: Tensor, model: torch.nn.Module) -> Tensor:
    """Normalised images for an ``APTViT``, on its device."""
    return normalise(grey_levels, model.pixel_format).to(next(model.parameters()).device)


def timed(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result, on the CPU, and the seconds until it is known."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result.cpu(), time.perf_counter() - start


def resized(grey_levels: Tensor, size: tuple[int, int]) -> Tensor:
    """Grey levels (1, 3, H, W) at another size, antialiased, whole numbers as in a file."""
    if tuple(grey_levels.shape[-2:]) == tuple(size):
        return grey_levels
    small = torch.nn.functional.interpolate(grey_levels, size=tuple(size), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255)
