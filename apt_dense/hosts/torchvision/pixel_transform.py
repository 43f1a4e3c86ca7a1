"""torchvision's transform of images and targets, with the backbone's pixel format and padding that can be told."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from apt_dense.option_checks import whole
from apt_dense.vit import APTViT


class OnlyPaddingIsZero(GeneralizedRCNNTransform):
    """torchvision's normalise, resize and pad, where only padding is exactly 0.

    Images here are floats, so pixels may have exactly the mean's colour and become 0. They are replaced by the smallest
    step above 0, which is far less than a grey level, so that ``drop_padding`` finds the padding exactly.
    """

    def batch_images(self, images: Sequence[Tensor], size_divisible: int = 32) -> Tensor:
        """Pad normalised images (3, H, W) of any sizes with 0 at the right and bottom: (B, 3, H, W)."""
        marked = [torch.where(image == 0, torch.finfo(image.dtype).eps, image) for image in images]
        return super().batch_images(marked, size_divisible)


def make_transform(
    backbone: APTViT, min_size: int | Sequence[int], max_size: int, resize_in_training: bool, options: dict[str, Any]
) -> OnlyPaddingIsZero:
    """Build the transform with the backbone's pixel format, and take its arguments out of ``options``.

    Raises:
        TypeError, ValueError: for sizes that are not pixels.
    """
    # torchvision's pixels are in [0, 1], the backbone's pixel format is in grey levels.
    pixels = backbone.pixel_format
    mean, std = ([level / 255 for level in levels] for levels in (pixels.mean, pixels.std))
    divisor = options.pop("size_divisible", 2 * backbone.patch_size)
    fixed_size = options.pop("fixed_size", None)
    sizes = (min_size,) if isinstance(min_size, str) or not isinstance(min_size, Sequence) else tuple(min_size)
    sizes = tuple(whole(1)("min_size", size) for size in sizes)
    max_size = whole(1)("max_size", max_size)
    if not sizes:
        raise ValueError(f"min_size={min_size} and max_size={max_size} must be pixels, one size at least")
    return OnlyPaddingIsZero(sizes, max_size, mean, std, divisor, fixed_size, _skip_resize=not resize_in_training)
