"""The 2018 Data Science Bowl's nuclei to COCO's layout.

Theirs: ``stage1_train/ID/images/ID.png`` and a mask a nucleus, ``stage1_train/ID/masks/*.png``, 0 and 255.
"""

from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from annotation_formats.coco_instances import Written, write_splits
from annotation_formats.labelled_pictures import Labelled, Picture
from demo.dataset import mask_polygons
from shared.photo_files import read_photo

HELD_OUT = 4  # every fourth picture of a size is for validation
NAME = "nucleus"


def prepare_nuclei(source: Path, out: Path) -> list[Written]:
    """Write OUT/annotations/instances_{train,val}.json, which name the pictures where they are.

    Args:
        source: the folder ``stage1_train``, or one that holds it.

    Raises:
        ValueError, OSError: for a folder without pictures, one without masks, or a mask that does not fit its picture.
    """
    source = source / "stage1_train" if (source / "stage1_train").is_dir() else source
    folders = sorted(path.parent for path in source.glob("*/images"))
    if not folders:
        raise ValueError(f"{source}: expected folders with images/ and masks/, as in stage1_train")
    pictures = [_picture(folder) for folder in tqdm(folders, "pictures", leave=False)]
    pictures.sort(key=lambda picture: picture.size)  # stable: each size in the same order, and in both splits
    held_out = [number % HELD_OUT == 1 for number in range(len(pictures))]
    splits = {
        "train": [picture for picture, out_of in zip(pictures, held_out, strict=True) if not out_of],
        "val": [picture for picture, out_of in zip(pictures, held_out, strict=True) if out_of],
    }
    return write_splits(splits, [NAME], out)


def _picture(folder: Path) -> Picture:
    (path,) = sorted((folder / "images").glob("*.png")) or [folder / "images" / f"{folder.name}.png"]
    size = read_photo(path).shape[:2]
    found = [_nucleus(mask, size) for mask in sorted((folder / "masks").glob("*.png"))]
    if not found:
        raise ValueError(f"{folder / 'masks'} holds no masks")
    return Picture(path, size, [nucleus for nucleus in found if nucleus is not None])


def _nucleus(path: Path, size: tuple[int, int]) -> Labelled | None:
    """A nucleus by its largest part; None if nothing is marked."""
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if mask is None or mask.shape != size:
        raise ValueError(f"{path}: expected a mask of {size}, not {None if mask is None else mask.shape}")
    solid = (mask > 127).astype(np.uint8)
    outlines = mask_polygons(solid)
    if not outlines:
        return None
    points = max((np.array(outline, np.float32).reshape(-1, 2) for outline in outlines), key=cv2.contourArea)
    (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
    return Labelled(NAME, (left, top, right - left, bottom - top), points.ravel().tolist(), str(path))
