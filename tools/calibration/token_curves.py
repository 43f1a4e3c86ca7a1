"""Token curves of photos, made by parallel workers and kept in a file from which an interrupted run continues.

The file holds one JSON object a line: the settings, then each photo's name and curve, or why it has none.
"""

import base64
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from apt_dense import PatchSelector
from apt_dense.patches.calibration import FACTORS
from apt_dense.patches.labels_under_coarse_patches import mixing_by_factor
from apt_dense.patches.token_curve import patches_by_factor

from calibration.masks_of_photos import read_labels
from shared.normalise import normalise, to_grey_levels
from shared.photo_files import read_photo
from shared.picture_layout import resize_longer_side, resize_within


class PhotoCurve(NamedTuple):
    """The patches of a photo at each of ``FACTORS``, or why there are none.

    Args:
        patches: (F, num_scales).
        hidden: (F, 4), with masks: coarse patches, those with more than one class, pixels on borders between classes
            under coarse patches, and in all (``apt_dense.patches.labels_under_coarse_patches``).
    """

    path: str
    patches: np.ndarray | None
    error: str = ""
    hidden: np.ndarray | None = None


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
        middle = _middle(picture)
        way = cv2.INTER_AREA if self.square < len(middle) else cv2.INTER_CUBIC
        return cv2.resize(middle, (self.square, self.square), interpolation=way)

    def apply_to_labels(self, labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Resize labels (H, W) like their picture, which has that size (H, W) afterwards, without mixing them."""
        part = labels if self.square is None else _middle(labels)
        return cv2.resize(part, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def _middle(picture: np.ndarray) -> np.ndarray:
    shorter = min(picture.shape[:2])
    top, left = ((size - shorter) // 2 for size in picture.shape[:2])
    return picture[top : top + shorter, left : left + shorter]


class Source(NamedTuple):
    """Where curves come from.

    Args:
        masks: the mask of each photo; empty for none.
        void: values of the masks that are no class, besides 255.
    """

    selector: PatchSelector
    sizes: Sizes
    masks: dict[Path, Path]
    void: Sequence[int] = ()


class _Photos(Dataset):
    """Photos -> their curves, for the workers of a ``DataLoader``."""

    def __init__(self, paths: Sequence[Path], source: Source) -> None:
        self.paths, self.source = paths, source

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> PhotoCurve:
        path = self.paths[number]
        try:
            return self._curve(path)
        except (ValueError, OSError) as error:
            return PhotoCurve(str(path), None, str(error))

    def _curve(self, path: Path) -> PhotoCurve:
        selector, sizes, masks, void = self.source
        photo, factors = read_photo(path), torch.from_numpy(FACTORS)
        picture = sizes.apply(photo)
        image = normalise(to_grey_levels(picture), selector.pixel_format)
        patches = patches_by_factor(selector, image, factors)[0].numpy().astype(np.int32)
        if not masks:
            return PhotoCurve(str(path), patches)
        labels = sizes.apply_to_labels(read_labels(masks[path], photo.shape[:2], void), picture.shape[:2])
        found = mixing_by_factor(selector, image, torch.from_numpy(labels.astype(np.int64)), factors)
        borders = torch.full_like(found.border, found.borders)
        hidden = torch.stack([found.coarse, found.mixed, found.border, borders], 1)
        return PhotoCurve(str(path), patches, hidden=hidden.numpy().astype(np.int32))


def one_thread(_: int) -> None:
    """Workers share the processor among themselves."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def measure_curves(paths: Sequence[Path], source: Source, workers: int, record: Path, settings: dict[str, Any]) -> None:
    """Write the curves of all photos to ``record``, but for those that it holds already.

    Raises:
        ValueError: if ``record`` was made with other settings.
    """
    done = {curve.path for curve in read_curves(record, settings)}
    left = [path for path in paths if str(path) not in done]
    photos = _Photos(left, source)
    if workers:
        # Ends OpenCV's threads: a forked worker inherits their pool without them, and would wait for them forever.
        cv2.setNumThreads(1)
    loader = DataLoader(photos, batch_size=None, num_workers=workers, worker_init_fn=one_thread)
    if workers:
        # Ends OpenCV's threads: a forked worker inherits their pool without them, and would wait for them forever.
        cv2.setNumThreads(1)
    with record.open("a", encoding="utf-8") as file:
        if not file.tell():
            file.write(json.dumps(settings) + "\n")
        for curve in tqdm(loader, "photos", total=len(left), initial=0, unit="photo"):
            file.write(_as_line(curve))
            file.flush()


def _as_line(curve: PhotoCurve) -> str:
    entry: dict[str, Any] = {"photo": curve.path}
    if curve.patches is None:
        entry["error"] = curve.error
    else:
        entry["patches"] = _pack(curve.patches)
    if curve.hidden is not None:
        entry["hidden"] = _pack(curve.hidden)
    return json.dumps(entry) + "\n"


def _pack(numbers: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(numbers, "<i4").tobytes())).decode()


def _unpack(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i4").reshape(len(FACTORS), -1)


def read_curves(record: Path, settings: dict[str, Any]) -> Iterator[PhotoCurve]:
    """Read a file of curves one by one; a last line that was cut short is removed from it.

    Raises:
        ValueError: if it was made with other settings, or is damaged.
    """
    if not record.exists():
        return
    _drop_unfinished_line(record)
    with record.open(encoding="utf-8") as file:
        head = file.readline()
        if head and json.loads(head) != json.loads(json.dumps(settings)):
            raise ValueError(
                f"{record} was made with other settings or photos ({_differences(json.loads(head), settings)}); give "
                f"those again, another --out, or --force"
            )
        for number, line in enumerate(file, start=2):
            try:
                yield _from_line(line)
            except (ValueError, KeyError, TypeError, zlib.error) as error:
                raise ValueError(f"{record}, line {number}, is damaged; pass --force to measure again") from error


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    now = json.loads(json.dumps(now))
    return ", ".join(
        f"{key}: {before.get(key)} before" for key in sorted({*before, *now}) if before.get(key) != now.get(key)
    )


def _drop_unfinished_line(record: Path) -> None:
    content = record.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with record.open("r+b") as file:
            file.truncate(whole)


def _from_line(line: str) -> PhotoCurve:
    entry = json.loads(line)
    if "error" in entry:
        return PhotoCurve(entry["photo"], None, entry["error"])
    hidden = _unpack(entry["hidden"]) if "hidden" in entry else None
    return PhotoCurve(entry["photo"], _unpack(entry["patches"]), hidden=hidden)
