"""Data sets of flat pictures and noise, between which tokens differ most, in the layouts of ADE20K and COCO."""

import json
from pathlib import Path

import cv2
import numpy as np

BOX = 0.25, 0.25, 0.5, 0.5  # x, y, width and height of the object in each picture, as shares of its side
CATEGORIES = [{"id": 1, "name": "square"}]


def contrast_picture(number: int, images: int, side: int) -> np.ndarray:
    """Picture of a number: flat for the first half of them, else noise, with a square (side, side, 3) uint8."""
    random = np.random.default_rng(number)
    flat = np.full((side, side, 3), 60 + number % 60, np.uint8)
    return flat if number < images // 2 else random.integers(0, 256, (side, side, 3), dtype=np.uint8)


def write_ade(folder: Path, images: int, side: int) -> Path:
    """Write images/ and annotations/, each with training/ and validation/, unless they are there; two to validate."""
    for split, count in (("training", images), ("validation", 2)):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            mask = np.ones((side, side), np.uint8)
            x, y, w, h = (round(share * side) for share in BOX)
            mask[y : y + h, x : x + w] = 2
            cv2.imwrite(str(folder / "images" / split / f"{number:05}.jpg"), contrast_picture(number, count, side))
            cv2.imwrite(str(folder / "annotations" / split / f"{number:05}.png"), mask)
    return folder


def write_coco(folder: Path, images: int, side: int) -> Path:
    """Write annotations/, train2017/ and val2017/; two pictures to validate."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", images), ("val", 2)):
        (folder / f"{split}2017").mkdir(exist_ok=True)
        content = {"images": [], "annotations": [], "categories": CATEGORIES}
        for number in range(count):
            name = f"{number + 1:012}.png"
            cv2.imwrite(str(folder / f"{split}2017" / name), contrast_picture(number, count, side))
            content["images"].append({"id": number + 1, "file_name": name, "height": side, "width": side})
            content["annotations"].append(_square(number + 1, side))
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _square(number: int, side: int) -> dict:
    x, y, w, h = (round(share * side) for share in BOX)
    return {
        "id": number, "image_id": number, "category_id": 1, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
    }  # fmt: skip
