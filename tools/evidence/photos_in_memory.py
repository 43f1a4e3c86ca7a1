"""Photos as tensors on one device, mostly labelled, and the random views of them that are trained on."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from demo.image_edits import resize_to
from evidence.labelled_photos import IGNORED, Labelled, read_labels
from shared.photo_files import center_crop, read_photo

LARGEST_ZOOM = 1.5


class LabelledSet(NamedTuple):
    """Photos (N, 3, H, W) and masks (N, H, W), both uint8."""

    photos: Tensor
    masks: Tensor


def load_set(
    pairs: Sequence[Labelled], void: bool, classes: int, device: torch.device, size: tuple[int, int] | None = None
) -> LabelledSet:
    """Read all photos of a set.

    Args:
        void: whether label 0 is not counted, and label n is class n - 1.
        size: pixels (H, W) that photos and masks are resized to; None if they have one size, which is kept.

    Raises:
        ValueError, OSError: for photos of several sizes, damaged ones, labels out of range, and masks without any.
    """
    photos, masks = [], []
    for pair in tqdm(pairs, "reading", leave=False):
        photo, mask = read_photo(pair.photo), read_labels(pair.mask, void)
        if photo.shape[:2] != mask.shape:
            raise ValueError(f"{pair.mask} has {mask.shape} pixels (H, W), and its photo {photo.shape[:2]}")
        photos.append(photo if size is None else resize_to(photo, *size))
        masks.append(mask if size is None else cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT))
    sizes = {array.shape[:2] for array in (*photos, *masks)}
    if len(sizes) > 1:
        raise ValueError(f"photos and masks of several sizes, {sorted(sizes)[:3]}: resize them to one first")
    _check_labels(masks, classes)
    pixels = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).contiguous()
    return LabelledSet(pixels.to(device), torch.from_numpy(np.stack(masks)).to(device))


def load_unlabelled(photos: Sequence[Path], size: tuple[int, int], device: torch.device) -> LabelledSet:
    """Read photos without masks: the middle of each, cut to the shape of ``size`` and resized to it; masks are zero.

    Raises:
        ValueError, OSError: for photos that cannot be read.
    """
    read = (read_photo(path) for path in tqdm(photos, "reading", leave=False))
    arrays = [resize_to(center_crop(photo, size), *size) for photo in read]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().to(device)
    return LabelledSet(pixels, pixels.new_zeros(len(pixels), *size))


def _check_labels(masks: Sequence[np.ndarray], classes: int) -> None:
    found = [int(label) for mask in masks for label in np.unique(mask) if label != IGNORED]
    if not found:
        raise ValueError(f"{len(masks)} masks hold no class: all is void")
    if max(found) >= classes:
        raise ValueError(f"a mask has class {max(found)}, and there are {classes} classes, from 0")


def epochs_of(count: int, batch: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Numbers of the photos of each step: every photo once an epoch, the last ones that fill no batch left out."""
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count // batch * batch].split(batch)


def random_views(
    data: LabelledSet, size: tuple[int, int], numbers: Tensor, generator: torch.Generator, in_corners: bool = False
) -> tuple[Tensor, Tensor]:
    """Parts of photos enlarged to ``size``, mirrored half of the time.

    A part is 1 / zoom as high and as wide as the photo, with zooms drawn evenly from 1 to ``LARGEST_ZOOM``.

    Args:
        in_corners: whether unlabelled columns at the right are padding, which stays there.

    Returns:
        Grey levels (B, 3, *size) float32 and classes (B, *size) int64.
    """
    views = []
    for number in numbers.tolist():
        *draws, side = torch.rand(5, generator=generator).tolist()
        view = _view(data, number, size, draws)
        views.append(_mirrored(*view, in_corners) if side < 0.5 else view)
    photos, masks = zip(*views, strict=True)
    return torch.cat(photos), torch.cat(masks)


def _view(data: LabelledSet, number: int, size: tuple[int, int], draws: Sequence[float]) -> tuple[Tensor, Tensor]:
    slices = []
    for side, draw, place in zip(data.masks.shape[1:], draws[:2], draws[2:], strict=True):
        length = max(1, round(side / (1 + draw * (LARGEST_ZOOM - 1))))
        first = int(place * (side - length + 1))
        slices.append(slice(first, first + length))
    photo = data.photos[number, :, slices[0], slices[1]][None].float()
    mask = data.masks[number, slices[0], slices[1]][None, None].float()
    photo = F.interpolate(photo, size=size, mode="bilinear", antialias=True).round().clamp(0, 255)
    return photo, F.interpolate(mask, size=size, mode="nearest-exact")[:, 0].long()


def _mirrored(photo: Tensor, mask: Tensor, in_corner: bool) -> tuple[Tensor, Tensor]:
    """Mirror a photo (1, 3, H, W) and its mask (1, H, W), without the unlabelled columns right of one in a corner."""
    is_labelled = (mask != IGNORED).any(1).flatten()
    width = int(is_labelled.nonzero().max()) + 1 if in_corner and is_labelled.any() else mask.shape[-1]
    return tuple(torch.cat([part[..., :width].flip(-1), part[..., width:]], -1) for part in (photo, mask))


def resized_photos(data: LabelledSet, size: tuple[int, int], batch: int) -> Iterator[Tensor]:
    """Grey levels (n, 3, *size) of all photos, in order."""
    for photos in data.photos.split(batch):
        if tuple(photos.shape[-2:]) == size:
            yield photos.float()
        else:
            yield F.interpolate(photos.float(), size=size, mode="bilinear", antialias=True).round().clamp(0, 255)
