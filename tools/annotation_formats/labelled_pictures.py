"""Labelled pictures in any format: the types, and what was found wrong or unusual while they were read."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from apt_dense.hosts.coco_annotations import MIN_SIDE
from apt_dense.hosts.coco_outlines import extent
from apt_dense.hosts.coco_picture_sizes import picture_sizes

from shared.photo_files import is_photo

#: What a folder of a split may be called.
SPLITS = {
    "train": "train", "training": "train", "train2017": "train",
    "val": "val", "valid": "val", "validation": "val", "val2017": "val",
    "test": "test", "testing": "test", "test2017": "test",
}  # fmt: skip

Size = tuple[int, int]  # height, width in pixels
Box = tuple[float, float, float, float]  # x, y, width, height in pixels


#: What a picture without a file of labels may be: see tools/convert_annotations.py.
UNLABELLED = "error", "background", "skip"


class Labelled(NamedTuple):
    """An object of a picture.

    Args:
        name: of its class.
        box: around it; None where the outline tells.
        outline: x, y, x, y, ... in pixels; None if there is none.
        where: file and line or number of the object, for messages.
        ignored: neither learned nor scored (COCO's iscrowd).
    """

    name: str
    box: Box | None
    outline: list[float] | None
    where: str
    ignored: bool = False


class Picture(NamedTuple):
    """A picture and its objects. An empty list says that it shows none."""

    path: Path
    size: Size
    objects: list[Labelled]


class Findings:
    """Entries that cannot be converted, and entries that were converted otherwise than they are written."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: dict[str, list[str]] = {}

    def problem(self, where: object, what: str) -> None:
        """Add an entry that cannot be converted, named by its file."""
        self.problems.append(f"{where}: {what}")

    def note(self, what: str, where: object) -> None:
        """Count an entry that was not taken as it is written."""
        self.notes.setdefault(what, []).append(str(where))


def photos_below(folder: Path) -> list[Path]:
    """List the photographs below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if is_photo(path))


def split_of(path: Path) -> str | None:
    """Return the split that a folder in a relative path names: "train" for "images/train2017/1.jpg"."""
    return next((SPLITS[part.lower()] for part in path.parts[:-1] if part.lower() in SPLITS), None)


def sizes_of(path: Path, findings: Findings) -> list[Size]:
    """Return height and width as shown and, if they differ, as stored; nothing for a damaged picture."""
    try:
        return picture_sizes(path)
    except ValueError as error:
        findings.problem(path, str(error).removeprefix(f"{path} "))
        return []


def into_splits(
    pictures: Sequence[Picture], split_of: Callable[[Picture], str | None], val_share: float | None
) -> dict:
    """Sort pictures into splits by their folders or, where those name none, at random.

    Args:
        val_share: of pictures for val; the same ones each time. None if folders have to tell.

    Raises:
        ValueError: if neither tells, or both.
    """
    found = {id(picture): split_of(picture) for picture in pictures}
    names = set(found.values())
    if names == {None}:
        if val_share is None:
            raise ValueError("no folder or list says which pictures are for training; add --val-share 0.2")
        if not 0 < val_share < 1 or len(pictures) < 2:
            raise ValueError(f"--val-share {val_share} of {len(pictures)} pictures: expected above 0 and below 1, of 2")
        count = min(max(1, round(val_share * len(pictures))), len(pictures) - 1)
        chosen = set(random.Random(0).sample(range(len(pictures)), count))
        return {
            "train": [picture for place, picture in enumerate(pictures) if place not in chosen],
            "val": [picture for place, picture in enumerate(pictures) if place in chosen],
        }
    if val_share is not None:
        raise ValueError(f"--val-share is for data without splits, but folders name {sorted(names - {None})}")
    outside = [picture.path for picture in pictures if found[id(picture)] is None]
    if outside:
        raise ValueError(f"{outside[0]} is in no folder of a split, unlike other pictures; move it to one")
    order = [split for split in ("train", "val", "test") if split in names]
    return {split: [picture for picture in pictures if found[id(picture)] == split] for split in order}


# ---- objects --------------------------------------------------------------------------------------------------------


def fitted(entry: Labelled, size: Size, findings: Findings) -> Labelled | None:
    """Return an object with a box inside of its picture, or None, with a problem, if nothing of it is there."""
    problem = _outline_problem(entry, size) if entry.outline is not None else None
    if problem:
        findings.problem(entry.where, problem)
        return None
    box = entry.box if entry.box is not None else _around(entry.outline)
    left, top = max(box[0], 0), max(box[1], 0)
    right, bottom = min(box[0] + box[2], size[1]), min(box[1] + box[3], size[0])
    if min(box[2:]) < MIN_SIDE:
        findings.problem(entry.where, f"an empty box, {box[2]:g} x {box[3]:g} pixels")
        return None
    if right - left < MIN_SIDE or bottom - top < MIN_SIDE:
        findings.problem(entry.where, f"a box outside of its picture of {size[1]} x {size[0]} pixels")
        return None
    inside = (left, top, right - left, bottom - top)
    if max(abs(a - b) for a, b in zip(box, inside, strict=True)) > 0.5:  # less is rounding
        findings.note("box cut at the border of its picture", entry.where)
    return entry._replace(box=inside)


def _outline_problem(entry: Labelled, size: Size) -> str | None:
    if len(entry.outline) < 6:
        return f"an outline of {len(entry.outline) // 2} points; expected at least 3"
    inside = extent([entry.outline], size)
    if inside is None:
        return f"an outline outside of its picture of {size[1]} x {size[0]} pixels, or without an area"
    x, y, w, h = entry.box or _around(entry.outline)
    if not (x < inside[2] and inside[0] < x + w and y < inside[3] and inside[1] < y + h):
        return "a box that does not touch its outline"
    return None


def area_of(entry: Labelled) -> float:
    """Return the area in pixels, of the outline if there is one."""
    whole = entry.box[2] * entry.box[3]
    return min(_area(entry.outline), whole) if entry.outline else whole


def _around(outline: Sequence[float]) -> Box:
    left, top = min(outline[::2]), min(outline[1::2])
    return left, top, max(outline[::2]) - left, max(outline[1::2]) - top


def _area(outline: Sequence[float]) -> float:
    x, y = outline[::2], outline[1::2]
    return abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2


def finite(values: Iterable[str]) -> list[float] | None:
    """Read numbers; None if one is none, or not finite."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None
