"""Mask R-CNN (Detectron2's, else torchvision's) to compare: with our backbone, adaptive and uniform, and with
Detectron2's own."""

import importlib.util
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from apt_dense import APTViT
from apt_dense.hosts.torchvision import mask_rcnn
from apt_dense.options import PixelFormat
from apt_dense.patches.image_preparation import denormalise

from benchmarks.measure_in_turns import Candidate, Variant
from benchmarks.model_cases import (
    AS_DETECTRON2,
    CONFIGS,
    TINY_CHANNELS,
    Case,
    backbone_arguments,
    load_weights,
    our_variants,
    randomise_relative_positions,
    task_variant,
)

INSTANCES = 8  # per image, in training
CLASSES = 80
# Random classifiers give every class 1/81, below the threshold of 0.05: nothing would be found, no mask computed. With
# this bias for one class each proposal is a candidate, and about as many are found as a detector may report.
FAVOUR = 3.0


def _pixels(images: Tensor) -> Tensor:
    """Denormalise images to RGB grey levels 0-255."""
    return denormalise(images, PixelFormat()).round().clamp(0, 255)


def _boxes_and_masks(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw ``INSTANCES`` rectangles (n, 4) as x1, y1, x2, y2 in pixels of an S x S image, and their masks (n, S, S)."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(INSTANCES, 2, generator=generator) * 0.6
    sides = torch.rand(INSTANCES, 2, generator=generator) * 0.35 + 0.05
    boxes = torch.cat([corners, corners + sides], 1) * size
    ruler = torch.arange(size) + 0.5
    inside = [(ruler > boxes[:, i, None]) & (ruler < boxes[:, i + 2, None]) for i in (0, 1)]
    return boxes.to(device), (inside[1][:, :, None] & inside[0][:, None, :]).to(device)


def detector_candidates(case: Case) -> list[Candidate]:
    """Return Detectron2's Mask R-CNN where that is installed, with its own backbone as baseline, else torchvision's."""
    if importlib.util.find_spec("detectron2"):
        return detectron2_candidates(case)
    return torchvision_candidates(case)


def detectron2_candidates(case: Case) -> list[Candidate]:
    """Return Mask R-CNN of configs/detectron2 with random weights, the same for all."""
    torch.manual_seed(0)
    twin = _build_detectron2(case, {"thresholds": ()})
    randomise_relative_positions(twin.backbone)
    nn.init.constant_(twin.roi_heads.box_predictor.cls_score.bias[:1], FAVOUR)
    state = twin.state_dict()
    ours = [
        Candidate(f"{name}, Detectron2", role, partial(_detectron2_variant, case, state, choice))
        for name, role, choice in our_variants(case)
    ]
    return [*ours, Candidate("Detectron2", "detectron2", partial(_detectron2_variant, case, state, None))]


def _build_detectron2(case: Case, choice: Mapping[str, Any] | None) -> nn.Module:
    """Build it; ``choice`` is how our backbone chooses patches, None for Detectron2's backbone and pyramid."""
    from detectron2.config import instantiate
    from detectron2.modeling import SimpleFeaturePyramid, ViT

    from apt_dense.hosts.detectron2.train_and_evaluate import load_config

    config = load_config(str(CONFIGS / "detectron2" / "mask_rcnn_apt_vitdet_b_100ep.py"))
    config.dataloader.image_size = case.size
    model, backbone = config.model, config.model.backbone
    # Square photos have no padding to drop.
    backbone.net.update(drop_padding=False, **backbone_arguments(case), **(choice or {}))
    if choice is None:
        backbone._target_, backbone.net._target_ = SimpleFeaturePyramid, ViT
        for name in ("thresholds", "drop_padding", "pixel_mean", "pixel_std", "channel_order"):
            del backbone.net[name]
    if case.is_tiny:
        shrink_detectron2(model)
    return instantiate(model)


def shrink_detectron2(model: Any) -> None:
    """Make the heads of a Mask R-CNN's config as small as a tiny backbone."""
    heads, channels = model.roi_heads, TINY_CHANNELS
    model.backbone.out_channels = model.proposal_generator.head.in_channels = channels
    model.proposal_generator.post_nms_topk = (50, 20)
    heads.batch_size_per_image = 16
    heads.box_predictor.test_topk_per_image = 20
    heads.mask_head.update(conv_dims=[channels, channels])
    heads.box_head.update(conv_dims=[channels], fc_dims=[channels])
    heads.mask_head.input_shape.channels = heads.box_head.input_shape.channels = channels
    heads.box_predictor.input_shape.channels = channels


def _detectron2_variant(case: Case, state: Mapping[str, Tensor], choice: Mapping[str, Any] | None) -> Variant:
    model = _build_detectron2(case, choice)
    load_weights(model, state)
    batch = detectron2_batch(case.images)
    net = model.backbone.net if choice is not None else None
    return task_variant(model, case, lambda: model(batch), lambda: detectron2_losses(model, batch), net)


def detectron2_losses(model: nn.Module, batch: list[dict[str, Any]]) -> Mapping[str, Tensor]:
    """The losses that a Detectron2 model is trained with."""
    from detectron2.utils.events import EventStorage

    with EventStorage():  # the heads log there
        return model(batch)


def detectron2_batch(images: Tensor) -> list[dict[str, Any]]:
    """Normalised images (B, 3, S, S) and drawn objects as Detectron2's models take them."""
    from detectron2.structures import BitMasks, Boxes, Instances

    size = images.shape[-1]
    boxes, masks = _boxes_and_masks(size, images.device)
    instances = Instances(
        (size, size),
        gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks), gt_classes=torch.arange(INSTANCES, device=images.device),
    )  # fmt: skip
    return [{"image": p, "height": size, "width": size, "instances": instances} for p in _pixels(images)]


def torchvision_candidates(case: Case) -> list[Candidate]:
    """Return apt_dense.hosts.torchvision's Mask R-CNN; torchvision itself has no ViT detector."""
    torch.manual_seed(0)
    twin = _build_torchvision(case, {"thresholds": ()})
    randomise_relative_positions(twin.backbone)
    nn.init.constant_(twin.roi_heads.box_predictor.cls_score.bias[1:2], FAVOUR)  # 0 is the background
    state = twin.state_dict()
    return [
        Candidate(f"{name}, torchvision", role, partial(_torchvision_variant, case, state, choice))
        for name, role, choice in our_variants(case)
    ]


def _build_torchvision(case: Case, choice: Mapping[str, Any]) -> nn.Module:
    backbone = APTViT(**backbone_arguments(case), **AS_DETECTRON2, **choice)
    tiny = {}
    if case.is_tiny:
        tiny = {"channels": TINY_CHANNELS, "box_features": TINY_CHANNELS, "box_batch_size_per_image": 16}
        tiny |= {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 20}
    return mask_rcnn(backbone, CLASSES + 1, case.size, case.size, **tiny)


def _torchvision_variant(case: Case, state: Mapping[str, Tensor], choice: Mapping[str, Any]) -> Variant:
    model = _build_torchvision(case, choice)
    load_weights(model, state)
    images, targets = torchvision_batch(case.images)
    return task_variant(model, case, lambda: model(images), lambda: model(images, targets), model.backbone.net)


def torchvision_batch(images: Tensor) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Normalised images (B, 3, S, S) and drawn objects as torchvision's detectors take them."""
    boxes, masks = _boxes_and_masks(images.shape[-1], images.device)
    labels = torch.arange(1, INSTANCES + 1, device=boxes.device)
    targets = {"boxes": boxes, "masks": masks.to(torch.uint8), "labels": labels}
    return list(_pixels(images) / 255), [targets] * len(images)
