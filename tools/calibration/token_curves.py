"""Token curves of photos, made by parallel workers and kept in a file from which an interrupted run continues."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from apt_dense import PatchSelector
from apt_dense.hosts.readable_images import DataError
from apt_dense.patches.calibration import FACTORS
from apt_dense.patches.labels_under_coarse_patches import mixing_by_factor
from apt_dense.patches.token_curve import patches_by_factor

from calibration.curve_record import PhotoCurve, as_line, read_curves
from calibration.labels_of_photos import NO_BOXES, Labels
from calibration.masks_of_photos import read_labels
from shared.normalise import normalise, to_grey_levels
from shared.photo_files import center_crop, read_photo
from shared.picture_layout import resize_longer_side, resize_within

if TYPE_CHECKING:  # which needs pycocotools
    from calibration.objects_of_photos import ObjectsOfPhotos


_SQUARE = 1, 1  # an aspect ratio


class Sizes(NamedTuple):
    """How photos are resized before they are cut into patches: not at all if all are None.

    Args:
        longer: pixels of the longer side.
        square: pixels of a square, to which the shorter side is resized and the middle of the longer one is cut.
        within: most pixels of the longer and of the shorter side, as in MMSegmentation's configs.
    """

    longer: int | None = None
    square: int | None = None
    within: tuple[int, int] | None = None

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Resize a picture (H, W, 3) uint8."""
        if self.longer is not None:
            return resize_longer_side(picture, self.longer)
        if self.within is not None:
            return resize_within(picture, self.within)
        if self.square is None:
            return picture
        middle = center_crop(picture, _SQUARE)
        way = cv2.INTER_AREA if self.square < len(middle) else cv2.INTER_CUBIC
        return cv2.resize(middle, (self.square, self.square), interpolation=way)

    def apply_to_labels(self, labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Resize labels (H, W) like their picture, which has that size (H, W) afterwards, without mixing them."""
        part = labels if self.square is None else center_crop(labels, _SQUARE)
        return cv2.resize(part, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)

    def apply_to_boxes(self, boxes: np.ndarray, before: tuple[int, int], after: tuple[int, int]) -> np.ndarray:
        """Move boxes (n, 4), x1, y1, x2, y2 in pixels, of a picture of the size (H, W) ``before`` to the picture that
        it becomes, of the size ``after``. Those that are cut off altogether are left out."""
        shorter = min(before)
        top, left = ((side - shorter) // 2 for side in before) if self.square is not None else (0, 0)
        rows, columns = (shorter, shorter) if self.square is not None else before
        moved = (boxes - np.array([left, top, left, top])) * np.tile([after[1] / columns, after[0] / rows], 2)
        inside = (moved[:, 2:] > 0).all(1) & (moved[:, :2] < [after[1], after[0]]).all(1)
        return moved[inside].astype(np.float32)


class Source(NamedTuple):
    """Where curves come from.

    Args:
        masks: the mask of each photo; empty for none.
        void: values of the masks that are no class, besides 255.
        objects: those of detection data, in place of masks.
        drawn: what gives photos by their names, in place of their files and sizes.
    """

    selector: PatchSelector
    sizes: Sizes
    masks: dict[Path, Path]
    void: Sequence[int] = ()
    objects: "ObjectsOfPhotos | None" = None
    drawn: Any = None

    def image(self, name: str | Path) -> tuple[Tensor, tuple[int, int]]:
        """A photo as it is cut into patches, (1, 3, H, W) normalised, and its size before; or ValueError, OSError."""
        if self.drawn is not None:
            image = self.drawn.image(str(name))
            return image, tuple(image.shape[-2:])
        photo = read_photo(Path(name)) if self.objects is None else self.objects.photo(Path(name))
        return normalise(to_grey_levels(self.sizes.apply(photo)), self.selector.pixel_format), photo.shape[:2]

    @property
    def is_labelled(self) -> bool:
        """Tell whether photos have labels."""
        return bool(self.masks) or self.objects is not None

    def labels(self, path: Path, size: tuple[int, int]) -> Labels:
        """The labels of a photo of that size (H, W). Raises ValueError, OSError."""
        if self.objects is not None:
            return self.objects.labels(path)
        return Labels(read_labels(self.masks[path], size, self.void), NO_BOXES)


class _Photos(Dataset):
    """Photos -> their curves, for the workers of a ``DataLoader``."""

    def __init__(self, paths: Sequence[Path | str], source: Source) -> None:
        self.paths, self.source = paths, source

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> PhotoCurve | Exception:
        path = self.paths[number]
        try:
            return self._curve(path)
        except (ValueError, OSError) as error:
            if self.source.drawn is not None and not isinstance(error, DataError):
                return error  # of the pipeline, which would fail for each photo
            return PhotoCurve(str(path), None, str(error))

    def _curve(self, path: Path | str) -> PhotoCurve:
        selector, sizes, factors = self.source.selector, self.source.sizes, torch.from_numpy(FACTORS)
        image, before = self.source.image(path)
        patches = patches_by_factor(selector, image, factors)[0].numpy().astype(np.int32)
        if not self.source.is_labelled:
            grid = [-(-side // selector.patch_size) for side in image.shape[-2:]]
            return PhotoCurve(str(path), patches, padded=None if self.source.drawn is None else grid[0] * grid[1])
        labels, after = self.source.labels(path, before), tuple(image.shape[-2:])
        plain = torch.from_numpy(sizes.apply_to_labels(labels.map, after).astype(np.int64))
        boxes = torch.from_numpy(sizes.apply_to_boxes(labels.small, before, after))
        found = mixing_by_factor(selector, image, plain, factors, boxes)
        borders, small = (torch.full_like(found.border, number) for number in (found.borders, len(boxes)))
        hidden = torch.stack([found.coarse, found.mixed, found.border, borders, found.boxes, small], 1)  # as HIDDEN
        return PhotoCurve(str(path), patches, hidden=hidden.numpy().astype(np.int32))


def one_thread(_: int) -> None:
    """Workers share the processor among themselves."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def measure_curves(
    paths: Sequence[Path | str], source: Source, workers: int, record: Path, settings: dict[str, Any]
) -> None:
    """Write the curves of all photos to ``record``, but for those that it holds already.

    Raises:
        ValueError: if ``record`` was made with other settings, or a step of a pipeline fails.
    """
    done = {curve.path for curve in read_curves(record, settings)}
    left = [path for path in paths if str(path) not in done]
    photos = _Photos(left, source)
    if workers:
        # Ends OpenCV's threads: a forked worker inherits their pool without them, and would wait for them forever.
        cv2.setNumThreads(1)
    loader = DataLoader(photos, batch_size=None, num_workers=workers, worker_init_fn=one_thread)
    with record.open("a", encoding="utf-8") as file:
        if not file.tell():
            file.write(json.dumps(settings) + "\n")
        for curve in tqdm(loader, "photos", total=len(left), initial=0, unit="photo"):
            if isinstance(curve, Exception):
                raise curve
            file.write(as_line(curve))
            file.flush()
