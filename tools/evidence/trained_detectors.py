"""Trained detectors of any trainer, the data they are tested on, and their detections as COCO has them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from apt_dense.hosts.load_trained import DETECTRON2, TORCHVISION, load_trained
from apt_dense.hosts.trained_model_types import Detections, TrainedDetector

from shared.photo_files import evenly_spread
from torchvision_detection.data import CocoSplit, index, load_split
from torchvision_detection.evaluation import detections_of


def load_detector(run: Path, config: Path | None, device: str) -> TrainedDetector:
    """Load a trained detector.

    Raises:
        ValueError, OSError, ImportError: as ``load_trained``; ValueError for a segmentor.
    """
    trained = load_trained(run, config, device)
    if not isinstance(trained, TrainedDetector):
        raise ValueError(f'{run} is a segmentor; "labels" measures its mIoU')
    return trained


def load_boxes(data: Path, limit: int | None, masks: bool) -> CocoSplit:
    """Load the split "val" of a data set in COCO's layout, or so many of its photos, evenly spread.

    Args:
        masks: whether objects have masks that are scored, if they have any.

    Raises:
        ValueError, OSError: as ``load_split``; ValueError if there is no object in these photos.
    """
    split = load_split(data, "val", every_class=False, masks=None if masks else False)
    image_ids = tuple(evenly_spread(split.image_ids, limit))
    ids = set(image_ids)
    content = dict(split.coco.dataset)
    content["images"] = [image for image in content["images"] if image["id"] in ids]
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] in ids]
    if all(each.get("iscrowd") for each in content["annotations"]):
        raise ValueError(f"{data}: there is no object to find in {len(ids)} photos of its split val")
    return split._replace(coco=index(content), image_ids=image_ids)


def finds_masks(detector: TrainedDetector) -> bool:
    """Tell by what it says of a grey photo."""
    return detector.predict(np.full((64, 64, 3), 128, np.uint8), 1.0).masks is not None


def weights_digest(model: nn.Module) -> str:
    """Return a digest (16 hex digits) of a model's weights."""
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def files_of_run(run: Path, config: Path | None) -> list[Path]:
    """List the files that settings of a detector besides its weights are in."""
    folder = run if run.is_dir() else run.parent
    listed = [run] if run.is_file() else [folder / TORCHVISION]
    return [path for path in (*listed, folder / DETECTRON2, config) if path is not None and path.is_file()]


def category_ids_of(detector: TrainedDetector, split: CocoSplit) -> tuple[int, ...]:
    """Return the category of each of the detector's classes. Of a run that noted none, which are counted from 1, the
    data's are taken in order.

    Raises:
        ValueError: if they are others than the data's.
    """
    found, expected = tuple(detector.category_ids), tuple(split.category_ids)
    if sorted(found) == sorted(expected):
        return found
    if found == tuple(range(1, len(expected) + 1)):
        return expected
    raise ValueError(
        f"the detector finds {len(found)} categories and the data have {len(expected)}; of their ids only one side has "
        f"{sorted({*found} ^ {*expected})[:5]}"
    )


def entries_of(found: Detections, image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """Convert the detections of a photo to COCO's result entries."""
    arrays = {"boxes": found.boxes, "scores": found.scores, "labels": found.labels + 1}
    if found.masks is not None:
        arrays["masks"] = found.masks[:, None]
    return detections_of({name: torch.from_numpy(array) for name, array in arrays.items()}, image_id, category_ids)
