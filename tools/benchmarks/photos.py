"""Photos to run benchmarks on: those inside scikit-image, cropped to a square and resized."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense import PatchSelector
from apt_dense.options import PixelFormat

from shared.normalise import normalise, to_grey_levels
from shared.thresholds_for_share import scores_of, thresholds_for

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


def thresholds_keeping(share: float, images: Tensor, ratios: Sequence[float]) -> tuple[float, ...]:
    """About the lowest multiple of ``ratios``, in thousandths, by which images keep at most that share of their tokens
    (entropy, patches of 16). Raises as ``thresholds_for``."""
    selector = PatchSelector(thresholds=tuple(ratios))
    found = thresholds_for([scores_of(selector, image[None]) for image in images], ratios, share)
    return tuple(math.ceil(1000 * threshold) / 1000 for threshold in found)
