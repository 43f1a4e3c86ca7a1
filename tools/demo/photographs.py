"""Photographs for the demo data: those inside scikit-image, or a folder of the user's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from demo.object_cutouts import Cutout, Material, Photo
from demo.scenes import BACKGROUND
from shared.photo_files import PHOTO_SUFFIXES, is_photo, read_photo

MAX_CLASSES = 12  # the first photographs of --images, by name
MIN_PHOTO_SIDE, MAX_PHOTO_SIDE = 64, 2048  # pixels; larger photographs are shrunk

# class: file, part of it (top, bottom, left, right in pixels), colour gains (R, G, B) that tint grey photographs
TEXTURES = {
    "cat": ("chelsea.png", (0, 300, 60, 380), (1.0, 1.0, 1.0)),
    "brick": ("brick.png", (0, 512, 0, 512), (1.3, 0.85, 0.75)),
    "grass": ("grass.png", (0, 512, 0, 512), (0.85, 1.1, 0.5)),
    "gravel": ("gravel.png", (0, 512, 0, 512), (1.0, 1.0, 1.0)),
    "page": ("page.png", (10, 185, 0, 384), (1.0, 1.0, 1.0)),
    "tissue": ("ihc.png", (0, 512, 0, 512), (1.0, 1.0, 1.0)),
}
OBJECTS = {"coin": ("coins.png", (1.15, 0.95, 0.6)), "retina": ("retina.jpg", (1.0, 1.0, 1.0))}  # file, colour gains
BACKDROPS = ("moon.png", "rocket.jpg", "camera.png", "cell.png", "astronaut.png", "motorcycle_left.png", "coffee.png")


def load_folder(folder: Path) -> tuple[list[Material], list[Photo]]:
    """Load the user's photographs: each is a class named by its file, and the flat parts of all are backgrounds."""
    if not folder.is_dir():
        raise ValueError(f"--images {folder} is not a folder; pass the folder that holds your photographs")
    paths = sorted(path for path in folder.iterdir() if is_photo(path))
    if not paths:
        raise ValueError(f"--images {folder} holds no photographs ({' '.join(PHOTO_SUFFIXES)}); put some there")
    title = "photographs" if len(paths) <= MAX_CLASSES else f"first {MAX_CLASSES} of {len(paths)} photographs"
    paths = paths[:MAX_CLASSES]
    stems = [BACKGROUND, *(path.stem for path in paths)]
    names = [path.stem if stems.count(path.stem) == 1 else path.name for path in paths]
    photos = [Photo.from_pixels(read_material(path)) for path in tqdm(paths, title, unit="photo")]
    return [Material(name, photo) for name, photo in zip(names, photos, strict=True)], photos


def load_shipped() -> tuple[list[Material], list[Photo]]:
    """Load photographs inside the installed scikit-image, as files, since its loaders could start a download."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ValueError("scikit-image is not installed: pip install scikit-image, or pass --images DIR")
    folder = Path(spec.origin).parent / "data"
    materials = []
    for name, (file, (top, bottom, left, right), gains) in TEXTURES.items():
        pixels = tint(read_shipped(folder, file)[top:bottom, left:right], gains)
        materials.append(Material(name, Photo.from_pixels(pixels)))
    for name, (file, gains) in OBJECTS.items():
        pixels = tint(read_shipped(folder, file), gains)
        materials.append(Material(name, Photo.from_pixels(pixels), cut_round_objects(pixels)))
    return materials, [Photo.from_pixels(read_shipped(folder, file)) for file in BACKDROPS]


def read_shipped(folder: Path, file: str) -> np.ndarray:
    if not (folder / file).is_file():
        raise ValueError(f"{folder} has no {file}: pip install --force-reinstall scikit-image, or pass --images DIR")
    return read_material(folder / file)


def read_material(path: Path) -> np.ndarray:
    """Read a photograph, shrunk to sides of at most 2048 pixels: (H, W, 3) uint8 RGB, upright."""
    pixels = read_photo(path)
    if min(pixels.shape[:2]) < MIN_PHOTO_SIDE:
        height, width = pixels.shape[:2]
        raise ValueError(
            f"{path} is {width} x {height} pixels, at least {MIN_PHOTO_SIDE} x {MIN_PHOTO_SIDE} are needed; remove it"
        )
    scale = min(1, MAX_PHOTO_SIDE / max(pixels.shape[:2]))
    return cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else pixels


def tint(pixels: np.ndarray, gains: tuple[float, float, float]) -> np.ndarray:
    return np.minimum(np.rint(pixels * np.array(gains, np.float32)), 255).astype(np.uint8)


def cut_round_objects(pixels: np.ndarray) -> tuple[Cutout, ...]:
    """Cut out bright round things on a dark ground: coins, or the disc of a fundus photograph.

    Otsu's threshold; a region counts when it fills 70 % of its enclosing circle and is at least 24 pixels wide.
    """
    grey = cv2.medianBlur(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), 5)
    _, bright = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    hulls = map(cv2.convexHull, cv2.findContours(bright, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0])
    return tuple(cut_ellipse(pixels, hull) for hull in hulls if is_round(hull))


def is_round(hull: np.ndarray) -> bool:
    _, radius = cv2.minEnclosingCircle(hull)
    return radius >= 12 and cv2.contourArea(hull) >= 0.7 * np.pi * radius**2


def cut_ellipse(pixels: np.ndarray, hull: np.ndarray) -> Cutout:
    """Cut out the ellipse that fits a convex outline best, 3 % smaller so that nothing of the ground shows."""
    centre, diameters, degrees = cv2.fitEllipse(hull)
    angles, turn = np.linspace(0, 2 * np.pi, 64, endpoint=False), np.deg2rad(degrees)
    x, y = 0.485 * diameters[0] * np.cos(angles), 0.485 * diameters[1] * np.sin(angles)
    points = np.stack((x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)), axis=1) + centre
    left, top = np.maximum(np.floor(points.min(axis=0)), 0).astype(int)
    right, bottom = np.ceil(points.max(axis=0)).astype(int) + 1
    crop = pixels[top:bottom, left:right]
    outline = (points - (left, top) + 0.5) / (crop.shape[1] / 2, crop.shape[0] / 2) - 1
    return Cutout(crop, outline.astype(np.float32))
