"""Boxes of torchvision's detectors under autocast: of the codes' precision, not rounded to pixels of bfloat16."""

from __future__ import annotations

import pytest
import torch

from apt_dense import APTViT
from apt_dense.hosts.torchvision import faster_rcnn, mask_rcnn, retinanet


@pytest.mark.parametrize("build", [faster_rcnn, mask_rcnn, retinanet])
def test_boxes_are_decoded_in_float32(build: object) -> None:
    model = build(APTViT(img_size=64, embed_dim=16, depth=1, num_heads=2), 3, 64, 64, channels=8)
    boxes = torch.tensor([[301.3, 402.7, 377.2, 490.9]])
    for part in (model,) if build is retinanet else (model.rpn, model.roi_heads):
        decoded = part.box_coder.decode_single(torch.zeros(1, 4, dtype=torch.bfloat16), boxes)
        torch.testing.assert_close(decoded, boxes)


@pytest.mark.parametrize("build", [faster_rcnn, retinanet])
def test_detectors_run_and_train_in_bfloat16(build: object) -> None:
    torch.manual_seed(0)
    model = build(APTViT(img_size=64, embed_dim=16, depth=1, num_heads=2), 3, 64, 64, channels=8)
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([torch.rand(3, 64, 64)], [target])
        sum(losses.values()).backward()
        (found,) = model.eval()([torch.rand(3, 64, 64)])
    assert all(loss.isfinite() for loss in losses.values()) and found["boxes"].dtype == torch.float32
