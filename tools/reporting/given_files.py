"""What other tools wrote: the thresholds of a calibration, and the figures of an evaluation."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt_dense import PatchSelector

from calibration.token_curves import Sizes, Source

THRESHOLDS = "thresholds.json"
_SELECTOR = "scorer", "patch_size", "window_size", "pixel_mean", "pixel_std", "channel_order"
_FIGURES = "images", "share"
_PART = re.compile("(.+)_(fine|mixed|coarse|scale[0-9]+)")  # a figure's name, as evaluations by scale write it


def read_calibration(folder: Path) -> Mapping[str, Any]:
    """Read the result of tools/calibrate.py. Raises ValueError, OSError."""
    path = folder / THRESHOLDS
    if not path.is_file():
        raise ValueError(f"--calibration {folder} holds no {THRESHOLDS}; give a folder that tools/calibrate.py wrote")
    content = _read_json(path)
    try:
        low, high = map(float, content["expected"])
        figures = [float(content[name]) for name in _FIGURES]
        source_of(content)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not what tools/calibrate.py writes ({type(error).__name__}: {error})") from error
    if "pipeline" in content["settings"]:
        raise ValueError(
            f"--calibration {folder} was made of photos as a training pipeline draws them (calibrate.py --pipeline); "
            f"this report measures them as they are. Give its thresholds with --thresholds, and their size"
        )
    if not all(map(math.isfinite, (low, high, *figures))):
        raise ValueError(f"{path} holds a figure that is not finite")
    return content


def source_of(calibration: Mapping[str, Any]) -> Source:
    """Return how a calibration read photos, and the patches that it chose. Raises KeyError, TypeError, ValueError."""
    settings = calibration["settings"]
    options = {name: _tuples(settings[name]) for name in _SELECTOR}
    sizes = Sizes(**{name: _tuples(settings[name]) for name in Sizes._fields})
    return Source(PatchSelector(thresholds=tuple(calibration["thresholds"]), **options), sizes, {})


def read_quality(path: Path) -> Mapping[str, Any]:
    """Read figures by name, {"mIoU": 71.2}, or by name and part, {"mIoU": {"fine": 75.1, "coarse": 64.0}}.

    Names that end in a part, such as mIoU_fine in the JSON file of an evaluation with ``eval_seg.py --by-scale``, are
    read as the latter.

    Raises:
        ValueError: if the file is something else.
        OSError: if it cannot be read.
    """
    content = _read_json(path)
    for name, value in content.items():
        values = value.values() if isinstance(value, dict) else [value]
        if not all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in values):
            raise ValueError(
                f"--quality {path}: {name} is {value!r}; expected a number, or numbers by name, such as "
                '{"mIoU": {"fine": 75.1, "coarse": 64.0}}'
            )
    return _by_part(content)


def _by_part(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Put figures NAME_PART together by their name, and with the figure of that name, "all"."""
    found: dict[str, Any] = {}
    for key, value in figures.items():
        name, part = _PART.fullmatch(key).groups() if _PART.fullmatch(key) else (key, "all")
        found.setdefault(name, {}).update(value if isinstance(value, Mapping) else {part: value})
    return {name: parts["all"] if parts.keys() == {"all"} else parts for name, parts in found.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds {type(content).__name__}; expected an object with figures by name")
    return content


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
