"""Scores made of differences between pixels: deviation of colours, Laplacians, and what shrinking loses.

Shape letters: B images, H x W pixels.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from apt_dense.patches.blocks_of_pixels import block_means, blocks, grey_levels, no_blocks


def colour_deviation_scores(pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
    """Standard deviation of the colours of each patch, as square roots of RGB scaled to [0, 1]: 0 to 0.87.

    The root of the three channels' variances, summed. Square roots let the same relative contrast count more where it
    is dark: an object in a shadow is not merged with it. Arguments and shapes as in :func:`entropy_scores`.
    """
    channels = (pixels / 255).sqrt().unbind(1)
    maps = []
    for size in (patch_size * 2**s for s in scales):
        maps.append(sum(blocks(channel, size).var((2, 4), correction=0) for channel in channels).sqrt())
    return tuple(maps)


def laplacian_scores(pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
    """Mean absolute 8-neighbour Laplacian of the grey image scaled to [0, 1]: 0 (flat or linear) to 8.

    Arguments and shapes as in :func:`entropy_scores`. The image is mirrored at its border.
    """
    response = _absolute_laplacian(pixels)
    return tuple(block_means(response, patch_size * 2**s) for s in scales)


def laplacian_max_scores(pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
    """Largest absolute Laplacian in each patch, otherwise as :func:`laplacian_scores`: the release's aggregate "max".

    A single line through a patch keeps it fine, and so does a single noisy pixel.
    """
    response = _absolute_laplacian(pixels)
    return tuple(blocks(response, patch_size * 2**s).amax((2, 4)) for s in scales)


def laplacian_std_scores(pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
    """Standard deviation of the absolute Laplacian in each patch (of n pixels, over n - 1; 0 for n = 1), otherwise as
    :func:`laplacian_scores`: the release's aggregate "std"."""
    response = _absolute_laplacian(pixels)
    sizes = [patch_size * 2**s for s in scales]
    return tuple(blocks(response, size).std((2, 4), correction=min(1, size - 1)) for size in sizes)


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
            maps.append(no_blocks(pixels, size))
            continue
        image = pixels[..., :rows, :columns] / 255
        small = F.interpolate(image, scale_factor=0.5**scale, mode="bilinear")
        restored = F.interpolate(small, size=(rows, columns), mode="bilinear")
        maps.append(block_means((image - restored).square().mean(1), size))
    return tuple(maps)
