"""Scores: how flat each patch is, one map per scale (first step: image -> scores -> partition).

A score map holds one number per patch of a scale; a low one means that a single token can stand for the whole patch.

Shape letters: B images, H x W pixels, h x w patches of the scale in question.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from apt_dense.options import PixelFormat
from apt_dense.patches.contrast_scores import (
    colour_deviation_scores,
    laplacian_max_scores,
    laplacian_scores,
    laplacian_std_scores,
    upsampling_error_scores,
)
from apt_dense.patches.histogram_scores import entropy_scores, tsallis_scores
from apt_dense.patches.image_preparation import denormalise, rounded_mean
from apt_dense.patches.scorer_files import SUFFIX, load_scorer
from apt_dense.runtime import without_autocast

#: ``scorer(pixels, patch_size, scales) -> maps``: pixels (B, 3, H, W) float32 RGB in [0, 255]; one float32 map
#: (B, H // size, W // size) for each scale, where size = patch_size * 2**scale. Low = flat.
Scorer = Callable[[Tensor, int, Sequence[int]], tuple[Tensor, ...]]

SCORERS: dict[str, Scorer] = {
    "entropy": entropy_scores,
    "tsallis": tsallis_scores,
    "colour_deviation": colour_deviation_scores,
    "laplacian": laplacian_scores,
    "laplacian_max": laplacian_max_scores,
    "laplacian_std": laplacian_std_scores,
    "upsampling_error": upsampling_error_scores,
}


def resolve_scorer(scorer: str | Scorer, pixel_format: PixelFormat) -> Scorer:
    """The scorer of that name, the learned one in that file, or the callable itself.

    Args:
        pixel_format: of the images, whose mean is the colour of their padding.

    Raises:
        ValueError: for a name that is not one of ``SCORERS``, and a file that holds no scorer.
        FileNotFoundError: for a file that is not there.
    """
    if callable(scorer):
        return scorer
    if scorer.endswith(SUFFIX):
        return load_scorer(scorer, rounded_mean(pixel_format))
    if scorer not in SCORERS:
        raise ValueError(
            f"scorer={scorer!r} is unknown; expected one of {sorted(SCORERS)}, a {SUFFIX} file of tools/fit_scorer.py "
            f"or a callable (see Scorer)"
        )
    return SCORERS[scorer]


@torch.no_grad()
def score_maps(
    images: Tensor, patch_size: int, scales: Sequence[int], scorer: Scorer, pixel_format: PixelFormat
) -> tuple[Tensor, ...]:
    """Score normalised images (B, 3, H, W): one map per scale.

    In float32, also under autocast, unless the scorer has a true attribute ``follows_autocast``; maps are float32.

    Raises:
        ValueError: if a scorer returns maps of another shape or device.
        TypeError: if it returns anything but one tensor of real numbers per scale.
    """
    if not scales:
        return ()
    with nullcontext() if getattr(scorer, "follows_autocast", False) else without_autocast(images):
        maps = _checked_maps(scorer(denormalise(images, pixel_format), patch_size, scales), images.device)
    sizes = [patch_size * 2**scale for scale in scales]
    expected = [(len(images), images.shape[-2] // size, images.shape[-1] // size) for size in sizes]
    if [tuple(m.shape) for m in maps] != expected:
        raise ValueError(f"the scorer returned maps of {[tuple(m.shape) for m in maps]}; expected {expected}")
    return maps


def _checked_maps(maps: Any, device: torch.device) -> tuple[Tensor, ...]:
    """The maps that a scorer returned, in float32."""
    one_per_scale = "expected one tensor of real numbers for each scale, in a tuple or list"
    if not isinstance(maps, (tuple, list)):
        raise TypeError(f"the scorer returned a {type(maps).__name__}; {one_per_scale}")
    for each in maps:
        if not isinstance(each, Tensor) or each.is_complex() or each.dtype == torch.bool:
            kind = f"tensor of {each.dtype}" if isinstance(each, Tensor) else type(each).__name__
            raise TypeError(f"the scorer returned a map that is a {kind}; {one_per_scale}")
        if each.device != device:
            raise ValueError(f"the scorer returned a map on {each.device}; expected it on {device}, as its pixels are")
    return tuple(each.float() for each in maps)
