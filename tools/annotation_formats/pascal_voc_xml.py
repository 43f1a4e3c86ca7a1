"""Read Pascal VOC's annotations: one XML file a picture, boxes in pixels and, in some data sets, polygons.

Other readers lose data without a word: supervision 0.31 rasterises polygons, forgets which objects are difficult, and
takes a picture whose XML file is missing for one without objects.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

from apt_dense.option_checks import Options, choice, flag, option, optional, whole

from annotation_formats.labelled_pictures import (
    UNLABELLED,
    Findings,
    Picture,
    fitted,
    into_splits,
    photos_below,
    sizes_of,
    split_of,
)
from annotation_formats.pascal_voc_object import read_object, read_size

#: Usual folders, the first that exists.
IMAGES, ANNOTATIONS = ("JPEGImages", "images"), ("Annotations", "annotations")


def _folder(name: str, value: object) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}={value!r} must be the path of a folder")
    return Path(value)


@dataclass(frozen=True)
class VocOptions(Options):
    """How to read the data set.

    Args:
        images, annotations: folders; None looks for the usual ones.
        first_pixel: number of the first row and column: 1 in Pascal VOC, 0 in what some programs write.
        ignore_difficult: take objects marked as difficult for ones that are neither learned nor scored, as Pascal VOC's
            evaluation does.
        unlabelled: a picture without an XML file is an "error", "background" without objects, or to "skip".

    Raises:
        ValueError, TypeError: for a value of another type or out of range, naming it.
    """

    images: Path | None = option(None, optional(_folder))
    annotations: Path | None = option(None, optional(_folder))
    first_pixel: int = option(1, whole(0, 1))
    ignore_difficult: bool = option(False, flag)
    unlabelled: str = option("error", choice(*UNLABELLED))


def read_voc(root: Path, options: VocOptions, val_share: float | None, findings: Findings) -> dict[str, list[Picture]]:
    """Read a data set: its splits, with the pictures of each.

    Splits are those of ImageSets/Main/{train,val,test}.txt, or of folders called train, val and test, or are made.

    Raises:
        FileNotFoundError: if there are no XML files or no pictures.
        ValueError: if the splits cannot be told.
    """
    annotations = options.annotations or _first_with(root, ANNOTATIONS, "*.xml")
    images = options.images or _first_with(root, IMAGES, "*")
    files = sorted(annotations.rglob("*.xml"))
    photos = photos_below(images)
    if not files or not photos:
        missing = f"XML file below {annotations}" if not files else f"picture below {images}"
        raise FileNotFoundError(f"there is no {missing}; name the folders with --annotations and --images")
    finder = _PictureFinder(photos, images, annotations)
    read = [_read_file(path, finder, options, findings) for path in tqdm(files, "reading", unit="file", delay=2)]
    pictures = [picture for picture in read if picture is not None]
    pictures += _without_file(finder, options.unlabelled, findings)
    lists = _lists(root)
    if lists:
        return _by_lists(pictures, lists, root, findings)
    return into_splits(pictures, lambda picture: split_of(picture.path.relative_to(images)), val_share)


def _first_with(root: Path, names: Sequence[str], pattern: str) -> Path:
    return next((root / name for name in names if any((root / name).rglob(pattern))), root)


# ---- pictures -------------------------------------------------------------------------------------------------------


class _PictureFinder:
    """Finds the picture of an XML file: the one of its name, or else of the name inside."""

    def __init__(self, photos: Sequence[Path], images: Path, annotations: Path) -> None:
        self.annotations, self.images, self.unused = annotations, images, dict.fromkeys(photos)
        self.by_stem: dict[str, list[Path]] = {}
        self.by_name: dict[str, list[Path]] = {}
        for photo in photos:
            self.by_stem.setdefault(photo.relative_to(images).with_suffix("").as_posix(), []).append(photo)
            self.by_name.setdefault(photo.name, []).append(photo)

    def find(self, path: Path, inside: str, findings: Findings) -> Path | None:
        """Return the picture of an XML file that names the picture ``inside``; None, with a problem, if unclear."""
        named = self.by_name.get(re.split(r"[/\\]", inside)[-1], [])
        alike = self.of_name(path)
        both = [photo for photo in alike if photo in named]
        found = both or alike or named
        taken = [photo for photo in found if photo not in self.unused]
        for photo in {*alike, *named} if len(found) != 1 else found:
            self.unused.pop(photo, None)
        if alike and named and not both:
            problem = f"it names the picture {inside}, but {alike[0].name} is called as the file; correct one"
        elif len(found) != 1:
            count = f"{len(found)} pictures are" if found else "no picture is"
            problem = f"{count} called as the file or {inside or '(no name inside)'} in {self.images}"
        elif taken:
            problem = f"another file describes {found[0].name}, too"
        else:
            return found[0]
        findings.problem(path, problem)
        return None

    def of_name(self, path: Path) -> list[Path]:
        """Return the pictures that are called as an XML file, apart from their suffix."""
        return self.by_stem.get(path.relative_to(self.annotations).with_suffix("").as_posix(), [])

    def forget(self, path: Path) -> None:
        """Take the pictures of an XML file that cannot be read for described: they are not empty."""
        for photo in self.of_name(path):
            self.unused.pop(photo, None)


def _without_file(finder: _PictureFinder, unlabelled: str, findings: Findings) -> list[Picture]:
    if unlabelled == "skip":
        for photo in finder.unused:
            findings.note("picture without an XML file, left out", photo)
        return []
    pictures = []
    for photo in finder.unused:
        if unlabelled == "error":
            findings.problem(photo, "it has no XML file; add --unlabelled background if it shows no object, or skip")
        elif sizes := sizes_of(photo, findings):
            findings.note("picture without an XML file, taken for one without objects", photo)
            pictures.append(Picture(photo, sizes[0], []))
    return pictures


# ---- one file -------------------------------------------------------------------------------------------------------


def _read_file(path: Path, finder: _PictureFinder, options: VocOptions, findings: Findings) -> Picture | None:
    try:
        # Python's expat ends the expansion of entities at a limit, and loads no external ones.
        root = ElementTree.fromstring(path.read_bytes())
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        findings.problem(path, f"it is not XML ({error})")
        return finder.forget(path)
    if root.tag != "annotation":
        findings.problem(path, f"it is XML of a <{root.tag}>; expected Pascal VOC's <annotation>")
        return finder.forget(path)
    photo = finder.find(path, (root.findtext("filename") or "").strip(), findings)
    sizes = sizes_of(photo, findings) if photo else []
    if not sizes:
        return None
    size = read_size(root, sizes, path, findings)
    if size is None:
        return None
    entries = []
    for number, node in enumerate(root.findall("object"), start=1):
        entry = read_object(node, f"{path}, object {number}", options.first_pixel, options.ignore_difficult, findings)
        entries.append(fitted(entry, size, findings) if entry else None)
    return Picture(photo, size, [entry for entry in entries if entry])


# ---- lists ----------------------------------------------------------------------------------------------------------


def _lists(root: Path) -> dict[str, list[str]]:
    """Read ImageSets/Main/{train,val,test}.txt: the names of the pictures of each split."""
    paths = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val", "test")}
    return {split: path.read_text(encoding="utf-8").split() for split, path in paths.items() if path.is_file()}


def _by_lists(
    pictures: Sequence[Picture], lists: dict[str, list[str]], root: Path, findings: Findings
) -> dict[str, list[Picture]]:
    by_stem: dict[str, Picture] = {}
    twins: dict[str, list[Path]] = {}
    for picture in pictures:
        first = by_stem.setdefault(picture.path.stem, picture)
        if first is not picture:
            twins[picture.path.stem] = [first.path, picture.path]
    for split, names in lists.items():
        path = root / "ImageSets" / "Main" / f"{split}.txt"
        for name in names:
            if name not in by_stem:
                findings.problem(path, f"it lists {name}, which was not read")
            elif name in twins:
                findings.problem(
                    path, f"it lists {name}, which may be {' or '.join(map(str, twins[name]))}; rename one"
                )
    listed = {name for names in lists.values() for name in names}
    for picture in pictures:
        if picture.path.stem not in listed:
            findings.note("picture in no list of ImageSets/Main, left out", picture.path)
    return {split: [by_stem[name] for name in names if name in by_stem] for split, names in lists.items()}
