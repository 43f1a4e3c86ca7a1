"""Helpers of the MMSeg tests: a folder in ADE20K's layout, the real configs shrunk to run in seconds."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "mmseg").glob("*_ade20k-*.py"))
SPLITS = ("training", "validation")

#: Overrides that make any of the configs tiny: width 32, 4 blocks, crops of 64 pixels, everything in one process.
SHRINK = {
    "model.data_preprocessor.size": (64, 64),
    "model.backbone.img_size": 64,
    "model.backbone.embed_dim": 32,
    "model.backbone.depth": 4,
    "model.backbone.num_heads": 2,
    "model.decode_head.channels": 32,
    "model.test_cfg.crop_size": (64, 64),
    "model.test_cfg.stride": (43, 43),
    "train_dataloader.dataset.pipeline.3.scale": (256, 64),
    "train_dataloader.dataset.pipeline.4.crop_size": (64, 64),
    "val_dataloader.dataset.pipeline.1.scale": (256, 64),
    "test_dataloader.dataset.pipeline.1.scale": (256, 64),
} | {
    f"{split}_dataloader.{key}": value
    for split in ("train", "val", "test")
    for key, value in (("num_workers", 0), ("persistent_workers", False))
}
SHRINK_UPERNET = {
    "model.backbone.out_indices": (0, 1, 2, 3),
    "model.neck.embed_dim": 32,
    "model.decode_head.in_channels": [32] * 4,
    "model.auxiliary_head.in_channels": 32,
    "model.auxiliary_head.channels": 16,
}
SHRINK_LINEAR = {"model.backbone.out_indices": (3,), "model.decode_head.in_channels": 32}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import it: models this small lose more by waiting for threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shrink_options(config: Path) -> dict:
    """The overrides for one of ``CONFIGS``."""
    options = SHRINK | (SHRINK_LINEAR if config.name.startswith("linear") else SHRINK_UPERNET)
    if "vit-b16" not in config.name:
        options["optim_wrapper.paramwise_cfg.num_layers"] = 4
    return options


def write_ade(root: Path, images: int = 2, size: tuple[int, int] = (64, 96)) -> Path:
    """Random pictures, flat on the left half, and masks with ADE20K's labels in the file, 0 (unlabelled) to 150."""
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(images):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            pixels[:, : size[1] // 2] = 90
            Image.fromarray(pixels).save(root / "images" / split / f"{i}.jpg")
            write_mask(root, rng.integers(0, 151, size, dtype=np.uint8), split, f"{i}.png")
    return root


def write_mask(root: Path, mask: np.ndarray, split: str = "training", name: str = "0.png") -> Path:
    """Save a mask, (H, W) uint8 or uint16 or (H, W, 3) uint8, in a folder made by ``write_ade``."""
    path = root / "annotations" / split / name
    Image.fromarray(mask).save(path)
    return path
