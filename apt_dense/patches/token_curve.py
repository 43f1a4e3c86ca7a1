"""Token curves: how many patches of each scale images leave as all thresholds are scaled by a factor.

All factors are evaluated at once, since the merges are known from the scores: a cell belongs to a patch of scale s or
more from the smallest factor on at which a patch of at least that scale over it is flat.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from apt_dense.patches.blocks_of_pixels import enlarged
from apt_dense.patches.image_preparation import filled_region
from apt_dense.patches.partition import Bounds
from apt_dense.patches.selector import PatchSelector


@torch.no_grad()
def patches_by_factor(selector: PatchSelector, images: Tensor, factors: Tensor) -> Tensor:
    """Count the patches that images are cut into with thresholds scaled by each factor.

    Args:
        selector: its thresholds are those to scale; a token budget, a minimum and regions are not regarded.
        images: (B, 3, H, W) normalised, as for :meth:`PatchSelector.scale_map`.
        factors: (F,) ascending, at least 0.

    Returns:
        (B, F, number of scales) int64, equal to ``count`` of a selector with the scaled thresholds.

    Raises:
        ValueError: for factors that do not ascend, and as :meth:`PatchSelector.scale_map`.
    """
    merges = merge_steps(selector, images, factors)
    steps, counts = len(factors), []
    beyond = torch.zeros(len(images), steps, dtype=torch.long)  # cells in patches of the next scale or more
    for scale in range(len(merges.blocks), 0, -1):
        since = merges.cells(scale)
        within = torch.stack([_by_step(own[keep], steps) for own, keep in zip(since, merges.counted, strict=True)])
        counts.append((within - beyond) // 4**scale)
        beyond = within
    counts.append(merges.counted.sum((1, 2))[:, None] - beyond)
    return torch.stack(counts[::-1], -1)


class MergeSteps(NamedTuple):
    """At which of F factors patches are merged.

    Args:
        blocks: for scales 1, 2, ...: (B, h >> scale, w >> scale) int64, the place of the first factor at which a block
            is flat; F where it never is, or may not be merged.
        counted: (B, h, w) bool, the cells that have a token at all.
        never: F.
    """

    blocks: list[Tensor]
    counted: Tensor
    never: int

    def cells(self, scale: int) -> Tensor:
        """The place of the first factor at which each cell is in a patch of that scale or more: (B, h, w) int64."""
        least = torch.full(self.counted.shape, self.never, dtype=torch.long)
        for number in range(scale, len(self.blocks) + 1):
            _lower_blocks(least, self.blocks[number - 1], number)
        return least


def merge_steps(selector: PatchSelector, images: Tensor, factors: Tensor) -> MergeSteps:
    """Find the factors at which patches are merged. Arguments and errors as those of :func:`patches_by_factor`."""
    if factors.ndim != 1 or not len(factors) or factors[0] < 0 or (factors.diff() <= 0).any():
        raise ValueError(f"factors {factors.tolist()}: expected ascending numbers from 0 on")
    selector = replace(selector, token_budget=None, min_tokens=None)
    images = selector.whole_patches(images)
    grid = tuple(side // selector.patch_size for side in images.shape[-2:])
    bounds = Bounds(filled_region(images), grid, selector.patch_size, selector.window_size)
    whole = torch.ones(len(images), *grid, dtype=torch.bool)
    blocks = [
        _first_step(score, threshold, factors).masked_fill(~bounds.uncut(scale), len(factors))
        for scale, (score, threshold) in enumerate(zip(selector.scores(images), selector.thresholds, strict=True), 1)
    ]
    return MergeSteps(blocks, bounds.begin_inside(0) if selector.drop_padding else whole, len(factors))


def _first_step(score: Tensor, threshold: float, factors: Tensor) -> Tensor:
    """The first factor at which each score is below the scaled threshold, by its place; their number if none is."""
    # As a selector would compare them: thresholds are Python's numbers, scores are float32.
    edges = (factors.double() * threshold).float()
    return torch.searchsorted(edges, score.contiguous(), right=True).masked_fill(score.isnan(), len(factors))


def _lower_blocks(since: Tensor, merges: Tensor, scale: int) -> None:
    """Lower, in place, the steps of the cells (B, h, w) under blocks (B, h >> scale, w >> scale) to those of these."""
    cells = enlarged(merges, 2**scale)
    part = since[:, : cells.shape[1], : cells.shape[2]]
    torch.minimum(part, cells, out=part)


def _by_step(since: Tensor, steps: int) -> Tensor:
    """How many of the steps (N,) are reached at each: (steps,)."""
    return torch.bincount(since, minlength=steps + 1)[:steps].cumsum(0)
