"""Data sets in the formats of Pascal VOC and YOLO: coloured rectangles on grey, and their XML or text files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (80, 100)  # height, width
NAMES = "raccoon", "cat"
COLOURS = {"raccoon": (220, 40, 40), "cat": (40, 220, 40)}
#: Name, and x, y, width, height in pixels from 0.
Object = tuple[str, tuple[int, int, int, int]]


def objects_of(number: int) -> list[Object]:
    """One object or two, inside of the picture."""
    rng = np.random.default_rng(number)
    found = []
    for place in range(1 + number % 2):
        x, y, w, h = (int(n) for n in rng.integers((2 + 48 * place, 2, 26, 26), (18 + 48 * place, 45, 32, 32)))
        found.append((NAMES[place], (x, y, w, h)))
    return found


def draw(path: Path, objects: Sequence[Object]) -> None:
    pixels = np.full((*SIZE, 3), 90, np.uint8)
    for name, (x, y, w, h) in objects:
        pixels[y : y + h, x : x + w] = COLOURS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def voc_object(name: str, box: Sequence[object], extra: str = "") -> str:
    """An <object>; ``box`` is xmin, ymin, xmax, ymax as the file has them."""
    named = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in named)
    return f"<object><name>{name}</name>{extra}<bndbox>{sides}</bndbox></object>"


def voc_file(picture: str, objects: str, size: tuple[int, int] = SIZE) -> str:
    sides = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{picture}</filename>{sides}{objects}</annotation>"


def write_voc(
    root: Path, count: int = 4, images: str = "JPEGImages", annotations: str = "Annotations", classes: int = 2
) -> Path:
    """Pictures 0.png, 1.png, ... and their XML files, counted from 1 as in Pascal VOC."""
    for number in range(count):
        objects = objects_of(number)[:classes]
        draw(root / images / f"{number}.png", objects)
        written = "".join(voc_object(name, (x + 1, y + 1, x + w, y + h)) for name, (x, y, w, h) in objects)
        path = root / annotations / f"{number}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(voc_file(f"{number}.png", written))
    return root


def yolo_line(name: str, box: tuple[int, int, int, int]) -> str:
    x, y, w, h = box
    shares = (x + w / 2) / SIZE[1], (y + h / 2) / SIZE[0], w / SIZE[1], h / SIZE[0]
    return " ".join([str(NAMES.index(name)), *map(str, shares)])


def yolo_polygon(name: str, points: Sequence[tuple[float, float]]) -> str:
    shares = [share for x, y in points for share in (x / SIZE[1], y / SIZE[0])]
    return " ".join([str(NAMES.index(name)), *map(str, shares)])


def write_yolo(root: Path, count: int = 4, images: str = "images", labels: str = "labels", start: int = 0) -> Path:
    """Pictures 0.png, 1.png, ... and their text files of boxes."""
    for number in range(start, start + count):
        objects = objects_of(number)
        draw(root / images / f"{number}.png", objects)
        path = root / labels / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(yolo_line(*entry) + "\n" for entry in objects))
    return root
