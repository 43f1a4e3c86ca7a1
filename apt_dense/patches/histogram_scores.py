"""Scores made of histograms of grey levels: Shannon's entropy, the paper's score, and Tsallis'.

Shape letters: B images, H x W pixels, h x w patches of the scale in question.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from apt_dense.patches.blocks_of_pixels import grey_levels, no_blocks
from apt_dense.runtime import bin_counts

ENTROPY_BINS = 512  # over [0, 256): two bins per grey level, as in the released code
_HISTOGRAM_ENTRIES = 2**21  # most bins held at once: 16 MiB of int64, whatever the image size


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
    Arguments and shapes as in :func:`entropy_scores`, and

    Args:
        q: above 0, and not 1.
    """
    return _histogram_scores(pixels, patch_size, scales, partial(_tsallis, q=q))


def _histogram_scores(
    pixels: Tensor, patch_size: int, scales: Sequence[int], measure: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, ...]:
    """Maps of what ``measure`` makes of histograms (h, w, bins) of blocks of so many pixels."""
    finest, coarsest = patch_size * 2 ** scales[0], patch_size * 2 ** scales[-1]
    bins = (grey_levels(pixels) * (ENTROPY_BINS / 256)).long().clamp_(0, ENTROPY_BINS - 1)
    batch, height, width = bins.shape
    maps = tuple(no_blocks(bins, patch_size * 2**s) for s in scales)
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
