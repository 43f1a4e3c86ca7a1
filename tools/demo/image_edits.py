"""Mix, tint, mirror and resize pieces of photographs.

All images are HWC uint8 RGB in [0, 255]; all random choices come from the generator that is passed in.
"""

import cv2
import numpy as np
from numpy.random import Generator


def blend(below: np.ndarray, above: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Mix two (H, W, 3) uint8 images; share (H, W) float32 in [0, 1] is the part of ``above``."""
    mixed = below + (above.astype(np.float32) - below) * share[..., None]
    return np.rint(mixed).astype(np.uint8)


def jitter(image: np.ndarray, brightness: float, tint: float, rng: Generator) -> np.ndarray:
    """Scale all colours by up to 1 +- brightness and each channel by up to 1 +- tint more; alpha stays."""
    gains = rng.uniform(1 - tint, 1 + tint, 3) * rng.uniform(1 - brightness, 1 + brightness)
    result = image.copy()
    result[..., :3] = np.rint(np.minimum(image[..., :3] * gains.astype(np.float32), 255))
    return result


def flip(image: np.ndarray, rng: Generator) -> np.ndarray:
    """Mirror the image in half of the cases."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def resize_to(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (h, w, C) uint8 to (height, width, C): area averages when shrinking, bilinear when growing."""
    shrinks = height < image.shape[0] or width < image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
