"""The data set of compare_by_training --coco: trainings on it, and models of it to time."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from apt_dense.hosts.coco import check_same_categories

from evidence.ap_after_training import Photos, build, losses_of, run, sum_of_views
from evidence.detection_photos import DetectionSet, files_of, load_photos
from evidence.fast_16_bits import in_16_bits
from evidence.frozen_detector import DetectorFeatures
from evidence.frozen_features import LastFeatures
from evidence.model_forms import set_thresholds
from evidence.training_loop import repeated_step
from evidence.training_variants import Variant
from evidence.variant_backbones import Plan
from shared.photo_files import evenly_spread

PATCH_SIZE = 16  # pixels; the levels of a pyramid have strides that are powers of 2
_TIMED = 16  # photos of a forward pass that is timed


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
        self.files = {"trained": list(files_of(data, "train", limit)), "tested": list(files_of(data, "val"))}
        self._data, self._limit, self._device = data, limit, device
        self._sets: tuple[DetectionSet, DetectionSet] | None = None
        self._photos: tuple[int, Photos] | None = None
        self._features: LastFeatures[DetectorFeatures] = LastFeatures()

    def run(
        self, plan: Plan, variant: Variant, seed: int, start: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See :func:`run`; photos are read once. Raises ValueError, OSError."""
        plan, photos = self._ready(plan, variant)
        return run(plan, variant, seed, photos, start, self._features, self._device)

    def forward(self, plan: Plan, variant: Variant, thresholds: Sequence[float]) -> Callable[[], int]:
        """See :class:`Task`; some photos tested, one at a time, to boxes. Heads that know nothing propose as many boxes
        as they may."""
        model, photos, _ = self._untrained(plan, variant, thresholds)
        model.eval()
        numbers = evenly_spread(range(len(photos.tested.photos)), _TIMED)
        images = [photos.tested.image(number).to(self._device) for number in numbers]

        @torch.inference_mode()
        def run_all() -> int:
            with in_16_bits(self._device.type):
                return sum(len(model([image])) for image in images)

        return run_all

    def step(self, plan: Plan, variant: Variant, thresholds: Sequence[float]) -> Callable[[], int]:
        """See :class:`Task`."""
        model, photos, plan = self._untrained(plan, variant, thresholds)
        loss_of = partial(sum_of_views, losses_of(model, photos.trained))
        return repeated_step(model, model.backbone.net, loss_of, len(photos.trained.photos), plan)

    def _untrained(self, plan: Plan, variant: Variant, thresholds: Sequence[float]) -> tuple[FasterRCNN, Photos, Plan]:
        """A detector with pretrained weights alone, and the photos and the plan that go with it."""
        plan, photos = self._ready(plan, variant)
        model = build(plan, variant).to(self._device)
        if variant.is_adaptive:
            set_thresholds(model.backbone.net, tuple(thresholds))
        return model, photos, plan

    def _ready(self, plan: Plan, variant: Variant) -> tuple[Plan, Photos]:
        """The plan with what the data say, and photos at the size of a variant; those of the last one are kept."""
        self._sets = self._sets or self._load()
        size = (variant.size or plan.size)[0]
        if self._photos is None or self._photos[0] != size:
            self._photos = size, Photos(*(data.at(size) for data in self._sets))
        classes = len(self._sets[0].split.category_ids)
        return plan._replace(classes=classes, patch_size=PATCH_SIZE), self._photos[1]

    def _load(self) -> tuple[DetectionSet, DetectionSet]:
        trained, tested = load_photos(self._data, "train", self._limit), load_photos(self._data, "val")
        check_same_categories(trained.split.categories, tested.split.categories, "the training data", "the test data")
        return trained, tested
