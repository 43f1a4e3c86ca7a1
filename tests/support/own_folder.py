"""A segmentation data set as people have them: CamVid's streets in miniature, with masks of any kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (96, 128)  # height, width
#: Values in masks, colours in pictures and in coloured masks.
CLASSES = {"sky": (128, 128, 128), "road": (128, 64, 128), "car": (64, 0, 128), "void": (0, 0, 0)}
PAINT = np.array([(120, 170, 240), (70, 70, 75), (220, 40, 40), (230, 220, 40)], np.uint8)

VALUES = "0 sky\n1 road\n2 car\n3 void\n"
COLOURS = "# as CamVid's label_colors.txt\n" + "".join(f"{r} {g} {b}\t{n}\n" for n, (r, g, b) in CLASSES.items())


def labels_of(number: int) -> np.ndarray:
    """Sky above a road with a car, and a bar that nobody labelled; (H, W) uint8, 0 to 3."""
    rng = np.random.default_rng(number)
    labels = np.zeros(SIZE, np.uint8)
    horizon = int(rng.integers(30, 50))
    labels[horizon:] = 1
    x = int(rng.integers(5, 80))
    labels[horizon + 5 : horizon + 35, x : x + 40] = 2
    labels[-6:] = 3
    return labels


def picture_of(labels: np.ndarray, number: int) -> np.ndarray:
    """Paint each label in its colour, with some noise; (H, W, 3) uint8."""
    noise = np.random.default_rng(100 + number).normal(0, 6, (*labels.shape, 3))
    return np.clip(PAINT[labels] + noise, 0, 255).astype(np.uint8)


def mask_image(labels: np.ndarray, kind: str) -> Image.Image:
    """A mask as "values", "colours", "palette" (as VOC's) or "binary" (255 for cars, 128 for void, else 0)."""
    if kind == "values":
        return Image.fromarray(labels)
    if kind == "binary":
        return Image.fromarray(np.array([0, 0, 255, 128], np.uint8)[labels])
    colours = np.array(list(CLASSES.values()), np.uint8)
    if kind == "colours":
        return Image.fromarray(colours[labels])
    image = Image.fromarray(labels, "P")
    image.putpalette(colours.ravel().tolist())
    return image


def write_own(
    root: Path,
    kind: str = "values",
    count: int = 3,
    folders: tuple[str, str] = ("images/{}", "masks/{}"),
    splits: tuple[str, ...] = ("train", "val"),
    classes: str | None = VALUES,
    ending: str = "",
) -> Path:
    """Write ``count`` pictures (JPEG) and masks (PNG, their names with an ending) a split, and classes.txt."""
    for part, split in enumerate(splits):
        images, masks = (root / folder.format(split) for folder in folders)
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            labels = labels_of(number + 50 * part)
            Image.fromarray(picture_of(labels, number)).save(images / f"street_{number}.jpg", quality=95)
            mask_image(labels, kind).save(masks / f"street_{number}{ending}.png")
    if classes is not None:
        (root / "classes.txt").write_text(classes)
    return root
