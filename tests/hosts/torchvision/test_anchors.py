"""Anchors lie on the cells of their levels, whatever the size of the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from apt_dense import APTViT
from apt_dense.hosts.torchvision import faster_rcnn, mask_rcnn, retinanet

from support.references import randomise

BUILDERS = {"mask_rcnn": mask_rcnn, "faster_rcnn": faster_rcnn, "retinanet": retinanet}


def anchors_of(kind: str, patch_size: int, height: int, width: int, upstream: bool = False) -> tuple[list, Tensor]:
    """Rows, columns and stride of each level, and all anchors of an image."""
    net = APTViT(img_size=128, patch_size=patch_size, embed_dim=16, depth=1, num_heads=2)
    model = randomise(BUILDERS[kind](net, 3, channels=16))
    generator = model.anchor_generator if kind == "retinanet" else model.rpn.anchor_generator
    if upstream:
        generator = AnchorGenerator(generator.sizes, generator.aspect_ratios)
    images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
    levels = list(model.backbone(images.tensors).values())
    (found,) = generator(images, levels)
    pairs = zip(levels, model.backbone.strides, strict=True)
    return [(*map(int, level.shape[2:]), stride) for level, stride in pairs], found


def centres(levels: list, per_cell: int) -> Tensor:
    """Where the anchors of each cell of each level belong, x and y, cell by cell."""
    places = [(x * s, y * s) for rows, columns, s in levels for y in range(rows) for x in range(columns)]
    return torch.tensor(places, dtype=torch.float32).repeat_interleave(per_cell, 0)


SIZES = [(96, 128), (160, 96), (32, 32), (32, 480), (128, 128), (224, 352)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", BUILDERS)
@torch.inference_mode()
def test_anchors_lie_on_their_cells(kind: str, size: tuple[int, int]) -> None:
    for patch_size in (8, 16):
        levels, anchors = anchors_of(kind, patch_size, *size)
        expected = centres(levels, 9 if kind == "retinanet" else 3)
        torch.testing.assert_close((anchors[:, :2] + anchors[:, 2:]) / 2, expected, atol=0.51, rtol=0)


@torch.inference_mode()
def test_upstream_shifts_them() -> None:
    """If this fails, torchvision has mended it, and our class can go. Where strides divide, both are the same."""
    levels, theirs = anchors_of("faster_rcnn", 16, 96, 96, upstream=True)
    assert ((theirs[:, :2] + theirs[:, 2:]) / 2 - centres(levels, 3)).abs().max() >= 16
    ours, theirs = (anchors_of("faster_rcnn", 16, 128, 192, upstream)[1] for upstream in (False, True))
    assert torch.equal(ours, theirs)
