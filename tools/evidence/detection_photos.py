"""Photos of a detection data set in COCO's layout at any size, and the boxes in them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from apt_dense.hosts import coco
from apt_dense.hosts.torchvision.load_trained_detector import to_tensor

from demo.image_edits import resize_to
from shared.photo_files import evenly_spread
from torchvision_detection.batches import Crop, make_box_target
from torchvision_detection.data import CocoSplit, load_split, read_boxes, read_image


class SizedPhotos(NamedTuple):
    """Photos of a split at the size that a model sees.

    Args:
        photos: (h, w, 3) uint8 RGB.
        full_sizes: (H, W) of their files.
    """

    split: CocoSplit
    photos: Sequence[np.ndarray]
    full_sizes: Sequence[tuple[int, int]]

    def image(self, number: int, mirrored: bool = False) -> Tensor:
        """A photo (3, h, w) float32 in [0, 1]."""
        photo = self.photos[number]
        return to_tensor(photo[:, ::-1] if mirrored else photo)

    def target(self, number: int, mirrored: bool = False) -> dict[str, Tensor]:
        """Its boxes (n, 4) as x1, y1, x2, y2 in pixels of :meth:`image`, and labels (n,) from 1."""
        boxes, labels = read_boxes(self.split, self.split.image_ids[number])
        height, width = self.photos[number].shape[:2]
        whole = Crop((width, height), 0, 0, width, height, mirrored)
        return make_box_target(whole.of_boxes(boxes, self.full_sizes[number]), labels)


class DetectionSet(NamedTuple):
    """A split and its photos (H, W, 3) uint8 RGB, in the order of its images."""

    split: CocoSplit
    photos: Sequence[np.ndarray]

    def at(self, size: int) -> SizedPhotos:
        """All photos with ``size`` pixels along their longer side."""
        full_sizes = [photo.shape[:2] for photo in self.photos]
        return SizedPhotos(self.split, [_resized(photo, size) for photo in self.photos], full_sizes)


def _resized(photo: np.ndarray, size: int) -> np.ndarray:
    scale = size / max(photo.shape[:2])
    return resize_to(photo, *(max(1, round(side * scale)) for side in photo.shape[:2]))


def load_photos(data: Path, split: str, limit: int | None = None) -> DetectionSet:
    """Read "train" or "val".

    Args:
        limit: photos at most, evenly spread.

    Raises:
        ValueError, OSError: as ``load_split`` and ``read_image``.
    """
    found = load_split(data, split, every_class=False, masks=False)
    found = found._replace(image_ids=tuple(evenly_spread(found.image_ids, limit)))
    return DetectionSet(found, [read_image(found, number) for number in tqdm(found.image_ids, "reading", leave=False)])


def files_of(data: Path, split: str, limit: int | None = None) -> Iterator[Path]:
    """The files that :func:`load_photos` reads; raises as it does."""
    found = coco.load_split(data, split, masks=False, every_class=False)
    yield found.path
    yield from (found.folder / image["file_name"] for image in evenly_spread(found.content["images"], limit))
