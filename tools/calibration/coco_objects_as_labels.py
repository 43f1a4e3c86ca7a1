"""Objects of a detection data set as label maps: a patch must not mix an object, its neighbour and the rest."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from calibration.scorer_networks import PADDING
from demo.image_edits import resize_to
from evidence.labelled_photos import IGNORED
from evidence.photos_in_memory import LabelledSet
from shared.photo_files import evenly_spread
from torchvision_detection.data import CocoSplit, load_split, read_boxes, read_image, read_objects

_NUMBERS = 24  # of objects, used again and again: touching ones have the same in one case of 24


def load_objects(data: Path, size: int, limit: int | None, device: torch.device) -> LabelledSet:
    """Read the training split of a data set in COCO's layout, each photo in the corner of a square.

    Args:
        size: pixels of the square, and of the photos' longer side. The rest of it is not labelled and of the mean
            colour, as hosts pad.
        limit: photos at most, evenly spread.

    Raises:
        ValueError, OSError: as ``load_split`` and ``read_image``.
    """
    split = load_split(data, "train", every_class=False, masks=None)
    photos, maps = [], []
    for number in tqdm(evenly_spread(split.image_ids, limit), "reading", leave=False):
        photo = read_image(split, number)
        scale = size / max(photo.shape[:2])
        shape = tuple(max(1, round(n * scale)) for n in photo.shape[:2])
        labels = cv2.resize(object_map(split, number), shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        photos.append(_in_corner(resize_to(photo, *shape), size, PADDING))
        maps.append(_in_corner(labels, size, IGNORED))
    pixels = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).contiguous()
    return LabelledSet(pixels.to(device), torch.from_numpy(np.stack(maps)).to(device))


def object_map(split: CocoSplit, number: int) -> np.ndarray:
    """Number the objects of an image from 1 up, small ones on top: (H, W) uint8; boxes where there are no masks."""
    entry = split.coco.imgs[number]
    found = np.zeros((entry["height"], entry["width"]), np.uint8)
    masks = (
        read_objects(split, number)[0] if split.masks else [_filled(found, box) for box in read_boxes(split, number)[0]]
    )
    for place, mask in enumerate(sorted(masks, key=np.count_nonzero, reverse=True)):
        found[mask > 0] = 1 + place % _NUMBERS
    return found


def _filled(like: np.ndarray, box: np.ndarray) -> np.ndarray:
    mask = np.zeros_like(like)
    left, top = np.floor(box[:2]).astype(int)
    right, bottom = np.ceil(box[2:]).astype(int)
    mask[max(top, 0) : bottom, max(left, 0) : right] = 1
    return mask


def _in_corner(array: np.ndarray, size: int, fill: int | Sequence[float]) -> np.ndarray:
    square = np.full((size, size, *array.shape[2:]), fill, np.uint8)
    square[: array.shape[0], : array.shape[1]] = array
    return square
