"""Find the images and masks of a segmentation data set in folders of any usual names."""

import logging
import os
from pathlib import Path
from typing import Any

from apt_dense.hosts.coco_lenient_values import plural
from apt_dense.hosts.mask_file_names import common_ending

SUFFIXES = ".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"
#: What the folder of a split may be called.
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test", "testing")}
#: Folders of images and of masks; the first pair that exists is taken.
LAYOUTS = (
    ("images/{}", "masks/{}"),
    ("images/{}", "annotations/{}"),
    ("images/{}", "labels/{}"),
    ("img_dir/{}", "ann_dir/{}"),
    ("{}/images", "{}/masks"),
    ("{}/images", "{}/labels"),
    ("{}", "{}annot"),  # CamVid as in SegNet's tutorial
    ("{}", "{}_labels"),
    ("{}", "{}_masks"),
)
#: Pascal VOC's: all images in one folder, and a list of names for each split.
VOC = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation/{}.txt"

log = logging.getLogger(__name__)


def find_folders(root: Path, split: str) -> dict[str, Any]:
    """Find the folders of a split ("train", "val" or "test") below ``root``.

    Returns:
        The arguments ``data_prefix`` and, in Pascal VOC's layout, ``ann_file`` of a data set, relative to ``root``.

    Raises:
        FileNotFoundError: if there are none, naming what was looked for.
    """
    for name in SPLITS[split]:
        images, masks, names = (part.format(name) for part in VOC)
        if (root / names).is_file() and (root / images).is_dir() and (root / masks).is_dir():
            return {"data_prefix": {"img_path": images, "seg_map_path": masks}, "ann_file": names}
        for images, masks in LAYOUTS:
            if (root / images.format(name)).is_dir() and (root / masks.format(name)).is_dir():
                return {"data_prefix": {"img_path": images.format(name), "seg_map_path": masks.format(name)}}
    usual = " or ".join(f"{images.format(split)} with {masks.format(split)}" for images, masks in LAYOUTS)
    found = f"it holds {', '.join(sorted(os.listdir(root))[:8])}" if root.is_dir() else "it does not exist"
    raise FileNotFoundError(
        f"no {split} data in {root} ({found}); expected the folders {usual}, each file of one named as in the other"
    )


def picture_files(folder: Path) -> dict[str, Path]:
    """Map the path below ``folder``, without suffix, of each picture to the picture.

    Raises:
        ValueError: if two differ in nothing but the suffix.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"{found[name]} and {path} have the same name; remove one of them")
        found[name] = path
    return found


def pair_files(images: Path, masks: Path, listed: Path | None = None) -> list[tuple[Path, Path]]:
    """Pair the images of a folder with the masks of another, by name: sky/1.jpg with sky/1.png, or with sky/1_L.png if
    all masks end in "_L".

    Args:
        listed: a file with the names to use, one a line; None uses all images.

    Raises:
        FileNotFoundError: if there are no images, or some have no mask.
    """
    pictures, targets = picture_files(images), picture_files(masks)
    if listed is not None:
        names = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
        absent = [name for name in names if name not in pictures]
        if absent:
            raise FileNotFoundError(f"{len(absent)} of the names in {listed} are not in {images}, such as {absent[0]}")
        pictures = {name: pictures[name] for name in names}
    if not pictures:
        raise FileNotFoundError(f"{images} holds no image ({' '.join(SUFFIXES)})")
    ending = common_ending(pictures, targets)
    unpaired = [path for name, path in pictures.items() if name + ending not in targets]
    if unpaired:
        raise FileNotFoundError(
            f"{len(unpaired)} of {plural(len(pictures), 'image')} in {images} have no mask in {masks}, such as "
            f"{unpaired[0].name}; expected files of the same names there"
        )
    unused = len(targets) - len(pictures)
    if unused and listed is None:
        log.warning("%s: %s without an image, left out", masks, plural(unused, "mask"))
    return [(path, targets[name + ending]) for name, path in pictures.items()]
