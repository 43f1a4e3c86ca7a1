"""Find and decode the user's photographs, and name what is made of them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np

from apt_dense.hosts.coco_picture_sizes import spread
from apt_dense.hosts.readable_images import is_cut_off

Item = TypeVar("Item")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def is_photo(path: Path) -> bool:
    """Tell by its name whether a file is a photograph; hidden files are not."""
    return path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".") and path.is_file()


def decode(data: bytes) -> np.ndarray | None:
    """Decode a picture, upright, to (H, W, 3) uint8 RGB; None if the data are damaged.

    Grey, 16-bit and transparent pictures are converted.
    """
    if not data or is_cut_off(data):
        return None
    try:
        pixels = cv2.imdecode(np.frombuffer(_without_profile(data), np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    return None if pixels is None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _without_profile(data: bytes) -> bytes:
    """Take the colour profile out of a PNG: OpenCV ignores it, but its libpng complains of some on the terminal."""
    start = data.find(b"iCCP", 0, 1 << 16) - 4  # its length stands before its name
    if not data.startswith(b"\x89PNG") or start < 8 or start > data.find(b"IDAT"):
        return data
    length = int.from_bytes(data[start : start + 4], "big")
    return data[:start] + data[start + 12 + length :]


def read_photo(path: Path) -> np.ndarray:
    """Read a photograph as (H, W, 3) uint8 RGB, upright.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is damaged or not a photograph.
    """
    pixels = decode(path.read_bytes())
    if pixels is None:
        raise ValueError(f"{path} is not a readable photograph; remove it or save it again")
    return pixels


def center_crop(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The largest part in the middle of a photo or labels (H, W, ...) with the aspect ratio of ``shape`` (H, W)."""
    height, width = pixels.shape[:2]
    scale = min(height / shape[0], width / shape[1])
    rows, columns = (max(1, round(n * scale)) for n in shape)
    top, left = (height - rows) // 2, (width - columns) // 2
    return pixels[top : top + rows, left : left + columns]


def evenly_spread(items: Sequence[Item], most: int | None) -> Sequence[Item]:
    """Take at most so many items at even distances; None for all."""
    return items if most is None else spread(items, most)


def find_photos(inputs: Sequence[Path], subfolders: bool = False) -> list[Path]:
    """List photos and those in folders (with ``subfolders`` at any depth), a folder's by name, each once.

    Raises:
        ValueError: for a path that does not exist, and a folder without photos.
    """
    photos: dict[Path, None] = {}
    for path in inputs:
        if not path.exists():
            raise ValueError(f"{path} does not exist; give a photo or a folder of photos")
        inside = path.rglob("*") if subfolders else path.glob("*")
        found = sorted(filter(is_photo, inside)) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"the folder {path} holds no photos ({' '.join(PHOTO_SUFFIXES)})")
        photos |= dict.fromkeys(found)
    return list(photos)


def name_outputs(photos: Sequence[Path]) -> list[Path]:
    """Name what becomes of photos, without a suffix: "a" of "x/a.jpg"; "a.jpg" and "a.png" where only these differ;
    "x/a" and "y/a" where the folders do.

    Raises:
        ValueError: if two photos have the same name in folders of the same name.
    """
    ways = [
        [Path(photo.stem) for photo in photos],
        [Path(photo.name) for photo in photos],
        [Path(photo.resolve().parent.name, photo.stem) for photo in photos],
        [Path(photo.resolve().parent.name, photo.name) for photo in photos],
    ]
    counts = [Counter(way) for way in ways]
    names = []
    for number in range(len(photos)):
        name = next((way[number] for way, count in zip(ways, counts, strict=True) if count[way[number]] == 1), None)
        if name is None:
            twins = " and ".join(str(photos[i]) for i, other in enumerate(ways[-1]) if other == ways[-1][number])
            raise ValueError(f"{twins} would both become {ways[-1][number]}; rename one of them or its folder")
        names.append(name)
    return names


def check_outputs(photos: Sequence[Path], outputs: Sequence[Path], overwrite: bool = True) -> None:
    """Raise ValueError if an output is one of the photos, another output or, unless ``overwrite``, exists."""
    inputs = {photo.resolve() for photo in photos}
    twice = [path for path, count in Counter(outputs).items() if count > 1]
    if twice:
        raise ValueError(f"two photos would both write {twice[0]}; rename one of them, or give another --out for it")
    for path in outputs:
        if path.resolve() in inputs:
            raise ValueError(f"--out would overwrite the photo {path}; give another name or folder")
    there = [path for path in outputs if path.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more files" if len(there) > 1 else ""
        raise ValueError(f"{there[0]}{more} exist; give another --out, or add --overwrite to replace them")
