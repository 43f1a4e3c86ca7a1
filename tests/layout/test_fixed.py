"""The layout in fixed shapes: the same tokens, windows and cells as the plain one, for any partition that fits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apt_dense import APTViT
from apt_dense.layout.fixed import build_fixed_layout
from apt_dense.layout.packed import build_layout
from apt_dense.layout.scatter import scatter_tokens
from apt_dense.layout.tokens import Segments, TokenLayout

from support.references import noise, normalise, random_scale_map, randomise, tokens_of

Place = tuple[int, int, int, int]  # image, scale, row and column of a token


def places(layout: TokenLayout) -> list[Place]:
    return list(zip(*(t.tolist() for t in (layout.image_N, layout.scale_N, layout.y_N, layout.x_N)), strict=True))


def covered(layout: TokenLayout, rows_of_prefix: int) -> list[list[Place | None]]:
    """The token that each cell of each image points to."""
    names = places(layout)
    per_image = len(layout.image_R) // layout.batch
    found = []
    for image, rows in enumerate(layout.row_Bhw.flatten(1).tolist()):
        patches = [row - (image + 1) * rows_of_prefix for row in rows]
        assert all(row < 0 or row // per_image == image for row in rows)
        found.append([names[patch] if row >= 0 else None for row, patch in zip(rows, patches, strict=True)])
    return found


def attending(segments: Segments) -> dict[int, set[int]]:
    """The rows that each row of the buckets attends to, and which place each row's output is taken from."""
    found, place, at = {}, segments.place_R.tolist(), 0
    for bucket in segments.buckets:
        valid = torch.ones_like(bucket.rows, dtype=torch.bool) if bucket.valid is None else bucket.valid
        for rows, ok in zip(bucket.rows.tolist(), valid.tolist(), strict=True):
            members = {row for row, is_valid in zip(rows, ok, strict=True) if is_valid}
            for i, row in enumerate(rows):
                if ok[i] and place[row] == at + i:
                    found[row] = members
            at += len(rows)
    return found


@given(
    st.integers(1, 3), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 3), st.integers(0, 5),
    st.integers(0, 4), st.sampled_from([0.0, 0.3, 1.0]), st.randoms(use_true_random=False),
)  # fmt: skip
def test_the_same_tokens_as_the_plain_layout(
    batch: int, grid: tuple[int, int], num_scales: int, window_size: int, spare: int, dropped: float, rng: random.Random
) -> None:
    scale_map = random_scale_map(rng, batch, *grid, num_scales, window_size, dropped)
    counts = [len(tokens_of(scale_map[i : i + 1])) for i in range(batch)]
    tokens = max(max(counts) + spare, 1)
    num_prefix = 0 if window_size else rng.randrange(3)
    plain = build_layout(scale_map, num_scales, window_size, num_prefix)
    fixed = build_fixed_layout(scale_map, num_scales, tokens, window_size, num_prefix)
    real = [place for image in range(batch) for place in places(fixed)[image * tokens :][: counts[image]]]
    assert real == places(plain)
    assert len(fixed.image_N) == batch * tokens and len(fixed.image_R) == batch * (tokens + num_prefix)
    expected = [[None] * (grid[0] * grid[1]) for _ in range(batch)]
    for token in tokens_of(scale_map):
        for image, y, x in token.cells():
            expected[image][y * grid[1] + x] = (image, token.scale, token.y, token.x)
    assert covered(fixed, num_prefix) == expected
    rows = tokens + num_prefix
    for image, count in enumerate(counts):
        members = set(range(image * rows, image * rows + num_prefix + count))
        attended = attending(fixed.images)
        assert all(attended[row] == members for row in members)
    if window_size:
        assert_windows(fixed, plain, counts, tokens)


def assert_windows(fixed: TokenLayout, plain: TokenLayout, counts: list[int], tokens: int) -> None:
    """Windows hold the same tokens; rows of the plain layout are those of the fixed one without the inert ones."""
    row_of = [image * tokens + i for image, count in enumerate(counts) for i in range(count)]
    expected = {row_of[row]: {row_of[other] for other in others} for row, others in attending(plain.windows).items()}
    found = attending(fixed.windows)
    assert {row: others for row, others in found.items() if row in expected} == expected
    lengths = fixed.windows.offsets.diff().view(len(counts), -1)
    assert lengths[:, -1].tolist() == [tokens - count for count in counts]
    assert fixed.windows.offsets[-1] == fixed.windows.total == len(counts) * tokens
    assert fixed.windows.longest >= lengths.max()


def test_shapes_do_not_depend_on_the_partition() -> None:
    def shapes(seed: int) -> list[Any]:
        scale_map = random_scale_map(random.Random(seed), 2, 7, 9, 3, 4, 0.2)
        layout = build_fixed_layout(scale_map, 3, 63, 4)
        tensors = [layout.image_N, layout.row_Bhw, layout.image_R, layout.window_cells.rows_N]
        for segments in (layout.images, layout.windows):
            tensors += [segments.offsets, segments.place_R, *(t for bucket in segments.buckets for t in bucket)]
        return [t.shape for t in tensors]

    assert shapes(1) == shapes(2) == shapes(3)


def test_without_inert_rows_an_image_is_a_plain_batch() -> None:
    layout = build_fixed_layout(torch.zeros(2, 4, 4, dtype=torch.int8), 2, 16, num_prefix=1, may_be_inert=False)
    assert layout.images.is_even and layout.images.buckets[0].rows.shape == (2, 17)


@pytest.mark.parametrize("tokens, may_be_inert", [(15, True), (17, False), (15, False)])
def test_another_number_of_patches_is_refused(tokens: int, may_be_inert: bool) -> None:
    with pytest.raises(ValueError, match=f"than its {tokens} tokens"):
        build_fixed_layout(torch.zeros(1, 4, 4, dtype=torch.int8), 1, tokens, may_be_inert=may_be_inert)


def test_prefix_rows_with_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="belongs to no window"):
        build_fixed_layout(torch.zeros(1, 4, 4, dtype=torch.int8), 1, 16, window_size=2, num_prefix=1)


# ---- the whole backbone with a budget

MODELS = {
    "global": {},
    "class token": {"class_token": True},
    "windows": {"window_size": 5, "window_block_indexes": (0,), "use_rel_pos": True, "residual_block_indexes": (1,)},
    "dropping": {"drop_padding": True},
    "windows, dropping": {"window_size": 4, "window_block_indexes": (1,), "use_rel_pos": True, "drop_padding": True},
    "no scale fits": {"class_token": True, "img_size": 8},
}


def backbone(name: str, **options: Any) -> APTViT:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "thresholds": (4.0,)}
    return randomise(APTViT(**{**sizes, **MODELS[name], **options}), 0.2)


def photos_like(rows: int = 36, columns: int = 27) -> Tensor:
    """Noise that is flat in places, one image with padding at the bottom and one at the right."""
    images = normalise(128 + 40 * noise(3, 3, rows, columns).clamp(-3, 3))
    images[:, :, : rows // 2, : columns // 2] = images[:, :, :1, :1]
    images[0, :, -rows // 3 :] = 0
    images[1, :, :, -columns // 4 :] = 0
    return images


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_gives_what_its_partition_gives(name: str) -> None:
    """The same scale map through the plain layout, which has neither inert rows nor fixed shapes."""
    model = backbone(name, token_budget=0.6)
    plain = backbone(name)
    plain.load_state_dict(model.state_dict())
    images = photos_like()
    scale_map = model.partition(images)
    layout = build_layout(scale_map, 2, model.window_size, model.num_prefix)
    rows = plain._embed(plain.patches.whole_patches(images), layout)
    for block in plain.blocks:
        rows = block(rows, layout)
    torch.testing.assert_close(model(images)[-1], scatter_tokens(rows, layout), atol=1e-5, rtol=1e-4)


def test_the_whole_budget_is_the_plain_vit() -> None:
    model, uniform = backbone("global", token_budget=1.0), backbone("global", thresholds=())
    uniform.load_state_dict(model.state_dict(), strict=False)
    images = photos_like()
    torch.testing.assert_close(model(images)[-1], uniform(images)[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["dropping", "windows, dropping"])
def test_dropped_cells_are_zero_also_where_there_is_a_token_for_every_cell(name: str) -> None:
    model, images = backbone(name, token_budget=1.0, residual_block_indexes=(0,)), photos_like()
    out = model(images)[-1]
    dropped = (model.partition(images) < 0)[:, None].expand_as(out)
    assert dropped.any() and (out[dropped] == 0).all() and (out[~dropped] != 0).any()


def test_non_finite_pixels_are_refused() -> None:
    images = photos_like()
    images[1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"images \[1\] of the batch hold NaN or infinite"):
        backbone("global", token_budget=0.6)(images)
