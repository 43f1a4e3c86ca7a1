"""Find and decode the user's photographs."""

from pathlib import Path

import cv2
import numpy as np

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def is_photo(path: Path) -> bool:
    """Tell by its name whether a file is a photograph; hidden files are not."""
    return path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".") and path.is_file()


def decode(data: bytes) -> np.ndarray | None:
    """Decode a picture, upright, to (H, W, 3) uint8 RGB; None if the data are damaged.

    Grey, 16-bit and transparent pictures are converted.
    """
    # A JPEG that ends early may still decode, to grey below the break: it lacks the end mark after its last scan.
    cut_short = data.startswith(b"\xff\xd8") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    if cut_short or not data:
        return None
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    return None if pixels is None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


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
