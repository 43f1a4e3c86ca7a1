"""Token budget: score maps -> scale map with a number of tokens that is known beforehand.

A merge turns the four patches of a quarter each into one, from small to large, and saves three tokens. So the number
of merges that a budget needs follows from the size of the image alone, and which ones are made from their scores.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from apt_dense.patches.partition import DROPPED, Bounds, anchors_of, paint_blocks
from apt_dense.patches.regions import Regions
from apt_dense.runtime import require

_GREATEST = 1e37  # no order of a merge by its score is greater
_GREATEST_RATIO = 2.0**40  # of thresholds
_LAST = 1e38  # order of merges that are made only where the budget cannot be held without


def wanted_tokens(budget: float | int, grid: tuple[int, int]) -> int:
    """Tokens per image that a budget, a share (float) or a number (int), means for a grid."""
    return max(1, int(budget * grid[0] * grid[1])) if isinstance(budget, float) else int(budget)


def fewest_tokens(grid: tuple[int, int], scales: int, window_size: int = 0) -> int:
    """Tokens that remain of a grid when everything is merged, by patches of up to ``scales`` doublings."""
    merges = 0
    for scale in range(1, scales + 1):
        rows, columns = (_patches_along(cells, 2**scale, window_size) for cells in grid)
        merges += rows * columns
    return grid[0] * grid[1] - 3 * merges


def _patches_along(cells: int, side: int, window_size: int) -> int:
    """Count the whole patches of that many cells that fit along an axis without crossing the border of a window."""
    firsts = range(0, cells - side + 1, side)
    return len([i for i in firsts if not window_size or i // window_size == (i + side - 1) // window_size])


@torch.compiler.assume_constant_result
def least_tokens(grid: tuple[int, int], scales: int, window_size: int, drops_padding: bool) -> int:
    """The fewest tokens that every image of a grid can be cut into; with dropped padding, whatever part it fills."""
    return (_most_of_the_fewest if drops_padding else fewest_tokens)(grid, scales, window_size)


@cache
def _most_of_the_fewest(grid: tuple[int, int], scales: int, window_size: int) -> int:
    """An image that fills a row of cells less may need more, and so on until windows and largest patches repeat."""
    period = 2 * max(window_size, 2**scales)
    rows, columns = (range(max(1, cells - period), cells + 1) for cells in grid)
    return max(fewest_tokens((r, c), scales, window_size) for r in rows for c in columns)


@torch.no_grad()
def partition_by_budget(
    scores: Sequence[Tensor],
    thresholds: Sequence[float],
    bounds: Bounds,
    tokens: int,
    drops_padding: bool,
    regions: Regions | None = None,
) -> Tensor:
    """Make the merges of the lowest scores, in units of their scale's threshold, until ``tokens`` hold the image.

    A patch of scale s waits for its four quarters, so its order is the largest score among it and all patches inside.
    In fixed shapes and without waiting for the device. Arguments as for ``partition_by_thresholds``, and

    Args:
        tokens: per image; see ``PatchSelector.tokens_per_image``.
        drops_padding: mark padding ``DROPPED``, and do not count it. Patches may cross the edge of the padding (then:
            inside the cells at that edge), but only where the budget cannot be held without.
        regions: merges inside what shall be coarse are made first. Those that touch what must stay fine are made last
            of all, and only where the budget cannot be held without.

    Returns:
        Scale map (B, *grid) int8.

    Raises:
        ValueError: on a CPU; RuntimeError elsewhere or compiled, perhaps later: if an image that is partly padding
            cannot be cut into so few tokens.
    """
    orders = _merge_orders(scores, thresholds, bounds, drops_padding)
    merges = ((_filled_cells(bounds, drops_padding) - tokens).clamp(min=0) + 2) // 3
    require(
        (torch.cat([order.flatten(1) for order in orders], 1).isfinite().sum(1) >= merges).all(),
        f"token budget of {tokens} tokens: an image leaves more than that when everything is merged; raise the budget",
    )
    scale_map = _merge(orders, _first(orders, merges, _turns(orders, bounds, regions)), bounds)
    return bounds.drop_padding(scale_map) if drops_padding else scale_map


@torch.no_grad()
def keep_at_least(
    least: float | int, scale_map: Tensor, scores: Sequence[Tensor], thresholds: Sequence[float], bounds: Bounds,
    regions: Regions | None = None,
) -> Tensor:  # fmt: skip
    """Partition images that have too few tokens again, by the merges of the lowest scores.

    Args:
        least: tokens per image, as a share (float) of its cells with a token, or a number (int).
        scale_map: (B, *grid), by thresholds; cells marked ``DROPPED`` stay so.
        scores, thresholds, bounds, regions: those that it was made with.

    Returns:
        Scale map (B, *grid) int8. An image has at most two tokens more than asked for, if it had too few.
    """
    dropped = scale_map == DROPPED
    cells = (~dropped).sum((1, 2))
    # In float64, less a rounding error: 0.6 of 100 cells are 60 tokens.
    share = (cells.double() * least - 1e-6).ceil().long()
    wanted = share if isinstance(least, float) else torch.full_like(cells, least)
    short = anchors_of(scale_map.long()).sum((1, 2)) < torch.minimum(wanted, cells)
    if not short.any():
        return scale_map
    orders = _merge_orders(scores, thresholds, bounds, bool(dropped.any()))
    merges = torch.where(short, (cells - wanted).clamp(min=0) // 3, 0)
    again = _merge(orders, _first(orders, merges, _turns(orders, bounds, regions)), bounds)
    return torch.where(short[:, None, None], again.masked_fill(dropped, DROPPED), scale_map)


def _filled_cells(bounds: Bounds, drops_padding: bool) -> Tensor:
    """Cells (B,) that tokens are made of."""
    total = bounds.grid[0] * bounds.grid[1]
    return bounds.filled_cells().prod(1) if drops_padding else torch.full_like(bounds.region[:, 0], total)


def _turns(orders: Sequence[Tensor], bounds: Bounds, regions: Regions | None) -> list[Tensor] | None:
    """When the merges of each scale (B, h >> s, w >> s) are to be made, before their scores are looked at: 0 inside
    what shall be coarse, 1 elsewhere, 2 where something must stay fine, 3 where there is none."""
    if regions is None:
        return None
    # A patch is wholly inside what shall be coarse only if its quarters are, and touches what must stay fine if one of
    # them does: the turns of quarters never come after that of the patch they make up.
    turns = []
    for scale, order in enumerate(orders, start=1):
        turn = torch.where(regions.may_be_coarse(scale), 1, 2)
        turn = turn.masked_fill(regions.shall_be_coarse(scale) & bounds.uncut(scale), 0)
        turns.append(turn.masked_fill(order.isinf(), 3))
    return turns


def _first(orders: Sequence[Tensor], count: Tensor, turns: Sequence[Tensor] | None) -> Tensor:
    """Mark the first ``count`` (B,) of all merges, by their turns and then by their orders: (B, n) bool."""
    # Stable, and small scales come first: of equal scores the quarters go before the patch they make up.
    flat = torch.cat([order.flatten(1) for order in orders], 1)
    sequence = flat.argsort(dim=1, stable=True)
    if turns is not None:
        turn = torch.cat([each.flatten(1) for each in turns], 1)
        sequence = sequence.gather(1, turn.gather(1, sequence).argsort(dim=1, stable=True))
    made = torch.zeros_like(flat, dtype=torch.bool)
    return made.scatter(1, sequence, torch.arange(flat.shape[1], device=flat.device) < count[:, None])


def _merge(orders: Sequence[Tensor], made: Tensor, bounds: Bounds) -> Tensor:
    """The scale map (B, *grid) after the merges of all scales (B, n) that are made."""
    scale_map = torch.zeros(len(made), *bounds.grid, dtype=torch.int8, device=made.device)
    counts = [order[0].numel() for order in orders]
    for scale, (order, chosen) in enumerate(zip(orders, made.split(counts, 1), strict=True), start=1):
        paint_blocks(scale_map, chosen.view(order.shape), scale)
    return scale_map


def _units(thresholds: Sequence[float]) -> list[float]:
    """Thresholds in units of the least: only their ratios matter, and these numbers and what is divided by them stay
    inside float32. Infinite ones are equal."""
    least = min(thresholds, default=1.0)
    return [1.0 if threshold == least else min(threshold / least, _GREATEST_RATIO) for threshold in thresholds]


def _merge_orders(
    scores: Sequence[Tensor], thresholds: Sequence[float], bounds: Bounds, drops_padding: bool
) -> list[Tensor]:
    """The order (B, grid rows >> s, grid columns >> s) of the merges of each scale; infinite where there is none."""
    orders: list[Tensor] = []
    cells = bounds._replace(region=bounds.filled_cells() * bounds.patch_size)
    for scale, (score, unit) in enumerate(zip(scores, _units(thresholds), strict=True), start=1):
        score = score.nan_to_num(nan=_GREATEST, posinf=_GREATEST)
        order = torch.where(bounds.uncut(scale), (score / unit).clamp(max=_GREATEST), _LAST)
        if drops_padding:
            order = torch.where(cells.uncut(scale) & bounds.begin_inside(scale), order, math.inf)
        order = torch.where(bounds.within_windows(scale), order, math.inf)
        orders.append(torch.maximum(order, _after_quarters(orders[-1], order)) if orders else order)
    return orders


def _after_quarters(finer: Tensor, order: Tensor) -> Tensor:
    """The last merge among the quarters of each patch of ``order`` (B, h, w), in the finer scale's orders."""
    rows, columns = order.shape[1:]
    return finer[:, : 2 * rows, : 2 * columns].unflatten(2, (columns, 2)).unflatten(1, (rows, 2)).amax((2, 4))
