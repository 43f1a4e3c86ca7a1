"""The label masks of photos: found by their names, and read."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from apt_dense.hosts.mask_file_names import common_ending
from apt_dense.patches.labels_under_coarse_patches import IGNORED


def find_masks(photos: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Find the mask of each photo by its name, in a folder or below it: 1.jpg with 1.png, or with 1_L.png if all masks
    end in "_L". Of several of a name, it is the one whose folders are most like the photo's: a/1.png of a/1.jpg, not
    b/1.png. Raises ValueError for photos without a mask of their own."""
    by_stem: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.png")):
        by_stem.setdefault(path.stem, []).append(path)
    ending = common_ending((photo.stem for photo in photos), by_stem)
    lacking = [photo for photo in photos if photo.stem + ending not in by_stem]
    if lacking:
        raise ValueError(
            f"--masks {folder} holds no {lacking[0].stem}{ending}.png for {lacking[0]}, nor masks for "
            f"{len(lacking) - 1} others; expected a PNG of the same name for each photo"
        )
    found = {photo: _mask_of(photo, by_stem[photo.stem + ending], folder) for photo in photos}
    shared = [mask for mask, count in Counter(found.values()).items() if count > 1]
    if shared:
        first, second, *_ = (photo for photo, mask in found.items() if mask == shared[0])
        raise ValueError(f"{first} and {second} would both have the mask {shared[0]}; keep masks in folders as photos")
    return found


def _mask_of(photo: Path, masks: Sequence[Path], folder: Path) -> Path:
    """Choose from the masks of a photo's name."""
    ranks = {mask: _likeness(photo.resolve().parent.parts, mask.parent.relative_to(folder).parts) for mask in masks}
    first, *others = sorted(masks, key=lambda mask: ranks[mask], reverse=True)
    if others and ranks[first] == ranks[others[0]]:
        raise ValueError(
            f"{photo} may have the mask {first} or {others[0]}; expected one of them in a folder of the photo's "
            f"folder's name, {photo.resolve().parent.name}"
        )
    return first


def _likeness(of_photo: Sequence[str], of_mask: Sequence[str]) -> tuple[int, bool]:
    """How many of the last folders of two paths are equal, and whether these are all of the mask's."""
    equal = 0
    for one, other in zip(reversed(of_photo), reversed(of_mask), strict=False):
        if one != other:
            break
        equal += 1
    return equal, equal == len(of_mask)


def read_labels(path: Path, size: tuple[int, int], void: Sequence[int] = ()) -> np.ndarray:
    """Read a mask of 8 bits, of a palette's numbers or grey levels: (H, W) uint8, ``IGNORED`` where it is void. Raises
    ValueError, OSError."""
    try:
        with Image.open(path) as mask:
            labels = np.array(mask)
    except UnidentifiedImageError as error:
        raise ValueError(f"the mask {path} is not a readable picture") from error
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise ValueError(f"the mask {path} has {labels.ndim} axes of {labels.dtype}; expected labels of 8 bits")
    if labels.shape != size:
        raise ValueError(f"the mask {path} has {labels.shape} pixels, its photo {size}")
    labels[np.isin(labels, void)] = IGNORED
    return labels
