"""Compose scenes with exact masks out of pieces of real photographs.

A scene is a defocused or plain crop of one or two photographs with pieces of others pasted on it. Every pixel's class
and instance follow from one map, so that the semantic mask and the instance masks cannot disagree.

All images are HWC uint8 RGB in [0, 255]; all random choices come from the generator that is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator

from demo.image_edits import blend, flip, jitter, resize_to
from demo.object_cutouts import Material, Photo, cut_object, pick_crop

BACKGROUND = "background"
MAX_OVERLAP = 0.25  # share of a new object that may hide older ones; well below 1, so that no object gets a hole
PLACEMENT_TRIALS = 12


@dataclass(frozen=True)
class Scene:
    """A picture and its truth.

    image: (H, W, 3) uint8 RGB.
    instances: (H, W) int32; 0 = background, i = the i-th pasted object where it is not hidden by a later one.
    categories: category of object i at place i - 1; category c >= 1 is the c-th material.
    """

    image: np.ndarray
    instances: np.ndarray
    categories: tuple[int, ...]

    @property
    def labels(self) -> np.ndarray:
        """(H, W) uint8 in ADE20K's convention: 0 = ignored (never here), 1 = background, c + 1 = category c."""
        return np.array((1, *(category + 1 for category in self.categories)), np.uint8)[self.instances]


def compose_scene(materials: list[Material], backdrops: list[Photo], size: int, rng: Generator) -> Scene:
    """Compose a scene of 0.85 to 1.15 times ``size`` per side, with 3 to 7 objects of 0.15 to 0.5 times ``size``."""
    height, width = (int(side) for side in np.rint(size * rng.uniform(0.85, 1.15, 2)))
    image = make_background(backdrops, height, width, rng)
    instances = np.zeros((height, width), np.int32)
    categories: list[int] = []
    for _ in range(rng.integers(3, 8)):
        category = int(rng.integers(len(materials))) + 1
        side = int(size * rng.uniform(0.15, 0.5))
        patch = jitter(cut_object(materials[category - 1], side, rng), 0.15, 0.05, rng)
        place = find_place(instances, patch[..., 3], rng)
        if place is not None:
            categories.append(category)
            paste(image, instances, patch, place, len(categories))
    return Scene(image, instances, tuple(categories))


def make_background(backdrops: list[Photo], height: int, width: int, rng: Generator) -> np.ndarray:
    """Make (height, width, 3) uint8 of one photograph or, in half of the scenes, of two with a soft horizon."""
    top = make_backdrop(backdrops, height, width, rng)
    if rng.random() < 0.5:
        return top
    bottom = make_backdrop(backdrops, height, width, rng)
    columns = np.arange(width, dtype=np.float32)
    horizon = height * (rng.uniform(0.45, 0.7) + 0.02 * np.sin(columns * 6 / width + rng.uniform(0, 6)))
    share = np.clip(np.arange(height, dtype=np.float32)[:, None] - horizon + 0.5, 0, 1)
    return blend(top, bottom, share)


def make_backdrop(backdrops: list[Photo], height: int, width: int, rng: Generator) -> np.ndarray:
    """Take a flat part of a photograph, out of focus as behind a near object: (height, width, 3) uint8."""
    photo = backdrops[rng.integers(len(backdrops))]
    zoom = min(photo.pixels.shape[0] / height, photo.pixels.shape[1] / width) * rng.uniform(0.3, 0.8)
    crop = pick_crop(photo, max(8, int(height * zoom)), max(8, int(width * zoom)), rng, flattest=True)
    sigma = min(height, width) / 512 * rng.uniform(1, 6)
    blurred = cv2.GaussianBlur(resize_to(crop, height, width), (0, 0), sigma)
    return jitter(flip(blurred, rng), 0.2, 0.12, rng)


def find_place(instances: np.ndarray, alpha: np.ndarray, rng: Generator) -> tuple[int, int] | None:
    """Find (top, left) in pixels where at least two thirds of the object are inside and hide little, or None."""
    solid = alpha > 127
    (height, width), (rows, columns) = instances.shape, alpha.shape
    for _ in range(PLACEMENT_TRIALS):
        top = int(rng.integers(-rows // 6, max(1, height - rows + rows // 6)))
        left = int(rng.integers(-columns // 6, max(1, width - columns + columns // 6)))
        target, source = overlap_slices(instances.shape, alpha.shape, top, left)
        if np.count_nonzero(instances[target][solid[source]]) <= MAX_OVERLAP * np.count_nonzero(solid):
            return top, left
    return None


def paste(image: np.ndarray, instances: np.ndarray, patch: np.ndarray, place: tuple[int, int], instance: int) -> None:
    """Draw an RGBA patch into ``image`` and, where alpha > 0.5, its number into `instances`; both change in place."""
    target, source = overlap_slices(instances.shape, patch.shape, *place)
    patch = patch[source]
    image[target] = blend(image[target], patch[..., :3], patch[..., 3].astype(np.float32) / 255)
    instances[target][patch[..., 3] > 127] = instance


Slices = tuple[slice, slice]


def overlap_slices(shape: tuple[int, ...], patch_shape: tuple[int, ...], top: int, left: int) -> tuple[Slices, Slices]:
    """Return where a patch at (top, left) lies inside an image, and which part of the patch that is.

    On an image 10 wide, a patch 4 wide at left = -1 covers columns 0:3 and shows its columns 1:4.
    """
    target, source = [], []
    for start, length, limit in zip((top, left), patch_shape, shape[:2], strict=False):
        first, last = max(0, start), min(limit, start + length)
        target.append(slice(first, last))
        source.append(slice(first - start, last - start))
    return tuple(target), tuple(source)
