"""Images that cannot be read are named in one line, whoever reads them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg", reason="apt_dense.hosts.mmseg.readable_images reads images for MMSeg")

from torch.utils.data import DataLoader, Dataset

from apt_dense.hosts.mmseg.readable_images import APTLoadImage
from apt_dense.hosts.readable_images import DataError, line_of


class Images(Dataset):
    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> np.ndarray:
        return APTLoadImage().transform({"img_path": str(self.path)})["img"]


def spoil(path: Path, kind: str) -> None:
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no image", "cut off": content[: len(content) // 2]}.get(kind, content))
    if kind == "gone":
        path.unlink()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["empty", "text", "cut off", "gone"])
def test_unreadable_images_are_named(kind: str, workers: int, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    spoil(path, kind)
    with pytest.raises(DataError) as raised:
        next(iter(DataLoader(Images(path), num_workers=workers)))
    said = line_of(raised.value)
    assert said.startswith(f"{path} is not a readable image (") and said.endswith("out of the data")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "I;16", "1", "RGBA"])
def test_images_of_any_kind_are_read(mode: str, tmp_path: Path) -> None:
    pixels = Image.fromarray(np.zeros((1, 1), np.uint16)) if mode == "I;16" else Image.new(mode, (1, 1))
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    pixels.save(path)
    (image,) = DataLoader(Images(path))
    assert image.shape == (1, 1, 1, 3)
