"""Padding of detectors: found exactly, dropped without effect on windows inside the image, kept as upstream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from detectron2.data import transforms as T

from apt_dense.hosts.detectron2 import APTViT
from apt_dense.patches.image_preparation import filled_region

from support.references import noise, randomise
from support.tiny_coco import ADAPTIVE, one_thread, tiny_model  # noqa: F401 (a fixture)
from support.tiny_detectors import WINDOWED, compare, pair, photo, preprocessed


def constant(colour: tuple[int, int, int], height: int = 70, width: int = 100) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, height, width).contiguous()


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return tiny_model(ADAPTIVE)


@pytest.mark.parametrize(
    "image",
    [photo(), constant((0, 0, 0)), constant((124, 116, 104)), constant((123, 116, 103)), constant((255, 255, 255))],
    ids=["photo", "black", "mean", "below_mean", "white"],
)
def test_padding_is_dropped_and_nothing_that_the_image_owns(detector: nn.Module, image: Tensor) -> None:
    (scale_map,) = detector.backbone.net.partition(preprocessed(detector, image))
    assert scale_map.shape == (8, 8)  # padded to a square of 128
    owned = torch.zeros(8, 8, dtype=torch.bool)
    owned[:5, :7] = True  # 70 x 100 pixels touch 5 x 7 cells
    assert torch.equal(scale_map >= 0, owned)


def test_no_grey_level_looks_like_padding(detector: nn.Module) -> None:
    images = preprocessed(detector, *(constant((level,) * 3, 20, 20) for level in range(256)))
    assert (filled_region(images) == 20).all()


def test_padding_of_a_fixed_size_crop_is_not_dropped(detector: nn.Module) -> None:
    pixels = photo().permute(1, 2, 0).numpy()
    transform = T.FixedSizeCrop((128, 128), pad=True).get_transform(pixels)
    padded = transform.apply_image(pixels)
    assert (padded[70:] == 128).all()
    image = torch.from_numpy(np.ascontiguousarray(padded.transpose(2, 0, 1)))
    assert (detector.backbone.net.partition(preprocessed(detector, image)) >= 0).all()


def test_zeros_count_as_padding_at_the_right_and_bottom_only(detector: nn.Module) -> None:
    images = noise(1, 3, 128, 128)
    images[..., :64, :32] = 0  # top left
    images[..., 64:80, 64:80] = 0  # inside
    images[..., 112:, :] = 0  # bottom row of cells
    dropped = detector.backbone.net.partition(images)[0] < 0
    assert dropped[7].all() and not dropped[:7].any()


def windowed_twins() -> tuple[APTViT, APTViT]:
    """Two equal ViTs with windows in all blocks, of which the second drops padding."""
    options = dict(WINDOWED, window_block_indexes=[0, 1])
    keeping, dropping = (randomise(APTViT(**options, drop_padding=drop)) for drop in (False, True))
    return keeping, dropping


def test_windows_without_padding_do_not_notice_that_it_is_dropped(detector: nn.Module) -> None:
    keeping, dropping = windowed_twins()
    images = preprocessed(detector, photo())
    with torch.no_grad():
        kept, dropped = keeping(images)["last_feat"][0], dropping(images)["last_feat"][0]
    # Of the windows with real cells (5 x 7), only that of rows and columns 0 to 3 has no padding.
    changed = (kept - dropped).abs().amax(0) > 1e-6
    assert not changed[:4, :4].any()
    assert changed[:5, 4:7].all() and changed[4, :7].all()  # other real cells lose keys
    assert not dropped[:, 5:].any() and not dropped[:, :, 7:].any()  # and dropped ones are zero


def test_padding_that_is_kept_is_detectron2_s(detector: nn.Module) -> None:
    theirs, ours = pair(**WINDOWED, drop_path_rate=0.0)
    assert compare(theirs, ours, preprocessed(detector, photo(), photo(33, 128))) <= 1e-4
