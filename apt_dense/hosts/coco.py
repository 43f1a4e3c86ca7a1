"""Find, read and check a data set in COCO's layout: for Detectron2 and torchvision alike.

Both train on what :func:`load_split` returns, so both have the same idea of a valid data set. Neither a host nor
pycocotools is imported, and of pictures only the headers are read.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apt_dense.hosts.coco_annotations import LISTS, checked_lists, has_outlines, is_plain, read_json, sort_annotations
from apt_dense.hosts.coco_objects_per_class import check_objects
from apt_dense.hosts.coco_picture_sizes import check_sizes

LAYOUT = (
    "expected DIR/annotations/instances_train*.json and instances_val*.json with images in DIR/train2017 and "
    "DIR/val2017 (COCO) or below DIR/images, or DIR/coco/annotations/... with images in DIR/images/training and "
    "validation (tools/make_demo_data.py)"
)
#: What the folder of a split's images may be called, apart from the name in its annotation file ("train2017").
FOLDERS = {"train": ("train", "training"), "val": ("val", "validation")}


class CocoData(NamedTuple):
    """One split of a data set, checked.

    Args:
        path: the annotation file.
        folder: of the images.
        content: of the annotation file, without the annotations that cannot be used. The others have an area, iscrowd
            and an id, which is unique and not 0.
        is_changed: whether the annotations differ from those of the file, or hosts cannot read the file itself.
        has_masks: whether objects have masks that can be used.
    """

    path: Path
    folder: Path
    content: dict[str, Any]
    is_changed: bool
    has_masks: bool = True

    @property
    def categories(self) -> tuple[tuple[int, str], ...]:
        """Ids, which may have holes, and names, ascending."""
        named = ((category["id"], str(category.get("name", category["id"]))) for category in self.content["categories"])
        return tuple(sorted(named))


class Needs(NamedTuple):
    """Requirements of a model and its host on a data set.

    Args:
        masks: every object needs a segmentation; None asks for this if any has one.
        upright: sizes of images are those after turning them as EXIF says.
        every_class: each class needs an object.
    """

    masks: bool | None = True
    upright: bool = False
    every_class: bool = True


def load_split(root: str | Path, split: str, masks: bool | None = True, **needs: bool) -> CocoData:
    """Read one split of a data set and check that it can be used.

    Annotations of images that are not listed, with an empty box, outside of their image, or with an outline of less
    than three points are left out, with a count in the log. Crowds (iscrowd) stay, since COCO's evaluation needs them.

    Args:
        root: folder of the data set.
        split: "train" or "val".
        masks: whether the model has masks, so that every object needs a segmentation; None if the data may decide:
            they have masks if any object has a segmentation.
        **needs: other fields of :class:`Needs`.

    Raises:
        FileNotFoundError: if a folder, an annotation file or an image is missing.
        ValueError: if an annotation file is damaged, contradicts itself or its images, or has nothing to learn.
    """
    path = find_annotations(Path(root).expanduser(), split)
    return read_split(path, None, split, Needs(masks, **needs))


def read_split(path: Path, folder: Path | None, split: str, needs: Needs) -> CocoData:
    """Read and check a split as :func:`load_split`, from its annotation file and the folder of its images (None: one
    of the usual folders)."""
    return check_split(read_json(path), path, folder, split, needs)


def check_split(written: dict[str, Any], path: Path, folder: Path | None, split: str, needs: Needs) -> CocoData:
    """Check the content of an annotation file, which need not be written yet, as :func:`read_split`."""
    content = checked_lists(written, path)
    masks = has_outlines(content) if needs.masks is None else needs.masks
    names = [image["file_name"] for image in content["images"]]
    folder = find_images(path, split, names) if folder is None else folder
    _check_files(path, folder, names)
    check_sizes(path, folder, content["images"], needs.upright)
    usable = sort_annotations(content, path, masks)
    check_objects(content, usable, path, split, needs.every_class)
    content = {**content, "annotations": usable.annotations}
    unreadable = path.is_file() and not is_plain(path)
    return CocoData(path, folder, content, unreadable or any(content[key] != written[key] for key in LISTS), masks)


def check_same_categories(
    found: Iterable[Sequence], expected: Iterable[Sequence], source: str | Path, reference: str | Path
) -> None:
    """Raise ValueError unless two lists of (category id, name) agree: label numbers follow from them."""
    found, expected = ([tuple(pair) for pair in pairs] for pairs in (found, expected))
    if found != expected:
        raise ValueError(
            f"the categories (id, name) of {source} differ from those of {reference}: {found[:5]} ({len(found)}) "
            f"against {expected[:5]} ({len(expected)}); both files need the same list"
        )


# ---- files ----------------------------------------------------------------------------------------------------------


def find_annotations(root: Path, split: str) -> Path:
    """Find the annotation file of a split: that of 2017, the one without a suffix, or the only one."""
    folders = root / "annotations", root / "coco" / "annotations"
    found = [path for folder in folders for path in sorted(folder.glob(f"instances_{split}*.json"))]
    if not found:
        what = "holds no" if root.is_dir() else "does not exist, so there is no"
        raise FileNotFoundError(f"{root} {what} annotations/instances_{split}*.json; {LAYOUT}")
    for preferred in (f"instances_{split}2017", f"instances_{split}"):
        named = [path for path in found if path.stem == preferred]
        if len(named) == 1:
            return named[0]
    if len(found) > 1:
        several = ", ".join(map(str, found))
        raise ValueError(f"{root} holds several annotation files for {split}, {several}; keep one there")
    return found[0]


def find_images(path: Path, split: str, names: Sequence[str]) -> Path:
    """Find the first of the usual folders that holds an image of the split."""
    called = tuple(dict.fromkeys([path.stem.removeprefix("instances_"), *FOLDERS[split]]))
    bases = path.parent.parent, path.parent.parent.parent
    inside = [base / folder / name for base in bases for folder in ("", "images") for name in called]
    places = [*inside, *(base / folder for base in bases for folder in ("images", ""))]
    for place in dict.fromkeys(places):
        if any((place / name).is_file() for name in names[:10]):
            return place
    tried = ", ".join(str(place) for place in inside[: 2 * len(called)])
    raise FileNotFoundError(f"no image that {path} lists ({names[0]}, ...) is in {tried}; {LAYOUT}")


def _check_files(path: Path, folder: Path, names: Sequence[str]) -> None:
    # One listing per folder instead of a look at each file, which is slow on network storage.
    parents = {os.path.dirname(name) for name in names}
    present = {parent: _listing(folder / parent) for parent in parents}
    absent = [name for name in names if os.path.basename(name) not in present[os.path.dirname(name)]]
    if absent:
        raise FileNotFoundError(
            f"{len(absent)} of the {len(names)} images that {path} lists are not in {folder}, such as {absent[0]}; "
            f"copy them there or take them off the list"
        )


def _listing(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()
