"""Token budget: score maps -> scale map with a number of tokens that is known beforehand.

A merge turns the four patches of a quarter each into one, from small to large, and saves three tokens. So the number
of merges that a budget needs follows from the size of the image alone, and which ones are made from their scores.
"""

import math
from collections.abc import Sequence
from functools import cache
from numbers import Real

import torch
from torch import Tensor

from apt_dense.patches.partition import begin_inside, drop_padding, paint_blocks, uncut_blocks, within_windows

_GREATEST = 1e29  # no order of a merge by its score is greater
_LAST = 1e30  # order of merges that are made only where the budget cannot be held without


def check_token_budget(
    budget: float | int | None, thresholds: Sequence[float], patch_size: int, img_size: tuple[int, int],
    window_size: int, drops_padding: bool = False,
) -> float | int | None:  # fmt: skip
    """The budget itself.

    Raises:
        TypeError: if it is neither a fraction (float) nor a count (int).
        ValueError: if it is out of range, has no thresholds that say how scores of different scales compare, or cannot
            be held at ``img_size``.
    """
    if budget is None:
        return None
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise TypeError(f"token_budget={budget!r} must be a fraction (float) or tokens per image (int)")
    if not (0 < budget <= 1 if isinstance(budget, float) else budget >= 1):
        raise ValueError(f"token_budget={budget!r} must be a fraction in (0, 1] or at least 1 token (an int)")
    if not thresholds or min(thresholds) <= 0:
        raise ValueError(
            f"token_budget={budget!r} with thresholds={tuple(thresholds)}: give one positive threshold per scale, such "
            f"as (5.5, 4.0); their ratios say which of two merges of different scales is made first"
        )
    grid = tuple(-(-size // patch_size) for size in img_size)
    least = _least_tokens(grid, len(thresholds), window_size, drops_padding)
    if _wanted(budget, grid) < least:
        raise ValueError(
            f"token_budget={budget!r} cannot be held: {grid[0]} x {grid[1]} patches leave up to {least} tokens when "
            f"all are merged; give more thresholds (larger patches) or a budget of at least {least}"
        )
    return budget


def fewest_tokens(grid: tuple[int, int], scales: int, window_size: int = 0) -> int:
    """Tokens that remain of a grid when everything is merged, by patches of up to ``scales`` doublings."""
    merges = 0
    for scale in range(1, scales + 1):
        rows, columns = (_within_windows(cells, 2**scale, window_size) for cells in grid)
        merges += rows * columns
    return grid[0] * grid[1] - 3 * merges


def _within_windows(cells: int, side: int, window_size: int) -> int:
    """How many whole patches of that many cells fit along an axis without crossing the border of a window."""
    firsts = range(0, cells - side + 1, side)
    return len([i for i in firsts if not window_size or i // window_size == (i + side - 1) // window_size])


@torch.compiler.assume_constant_result
def _least_tokens(grid: tuple[int, int], scales: int, window_size: int, drops_padding: bool) -> int:
    """The fewest tokens that every image of a grid can be cut into; with dropped padding, whatever part it fills."""
    return (_most_of_the_fewest if drops_padding else fewest_tokens)(grid, scales, window_size)


@cache
def _most_of_the_fewest(grid: tuple[int, int], scales: int, window_size: int) -> int:
    """An image that fills a row of cells less may need more, and so on until windows and largest patches repeat."""
    period = 2 * max(window_size, 2**scales)
    rows, columns = (range(max(1, cells - period), cells + 1) for cells in grid)
    return max(fewest_tokens((r, c), scales, window_size) for r in rows for c in columns)


def tokens_per_image(
    budget: float | int, grid: tuple[int, int], scales: int, window_size: int, drops_padding: bool
) -> int:
    """Tokens that each image of a grid gets: at most the budget, at least what any image can be cut into.

    Where no padding is dropped, a number that merges reach exactly: every image fills all of its tokens.
    """
    total, least = grid[0] * grid[1], _least_tokens(tuple(grid), scales, window_size, drops_padding)
    tokens = max(min(_wanted(budget, grid), total), least)
    return tokens if drops_padding else total - 3 * -((tokens - total) // 3)


def _wanted(budget: float | int, grid: tuple[int, int]) -> int:
    return max(1, int(budget * grid[0] * grid[1])) if isinstance(budget, float) else int(budget)


@torch.no_grad()
def partition_by_budget(
    scores: Sequence[Tensor],
    thresholds: Sequence[float],
    region: Tensor,
    grid: tuple[int, int],
    patch_size: int,
    window_size: int,
    tokens: int,
    drops_padding: bool,
) -> Tensor:
    """Make the merges of the lowest scores, in units of their scale's threshold, until ``tokens`` hold the image.

    A patch of scale s waits for its four quarters, so its order is the largest score among it and all patches inside.
    In fixed shapes and without waiting for the device. Arguments as for ``partition_by_thresholds``, and

    Args:
        tokens: per image; see :func:`tokens_per_image`.
        drops_padding: mark padding ``DROPPED``, and do not count it. Patches may cross the edge of the padding (then:
            inside the cells at that edge), but only where the budget cannot be held without.

    Returns:
        Scale map (B, *grid) int8.

    Raises:
        ValueError: on a CPU; RuntimeError elsewhere or compiled, perhaps later: if an image that is partly padding
            cannot be cut into so few tokens.
    """
    orders = _merge_orders(scores, thresholds, region, grid, patch_size, window_size, drops_padding)
    flat = torch.cat([order.flatten(1) for order in orders], 1)
    filled = (-(-region // patch_size)).prod(1) if drops_padding else torch.full_like(region[:, 0], grid[0] * grid[1])
    merges = ((filled - tokens).clamp(min=0) + 2) // 3
    require(
        (flat.isfinite().sum(1) >= merges).all(),
        f"token budget of {tokens} tokens: an image leaves more than that when everything is merged; raise the budget",
    )
    # Stable, and small scales come first: of equal scores the quarters go before the patch they make up.
    sequence = flat.argsort(dim=1, stable=True)
    made = torch.zeros_like(flat, dtype=torch.bool)
    made = made.scatter(1, sequence, torch.arange(flat.shape[1], device=flat.device) < merges[:, None])
    scale_map = torch.zeros(len(region), *grid, dtype=torch.int8, device=region.device)
    counts = [order[0].numel() for order in orders]
    for scale, (order, chosen) in enumerate(zip(orders, made.split(counts, 1), strict=True), start=1):
        paint_blocks(scale_map, chosen.view(order.shape), scale)
    return drop_padding(scale_map, region, patch_size) if drops_padding else scale_map


def _merge_orders(
    scores: Sequence[Tensor], thresholds: Sequence[float], region: Tensor, grid: tuple[int, int], patch_size: int,
    window_size: int, drops_padding: bool,
) -> list[Tensor]:  # fmt: skip
    """For each scale, the order (B, grid rows >> s, grid columns >> s) of its merges; infinite where there is none."""
    orders: list[Tensor] = []
    for scale, (score, threshold) in enumerate(zip(scores, thresholds, strict=True), start=1):
        uncut = uncut_blocks(region, grid, scale, patch_size, window_size)
        score = score.nan_to_num(nan=_GREATEST, posinf=_GREATEST)
        order = torch.where(uncut, (score / threshold).clamp(max=_GREATEST), _LAST)
        if drops_padding:
            kept = uncut_blocks(-(-region // patch_size) * patch_size, grid, scale, patch_size, window_size)
            order = torch.where(kept & begin_inside(region, score.shape[1:], patch_size << scale), order, math.inf)
        order = torch.where(within_windows(grid, scale, window_size, region.device), order, math.inf)
        if orders:
            rows, columns = order.shape[1:]
            quarters = orders[-1][:, : 2 * rows, : 2 * columns].unflatten(2, (columns, 2)).unflatten(1, (rows, 2))
            order = torch.maximum(order, quarters.amax((2, 4)))
        orders.append(order)
    return orders


def require(condition: Tensor, error: str) -> None:
    """Raise if a boolean scalar is False: a ValueError on a CPU, else an assertion of the device that none waits for."""
    if condition.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(condition, error)
    elif not condition:
        raise ValueError(error)
