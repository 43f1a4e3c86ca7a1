"""Tiny folders in COCO's layout, and settings of the torchvision tool that train in seconds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from support.threads import one_thread  # noqa: F401 (a fixture, for those who import this)

TOOLS = Path(__file__).parents[2] / "tools"

CATEGORIES = [{"id": 3, "name": "red"}, {"id": 90, "name": "green"}]  # with holes, and label 2 is id 90
COLOURS = {3: (230, 30, 30), 90: (30, 230, 30)}  # RGB
SIZE = (96, 128)  # height, width

#: Command line options of a model and a schedule of seconds.
TINY = (
    "--model", "tiny", "--size", "128", "--channels", "16", "--box-features", "32", "--box-samples", "16",
    "--proposals", "30", "--scale-jitter", "1", "1", "--batch-size", "2", "--lr", "2e-3", "--warmup", "0",
    "--workers", "0", "--device", "cpu",
)  # fmt: skip
TINY_PRESET = {"embed_dim": 48, "depth": 2, "num_heads": 2, "drop_path_rate": 0.2}


def rectangle(image_id: int, category: int, box: tuple[float, float, float, float], **other: object) -> dict:
    """An annotation, without id, of a box x, y, width, height in pixels."""
    x, y, w, h = box
    outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    fields = {"image_id": image_id, "category_id": category, "bbox": list(box), "area": w * h, "iscrowd": 0}
    return fields | {"segmentation": outline} | other


def content(images: int, objects: int = 2) -> dict:
    """Annotations of images 10, 20, ... with ``objects`` rectangles each, categories in turns."""
    rng = np.random.default_rng(images)
    size = {"height": SIZE[0], "width": SIZE[1]}
    entries = [{"id": 10 * i, "file_name": f"{i}.png", **size} for i in range(1, images + 1)]
    found = []
    for entry in entries:
        for number in range(objects):
            x, y, w, h = (int(n) for n in rng.integers((5 + 60 * number, 5, 28, 28), (20 + 60 * number, 40, 48, 48)))
            found.append(rectangle(entry["id"], list(COLOURS)[number % 2], (x, y, w, h)))
    return {"images": entries, "annotations": found, "categories": copy.deepcopy(CATEGORIES)}


def write_coco(
    root: Path,
    images: int = 2,
    change: Callable[[dict], None] | None = None,
    splits: tuple[str, ...] = ("train", "val"),
) -> Path:
    """Coloured rectangles on grey; ``change`` edits the annotations (of both splits) before they are written."""
    for split in splits:
        listed = content(images)
        folder = root / f"{split}2017"
        folder.mkdir(parents=True)
        for entry in listed["images"]:
            draw(folder / entry["file_name"], [a for a in listed["annotations"] if a["image_id"] == entry["id"]])
        for number, annotation in enumerate(listed["annotations"], start=1):
            annotation["id"] = number
        if change:
            change(listed)
        path = root / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(listed))
    return root


def draw(path: Path, annotations: list[dict]) -> None:
    pixels = np.full((*SIZE, 3), 90, np.uint8)
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        pixels[y : y + h, x : x + w] = COLOURS[annotation["category_id"]]
    Image.fromarray(pixels).save(path)
