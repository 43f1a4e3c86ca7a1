"""Read the objects of one of Pascal VOC's XML files: boxes in pixels, and polygons where there are some."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from annotation_formats.labelled_pictures import Box, Findings, Labelled, Size, finite

_SIDES = "xmin", "ymin", "xmax", "ymax"


def read_size(root: ElementTree.Element, sizes: Sequence[Size], path: Path, findings: Findings) -> Size | None:
    """Return the picture's size, which the file must agree with: as shown, or as stored if boxes are for that."""
    stated = finite(root.findtext(f"size/{side}") or "0" for side in ("height", "width"))
    if stated == [0, 0]:
        findings.note("XML file without its picture's size", path)
        return sizes[0]
    if stated is None or tuple(stated) not in sizes:
        findings.problem(
            path, f"it says height and width {stated}, but its picture has {sizes[0]}: are boxes for that?"
        )
        return None
    return int(stated[0]), int(stated[1])


def read_object(
    node: ElementTree.Element, where: str, first_pixel: int, ignore_difficult: bool, findings: Findings
) -> Labelled | None:
    """Read an <object>; None, with a problem, if it is corrupt. ``first_pixel`` and ``ignore_difficult`` as in
    ``VocOptions``."""
    name = (node.findtext("name") or "").strip()
    if not name:
        findings.problem(where, "it has no name")
        return None
    where = f"{where} ({name})"
    outline, box = None, None
    if node.find("polygon") is not None:
        outline = _read_polygon(node, where, first_pixel, findings)
        if outline is None:
            return None
    if node.find("bndbox") is not None or outline is None:
        box = _read_box(node, where, first_pixel, findings)
        if box is None:
            return None
    if node.find("part") is not None:
        findings.note("parts of an object (such as head and hands), left out", where)
    difficult = (node.findtext("difficult") or "0").strip() not in ("0", "")
    if difficult:
        kept = "ignored in training and scores" if ignore_difficult else "taken as any other"
        findings.note(f"object marked as difficult, {kept}", where)
    return Labelled(name, box, outline, where, difficult and ignore_difficult)


def _read_box(node: ElementTree.Element, where: str, first_pixel: int, findings: Findings) -> Box | None:
    texts = [(node.findtext(f"bndbox/{side}") or "").strip() for side in _SIDES]
    sides = finite(texts)
    if sides is None:
        findings.problem(where, f"the box {dict(zip(_SIDES, texts, strict=True))}; expected four numbers")
        return None
    left, top, right, bottom = (side - first_pixel for side in sides)
    if min(left, top) == -1:
        findings.problem(
            where, f"the box {sides} starts at 0, but Pascal VOC counts from 1; add --first-pixel 0 if all do"
        )
        return None
    if right < left or bottom < top:
        findings.problem(where, f"the box {sides} ends before it starts")
        return None
    # Counted from 1, the last row and column are inside of the box.
    return left, top, right - left + first_pixel, bottom - top + first_pixel


def _read_polygon(node: ElementTree.Element, where: str, first_pixel: int, findings: Findings) -> list[float] | None:
    """Read <polygon><x1>..</x1><y1>..</y1>...</polygon>, as several programs write it."""
    polygons = node.findall("polygon")
    texts = {child.tag: (child.text or "").strip() for child in polygons[0]}
    names = [f"{axis}{number}" for number in range(1, len(texts) // 2 + 1) for axis in "xy"]
    points = finite(texts.get(name, "") for name in names)
    if len(polygons) > 1 or len(texts) != len(polygons[0]) or set(names) != texts.keys() or points is None:
        findings.problem(where, f"the polygon {texts}; expected one of numbers x1, y1, x2, y2, ...")
        return None
    return [value - first_pixel for value in points]
