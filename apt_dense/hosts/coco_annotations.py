"""Read COCO's annotation files (instances) and check which annotations can be used and which contradict the rest."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

LISTS = "images", "annotations", "categories"
MIN_SIDE = 0.1  # pixels; annotated boxes with a shorter side hold nothing that could be learned

log = logging.getLogger(__name__)


def read_annotations(path: Path) -> dict[str, Any]:
    """Read an annotation file; its images and categories are checked.

    Raises:
        ValueError: if it is not JSON, lacks a list, or an entry is damaged or not unique.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}); write or download it again") from error
    missing = [key for key in LISTS if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise ValueError(f"{path} lacks the lists {missing}; expected COCO's instances format with {list(LISTS)}")
    for number, image in enumerate(content["images"]):
        _check_image(image, f"{path}: image {number} of the list")
    for number, category in enumerate(content["categories"]):
        _check_id(category, f"{path}: category {number} of the list")
    ids = [image["id"] for image in content["images"]]
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(f"{path} lists {len(ids)} images; expected at least one, and each id only once")
    ids = [category["id"] for category in content["categories"]]
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(f"{path} has the category ids {ids}; expected at least one, and each only once")
    return content


def _check_image(image: Any, where: str) -> None:
    _check_id(image, where)
    name, sides = image.get("file_name"), [image.get("height"), image.get("width")]
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} has the file_name {name!r}; expected a file's name")
    if not all(_is_whole(side) and side > 0 for side in sides):
        raise ValueError(f"{where}, {name}, has the height and width {sides}; expected pixels, at least 1")


def _check_id(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or not _is_whole(entry.get("id")):
        raise ValueError(f"{where} is {_short(entry)}; expected an object with a whole number as id")


def usable_annotations(content: Mapping[str, Any], path: Path, masks: bool = True) -> list[dict[str, Any]]:
    """Return copies of the annotations that can be used, completed as COCO's evaluation needs them.

    Raises:
        ValueError: for an annotation that is damaged or contradicts the rest, naming it.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    kept: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for number, annotation in enumerate(content["annotations"]):
        where = _name(annotation, number, path)
        problem = _problem(annotation, sizes, categories, masks, where)
        if problem:
            dropped[problem] += 1
        else:
            kept.append(_completed(annotation, where))
    for problem, count in dropped.items():
        log.warning("%s: left out %d annotations %s", path, count, problem)
    return _numbered(kept)


def _numbered(annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give annotations ids from 1, unless theirs will do: COCOeval takes a match with annotation 0 for no match."""
    ids = [annotation.get("id") for annotation in annotations]
    if all(map(_is_whole, ids)) and 0 not in ids and len(set(ids)) == len(ids):
        return annotations
    return [annotation | {"id": number} for number, annotation in enumerate(annotations, start=1)]


def _name(annotation: Any, number: int, path: Path) -> str:
    """Return how messages name an annotation: by its id and image or, where it has none, by its place in the list."""
    if not isinstance(annotation, dict) or not _is_whole(annotation.get("image_id")):
        raise ValueError(
            f"{path}: annotation {number} of the list is {_short(annotation)}; expected an object with a whole number "
            f"as image_id"
        )
    name = _short(annotation["id"]) if "id" in annotation else f"{number} of the list, without id,"
    return f"{path}: annotation {name} of image {annotation['image_id']}"


def _problem(
    annotation: dict[str, Any], sizes: Mapping[int, tuple[int, int]], categories: set[int], masks: bool, where: str
) -> str | None:
    """Return why an annotation is useless, or None; raise on what cannot have been meant."""
    size, category = sizes.get(annotation["image_id"]), annotation.get("category_id")
    if size is None:
        return "of images that are not listed"
    if not _is_whole(category) or category not in categories:
        raise ValueError(f"{where} has category {_short(category)}; the categories are {sorted(categories)}")
    if _is_empty_box(annotation.get("bbox"), where):
        return "with an empty box"
    return _mask_problem(annotation.get("segmentation"), size, masks, where)


def _is_empty_box(box: Any, where: str) -> bool:
    if box is None or box == []:
        return True
    if not isinstance(box, list) or not all(map(_is_number, box)):
        raise ValueError(f"{where} has the box {_short(box)}; expected four numbers x, y, width, height")
    return len(box) != 4 or not _are_finite(box) or min(box[2:]) < MIN_SIDE


def _mask_problem(outline: Any, size: tuple[int, int], masks: bool, where: str) -> str | None:
    if not outline:
        if masks:
            raise ValueError(
                f"{where} has no segmentation, which Mask R-CNN is trained and judged by; add one (the box as a "
                f"polygon), or take the annotation off the list"
            )
        return None
    if isinstance(outline, dict):
        _check_run_lengths(outline, size, where)
        return None
    _check_polygons(outline, where)
    return None if polygons(outline) else "with an outline of less than three points"


def _check_run_lengths(mask: dict[str, Any], size: tuple[int, int], where: str) -> None:
    found, counts, pixels = mask.get("size"), mask.get("counts"), math.prod(size)
    if found != list(size):
        raise ValueError(f"{where} has a mask of size {_short(found)}, its image {list(size)} (height, width)")
    if isinstance(counts, str) and counts:
        return  # compressed
    whole = isinstance(counts, list) and all(_is_whole(count) and count >= 0 for count in counts)
    if not whole or sum(counts) != pixels:
        raise ValueError(f"{where} has the run lengths {_short(counts)}; expected {pixels} pixels in all")


def _check_polygons(outline: Any, where: str) -> None:
    parts = outline if isinstance(outline, list) else [None]
    if not all(isinstance(part, list) and _are_finite(part) for part in parts):
        raise ValueError(
            f"{where} has the segmentation {_short(outline)}; expected polygons [[x, y, x, y, ...], ...] or run lengths"
        )


def _are_finite(values: Iterable[Any]) -> bool:
    try:
        return all(map(math.isfinite, values))
    except (TypeError, OverflowError):  # not a number, or a whole one beyond all floats
        return False


def polygons(outline: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Return the parts of an outline that have an inside. (pycocotools reads four numbers as a box.)"""
    return [part for part in outline if len(part) >= 6 and len(part) % 2 == 0]


def _completed(annotation: dict[str, Any], where: str) -> dict[str, Any]:
    """Add an area and iscrowd where they are missing, and leave polygons of less than three points out."""
    outline, crowd = annotation.get("segmentation"), annotation.get("iscrowd", 0)
    area = annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3])
    if crowd not in (0, 1):
        raise ValueError(f"{where} has iscrowd={_short(crowd)}; expected 0 or 1")
    if not _is_number(area) or not 0 <= area < math.inf:
        raise ValueError(f"{where} has the area {_short(area)}; expected pixels")
    complete = {**annotation, "area": area, "iscrowd": int(crowd)}
    return complete | {"segmentation": polygons(outline)} if isinstance(outline, list) and outline else complete


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _short(value: Any) -> str:
    """Return a value as messages show it, in one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
