"""Photos to run benchmarks on: those inside scikit-image, cropped to a square and resized."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense import PatchSelector
from apt_dense.options import PixelFormat
from apt_dense.patches.image_preparation import filled_region
from apt_dense.patches.partition import Bounds, partition_by_thresholds

from shared.normalise import normalise, to_grey_levels
from shared.token_counts import count_patches

NAMES = ("astronaut", "coffee", "chelsea", "rocket")


def photos(size: int, batch: int) -> Tensor:
    """Load ``batch`` photos in turn, normalised: (batch, 3, size, size)."""
    from skimage import data

    pictures = [_square(getattr(data, NAMES[i % len(NAMES)])(), size) for i in range(batch)]
    return normalise(torch.cat(pictures), PixelFormat())


def _square(picture: np.ndarray, size: int) -> Tensor:
    """Crop the middle of an (H, W, 3) uint8 picture to (1, 3, size, size) whole grey levels."""
    side = min(picture.shape[:2])
    top, left = ((n - side) // 2 for n in picture.shape[:2])
    square = to_grey_levels(picture[top : top + side, left : left + side])
    return F.interpolate(square, size=(size, size), mode="bicubic", antialias=True).round().clamp(0, 255)


def thresholds_for(images: Tensor, thresholds: tuple[float, ...], keep: float) -> tuple[float, ...]:
    """Scale the thresholds so that about that share of all tokens is kept (entropy, patches of 16)."""
    selector = PatchSelector(thresholds=thresholds)
    scores = selector.scores(images)  # once: of these, the thresholds below are all that changes
    grid = tuple(side // selector.patch_size for side in images.shape[-2:])
    bounds = Bounds(filled_region(images), grid, selector.patch_size)
    low, high = 0.0, 4.0
    for _ in range(24):
        middle = (low + high) / 2
        scale_map = partition_by_thresholds(scores, [middle * t for t in thresholds], bounds)
        share = count_patches(scale_map, selector.num_scales).tokens_kept
        low, high = (middle, high) if share > keep else (low, middle)
    return tuple(round(high * t, 3) for t in thresholds)
