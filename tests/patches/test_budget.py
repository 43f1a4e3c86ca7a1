"""Token budget: exactly so many tokens, by the merges of the lowest scores."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apt_dense.patches.budget import fewest_tokens, partition_by_budget
from apt_dense.patches.partition import Bounds
from apt_dense.patches.selector import PatchSelector

from support.references import is_partition, tokens_of, within_window

PATCH = 4
Patch = tuple[int, int, int]  # scale, row and column of the top left cell


def random_scores(rng: random.Random, batch: int, grid: tuple[int, int], scales: int) -> list[Tensor]:
    """Distinct scores for every patch of scales 1, 2, ..."""
    shapes = [(batch, grid[0] >> s, grid[1] >> s) for s in range(1, scales + 1)]
    return [torch.tensor([rng.random() for _ in range(math.prod(shape))]).view(shape) for shape in shapes]


def greedy(scores: list[Tensor], image: int, grid: tuple[int, int], window_size: int, tokens: int) -> list[list[int]]:
    """One merge after the other: always the lowest score among patches whose quarters are tokens."""
    present = {(0, y, x) for y in range(grid[0]) for x in range(grid[1])}

    def quarters(patch: Patch) -> set[Patch]:
        scale, y, x = patch
        half = 2 ** (scale - 1)
        return {(scale - 1, y + dy, x + dx) for dy in (0, half) for dx in (0, half)}

    while len(present) > tokens:
        candidates = [
            (score[image, y, x].item(), (scale, y << scale, x << scale))
            for scale, score in enumerate(scores, start=1)
            for y in range(score.shape[1])
            for x in range(score.shape[2])
            if within_window(y << scale, x << scale, 2**scale, window_size)
            and quarters((scale, y << scale, x << scale)) <= present
        ]
        _, patch = min(candidates)
        present = present - quarters(patch) | {patch}
    cells = [[-1] * grid[1] for _ in range(grid[0])]
    for scale, y, x in present:
        for dy in range(2**scale):
            for dx in range(2**scale):
                cells[y + dy][x + dx] = scale
    return cells


def tokens_of_budget(
    budget: float | int, grid: tuple[int, int], scales: int, window_size: int, drop_padding: bool
) -> int:
    options = {"window_size": max(window_size, 2**scales) if window_size else 0, "drop_padding": drop_padding}
    selector = PatchSelector(thresholds=(1.0,) * scales, token_budget=budget, **options)
    object.__setattr__(selector, "window_size", window_size)  # also windows that no patch of a scale fits
    return selector.tokens_per_image(grid)


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 3),
    st.integers(0, 5),
    st.floats(0.05, 1.0),
    st.randoms(use_true_random=False),
)
def test_the_lowest_merges_are_made(
    grid: tuple[int, int], scales: int, window_size: int, share: float, rng: random.Random
) -> None:
    scores = random_scores(rng, 2, grid, scales)
    tokens = tokens_of_budget(share, grid, scales, window_size, False)
    region = torch.tensor([grid, grid]) * PATCH
    scale_map = partition_by_budget(scores, (1.0,) * scales, Bounds(region, grid, PATCH, window_size), tokens, False)
    assert is_partition(scale_map, scales + 1)
    for image in range(2):
        assert scale_map[image].tolist() == greedy(scores, image, grid, window_size, tokens)
    assert len(tokens_of(scale_map)) == 2 * tokens


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(0, 3), st.integers(0, 5))
def test_fewest_tokens_is_what_merging_everything_leaves(grid: tuple[int, int], scales: int, window_size: int) -> None:
    scores = [torch.zeros(1, grid[0] >> s, grid[1] >> s) for s in range(1, scales + 1)]
    cells = greedy(scores, 0, grid, window_size, fewest_tokens(grid, scales, window_size))
    assert len(tokens_of(torch.tensor([cells]))) == fewest_tokens(grid, scales, window_size)


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 9 * PATCH), st.integers(1, 9 * PATCH)),
    st.floats(0.05, 1.0),
    st.sampled_from([0, 3, 5]),
    st.randoms(use_true_random=False),
)
def test_padding_is_dropped_and_not_counted(
    grid: tuple[int, int], filled: tuple[int, int], share: float, window_size: int, rng: random.Random
) -> None:
    region = torch.tensor([[min(f, PATCH * n) for f, n in zip(filled, grid, strict=True)]])
    kept = math.prod(-(-n // PATCH) for n in region[0].tolist())
    tokens = tokens_of_budget(share, grid, 2, window_size, True)
    scores = random_scores(rng, 1, grid, 2)
    scale_map = partition_by_budget(scores, (1.0, 1.0), Bounds(region, grid, PATCH, window_size), tokens, True)
    found = tokens_of(scale_map)
    assert min(kept, tokens - 2) <= len(found) <= tokens
    assert (scale_map >= 0).sum() == kept and is_partition(scale_map, 3)
    for token in found:
        assert within_window(token.y, token.x, 2**token.scale, window_size)


def test_patches_cross_the_edge_of_padding_only_where_they_must() -> None:
    region, scores = torch.tensor([[3 * PATCH, 8 * PATCH]]), [torch.full((1, 4, 4), 0.5)]

    def crossing(tokens: int) -> int:
        scale_map = partition_by_budget(scores, (1.0,), Bounds(region, (8, 8), PATCH, 0), tokens, False)
        return sum(token.y == 2 and token.scale == 1 for token in tokens_of(scale_map))

    assert crossing(64 - 3 * 12) == 0  # twelve blocks lie on one side
    assert crossing(64 - 3 * 13) == 1 and crossing(16) == 4


def test_a_number_that_no_partition_has_is_refused() -> None:
    region, scores = torch.tensor([[5 * PATCH, 7 * PATCH]]), [torch.zeros(1, 4, 4)]
    with pytest.raises(ValueError, match="token budget of 16 tokens"):
        partition_by_budget(scores, (1.0,), Bounds(region, (8, 8), PATCH, 0), 16, True)


def test_partly_filled_cells_merge_last() -> None:
    region, scores = torch.tensor([[4 * PATCH - 1, 2 * PATCH]]), [torch.tensor([[[0.9, 0.0], [0.0, 0.0]]])]

    def merged(tokens: int) -> list[int]:
        return partition_by_budget(scores, (1.0,), Bounds(region, (4, 4), PATCH, 0), tokens, True)[0, ::2, 0].tolist()

    assert (merged(8), merged(5), merged(2)) == ([0, 0], [1, 0], [1, 1])


def test_scores_that_are_no_number_count_as_detailed() -> None:
    scores = [torch.tensor([[[torch.nan, 1.0], [2.0, torch.nan]]])]
    scale_map = partition_by_budget(scores, (1.0,), Bounds(torch.tensor([[16, 16]]), (4, 4), PATCH, 0), 10, False)
    assert scale_map[0, ::2, ::2].tolist() == [[0, 1], [1, 0]]


def test_equal_scores_merge_quarters_first() -> None:
    scores = [torch.zeros(1, 4, 4), torch.zeros(1, 2, 2)]
    region = torch.tensor([[8, 8]]) * PATCH
    for tokens in range(4, 65, 3):
        scale_map = partition_by_budget(scores, (5.0, 3.0), Bounds(region, (8, 8), PATCH, 0), tokens, False)
        assert is_partition(scale_map, 3) and len(tokens_of(scale_map)) == tokens


def test_thresholds_are_the_units_of_scores() -> None:
    scores = [torch.tensor([[[1.0, 3.0]]]), torch.zeros(1, 0, 1)]
    by_threshold = [torch.tensor([[[4.0, 4.0], [4.0, 4.0]]]), torch.tensor([[[2.0]]])]
    assert scores[0].shape == (1, 1, 2)
    region = torch.tensor([[4, 4]]) * PATCH
    half = partition_by_budget(by_threshold, (4.0, 1.0), Bounds(region, (4, 4), PATCH, 0), 4, False)
    assert (half == 1).all()  # the large patch scores 2 units, its quarters 1


def test_infinite_thresholds_and_scores_keep_their_place() -> None:
    scores = [torch.tensor([[[9.0, 1.0], [math.inf, 2.0]]])]
    region = torch.tensor([[4, 4]]) * PATCH
    scale_map = partition_by_budget(scores, (1.0,), Bounds(region, (4, 4), PATCH, 0), 7, False)
    assert scale_map[0, ::2, ::2].tolist() == [[1, 1], [0, 1]]
    assert (partition_by_budget(scores, (math.inf,), Bounds(region, (4, 4), PATCH, 0), 4, False) == 1).all()


@pytest.mark.parametrize(
    "budget, grid, drops_padding, expected",
    [
        (0.5, (8, 8), False, 31), (0.5, (8, 8), True, 32), (32, (8, 8), False, 31), (1.0, (5, 5), False, 25),
        (999, (5, 5), False, 25), (0.1, (1, 1), False, 1), (0.3, (3, 3), False, 6), (0.3, (3, 3), True, 6),
        (0.25, (8, 8), True, 22), (0.25, (8, 8), False, 16),
    ],
)  # fmt: skip
def test_tokens_per_image(budget: float | int, grid: tuple[int, int], drops_padding: bool, expected: int) -> None:
    assert tokens_of_budget(budget, grid, 1, 0, drops_padding) == expected


# ---- thresholds of any size

LARGE = [
    (math.inf,),
    (1e39,),
    (1e300,),
    (3e38,),
    (1e-40,),
    (1e-300,),
    (math.inf, math.inf),
    (1e300, 1e300),
    (1e39, 1e39),
]


@pytest.mark.parametrize("thresholds", LARGE, ids=str)
def test_merges_go_by_score_whatever_the_thresholds(thresholds: tuple[float, ...]) -> None:
    """As with thresholds of 1, whose ratios are the same."""
    rng, grid = random.Random(5), (8, 12)
    scores = random_scores(rng, 2, grid, len(thresholds))
    bounds = Bounds(torch.tensor([[32, 48], [32, 48]]), grid, PATCH)
    for tokens in (93, 60, 36):
        expected = partition_by_budget(scores, (1.0,) * len(thresholds), bounds, tokens, False)
        assert torch.equal(partition_by_budget(scores, thresholds, bounds, tokens, False), expected)


@pytest.mark.parametrize(
    "thresholds", [(math.inf, 4.0), (1e300, 4.0), (1e39, 1e-39), (math.inf, math.inf, 4.0)], ids=str
)
def test_merges_of_infinite_thresholds_come_first_and_by_score(thresholds: tuple[float, ...]) -> None:
    rng, grid = random.Random(6), (8, 8)
    scores = random_scores(rng, 1, grid, len(thresholds))
    bounds = Bounds(torch.tensor([[32, 32]]), grid, PATCH)
    scale_map = partition_by_budget(scores, thresholds, bounds, 64 - 3 * 7, False)
    flattest = set(scores[0].flatten().argsort()[:7].tolist())
    if len(thresholds) == 2:
        assert set((scale_map[0, ::2, ::2].flatten() == 1).nonzero()[:, 0].tolist()) == flattest
        assert scale_map.max() == 1
    assert is_partition(scale_map, len(thresholds) + 1)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 1e36])
@pytest.mark.parametrize("thresholds", [(5.5,), (math.inf,), (5.5, 4.0)], ids=str)
def test_scores_of_any_size_are_told_apart(thresholds: tuple[float, ...], scale: float) -> None:
    grid = (8, 8)
    scores = random_scores(random.Random(7), 1, grid, len(thresholds))
    bounds = Bounds(torch.tensor([[32, 32]]), grid, PATCH)
    expected = partition_by_budget(scores, thresholds, bounds, 40, False)
    assert torch.equal(partition_by_budget([s * scale for s in scores], thresholds, bounds, 40, False), expected)


@pytest.mark.parametrize("threshold", [math.inf, 1e39, 1e300, 3.4e38, 5.5])
def test_noise_is_merged_last(threshold: float) -> None:
    """Noise on the top half, where merges by position would begin."""
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, :16] = torch.randn(1, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    selector = PatchSelector(patch_size=PATCH, thresholds=(threshold,), token_budget=0.7)
    scales = selector.scale_map(images)
    assert not scales[:, :4].any() and scales[:, 4:].any()
