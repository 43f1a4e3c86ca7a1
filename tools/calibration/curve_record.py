"""The file of token curves, from which an interrupted run continues.

It holds a JSON object a line: the settings, then each photo's name and curve, or why it has none.
"""

import base64
import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apt_dense.patches.calibration import FACTORS

#: What coarse patches hide, by column: coarse patches, those with more than one class, pixels on borders between
#: classes under coarse patches, and in all, small objects under coarse patches, and in all.
HIDDEN = "coarse", "mixed", "border", "borders", "hidden_objects", "small_objects"


class PhotoCurve(NamedTuple):
    """The patches of a photo at each of ``FACTORS``, or why there are none.

    Args:
        patches: (F, num_scales).
        hidden: (F, 6), with labels, the columns ``HIDDEN`` (``apt_dense.patches.labels_under_coarse_patches``).
        padded: cells of an image with its padding, where it may have some.
    """

    path: str
    patches: np.ndarray | None
    error: str = ""
    hidden: np.ndarray | None = None
    padded: int | None = None

    @property
    def cells(self) -> int:
        """Cells that tokens are a share of."""
        if self.padded is not None:
            return self.padded
        return int(self.patches[0] @ 4 ** np.arange(self.patches.shape[1]))


def as_line(curve: PhotoCurve) -> str:
    """A curve as a line of the file."""
    entry: dict[str, Any] = {"photo": curve.path}
    if curve.patches is None:
        entry["error"] = curve.error
    else:
        entry["patches"] = _pack(curve.patches)
    if curve.hidden is not None:
        entry["hidden"] = _pack(curve.hidden)
    if curve.padded is not None:
        entry["padded"] = curve.padded
    return json.dumps(entry) + "\n"


def _pack(numbers: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(numbers, "<i4").tobytes())).decode()


def _unpack(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i4").reshape(len(FACTORS), -1)


def read_curves(record: Path, settings: dict[str, Any]) -> Iterator[PhotoCurve]:
    """Read a file of curves one by one; a last line that was cut short is removed from it.

    Raises:
        ValueError: if it was made with other settings, or is damaged.
    """
    if not record.exists():
        return
    _drop_unfinished_line(record)
    with record.open(encoding="utf-8") as file:
        head = file.readline()
        if head and _settings_of(head, record) != json.loads(json.dumps(settings)):
            raise ValueError(
                f"{record} was made with other settings or photos ({_differences(json.loads(head), settings)}); give "
                f"those again, another --out, or --force"
            )
        for number, line in enumerate(file, start=2):
            try:
                yield _from_line(line)
            except (ValueError, KeyError, TypeError, zlib.error) as error:
                raise ValueError(f"{record}, line {number}, is damaged; pass --force to measure again") from error


def _settings_of(head: str, record: Path) -> dict[str, Any]:
    """The first line. Raises ValueError if it is no object."""
    with suppress(ValueError):
        if isinstance(settings := json.loads(head), dict):
            return settings
    raise ValueError(f"{record}, line 1, is damaged; pass --force to measure again")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    now = json.loads(json.dumps(now))
    return ", ".join(
        f"{key}: {before.get(key)} before" for key in sorted({*before, *now}) if before.get(key) != now.get(key)
    )


def _drop_unfinished_line(record: Path) -> None:
    content = record.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with record.open("r+b") as file:
            file.truncate(whole)


def _from_line(line: str) -> PhotoCurve:
    entry = json.loads(line)
    if "error" in entry:
        return PhotoCurve(entry["photo"], None, entry["error"])
    hidden = _unpack(entry["hidden"]) if "hidden" in entry else None
    if hidden is not None and hidden.shape[1] != len(HIDDEN):
        raise ValueError(f"{hidden.shape[1]} columns of labels, expected {len(HIDDEN)}")
    return PhotoCurve(entry["photo"], _unpack(entry["patches"]), hidden=hidden, padded=entry.get("padded"))
