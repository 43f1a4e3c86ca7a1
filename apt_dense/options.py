"""Checks of the backbone's arguments and inputs: each raises an error that names the value and what is expected."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.patches.scores import PixelFormat


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def one_of(name: str, value: str, *choices: str) -> str:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {choices}")
    return value


def grid_of(name: str, size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of whole patches in images of that size."""
    if min(size) < patch_size:
        raise ValueError(f"{name}={size} is less than one patch of patch_size={patch_size} pixels")
    return size[0] // patch_size, size[1] // patch_size


def check_block_indexes(name: str, indexes: Sequence[int], depth: int) -> tuple[int, ...]:
    bad = [i for i in indexes if not 0 <= i < depth]
    if bad:
        raise ValueError(f"{name}={tuple(indexes)} names blocks {bad}; there are blocks 0 to {depth - 1}")
    return tuple(indexes)


def check_windows(window_size: int, indexes: Sequence[int], depth: int) -> tuple[int, ...]:
    """The blocks with windows."""
    if window_size < 0:
        raise ValueError(f"window_size={window_size} must be the cells of a window, or 0 for none")
    return check_block_indexes("window_block_indexes", indexes, depth) if window_size else ()


def check_prefix(
    class_token: bool, reg_tokens: int, window_size: int, use_rel_pos: bool, residual_blocks: Sequence[int]
) -> int:
    """The number of prefix rows. They have no place in the image, so nothing that needs one can be meant to hold for
    them."""
    if reg_tokens < 0:
        raise ValueError(f"reg_tokens={reg_tokens} must be 0 or more")
    num_prefix = int(class_token) + reg_tokens
    if num_prefix and (window_size or use_rel_pos or len(residual_blocks)):
        raise ValueError(
            f"class_token={class_token} and reg_tokens={reg_tokens} together with window_size={window_size}, "
            f"use_rel_pos={use_rel_pos} or residual_block_indexes={tuple(residual_blocks)} is not defined; "
            f"set class_token=False and reg_tokens=0 as ViTDet and SAM do"
        )
    return num_prefix


def check_final_norm(final_norm: bool, norm_intermediates: bool, out_indices: tuple[int, ...], last_block: int) -> None:
    if norm_intermediates and not final_norm:
        raise ValueError("norm_intermediates=True applies the final norm to all outputs; set final_norm=True too")
    if final_norm and not norm_intermediates and last_block not in out_indices:
        raise ValueError(
            f"final_norm normalises block {last_block}, which out_indices={out_indices} leaves out; its weights "
            f"would never get a gradient. Add it, or set final_norm=False or norm_intermediates=True"
        )


def check_images(images: Tensor, in_chans: int) -> Tensor:
    """The images themselves."""
    if images.ndim != 4 or images.shape[1] != in_chans:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (B, {in_chans}, H, W)")
    if not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}; expected normalised floating point pixels (pixel_mean, pixel_std)")
    if images.numel() == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected at least one image of one pixel")
    return images


def whole_patches(images: Tensor, patch_size: int, partial_patches: str) -> Tensor:
    """Images (B, C, H, W), padded or cropped at the right and bottom to whole patches."""
    height, width = images.shape[-2:]
    if height % patch_size == 0 and width % patch_size == 0:
        return images
    if partial_patches == "pad":
        return F.pad(images, (0, -width % patch_size, 0, -height % patch_size))
    if min(height, width) < patch_size:
        raise ValueError(
            f"images of {height} x {width} pixels hold no whole patch of {patch_size} pixels; "
            f"pad them, or set partial_patches='pad'"
        )
    return images[..., : height - height % patch_size, : width - width % patch_size]


def are_finite(images: Tensor) -> Tensor:
    """Whether each image (B, C, H, W) is free of NaN and infinities: (B,) bool."""
    # A sum is finite if all of its terms are, and needs no mask of the size of the images.
    return images.detach().sum((1, 2, 3), dtype=torch.float32).isfinite()


def resolve_out_indices(out_indices: int | Sequence[int] | None, depth: int) -> tuple[int, ...]:
    out_indices = -1 if out_indices is None else out_indices
    given = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    indices = tuple(i + depth if i < 0 else i for i in given)
    if not indices or list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < depth:
        raise ValueError(f"out_indices={given} must be ascending block numbers from 0 to {depth - 1}, at least one")
    return indices


def check_pixel_format(
    mean: Sequence[float], std: Sequence[float], channel_order: str, in_chans: int, thresholds: tuple[float, ...]
) -> PixelFormat:
    if thresholds and in_chans != 3:
        raise ValueError(f"in_chans={in_chans} with thresholds={thresholds}: scores are made of RGB images only")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"pixel_mean={mean} and pixel_std={std} must be three numbers each, std positive")
    one_of("channel_order", channel_order, "RGB", "BGR")
    if max(mean) <= 1 and max(std) <= 1:
        raise ValueError(f"pixel_mean={mean} and pixel_std={std} look like values for [0, 1]; give grey levels (x 255)")
    return PixelFormat(tuple(map(float, mean)), tuple(map(float, std)), channel_order)
