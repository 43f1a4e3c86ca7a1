"""Grey levels of images, and square blocks of images and of maps.

Shape letters: B images, H x W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)


def grey_levels(pixels: Tensor) -> Tensor:
    """RGB (B, 3, H, W) -> grey (B, H, W), both in [0, 255]."""
    # Plain products and sums in this order: a fused multiply-add rounds differently, which moves pixels between bins.
    red, green, blue = (pixels[:, i] * weight for i, weight in enumerate(GREY_WEIGHTS))
    return red + green + blue


def block_means(values: Tensor, size: int) -> Tensor:
    """Mean of every complete size x size block: (B, H, W) -> (B, H // size, W // size)."""
    return F.avg_pool2d(values[:, None], size)[:, 0] if min(values.shape[-2:]) >= size else no_blocks(values, size)


def blocks(values: Tensor, size: int) -> Tensor:
    """The complete size x size blocks of (B, H, W), as a view (B, H // size, size, W // size, size)."""
    rows, columns = values.shape[1] // size, values.shape[2] // size
    whole = values[:, : rows * size, : columns * size]
    return whole.unflatten(2, (columns, size)).unflatten(1, (rows, size))


def enlarged(values: Tensor, side: int) -> Tensor:
    """Repeat each value of (B, h, w) in a block: (B, h * side, w * side)."""
    return values.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)


def no_blocks(values: Tensor, size: int) -> Tensor:
    """The empty map of an image that is smaller than one patch."""
    return values.new_zeros(values.shape[0], values.shape[-2] // size, values.shape[-1] // size, dtype=torch.float32)
