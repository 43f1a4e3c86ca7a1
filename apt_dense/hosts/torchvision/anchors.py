"""Anchors at the strides that a pyramid's levels have."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator


class AnchorsOfStrides(AnchorGenerator):
    """torchvision's ``AnchorGenerator`` for levels of known strides.

    Upstream divides the batch's size by the level's: 480 rows of pixels have 8 rows of stride 64, the last of them in
    part, and their anchors lie 60 pixels apart, up to half a stride too far up and left.

    Args:
        sizes: sides of the anchors of each level, in pixels.
        aspect_ratios: of all anchors.
        strides: of each level, in pixels.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], aspect_ratios: Sequence[float], strides: Sequence[int]) -> None:
        super().__init__(tuple(sizes), (tuple(aspect_ratios),) * len(sizes))
        self.strides = tuple(strides)

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        """Return the anchors (cells * anchors of a cell, 4) of each level, as x1, y1, x2, y2 in pixels.

        Args:
            grid_sizes: rows and columns of each level.
            strides: upstream's, of which only the device is used.
        """
        known = [[torch.full_like(theirs[0], stride)] * 2 for theirs, stride in zip(strides, self.strides, strict=True)]
        return super().grid_anchors(grid_sizes, known)
