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

BACKGROUND = "background"
DETAIL_STRIDE = 8  # pixels of the photograph per cell of its detail map
MAX_OVERLAP = 0.25  # share of a new object that may hide older ones; well below 1, so that no object gets a hole
CROP_CANDIDATES = 6
PLACEMENT_TRIALS = 12


@dataclass(frozen=True)
class Photo:
    """A photograph and how much is going on in each part of it.

    pixels: (H, W, 3) uint8 RGB.
    detail: about (H / 8, W / 8) float32 >= 0, the mean absolute Laplacian of the grey image in grey levels.
    """

    pixels: np.ndarray
    detail: np.ndarray

    @staticmethod
    def from_pixels(pixels: np.ndarray) -> Photo:
        grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        edges = np.abs(cv2.Laplacian(grey, cv2.CV_32F))
        height, width = (max(1, side // DETAIL_STRIDE) for side in grey.shape)
        return Photo(pixels, cv2.resize(edges, (width, height), interpolation=cv2.INTER_AREA))


@dataclass(frozen=True)
class Cutout:
    """An object with its own outline.

    pixels: (h, w, 3) uint8 RGB, as large as the object.
    outline: (N, 2) float32 points (x, y) of a closed curve; the pixels' left and top edges are -1, right and bottom 1.
    """

    pixels: np.ndarray
    outline: np.ndarray


@dataclass(frozen=True)
class Material:
    """What the objects of one class are made of.

    photo: cut along random outlines, where the class has no objects of its own.
    cutouts: the objects of a class that has some; its photo is then not used.
    """

    name: str
    photo: Photo
    cutouts: tuple[Cutout, ...] = ()


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
    """One scene whose two sides are 0.85 to 1.15 times `size`, with 3 to 7 objects of 0.15 to 0.5 times `size`."""
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
    """(height, width, 3) uint8: one photograph, or in half of the scenes a second one below a soft horizon."""
    top = make_backdrop(backdrops, height, width, rng)
    if rng.random() < 0.5:
        return top
    bottom = make_backdrop(backdrops, height, width, rng)
    columns = np.arange(width, dtype=np.float32)
    horizon = height * (rng.uniform(0.45, 0.7) + 0.02 * np.sin(columns * 6 / width + rng.uniform(0, 6)))
    share = np.clip(np.arange(height, dtype=np.float32)[:, None] - horizon + 0.5, 0, 1)
    return blend(top, bottom, share)


def make_backdrop(backdrops: list[Photo], height: int, width: int, rng: Generator) -> np.ndarray:
    """(height, width, 3) uint8: a flat part of a photograph, out of focus as behind a near object."""
    photo = backdrops[rng.integers(len(backdrops))]
    zoom = min(photo.pixels.shape[0] / height, photo.pixels.shape[1] / width) * rng.uniform(0.3, 0.8)
    crop = pick_crop(photo, max(8, int(height * zoom)), max(8, int(width * zoom)), rng, flattest=True)
    sigma = min(height, width) / 512 * rng.uniform(1, 6)
    blurred = cv2.GaussianBlur(resize_to(crop, height, width), (0, 0), sigma)
    return jitter(flip(blurred, rng), 0.2, 0.12, rng)


def pick_crop(photo: Photo, height: int, width: int, rng: Generator, flattest: bool) -> np.ndarray:
    """(height, width, 3): of some random crops the one with the least or the most detail, no larger than the photo."""
    rows, columns = photo.pixels.shape[:2]
    height, width = min(height, rows), min(width, columns)
    tops = rng.integers(0, rows - height + 1, CROP_CANDIDATES)
    lefts = rng.integers(0, columns - width + 1, CROP_CANDIDATES)
    detail = [mean_detail(photo, top, left, height, width) for top, left in zip(tops, lefts)]
    best = int(np.argmin(detail) if flattest else np.argmax(detail))
    return photo.pixels[tops[best] : tops[best] + height, lefts[best] : lefts[best] + width]


def mean_detail(photo: Photo, top: int, left: int, height: int, width: int) -> float:
    """Mean of the detail map over a box given in pixels."""
    row, column = (min(n // DETAIL_STRIDE, last - 1) for n, last in zip((top, left), photo.detail.shape))
    rows, columns = (1 + n // DETAIL_STRIDE for n in (height, width))
    return float(photo.detail[row : row + rows, column : column + columns].mean())


def cut_object(material: Material, side: int, rng: Generator) -> np.ndarray:
    """An object about `side` pixels large: (h, w, 4) uint8 RGBA, alpha 255 inside and soft over about one pixel."""
    if material.cutouts:
        cutout = material.cutouts[rng.integers(len(material.cutouts))]
        pixels, outline = cutout.pixels, cutout.outline
    else:
        crop_side = int(side * rng.uniform(0.6, 1.2))
        pixels, outline = pick_crop(material.photo, crop_side, crop_side, rng, flattest=False), random_outline(rng)
        pixels = pixels[: min(pixels.shape[:2]), : min(pixels.shape[:2])]
    scale = side / max(pixels.shape[:2])
    height, width = (max(2, round(n * scale)) for n in pixels.shape[:2])
    return flip(np.dstack((resize_to(pixels, height, width), fill_outline(outline, height, width))), rng)


def random_outline(rng: Generator) -> np.ndarray:
    """(N, 2) float32 points (x, y) of a closed curve in [-1, 1]^2: an ellipse, a rounded polygon or a blob."""
    kind = rng.integers(3)
    corners = int(rng.integers(4, 8)) if kind == 1 else 64
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    radius = np.ones(corners)
    if kind == 1:
        radius = rng.uniform(0.75, 1, corners)
    elif kind == 2:
        radius += sum(rng.uniform(0, 0.35 / k) * np.cos(k * angles + rng.uniform(0, 6)) for k in (2, 3, 4, 5))
    points = np.stack((np.cos(angles), rng.uniform(0.65, 1) * np.sin(angles)), axis=1) * radius[:, None]
    turn = rng.uniform(0, 2 * np.pi)
    points = points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    points = round_corners(points) if kind == 1 else points
    return (points / np.abs(points).max()).astype(np.float32)


def round_corners(points: np.ndarray, rounds: int = 3) -> np.ndarray:
    """Chaikin's corner cutting on a closed polygon (N, 2) -> (N * 2^rounds, 2)."""
    for _ in range(rounds):
        following = np.roll(points, -1, axis=0)
        points = np.stack((0.8 * points + 0.2 * following, 0.2 * points + 0.8 * following), axis=1).reshape(-1, 2)
    return points


def fill_outline(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width) uint8 alpha of a curve given in [-1, 1]^2, with an antialiased edge."""
    pixel_centres = (outline + 1) * (np.array((width, height), np.float32) / 2) - 0.5
    fixed_point = np.rint(pixel_centres * 16).astype(np.int32)
    return cv2.fillPoly(np.zeros((height, width), np.uint8), [fixed_point], 255, lineType=cv2.LINE_AA, shift=4)


def find_place(instances: np.ndarray, alpha: np.ndarray, rng: Generator) -> tuple[int, int] | None:
    """(top, left) in pixels where at least two thirds of the object are inside and hide little, or None."""
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
    """Draw an RGBA patch into `image` and, where alpha > 0.5, its number into `instances`; both change in place."""
    target, source = overlap_slices(instances.shape, patch.shape, *place)
    patch = patch[source]
    image[target] = blend(image[target], patch[..., :3], patch[..., 3].astype(np.float32) / 255)
    instances[target][patch[..., 3] > 127] = instance


Slices = tuple[slice, slice]


def overlap_slices(shape: tuple[int, ...], patch_shape: tuple[int, ...], top: int, left: int) -> tuple[Slices, Slices]:
    """Where a patch at (top, left) lies inside an image, and which part of the patch that is.

    On an image 10 wide, a patch 4 wide at left = -1 covers columns 0:3 and shows its columns 1:4.
    """
    target, source = [], []
    for start, length, limit in zip((top, left), patch_shape, shape):
        first, last = max(0, start), min(limit, start + length)
        target.append(slice(first, last))
        source.append(slice(first - start, last - start))
    return tuple(target), tuple(source)


def blend(below: np.ndarray, above: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Mix two (H, W, 3) uint8 images; share (H, W) float32 in [0, 1] is the part of `above`."""
    mixed = below + (above.astype(np.float32) - below) * share[..., None]
    return np.rint(mixed).astype(np.uint8)


def jitter(image: np.ndarray, brightness: float, tint: float, rng: Generator) -> np.ndarray:
    """Scale all colours by up to 1 +- brightness and each channel by up to 1 +- tint more; alpha stays."""
    gains = rng.uniform(1 - tint, 1 + tint, 3) * rng.uniform(1 - brightness, 1 + brightness)
    result = image.copy()
    result[..., :3] = np.rint(np.minimum(image[..., :3] * gains.astype(np.float32), 255))
    return result


def flip(image: np.ndarray, rng: Generator) -> np.ndarray:
    """The image or, in half of the cases, its mirror image."""
    return image[:, ::-1] if rng.random() < 0.5 else image


def resize_to(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (h, w, C) uint8 to (height, width, C): area averages when shrinking, bilinear when growing."""
    shrinks = height < image.shape[0] or width < image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
