"""Photos of a detection data set in COCO's layout at any size, and what is to be found in them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from apt_dense.hosts import coco

from demo.image_edits import resize_to
from shared.photo_files import evenly_spread
from torchvision_detection.data import CocoSplit, load_split, read_boxes, read_image


class DetectionSet(NamedTuple):
    """A split and its photos (H, W, 3) uint8, in the order of its images."""

    split: CocoSplit
    photos: Sequence[np.ndarray]

    def image(self, number: int, size: int, mirrored: bool = False) -> Tensor:
        """A photo whose longer side is ``size``: (3, h, w) float32 RGB in [0, 1]."""
        height, width = self.photos[number].shape[:2]
        scale = size / max(height, width)
        photo = resize_to(self.photos[number], *(max(1, round(n * scale)) for n in (height, width)))
        image = torch.from_numpy(np.ascontiguousarray(photo)).permute(2, 0, 1).float() / 255
        return image.flip(-1) if mirrored else image

    def target(self, number: int, size: int, mirrored: bool = False) -> dict[str, Tensor]:
        """Its boxes (n, 4) as x1, y1, x2, y2 in pixels of that photo, and labels (n,) from 1."""
        height, width = self.photos[number].shape[:2]
        found, labels = read_boxes(self.split, self.split.image_ids[number])
        boxes = torch.from_numpy(found) * (size / max(height, width))
        if mirrored:
            right = width * size / max(height, width)
            boxes = torch.stack([right - boxes[:, 2], boxes[:, 1], right - boxes[:, 0], boxes[:, 3]], dim=1)
        large = (boxes[:, 2:] > boxes[:, :2]).all(1)  # upstream refuses boxes without area
        return {"boxes": boxes[large], "labels": torch.tensor(labels, dtype=torch.long)[large]}

    def images(self, size: int, mirrored: bool = False) -> Iterator[Tensor]:
        """All photos, one after the other, with a bar."""
        for number in tqdm(range(len(self.photos)), "photos", leave=False):
            yield self.image(number, size, mirrored)


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


def files_of(data: Path, split: str) -> list[Path]:
    """The files that a split consists of. Raises as :func:`load_photos`."""
    found = coco.load_split(data, split, masks=False, every_class=False)
    return [found.path, *(found.folder / image["file_name"] for image in found.content["images"])]


def to_device(target: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a target."""
    return {name: value.to(device) for name, value in target.items()}
