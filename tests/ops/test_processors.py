"""Which products and which kernels are chosen on which processor: by facts, so that every run chooses the same way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apt_dense import APTViT, runtime
from apt_dense.ops import onednn_matmul
from apt_dense.ops.attention import choose
from apt_dense.ops.bias import RelativeBias
from apt_dense.ops.cpu_layers import call_layer
from apt_dense.ops.kernels import cpu_sliced
from apt_dense.ops.kernels.interface import Inputs

from support.references import layout_of, noise, normalise

#: vendor, matrix unit, type -> the kernel of long segments, without and with relative positions.
CHOICES = [
    ("AuthenticAMD", False, torch.float32, "rows", "rows"),
    ("AuthenticAMD", False, torch.bfloat16, "rows", "rows"),
    ("GenuineIntel", True, torch.float32, "sdpa", "sdpa"),
    ("GenuineIntel", True, torch.bfloat16, "sdpa", "sdpa"),
    ("GenuineIntel", False, torch.float32, "sdpa", "sdpa"),
    ("", False, torch.float32, "sdpa", "sdpa"),
]


def on(monkeypatch: pytest.MonkeyPatch, vendor: str, matrix_unit: bool = False) -> None:
    monkeypatch.setattr(runtime, "processor_vendor", lambda: vendor)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_unit, raising=False)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("vendor", "matrix_unit", "dtype", "plain", "relative"), CHOICES)
def test_attention_by_processor(
    vendor: str, matrix_unit: bool, dtype: torch.dtype, plain: str, relative: str, trains: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    on(monkeypatch, vendor, matrix_unit)
    monkeypatch.setattr(cpu_sliced, "_LONG_SEGMENT", 4)
    q, k, v = (noise(6, 2, 4).to(dtype).requires_grad_(trains) for _ in range(3))
    layout = layout_of(6)
    bias = RelativeBias(noise(6, 2, 7).to(dtype), layout.image_cells)
    assert choose(Inputs(q, k, v, layout.images)) == plain
    assert choose(Inputs(q, k, v, layout.images, bias)) == relative


@pytest.mark.parametrize(("vendor", "takes_over"), [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)])
def test_products_by_processor(vendor: str, takes_over: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    on(monkeypatch, vendor)
    monkeypatch.setattr(onednn_matmul, "_FEW_PRODUCTS", 0)
    calls, plain = [], onednn_matmul._product
    monkeypatch.setattr(onednn_matmul, "_product", lambda *operands: calls.append(1) or plain(*operands))
    layer, x = nn.Linear(24, 16), noise(50, 24)
    out = call_layer(layer, x)
    assert bool(calls) == takes_over
    torch.testing.assert_close(out, F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


def test_rows_are_filled_up_only_for_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = noise(33, 4)
    on(monkeypatch, "GenuineIntel")
    assert onednn_matmul.fill_rows(rows) is rows and len(onednn_matmul.fill_rows(rows, spare=1)) == 34
    assert len(onednn_matmul.fill_rows(rows.bfloat16())) == 48  # whose products are oneDNN's with any processor
    with torch.autocast("cpu", torch.bfloat16):
        assert len(onednn_matmul.fill_rows(rows)) == 48
    on(monkeypatch, "AuthenticAMD")
    assert len(onednn_matmul.fill_rows(rows)) == 48


@pytest.mark.parametrize(
    "options", [{}, {"window_size": 5, "window_block_indexes": (0,), "use_rel_pos": True}], ids=str
)
def test_the_processor_changes_no_value(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_matmul, "_FEW_PRODUCTS", 0)
    monkeypatch.setattr(cpu_sliced, "_LONG_SEGMENT", 1)
    model = APTViT(img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2, thresholds=(4.0,), **options)
    images = normalise(128 + 40 * noise(2, 3, 32, 36).clamp(-3, 3))
    found = []
    for vendor in ("AuthenticAMD", "GenuineIntel"):
        on(monkeypatch, vendor)
        (out,) = model(images)
        found.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)
