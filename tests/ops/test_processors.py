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

ZEN_5, ZEN_4, INTEL, UNKNOWN = ("AuthenticAMD", 26), ("AuthenticAMD", 25), ("GenuineIntel", 6), ("", 0)

#: processor, matrix unit, type -> the kernel of long segments, without and with relative positions.
CHOICES = [
    (ZEN_5, False, torch.float32, "rows", "rows"),
    (ZEN_5, False, torch.bfloat16, "rows", "rows"),
    (ZEN_4, False, torch.float32, "sdpa", "rows"),
    (ZEN_4, False, torch.bfloat16, "sdpa", "rows"),
    (INTEL, True, torch.float32, "sdpa", "rows"),
    (INTEL, True, torch.bfloat16, "sdpa", "sdpa"),
    (INTEL, False, torch.float32, "sdpa", "rows"),
    (UNKNOWN, False, torch.float32, "sdpa", "rows"),
]


def on(monkeypatch: pytest.MonkeyPatch, processor: tuple[str, int], matrix_unit: bool = False) -> None:
    for name, value in zip(("processor_vendor", "processor_family"), processor, strict=True):
        monkeypatch.setattr(runtime, name, lambda value=value: value)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_unit, raising=False)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("processor", "matrix_unit", "dtype", "plain", "relative"), CHOICES)
def test_attention_by_processor(
    processor: tuple[str, int], matrix_unit: bool, dtype: torch.dtype, plain: str, relative: str, trains: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    on(monkeypatch, processor, matrix_unit)
    monkeypatch.setattr(cpu_sliced, "_LONG_SEGMENT", 4)
    monkeypatch.setattr(cpu_sliced, "_LONG_WITH_BIAS", 3)
    q, k, v = (noise(6, 2, 4).to(dtype).requires_grad_(trains) for _ in range(3))
    layout = layout_of(6)
    bias = RelativeBias(noise(6, 2, 7).to(dtype), layout.image_cells)
    assert choose(Inputs(q, k, v, layout.images)) == plain
    assert choose(Inputs(q, k, v, layout.images, bias)) == relative


@pytest.mark.parametrize(
    ("dtype", "trains", "least"),
    [
        (torch.float32, False, 1536),
        (torch.float32, True, 1536),
        (torch.bfloat16, False, 1536),
        (torch.bfloat16, True, 3072),
    ],
)
def test_short_segments_are_left_to_pytorch(
    dtype: torch.dtype, trains: bool, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, ZEN_4)
    for length in (least - 1, least):
        q, k, v = (torch.zeros(length, 1, 1, dtype=dtype, requires_grad=trains) for _ in range(3))
        layout = layout_of(length)
        bias = RelativeBias(torch.zeros(length, 1, length + 1, dtype=dtype), layout.image_cells)
        taken = choose(Inputs(q, k, v, layout.images, bias))
        assert (taken == "rows") == (length == least)
        assert taken == "rows" or taken == ("sdpa" if trains else "mask")


@pytest.mark.parametrize(
    ("processor", "trains", "takes_over"),
    [
        (ZEN_5, True, True),
        (ZEN_5, False, True),
        (ZEN_4, True, False),
        (ZEN_4, False, True),
        (INTEL, True, False),
        (INTEL, False, False),
        (UNKNOWN, False, False),
    ],
)
def test_products_by_processor(
    processor: tuple[str, int], trains: bool, takes_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    on(monkeypatch, processor)
    monkeypatch.setattr(onednn_matmul, "has_avx512", lambda: True)
    monkeypatch.setattr(onednn_matmul, "_FEW_PRODUCTS", 0)
    calls, plain = [], onednn_matmul._product
    monkeypatch.setattr(onednn_matmul, "_product", lambda *operands: calls.append(1) or plain(*operands))
    layer, x = nn.Linear(24, 16), noise(50, 24)
    with torch.set_grad_enabled(trains):
        out = call_layer(layer, x)
    assert bool(calls) == takes_over
    torch.testing.assert_close(out, F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


def test_rows_are_filled_up_only_for_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = noise(33, 4)
    on(monkeypatch, INTEL)
    assert onednn_matmul.fill_rows(rows) is rows and len(onednn_matmul.fill_rows(rows, spare=1)) == 34
    assert len(onednn_matmul.fill_rows(rows.bfloat16())) == 48  # whose products are oneDNN's with any processor
    with torch.autocast("cpu", torch.bfloat16):
        assert len(onednn_matmul.fill_rows(rows)) == 48
    on(monkeypatch, ZEN_5)
    assert len(onednn_matmul.fill_rows(rows)) == 48


@pytest.mark.parametrize(
    "options", [{}, {"window_size": 5, "window_block_indexes": (0,), "use_rel_pos": True}], ids=str
)
def test_the_processor_changes_no_value(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_matmul, "_FEW_PRODUCTS", 0)
    monkeypatch.setattr(cpu_sliced, "_LONG_SEGMENT", 1)
    monkeypatch.setattr(cpu_sliced, "_LONG_WITH_BIAS", 20)
    model = APTViT(img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2, thresholds=(4.0,), **options)
    images = normalise(128 + 40 * noise(2, 3, 32, 36).clamp(-3, 3))
    found = []
    for processor in (ZEN_5, ZEN_4, INTEL):
        on(monkeypatch, processor)
        (out,) = model(images)
        found.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    for others in found[1:]:
        for own, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("amx", "avx512", "multiplies", "named"),
    [(True, True, True, "bfloat16 by AMX"), (False, True, True, "bfloat16 by AVX512_BF16"), (False, False, False, "")],
)
def test_who_multiplies_bfloat16(
    amx: bool, avx512: bool, multiplies: bool, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    assert runtime.multiplies_bfloat16() == multiplies
    about = runtime.describe_machine.__wrapped__()
    assert named in about and about.count("bfloat16") == multiplies
