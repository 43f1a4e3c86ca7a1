"""AP of torchvision's Faster R-CNN on a pretrained ViT, for one variant and seed.

With a frozen backbone its features are made once, as they are and mirrored, and all seeds train heads on them: minutes
on a CPU. Without, all of it is trained.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.transform import resize_boxes

from apt_dense.hosts.torchvision import faster_rcnn

from evidence.detection_photos import SizedPhotos
from evidence.detection_scores import scores_in_per_cent
from evidence.fast_16_bits import in_16_bits
from evidence.frozen_detector import DetectorFeatures, DetectorOnFeatures, detector_features
from evidence.frozen_features import LastFeatures
from evidence.rival_backbones import RIVALS, mean_tokens
from evidence.training_loop import load_start, on_cpu, summary, train
from evidence.training_variants import Variant
from evidence.variant_backbones import Plan, backbone_key, build_backbone, choose_thresholds
from shared.photo_files import evenly_spread
from torchvision_detection.data import CocoSplit
from torchvision_detection.evaluation import detections_of

_HEADS = {
    "channels": 64, "box_features": 256, "box_batch_size_per_image": 128, "rpn_post_nms_top_n_train": 300,
    "rpn_post_nms_top_n_test": 300, "resize_in_training": False,
}  # fmt: skip
Note = Callable[[Tensor], None]
Detect = Callable[[int], Mapping[str, Tensor]]
Losses = Callable[[list[int], bool], Mapping[str, Tensor]]  # numbers of photos, and whether they are mirrored


class Photos(NamedTuple):
    """Those to train on and those to test on, as a variant sees them."""

    trained: SizedPhotos
    tested: SizedPhotos


def build(plan: Plan, variant: Variant) -> FasterRCNN:
    """Build the detector of a variant with the pretrained weights. Padding makes no tokens but those of rivals, which
    see as many in all photos of a batch."""
    size = (variant.size or plan.size)[0]
    backbone = build_backbone(plan, variant, drop_padding=variant.rival not in RIVALS)
    return faster_rcnn(backbone, plan.classes + 1, size, size, **_HEADS)


def run(
    plan: Plan, variant: Variant, seed: int, photos: Photos, start: Mapping[str, Any] | None,
    features: LastFeatures, device: torch.device,
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """Train and test one variant with one seed; return its results and its weights on the CPU.

    Args:
        start: weights of the row that this one starts from.
        features: those of a frozen backbone, for the next seed.
    """
    torch.manual_seed(seed)
    model = build(plan, variant)
    net = model.backbone.net
    share = choose_thresholds(net, variant, plan, _images_to_calibrate(model, plan, photos.tested))
    if start is not None:
        load_start(model, start)
    model.to(device)
    losses: list[Tensor] = []
    if plan.backbone_rate:
        results = _train_whole(model, plan, variant, seed, photos, losses.append)
    else:
        made = features.get(backbone_key(plan, variant), lambda: _features(model, photos))
        results = _train_heads(model, plan, variant, seed, photos, made, losses.append)
    return {**summary(net, share, losses), **results}, on_cpu(model)


def _images_to_calibrate(model: FasterRCNN, plan: Plan, tested: SizedPhotos) -> Iterator[Tensor]:
    """Some photos without padding."""
    for number in evenly_spread(range(len(tested.photos)), plan.calibrated):
        yield model.transform.normalize(tested.image(number))[None]


def _features(model: FasterRCNN, photos: Photos) -> tuple[DetectorFeatures, DetectorFeatures]:
    return detector_features(model, photos.trained, True), detector_features(model, photos.tested, False)


def _train_heads(
    model: FasterRCNN, plan: Plan, variant: Variant, seed: int, photos: Photos,
    features: tuple[DetectorFeatures, DetectorFeatures], note: Note,
) -> dict[str, Any]:  # fmt: skip
    """Train and test the heads on features."""
    model.backbone.net.requires_grad_(False)
    heads, (trained, tested) = DetectorOnFeatures(model), features

    def losses(numbers: list[int], mirrored: bool) -> Mapping[str, Tensor]:
        targets = _targets(photos.trained, numbers, mirrored, model)
        return heads(trained.maps[int(mirrored), numbers].float(), [trained.sizes[n] for n in numbers], targets)

    def detect(number: int) -> Mapping[str, Tensor]:
        size = tested.sizes[number]
        (found,) = heads(tested.maps[0, number : number + 1].float(), [size])
        return {**found, "boxes": resize_boxes(found["boxes"], size, photos.tested.full_sizes[number])}

    _train(heads, model, losses, photos, plan, variant, seed, note)
    scores = score(heads, photos.tested.split, detect)
    return {**scores, "tokens": tested.tokens, "backbone ms": tested.milliseconds}


def _train_whole(
    model: FasterRCNN, plan: Plan, variant: Variant, seed: int, photos: Photos, note: Note
) -> dict[str, Any]:
    """Train and test all of it, in bfloat16 where that is faster."""
    device, tokens = next(model.parameters()).device, []

    def detect(number: int) -> Mapping[str, Tensor]:
        image = photos.tested.image(number).to(device)
        tokens.append(mean_tokens(model.backbone.net, model.transform([image])[0].tensors).item())
        with in_16_bits(device.type):
            (found,) = model([image])
        full_size = photos.tested.full_sizes[number]
        return {**found, "boxes": resize_boxes(found["boxes"], image.shape[-2:], full_size)}

    seconds = _train(model, model, losses_of(model, photos.trained), photos, plan, variant, seed, note)
    scores = score(model, photos.tested.split, detect)
    return {**scores, "tokens": statistics.fmean(tokens), "step ms": seconds and 1000 * seconds}


def losses_of(model: FasterRCNN, photos: SizedPhotos) -> Losses:
    """The losses of a whole detector."""
    device = next(model.parameters()).device

    def losses(numbers: list[int], mirrored: bool) -> Mapping[str, Tensor]:
        images = [photos.image(n, mirrored).to(device) for n in numbers]
        with in_16_bits(device.type):
            return model(images, _targets(photos, numbers, mirrored, model))

    return losses


def _targets(photos: SizedPhotos, numbers: list[int], mirrored: bool, model: FasterRCNN) -> list[dict[str, Tensor]]:
    device = next(model.parameters()).device
    targets = (photos.target(number, mirrored) for number in numbers)
    return [{name: value.to(device) for name, value in target.items()} for target in targets]


def _train(
    trained: nn.Module, model: FasterRCNN, losses: Losses, photos: Photos, plan: Plan, variant: Variant, seed: int,
    note: Note,
) -> float | None:  # fmt: skip
    """Train a detector or its heads."""
    loss_of, count = partial(sum_of_views, losses), len(photos.trained.photos)
    return train(trained, model.backbone.net, loss_of, count, plan, variant, seed, note)


def sum_of_views(losses: Losses, numbers: Tensor, generator: torch.Generator) -> Tensor:
    """The sum of the losses of some photos, all of which are mirrored half of the time."""
    mirrored = bool(torch.rand((), generator=generator) < 0.5)
    return sum(losses(numbers.tolist(), mirrored).values())


@torch.inference_mode()
def score(model: nn.Module, split: CocoSplit, detect: Detect) -> dict[str, float | None]:
    """COCO's scores in per cent; None where there is nothing to find.

    Args:
        detect: the number of an image -> its detections as torchvision gives them, in pixels of the file.
    """
    model.eval()
    entries = []
    for number, image_id in enumerate(split.image_ids):
        entries += detections_of(detect(number), image_id, split.category_ids)
    return scores_in_per_cent(split.coco, entries, "bbox")
