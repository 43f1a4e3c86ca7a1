"""Check the outlines and run lengths of objects, and find the box around them.

pycocotools trusts both: run lengths that do not add up to an image give masks of uninitialised memory, and an
evaluation that never ends.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from apt_dense.hosts.coco_lenient_values import Notes, is_whole, number, short, whole

Size = tuple[int, int]  # height, width in pixels
Extent = tuple[float, float, float, float]  # left, top, right, bottom in pixels

#: Sides of the image that an outline may reach beyond it. pycocotools' memory grows with the length of outlines.
FAR = 16
_BITS = 60  # of a run length, at most


def read_segmentation(outline: Any, size: Size, where: str, notes: Notes) -> list | dict:
    """Return polygons or run lengths in COCO's form.

    Args:
        outline: polygons [[x, y, x, y, ...], ...], a single one without the outer list, or run lengths.
        size: of the image.
        where: how messages name the annotation.
        notes: counts what was read in another form than it was written in.

    Raises:
        ValueError: for anything else, and for run lengths of another size than the image.
    """
    if isinstance(outline, dict):
        return _read_run_lengths(outline, size, where, notes)
    parts = outline if isinstance(outline, list) else [None]
    if not isinstance(parts[0], list) and all(number(value, Notes(), "") is not None for value in parts):
        notes["segmentation given as a single list of numbers"] += 1
        parts = [parts]
    read = [_read_polygon(part, outline, where, notes) for part in parts]
    far = FAR * max(size)
    farthest = max((max(part, key=abs) for part in read if part), key=abs, default=0)
    if abs(farthest) > far:
        raise ValueError(
            f"{where} has the segmentation {short(outline)}, which reaches to {farthest:.4g}; expected pixels, about "
            f"as many as its image has, {list(size)} (height, width)"
        )
    return read


def _read_polygon(part: Any, outline: Any, where: str, notes: Notes) -> list[float]:
    if isinstance(part, list) and set(map(type, part)) == {float} and all(map(math.isfinite, part)):
        return part  # as in nearly all files, of millions of coordinates
    values = [number(value, notes, "coordinate") for value in part] if isinstance(part, list) else [None]
    if not all(value is not None and math.isfinite(value) for value in values):
        raise ValueError(
            f"{where} has the segmentation {short(outline)}; expected polygons [[x, y, x, y, ...], ...] or run lengths"
        )
    return values


def polygons(outline: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Return the parts of an outline that have an inside. (pycocotools reads four numbers as a box.)"""
    return [part for part in outline if len(part) >= 6 and len(part) % 2 == 0]


# ---- run lengths ----------------------------------------------------------------------------------------------------


def _read_run_lengths(mask: dict[str, Any], size: Size, where: str, notes: Notes) -> dict[str, Any]:
    found, counts, pixels = mask.get("size"), mask.get("counts"), math.prod(size)
    if found is None:
        notes["run lengths without a size"] += 1
        found = list(size)
    sides = [whole(side, notes, "side of a mask") for side in found] if isinstance(found, list) else None
    if sides != list(size):
        raise ValueError(f"{where} has a mask of size {short(found)}, its image {list(size)} (height, width)")
    if isinstance(counts, list):
        counts = [whole(count, notes, "run length") for count in counts]
    runs = decoded(counts) if isinstance(counts, str) else counts if isinstance(counts, list) else None
    if not runs or not all(is_whole(run) and run >= 0 for run in runs) or sum(runs) != pixels:
        # The text is cut short, and may be compressed: the sum says more.
        total = sum(runs) if runs and all(map(is_whole, runs)) else "no number of"
        raise ValueError(
            f"{where} has the run lengths {short(mask.get('counts'))}; expected {pixels} pixels in all, not {total}"
        )
    return {**mask, "size": list(size), "counts": counts}


def decoded(text: str) -> list[int] | None:
    """Decode compressed run lengths, without pycocotools; None for text that is something else.

    Each number is split into groups of five bits, lowest first, which are stored as the characters from "0" on with a
    sixth bit that says whether another group follows. From the fourth number on, the difference from the number two
    places before is stored.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return None
        value |= (code & 31) << shift
        shift += 5
        if shift > _BITS:
            return None
        if code & 32:
            continue
        value -= (code & 16) << (shift - 4)  # negative: the highest bit is the sign
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return None if shift else runs


# ---- extents --------------------------------------------------------------------------------------------------------


def extent(outline: list | dict, size: Size) -> Extent | None:
    """Return the box around the part of an object that is inside of the image, or None if nothing is."""
    box = _extent_of_runs(outline["counts"], size[0]) if isinstance(outline, dict) else _extent_of_polygons(outline)
    if box is None:
        return None
    left, top, right, bottom = max(box[0], 0), max(box[1], 0), min(box[2], size[1]), min(box[3], size[0])
    return (left, top, right, bottom) if left < right and top < bottom else None


def _extent_of_polygons(outline: Sequence[Sequence[float]]) -> Extent | None:
    parts = [part for part in polygons(outline) if not _is_line(part)]
    columns, rows = ([value for part in parts for value in part[axis::2]] for axis in (0, 1))
    return (min(columns), min(rows), max(columns), max(rows)) if parts else None


def _is_line(part: Sequence[float]) -> bool:
    x, y = part[:2]
    right = down = 0.0  # the first step that goes anywhere
    for other_x, other_y in zip(part[2::2], part[3::2], strict=True):
        if not right and not down:
            right, down = other_x - x, other_y - y
        elif (other_x - x) * down != (other_y - y) * right:
            return False
    return True


def _extent_of_runs(counts: str | list[int], height: int) -> Extent | None:
    boxes = list(_extents_of_runs(decoded(counts) if isinstance(counts, str) else counts, height))
    if not boxes:
        return None
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _extents_of_runs(runs: Sequence[int], height: int) -> Iterator[Extent]:
    """Yield the box around each run of foreground. Runs go down the columns, background first."""
    stops = list(accumulate(runs))
    for start, stop in zip(stops[::2], stops[1::2], strict=False):
        if start < stop:
            (left, top), (right, bottom) = divmod(start, height), divmod(stop - 1, height)
            yield (left, top, right + 1, bottom + 1) if left == right else (left, 0, right + 1, height)
