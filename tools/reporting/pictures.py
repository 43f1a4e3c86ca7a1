"""Pictures inside a page: a photo, its patches, its scores, as data URIs.

Score maps have one pixel for each cell of the base grid; the page enlarges them.
"""

import base64
from typing import NamedTuple

import cv2
import numpy as np

from apt_dense import PatchSelector
from apt_dense.drawing import draw_patches

from reporting.photo_figures import to_image
from shared.patch_pictures import CLEAR_PATCH
from shared.picture_layout import resize_longer_side
from shared.token_counts import choose_patches

LARGE, SMALL = 1000, 420  # pixels of the longer side of the patches and of the photo next to them
_LEAST_PATCH, _MOST_ENLARGED = 3, 6
_QUALITY = 80
BELOW, ABOVE = (0, 104, 139), (201, 84, 0)  # colours of the lowest and the highest score
_LEAST_STRENGTH = 0.12  # of a score at the threshold, whose side is still to be seen
_MIDDLE, _NONE = (250, 250, 247), (205, 205, 205)


class ScoreMap(NamedTuple):
    """The scores of the patches of one size.

    Args:
        scale: 1, 2, ...
        scores: (rows, columns) of the complete patches; may be empty.
        threshold: below which a patch stays whole; None with a budget, which has no fixed one.
    """

    scale: int
    scores: np.ndarray
    threshold: float | None

    @property
    def below(self) -> int:
        """Patches below the threshold."""
        return 0 if self.threshold is None else int((self.scores < np.float32(self.threshold)).sum())


def score_maps(picture: np.ndarray, selector: PatchSelector) -> list[ScoreMap]:
    """Score the patches of a picture (H, W, 3) uint8 RGB."""
    scores = selector.scores(selector.whole_patches(to_image(picture, selector)))
    thresholds = [None] * len(scores) if selector.token_budget is not None else selector.thresholds
    return [ScoreMap(s, m[0].numpy(), t) for s, (m, t) in enumerate(zip(scores, thresholds, strict=True), start=1)]


def draw_scores(found: ScoreMap, grid: tuple[int, int]) -> np.ndarray:
    """Colour the scores of a base grid (h, w): blue below the threshold, orange above, the paler the nearer to it; with
    a budget from white to orange. Cells that are in no complete patch are grey. Returns (h, w, 3) uint8."""
    drawn = np.full((*grid, 3), _NONE, np.uint8)
    if found.scores.size:
        scores = found.scores.astype(np.float64)
        middle = scores.min() if found.threshold is None else found.threshold
        colours = np.where((scores < middle)[..., None], BELOW, ABOVE)
        reach = np.where(scores < middle, middle - scores.min(), scores.max() - middle)
        least = 0 if found.threshold is None else _LEAST_STRENGTH
        with np.errstate(invalid="ignore"):
            distance = np.nan_to_num(
                np.abs(scores - middle) / np.maximum(reach, 1e-9), nan=1.0
            )  # of infinite thresholds
        strength = least + (1 - least) * distance.clip(0, 1)[..., None]
        patches = np.rint(_MIDDLE + (colours - np.array(_MIDDLE)) * strength).astype(np.uint8)
        cells = patches.repeat(1 << found.scale, 0).repeat(1 << found.scale, 1)[: grid[0], : grid[1]]
        drawn[: cells.shape[0], : cells.shape[1]] = cells
    return drawn


def draw_grid(picture: np.ndarray, selector: PatchSelector) -> np.ndarray:
    """Draw the patches of a picture (H, W, 3) uint8 RGB, about ``LARGE`` pixels wide or high."""
    longer = max(picture.shape[:2])
    shown = round(LARGE * selector.patch_size / longer)
    shown = min(max(shown, _LEAST_PATCH), _MOST_ENLARGED * selector.patch_size)
    factor = shown / selector.patch_size
    size = [max(1, int(side * factor)) for side in picture.shape[1::-1]]
    resized = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    scale_map = choose_patches(selector, to_image(picture, selector)).scale_map[0].numpy()
    return draw_patches(resized, scale_map, shown, max(1, shown // 24), min(1.0, shown / CLEAR_PATCH))


def draw_small(picture: np.ndarray) -> np.ndarray:
    """Shrink a picture to ``SMALL`` pixels; smaller ones stay as they are."""
    return resize_longer_side(picture, SMALL) if max(picture.shape[:2]) > SMALL else picture


def as_jpeg(picture: np.ndarray) -> str:
    """Encode a picture (H, W, 3) uint8 RGB as a data URI."""
    options = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)[1].tobytes()
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def as_png(picture: np.ndarray) -> str:
    """Encode a small picture (H, W, 3) uint8 RGB without loss as a data URI."""
    data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
