"""Pictures and objects of a data set in COCO's layout, which ``apt_dense.hosts.coco`` finds and checks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from pycocotools.coco import COCO

from apt_dense.hosts import coco
from apt_dense.hosts.readable_images import REMEDY, DataError, is_cut_off


class CocoSplit(NamedTuple):
    """One split of a data set."""

    coco: COCO  # the annotations that can be used
    folder: Path  # of the images
    image_ids: tuple[int, ...]
    category_ids: tuple[int, ...]  # ascending; label i + 1 of the model is category_ids[i], label 0 the background
    names: tuple[str, ...]  # of these categories
    masks: bool = True  # whether objects have masks that are learned and scored

    @property
    def num_classes(self) -> int:
        """Labels including the background."""
        return len(self.category_ids) + 1

    @property
    def categories(self) -> list[tuple[int, str]]:
        """Ids and names."""
        return list(zip(self.category_ids, self.names, strict=True))


def load_split(root: str | Path, split: str, every_class: bool = True, masks: bool | None = True) -> CocoSplit:
    """Read the annotations of "train" or "val". Raises as ``apt_dense.hosts.coco.load_split``.

    Args:
        every_class: whether each class needs an object.
        masks: whether each object needs a mask; False uses boxes alone, and None masks if any object has one.
    """
    data = coco.load_split(root, split, masks, every_class=every_class)
    ids = tuple(image["id"] for image in data.content["images"])
    category_ids, names = zip(*data.categories, strict=True)
    return CocoSplit(index(data.content), data.folder, ids, category_ids, names, data.has_masks)


def index(content: dict) -> COCO:
    """Build pycocotools' index of an annotation file's content."""
    indexed = COCO()
    indexed.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        indexed.createIndex()
    return indexed


def read_image(split: CocoSplit, image_id: int) -> np.ndarray:
    """Read (H, W, 3) uint8 RGB of the size that the annotations give.

    Raises:
        DataError: if the file is damaged, cut off or of another size.
    """
    entry = split.coco.imgs[image_id]
    path, size = split.folder / entry["file_name"], (entry["height"], entry["width"])
    data = path.read_bytes()
    if is_cut_off(data):
        raise DataError(f"{path} is a JPEG file that is cut off; {REMEDY}")
    for orientation in (0, cv2.IMREAD_IGNORE_ORIENTATION):  # some sets are annotated as stored, others as shown
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | orientation) if data else None
        if pixels is None:
            raise DataError(f"{path} is not a readable image; {REMEDY}")
        if pixels.shape[:2] == size:
            return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    raise DataError(f"{path} has height and width {pixels.shape[:2]}, but its annotation file says {size}")


def read_objects(split: CocoSplit, image_id: int) -> tuple[list[np.ndarray], list[int]]:
    """Read masks, (H, W) uint8 of 0 and 1 each, and labels from 1, of all objects except crowds."""
    found = _objects(split, image_id)
    return [split.coco.annToMask(annotation) for annotation in found], _labels(split, found)


def read_boxes(split: CocoSplit, image_id: int) -> tuple[np.ndarray, list[int]]:
    """Read boxes, (n, 4) float32 as x1, y1, x2, y2 in pixels, and labels from 1, of all objects except crowds."""
    found = _objects(split, image_id)
    boxes = np.array([annotation["bbox"] for annotation in found], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # COCO's are x, y, width, height
    return boxes, _labels(split, found)


def _objects(split: CocoSplit, image_id: int) -> list[dict[str, Any]]:
    return [annotation for annotation in split.coco.imgToAnns.get(image_id, ()) if not annotation["iscrowd"]]


def _labels(split: CocoSplit, annotations: Sequence[Mapping[str, Any]]) -> list[int]:
    return [split.category_ids.index(annotation["category_id"]) + 1 for annotation in annotations]
