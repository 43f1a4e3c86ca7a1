"""AP of torchvision's Faster R-CNN on a pretrained ViT, for one variant and seed.

With a frozen backbone its features are made once, as they are and mirrored, and all seeds train heads on them: minutes
on a CPU. Without, all of it is trained, for GPUs.
"""

import statistics
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList

from apt_dense.hosts.torchvision import faster_rcnn
from apt_dense.layout.scatter import scatter_tokens
from apt_dense.nn.feature_pyramid import SimpleFeaturePyramid

from evidence.detection_photos import DetectionSet, files_of, load_photos, to_device
from evidence.frozen_features import LastFeatures
from evidence.match_token_counts import timed
from evidence.rival_backbones import mean_tokens
from evidence.training_loop import load_start, on_cpu, summary, train
from evidence.training_variants import Variant
from evidence.variant_backbones import Plan, build_backbone, choose_thresholds
from torchvision_detection.evaluation import coco_scores, detections_of

PATCH_SIZE = 16  # pixels; the levels of a pyramid have strides that are powers of 2
_SCORES = {"AP": "AP", "AP50": "AP50", "APs": "APs", "APm": "APm"}  # of COCO's
_HEADS = {
    "channels": 64, "box_features": 256, "box_batch_size_per_image": 128, "rpn_post_nms_top_n_train": 300,
    "rpn_post_nms_top_n_test": 300, "resize_in_training": False,
}  # fmt: skip


def build(plan: Plan, variant: Variant) -> FasterRCNN:
    """Build the detector of a variant with the pretrained weights. Padding makes no tokens."""
    size = (variant.size or plan.size)[0]
    return faster_rcnn(build_backbone(plan, variant, drop_padding=True), plan.classes + 1, size, size, **_HEADS)


class Features(NamedTuple):
    """Those of V views of N photos: as they are, and mirrored if V is 2.

    Args:
        maps: (V, N, C, h, w) float16, 0 beyond a photo.
        sizes: of the photos, in pixels as the model sees them (height, width).
        tokens: of a photo as it is, on average.
        milliseconds: of the backbone for a photo, the median.
    """

    maps: Tensor
    sizes: Sequence[tuple[int, int]]
    tokens: float
    milliseconds: float


@torch.inference_mode()
def features_of(model: FasterRCNN, data: DetectionSet, size: int, mirrored: bool) -> Features:
    """Run the backbone over all photos, in bfloat16."""
    model.eval()
    net, device = model.backbone.net, next(model.parameters()).device
    stride = 2 * net.patch_size
    side = -(-size // stride) * stride
    maps, sizes, tokens, seconds = [], [], [], []
    for flip in (False, True)[: 1 + mirrored]:
        for image in data.images(size, flip):
            batch, _ = model.transform([image.to(device)])
            images = F.pad(batch.tensors, (0, side - batch.tensors.shape[3], 0, side - batch.tensors.shape[2]))
            found, took = timed(lambda images=images: _feature_map(net, images))
            maps.append(found.to(device))
            seconds.append(took)
            if not flip:
                sizes += batch.image_sizes
                tokens.append(mean_tokens(net, images).item())
    maps = torch.cat(maps).unflatten(0, (1 + mirrored, -1))
    return Features(maps, sizes, statistics.fmean(tokens), 1000 * statistics.median(seconds))


def _feature_map(net: nn.Module, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        rows, layout = net.forward_tokens(images)
        return scatter_tokens(rows[-1], layout).half()


class DetectorOnFeatures(nn.Module):
    """A detector from its backbone's features on."""

    def __init__(self, detector: FasterRCNN) -> None:
        super().__init__()
        self.detector = detector

    def forward(
        self, maps: Tensor, sizes: list[tuple[int, int]], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, and otherwise detections in pixels as the backbone saw them.

        Args:
            maps: (B, C, h, w).
            sizes: of the photos (height, width).
        """
        body = self.detector.backbone
        levels = OrderedDict(zip(body.levels, SimpleFeaturePyramid.forward(body, maps), strict=True))
        side = [n * body.net.patch_size for n in maps.shape[-2:]]
        images = ImageList(maps.new_empty(1).expand(len(maps), 3, *side), sizes)
        proposals, losses = self.detector.rpn(images, levels, targets)
        found, of_boxes = self.detector.roi_heads(levels, proposals, sizes, targets)
        return {**losses, **of_boxes} if self.training else found


Losses = Callable[[list[int], bool], Mapping[str, Tensor]]


def loss_of_photos(losses: Losses, numbers: Tensor, generator: torch.Generator) -> Tensor:
    """The sum of all losses of some photos, all of them mirrored half of the time."""
    mirrored = bool(torch.rand((), generator=generator) < 0.5)
    return sum(losses(numbers.tolist(), mirrored).values())


def run(
    plan: Plan, variant: Variant, seed: int, sets: tuple[DetectionSet, DetectionSet],
    start: Mapping[str, Any] | None, features: LastFeatures, device: torch.device,
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """Train and test one variant with one seed; return its results and its weights on the CPU.

    Args:
        sets: photos to train on, and to test on.
        start: weights of the row that this one starts from.
        features: those of a frozen backbone, for the next seed.
    """
    torch.manual_seed(seed)
    model = build(plan, variant)
    net, size = model.backbone.net, (variant.size or plan.size)[0]
    share = choose_thresholds(net, variant, plan, _images_to_calibrate(model, plan, size, sets[1]))
    if start is not None:
        load_start(model, start)
    model.to(device)
    steps: list[Tensor] = []
    of_steps = plan, variant, seed, sets, size, steps.append
    if plan.backbone_rate:
        results = _train_whole(model, *of_steps)
    else:
        same = plan, variant.size, variant.tokens, variant.rival, variant.options
        made = features.get(same, lambda: tuple(features_of(model, data, size, i == 0) for i, data in enumerate(sets)))
        results = _train_on_features(model, *of_steps, made)
    return {**summary(net, share, steps), **results}, on_cpu(model)


def _images_to_calibrate(model: FasterRCNN, plan: Plan, size: int, data: DetectionSet) -> list[Tensor]:
    """Some photos without padding."""
    model.eval()
    images = (data.image(n, size) for n in range(0, len(data.photos), max(1, len(data.photos) // plan.calibrated)))
    return [model.transform.normalize(image)[None] for image in images]


def _train_on_features(
    model: FasterRCNN, plan: Plan, variant: Variant, seed: int, sets: tuple[DetectionSet, DetectionSet], size: int,
    note: Callable[[Tensor], None], features: tuple[Features, Features],
) -> dict[str, float]:  # fmt: skip
    """Train and test the heads."""
    model.backbone.net.requires_grad_(False)
    heads, device = DetectorOnFeatures(model), next(model.parameters()).device
    trained, tested = features

    def losses(numbers: list[int], mirrored: bool) -> Mapping[str, Tensor]:
        targets = [to_device(sets[0].target(n, size, mirrored), device) for n in numbers]
        return heads(trained.maps[int(mirrored), numbers].float(), [trained.sizes[n] for n in numbers], targets)

    train(heads, model.backbone.net, partial(loss_of_photos, losses), len(sets[0].photos), plan, variant, seed, note)
    heads.eval()

    @torch.inference_mode()
    def detect(number: int) -> Mapping[str, Tensor]:
        (found,) = heads(tested.maps[0, number : number + 1].float(), tested.sizes[number : number + 1])
        scale = size / max(sets[1].photos[number].shape[:2])
        return {**found, "boxes": found["boxes"] / scale}

    times = {"tokens": tested.tokens, "backbone ms": tested.milliseconds}
    return {**_scores(sets[1], detect), **times}


def _train_whole(
    model: FasterRCNN, plan: Plan, variant: Variant, seed: int, sets: tuple[DetectionSet, DetectionSet], size: int,
    note: Callable[[Tensor], None],
) -> dict[str, float]:  # fmt: skip
    """Train and test all of it; bfloat16 on GPUs."""
    device = next(model.parameters()).device
    in_16_bits = partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")

    def losses(numbers: list[int], mirrored: bool) -> Mapping[str, Tensor]:
        images = [sets[0].image(n, size, mirrored).to(device) for n in numbers]
        with in_16_bits():
            return model(images, [to_device(sets[0].target(n, size, mirrored), device) for n in numbers])

    seconds = train(
        model, model.backbone.net, partial(loss_of_photos, losses), len(sets[0].photos), plan, variant, seed, note
    )
    model.eval()
    tokens = []

    @torch.inference_mode()
    def detect(number: int) -> Mapping[str, Tensor]:
        image = sets[1].image(number, size).to(device)
        tokens.append(mean_tokens(model.backbone.net, model.transform([image])[0].tensors).item())
        with in_16_bits():
            (found,) = model([image])
        return {**found, "boxes": found["boxes"] * max(sets[1].photos[number].shape[:2]) / size}

    scores = _scores(sets[1], detect)
    return {**scores, "tokens": statistics.fmean(tokens), "step ms": seconds and 1000 * seconds}


def _scores(data: DetectionSet, detect: Callable[[int], Mapping[str, Tensor]]) -> dict[str, float]:
    """COCO's scores in per cent; None where there is nothing to find."""
    split, entries = data.split, []
    for number, image_id in enumerate(split.image_ids):
        entries += detections_of(detect(number), image_id, split.category_ids)
    found = coco_scores(split.coco, entries, "bbox")
    return {name: None if found[name] < 0 else 100 * found[name] for name in _SCORES}


class DetectionTask:
    """Trainings on a data set in COCO's layout, scored by the AP of boxes.

    Args:
        data: its folder.
        limit: photos to train on at most, evenly spread.

    Raises:
        ValueError, OSError: for a data set that cannot be used.
    """

    metric = "AP"

    def __init__(self, data: Path, limit: int | None, device: torch.device) -> None:
        self.files = {"trained": files_of(data, "train"), "tested": files_of(data, "val")}
        self._data, self._limit, self._device = data, limit, device
        self._sets: tuple[DetectionSet, DetectionSet] | None = None
        self._features = LastFeatures()

    def run(
        self, plan: Plan, variant: Variant, seed: int, start: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See :func:`run`; photos are read once. Raises ValueError, OSError."""
        if self._sets is None:
            self._sets = load_photos(self._data, "train", self._limit), load_photos(self._data, "val")
        trained = self._sets[0]
        plan = plan._replace(classes=len(trained.split.category_ids), patch_size=PATCH_SIZE)
        return run(plan, variant, seed, self._sets, start, self._features, self._device)
