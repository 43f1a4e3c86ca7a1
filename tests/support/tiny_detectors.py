"""Helpers of the Detectron2 tests: tiny backbones, their twins of Detectron2's own, images and detections."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed (it is built from source, see its INSTALL page)")

from detectron2.modeling import ViT
from detectron2.structures import Instances
from torch import Tensor, nn

from apt_dense.hosts.detectron2 import APTViT

from support.references import noise, randomise

TINY = dict(embed_dim=48, depth=2, num_heads=2, norm_layer=partial(nn.LayerNorm, eps=1e-6), img_size=256)
WINDOWED = dict(TINY, window_size=4, window_block_indexes=[0], use_rel_pos=True)


def pair(**options: Any) -> tuple[ViT, APTViT]:
    """Detectron2's ViT with random parameters, biases and norms too, and ours with the same."""
    theirs = randomise(ViT(**options))
    ours = APTViT(**options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def compare(theirs: ViT, ours: APTViT, images: Tensor) -> float:
    with torch.no_grad():
        expected, found = theirs(images)["last_feat"], ours(images)["last_feat"]
    assert found.shape == expected.shape
    return (found - expected).abs().max().item()


def photo(height: int = 70, width: int = 100) -> Tensor:
    return (noise(3, height, width) * 60 + 128).clamp(0, 255).byte()


def preprocessed(model: nn.Module, *images: Tensor) -> Tensor:
    return model.preprocess_image([{"image": image} for image in images]).tensor


def detect(model: nn.Module) -> Instances:
    pixels = (noise(3, 90, 120) * 40 + 128).clamp(0, 255).byte()
    with torch.no_grad():
        return model([{"image": pixels, "height": 90, "width": 120}])[0]["instances"]
