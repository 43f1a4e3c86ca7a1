"""Read YOLO's annotations: one text file a picture, a line an object, coordinates as shares of the picture's sides.

    CLASS X Y WIDTH HEIGHT        a box by its centre
    CLASS X Y X Y X Y ...         a polygon, of at least three points

Other readers lose data without a word: supervision 0.31 rasterises polygons, and takes a picture whose text file is
missing for one without objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from apt_dense.option_checks import choice

from annotation_formats.labelled_pictures import (
    SPLITS,
    UNLABELLED,
    Findings,
    Labelled,
    Picture,
    Size,
    finite,
    fitted,
    into_splits,
    photos_below,
    sizes_of,
    split_of,
)
from shared.photo_files import is_photo

SLACK = 0.01  # share of a side by which coordinates may leave their picture: rounding, not another unit


def read_yolo(
    root: Path, names: Sequence[str] | None, unlabelled: str, val_share: float | None, findings: Findings
) -> tuple[dict[str, list[Picture]], list[str]]:
    """Read a data set: its splits, with the pictures of each, and the names of its classes.

    Args:
        root: data.yaml, or a folder that holds it, or pictures in images/ with their text files in labels/.
        names: of the classes, in order; None takes those of data.yaml.
        unlabelled: a picture without a text file is an "error", "background" without objects, or to "skip".
        val_share: as for ``into_splits``.

    Raises:
        FileNotFoundError: if there are no pictures, or no names.
        ValueError: if data.yaml is damaged or the splits cannot be told, or ``unlabelled`` is none of these.
    """
    choice(*UNLABELLED)("unlabelled", unlabelled)
    description = root if root.is_file() else _description(root)
    if description is not None:
        content = _read_yaml(description)
        names = list(names or _names(content, description))
        photos = _photos_of_splits(content, description)
    else:
        if names is None:
            raise FileNotFoundError(f"{root} holds no data.yaml with the names of the classes; give --classes FILE")
        photos = {None: photos_below(root / "images" if (root / "images").is_dir() else root)}
    if not any(photos.values()):
        raise FileNotFoundError(f"there is no picture in {root}; expected data.yaml, or images/ and labels/")
    read = {split: _read_all(paths, names, unlabelled, findings) for split, paths in photos.items()}
    if set(read) == {"train"} and val_share is not None:  # data.yaml names no other
        read = into_splits(read["train"], lambda picture: None, val_share)
    elif None in read:
        inside = root / "images" if (root / "images").is_dir() else root
        base = inside if root.is_dir() else root.parent
        read = into_splits(read[None], lambda picture: _split_below(picture.path, base), val_share)
    elif val_share is not None:
        raise ValueError(f"--val-share is for data without splits, but {description} names {list(read)}")
    return read, list(names)


def _split_below(path: Path, base: Path) -> str | None:
    return split_of(path.relative_to(base)) if path.is_relative_to(base) else None


def _description(root: Path) -> Path | None:
    found = [path for pattern in ("*.yaml", "*.yml") for path in sorted(root.glob(pattern))]
    if len(found) > 1:
        raise ValueError(f"{root} holds several descriptions, {', '.join(map(str, found))}; name one of them")
    return found[0] if found else None


# ---- data.yaml ------------------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}; expected names, train and val")
    if "kpt_shape" in content:
        raise ValueError(
            f"{path} describes key points (kpt_shape), which are not converted; only boxes and polygons are"
        )
    return content


def _names(content: dict[str, Any], path: Path) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        by_number = {int(number): name for number, name in names.items()}
        names = [by_number[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        raise ValueError(
            f"{path} has names: {names}; expected a list, or numbers from 0 with a name each, all different"
        )
    return list(map(str, names))


def _photos_of_splits(content: dict[str, Any], path: Path) -> dict[str, list[Path]]:
    photos = {}
    for key, entries in content.items():
        if key not in SPLITS or not entries:
            continue
        parts = entries if isinstance(entries, list) else [entries]
        found = [photo for entry in parts for photo in _photos(_place(str(entry), content, path))]
        photos[SPLITS[key]] = list(dict.fromkeys(found))
    if not photos:
        raise ValueError(f"{path} names neither train nor val; expected the folders of their pictures")
    return photos


def _place(entry: str, content: dict[str, Any], path: Path) -> Path:
    """Find a folder or list of pictures: below ``path`` in data.yaml, or next to data.yaml."""
    bases = [path.parent / str(content.get("path") or ""), path.parent]
    bare = entry.removeprefix("./")
    while bare.startswith("../"):  # some programs write ../train/images for train/images
        bare = bare.removeprefix("../")
    places = [base / name for base in bases for name in (entry, bare)]
    for place in places:
        if place.exists():
            return place
    raise FileNotFoundError(
        f"{path} names {entry}, but there is neither {' nor '.join(map(str, dict.fromkeys(places)))}"
    )


def _photos(place: Path) -> Iterable[Path]:
    """Yield the pictures of a folder, or those that a text file lists."""
    if place.is_dir():
        yield from photos_below(place)
        return
    for line in place.read_text(encoding="utf-8").splitlines():
        if line.strip():
            photo = Path(line.strip())
            photo = photo if photo.is_absolute() else place.parent / photo
            if not is_photo(photo):
                raise FileNotFoundError(f"{place} lists {line.strip()}, but there is no picture {photo}")
            yield photo


# ---- one file -------------------------------------------------------------------------------------------------------


def _read_all(photos: Sequence[Path], names: Sequence[str], unlabelled: str, findings: Findings) -> list[Picture]:
    described: dict[Path, Path] = {}
    for photo in photos:
        path = label_file(photo)
        first = described.setdefault(path, photo)
        if first != photo and path.is_file():
            findings.problem(photo, f"{path} has the labels of {first.name}, too; rename one of the pictures")
    pictures = [_read(photo, names, unlabelled, findings) for photo in tqdm(photos, "reading", unit="file", delay=2)]
    return [picture for picture in pictures if picture is not None]


def label_file(photo: Path) -> Path:
    """Return where YOLO has the labels of a picture: labels/ in place of the last images/ of its path, or beside."""
    parts = list(photo.parts)
    places = [place for place, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def _read(photo: Path, names: Sequence[str], unlabelled: str, findings: Findings) -> Picture | None:
    path, objects = label_file(photo), []
    sizes = sizes_of(photo, findings)
    if not sizes:
        return None
    if path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            findings.problem(path, f"it is not text ({error})")
            return None
        read = [_read_line(line, f"{path}, line {number}", names, sizes[0], findings)
                for number, line in enumerate(lines, start=1) if line.strip()]  # fmt: skip
        objects = [entry for entry in read if entry is not None]
    elif unlabelled == "error":
        findings.problem(
            photo,
            f"it has no {path}; add --unlabelled background if such pictures show no object, or --unlabelled skip",
        )
        return None
    else:
        background = unlabelled == "background"
        findings.note(
            f"picture without a text file, {'taken for one without objects' if background else 'left out'}", photo
        )
        if not background:
            return None
    return Picture(photo, sizes[0], objects)


def _read_line(line: str, where: str, names: Sequence[str], size: Size, findings: Findings) -> Labelled | None:
    values = finite(line.split())
    if values is None or (len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0)):
        findings.problem(
            where, f"{line[:60]!r} has {len(line.split())} values; expected CLASS X Y WIDTH HEIGHT, or CLASS and points"
        )
        return None
    number, shares = values[0], values[1:]
    if number != int(number) or not 0 <= number < len(names):
        findings.problem(where, f"class {number:g}; the classes are 0 to {len(names) - 1}")
        return None
    if min(shares) < -SLACK or max(shares) > 1 + SLACK:
        findings.problem(where, f"{line[:60]!r} has values outside of 0 to 1; expected shares of the picture's sides")
        return None
    height, width = size
    pixels = [share * (height if place % 2 else width) for place, share in enumerate(shares)]
    box, outline = None, None
    if len(pixels) == 4:
        x, y, w, h = pixels
        box = (x - w / 2, y - h / 2, w, h)
    else:
        outline = pixels
    return fitted(Labelled(names[int(number)], box, outline, where), size, findings)
