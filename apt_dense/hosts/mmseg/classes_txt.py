"""Read classes.txt: which values or colours of a mask are which class, and which pixels are ignored.

# VALUE NAME, or R G B NAME, one a line. Lines of the same name are one class; "void" is neither learned nor scored.
0 background
255 crack
128 void
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from apt_dense.hosts.coco_lenient_values import plural, short

VOID = "void"
IGNORED = 255  # MMSegmentation's own default in losses, metrics and padding
EXPECTED = (
    "a line 'VALUE NAME' for each value in the masks, or 'R G B NAME' for each colour, such as '0 background'; the "
    "name 'void' stands for pixels that are neither learned nor scored"
)
_UNLISTED = 254
_LINE = re.compile(r"(\d+)(?:[\s,]+(\d+)[\s,]+(\d+))?[\s,]+([^\d\s,].*)")
_MODES = "1", "L", "P", "I", "I;16", "RGB", "RGBA"  # Pillow's


class ClassTable(NamedTuple):
    """The content of a classes.txt.

    Args:
        path: the file.
        names: of the classes, in order of their first lines; the first one is label 0.
        palette: (R, G, B) of each class, for drawings.
        keys: value, or R * 65536 + G * 256 + B, of each line -> label.
        has_colours: whether lines give colours.
    """

    path: Path
    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    keys: dict[int, int]
    has_colours: bool

    def show(self, key: int) -> str:
        """Return a key as the file writes it: "7", or "128 0 64"."""
        return " ".join(map(str, _colour(key))) if self.has_colours else str(key)


def read_classes(path: Path) -> ClassTable:
    """Read a classes.txt.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: for lines in another form, a value that is listed twice, and less than two classes.
    """
    lines = _lines(path)
    with_colours = [line.group(2) is not None for _, line in lines]
    if len(set(with_colours)) > 1:
        raise ValueError(f"{path} lists both values and colours; expected {EXPECTED}")
    names: dict[str, tuple[int, int, int] | None] = {}
    keys: dict[int, int] = {}
    for number, line in lines:
        key, name = _key(line, path, number), line.group(4).strip()
        if key in keys:
            raise ValueError(f"{path}, line {number}: {line.group(0)!r} lists a value or colour a second time")
        if name.lower() == VOID:
            keys[key] = IGNORED
        else:
            names.setdefault(name, _colour(key) if any(with_colours) else None)
            keys[key] = list(names).index(name)
    if not 2 <= len(names) < _UNLISTED:
        raise ValueError(f"{path} lists {plural(len(names), 'class', 'classes')}; expected 2 to {_UNLISTED - 1}")
    palette = tuple(colour or _distinct_colour(label) for label, colour in enumerate(names.values()))
    return ClassTable(path, tuple(names), palette, keys, any(with_colours))


def _lines(path: Path) -> list[tuple[int, re.Match]]:
    """Return number and parts of each line that is not empty or a comment."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; write {EXPECTED}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); expected {EXPECTED}") from error
    found = []
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if line and not line.startswith("#"):
            parts = _LINE.fullmatch(line)
            if parts is None:
                raise ValueError(f"{path}, line {number}, is {short(line)}; expected {EXPECTED}")
            found.append((number, parts))
    return found


def _key(line: re.Match, path: Path, number: int) -> int:
    values = [int(value) for value in line.groups()[:3] if value is not None]
    most = 255 if len(values) == 3 else 65535
    if max(values) > most:
        raise ValueError(f"{path}, line {number}: {line.group(0)!r} has a number above {most}")
    return values[0] if len(values) == 1 else (values[0] << 16) + (values[1] << 8) + values[2]


def _colour(key: int) -> tuple[int, int, int]:
    return key >> 16, key >> 8 & 255, key & 255


def _distinct_colour(label: int) -> tuple[int, int, int]:
    """Return a colour far from those of nearby labels: three bits of the label at a time become the highest bits of
    red, green and blue, as in Pascal VOC's palette."""
    label, colour = label + 1, [0, 0, 0]
    for place in range(7, -1, -1):
        for channel in range(3):
            colour[channel] |= (label >> channel & 1) << place
        label >>= 3
    return tuple(colour)


# ---- masks ----------------------------------------------------------------------------------------------------------


def read_keys(path: Path, has_colours: bool) -> np.ndarray:
    """Read a mask's file as the keys of a ``ClassTable``, (H, W).

    Raises:
        ValueError: if it is damaged, or has colours where values are listed.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            pixels = np.asarray(image.convert("RGB") if has_colours and mode in _MODES else image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable mask ({error}); replace it or its image") from error
    if mode not in _MODES:
        raise ValueError(f"{path} is an image of the kind {mode}; expected a mask of 8 or 16 bits, or colours")
    if pixels.ndim == 2:
        return pixels.astype(np.int64)
    red, green, blue = (pixels[..., channel].astype(np.int64) for channel in range(3))
    if has_colours:
        return (red << 16) + (green << 8) + blue
    if not (np.array_equal(red, green) and np.array_equal(red, blue)):
        raise ValueError(f"{path} has colours, but classes.txt lists values; list 'R G B NAME' there")
    return red


def to_labels(path: Path, table: ClassTable) -> np.ndarray:
    """Read a mask's file as labels, (H, W) uint8: 0 for the first class, 255 for void.

    Raises:
        ValueError: as :func:`read_keys`, and for values that the table does not list.
    """
    keys, of_key = read_keys(path, table.has_colours), _labels_of_keys(tuple(table.keys.items()))
    inside = np.clip(keys, 0, len(of_key) - 1)
    labels = of_key[inside]
    wrong = np.unique(keys[(labels == _UNLISTED) | (inside != keys)])
    if wrong.size:
        raise ValueError(unlisted(path, wrong.tolist(), table))
    return labels


@lru_cache(maxsize=4)
def _labels_of_keys(keys: Sequence[tuple[int, int]]) -> np.ndarray:
    """Tabulate the label of each key, for masks by the thousand."""
    labels = np.full(2**16 if max(key for key, _ in keys) < 2**16 else 2**24, _UNLISTED, np.uint8)
    for key, label in keys:
        labels[key] = label
    return labels


def unlisted(path: Path, keys: Sequence[int], table: ClassTable) -> str:
    """Describe values or colours of a mask that a table does not list, and what to do about them."""
    what = "colour" if table.has_colours else "value"
    shown = ", ".join(map(table.show, keys[:20])) + (", ..." if len(keys) > 20 else "")
    advice = f"add lines such as '{table.show(keys[0])} NAME', or '{table.show(keys[0])} void' to ignore them"
    if path.suffix.lower() in (".jpg", ".jpeg"):
        advice = "a JPEG changes values when it is saved: use the masks' original PNG files"
    return f"{path} holds {plural(len(keys), what)} that {table.path} does not list: {shown}; {advice}"
