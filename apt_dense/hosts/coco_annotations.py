"""Read COCO's annotation files (instances) and check which annotations can be used and which contradict the rest."""

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apt_dense.hosts.coco_lenient_values import Notes, is_whole, number, short, whole
from apt_dense.hosts.coco_outlines import Size, extent, polygons, read_segmentation

LISTS = "images", "annotations", "categories"
MIN_SIDE = 0.1  # pixels; annotated boxes with a shorter side hold nothing that could be learned

log = logging.getLogger(__name__)


class Usable(NamedTuple):
    """Annotations that can be used, and how many cannot for which reason."""

    annotations: list[dict[str, Any]]
    dropped: Counter[str]


# ---- the file, its images and categories ----------------------------------------------------------------------------


def read_annotations(path: Path) -> dict[str, Any]:
    """Read an annotation file; its images and categories are checked and completed.

    Raises:
        ValueError: if it is not JSON, lacks a list, or an entry is damaged or not unique.
    """
    return checked_lists(read_json(path), path)


def is_plain(path: Path) -> bool:
    """Check whether a file is UTF-8 without a mark at its start, which is all that the hosts' own readers take."""
    with path.open("rb") as file:
        return json.detect_encoding(file.read(4)) == "utf-8"


def read_json(path: Path) -> dict[str, Any]:
    """Read an annotation file as it is. Raises ValueError if it is not JSON, or lacks a list."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}); write or download it again") from error
    missing = [key for key in LISTS if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise ValueError(f"{path} lacks the lists {missing}; expected COCO's instances format with {list(LISTS)}")
    return content


def checked_lists(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check and complete the images and categories of an annotation file's content; the rest is left as it is."""
    notes = Notes()
    images = [
        _image(image, f"{path}: image {place} of the list", notes) for place, image in enumerate(content["images"])
    ]
    categories = [
        _category(category, f"{path}: category {place} of the list", notes)
        for place, category in enumerate(content["categories"])
    ]
    ids = [image["id"] for image in images]
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(
            f"{path} lists {len(ids)} images; expected at least one, and each id only once{_repeated(ids)}"
        )
    ids = [category["id"] for category in categories]
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(f"{path} has the category ids {ids}; expected at least one, and each only once")
    _log_notes(notes, path)
    return {**content, "images": images, "categories": categories}


def _repeated(ids: list[int]) -> str:
    repeated = [value for value, count in Counter(ids).items() if count > 1]
    return f", but {short(repeated)} are there more than once" if repeated else ""


def _image(image: Any, where: str, notes: Notes) -> dict[str, Any]:
    image = _with_id(image, where, notes)
    name, sides = image.get("file_name"), [image.get("height"), image.get("width")]
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{where} has the file_name {short(name)}; expected a file's name")
    height, width = (whole(side, notes, "height or width") for side in sides)
    if not (height and width and height > 0 and width > 0):
        raise ValueError(f"{where}, {name}, has the height and width {short(sides)}; expected pixels, at least 1")
    return {**image, "height": height, "width": width}


def _with_id(entry: Any, where: str, notes: Notes) -> dict[str, Any]:
    found = whole(entry.get("id"), notes, "id") if isinstance(entry, dict) else None
    if found is None:
        raise ValueError(f"{where} is {short(entry)}; expected an object with a whole number as id")
    return {**entry, "id": found}


def _category(category: Any, where: str, notes: Notes) -> dict[str, Any]:
    category = _with_id(category, where, notes)
    name = category.get("name")
    if name is None:  # its id is shown instead
        return {key: value for key, value in category.items() if key != "name"}
    if not isinstance(name, str) and number(name, notes, "name") is not None and math.isfinite(name):
        notes[f"name of a category given as {type(name).__name__}"] += 1
        name = str(name)
    if not isinstance(name, str):
        raise ValueError(f"{where} has the name {short(name)}; expected text")
    return {**category, "name": name}


def _log_notes(notes: Notes, path: Path) -> None:
    for note, count in notes.items():
        log.warning("%s: read as meant, %d times: %s", path, count, note)


# ---- annotations ----------------------------------------------------------------------------------------------------


def has_outlines(content: Mapping[str, Any]) -> bool:
    """Tell whether any annotation has a segmentation. (Sets of boxes have none, or empty ones.)"""
    return any(isinstance(entry, Mapping) and entry.get("segmentation") for entry in content["annotations"])


def usable_annotations(content: Mapping[str, Any], path: Path, masks: bool = True) -> list[dict[str, Any]]:
    """Return the annotations of :func:`sort_annotations` that can be used."""
    return sort_annotations(content, path, masks).annotations


def sort_annotations(content: Mapping[str, Any], path: Path, masks: bool = True) -> Usable:
    """Return copies of the annotations that can be used, completed as COCO's evaluation needs them, and count others.

    Missing boxes and areas, iscrowd and ids are filled in. Numbers written as text and whole ones written as floats are
    converted. The log says how often.

    Args:
        content: of an annotation file, with its images and categories checked.
        masks: whether every annotation needs a segmentation.

    Raises:
        ValueError: for an annotation that is damaged or contradicts the rest, naming it.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    kept: list[dict[str, Any]] = []
    dropped, notes = Counter[str](), Notes()
    for place, entry in enumerate(content["annotations"]):
        annotation, where = _identified(entry, place, path, notes)
        size = sizes.get(annotation["image_id"])
        if size is None:
            dropped["of images that are not listed"] += 1
            continue
        annotation = annotation | _simple_fields(annotation, categories, where, notes)
        complete, problem = _shape(annotation, size, masks, where, notes)
        if problem:
            dropped[problem] += 1
        else:
            kept.append(complete)
    for problem, count in dropped.items():
        log.warning("%s: left out %d annotations %s", path, count, problem)
    kept = _numbered(kept, notes)
    _log_notes(notes, path)
    return Usable(kept, dropped)


def _identified(annotation: Any, place: int, path: Path, notes: Notes) -> tuple[dict[str, Any], str]:
    """Return an annotation with its image's id, and how messages name it: by its id or by its place in the list."""
    image = whole(annotation.get("image_id"), notes, "image_id") if isinstance(annotation, dict) else None
    if image is None:
        raise ValueError(
            f"{path}: annotation {place} of the list is {short(annotation)}; expected an object with a whole number "
            f"as image_id"
        )
    name = short(annotation["id"]) if "id" in annotation else f"{place} of the list, without id,"
    return {**annotation, "image_id": image}, f"{path}: annotation {name} of image {image}"


def _simple_fields(annotation: dict[str, Any], categories: set[int], where: str, notes: Notes) -> dict[str, Any]:
    """Return the category and iscrowd. Raises ValueError."""
    category = whole(annotation.get("category_id"), notes, "category_id")
    if category not in categories:
        found = short(annotation["category_id"]) if "category_id" in annotation else "(none)"
        raise ValueError(f"{where} has category {found}; the categories are {short(sorted(categories))}")
    crowd = annotation.get("iscrowd")
    if crowd is None:
        notes["iscrowd missing, taken as 0"] += 1
        crowd = 0
    if isinstance(crowd, bool):
        notes["iscrowd given as bool"] += 1
        crowd = int(crowd)
    read = whole(crowd, notes, "iscrowd")
    if read not in (0, 1):
        raise ValueError(f"{where} has iscrowd={short(crowd)}; expected 0 or 1")
    return {"category_id": category, "iscrowd": read}


def _shape(
    annotation: dict[str, Any], size: Size, masks: bool, where: str, notes: Notes
) -> tuple[dict[str, Any], str | None]:
    """Return an annotation with its box, outline and area, and why it is useless, or None."""
    outline = annotation.get("segmentation")
    box = _box(annotation.get("bbox"), where, notes)
    if box is not None and (not all(map(math.isfinite, box)) or min(box[2:]) < MIN_SIDE):
        return annotation, "with an empty box"
    if not outline and masks:
        raise ValueError(
            f"{where} has no segmentation, which Mask R-CNN is trained and judged by; add one (the box as a "
            f"polygon), take the annotation off the list, or train for boxes alone (train_det_torchvision: --task "
            f"boxes)"
        )
    if not outline and not isinstance(outline, list | None):
        notes[f"segmentation given as an empty {type(outline).__name__}, taken as none"] += 1
        annotation = {key: value for key, value in annotation.items() if key != "segmentation"}
    inside = None
    if outline:
        outline = read_segmentation(outline, size, where, notes)
        inside, problem = _inside(outline, size)
        if problem:
            return annotation, problem
        outline = _with_an_inside(outline, notes)
        annotation = annotation | {"segmentation": outline}
    if box is None:
        if inside is None:
            return annotation, "with an empty box"
        notes["box missing, taken from the outline"] += 1
        box = [inside[0], inside[1], inside[2] - inside[0], inside[3] - inside[1]]
    problem = _box_problem(box, inside, size, notes)
    return annotation | {"bbox": box, "area": _area(annotation, box, where, notes)}, problem


def _box(box: Any, where: str, notes: Notes) -> list[float] | None:
    if box is None or box == []:
        return None
    values = [number(value, notes, "side of a box") for value in box] if isinstance(box, list) else [None]
    if None in values or len(values) != 4:
        raise ValueError(f"{where} has the box {short(box)}; expected four numbers x, y, width, height")
    return values


def _inside(outline: list | dict, size: Size) -> tuple[tuple | None, str | None]:
    """Return the box around an outline's part inside of the image, and why there is none."""
    if isinstance(outline, list) and not polygons(outline):
        return None, "with an outline of less than three points"
    inside = extent(outline, size)
    if inside is None:
        empty = "with a mask of no pixel" if isinstance(outline, dict) else "with an outline outside of the image"
        return None, f"{empty}, or without an area" if isinstance(outline, list) else empty
    return inside, None


def _with_an_inside(outline: list | dict, notes: Notes) -> list | dict:
    if isinstance(outline, dict):
        return outline
    parts = polygons(outline)
    if len(parts) < len(outline):
        notes["part of an outline left out: less than three points, or an odd number of coordinates"] += 1
    return parts


def _box_problem(box: list[float], inside: tuple | None, size: Size, notes: Notes) -> str | None:
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    if left >= size[1] or top >= size[0] or right <= 0 or bottom <= 0:
        return "with a box outside of the image"
    if inside and not (left < inside[2] and inside[0] < right and top < inside[3] and inside[1] < bottom):
        return "with a box that does not touch the object's outline"
    if left < -1 or top < -1 or right > size[1] + 1 or bottom > size[0] + 1:
        notes["box that goes beyond its image (is it x, y, width, height in pixels?)"] += 1
    return None


def _area(annotation: dict[str, Any], box: list[float], where: str, notes: Notes) -> float:
    """Return the area in pixels; the box's where it is missing."""
    if annotation.get("area") is None:
        notes["area missing, taken from the box"] += 1
        return box[2] * box[3]
    area = number(annotation["area"], notes, "area")
    if area is None or not 0 <= area < math.inf:
        raise ValueError(f"{where} has the area {short(annotation['area'])}; expected pixels")
    return area


def _numbered(annotations: list[dict[str, Any]], notes: Notes) -> list[dict[str, Any]]:
    """Give annotations ids from 1, unless theirs will do: COCOeval takes a match with annotation 0 for no match, and
    Detectron2's, after the training, nothing below 0 and nothing beyond 64 bits."""
    ids = [annotation.get("id") for annotation in annotations]
    if all(is_whole(value) and 0 < value < 2**63 for value in ids) and len(set(ids)) == len(ids):
        return annotations
    notes["list of annotations whose ids are not unique whole numbers from 1, numbered from 1"] += 1
    return [annotation | {"id": place} for place, annotation in enumerate(annotations, start=1)]
