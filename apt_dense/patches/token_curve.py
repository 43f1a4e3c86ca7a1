"""Token curves: how many patches of each scale images leave as all thresholds are scaled by a factor.

All factors are evaluated at once, since the merges are known from the scores: a cell belongs to a patch of scale s or
more from the smallest factor on at which a patch of at least that scale over it is flat.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from apt_dense.patches.image_preparation import filled_region
from apt_dense.patches.partition import Bounds
from apt_dense.patches.selector import PatchSelector


@torch.no_grad()
def patches_by_factor(selector: PatchSelector, images: Tensor, factors: Tensor) -> Tensor:
    """Count the patches that images are cut into with thresholds scaled by each factor.

    Args:
        selector: its thresholds are those to scale; a token budget is not regarded.
        images: (B, 3, H, W) normalised, as for :meth:`PatchSelector.scale_map`.
        factors: (F,) ascending, at least 0.

    Returns:
        (B, F, number of scales) int64, equal to ``count`` of a selector with the scaled thresholds.

    Raises:
        ValueError: for factors that do not ascend, and as :meth:`PatchSelector.scale_map`.
    """
    if factors.ndim != 1 or not len(factors) or factors[0] < 0 or (factors.diff() <= 0).any():
        raise ValueError(f"factors {factors.tolist()}: expected ascending numbers from 0 on")
    selector = replace(selector, token_budget=None)
    images = selector.whole_patches(images)
    grid = tuple(side // selector.patch_size for side in images.shape[-2:])
    bounds = Bounds(filled_region(images), grid, selector.patch_size, selector.window_size)
    counted = bounds.begin_inside(0) if selector.drop_padding else None
    return _count(selector.scores(images), selector.thresholds, bounds, factors.float(), counted)


def _count(
    scores: Sequence[Tensor], thresholds: Sequence[float], bounds: Bounds, factors: Tensor, counted: Tensor | None
) -> Tensor:
    batch, steps = len(bounds.region), len(factors)
    counted = torch.ones(batch, *bounds.grid, dtype=torch.bool) if counted is None else counted
    # From the largest scale down: the step at which each cell belongs to a patch of that scale or more.
    since = torch.full((batch, *bounds.grid), steps, dtype=torch.long)
    beyond = torch.zeros(batch, steps, dtype=torch.long)  # cells in patches of the next scale or more
    counts = []
    for scale in range(len(scores), 0, -1):
        merges = _first_step(scores[scale - 1], thresholds[scale - 1], factors)
        merges = merges.masked_fill(~bounds.uncut(scale), steps)
        _lower_blocks(since, merges, scale)
        within = _cells_by_step(since, counted, steps)
        counts.append((within - beyond) // 4**scale)
        beyond = within
    counts.append(counted.sum((1, 2))[:, None] - beyond)
    return torch.stack(counts[::-1], -1)


def _first_step(score: Tensor, threshold: float, factors: Tensor) -> Tensor:
    """The first factor at which each score is below the scaled threshold, by its place; their number if none is."""
    # As a selector would compare them: thresholds are Python's numbers, scores are float32.
    edges = (factors.double() * threshold).float()
    return torch.searchsorted(edges, score.contiguous(), right=True).masked_fill(score.isnan(), len(factors))


def _lower_blocks(since: Tensor, merges: Tensor, scale: int) -> None:
    """Lower, in place, the steps of the cells (B, h, w) under blocks (B, h >> scale, w >> scale) to those of these."""
    cells = merges.repeat_interleave(2**scale, dim=1).repeat_interleave(2**scale, dim=2)
    part = since[:, : cells.shape[1], : cells.shape[2]]
    torch.minimum(part, cells, out=part)


def _cells_by_step(since: Tensor, counted: Tensor, steps: int) -> Tensor:
    """How many counted cells have reached each step: (B, steps)."""
    return torch.stack(
        [
            torch.bincount(own[keep], minlength=steps + 1)[:steps].cumsum(0)
            for own, keep in zip(since, counted, strict=True)
        ]
    )
