"""Whether hosts normalise images as the backbone expects."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apt_dense import APTViT
from apt_dense.hosts.pixel_agreement import pixel_disagreement

TINY = {"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 2}
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def model(**options: object) -> nn.Module:
    return nn.Sequential(APTViT(**{**TINY, "thresholds": (5.5,), **options}), nn.ReLU())


def test_what_agrees_passes() -> None:
    assert pixel_disagreement(model(), MEAN, STD) is None
    assert pixel_disagreement(model(), torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1), "RGB") is None
    assert pixel_disagreement(model(), (124, 116, 104), (58.4, 57.1, 57.4), "RGB") is None
    assert pixel_disagreement(nn.ReLU(), (0, 0, 0), (1, 1, 1), "BGR") is None


@pytest.mark.parametrize("options", [{"thresholds": (5.5,)}, {"thresholds": (5.5,), "token_budget": 0.6}], ids=str)
@pytest.mark.parametrize(
    ("mean", "std", "order", "named"),
    [
        ((127.5,) * 3, STD, None, "mean=[127.5, 127.5, 127.5]"),
        (MEAN[::-1], STD, None, "mean=[103.53, 116.28, 123.675]"),
        (MEAN, (1.0, 1.0, 1.0), "RGB", "std=[1.0, 1.0, 1.0]"),
        (MEAN, STD, "BGR", "channels in the order BGR"),
        ((float("nan"),) * 3, STD, None, "mean=[nan, nan, nan]"),
    ],
)
def test_what_differs_is_named(options: dict, mean: tuple, std: tuple, order: str | None, named: str) -> None:
    found = pixel_disagreement(model(**options), mean, std, order)
    assert named in found and "pixel_mean=(123.675, 116.28, 103.53)" in found and "channel_order='RGB'" in found


def test_without_adaptive_patches_nothing_is_scored() -> None:
    assert pixel_disagreement(model(thresholds=()), (0.0,) * 3, (1.0,) * 3, "BGR") is None
    own = model(scorer=lambda pixels, patch_size, scales: [])
    assert pixel_disagreement(own, (0.0,) * 3, (1.0,) * 3, "BGR") is None


def test_grey_images_have_one_mean() -> None:
    grey = model(in_chans=1, pixel_mean=(127.5,) * 3, pixel_std=(60.0,) * 3)
    assert pixel_disagreement(grey, [127.5], [60.0], "BGR") is None
    assert "mean=[100.0]" in pixel_disagreement(grey, [100.0], [60.0])


def test_other_numbers_of_channels_differ() -> None:
    assert "mean=[123.675, 116.28, 103.53, 0.0]" in pixel_disagreement(model(), (*MEAN, 0), (*STD, 1))
