"""Compare the sizes of pictures with their annotation file, undecoded, and find those that are cut off."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from apt_dense.hosts.readable_images import DataError, check_all_whole

MOST = 5000  # pictures whose headers are read: seconds on a local disk

_ORIENTATION = 0x0112  # EXIF tag; from 5 on, height and width are exchanged when a picture is shown upright

log = logging.getLogger(__name__)


def check_sizes(path: Path, folder: Path, images: Sequence[Mapping[str, Any]], upright: bool = False) -> None:
    """Check pictures, of large sets an evenly spaced sample; the log then says how many.

    Args:
        path: the annotation file.
        folder: of the pictures.
        images: its entries.
        upright: only the size as shown will do, since the host turns pictures as EXIF says; and it reads by Pillow,
            which makes white of grey levels above 255.

    Raises:
        ValueError: if a picture cannot be read, is cut off, or has another size than its entry, or more grey levels
            than the host reads.
    """
    chosen = spread(images, MOST)
    if len(chosen) < len(images):
        log.info("%s: compared the sizes of %d of its %d images", path, len(chosen), len(images))
    check_all_whole((folder / image["file_name"] for image in chosen), len(images))
    for image in chosen:
        picture, stated = folder / image["file_name"], (image["height"], image["width"])
        if upright:
            refuse_many_levels(picture)
        sizes = picture_sizes(picture)[: 1 if upright else None]
        if stated not in sizes:
            raise ValueError(
                f"{picture} has height and width {sizes[0]}, but {path} says {stated} for image {image['id']}; correct "
                f"the entry, whose annotations may be of that size, too"
            )


def refuse_many_levels(path: str | Path) -> None:
    """Raise DataError for a grey picture of 16 or 32 bits, which Pillow converts to RGB by cutting off at 255.

    Files that cannot be read are left to others.
    """
    try:
        with Image.open(path) as picture:
            mode = picture.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return
    if mode.startswith(("I", "F")):
        raise DataError(
            f"{path} is a grey picture of more than 8 bits, of which the host would make white all above 255; convert "
            f"it to 8 bits"
        )


def spread(items: Sequence, most: int) -> list:
    """Return all items, or ``most`` of them at even distances."""
    return list(items) if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


def picture_sizes(path: Path) -> list[tuple[int, int]]:
    """Return height and width as shown and, if they differ, as stored."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(_ORIENTATION, 1) >= 5 if picture.format in ("JPEG", "TIFF", "MPO") else False
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image ({error}); replace it or take it off the list") from error
    return [(width, height), (height, width)] if turned else [(height, width)]
