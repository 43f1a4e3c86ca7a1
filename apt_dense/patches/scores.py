"""Scores: how flat each patch is, one map per scale (first step: image -> scores -> partition).

A score map holds one number per patch of a scale; a low one means that a single token can stand for the whole patch.

Shape letters: B images, H x W pixels, h x w patches of the scale in question.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.options import PixelFormat
from apt_dense.patches.image_preparation import denormalise, rounded_mean
from apt_dense.patches.learned_scores import SUFFIX, LearnedScorer
from apt_dense.runtime import bin_counts, without_autocast

#: ``scorer(pixels, patch_size, scales) -> maps``: pixels (B, 3, H, W) float32 RGB in [0, 255]; one float32 map
#: (B, H // size, W // size) for each scale, where size = patch_size * 2**scale. Low = flat.
Scorer = Callable[[Tensor, int, Sequence[int]], tuple[Tensor, ...]]

GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)
ENTROPY_BINS = 512  # over [0, 256): two bins per grey level, as in the released code
_HISTOGRAM_ENTRIES = 2**21  # most bins held at once: 16 MiB of int64, whatever the image size


def grey_levels(pixels: Tensor) -> Tensor:
    """RGB (B, 3, H, W) -> grey (B, H, W), both in [0, 255]."""
    # Plain products and sums in this order: a fused multiply-add rounds differently, which moves pixels between bins.
    red, green, blue = (pixels[:, i] * weight for i, weight in enumerate(GREY_WEIGHTS))
    return red + green + blue


def _block_means(values: Tensor, size: int) -> Tensor:
    """Mean of every complete size x size block: (B, H, W) -> (B, H // size, W // size)."""
    return F.avg_pool2d(values[:, None], size)[:, 0] if min(values.shape[-2:]) >= size else _no_blocks(values, size)


def _blocks(values: Tensor, size: int) -> Tensor:
    """The complete size x size blocks of (B, H, W), as a view (B, H // size, size, W // size, size)."""
    rows, columns = values.shape[1] // size, values.shape[2] // size
    whole = values[:, : rows * size, : columns * size]
    return whole.unflatten(2, (columns, size)).unflatten(1, (rows, size))


def _no_blocks(values: Tensor, size: int) -> Tensor:
    """The empty map of an image that is smaller than one patch."""
    return values.new_zeros(values.shape[0], values.shape[-2] // size, values.shape[-1] // size, dtype=torch.float32)


def entropy_scores(pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
    """Shannon entropy of the grey levels of each patch, in bits: 0 (one colour) to at most 9 (512 bins).

    The paper's score (arXiv 2510.18091, section 3), by the released code's batched definition. The histogram of a
    patch is the sum of the four of the next smaller scale, so every pixel is counted once.

    Args:
        pixels: (B, 3, H, W) float32 RGB in [0, 255].
        patch_size: pixels of a patch of scale 0.
        scales: ascending scales to score.

    Returns:
        For each scale, (B, H // size, W // size) with size = patch_size * 2**scale; incomplete patches have no score.
    """
    return _histogram_scores(pixels, patch_size, scales, _entropy)


def tsallis_scores(pixels: Tensor, patch_size: int, scales: Sequence[int], q: float = 0.3) -> tuple[Tensor, ...]:
    """Tsallis entropy (1 - sum p**q) / (q - 1) of the same histograms as :func:`entropy_scores`: 0 (one colour) to at
    most 111 (q = 0.3, 512 equally frequent bins).

    Below q = 1, rare grey levels count more than in Shannon's entropy, the limit at q = 1: a small object in front of
    an even ground. LVTP (arXiv 2504.17996) combines several q; one alone was better in docs/EVIDENCE.md.
    Arguments and shapes as in :func:`entropy_scores`.
    """
    return _histogram_scores(pixels, patch_size, scales, partial(_tsallis, q=q))


def _histogram_scores(
    pixels: Tensor, patch_size: int, scales: Sequence[int], measure: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, ...]:
    """Maps of what ``measure`` makes of histograms (h, w, bins) of blocks of so many pixels."""
    finest, coarsest = patch_size * 2 ** scales[0], patch_size * 2 ** scales[-1]
    bins = (grey_levels(pixels) * (ENTROPY_BINS / 256)).long().clamp_(0, ENTROPY_BINS - 1)
    batch, height, width = bins.shape
    maps = tuple(_no_blocks(bins, patch_size * 2**s) for s in scales)
    entries_per_row = max(1, (width // finest) * (coarsest // finest) * ENTROPY_BINS)
    rows = coarsest * max(1, _HISTOGRAM_ENTRIES // entries_per_row)
    for image in range(batch):
        for top in range(0, height, rows):
            strip = bins[image, top : top + rows]
            for scale_map, scale, scores in zip(
                maps, scales, _strip_scores(strip, patch_size, scales, measure), strict=True
            ):
                first = top // (patch_size * 2**scale)
                scale_map[image, first : first + scores.shape[0]] = scores
    return maps


def _strip_scores(
    bins: Tensor, patch_size: int, scales: Sequence[int], measure: Callable[[Tensor, int], Tensor]
) -> list[Tensor]:
    """Bin numbers (rows, W) of a strip -> its score maps, from the finest scale's histograms upwards."""
    histograms = _histograms(bins, patch_size * 2 ** scales[0])
    maps = []
    for scale in range(scales[0], scales[-1] + 1):
        if scale > scales[0]:
            histograms = _sum_of_four(histograms)
        if scale in scales:
            maps.append(measure(histograms, (patch_size * 2**scale) ** 2))
    return maps


def _histograms(bins: Tensor, size: int) -> Tensor:
    """Bin numbers (H, W) -> pixel counts (H // size, W // size, ENTROPY_BINS) of the complete blocks."""
    h, w = bins.shape[0] // size, bins.shape[1] // size
    block = torch.arange(h * w, device=bins.device).view(h, 1, w, 1) * ENTROPY_BINS
    slots = (bins[: h * size, : w * size].view(h, size, w, size) + block).flatten()
    counts = bin_counts(slots, h * w * ENTROPY_BINS)
    return counts.view(h, w, ENTROPY_BINS)


def _sum_of_four(histograms: Tensor) -> Tensor:
    """Histograms (h, w, bins) of one scale -> (h // 2, w // 2, bins) of the next."""
    h, w = histograms.shape[0] // 2, histograms.shape[1] // 2
    return histograms[: 2 * h, : 2 * w].reshape(h, 2, w, 2, ENTROPY_BINS).sum(dim=(1, 3))


def _entropy(histograms: Tensor, count: int) -> Tensor:
    """Pixel counts (..., bins) of blocks of ``count`` pixels -> entropy in bits: log2 n - sum(c log2 c) / n."""
    counts = histograms.float()
    entropy = math.log2(count) - torch.xlogy(counts, counts).sum(-1) / (count * math.log(2))
    return entropy.clamp(min=0)  # one colour may round below


def _tsallis(histograms: Tensor, count: int, q: float) -> Tensor:
    """Pixel counts (..., bins) of blocks of ``count`` pixels -> Tsallis entropy."""
    return ((1 - (histograms / count).pow(q).sum(-1)) / (q - 1)).clamp(min=0)


def colour_deviation_scores(pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
    """Standard deviation of the colours of each patch, as square roots of RGB scaled to [0, 1]: 0 to 0.87.

    The root of the three channels' variances, summed. Square roots let the same relative contrast count more where it
    is dark: an object in a shadow is not merged with it. Arguments and shapes as in :func:`entropy_scores`.
    """
    channels = (pixels / 255).sqrt().unbind(1)
    maps = []
    for size in (patch_size * 2**s for s in scales):
        maps.append(sum(_blocks(channel, size).var((2, 4), correction=0) for channel in channels).sqrt())
    return tuple(maps)


def laplacian_scores(pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
    """Mean absolute 8-neighbour Laplacian of the grey image scaled to [0, 1]: 0 (flat or linear) to 8.

    Arguments and shapes as in :func:`entropy_scores`. The image is mirrored at its border.
    """
    response = _absolute_laplacian(pixels)
    return tuple(_block_means(response, patch_size * 2**s) for s in scales)


def laplacian_max_scores(pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
    """Largest absolute Laplacian in each patch, otherwise as :func:`laplacian_scores`: the release's aggregate "max".

    A single line through a patch keeps it fine, and so does a single noisy pixel.
    """
    response = _absolute_laplacian(pixels)
    return tuple(_blocks(response, patch_size * 2**s).amax((2, 4)) for s in scales)


def laplacian_std_scores(pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
    """Standard deviation of the absolute Laplacian in each patch (of n pixels, over n - 1; 0 for n = 1), otherwise as
    :func:`laplacian_scores`: the release's aggregate "std"."""
    response = _absolute_laplacian(pixels)
    sizes = [patch_size * 2**s for s in scales]
    return tuple(_blocks(response, size).std((2, 4), correction=min(1, size - 1)) for size in sizes)


def _absolute_laplacian(pixels: Tensor) -> Tensor:
    """RGB (B, 3, H, W) -> (B, H, W), the absolute response of the grey image to the 8-neighbour Laplacian."""
    grey = grey_levels(pixels)[:, None] / 255
    mode = "reflect" if min(grey.shape[-2:]) > 1 else "replicate"
    kernel = grey.new_ones(1, 1, 3, 3)
    kernel[..., 1, 1] = -8
    return F.conv2d(F.pad(grey, (1, 1, 1, 1), mode=mode), kernel)[:, 0].abs()


def upsampling_error_scores(pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
    """Mean squared error, on RGB scaled to [0, 1], of shrinking the image by 2**scale and enlarging it again.

    What a patch of that scale loses when it is resized to the base patch size. Arguments and shapes as in
    :func:`entropy_scores`; scale 0 loses nothing. The release's definition, but for scales above 2, which it shrinks
    by 4 as scale 2.
    """
    maps = []
    for scale in scales:
        size = patch_size * 2**scale
        rows, columns = (n // size * size for n in pixels.shape[-2:])
        if rows == 0 or columns == 0:
            maps.append(_no_blocks(pixels, size))
            continue
        image = pixels[..., :rows, :columns] / 255
        small = F.interpolate(image, scale_factor=0.5**scale, mode="bilinear")
        restored = F.interpolate(small, size=(rows, columns), mode="bilinear")
        maps.append(_block_means((image - restored).square().mean(1), size))
    return tuple(maps)


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
        return LearnedScorer.load(scorer, rounded_mean(pixel_format))
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
    """Score normalised images (B, 3, H, W), in float32 also under autocast: one map per scale.

    Raises:
        ValueError: if a scorer returns maps of another shape or device.
        TypeError: if it returns anything but one tensor of real numbers per scale.
    """
    if not scales:
        return ()
    with without_autocast(images):
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
