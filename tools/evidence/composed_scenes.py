"""Large scenes with exact masks: cut-outs pasted on photographs, none of which is in both training and validation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image
from tqdm import tqdm

from demo.image_edits import flip, jitter, resize_to
from demo.scenes import Scene, find_place, paste
from shared.photo_files import find_photos, read_photo

HELD_OUT = 4  # every fourth photograph and cut-out is for validation
OBJECTS = 4, 13  # in a scene, the latter excluded
SIDES = 0.04, 0.3  # of objects, shares of the scene's


@dataclass(frozen=True)
class Sources:
    """What the scenes of one split are made of.

    backdrops: photographs (H, W, 3) uint8 RGB.
    cutouts: objects (h, w, 4) uint8 RGBA of each class.
    """

    backdrops: Sequence[np.ndarray]
    cutouts: Mapping[str, Sequence[np.ndarray]]


def load_sources(photos: Sequence[Path], cutouts: Sequence[Path], size: int) -> tuple[Sources, Sources]:
    """Load the sources of training and of validation.

    Args:
        photos: photographs and folders of them; those smaller than a scene are enlarged.
        cutouts: a folder for each class, which it gives its name; pictures with transparency in it or below.
        size: pixels of a scene's side; larger photographs are shrunk to twice that, so that they look sharp.

    Raises:
        ValueError, OSError: for a folder with fewer than two pictures, two of one name, or a damaged file.
    """
    files = find_photos(photos)
    if len(files) < 2:
        raise ValueError(f"{len(files)} photograph: expected 2 or more, one to train on and one to test on")
    backdrops = [_shrunk(read_photo(path), 2 * size) for path in tqdm(files, "photographs", leave=False)]
    classes = {folder.name: _load_cutouts(folder) for folder in cutouts}
    if len(classes) < len(cutouts):
        raise ValueError(f"folders of cut-outs have one name: {', '.join(map(str, cutouts))}; each is a class")
    return tuple(
        Sources(_part(backdrops, held_out), {name: _part(found, held_out) for name, found in classes.items()})
        for held_out in (False, True)
    )


def _part(items: Sequence[np.ndarray], held_out: bool) -> Sequence[np.ndarray]:
    return [item for number, item in enumerate(items) if (number % HELD_OUT == 1) == held_out]


def _load_cutouts(folder: Path) -> list[np.ndarray]:
    found = [_cropped(path) for path in sorted(folder.rglob("*.png"))]
    objects = [pixels for pixels in found if pixels is not None]
    if len(objects) < 2:
        raise ValueError(
            f"{folder}: {len(objects)} of {len(found)} PNG files have transparent parts; expected 2 or more"
        )
    return objects


def _cropped(path: Path) -> np.ndarray | None:
    """The solid part of a picture; None if all of it is solid or nothing."""
    try:
        pixels = np.array(Image.open(path).convert("RGBA"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it or save it again") from None
    solid = pixels[..., 3] > 127
    if solid.all() or not solid.any():
        return None
    left, top, width, height = cv2.boundingRect(solid.astype(np.uint8))
    return pixels[top : top + height, left : left + width]


def _shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    scale = side / min(pixels.shape[:2])
    return pixels if scale >= 1 else resize_to(pixels, *(max(side, round(n * scale)) for n in pixels.shape[:2]))


def composed(sources: Sources, size: int, seeds: Sequence[tuple[int, ...]]) -> Iterator[Scene]:
    """Yield a scene for each seed."""
    for seed in seeds:
        yield compose(sources, size, np.random.default_rng(seed))


def compose(sources: Sources, size: int, rng: Generator) -> Scene:
    """Paste 4 to 12 objects of 4 to 30 % of the scene's side on a part of a photograph; small ones are as frequent
    as large ones (their sides are drawn evenly in the logarithm)."""
    image = _backdrop(sources.backdrops[rng.integers(len(sources.backdrops))], size, rng)
    instances, categories = np.zeros((size, size), np.int32), []
    names = list(sources.cutouts)
    for _ in range(rng.integers(*OBJECTS)):
        category = int(rng.integers(len(names)))
        objects = sources.cutouts[names[category]]
        side = round(size * float(np.exp(rng.uniform(*np.log(SIDES)))))
        patch = jitter(_resized(objects[rng.integers(len(objects))], side, rng), 0.15, 0.05, rng)
        place = find_place(instances, patch[..., 3], rng)
        if place is not None:
            categories.append(category + 1)
            paste(image, instances, patch, place, len(categories))
    return Scene(image, instances, tuple(categories))


def _backdrop(photo: np.ndarray, size: int, rng: Generator) -> np.ndarray:
    """A square part of a photograph, at least half as large as it can be, at the size of the scene."""
    largest = min(photo.shape[:2])
    side = int(rng.uniform(largest / 2, largest))
    top, left = (int(rng.integers(0, n - side + 1)) for n in photo.shape[:2])
    crop = resize_to(photo[top : top + side, left : left + side], size, size)
    return np.ascontiguousarray(jitter(flip(crop, rng), 0.15, 0.05, rng))


def _resized(cutout: np.ndarray, side: int, rng: Generator) -> np.ndarray:
    """The object with its longer side so many pixels long; colours count by their alpha, so that no rim shows."""
    scale = side / max(cutout.shape[:2])
    height, width = (max(2, round(n * scale)) for n in cutout.shape[:2])
    alpha = cutout[..., 3:].astype(np.float32) / 255
    small = resize_to(np.concatenate((cutout[..., :3] * alpha, alpha), axis=2), height, width)
    colours = np.divide(small[..., :3], small[..., 3:], out=np.zeros_like(small[..., :3]), where=small[..., 3:] > 0)
    patch = np.dstack((np.minimum(colours, 255), small[..., 3:] * 255))
    return flip(np.rint(patch).astype(np.uint8), rng)
