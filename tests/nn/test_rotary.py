"""Rotary positions: timm's for patches of scale 0, those of their centres for all others."""

from __future__ import annotations

import random

import pytest
import torch
from timm.layers import RotaryEmbeddingCat
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3

from apt_dense.layout.packed import build_layout
from apt_dense.nn.rotary import RotaryTables, rotary_tables
from apt_dense.options import Rotary

from support.references import naive_rotary, noise, random_scale_map, tokens_by_window, tokens_of

D = 16
FORMS = [
    Rotary(),
    Rotary(temperature=100.0, grid_indexing="xy"),
    Rotary(ref_feat_shape=(16, 12)),
    Rotary(ref_feat_shape=(16, 12), grid_offset=1.0, grid_indexing="xy"),
    Rotary("dinov3", temperature=100.0, rotate_half=True),
    Rotary("dinov3", temperature=50.0, grid_offset=0.25, grid_indexing="xy"),
]


@pytest.mark.parametrize("num_prefix", [0, 5])
@pytest.mark.parametrize("rotary", FORMS, ids=str)
def test_tokens_of_all_scales_are_rotated_by_their_centres(rotary: Rotary, num_prefix: int) -> None:
    scale_map = random_scale_map(random.Random(0), 3, 8, 11, dropped=0.1)
    tokens = tokens_of(scale_map)
    assert {token.scale for token in tokens} == {0, 1, 2}
    rows = []
    for image in range(3):
        rows += [torch.tensor([0.0] * D + [1.0] * D)] * num_prefix
        rows += [naive_rotary(rotary, D, *token.centre(), (8, 11)) for token in tokens if token.image == image]
    tables = rotary_tables(rotary, D, build_layout(scale_map, 3, num_prefix=num_prefix))
    torch.testing.assert_close(tables.images, torch.stack(rows), atol=2e-5, rtol=0)
    assert tables.windows is None and tables.rotate_half == rotary.rotate_half


@pytest.mark.parametrize("rotary", FORMS, ids=str)
def test_positions_restart_in_each_window(rotary: Rotary) -> None:
    """Also in windows that are cut short, where the whole window counts."""
    scale_map = random_scale_map(random.Random(1), 2, 6, 11, num_scales=2, window_size=4)
    rows = []
    for token in (t for image in tokens_by_window(scale_map, 4) for window in image for t in window):
        y, x = token.centre()
        rows.append(naive_rotary(rotary, D, y - token.y // 4 * 4, x - token.x // 4 * 4, (4, 4)))
    tables = rotary_tables(rotary, D, build_layout(scale_map, 2, window_size=4))
    torch.testing.assert_close(tables.windows, torch.stack(rows), atol=2e-5, rtol=0)


@pytest.mark.parametrize("indexing", ["ij", "xy"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("ref", [None, (16, 12)])
def test_scale_0_is_timms_grid_form(indexing: str, half: bool, ref: tuple[int, int] | None) -> None:
    options = {"grid_indexing": indexing, "rotate_half": half, "ref_feat_shape": ref, "grid_offset": 1.0}
    timms = RotaryEmbeddingCat(D, in_pixels=False, **options).get_embed((5, 7))
    tables = rotary_tables(Rotary(**options), D, build_layout(torch.zeros(1, 5, 7, dtype=torch.int8), 1))
    torch.testing.assert_close(tables.images, timms, atol=1e-6, rtol=0)


@pytest.mark.parametrize("indexing", ["ij", "xy"])
@pytest.mark.parametrize("half", [False, True])
def test_scale_0_is_timms_dinov3_form(indexing: str, half: bool) -> None:
    timms = RotaryEmbeddingDinoV3(D, 100.0, grid_indexing=indexing, rotate_half=half).get_embed((5, 7))
    rotary = Rotary("dinov3", 100.0, grid_indexing=indexing, rotate_half=half)
    tables = rotary_tables(rotary, D, build_layout(torch.zeros(1, 5, 7, dtype=torch.int8), 1))
    torch.testing.assert_close(tables.images, timms, atol=2e-6, rtol=0)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotating_turns_pairs_of_channels(half: bool, dtype: torch.dtype) -> None:
    """A pair (a, b) is the complex number a + bi, turned by its angle."""
    angles = noise(3, D // 2)
    doubled = torch.cat([angles, angles], 1) if half else angles.repeat_interleave(2, 1)
    table = torch.cat([doubled.sin(), doubled.cos()], 1)
    x = noise(3, 2, D).to(dtype)
    pairs = [(i, i + D // 2) if half else (2 * i, 2 * i + 1) for i in range(D // 2)]
    expected = torch.empty(3, 2, D)
    for i, (a, b) in enumerate(pairs):
        turned = torch.complex(x[..., a].float(), x[..., b].float()) * torch.exp(1j * angles[:, i, None])
        expected[..., a], expected[..., b] = turned.real, turned.imag
    for windowed in (False, True):
        tables = RotaryTables(*((None, table) if windowed else (table, None)), half)
        out = tables.rotate(x, windowed)
        assert out.dtype == dtype
        torch.testing.assert_close(out, expected.to(dtype), atol=1e-6 if dtype == torch.float32 else 0, rtol=1e-5)
