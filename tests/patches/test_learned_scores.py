"""Learned scores: what they see, their files, and models that choose patches by them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from apt_dense import APTViT, PatchSelector
from apt_dense.options import PixelFormat
from apt_dense.patches.image_preparation import rounded_mean
from apt_dense.patches.learned_scores import LAYERS, MARGIN, PIXELS, LearnedScorer
from apt_dense.patches.scorer_files import as_bytes
from apt_dense.patches.scorer_layers import Weights, convolve

from support.scorers import PADDING, pixels_of, random_scorer

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def scorer() -> LearnedScorer:
    return random_scorer(LearnedScorer)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "scorer.safetensors"
    path.write_bytes(as_bytes(random_scorer(LearnedScorer)))
    return path


def naive(weights: Weights, pixels: Tensor, size: int) -> Tensor:
    """A patch at a time: it and three patches around it, cut from a picture that is padded on all sides."""
    height, width = pixels.shape[-2:]
    reach = MARGIN * size
    padded = torch.tensor(PADDING).view(1, 3, 1, 1).repeat(1, 1, height + 2 * reach + size, width + 2 * reach + size)
    padded[..., reach : reach + height, reach : reach + width] = pixels
    scores = torch.zeros(height // size, width // size)
    for row in range(height // size):
        for column in range(width // size):
            top, left = row * size, column * size
            window = padded[..., top : top + size + 2 * reach, left : left + size + 2 * reach]
            around = (window - torch.tensor(PADDING).view(1, 3, 1, 1)) / 255
            side = (2 * MARGIN + 1) * PIXELS
            seen = torch.nn.functional.interpolate(around, size=(side, side), mode="bilinear", antialias=True)
            scores[row, column] = torch.sigmoid(convolve(weights, LAYERS, seen)[0, 0, MARGIN, MARGIN]) ** 2
    return scores


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (41, 100), (16, 90), (35, 16)])
def test_a_patch_is_scored_by_itself_and_what_is_around_it(scorer: LearnedScorer, rows: int, columns: int) -> None:
    pixels = pixels_of(rows, columns)
    one, two = scorer(pixels, 8, [1, 2])
    torch.testing.assert_close(one[0], naive(scorer.weights, pixels, 16), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(two[0], naive(scorer.weights, pixels, 32), atol=1e-5, rtol=1e-4)
    assert one.min() >= 0 and one.max() <= 1 and (one.numel() < 9 or one.std() > 0.01)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (15, 200), (7, 7)])
def test_images_without_a_whole_patch_have_no_scores(scorer: LearnedScorer, rows: int, columns: int) -> None:
    (found,) = scorer(pixels_of(rows, columns), 8, [1])
    assert found.shape == (1, rows // 16, columns // 16) and found.numel() == 0


@pytest.mark.parametrize(("rows", "columns"), [(64, 48), (40, 60), (70, 33)])
def test_scores_do_not_depend_on_a_host_s_padding(scorer: LearnedScorer, rows: int, columns: int) -> None:
    """Patches of padding alone, or in part, are others; those of the image stay."""
    pixels = pixels_of(rows, columns)
    padded = torch.tensor(PADDING).view(1, 3, 1, 1).repeat(1, 1, 160, 160)
    padded[..., :rows, :columns] = pixels
    for alone, among in zip(scorer(pixels, 8, [1, 2]), scorer(padded, 8, [1, 2]), strict=True):
        torch.testing.assert_close(among[:, : alone.shape[1], : alone.shape[2]], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "format",
    [PixelFormat(), PixelFormat((127.5,) * 3, (127.5,) * 3), PixelFormat((103.53, 116.28, 123.675), (1.0,) * 3, "BGR")],
)
def test_a_selector_tells_the_colour_of_padding(file: Path, format: PixelFormat) -> None:
    options = {"pixel_mean": format.mean, "pixel_std": format.std, "channel_order": format.channel_order}
    selector = PatchSelector(patch_size=8, thresholds=(0.1,), scorer=str(file), **options)
    assert selector.score.padding == rounded_mean(format)
    images = (pixels_of(48, 48) - torch.tensor(format.mean).view(1, 3, 1, 1)) / torch.tensor(format.std).view(
        1, 3, 1, 1
    )
    padded = torch.zeros(2, 3, 80, 64)
    padded[:1, :, :48, :48] = images
    alone, among = selector.scores(images)[0], selector.scores(padded)[0]
    torch.testing.assert_close(among[:1, :3, :3], alone, atol=1e-5, rtol=1e-4)


def other_shape(content: dict[str, Tensor]) -> None:
    content["2.weight"] = content["2.weight"][:, :3].contiguous()


def not_a_number(content: dict[str, Tensor]) -> None:
    content["0.bias"][3] = torch.nan


def half(content: dict[str, Tensor]) -> None:
    content["1.weight"] = content["1.weight"].half()


def gone(content: dict[str, Tensor]) -> None:
    del content["6.bias"]


@pytest.mark.parametrize(
    ("change", "words"),
    [(other_shape, "2.weight"), (not_a_number, "0.bias"), (half, "1.weight"), (gone, "nothing as 6.bias")],
)
def test_wrong_weights_are_named(file: Path, change: Callable[[dict], None], words: str) -> None:
    content = load(file.read_bytes())
    change(content)
    file.write_bytes(save(content, {"apt_dense": '{"learned_scorer": 1}'}))
    with pytest.raises(ValueError, match=f"scorer=.*{words}"):
        APTViT(**TINY, thresholds=(0.1,), scorer=str(file))
