"""Batches of a data set in COCO's layout for torchvision. Order and augmentation depend on the seed alone."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from apt_dense.hosts.interrupts import outlive_sigterm
from apt_dense.hosts.torchvision.load_trained_detector import to_tensor

from torchvision_detection.data import CocoSplit, read_boxes, read_image, read_objects


def make_target(masks: Sequence[np.ndarray], labels: Sequence[int], size: tuple[int, int]) -> dict[str, Tensor]:
    """Make torchvision's target. Objects of which no pixel is left are dropped; an image may have no objects."""
    pairs = [(mask, label) for mask, label in zip(masks, labels, strict=True) if mask.any()]
    stacked = np.stack([mask for mask, _ in pairs]) if pairs else np.zeros((0, *size), np.uint8)
    return {
        "boxes": torch.tensor([mask_box(mask) for mask in stacked], dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor([label for _, label in pairs], dtype=torch.int64),
        "masks": torch.from_numpy(stacked),
    }


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return x1, y1, x2, y2 along the outer edges of a mask's pixels: pixel (0, 0) alone gives 0, 0, 1, 1."""
    left, top, width, height = cv2.boundingRect(mask)
    return left, top, left + width, top + height


class Crop(NamedTuple):
    """A resized picture's part that is trained on: width and height in pixels before cropping, the part's place and
    size, and whether it is mirrored afterwards."""

    resized: tuple[int, int]
    left: int
    top: int
    width: int
    height: int
    mirror: bool

    def of_pixels(self, pixels: np.ndarray, interpolation: int) -> np.ndarray:
        """Resize and crop a picture or mask (H, W, ...)."""
        resized = cv2.resize(pixels, self.resized, interpolation=interpolation)
        part = resized[self.top : self.top + self.height, self.left : self.left + self.width]
        return part[:, ::-1] if self.mirror else part

    def of_boxes(self, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Resize boxes (n, 4) of a picture of that height and width, and clip them to this part of it."""
        factors = np.divide(self.resized, size[::-1])
        corners = boxes.reshape(-1, 2, 2) * factors - (self.left, self.top)
        corners = np.clip(corners, 0, (self.width, self.height))
        if self.mirror:
            corners[..., 0] = self.width - corners[:, ::-1, 0]
        return corners.reshape(-1, 4).astype(np.float32)


def make_box_target(boxes: np.ndarray, labels: Sequence[int]) -> dict[str, Tensor]:
    """Make torchvision's target of boxes (n, 4). Those of less than a pixel's width or height are dropped."""
    visible = (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) >= 1
    return {
        "boxes": torch.from_numpy(boxes[visible]),
        "labels": torch.tensor(labels, dtype=torch.int64)[torch.from_numpy(visible)],
    }


class TrainingImages(Dataset):
    """Augmented images and targets by (image number, draw number): the same pair gives the same pixels in any process.

    Args:
        size: the longer side in pixels at scale 1, and the most that either side is cropped to.
        scales: lowest and highest factor of large-scale jitter; the crop's place is drawn, too.
        flip: mirror every other draw.
    """

    def __init__(
        self, split: CocoSplit, size: int, scales: tuple[float, float] = (1.0, 1.0), flip: bool = True, seed: int = 0
    ) -> None:
        if not 0 < scales[0] <= scales[1]:
            raise ValueError(f"scale jitter {scales} must be a lowest and a highest factor above 0")
        self.split, self.size, self.scales, self.flip, self.seed = split, size, scales, flip, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]]:
        number, draw = key
        image_id, rng = self.split.image_ids[number], np.random.default_rng((self.seed, 1, draw))
        pixels = read_image(self.split, image_id)
        crop = self._draw_crop(pixels.shape[:2], rng)
        image = to_tensor(crop.of_pixels(pixels, cv2.INTER_LINEAR))
        if not self.split.masks:
            boxes, labels = read_boxes(self.split, image_id)
            return image, make_box_target(crop.of_boxes(boxes, pixels.shape[:2]), labels)
        masks, labels = read_objects(self.split, image_id)
        masks = [crop.of_pixels(mask, cv2.INTER_NEAREST_EXACT) for mask in masks]
        return image, make_target(masks, labels, (crop.height, crop.width))

    def _draw_crop(self, size: tuple[int, int], rng: np.random.Generator) -> Crop:
        """Draw a scale, a part of at most ``self.size`` pixels a side, and whether to mirror it."""
        factor = rng.uniform(*self.scales) * self.size / max(size)
        height, width = (max(1, round(side * factor)) for side in size)
        left, top = (int(rng.random() * (max(0, side - self.size) + 1)) for side in (width, height))
        mirror = self.flip and rng.random() < 0.5
        return Crop((width, height), left, top, min(width, self.size), min(height, self.size), mirror)


class TrainingOrder:
    """Batches of (image number, draw number) for the iterations from ``start`` on: a batch sampler without state.

    Draw d is place d % n of epoch d // n's permutation of the n images, so a run that is resumed at iteration i sees
    what the uninterrupted run would have seen.
    """

    def __init__(self, images: int, batch_size: int, start: int, end: int, seed: int) -> None:
        self.images, self.batch_size, self.start, self.end, self.seed = images, batch_size, start, end, seed

    def __len__(self) -> int:
        return max(0, self.end - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for iteration in range(self.start, self.end):
            draws = range(iteration * self.batch_size, (iteration + 1) * self.batch_size)
            yield [(_place(self.seed, self.images, draw), draw) for draw in draws]


def _place(seed: int, images: int, draw: int) -> int:
    epoch, place = divmod(draw, images)
    return int(_permutation(seed, images, epoch)[place])


@lru_cache(maxsize=2)
def _permutation(seed: int, images: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(images)


class EvaluationImages(Dataset):
    """Image tensors (3, H, W) in [0, 1] in their original size, and their ids."""

    def __init__(self, split: CocoSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split.image_ids)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        image_id = self.split.image_ids[number]
        return to_tensor(read_image(self.split, image_id)), image_id


def make_loader(dataset: Dataset, workers: int, order: TrainingOrder | None = None) -> DataLoader:
    """Load batches as lists (images, targets) in this order; without one, image after image."""
    batches = [[i] for i in range(len(dataset))] if order is None else order
    if workers:
        # Ends OpenCV's threads: a forked worker inherits their pool without them, and would wait for them forever.
        cv2.setNumThreads(1)
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=_as_lists, worker_init_fn=_start_worker
    )


def _as_lists(samples: Sequence[tuple]) -> tuple[list, ...]:
    return tuple(map(list, zip(*samples, strict=True)))


def _start_worker(_: int) -> None:
    outlive_sigterm()
    cv2.setNumThreads(1)  # there already is a process per core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers itself
