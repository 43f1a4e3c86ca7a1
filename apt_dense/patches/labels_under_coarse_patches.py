"""Calibration by labels: what coarse patches would hide of labelled images, as thresholds are scaled by a factor.

A coarse patch over more than one class gives all of its cells one token: the figure by which thresholds can be chosen
before anything is trained.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.patches.selector import PatchSelector
from apt_dense.patches.token_curve import MergeSteps, merge_steps

IGNORED = 255


class LabelMixing(NamedTuple):
    """Counts of an image at each of F factors.

    Args:
        coarse: (F,) coarse patches.
        mixed: (F,) coarse patches that hold more than one class.
        border: (F,) pixels on a border between classes that lie under coarse patches.
        borders: pixels on a border between classes, in all.
        boxes: (F,) boxes of which half of the cells or more lie under coarse patches.
    """

    coarse: Tensor
    mixed: Tensor
    border: Tensor
    borders: int
    boxes: Tensor


@torch.no_grad()
def mixing_by_factor(
    selector: PatchSelector, image: Tensor, labels: Tensor, factors: Tensor, boxes: Tensor | None = None
) -> LabelMixing:
    """Count what coarse patches hide with thresholds scaled by each factor.

    Args:
        selector: its thresholds are those to scale.
        image: (1, 3, H, W) normalised.
        labels: (H, W) integers; ``IGNORED`` belongs to no class.
        factors: (F,) ascending, at least 0.
        boxes: (n, 4) x1, y1, x2, y2 in pixels, such as those of small objects.

    Raises:
        ValueError: for labels of another size, and as :func:`patches_by_factor`.
    """
    if labels.shape != image.shape[-2:]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; expected that of the image, {tuple(image.shape[-2:])}"
        )
    merges = merge_steps(selector, image, factors)
    coarse, mixed = torch.zeros(2, len(factors), dtype=torch.long)
    for scale, block in enumerate(merges.blocks, start=1):
        lasts_from, lasts_to = block[0], _covered(merges, scale)
        exists = lasts_from < lasts_to
        holds_more = _is_mixed(labels, selector.patch_size << scale, tuple(block.shape[1:]))
        coarse += _alive(lasts_from[exists], lasts_to[exists], merges.never)
        exists &= holds_more
        mixed += _alive(lasts_from[exists], lasts_to[exists], merges.never)
    on_border = _borders(labels)
    hidden = _pixels_by_step(on_border, merges, selector.patch_size)
    under = _boxes_by_step(torch.zeros(0, 4) if boxes is None else boxes, merges, selector.patch_size)
    return LabelMixing(coarse, mixed, hidden, int(on_border.sum()), under)


def _covered(merges: MergeSteps, scale: int) -> Tensor:
    """The step at which a larger patch takes each block (h >> scale, w >> scale) of a scale."""
    rows, columns = merges.blocks[scale - 1].shape[1:]
    if scale == len(merges.blocks):
        return torch.full((rows, columns), merges.never)
    cells = merges.cells(scale + 1)[0]
    return cells[: rows << scale : 1 << scale, : columns << scale : 1 << scale]


def _alive(start: Tensor, stop: Tensor, steps: int) -> Tensor:
    """How many of the intervals [start, stop) hold each step: (steps,)."""
    changes = torch.bincount(start, minlength=steps + 1) - torch.bincount(stop, minlength=steps + 1)
    return changes.cumsum(0)[:steps]


def _is_mixed(labels: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """Check which blocks (rows, columns) of that many pixels hold more than one class."""
    if 0 in grid:
        return torch.zeros(grid, dtype=torch.bool)
    ignored = labels == IGNORED
    # Blocks at the right and bottom may reach beyond the image.
    pad = (0, max(0, grid[1] * size - labels.shape[1]), 0, max(0, grid[0] * size - labels.shape[0]))
    highest, lowest = (
        F.max_pool2d(F.pad((sign * labels).float().masked_fill(ignored, -1e9), pad, value=-1e9)[None], size)[0]
        for sign in (1, -1)
    )
    return (highest > -lowest)[: grid[0], : grid[1]]


def _borders(labels: Tensor) -> Tensor:
    """Mark the pixels (H, W) whose right or lower neighbour is of another class."""
    marked = torch.zeros_like(labels, dtype=torch.bool)
    for first, second, place in (
        (labels[:, :-1], labels[:, 1:], marked[:, :-1]),
        (labels[:-1], labels[1:], marked[:-1]),
    ):
        place |= (first != second) & (first != IGNORED) & (second != IGNORED)
    return marked


def _pixels_by_step(marked: Tensor, merges: MergeSteps, patch_size: int) -> Tensor:
    """How many of the marked pixels (H, W) lie under coarse patches at each step."""
    since = merges.cells(1)[0]
    y, x = marked.nonzero().T // patch_size
    inside = (y < since.shape[0]) & (x < since.shape[1])
    return torch.bincount(since[y[inside], x[inside]], minlength=merges.never + 1)[: merges.never].cumsum(0)


def _boxes_by_step(boxes: Tensor, merges: MergeSteps, patch_size: int) -> Tensor:
    """How many of the boxes (n, 4) have half of their cells, or more, under coarse patches at each step."""
    since = merges.cells(1)[0]
    first = (boxes[:, :2] / patch_size).floor().long()
    last = torch.maximum((boxes[:, 2:] / patch_size).ceil().long(), first + 1)  # a point is in a cell, too
    steps = [merges.never] * len(boxes)
    for number, (left, top, right, bottom) in enumerate(torch.cat([first, last], 1).tolist()):
        cells = since[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)].flatten()
        if len(cells):
            steps[number] = int(cells.sort().values[(len(cells) - 1) // 2])
    return torch.bincount(torch.tensor(steps, dtype=torch.long), minlength=merges.never + 1)[: merges.never].cumsum(0)
