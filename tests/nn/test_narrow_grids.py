"""Grids of one row or column, or that become so for coarse patches, in 16 bits: near float32, every time.

PyTorch's own 16-bit convolutions are wrong there on some CPUs, at some calls.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apt_dense import APTViT
from apt_dense.nn.feature_pyramid import SimpleFeaturePyramid

from support.contract import assert_maps_close, photos
from support.references import litter, randomise

PATCH = 8
GRIDS = [(1, 1), (1, 2), (2, 1), (6, 1), (1, 6), (8, 2), (9, 3), (3, 9), (16, 1), (12, 6), (2, 2)]
MODELS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "thresholds": {"thresholds": (5.0, 5.0)},
    "budget": {"thresholds": (5.0, 5.0), "token_budget": 0.6},
    "three scales in a budget": {"thresholds": (5.0, 5.0, 5.0), "token_budget": 0.6},
    "dropped padding": {"thresholds": (5.0, 5.0), "drop_padding": True},
    "dropped padding in a budget": {"thresholds": (5.0, 5.0), "token_budget": 0.6, "drop_padding": True},
    "windows": {"thresholds": (5.0,), "window_size": 3, "window_block_indexes": (0,), "use_rel_pos": True},
    "windows in a budget": {"thresholds": (5.0,), "token_budget": 0.7, "window_size": 3, "window_block_indexes": (0,)},
    "residual": {"residual_block_indexes": (0, 1), "thresholds": (5.0,), "token_budget": 0.7},
    "embedding's norm": {"embed_norm": True, "class_token": True, "thresholds": (5.0,), "token_budget": 0.7},
}


def build(name: str) -> APTViT:
    return randomise(APTViT(img_size=64, patch_size=PATCH, embed_dim=32, depth=2, num_heads=2, **MODELS[name]))


def images_of(grid: tuple[int, int], padded: bool) -> Tensor:
    """Numbers that 16 bits hold, so that all models see the same; the last image may end in padding."""
    images = photos(grid[0] * PATCH - 2, grid[1] * PATCH - 1).bfloat16().half().float()
    if padded:
        images[-1, :, grid[0] * PATCH // 2 :] = 0
    return images


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_narrow_grids_in_16_bits_stay_near_float32(name: str, dtype: torch.dtype) -> None:
    model, half = build(name), build(name).to(dtype)
    for grid in GRIDS:
        images = images_of(grid, padded="dropped" in name)
        with torch.no_grad():
            expected = model(images)
            bound = 0.05 * max(m.abs().max().item() for m in expected)
            for _ in range(3):
                litter(dtype)
                assert_maps_close([m.float() for m in half(images.to(dtype))], expected, bound)
                with torch.autocast("cpu", dtype):
                    assert_maps_close([m.float() for m in model(images)], expected, bound)


@pytest.mark.parametrize("name", MODELS)
def test_narrow_grids_train_in_bfloat16(name: str) -> None:
    model = build(name).train()
    for grid in GRIDS:
        model.zero_grad()
        litter(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images_of(grid, padded=False))[0].float().square().mean()
        loss.backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()], grid


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("late", [True, False])
def test_pyramids_of_narrow_grids_in_16_bits_stay_near_float32(late: bool, dtype: torch.dtype) -> None:
    def levels(backbone: nn.Module, pyramid: nn.Module, images: Tensor) -> list[Tensor]:
        if late:
            (rows,), layout = backbone.forward_tokens(images)
            return pyramid.from_tokens(rows, layout)
        return pyramid(backbone(images)[0])

    backbone, pyramid = build("thresholds"), randomise(SimpleFeaturePyramid(32, 16), 0.2)
    for grid in ((2, 2), (2, 6), (6, 2), (8, 3), (3, 8)):  # the smallest level is narrow
        images = images_of(grid, padded=False)
        with torch.no_grad():
            expected = levels(backbone, pyramid, images)
            for _ in range(3):
                litter(dtype)
                with torch.autocast("cpu", dtype):
                    found = levels(backbone, pyramid, images)
                bound = 0.08 * max(m.abs().max().item() for m in expected)
                assert_maps_close([m.float() for m in found], expected, bound)
