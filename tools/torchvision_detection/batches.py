"""Batches of a data set in COCO's layout for torchvision. Order and augmentation depend on the seed alone."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchvision_detection.data import CocoSplit, read_image, read_objects


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Convert (H, W, 3) uint8 to (3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255


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
        pixels, (masks, labels) = read_image(self.split, image_id), read_objects(self.split, image_id)
        factor = rng.uniform(*self.scales) * self.size / max(pixels.shape[:2])
        left, top, mirror = rng.random(), rng.random(), self.flip and rng.random() < 0.5
        pixels = self._crop(_resize(pixels, factor, cv2.INTER_LINEAR), left, top, mirror)
        masks = [self._crop(_resize(mask, factor, cv2.INTER_NEAREST_EXACT), left, top, mirror) for mask in masks]
        return to_tensor(pixels), make_target(masks, labels, pixels.shape[:2])

    def _crop(self, pixels: np.ndarray, left: float, top: float, mirror: bool) -> np.ndarray:
        """Crop to at most size x size pixels, at a place given as fractions of the room there is."""
        y, x = (int(part * (max(0, n - self.size) + 1)) for part, n in zip((top, left), pixels.shape, strict=False))
        part = pixels[y : y + self.size, x : x + self.size]
        return part[:, ::-1] if mirror else part


def _resize(pixels: np.ndarray, factor: float, interpolation: int) -> np.ndarray:
    height, width = (max(1, round(n * factor)) for n in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=interpolation)


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
    cv2.setNumThreads(1)  # there already is a process per core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends its workers itself
