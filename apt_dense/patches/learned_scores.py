"""Scores learned from labels: how much of a patch is expected to show something else than most of it.

A small convolutional network looks at each patch and two patches around it, at 16 pixels a patch whatever its scale, so
one network serves all scales and patch sizes. ``tools/fit_scorer.py`` trains it in minutes and writes it to a file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from apt_dense.patches.scorer_layers import FixedScorer, Shape, Weights, checked, convolve, normalised, sizes_of

#: Ratio of each scale's threshold to that of the scale below. A patch that replaces four saves a quarter as many tokens
#: for its area as they did, and may hide a quarter.
NEXT_SCALE = 0.25
USUAL_THRESHOLDS = 0.02, 0.02 * NEXT_SCALE  # a patch of the first scale may show something else on 2 % of it
RANGE = (255.0,) * 3  # of grey levels
PIXELS = 16  # of a patch, as the network sees it
MARGIN = 3  # patches around the image: what its outermost patches see ends within them
LAYERS = (
    Shape(3, 16, 3, 2), Shape(16, 24, 3, 2), Shape(24, 48, 3), Shape(48, 48, 3, 2), Shape(48, 48, 3, 2),
    Shape(48, 48, 3), Shape(48, 1, 1),
)  # fmt: skip


class LearnedScorer(FixedScorer):
    """A convolutional network of 77,000 weights.

    Args:
        weights: of layers of the shapes of ``LAYERS``.
        padding: RGB grey levels of a host's padding; beyond an image the network sees the same, so that scores do not
            depend on what an image is batched with.
    """

    KIND = "learned_scorer"

    def __init__(self, weights: Weights, padding: Sequence[float]) -> None:
        super().__init__(weights)
        self.padding = tuple(map(float, padding))

    @classmethod
    def from_file(
        cls, path: str | Path, note: Mapping[str, Any], weights: Weights, padding: Sequence[float]
    ) -> "LearnedScorer":
        """The scorer that a file holds. Raises ValueError for weights of other shapes, or that are not finite."""
        return cls(checked(weights, sizes_of(LAYERS), path), padding)

    def note(self) -> dict[str, Any]:
        return {self.KIND: 1}

    def normalise(self, pixels: Tensor) -> Tensor:
        """RGB grey levels (B, 3, H, W) -> the network's input range, in which padding is 0."""
        return normalised(pixels, self.padding, RANGE)

    def logits(self, images: Tensor, size: int) -> Tensor:
        return inside(convolve(self.weights_on(images.device), LAYERS, canvas(images, size)))


def canvas(images: Tensor, size: int) -> Tensor:
    """Normalised images (B, 3, H, W) -> the same with a margin of padding, at ``PIXELS`` a patch.

    Returns:
        (B, 3, 16 (h + 6), 16 (w + 6)) of h x w complete patches of ``size`` pixels.
    """
    height, width = images.shape[-2:]
    rows, columns = height // size + 2 * MARGIN, width // size + 2 * MARGIN
    margin = MARGIN * size
    around = margin, columns * size - width - margin, margin, rows * size - height - margin
    return F.interpolate(F.pad(images, around), size=(rows * PIXELS, columns * PIXELS), mode="bilinear", antialias=True)


def inside(logits: Tensor) -> Tensor:
    """Logits (B, 1, h + 6, w + 6) of a canvas -> (B, h, w) without its margin."""
    return logits[:, 0, MARGIN:-MARGIN, MARGIN:-MARGIN]
