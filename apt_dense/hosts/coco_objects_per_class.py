"""Say how many objects of each class can be learned or scored, and refuse data sets that hold none."""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt_dense.hosts.coco_annotations import Usable
from apt_dense.hosts.coco_lenient_values import Notes, plural, whole

ALLOW_OPTION = "--allow-empty-classes"
SHOWN = 100  # classes in a message

log = logging.getLogger(__name__)


def check_objects(content: Mapping[str, Any], usable: Usable, path: Path, split: str, every_class: bool = True) -> None:
    """Log how many objects of each class remain of how many, and why others went.

    Crowds do not count: they are neither trained with nor scored.

    Args:
        content: of the annotation file, with all its annotations.
        split: "train" or "val".
        every_class: whether a class without objects is an error, not only a warning.

    Raises:
        ValueError: if no object remains, or none of a class.
    """
    names = {category["id"]: str(category.get("name", category["id"])) for category in content["categories"]}
    listed = Counter(whole(entry.get("category_id"), Notes(), "") for entry in content["annotations"])
    remaining = Counter(entry["category_id"] for entry in usable.annotations if not entry["iscrowd"])
    reasons = _reasons(usable)
    if not remaining:
        raise ValueError(
            f"{path} {_nothing(usable, split)}: 0 of {plural(listed.total(), 'annotation')} can be used{reasons}"
        )
    shown = [f"{name} {remaining[key]} of {listed[key]}" for key, name in names.items()]
    more = f", and {len(shown) - SHOWN} more classes" if len(shown) > SHOWN else ""
    counts = f"{remaining.total()} of {plural(listed.total(), 'object')} can be used{reasons}"
    log.info("%s: %s; by class: %s%s", path, counts, ", ".join(shown[:SHOWN]), more)
    empty = [f"{name} (0 of {listed[key]})" for key, name in names.items() if not remaining[key]]
    if not empty:
        return
    lack = f"{path} has none of {plural(len(empty), 'class', 'classes')}: {', '.join(empty[:SHOWN])}; {counts}"
    if every_class:
        raise ValueError(f"{lack}. Correct the file, take the classes off its list, or add {ALLOW_OPTION}")
    log.warning("%s", lack)


def _nothing(usable: Usable, split: str) -> str:
    use = "trained with" if split == "train" else "scored"
    if usable.annotations:
        return f"has only crowds (iscrowd=1), which are not {use}; label single objects"
    return f"has no objects; label some that can be {use}"


def _reasons(usable: Usable) -> str:
    """Return why annotations do not count, as the end of a sentence."""
    crowds = sum(entry["iscrowd"] for entry in usable.annotations)
    reasons = [f"{count} {problem}" for problem, count in usable.dropped.items()]
    reasons += [plural(crowds, "crowd") + " (iscrowd=1)"] if crowds else []
    return f" (not: {', '.join(reasons)})" if reasons else ""
