"""Read single values of an annotation file. Values in another type than COCO's are accepted where their meaning is
plain: whole numbers as text or floats, other numbers as text."""

import math
from collections import Counter
from typing import Any

#: What was read in another form than it was written in, and how often.
Notes = Counter[str]


def is_whole(value: Any) -> bool:
    """Tell whether a value is an integer. True and False are not numbers."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole(value: Any, notes: Notes, what: str) -> int | None:
    """Return a whole number that may be written as text or as a float, noting that; None for anything else."""
    if is_whole(value):
        return value
    converted = number(value, Notes(), what)
    if converted is None or not math.isfinite(converted) or converted != int(converted):
        return None
    notes[f"{what} given as {type(value).__name__}"] += 1
    return int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdecimal() else int(converted)


def number(value: Any, notes: Notes, what: str) -> float | None:
    """Return a number, also NaN or infinity, that may be written as text, noting that; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        converted = float(value)
    except (ValueError, OverflowError):  # not a number, or a whole one beyond all floats
        return None
    if isinstance(value, str):
        notes[f"{what} given as str"] += 1
        return converted
    return value


def short(value: Any) -> str:
    """Return a value as messages show it, in one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def plural(count: int, noun: str, several: str | None = None) -> str:
    """Return a count with its noun: "1 object", "2 objects"."""
    return f"{count} {noun if count == 1 else several or noun + 's'}"
