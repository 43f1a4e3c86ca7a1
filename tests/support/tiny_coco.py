"""Helpers of the Detectron2 tests: a folder in COCO's layout, the real configs shrunk to run in seconds."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

REASON = "Detectron2 is not installed (it is built from source, see its INSTALL page)"
pytest.importorskip("detectron2", reason=REASON)

from detectron2.config import instantiate
from omegaconf import DictConfig

from apt_dense.hosts.detectron2.coco_data import use_data_root
from apt_dense.hosts.detectron2.read_lazy_config import apply_overrides, load_config
from apt_dense.hosts.detectron2.resumable_loader import resumable

from support.threads import one_thread  # noqa: F401 (a fixture, for those who import this)

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "detectron2").glob("*.py"))
ADAPTIVE = ROOT / "configs" / "detectron2" / "mask_rcnn_apt_vitdet_b_100ep.py"
UNIFORM = ROOT / "configs" / "detectron2" / "mask_rcnn_uniform_vitdet_b_100ep.py"

#: Category ids with holes, as COCO's own.
CATEGORIES = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}, {"id": 20, "name": "blue"}]
COLOURS = {3: (200, 40, 40), 7: (40, 200, 40), 20: (40, 40, 200)}

#: Overrides that make any Mask R-CNN config tiny; windows of 4 cells, so that 128 pixels (8 cells) have four.
SHRINK = [
    "dataloader.image_size=128",
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "model.backbone.out_channels=16",
    "model.backbone.net.embed_dim=48",
    "model.backbone.net.depth=2",
    "model.backbone.net.num_heads=2",
    "model.backbone.net.window_size=4",
    "model.backbone.net.window_block_indexes=[0]",
    "model.proposal_generator.head.in_channels=16",
    "model.proposal_generator.post_nms_topk=[50,20]",
    "model.roi_heads.batch_size_per_image=16",
    "model.roi_heads.mask_head.input_shape.channels=16",
    "model.roi_heads.mask_head.conv_dims=[16,16]",
    "train.init_checkpoint=''",
]
SHRINK_MASK_RCNN = [
    *SHRINK,
    "model.roi_heads.box_head.input_shape.channels=16",
    "model.roi_heads.box_head.conv_dims=[16]",
    "model.roi_heads.box_head.fc_dims=[32]",
    "model.roi_heads.box_predictor.input_shape.channels=32",
]
#: The same for the yacs config.
TINY_YACS = [
    "MODEL.DEVICE", "cpu", "MODEL.APT.EMBED_DIM", 48, "MODEL.APT.DEPTH", 2, "MODEL.APT.NUM_HEADS", 2,
    "MODEL.APT.WINDOW_SIZE", 4, "MODEL.APT.WINDOW_BLOCK_INDEXES", (0,), "MODEL.APT.PYRAMID.SQUARE_PAD", 128,
    "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.CONV_DIM", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.RPN.POST_NMS_TOPK_TEST", 20, "MODEL.ROI_HEADS.NUM_CLASSES", 3,
]  # fmt: skip


def write_coco(root: Path, images: int = 4, change: Callable[[dict], None] | None = None) -> Path:
    """Coloured rectangles on grey, in COCO's own layout; ``change`` edits the content of the training annotations."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        content = {"images": [], "annotations": [], "categories": copy.deepcopy(CATEGORIES)}
        for number in range(1, images + 1):
            _add_image(root / f"{split}2017", content, number, rng)
        if change and split == "train":
            change(content)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def _add_image(folder: Path, content: dict, number: int, rng: np.random.Generator) -> None:
    # Tall and wide images.
    height, width = (120, 90) if number % 2 else (90, 120)
    pixels = np.full((height, width, 3), 90, np.uint8)
    for category, colour in list(COLOURS.items())[: 1 + number % 3]:
        w, h = rng.integers(25, 45, 2).tolist()
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        pixels[y : y + h, x : x + w] = colour
        content["annotations"].append(annotation(content, number, category, (x, y, w, h)))
    Image.fromarray(pixels).save(folder / f"{number:012d}.png")
    entry = {"id": number, "file_name": f"{number:012d}.png", "height": height, "width": width}
    content["images"].append(entry)


def annotation(content: dict, image: int, category: int, box: tuple[int, int, int, int], **other: object) -> dict:
    """A rectangle (x, y, width, height) in pixels as a COCO object."""
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return {
        "id": len(content["annotations"]) + 1, "image_id": image, "category_id": category, "bbox": list(box),
        "area": w * h, "iscrowd": 0, "segmentation": [polygon], **other,
    }  # fmt: skip


def tiny_config(path: Path = ADAPTIVE, *overrides: str) -> DictConfig:
    """One of the Mask R-CNN configs with ``SHRINK_MASK_RCNN`` and further overrides."""
    cfg = load_config(str(path))
    apply_overrides(cfg, [*SHRINK_MASK_RCNN, *overrides])
    return cfg


def tiny_model(path: Path = ADAPTIVE, *overrides: str) -> nn.Module:
    """Its model in eval mode, with the same random weights each time."""
    torch.manual_seed(0)
    return instantiate(tiny_config(path, *overrides).model).eval()


def batches(data: Path, start: int, count: int, *overrides: str) -> list[list[tuple]]:
    """File names and the sum of pixels of the first batches of the training loader."""
    cfg = load_config(str(ADAPTIVE))
    use_data_root(cfg, str(data), ["train"])
    apply_overrides(cfg, ["dataloader.image_size=64", "dataloader.train.total_batch_size=3", *overrides])
    loader = instantiate(resumable(cfg.dataloader.train, 5, start))
    return [
        [(image["file_name"], image["image"].shape, image["image"].sum().item()) for image in batch]
        for batch in itertools.islice(loader, count)
    ]
