"""Regions that stay fine or are coarse, and a minimum of tokens, against plain references pixel by pixel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apt_dense import APTViT, PatchSelector
from apt_dense.layout.scatter import scatter_tokens
from apt_dense.patches.partition import DROPPED, count_tokens
from apt_dense.patches.regions import mask_of

from support.references import is_partition, pictures, within_window

PATCH = 4
SIZES = st.tuples(st.integers(1, 45), st.integers(1, 45))
WINDOWS = st.sampled_from([0, 0, 4, 5])
Patch = tuple[int, int, int]  # scale, row and column of the top left cell


def random_mask(seed: int, images: Tensor, share: float) -> Tensor:
    """A rectangle in each image, and a single pixel."""
    generator = torch.Generator().manual_seed(seed)
    batch, _, height, width = images.shape
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    for own in mask:
        own.view(-1)[torch.randint(height * width, (), generator=generator)] = True
        top, left = (int(torch.randint(side, (), generator=generator)) for side in (height, width))
        own[top : top + int(share * height) + 1, left : left + int(share * width) + 1] = True
    return mask


def patches_in(grid: tuple[int, int], scales: int, window: int) -> Iterator[Patch]:
    """All patches of scales 1 and more inside a grid's windows."""
    for scale in range(1, scales + 1):
        side = 2**scale
        for y in range(0, grid[0] - side + 1, side):
            for x in range(0, grid[1] - side + 1, side):
                if within_window(y, x, side, window):
                    yield scale, y, x


def pixels_under(mask: Tensor, patch: Patch) -> Tensor:
    """The part of a mask (H, W) under a patch; shorter where that reaches beyond the image."""
    scale, y, x = patch
    side = PATCH * 2**scale
    return mask[y * PATCH : y * PATCH + side, x * PATCH : x * PATCH + side]


def lies_inside(mask: Tensor, patch: Patch) -> bool:
    part = pixels_under(mask, patch)
    return part.numel() == (PATCH * 2 ** patch[0]) ** 2 and bool(part.all())


# ---- thresholds


@given(SIZES, st.integers(0, 99), WINDOWS, st.sampled_from(["pad", "crop"]), st.booleans(), st.booleans())
def test_thresholds_by_the_reference(
    size: tuple[int, int], seed: int, window: int, partial: str, drop: bool, padded: bool
) -> None:
    size = tuple(max(each, PATCH) for each in size) if partial == "crop" else size
    images = pictures(seed, size)
    if padded:
        images[1, :, -(-size[0] // 2) :] = 0
    fine, coarse = random_mask(seed, images, 0.1), random_mask(seed + 1, images, 0.8)
    selector = PatchSelector(
        patch_size=PATCH, thresholds=(4.0, 3.0), window_size=window, partial_patches=partial, drop_padding=drop
    )
    found = selector.scale_map(images, fine, coarse)
    plain, forced = selector.scale_map(images), replace(selector, thresholds=(float("inf"),) * 2).scale_map(images)
    assert is_partition(found, 3)
    assert torch.equal(found == DROPPED, plain == DROPPED)
    grid = tuple(found.shape[1:])
    scores = selector.scores(selector.whole_patches(images))
    for image in range(2):
        # Patches that are allowed at all: those of a selector to which everything is flat, and those inside them.
        expected = torch.zeros(grid, dtype=torch.int8)
        for scale, y, x in patches_in(grid, 2, window):
            block = slice(y, y + 2**scale), slice(x, x + 2**scale)
            allowed = bool((forced[image][block] >= scale).all())
            flat = scores[scale - 1][image, y >> scale, x >> scale] < selector.thresholds[scale - 1]
            wanted = flat or lies_inside(coarse[image], (scale, y, x))
            if allowed and wanted and not pixels_under(fine[image], (scale, y, x)).any():
                expected[block] = scale
        expected[plain[image] == DROPPED] = DROPPED
        assert torch.equal(found[image], expected)


def test_small_example() -> None:
    """A pixel, a box and a sky of a flat and of a noisy image."""
    flat = torch.full((1, 3, 16, 16), 0.3)
    noisy = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    selector = PatchSelector(patch_size=4, thresholds=(3.0, 3.0))
    pixel = torch.zeros(1, 16, 16, dtype=torch.bool)
    pixel[0, 3, 3] = True
    around = [[[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]]
    assert selector.scale_map(flat, pixel).tolist() == around
    assert selector.scale_map(flat, [torch.tensor([[3.2, 3.2, 3.4, 3.4]])]).tolist() == around
    assert (selector.scale_map(flat, [torch.zeros(0, 4)]) == 2).all()
    assert selector.scale_map(noisy, None, lambda images: images[:, 0] > -99).tolist() == [[[2] * 4] * 4]
    sky = [torch.tensor([[0.0, 0.0, 16.0, 9.0]])]  # the row of pixels from 9 on is not sky
    assert selector.scale_map(noisy, None, sky).tolist() == [[[1] * 4] * 2 + [[0] * 4] * 2]
    assert selector.scale_map(noisy, sky, sky).tolist() == [[[0] * 4] * 4], "what must stay fine comes first"
    assert selector.count(noisy, None, sky).tolist() == [[8, 2, 0]]
    assert selector.tokens_kept(noisy, None, sky).item() == 10 / 16


# ---- budgets


@given(st.sampled_from([(1, 4), (5, 3), (8, 8), (9, 7)]), st.integers(0, 99), WINDOWS, st.floats(0.3, 1))
def test_budgets_by_the_reference(grid: tuple[int, int], seed: int, window: int, budget: float) -> None:
    """Merges are sorted as the docstrings say, and so many are made as the budget needs."""
    images = pictures(seed, (grid[0] * PATCH, grid[1] * PATCH))
    fine, coarse = random_mask(seed, images, 0.1), random_mask(seed + 1, images, 0.8)
    selector = PatchSelector(patch_size=PATCH, thresholds=(4.0, 2.0), window_size=window, token_budget=budget)
    found, tokens = selector.scale_map(images, fine, coarse), selector.tokens_per_image(grid)
    assert (count_tokens(found, 3).sum(1) == tokens).all()
    scores = selector.scores(images)
    for image in range(2):
        places: dict[Patch, tuple[int, float]] = {}
        for patch in patches_in(grid, 2, window):
            scale, y, x = patch
            inside = [places[p] for p in places if p[0] < scale and y <= p[1] < y + 4 and x <= p[2] < x + 4]
            mixed = pixels_under(fine[image], patch).any()
            turn = 2 if mixed else 0 if lies_inside(coarse[image], patch) else 1
            # In units of the least threshold.
            order = scores[scale - 1][image, y >> scale, x >> scale].item() / (2.0 if scale == 1 else 1.0)
            places[patch] = max([turn, *(p[0] for p in inside)]), max([order, *(p[1] for p in inside)])
        made = sorted(places, key=lambda patch: (*places[patch], patch))[: (grid[0] * grid[1] - tokens) // 3]
        expected = torch.zeros(grid, dtype=torch.int8)
        for scale, y, x in sorted(made):
            expected[y : y + 2**scale, x : x + 2**scale] = scale
        assert torch.equal(found[image], expected)


@given(st.integers(0, 99), st.floats(0.2, 1), WINDOWS)
def test_budgets_with_dropped_padding_spend_on_what_must_stay_fine(seed: int, budget: float, window: int) -> None:
    images = pictures(seed, (32, 40))
    images[0, :, 21:] = 0
    images[1, :, :, 30:] = 0
    fine = random_mask(seed, images, 0.2)
    selector = PatchSelector(
        patch_size=PATCH, thresholds=(4.0, 2.0), window_size=window, token_budget=budget, drop_padding=True
    )
    found, plain = selector.scale_map(images, fine), selector.scale_map(images)
    assert torch.equal(found == DROPPED, plain == DROPPED) and is_partition(found, 3)
    assert torch.equal(count_tokens(found, 3).sum(1), count_tokens(plain, 3).sum(1))
    everything = replace(selector, token_budget=0.01).scale_map(images, fine)
    touched = fine.view(2, 8, PATCH, 10, PATCH).any(4).any(2)
    for image in range(2):
        if (found[image][touched[image]] > 0).any():  # then nothing else was left to merge
            far = ~torch.nn.functional.max_pool2d(touched[image, None].float(), 7, 1, 3)[0].bool()
            assert torch.equal(found[image][far], everything[image][far])


# ---- a minimum of tokens


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("least", [0.65, 0.7, 0.8, 0.9, 1.0, 53, 61, 99])
def test_a_minimum_is_kept_by_the_merges_of_a_budget(least: float | int, padded: bool, drop: bool) -> None:
    short = 0
    for size, window, masked in itertools.product([(3, 9), (32, 36), (45, 30)], [0, 5], [False, True]):
        short += check_minimum(size, window, masked, least, padded, drop)
    assert short, "no image had too few tokens"


def check_minimum(
    size: tuple[int, int], window: int, masked: bool, least: float | int, padded: bool, drop: bool, seed: int = 3
) -> int:
    """Compare with the selectors without a minimum, and return how many images have too few tokens by thresholds."""
    short = 0
    images = pictures(seed, size)
    if padded:
        images[1, :, :, -(-size[1] // 2) :] = 0
    fine = random_mask(seed, images, 0.1) if masked else None
    options = {"patch_size": PATCH, "thresholds": (4.0, 3.0), "window_size": window, "drop_padding": drop}
    plain = PatchSelector(**options).scale_map(images, fine)
    found = PatchSelector(**options, min_tokens=least).scale_map(images, fine)
    assert is_partition(found, 3) and torch.equal(found == DROPPED, plain == DROPPED)
    tokens, before = count_tokens(found, 3).sum(1), count_tokens(plain, 3).sum(1)
    for image in range(2):
        cells = int((plain[image] != DROPPED).sum())
        wanted = min(cells, least if isinstance(least, int) else -int(-(cells * least - 1e-6) // 1))
        if before[image] >= wanted:
            assert torch.equal(found[image], plain[image])
            continue
        assert wanted <= tokens[image] <= wanted + 2
        short += 1
        if not drop:
            budget = PatchSelector(**options, token_budget=int(tokens[image]))
            assert torch.equal(found[image], budget.scale_map(images, fine)[image])
    return short


def test_a_minimum_needs_ratios_and_no_budget() -> None:
    with pytest.raises(ValueError, match="min_tokens=0.5 with token_budget=0.5"):
        PatchSelector(thresholds=(3.0,), token_budget=0.5, min_tokens=0.5)
    with pytest.raises(ValueError, match="min_tokens=9 with thresholds=\\(3.0, 0.0\\): give positive"):
        PatchSelector(thresholds=(3.0, 0.0), min_tokens=9)
    assert PatchSelector(min_tokens=9).min_tokens == 9, "which means nothing without thresholds"


# ---- kinds of regions


@given(SIZES, st.lists(st.tuples(*[st.floats(-20, 60)] * 4), max_size=3))
def test_boxes_take_every_pixel_that_they_overlap(size: tuple[int, int], boxes: list[tuple[float, ...]]) -> None:
    images = torch.zeros(1, 3, *size)
    given_boxes = torch.tensor(boxes).view(-1, 4)
    found = mask_of("keep_fine", [given_boxes], images)[0]
    for y in range(size[0]):
        for x in range(size[1]):
            overlaps = any(
                max(x1, x) < min(x2, x + 1) and max(y1, y) < min(y2, y + 1) for x1, y1, x2, y2 in given_boxes.tolist()
            )
            assert bool(found[y, x]) == overlaps


@pytest.mark.parametrize("by", ["mask", "boxes", "function", "option"])
@torch.no_grad()
def test_models_take_regions_of_each_kind(by: str) -> None:
    small = {"img_size": 32, "patch_size": PATCH, "embed_dim": 16, "depth": 1, "num_heads": 2, "thresholds": (5.0, 4.0)}
    model = APTViT(**small).eval()
    images = pictures(3, (30, 32))
    boxes = [torch.tensor([[4.0, 4.0, 20.0, 12.0]]), torch.zeros(0, 4)]
    mask = mask_of("keep_fine", boxes, images)
    kinds: dict[str, Callable | Tensor | list[Tensor]] = {"mask": mask, "boxes": boxes, "function": lambda _: mask}
    if by == "option":
        model.set_patches(keep_fine=lambda _: mask)
    plain = APTViT(**small).partition(images)
    expected = PatchSelector(patch_size=PATCH, thresholds=(5.0, 4.0)).scale_map(images, mask)
    assert not torch.equal(expected, plain)
    assert torch.equal(model.partition(images, kinds.get(by)), expected)
    (found,), layout = model.forward_tokens(images, kinds.get(by))
    assert len(layout.image_N) == count_tokens(expected, 3).sum()
    assert torch.equal(model(images, kinds.get(by))[0], scatter_tokens(found, layout))


def test_wrong_regions_are_refused_by_name() -> None:
    selector, images = PatchSelector(patch_size=4, thresholds=(4.0,)), torch.zeros(2, 3, 16, 16)
    for wrong, error, message in (
        (torch.zeros(2, 16, 16), TypeError, "keep_fine is a mask of torch.float32; expected torch.bool"),
        (torch.zeros(2, 8, 8, dtype=torch.bool), ValueError, r"shape \(2, 8, 8\); expected \(2, 16, 16\)"),
        ([torch.zeros(1, 4)], ValueError, "boxes for 1 images, the batch has 2"),
        ([torch.zeros(4), torch.zeros(0, 4)], ValueError, r"boxes \(4,\) of an image; expected a tensor \(n, 4\)"),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], ValueError, "boxes list of an image"),
        ("faces", TypeError, "keep_fine is str; expected a mask, boxes"),
        (lambda _: 3, TypeError, "keep_fine is int; expected a mask, boxes"),
    ):
        with pytest.raises(error, match=message):
            selector.scale_map(images, wrong)
    with pytest.raises(TypeError, match="keep_coarse is a mask of torch.uint8"):
        selector.scale_map(images, None, torch.zeros(2, 16, 16, dtype=torch.uint8))


def test_budgets_with_masks_compile_to_one_graph() -> None:
    model = APTViT(
        img_size=32, patch_size=PATCH, embed_dim=16, depth=1, num_heads=2, thresholds=(5.0, 4.0), token_budget=0.6
    ).eval()
    images = pictures(5, (32, 32))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for seed in range(2):
        mask = random_mask(seed, images, 0.5)
        torch.testing.assert_close(compiled(images, mask, ~mask)[0], model(images, mask, ~mask)[0])
    torch.testing.assert_close(compiled(images)[0], model(images)[0])
