"""Layout: every token once, window by window, and everything that is derived from that order."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from apt_dense.layout.packed import build_layout
from apt_dense.layout.tokens import Bucket, Segments, TokenLayout
from apt_dense.patches.partition import count_tokens

from support.references import is_partition, layout_of, random_scale_map, tokens_by_window, tokens_of


@st.composite
def scale_maps(draw: st.DrawFn, max_side: int = 9) -> tuple[Tensor, int, int]:
    """A partition with dropped cells, its number of scales, and a window size that its patches respect."""
    batch, h, w = draw(st.integers(0, 3)), draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    num_scales, window_size = draw(st.integers(1, 4)), draw(st.integers(0, 6))
    dropped = draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
    rng = draw(st.randoms(use_true_random=False))
    return random_scale_map(rng, batch, h, w, num_scales, window_size, dropped), num_scales, window_size


def rows_of(layout: TokenLayout) -> list[int | None]:
    """For each packed row the number of its patch, None for prefix rows."""
    row_N = layout.row_Bhw[layout.image_N, layout.y_N, layout.x_N].tolist()
    rows: list[int | None] = [None] * len(layout.image_R)
    for patch, row in enumerate(row_N):
        rows[row] = patch
    return rows


def numbers_of(layout: TokenLayout) -> list[int]:
    """The patches of scale 0, of scale 1, ... by their number."""
    return torch.cat([candidates.numbers for candidates in layout.candidates]).tolist()


@given(scale_maps())
def test_every_token_once_window_by_window(case: tuple[Tensor, int, int]) -> None:
    scale_map, num_scales, window_size = case
    layout = build_layout(scale_map, num_scales, window_size)
    tokens = tokens_of(scale_map, window_size)
    assert list(zip(layout.image_N.tolist(), layout.y_N.tolist(), layout.x_N.tolist(), strict=True)) == [
        (token.image, token.y, token.x) for token in tokens
    ]
    for scale, candidates in enumerate(layout.candidates):
        chosen = [(i, token) for i, token in enumerate(tokens) if token.scale == scale]
        assert candidates.scale == scale and candidates.numbers.tolist() == [i for i, _ in chosen]
        found = zip(candidates.image.tolist(), candidates.y.tolist(), candidates.x.tolist(), strict=True)
        assert list(found) == [(token.image, token.y, token.x) for _, token in chosen]
    assert len(layout.candidates) == num_scales
    assert layout.grid == tuple(scale_map.shape[1:]) and layout.batch == len(scale_map)


@given(scale_maps(), st.integers(0, 2))
def test_each_cell_points_to_the_row_of_its_token(case: tuple[Tensor, int, int], num_prefix: int) -> None:
    scale_map, num_scales, _ = case
    layout = build_layout(scale_map, num_scales, num_prefix=num_prefix)
    expected = torch.full(scale_map.shape, -1)
    for patch, token in enumerate(tokens_of(scale_map)):
        for cell in token.cells():
            expected[cell] = patch + num_prefix * (token.image + 1)
    assert torch.equal(layout.row_Bhw, expected)


@given(scale_maps())
def test_segments_are_the_windows_and_the_images(case: tuple[Tensor, int, int]) -> None:
    scale_map, num_scales, window_size = case
    layout = build_layout(scale_map, num_scales, window_size)
    per_window = [[len(window) for window in image] for image in tokens_by_window(scale_map, window_size)]
    assert_segments(layout.images, [sum(lengths) for lengths in per_window])
    if window_size:
        assert_segments(layout.windows, [n for lengths in per_window for n in lengths])
    else:
        assert layout.windows is None


def assert_segments(segments: Segments, lengths: list[int]) -> None:
    expected = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert segments.offsets.tolist() == expected and segments.offsets.dtype == torch.int32
    assert (segments.total, segments.longest) == (sum(lengths), max(lengths, default=0))
    assert segments.is_even == (len({n for n in lengths if n}) == 1)


@given(scale_maps(), st.integers(0, 2))
def test_prefix_rows_lead_each_image(case: tuple[Tensor, int, int], num_prefix: int) -> None:
    scale_map, num_scales, _ = case
    layout = build_layout(scale_map, num_scales, num_prefix=num_prefix)
    batch, rows = len(scale_map), rows_of(layout)
    offsets = layout.images.offsets.tolist()
    assert layout.num_prefix == num_prefix and len(rows) == offsets[-1] == len(layout.image_N) + batch * num_prefix
    for image, (start, end) in enumerate(pairwise(offsets)):
        assert layout.image_R[start:end].tolist() == [image] * (end - start)
        assert rows[start : start + num_prefix] == [None] * num_prefix
        assert [layout.image_N[i].item() for i in rows[start + num_prefix : end]] == [image] * (
            end - start - num_prefix
        )


@given(scale_maps(), st.integers(0, 2))
def test_source_takes_every_embedding_to_its_row(case: tuple[Tensor, int, int], num_prefix: int) -> None:
    """Embeddings come as patches of scale 0, of scale 1, ..., then the prefix rows of each image."""
    scale_map, num_scales, _ = case
    layout = build_layout(scale_map, num_scales, num_prefix=num_prefix)
    patches = numbers_of(layout)
    prefixes = [("prefix", image) for image in range(len(scale_map)) for _ in range(num_prefix)]
    embedded = [("patch", patch) for patch in patches] + prefixes
    sources = list(range(len(embedded))) if layout.source_R is None else layout.source_R.tolist()
    taken = [embedded[i] for i in sources]
    expected = [
        ("prefix", image) if patch is None else ("patch", patch)
        for patch, image in zip(rows_of(layout), layout.image_R.tolist(), strict=True)
    ]
    assert taken == expected
    assert sorted(sources) == list(range(len(embedded)))


@given(scale_maps())
def test_count_tokens(case: tuple[Tensor, int, int]) -> None:
    scale_map, num_scales, _ = case
    counts = count_tokens(scale_map, num_scales)
    tokens = tokens_of(scale_map)
    assert counts.tolist() == [
        [sum(token.image == image and token.scale == scale for token in tokens) for scale in range(num_scales)]
        for image in range(len(scale_map))
    ]


@given(st.lists(st.integers(0, 80), max_size=12))
def test_buckets_hold_every_row_once(lengths: list[int]) -> None:
    segments = layout_of(*lengths).images
    places = [row for bucket in segments.buckets for row in bucket.rows.flatten().tolist()]
    assert [places[place] for place in segments.place_R.tolist()] == list(range(sum(lengths)))
    valid = [
        row
        for bucket in segments.buckets
        for row, real in zip(bucket.rows.flatten().tolist(), real_places(bucket), strict=True)
        if real
    ]
    assert sorted(valid) == list(range(sum(lengths)))
    assert set(segments.place_R.tolist()) == {
        place for place, real in enumerate(r for bucket in segments.buckets for r in real_places(bucket)) if real
    }
    # Each segment is filled up by at most a sixteenth of the longest.
    assert len(places) - sum(lengths) <= max(lengths, default=0) / 16 * len(lengths)


def real_places(bucket: Bucket) -> list[bool]:
    valid = torch.ones_like(bucket.rows, dtype=torch.bool) if bucket.valid is None else bucket.valid
    return valid.flatten().tolist()


@given(scale_maps())
def test_cells_inside_their_segment(case: tuple[Tensor, int, int]) -> None:
    scale_map, num_scales, window_size = case
    grid, tokens = tuple(scale_map.shape[1:]), tokens_of(scale_map, window_size)
    layout = build_layout(scale_map, num_scales, window_size)
    assert layout.scale_N.tolist() == [token.scale for token in tokens]
    assert layout.image_cells.size == grid and layout.image_cells.rows_N is None
    assert layout.image_cells.y_N.tolist() == [token.y for token in tokens]
    if not window_size:
        assert layout.window_cells is None
        return
    cells = layout.window_cells
    assert cells.size == (window_size, window_size)
    assert cells.y_N.tolist() == [token.y % window_size for token in tokens]
    assert cells.x_N.tolist() == [token.x % window_size for token in tokens]
    if any(size % window_size for size in grid):
        windows = [(token.y // window_size * window_size, token.x // window_size * window_size) for token in tokens]
        assert cells.rows_N.tolist() == [min(window_size, grid[0] - y) for y, _ in windows]
        assert cells.columns_N.tolist() == [min(window_size, grid[1] - x) for _, x in windows]
    else:
        assert cells.rows_N is None and cells.columns_N is None


# A torn patch whose missing cells are made up for by marks without a patch.
TORN = torch.tensor([[[1, 0, 0, 1], [0, 0, 1, 1]]])


@example(TORN, 2)
@example(torch.tensor([[[1, 1], [1, 0]]]), 2)
@example(torch.tensor([[[1, 1, 1], [1, 1, 1]]]), 2)
@example(torch.tensor([[[2, 2], [2, 2]]]), 2)
@example(torch.tensor([[[1]]]), 1)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4)).flatmap(
        lambda shape: st.randoms(use_true_random=False).map(
            lambda rng: torch.tensor(rng.choices([-1, 0, 0, 1, 1, 2], k=shape[0] * shape[1] * shape[2])).view(shape)
        )
    ),
    st.integers(1, 3),
)
def test_only_partitions_are_accepted(scale_map: Tensor, num_scales: int) -> None:
    if is_partition(scale_map, num_scales):
        assert build_layout(scale_map, num_scales).batch == len(scale_map)
    else:
        with pytest.raises(ValueError, match="not a partition"):
            build_layout(scale_map, num_scales)


def test_worked_example() -> None:
    scale_map = torch.tensor([[[1, 1, 0], [1, 1, -1]]])
    layout = build_layout(scale_map, 2, num_prefix=1)
    assert layout.row_Bhw.tolist() == [[[1, 1, 2], [1, 1, -1]]]
    assert [patches.numbers.tolist() for patches in layout.candidates] == [[1], [0]]
    assert layout.source_R.tolist() == [2, 1, 0]
    assert layout.images.offsets.diff().tolist() == [3]


def test_windows_are_cut_short_at_the_border() -> None:
    layout = build_layout(torch.zeros(1, 3, 5, dtype=torch.int8), 1, window_size=2)
    assert layout.windows.offsets.diff().tolist() == [4, 4, 2, 2, 2, 1]
    assert layout.x_N.tolist()[:5] == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("shape", [(0, 2, 2), (1, 0, 3), (2, 3, 0)])
def test_nothing_to_lay_out(shape: tuple[int, int, int]) -> None:
    layout = build_layout(torch.zeros(shape, dtype=torch.int8), 2, num_prefix=1)
    assert len(layout.image_N) == 0 and layout.images.offsets.diff().tolist() == [1] * shape[0]


def test_an_image_without_tokens_keeps_its_prefix() -> None:
    scale_map = torch.stack([torch.full((2, 2), -1), torch.zeros(2, 2, dtype=torch.long)])
    layout = build_layout(scale_map, 1, num_prefix=1)
    assert layout.images.offsets.diff().tolist() == [1, 5] and layout.image_R.tolist() == [0, 1, 1, 1, 1, 1]


def test_images_that_are_not_finite_are_named() -> None:
    finite = torch.tensor([True, False, True, False])
    with pytest.raises(ValueError, match=r"images \[1, 3\] of the batch hold NaN or infinite pixels"):
        build_layout(torch.zeros(4, 1, 1, dtype=torch.int8), 1, finite=finite)


def test_prefix_rows_belong_to_no_window() -> None:
    with pytest.raises(ValueError, match="num_prefix=1 with window_size=2"):
        build_layout(torch.zeros(1, 2, 2, dtype=torch.int8), 1, window_size=2, num_prefix=1)


def test_layout_is_deterministic() -> None:
    scale_map = random_scale_map(random.Random(0), 2, 8, 8)
    first, second = build_layout(scale_map, 3), build_layout(scale_map.clone(), 3)
    assert torch.equal(first.source_R, second.source_R) and torch.equal(first.row_Bhw, second.row_Bhw)
