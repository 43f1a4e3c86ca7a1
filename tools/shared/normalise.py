"""8-bit pictures -> the normalised images that a model takes."""

import numpy as np
import torch
from torch import Tensor

from apt_dense.options import PixelFormat


def to_grey_levels(picture: np.ndarray) -> Tensor:
    """Convert a picture (H, W, 3) uint8 RGB to (1, 3, H, W) float32 in [0, 255]."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()


def normalise(grey_levels: Tensor, pixel_format: PixelFormat) -> Tensor:
    """Normalise RGB grey levels (B, 3, H, W), on their device, and order channels as a model expects them.

    The inverse of ``apt_dense.patches.image_preparation.denormalise``.
    """
    ordered = grey_levels if pixel_format.channel_order == "RGB" else grey_levels.flip(1)
    mean, std = (
        torch.tensor(values, device=grey_levels.device).view(3, 1, 1)
        for values in (pixel_format.mean, pixel_format.std)
    )
    return (ordered - mean) / std
