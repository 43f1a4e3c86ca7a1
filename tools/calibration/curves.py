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
from apt_dense.patches.token_curve import patches_by_factor

from shared.normalise import normalise, to_grey_levels
from shared.photo_files import read_photo
from shared.picture_layout import resize_longer_side


class PhotoCurve(NamedTuple):
    """The patches of a photo at each of ``FACTORS``, or why there are none."""

    path: str
    patches: np.ndarray | None  # (F, num_scales)
    error: str = ""


class Sizes(NamedTuple):
    """How photos are resized before they are cut into patches: not at all if both are None.

    Args:
        longer: pixels of the longer side.
        square: pixels of a square, to which the shorter side is resized and the middle of the longer one is cut.
    """

    longer: int | None = None
    square: int | None = None

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Resize a picture (H, W, 3) uint8."""
        if self.longer is not None:
            return resize_longer_side(picture, self.longer)
        return picture if self.square is None else _cut_square(picture, self.square)


def _cut_square(picture: np.ndarray, side: int) -> np.ndarray:
    shorter = min(picture.shape[:2])
    top, left = ((size - shorter) // 2 for size in picture.shape[:2])
    middle = picture[top : top + shorter, left : left + shorter]
    return cv2.resize(middle, (side, side), interpolation=cv2.INTER_AREA if side < shorter else cv2.INTER_CUBIC)


class _Photos(Dataset):
    """Photos -> their curves, for the workers of a ``DataLoader``."""

    def __init__(self, paths: Sequence[Path], selector: PatchSelector, sizes: Sizes) -> None:
        self.paths, self.selector, self.sizes = paths, selector, sizes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> PhotoCurve:
        path = self.paths[number]
        try:
            images = normalise(to_grey_levels(self.sizes.apply(read_photo(path))), self.selector.pixel_format)
            counts = patches_by_factor(self.selector, images, torch.from_numpy(FACTORS))
        except (ValueError, OSError) as error:
            return PhotoCurve(str(path), None, str(error))
        return PhotoCurve(str(path), counts[0].numpy().astype(np.int32))


def _one_thread(_: int) -> None:
    """Workers share the processor among themselves."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def measure_curves(
    paths: Sequence[Path], selector: PatchSelector, sizes: Sizes, workers: int, record: Path, settings: dict[str, Any]
) -> None:
    """Write the curves of all photos to ``record``, but for those that it holds already.

    Raises:
        ValueError: if ``record`` was made with other settings.
    """
    done = {curve.path for curve in read_curves(record, settings)}
    left = [path for path in paths if str(path) not in done]
    photos = _Photos(left, selector, sizes)
    loader = DataLoader(photos, batch_size=None, num_workers=workers, worker_init_fn=_one_thread)
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
        packed = base64.b64encode(zlib.compress(np.ascontiguousarray(curve.patches, "<i4").tobytes()))
        entry |= {"scales": curve.patches.shape[1], "patches": packed.decode()}
    return json.dumps(entry) + "\n"


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
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(entry["patches"])), "<i4")
    return PhotoCurve(entry["photo"], numbers.reshape(len(FACTORS), entry["scales"]))
