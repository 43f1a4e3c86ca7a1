"""Weights of any size: a budget gives what the same partition gives without one, and windows cut short what
Detectron2's padding gives, however large the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from apt_dense import APTViT
from apt_dense.layout.packed import build_layout

from support.contract import assert_maps_close, photos
from support.references import randomise

SIZES = {"img_size": 64, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
WINDOWS = {"window_size": 5, "window_block_indexes": (0,)}
MODELS: dict[str, dict[str, Any]] = {
    "global": {"class_token": True},
    "windows": {**WINDOWS},
    "relative windows": {**WINDOWS, "use_rel_pos": True},
    "windows without key bias": {**WINDOWS, "k_bias": False},
    "rotary": {"rotary": {}, "qkv_bias": False, **WINDOWS},
    "even windows": {"window_size": 4, "window_block_indexes": (1,), "use_rel_pos": True},
}


def build(name: str, scale: float, **options: Any) -> APTViT:
    """Queries, keys and relative positions are ``scale`` times as large, logits up to its square."""
    model = randomise(APTViT(**SIZES, **MODELS[name], **options), 0.3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "qkv" in path or "rel_pos" in path:
                parameter.mul_(scale)
    return model


def partly_padded(rows: int, columns: int) -> Tensor:
    images = photos(rows, columns)
    images[0, :, rows // 2 :] = 0
    images[1, ..., columns // 3 :] = 0
    return images


@pytest.mark.parametrize("scale", [1, 30, 1000])
@pytest.mark.parametrize("drop_padding", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_budget_is_its_partition(name: str, drop_padding: bool, scale: float) -> None:
    options = {"thresholds": (5.0, 5.0), "token_budget": 0.8, "drop_padding": drop_padding}
    fixed, packed = (build(name, scale, **options).double() for _ in range(2))
    images = partly_padded(44, 52).double()
    scales = fixed.partition(images)
    packed.layout = lambda images, _: build_layout(scales, 3, packed.window_size, packed.num_prefix)
    found, expected = fixed(images), packed(images)
    assert_maps_close(list(found), list(expected), 1e-6, 1e-6)
    for model, maps in ((fixed, found), (packed, expected)):
        maps[0].square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    grads = [[p.grad for p in model.parameters()] for model in (fixed, packed)]
    largest = max(grad.abs().max().item() for grad in grads[1])
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other, atol=1e-10 * (1 + largest), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1, 30, 100])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_finite(name: str, scale: float, dtype: torch.dtype) -> None:
    if scale == 100 and dtype == torch.float16:
        pytest.skip("real logits are beyond float16")
    for budget in (None, 0.8):
        model = build(name, scale, thresholds=(5.0, 5.0), token_budget=budget, drop_padding=True).to(dtype)
        (feature_map,) = model(partly_padded(44, 52).to(dtype))
        feature_map.float().square().mean().backward()
        assert feature_map.isfinite().all()
        assert not [path for path, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize("scale", [1, 30, 1000])
@pytest.mark.parametrize("name", [name for name in MODELS if "windows" in name and "without" not in name])
def test_windows_cut_short_attend_to_padding_as_to_zeros(name: str, scale: float) -> None:
    """The same grid filled up with cells whose norm is zero: the keys that a padding key stands for, one by one."""
    model = build(name, scale).double()
    index = model.options.windowed[0]
    attention, norm = model.blocks[index].attn, model.blocks[index].norm1
    images = photos(44, 52).double()
    cut, layout, _ = model._tokens(images)
    whole_map = torch.zeros(3, 15, 15, dtype=torch.int8)  # whole windows of 5; of 4 there is nothing to fill up
    if model.window_size == 4:
        whole_map = torch.zeros(3, 12, 16, dtype=torch.int8)
    whole = build_layout(whole_map, 1, model.window_size)
    rows = layout.real_rows(norm(cut))
    inside = (whole.y_N < 11) & (whole.x_N < 13)
    filled = rows.new_zeros(len(whole.image_N), rows.shape[1])
    index_of = layout.row_Bhw[whole.image_N[inside], whole.y_N[inside], whole.x_N[inside]]
    filled[inside] = rows[index_of]
    with torch.no_grad():
        expected = attention(filled, whole)[inside]
        found = layout.real_rows(attention(norm(cut), layout))[index_of]
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)
