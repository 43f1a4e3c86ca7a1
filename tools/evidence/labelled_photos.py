"""Photos with masks of classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from apt_dense.hosts.mask_file_names import common_ending

from shared.photo_files import evenly_spread, is_photo

IGNORED = 255


class Labelled(NamedTuple):
    """A photo and its mask."""

    photo: Path
    mask: Path


def find_pairs(images: Sequence[Path], masks: Sequence[Path], limit: int | None = None) -> Sequence[Labelled]:
    """Photos of folders with the masks (PNG) of the same name in the folder of the same place in ``masks``: 1.jpg with
    1.png, or with 1_L.png if all masks of that folder end in "_L".

    Raises:
        ValueError: if a folder or a mask is missing, or there are not as many folders.
    """
    if len(images) != len(masks):
        raise ValueError(f"{len(images)} folders of images and {len(masks)} of masks; give one for each")
    pairs = []
    for folder, beside in zip(images, masks, strict=True):
        photos = [path for path in sorted(folder.glob("*")) if is_photo(path)]
        ending = common_ending((path.stem for path in photos), (path.stem for path in beside.glob("*.png")))
        found = [Labelled(path, beside / f"{path.stem}{ending}.png") for path in photos]
        missing = [pair.mask for pair in found if not pair.mask.is_file()]
        if missing or not found:
            raise ValueError(f"{folder}: {len(found)} images, {len(missing)} without a mask in {beside}")
        pairs += found
    return evenly_spread(pairs, limit)


def read_labels(path: Path, zero_is_void: bool) -> np.ndarray:
    """A mask (H, W) uint8, ``IGNORED`` where nothing is counted."""
    labels = np.asarray(Image.open(path))
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise ValueError(f"{path}: expected 8-bit labels (H, W), not {labels.dtype} {labels.shape}")
    if not zero_is_void:
        return labels
    return np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1).astype(np.uint8)
