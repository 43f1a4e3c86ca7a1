"""Images that Detectron2 cannot read are named in one line, in training and testing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="apt_dense.hosts.detectron2.readable_images reads images for Detectron2")

from detectron2.data import build_detection_test_loader
from detectron2.data.detection_utils import read_image
from torch.utils.data import DataLoader

from apt_dense.hosts.detectron2.readable_images import NamingMapper, name_unreadable_images
from apt_dense.hosts.readable_images import DataError, line_of


def read(image: dict[str, Any]) -> np.ndarray:
    return read_image(image["file_name"], format="RGB")


def picture(path: Path, kind: str = "good") -> dict[str, str]:
    """Write a picture and spoil it."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    parts = {"empty": b"", "text": b"no image", "cut off": content[: len(content) // 2], "no end": content[:-2]}
    path.write_bytes(parts.get(kind, content))
    if kind == "gone":
        path.unlink()
    return {"file_name": str(path)}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["empty", "text", "cut off", "no end", "gone"])
def test_unreadable_images_are_named(kind: str, workers: int, tmp_path: Path) -> None:
    dataset = [picture(tmp_path / "a.jpg", kind)]
    loader = build_detection_test_loader(dataset, mapper=read, num_workers=workers)
    with pytest.raises(DataError) as raised:
        next(iter(name_unreadable_images(loader)))
    assert line_of(raised.value).startswith(f"{tmp_path / 'a.jpg'} is ")


def test_good_images_and_other_errors_stay(tmp_path: Path) -> None:
    assert NamingMapper(read)(picture(tmp_path / "a.jpg")).shape == (20, 30, 3)
    with pytest.raises(KeyError, match="file_name"):
        NamingMapper(read)({})
    other = DataLoader([1])
    assert name_unreadable_images(other) is other and list(other) == [1]


DEEP = {
    "16 bits": np.full((20, 30), 0x4080, np.uint16),
    "32 bits": np.full((20, 30), 70000, np.int32),
    "fractions": np.full((20, 30), 0.5, np.float32),
}


@pytest.mark.parametrize(("kind", "suffix"), [*((kind, ".tif") for kind in DEEP), ("16 bits", ".png")])
def test_grey_levels_above_255_do_not_become_white(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(DEEP[kind]).save(path)
    assert read({"file_name": str(path)}).max() in (0, 255), "what Detectron2 reads"
    with pytest.raises(DataError, match=f"a{suffix} is a grey picture of more than 8 bits.* convert it to 8 bits"):
        NamingMapper(read)({"file_name": str(path)})


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pictures_of_other_kinds_are_read_as_every_tool_reads_them(mode: str, tmp_path: Path) -> None:
    """Alpha is dropped, palettes are looked up: as OpenCV does it for MMSegmentation, torchvision and predict."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).convert(mode)
    if "A" in mode:
        picture.putalpha(Image.fromarray(pixels[..., 0]))
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(path)
    found = NamingMapper(read)({"file_name": str(path)})
    expected = cv2.imread(str(path))[..., ::-1]
    assert np.abs(found.astype(int) - expected).max() <= (3 if mode == "CMYK" else 0)
