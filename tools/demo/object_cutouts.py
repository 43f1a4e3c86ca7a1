"""Photographs and the objects cut out of them.

All images are HWC uint8 RGB in [0, 255]; all random choices come from the generator that is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator

from demo.image_edits import flip, resize_to

DETAIL_STRIDE = 8  # pixels of the photograph per cell of its detail map
CROP_CANDIDATES = 6


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
    """The source of the objects of one class.

    photo: cut along random outlines, where the class has no cutouts.
    cutouts: the objects of a class that has some; its photo is then not used.
    """

    name: str
    photo: Photo
    cutouts: tuple[Cutout, ...] = ()


def pick_crop(photo: Photo, height: int, width: int, rng: Generator, flattest: bool) -> np.ndarray:
    """Take, of some random crops, the one with the least or the most detail: (height, width, 3), or less."""
    rows, columns = photo.pixels.shape[:2]
    height, width = min(height, rows), min(width, columns)
    tops = rng.integers(0, rows - height + 1, CROP_CANDIDATES)
    lefts = rng.integers(0, columns - width + 1, CROP_CANDIDATES)
    detail = [mean_detail(photo, top, left, height, width) for top, left in zip(tops, lefts, strict=True)]
    best = int(np.argmin(detail) if flattest else np.argmax(detail))
    return photo.pixels[tops[best] : tops[best] + height, lefts[best] : lefts[best] + width]


def mean_detail(photo: Photo, top: int, left: int, height: int, width: int) -> float:
    """Average the detail map over a box given in pixels."""
    row, column = (min(n // DETAIL_STRIDE, last - 1) for n, last in zip((top, left), photo.detail.shape, strict=True))
    rows, columns = (1 + n // DETAIL_STRIDE for n in (height, width))
    return float(photo.detail[row : row + rows, column : column + columns].mean())


def cut_object(material: Material, side: int, rng: Generator) -> np.ndarray:
    """Cut an object about ``side`` pixels large: (h, w, 4) uint8 RGBA, alpha 255 inside, its edge a pixel soft."""
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
    """Draw an ellipse, a rounded polygon or a blob: (N, 2) float32 points (x, y) of a closed curve in [-1, 1]^2."""
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
    """Cut the corners of a closed polygon (N, 2) as Chaikin does -> (N * 2^rounds, 2)."""
    for _ in range(rounds):
        following = np.roll(points, -1, axis=0)
        points = np.stack((0.8 * points + 0.2 * following, 0.2 * points + 0.8 * following), axis=1).reshape(-1, 2)
    return points


def fill_outline(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill a curve given in [-1, 1]^2 with an antialiased edge: (height, width) uint8 alpha."""
    pixel_centres = (outline + 1) * (np.array((width, height), np.float32) / 2) - 0.5
    fixed_point = np.rint(pixel_centres * 16).astype(np.int32)
    return cv2.fillPoly(np.zeros((height, width), np.uint8), [fixed_point], 255, lineType=cv2.LINE_AA, shift=4)
