"""Scores: equal to their plain definitions, on photographs and at the edges, in bounded memory."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apt_dense.patches import histogram_scores
from apt_dense.patches.blocks_of_pixels import grey_levels
from apt_dense.patches.scores import (
    SCORERS,
    PixelFormat,
    colour_deviation_scores,
    denormalise,
    entropy_scores,
    laplacian_max_scores,
    laplacian_scores,
    laplacian_std_scores,
    resolve_scorer,
    score_maps,
    tsallis_scores,
    upsampling_error_scores,
)

from support.references import HALF, noise, normalise, released_entropy

FORMATS = {
    "imagenet": PixelFormat(),
    "half": HALF,
    "imagenet-bgr": PixelFormat((103.53, 116.28, 123.675), (57.375, 57.12, 58.395), "BGR"),
    "detectron2-bgr": PixelFormat((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), "BGR"),
}


def random_pixels(*shape: int, seed: int = 0) -> Tensor:
    """8-bit noise, as float32."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).float()


def constant(value: float, rows: int = 32, columns: int = 32) -> Tensor:
    return torch.full((1, 3, rows, columns), value)


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.fixture
def narrow_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every image larger than one strip."""
    monkeypatch.setattr(histogram_scores, "_HISTOGRAM_ENTRIES", 1)


# ---- pixels


@pytest.mark.parametrize("name", FORMATS)
def test_all_8_bit_levels_survive_normalisation(name: str) -> None:
    levels = torch.arange(256.0).expand(1, 3, 4, 256)
    assert torch.equal(denormalise(normalise(levels, FORMATS[name]), FORMATS[name]), levels)


def test_all_8_bit_levels_survive_the_normalisation_of_images_in_0_to_1() -> None:
    levels = torch.arange(256.0).expand(1, 3, 1, 256)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.equal(denormalise((levels / 255 - mean) / std, PixelFormat()), levels)


def test_denormalised_channels_are_rgb() -> None:
    pixels = random_pixels(2, 3, 4, 5)
    bgr = FORMATS["imagenet-bgr"]
    assert torch.equal(denormalise(normalise(pixels, bgr), bgr), pixels)


def test_levels_out_of_range_are_clamped_and_fractions_rounded() -> None:
    pixels = torch.tensor([-20.0, 300.0, 0.25, 100.7]).expand(1, 3, 1, 4)
    restored = denormalise(normalise(pixels, HALF), HALF)
    assert restored[0, 0, 0].tolist() == [0.0, 255.0, 0.0, 101.0]


def test_grey_weights_go_to_their_channels() -> None:
    assert grey_levels(torch.eye(3).view(1, 3, 3, 1) * 100).flatten().tolist() == pytest.approx([29.89, 58.7, 11.4])


# ---- entropy


@pytest.mark.parametrize("name", FORMATS)
def test_entropy_of_photos_is_the_released_definition(photos: dict[str, Tensor], name: str) -> None:
    for photo in photos.values():
        images = normalise(photo[None], FORMATS[name])
        for scale, map_ in zip((1, 2), score_maps(images, 16, (1, 2), entropy_scores, FORMATS[name]), strict=True):
            torch.testing.assert_close(map_[0], released_entropy(photo, 16 * 2**scale), atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [(64, 64), (70, 41), (33, 100), (16, 16), (8, 200)])
@pytest.mark.parametrize("scales", [(0, 1, 2), (1, 2), (2,), (0, 2), (1, 3)])
def test_entropy_of_noise_is_the_released_definition(size: tuple[int, int], scales: tuple[int, ...]) -> None:
    pixels = random_pixels(2, 3, *size)
    maps = entropy_scores(pixels, 8, scales)
    for scale, map_ in zip(scales, maps, strict=True):
        assert map_.dtype == torch.float32 and map_.shape == (2, size[0] // (8 << scale), size[1] // (8 << scale))
        for image in range(2):
            torch.testing.assert_close(map_[image], released_entropy(pixels[image], 8 << scale), atol=1e-3, rtol=0)


def test_entropy_of_fractional_levels_is_the_released_definition() -> None:
    """Resized images have levels between whole numbers, where 512 bins tell apart what 256 do not."""
    pixels = F.interpolate(random_pixels(1, 3, 20, 20), size=(64, 64), mode="bilinear")
    torch.testing.assert_close(
        entropy_scores(pixels, 16, (0,))[0][0], released_entropy(pixels[0], 16), atol=1e-3, rtol=0
    )


@pytest.mark.usefixtures("narrow_strips")
@pytest.mark.parametrize("scales", [(1, 2), (0, 3), (2,)])
def test_strips_change_nothing(scales: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = random_pixels(2, 3, 150, 83) // 16
    in_strips = entropy_scores(pixels, 4, scales)
    monkeypatch.setattr(histogram_scores, "_HISTOGRAM_ENTRIES", 2**40)
    at_once = entropy_scores(pixels, 4, scales)
    assert all(torch.equal(a, b) for a, b in zip(in_strips, at_once, strict=True))


@pytest.mark.usefixtures("narrow_strips")
def test_strips_of_a_photo_match_the_definition(photos: dict[str, Tensor]) -> None:
    photo = photos["rocket"]
    for scale, map_ in zip((1, 2), entropy_scores(photo[None].float(), 16, (1, 2)), strict=True):
        torch.testing.assert_close(map_[0], released_entropy(photo, 16 << scale), atol=1e-3, rtol=0)


@pytest.mark.parametrize("value", [0.0, 1.0, 77.3, 128.0, 255.0])
@pytest.mark.parametrize("patch_size", [1, 3, 8, 14])
def test_entropy_of_one_colour_is_zero_and_not_below(value: float, patch_size: int) -> None:
    """A score below 0 would merge patches at a threshold of 0."""
    for map_ in entropy_scores(constant(value, 56, 56), patch_size, (0, 1, 2)):
        assert (map_ == 0).all()


def test_entropy_of_equally_many_levels_is_their_logarithm() -> None:
    pixels = torch.arange(256.0).view(16, 16).expand(1, 3, 16, 16)
    assert entropy_scores(pixels, 16, (0,))[0].item() == pytest.approx(8, abs=1e-5)
    assert entropy_scores((pixels >= 128) * 100.0, 16, (0,))[0].item() == pytest.approx(1, abs=1e-5)


def test_entropy_memory_is_far_below_the_one_hot_definition() -> None:
    height, width = 1024, 512
    with LargestTensor() as memory:
        entropy_scores(constant(9.0, height, width), 16, (1, 2))
    assert 0 < memory.largest < height * width * 512 * 4 / 50


def test_entropy_memory_does_not_grow_with_the_number_of_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of one pixel: 512 bins for each would be 4 KiB per pixel."""
    monkeypatch.setattr(histogram_scores, "_HISTOGRAM_ENTRIES", 2**15)
    peaks = []
    for height in (256, 1024):
        with LargestTensor() as memory:
            entropy_scores(constant(9.0, height, 64), 1, (0, 1))
        peaks.append(memory.largest / (height * 64))
    assert peaks[0] < 100 and peaks[1] < 30


# ---- Tsallis entropy and colour deviation


def naive_patches(pixels: Tensor, size: int, measure: Callable[[list[list[float]]], float]) -> Tensor:
    """(3, H, W) -> (H // size, W // size): ``measure`` of the RGB triples of each complete patch, in float64."""
    h, w = pixels.shape[1] // size, pixels.shape[2] // size
    found = torch.zeros(h, w, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            patch = pixels[:, y * size : (y + 1) * size, x * size : (x + 1) * size]
            found[y, x] = measure(patch.double().flatten(1).T.tolist())
    return found.float()


def naive_tsallis(colours: list[list[float]], q: float = 0.3) -> float:
    counts = Counter(int(2 * (0.2989 * red + 0.587 * green + 0.114 * blue)) for red, green, blue in colours)
    return (1 - sum((count / len(colours)) ** q for count in counts.values())) / (q - 1)


def naive_colour_deviation(colours: list[list[float]]) -> float:
    roots = [[(level / 255) ** 0.5 for level in channel] for channel in zip(*colours, strict=True)]
    return sum(statistics.pvariance(channel) for channel in roots) ** 0.5


NAIVE = {"tsallis": naive_tsallis, "colour_deviation": naive_colour_deviation}


@pytest.mark.parametrize("name", NAIVE)
@pytest.mark.parametrize(("photo", "patch_size"), [("chelsea", 7), ("rocket", 16), ("coffee", 1)])
def test_scores_of_photos_are_the_plain_loops(
    photos: dict[str, Tensor], name: str, photo: str, patch_size: int
) -> None:
    part = photos[photo][:, 40:110, 60:155]
    images = normalise(part[None].float())
    maps = score_maps(images, patch_size, (0, 1, 2), SCORERS[name], PixelFormat())
    for scale, map_ in enumerate(maps):
        expected = naive_patches(part, patch_size << scale, NAIVE[name])
        assert expected.numel()
        torch.testing.assert_close(map_[0], expected, atol=1e-3, rtol=0)


@pytest.mark.usefixtures("narrow_strips")
@pytest.mark.parametrize("q", [0.3, 0.9, 2.0])
def test_tsallis_of_other_orders_and_in_strips(q: float) -> None:
    pixels = random_pixels(1, 3, 70, 40) // 16
    for scale, map_ in enumerate(tsallis_scores(pixels, 4, (0, 1, 2), q=q)):
        expected = naive_patches(pixels[0], 4 << scale, lambda colours: naive_tsallis(colours, q))
        torch.testing.assert_close(map_[0], expected, atol=1e-3, rtol=1e-5)


def test_tsallis_of_equally_many_levels_is_known() -> None:
    pixels = torch.arange(256.0).view(16, 16).expand(1, 3, 16, 16)
    assert tsallis_scores(pixels, 16, (0,))[0].item() == pytest.approx((256**0.7 - 1) / 0.7, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 77.3, 255.0])
def test_scores_of_one_colour_are_zero_and_not_below(value: float) -> None:
    for name in NAIVE:
        for map_ in SCORERS[name](constant(value, 42, 42), 7, (0, 1)):
            assert (map_ >= 0).all() and map_.max() < 1e-5


def test_the_same_relative_contrast_deviates_more_in_the_dark_than_its_levels_say() -> None:
    bright, dark = (torch.tensor([[level, 0.8 * level]]).repeat(8, 4).expand(1, 3, 8, 8) for level in (200.0, 50.0))
    ratio = (colour_deviation_scores(bright, 8, (0,))[0] / colour_deviation_scores(dark, 8, (0,))[0]).item()
    assert ratio == pytest.approx(2, rel=1e-5)


# ---- Laplacian


def naive_laplacian(pixels: Tensor, size: int) -> dict[str, Tensor]:
    """(3, H, W) -> (H // size, W // size) for each scorer, by the eight differences of every pixel, in float64;
    mirrored at the border."""
    red, green, blue = pixels.double().tolist()
    height, width = pixels.shape[1:]
    grey = [[(0.2989 * red[y][x] + 0.587 * green[y][x] + 0.114 * blue[y][x]) / 255 for x in range(width)]
            for y in range(height)]  # fmt: skip
    patches: dict[tuple[int, int], list[float]] = {}
    for y in range(height // size * size):
        for x in range(width // size * size):
            response = 0.0
            for dy, dx in [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                response += grey[mirrored(y + dy, height)][mirrored(x + dx, width)] - grey[y][x]
            patches.setdefault((y // size, x // size), []).append(abs(response))
    grid = height // size, width // size
    measures = {
        "laplacian": statistics.fmean,
        "laplacian_max": max,
        "laplacian_std": lambda values: statistics.stdev(values) if len(values) > 1 else 0.0,
    }
    return {name: torch.tensor([measure(values) for values in patches.values()]).reshape(grid)
            for name, measure in measures.items()}  # fmt: skip


def mirrored(index: int, length: int) -> int:
    index = abs(index)
    return max(0, 2 * (length - 1) - index) if index >= length else index


LAPLACIANS = ["laplacian", "laplacian_max", "laplacian_std"]


@pytest.mark.parametrize("size", [(8, 8), (13, 9), (4, 16), (5, 2)])
def test_laplacians_are_those_of_absolute_neighbour_differences(size: tuple[int, int]) -> None:
    pixels = random_pixels(2, 3, *size)
    for scale in (0, 1):
        for image in range(2):
            for name, expected in naive_laplacian(pixels[image], 4 << scale).items():
                found = SCORERS[name](pixels, 4, (0, 1))[scale][image]
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "patch_size"), [("chelsea", 7), ("rocket", 16)])
def test_laplacians_of_photos_are_the_released_definitions(
    photos: dict[str, Tensor], name: str, patch_size: int
) -> None:
    photo = photos[name][:, 40:140, 90:235]
    for scale in (1, 2):
        for scorer, expected in naive_laplacian(photo, patch_size << scale).items():
            images = normalise(photo[None].float())
            (found,) = score_maps(images, patch_size, (scale,), SCORERS[scorer], PixelFormat())
            assert found.shape[1:] == expected.shape and expected.numel()
            torch.testing.assert_close(found[0], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", LAPLACIANS)
def test_laplacians_of_patches_of_one_pixel(name: str) -> None:
    pixels = random_pixels(1, 3, 5, 4)
    for scale in (0, 1, 2, 3):
        torch.testing.assert_close(
            SCORERS[name](pixels, 1, (scale,))[0][0], naive_laplacian(pixels[0], 1 << scale)[name], atol=1e-5, rtol=1e-5
        )


def test_the_deviation_of_equal_large_responses_is_zero() -> None:
    """A difference of two mean squares would leave a rest."""
    stripes = ((torch.arange(64) % 2) * 255.0).expand(1, 3, 64, 64)
    assert laplacian_scores(stripes, 16, (1,))[0].min() > 5
    assert laplacian_std_scores(stripes, 16, (1,))[0].max() < 1e-5


def test_laplacian_of_flat_is_zero_and_of_a_lone_pixel_known() -> None:
    assert all(SCORERS[name](constant(200.0), 16, (0, 1))[0].max() < 1e-5 for name in LAPLACIANS)
    pixels = constant(0.0, 8, 8)
    pixels[..., 4, 4] = 255
    # The pixel itself answers 8 and each of its neighbours 1, over 64 pixels.
    assert laplacian_scores(pixels, 8, (0,))[0].item() == pytest.approx(16 / 64 * 0.9999, rel=1e-4)
    assert laplacian_max_scores(pixels, 8, (0,))[0].item() == pytest.approx(8 * 0.9999, rel=1e-4)


def test_laplacian_of_a_single_pixel() -> None:
    assert laplacian_scores(constant(50.0, 1, 1), 1, (0, 1))[0].shape == (1, 1, 1)


# ---- upsampling error


def linear_samples(length: int, new: int) -> list[list[tuple[int, float]]]:
    """For each of ``new`` samples, the old ones it mixes and their weights (half-pixel centres)."""
    samples = []
    for i in range(new):
        position = max(0.0, (i + 0.5) * length / new - 0.5)
        low = min(int(position), length - 1)
        samples.append([(low, 1 - (position - low)), (min(low + 1, length - 1), position - low)])
    return samples


def naive_bilinear(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) -> (3, *size), sample by sample."""
    rows, columns = (linear_samples(length, new) for length, new in zip(image.shape[1:], size, strict=True))
    result = torch.zeros(3, *size)
    for y, ys in enumerate(rows):
        for x, xs in enumerate(columns):
            result[:, y, x] = sum(image[:, i, j] * a * b for i, a in ys for j, b in xs)
    return result


def naive_upsampling_error(pixels: Tensor, patch_size: int, scale: int) -> Tensor:
    size = patch_size << scale
    h, w = pixels.shape[1] // size, pixels.shape[2] // size
    image = pixels[:, : h * size, : w * size] / 255
    small = naive_bilinear(image, (h * patch_size, w * patch_size))
    error = (image - naive_bilinear(small, (h * size, w * size))).square().mean(0)
    return torch.stack([
        torch.stack([error[y * size : (y + 1) * size, x * size : (x + 1) * size].mean() for x in range(w)])
        for y in range(h)
    ])  # fmt: skip


def test_upsampling_error_of_a_photo_is_the_released_definition(photos: dict[str, Tensor]) -> None:
    photo = photos["chelsea"][:, 60:120, 100:160].float()
    for scale in (1, 2):
        (found,) = score_maps(normalise(photo[None]), 7, (scale,), upsampling_error_scores, PixelFormat())
        torch.testing.assert_close(found[0], naive_upsampling_error(photo, 7, scale), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("size", "scale"), [((8, 8), 1), ((13, 9), 1), ((9, 17), 2), ((8, 8), 0)])
def test_upsampling_error_is_shrinking_and_enlarging(size: tuple[int, int], scale: int) -> None:
    pixels = random_pixels(1, 3, *size)
    (map_,) = upsampling_error_scores(pixels, 2, (scale,))
    torch.testing.assert_close(map_[0], naive_upsampling_error(pixels[0], 2, scale), atol=1e-6, rtol=1e-4)


def test_upsampling_error_of_flat_and_of_scale_0_is_zero() -> None:
    assert all(map_.max() < 1e-10 for map_ in upsampling_error_scores(constant(90.0), 8, (1, 2)))
    assert upsampling_error_scores(random_pixels(1, 3, 16, 16), 8, (0,))[0].max() < 1e-10


# ---- all scorers


@pytest.mark.parametrize("name", SCORERS)
def test_images_of_16_bits_are_scored_as_the_8_bits_that_they_round_to(name: str, photos: dict[str, Tensor]) -> None:
    photo = photos["chelsea"][None, :, :70, :90].float() * 257 + random_pixels(1, 3, 70, 90) / 2 - 60
    mean, std = 31_000.0, 14_000.0
    format_ = PixelFormat((mean / 257,) * 3, (std / 257,) * 3)
    found = score_maps((photo - mean) / std, 16, (1, 2), SCORERS[name], format_)
    expected = SCORERS[name]((photo / 257).round().clamp(0, 255), 16, (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_normalisation_of_16_bits_is_refused_with_the_remedy() -> None:
    for mean, std in (((31_000.0,) * 3, (14_000.0,) * 3), ((0.0,) * 3, (65_535.0,) * 3)):
        with pytest.raises(ValueError, match="of 16 bits; give grey levels of 8 bits .*divided by 257"):
            PixelFormat(mean, std)
    assert PixelFormat((0.0,) * 3, (256.0,) * 3).std == (256.0,) * 3


@pytest.mark.parametrize("name", SCORERS)
def test_padding_changes_the_scores_next_to_it_only(name: str) -> None:
    images = normalise(random_pixels(1, 3, 48, 64))
    for alone, padded in zip(
        score_maps(images, 8, (0, 1), SCORERS[name], PixelFormat()),
        score_maps(F.pad(images, (0, 24, 0, 40)), 8, (0, 1), SCORERS[name], PixelFormat()),
        strict=True,
    ):
        rows, columns = alone.shape[1] - 1, alone.shape[2] - 1
        torch.testing.assert_close(padded[:, :rows, :columns], alone[:, :rows, :columns], atol=1e-6, rtol=1e-6)
        assert padded[:, -1, -1].abs().max() < 1e-5


@pytest.mark.parametrize("name", SCORERS)
def test_grey_images_are_scored_as_rgb_ones_of_equal_channels(name: str) -> None:
    grey, format_ = random_pixels(2, 1, 40, 50), PixelFormat((120.0,) * 3, (60.0,) * 3)
    found = score_maps((grey - 120) / 60, 8, (1, 2), SCORERS[name], format_)
    expected = SCORERS[name](grey.expand(2, 3, 40, 50), 8, (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("size", [(16, 16), (31, 64), (15, 15), (1, 1), (3, 100)])
def test_every_scorer_scores_complete_patches_only(name: str, size: tuple[int, int]) -> None:
    maps = SCORERS[name](random_pixels(2, 3, *size), 8, (1, 2))
    assert [tuple(map_.shape) for map_ in maps] == [(2, size[0] // s, size[1] // s) for s in (16, 32)]
    assert all(map_.dtype == torch.float32 and map_.isfinite().all() for map_ in maps)


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_ranks_flat_below_photo_below_noise(name: str, photos: dict[str, Tensor]) -> None:
    photo = photos["chelsea"][None, :, 100:164, 100:164].float()
    values = [
        SCORERS[name](p, 16, (2,))[0].item() for p in (constant(80.0, 64, 64), photo, random_pixels(1, 3, 64, 64))
    ]
    assert values[0] < values[1] < values[2]


@pytest.mark.parametrize("name", SCORERS)
def test_scores_of_an_image_do_not_depend_on_its_batch_mates(name: str) -> None:
    pixels = random_pixels(3, 3, 33, 40)
    together = SCORERS[name](pixels, 8, (1, 2))
    for image in range(3):
        for whole, alone in zip(together, SCORERS[name](pixels[image : image + 1], 8, (1, 2)), strict=True):
            torch.testing.assert_close(whole[image], alone[0], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_scores_in_float32(name: str, dtype: torch.dtype) -> None:
    images = normalise(random_pixels(1, 3, 32, 32))
    plain = score_maps(images, 8, (1, 2), SCORERS[name], PixelFormat())
    with torch.autocast("cpu", dtype=dtype):
        cast = score_maps(images, 8, (1, 2), SCORERS[name], PixelFormat())
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_scores_carry_no_gradient_and_no_scale_needs_no_scores() -> None:
    images = noise(1, 3, 16, 16).requires_grad_()
    assert not score_maps(images, 8, (1,), laplacian_scores, PixelFormat())[0].requires_grad
    assert score_maps(images, 8, (), entropy_scores, PixelFormat()) == ()


def test_scorers_by_name_or_as_callables() -> None:
    assert resolve_scorer("entropy", PixelFormat()) is entropy_scores
    assert resolve_scorer(naive_laplacian, PixelFormat()) is naive_laplacian


@pytest.mark.parametrize("scorer", ["Entropy", "", "scorer.pth"])
def test_unknown_scorer_is_refused_with_the_choices(scorer: object) -> None:
    with pytest.raises(ValueError, match=r"scorer=.*laplacian"):
        resolve_scorer(scorer, PixelFormat())
