"""Images that Detectron2 cannot read are named in one line, in training and testing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
