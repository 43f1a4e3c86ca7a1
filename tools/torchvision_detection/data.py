"""Data sets in COCO's layout: finding, checking and reading them.

Understood are COCO's own layout and that of tools/make_demo_data.py (see LAYOUTS).
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from pycocotools.coco import COCO

LAYOUTS = (  # annotation file and image folder below the data set's folder
    ("annotations/instances_{split}2017.json", "{split}2017"),
    ("annotations/instances_{split}.json", "{split}"),
    ("coco/annotations/instances_{split}.json", "images/{long}"),
)
LONG_NAMES = {"train": "training", "val": "validation"}
MIN_SIDE = 0.1  # pixels; annotated boxes with a shorter side hold nothing that could be learned

log = logging.getLogger(__name__)


class CocoSplit(NamedTuple):
    """One split of a data set."""

    coco: COCO  # what can be used of the annotation file, with annotation ids from 1
    folder: Path  # of the images
    image_ids: tuple[int, ...]
    category_ids: tuple[int, ...]  # ascending; label i + 1 of the model is category_ids[i], label 0 the background
    names: tuple[str, ...]  # of these categories

    @property
    def num_classes(self) -> int:
        """Labels including the background."""
        return len(self.category_ids) + 1


# ---- finding and checking -------------------------------------------------------------------------------------------


def load_split(root: str | Path, split: str) -> CocoSplit:
    """Read the annotations of "train" or "val" and check that they can be used.

    Left out, with a count in the log, are annotations of images that are not listed, with an empty box, or with an
    outline of less than three points. Crowds (iscrowd) stay: COCOeval wants them, ``TrainingImages`` skips them.

    Raises:
        FileNotFoundError: the folder has no known layout, or lacks images that are listed.
        ValueError: the file is damaged or contradicts itself.
    """
    path, folder = find_split(Path(root), split)
    content = read_annotations(path)
    check_images(content["images"], path, folder)
    content["annotations"] = usable_annotations(content, path)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress there
        coco.createIndex()
    ids = tuple(image["id"] for image in content["images"])
    category_ids = tuple(category["id"] for category in categories)
    names = tuple(str(category.get("name", category["id"])) for category in categories)
    return CocoSplit(coco, folder, ids, category_ids, names)


def find_split(root: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of a split."""
    known = []
    for annotations, images in LAYOUTS:
        path, folder = (root / part.format(split=split, long=LONG_NAMES[split]) for part in (annotations, images))
        if path.is_file() and folder.is_dir():
            return path, folder
        if path.is_file():
            raise FileNotFoundError(f"{path} exists, but the folder of its images, {folder}, does not")
        known.append(f"{path.relative_to(root)} with images in {folder.relative_to(root)}/")
    state = "has no known layout" if root.is_dir() else "does not exist"
    raise FileNotFoundError(f"data set folder {root} {state}; for {split} expected {', or '.join(known)}")


def read_annotations(path: Path) -> dict[str, Any]:
    """The content of an annotation file with the three lists that are needed; categories are looked at here."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file, or cut off: {error}") from error
    lists = ("images", "annotations", "categories")
    missing = [key for key in lists if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise ValueError(f"{path} lacks the lists {missing}; expected COCO's instances format with {list(lists)}")
    ids = [category["id"] for category in content["categories"]]
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(f"{path} has the category ids {ids}; expected at least one, and each only once")
    return content


def check_images(images: Sequence[dict], path: Path, folder: Path) -> None:
    if not images or len({image["id"] for image in images}) < len(images):
        raise ValueError(f"{path} lists {len(images)} images; expected at least one, and each id only once")
    absent = [image["file_name"] for image in images if not (folder / image["file_name"]).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{len(absent)} of the {len(images)} images that {path} lists are not in {folder}, such as {absent[0]}; "
            f"copy them there or take them off the list"
        )


def usable_annotations(content: dict[str, Any], path: Path) -> list[dict]:
    """Copies of the annotations that can be used, completed by what COCOeval takes for granted."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    known = {category["id"] for category in content["categories"]}
    kept, dropped = [], Counter()
    for annotation in content["annotations"]:
        problem = look_at(annotation, sizes.get(annotation["image_id"]), known, path)
        if problem:
            dropped[problem] += 1
        else:
            # COCOeval takes a match with annotation 0 for no match, so ids are given anew, from 1.
            kept.append(completed(annotation) | {"id": len(kept) + 1})
    for problem, count in dropped.items():
        log.warning("%s: left out %d annotations %s", path, count, problem)
    return kept


def look_at(annotation: dict, size: tuple[int, int] | None, categories: set[int], path: Path) -> str | None:
    """What makes an annotation useless, or None. Raises on what cannot be meant."""
    where = f"{path}: annotation {annotation.get('id')} of image {annotation['image_id']}"
    if size is None:
        return "of images that are not listed"
    if annotation["category_id"] not in categories:
        raise ValueError(f"{where} has category {annotation['category_id']}; the categories are {sorted(categories)}")
    box, outline = annotation.get("bbox") or (), annotation.get("segmentation")
    if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) < MIN_SIDE:
        return "with an empty box"
    if not outline:
        raise ValueError(f"{where} has no segmentation, which Mask R-CNN is trained and judged by; add one")
    if isinstance(outline, dict) and tuple(outline["size"]) != size:
        raise ValueError(f"{where} has a mask of size {outline['size']}, its image {list(size)} (height, width)")
    return "with an outline of less than three points" if isinstance(outline, list) and not polygons(outline) else None


def completed(annotation: dict) -> dict:
    outline = annotation["segmentation"]
    outline = polygons(outline) if isinstance(outline, list) else outline
    area = annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3])
    return annotation | {"segmentation": outline, "area": area, "iscrowd": int(annotation.get("iscrowd", 0))}


def polygons(outline: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """The parts of an outline that have an inside. (pycocotools reads four numbers as a box.)"""
    return [part for part in outline if len(part) >= 6 and len(part) % 2 == 0]


def check_same_categories(found: Sequence, expected: Sequence, source: str) -> None:
    """Raise unless two lists of (category id, name) agree: label numbers follow from them."""
    found, expected = ([tuple(pair) for pair in pairs] for pairs in (found, expected))
    if found != expected:
        raise ValueError(
            f"the categories (id, name) of {source} differ from the training data's: {found[:5]} ({len(found)}) "
            f"against {expected[:5]} ({len(expected)}); both files need the same list"
        )


# ---- pictures and masks ---------------------------------------------------------------------------------------------


def read_image(split: CocoSplit, image_id: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB, of the size that the annotations speak of.

    Raises:
        ValueError: the file is damaged or of another size.
    """
    entry = split.coco.imgs[image_id]
    path, size = split.folder / entry["file_name"], (entry["height"], entry["width"])
    data = path.read_bytes()
    for orientation in (0, cv2.IMREAD_IGNORE_ORIENTATION):  # some sets are annotated as stored, others as shown
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | orientation) if data else None
        if pixels is None:
            raise ValueError(f"{path} is no readable image; replace it or take it off the list")
        if pixels.shape[:2] == size:
            return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    raise ValueError(f"{path} has height and width {pixels.shape[:2]}, but its annotation file says {size}")


def read_objects(split: CocoSplit, image_id: int) -> tuple[list[np.ndarray], list[int]]:
    """Masks, (H, W) uint8 of 0 and 1 each, and labels from 1, of all objects but crowds."""
    found = [annotation for annotation in split.coco.imgToAnns.get(image_id, ()) if not annotation["iscrowd"]]
    labels = [split.category_ids.index(annotation["category_id"]) + 1 for annotation in found]
    return [split.coco.annToMask(annotation) for annotation in found], labels
