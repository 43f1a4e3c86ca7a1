"""A tiny folder as SegNet's authors publish CamVid."""

from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = ("train", "val", "test")


def write_camvid(root: Path, images: int = 2, size: tuple[int, int] = (36, 48)) -> Path:
    """Random pictures, flat on the left half, and masks with labels 0 to 10, and 11 where none is given."""
    rng = np.random.default_rng(0)
    for split in SPLITS:
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for i in range(images):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            pixels[:, : size[1] // 2] = 90
            Image.fromarray(pixels).save(root / split / f"{split}{i}.png")
            mask = rng.integers(0, 12, size, dtype=np.uint8)
            Image.fromarray(mask).save(root / f"{split}annot" / f"{split}{i}.png")
    return root
