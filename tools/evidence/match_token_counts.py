"""Smaller images with as many tokens, and what measurements of both need."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from shared.normalise import normalise


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
