"""Photos with masks of classes, and the mIoU of what was found on them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

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


def count(found: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Pixels of each class (row) that were given each class (column).

    Raises:
        ValueError: for a label that the model does not know.
    """
    counted = labels != IGNORED
    if labels[counted].max(initial=0) >= classes:
        raise ValueError(f"a mask has class {labels[counted].max()}, and the model {classes} classes, from 0")
    pairs = labels[counted].astype(np.int64) * classes + found[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def scores_from(confusion: np.ndarray) -> Mapping[str, float]:
    """Mean intersection over union of the classes that occur, and the share of pixels that are right."""
    right = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - right
    return {
        "mIoU": float((right[union > 0] / union[union > 0]).mean()),
        "accuracy": float(right.sum() / max(confusion.sum(), 1)),
    }


def percentages(predictions: Iterable[tuple[Tensor, Tensor]], classes: int) -> dict[str, float]:
    """mIoU and pixel accuracy in per cent, of batches of predicted and true classes (B, H, W)."""
    confusion = np.zeros((classes, classes), np.int64)
    for found, masks in predictions:
        confusion += count(found.cpu().numpy(), masks.cpu().numpy(), classes)
    return {name: 100 * value for name, value in scores_from(confusion).items()}
