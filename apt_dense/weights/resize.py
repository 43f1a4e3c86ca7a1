"""Weights for patches and images of another size, resampled by timm. Pure functions on tensors and dictionaries."""

import math

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from apt_dense.weights.formats import StateDict


def resize_positions(pos_embed: Tensor, grid: tuple[int, int], num_prefix: int) -> Tensor:
    """A position embedding (1, P + n, C) of a square grid -> (1, num_prefix + grid rows * columns, C).

    Bicubic and antialiased, by timm. A class position (P = 1) that is not wanted is left out.

    Raises:
        ValueError: if n is no square, or positions of class and register tokens are wanted and there are none.
    """
    length = pos_embed.shape[1]
    counts = (0, 1) if num_prefix < 2 else (num_prefix,)
    has_prefix = next((p for p in counts if length > p and math.isqrt(length - p) ** 2 == length - p), None)
    if has_prefix is None or has_prefix < num_prefix:
        raise ValueError(
            f"pos_embed of shape {tuple(pos_embed.shape)} does not fit: expected a square grid of positions after "
            f"{num_prefix} class positions, or exactly {num_prefix + grid[0] * grid[1]} positions; "
            f"set img_size and class_token as in the checkpoint"
        )
    grid_part = resample_abs_pos_embed(pos_embed[:, has_prefix:], list(grid), num_prefix_tokens=0)
    return torch.cat([pos_embed[:, :num_prefix], grid_part], dim=1)


def resize_state(state: StateDict, patch_size: int | None = None, img_size: tuple[int, int] | None = None) -> StateDict:
    """A state dict with our names for patches of another size (FlexiViT's pseudo-inverse) and images of another
    (bicubic), both by timm.

    Args:
        img_size: pixels (H, W); None keeps the grid of positions, so that images change with the patches.

    Raises:
        ValueError: for sizes below 1 or that do not divide, and for positions of a grid that is no square.
    """
    state, weight = dict(state), state["patch_embed.proj.weight"]
    size = weight.shape[-1] if patch_size is None else patch_size
    if size < 1:
        raise ValueError(f"patch_size={size}: expected at least 1 pixel")
    state["patch_embed.proj.weight"] = resample_patches(weight, size)
    if img_size is not None and "pos_embed" in state:
        if min(img_size) < size or any(pixels % size for pixels in img_size):
            raise ValueError(f"img_size={img_size} is no multiple of patches of {size} pixels")
        grid = img_size[0] // size, img_size[1] // size
        state["pos_embed"] = resize_positions(state["pos_embed"], grid, _num_prefix_positions(state))
    return state


def _num_prefix_positions(state: StateDict) -> int:
    """How many positions of class and register tokens there are before those of a square grid."""
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    length = state["pos_embed"].shape[1]
    counts = (0, 1, registers + 1, registers)
    return next((p for p in counts if length > p and math.isqrt(length - p) ** 2 == length - p), 0)


def resample_patches(weight: Tensor, patch_size: int) -> Tensor:
    """The weight (C, in_chans, p, p) of a patch embedding for patches of another size."""
    if weight.shape[-2:] == (patch_size, patch_size):
        return weight
    return resample_patch_embed(weight, [patch_size, patch_size])
