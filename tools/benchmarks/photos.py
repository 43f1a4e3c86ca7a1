"""Photos to run benchmarks on: those inside scikit-image, cropped to a square and resized."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.patches.partition import filled_region, partition_by_thresholds
from apt_dense.patches.scores import PixelFormat, resolve_scorer, score_maps

from shared.token_counts import count_patches

NAMES = ("astronaut", "coffee", "chelsea", "rocket")


def photos(size: int, batch: int) -> Tensor:
    """Load ``batch`` photos in turn, normalised: (batch, 3, size, size)."""
    from skimage import data

    pictures = [_square(getattr(data, NAMES[i % len(NAMES)])(), size) for i in range(batch)]
    pixel_format = PixelFormat()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in pixel_format[:2])
    return (torch.cat(pictures) - mean) / std


def _square(picture: np.ndarray, size: int) -> Tensor:
    """Crop the middle of an (H, W, 3) uint8 picture to (1, 3, size, size) whole grey levels."""
    side = min(picture.shape[:2])
    top, left = ((n - side) // 2 for n in picture.shape[:2])
    square = torch.from_numpy(picture[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None].float()
    return F.interpolate(square, size=(size, size), mode="bicubic", antialias=True).round().clamp(0, 255)


def thresholds_for(images: Tensor, thresholds: tuple[float, ...], keep: float) -> tuple[float, ...]:
    """Scale the thresholds so that about that share of all tokens is kept (entropy, patches of 16)."""
    grid = images.shape[-2] // 16, images.shape[-1] // 16
    scores = score_maps(images, 16, range(1, len(thresholds) + 1), resolve_scorer("entropy"), PixelFormat())
    low, high = 0.0, 4.0
    for _ in range(24):
        middle = (low + high) / 2
        scaled = tuple(middle * t for t in thresholds)
        scale_map = partition_by_thresholds(scores, scaled, filled_region(images), grid, 16)
        share = count_patches(scale_map, len(thresholds) + 1).tokens_kept
        low, high = (middle, high) if share > keep else (low, middle)
    return tuple(round(high * t, 3) for t in thresholds)
