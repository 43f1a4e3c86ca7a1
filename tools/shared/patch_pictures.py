"""A photo next to the patches that it is cut into, in a size in which they can be told apart."""

import math

import cv2
import numpy as np

from apt_dense import PatchSelector
from apt_dense.drawing import draw_patches

from shared.normalise import normalise, to_grey_levels
from shared.picture_layout import side_by_side, stack, text_bar, token_caption
from shared.token_counts import Patches, choose_patches

SMALLEST, LARGEST = 800, 2048  # pixels of the longer side as it is shown
MOST_ENLARGED = 6
LEAST_PATCH = 6  # pixels that the smallest patch is shown with
CLEAR_PATCH = 20  # pixels from which on its outline is drawn in full
GAP = 8  # pixels between the photo and its patches


def partition_photo(image: np.ndarray, selector: PatchSelector) -> Patches:
    """Cut an image (H, W, 3) uint8 RGB into patches."""
    return choose_patches(selector, normalise(to_grey_levels(image), selector.pixel_format))


def draw_photo(image: np.ndarray, selector: PatchSelector, patches: Patches) -> np.ndarray:
    """Draw an image (H, W, 3) uint8 RGB and its patches side by side under a caption.

    Small images are enlarged and large ones shrunk. Where patches are shown small, their outlines are fainter, so that
    the picture is not hidden by its grid.
    """
    shown_patch = _shown_patch(selector.patch_size, max(image.shape[:2]))
    factor = shown_patch / selector.patch_size
    shown = image
    if factor != 1:
        how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
        # Rounded down, so that the cells still cover it.
        height, width = (max(1, math.floor(side * factor)) for side in image.shape[:2])
        shown = cv2.resize(image, (width, height), interpolation=how)
    line, strength = max(1, shown_patch // 24), min(1.0, shown_patch / CLEAR_PATCH)
    drawn = draw_patches(shown, patches.scale_map[0].numpy(), shown_patch, line, strength)
    pair = side_by_side([shown, drawn], GAP)
    entries = [*token_caption(patches, selector.patch_size), (describe_choice(selector), None)]
    return stack([text_bar(pair.shape[1], entries, size=max(16, pair.shape[1] // 80)), pair])


def _shown_patch(patch_size: int, longer: int) -> int:
    """Return the pixels that the smallest patches are shown with in an image whose longer side is ``longer``."""
    if longer < SMALLEST:
        return min(math.ceil(patch_size * SMALLEST / longer), MOST_ENLARGED * patch_size)
    if longer > LARGEST:
        return min(patch_size, max(LEAST_PATCH, patch_size * LARGEST // longer))
    return patch_size


def describe_choice(selector: PatchSelector) -> str:
    """Say what decides about the patches, for example "entropy below 5.5 for 32 px, 4 for 64 px"."""
    sizes = [selector.patch_size << scale for scale in range(1, selector.num_scales)]
    pairs = zip(selector.thresholds, sizes, strict=True)
    thresholds = ", ".join(f"{threshold:g} for {size} px" for threshold, size in pairs)
    return f"{selector.scorer} below {thresholds}" if thresholds else "no thresholds: uniform patches"


def describe_counts(image: np.ndarray, selector: PatchSelector, patches: Patches) -> str:
    """Describe an image and its patches in one line."""
    height, width = image.shape[:2]
    return "   ".join([f"{width} x {height}", *(text for text, _ in token_caption(patches, selector.patch_size))])
