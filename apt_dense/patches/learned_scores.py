"""Scores learned from labels: how much of a patch is expected to show something else than most of it.

A small convolutional network looks at each patch and two patches around it, at 16 pixels a patch whatever its scale, so
one network serves all scales and patch sizes. ``tools/fit_scorer.py`` trains it in minutes and writes it to a file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.patches.scorer_layers import Layer, Shape, convolve, layers_from, tensors_of

#: Ratio of each scale's threshold to that of the scale below. A patch that replaces four saves a quarter as many tokens
#: for its area as they did, and may hide a quarter.
NEXT_SCALE = 0.25
USUAL_THRESHOLDS = 0.02, 0.02 * NEXT_SCALE  # a patch of the first scale may show something else on 2 % of it
PIXELS = 16  # of a patch, as the network sees it
MARGIN = 3  # patches around the image: what its outermost patches see ends within them
LAYERS = (
    Shape(3, 16, 3, 2), Shape(16, 24, 3, 2), Shape(24, 48, 3), Shape(48, 48, 3, 2), Shape(48, 48, 3, 2),
    Shape(48, 48, 3), Shape(48, 1, 1),
)  # fmt: skip


class LearnedScorer:
    """A scorer (``apt_dense.patches.scores.Scorer``) with fixed weights.

    Scores are between 0 and 1: about the share of the patch's pixels that are of another class than most of it.

    Args:
        layers: weights and biases, of the shapes of ``LAYERS``.
        padding: RGB grey levels of a host's padding; beyond an image the network sees the same, so that scores do not
            depend on what an image is batched with.
    """

    KIND = "learned_scorer"

    def __init__(self, layers: Sequence[Layer], padding: Sequence[float]) -> None:
        self.layers, self.padding = tuple(layers), tuple(map(float, padding))
        self._on_device = {layers[0].weight.device: self.layers}

    @classmethod
    def from_file(
        cls, path: str | Path, note: Mapping[str, Any], tensors: Mapping[str, Tensor], padding: Sequence[float]
    ) -> "LearnedScorer":
        """The scorer that a file holds. Raises ValueError for weights of other shapes, or that are not finite."""
        return cls(layers_from(tensors, LAYERS, path), padding)

    def content(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The note and the tensors of its file."""
        return {self.KIND: 1}, tensors_of(self.layers)

    def __call__(self, pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
        """Score pixels (B, 3, H, W) float32 RGB in [0, 255]: one map (B, H // size, W // size) in (0, 1) per scale."""
        layers = self._layers(pixels.device)
        images = centred(pixels, self.padding)
        return tuple(self._map(images, patch_size * 2**scale, layers) for scale in scales)

    def _map(self, images: Tensor, size: int, layers: Sequence[Layer]) -> Tensor:
        rows, columns = (n // size for n in images.shape[-2:])
        if rows == 0 or columns == 0:
            return images.new_zeros(len(images), rows, columns)
        return torch.sigmoid(run(layers, canvas(images, size))).square()

    def _layers(self, device: torch.device) -> Sequence[Layer]:
        if device not in self._on_device:
            self._on_device[device] = tuple(Layer(*(t.to(device) for t in layer)) for layer in self.layers)
        return self._on_device[device]


def centred(pixels: Tensor, padding: Sequence[float]) -> Tensor:
    """RGB grey levels (B, 3, H, W) -> the network's input range, in which ``padding`` is 0."""
    return (pixels - pixels.new_tensor(padding).view(3, 1, 1)) / 255


def canvas(images: Tensor, size: int) -> Tensor:
    """Centred images (B, 3, H, W) -> the same with a margin of padding, at ``PIXELS`` a patch.

    Returns:
        (B, 3, 16 (h + 6), 16 (w + 6)) of h x w complete patches of ``size`` pixels.
    """
    height, width = images.shape[-2:]
    rows, columns = height // size + 2 * MARGIN, width // size + 2 * MARGIN
    margin = MARGIN * size
    around = margin, columns * size - width - margin, margin, rows * size - height - margin
    return F.interpolate(F.pad(images, around), size=(rows * PIXELS, columns * PIXELS), mode="bilinear", antialias=True)


def run(layers: Sequence[Layer], images: Tensor) -> Tensor:
    """The network on a canvas -> logits (B, h, w) of the patches inside its margin."""
    return inside(convolve(layers, LAYERS, images))


def inside(logits: Tensor) -> Tensor:
    """Logits (B, 1, h + 6, w + 6) of a canvas -> (B, h, w) without its margin."""
    return logits[:, 0, MARGIN:-MARGIN, MARGIN:-MARGIN]
