"""Blocks: timm's, on packed rows; stochastic depth per image."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import GELUTanh, QuickGELU, RmsNorm, RotaryEmbeddingCat, SwiGLU, SwiGLUPacked
from timm.models.eva import EvaAttention, EvaBlock
from torch import Tensor, nn

from apt_dense.layout.fixed import build_fixed_layout
from apt_dense.layout.packed import build_layout
from apt_dense.nn.attention import Attention
from apt_dense.nn.block import Block, DropPath
from apt_dense.nn.layers import make_mlp
from apt_dense.nn.rotary import rotary_tables
from apt_dense.options import BlockOptions, Rotary

from support.references import (
    in_padded_windows,
    layout_of,
    noise,
    random_scale_map,
    randomise,
    tokens_by_window,
)

WIDTH, HEADS = 16, 4
PLAIN = BlockOptions(HEADS)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("mlp_ratio", [4.0, 2.5])
def test_block_is_timms_with_the_same_names(qkv_bias: bool, mlp_ratio: float) -> None:
    timms = randomise(timm_vit.Block(WIDTH, HEADS, mlp_ratio, qkv_bias=qkv_bias, norm_layer=torch.nn.LayerNorm), 0.3)
    ours = Block(WIDTH, BlockOptions(HEADS, mlp_ratio, qkv_bias, norm_eps=1e-5)).eval()
    ours.load_state_dict(timms.state_dict())
    x = noise(3, 7, WIDTH)
    torch.testing.assert_close(ours(x.flatten(0, 1), layout_of(7, 7, 7)), timms(x).flatten(0, 1), atol=1e-5, rtol=1e-5)


PACKED, SPLIT = ({"mlp_layer": layer, "act_layer": nn.SiLU} for layer in (SwiGLUPacked, SwiGLU))
#: Options of timm's Block next to ours.
VIT_FEATURES = [
    ({"init_values": 0.3}, {"init_values": 0.3}),
    ({"qk_norm": True}, {"qk_norm": True}),
    ({"scale_attn_norm": True, "scale_mlp_norm": True}, {"scale_attn_norm": True, "scale_mlp_norm": True}),
    ({"proj_bias": False}, {"proj_bias": False}),
    ({"act_layer": QuickGELU}, {"act_layer": "quick_gelu"}),
    ({"act_layer": GELUTanh}, {"act_layer": "gelu_tanh"}),
    ({"norm_layer": partial(RmsNorm, eps=0.1)}, {"norm_layer": "rmsnorm", "norm_eps": 0.1}),
    ({"norm_layer": RmsNorm, "qk_norm": True}, {"norm_layer": "rmsnorm", "norm_eps": 1e-6, "qk_norm": True}),
    ({**PACKED, "mlp_ratio": 5}, {"mlp_layer": "swiglu_packed", "mlp_ratio": 2.5}),
    (SPLIT, {"mlp_layer": "swiglu"}),
    ({**SPLIT, "scale_mlp_norm": True}, {"mlp_layer": "swiglu", "scale_mlp_norm": True}),
    ({**SPLIT, "act_layer": nn.GELU}, {"mlp_layer": "swiglu", "act_layer": "gelu"}),
]


@pytest.mark.parametrize(("theirs", "ours"), VIT_FEATURES, ids=str)
def test_features_of_vits_blocks(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    timms = randomise(timm_vit.Block(WIDTH, HEADS, **{"qkv_bias": True, "norm_layer": nn.LayerNorm, **theirs}), 0.3)
    block = Block(WIDTH, BlockOptions(HEADS, **{"norm_eps": 1e-5, **ours})).eval()
    block.load_state_dict(timms.state_dict())
    x = noise(3, 7, WIDTH)
    torch.testing.assert_close(block(x.flatten(0, 1), layout_of(7, 7, 7)), timms(x).flatten(0, 1), atol=2e-5, rtol=1e-5)


#: Options of timm's EvaBlock next to ours. Neither form of its attention has a bias of keys.
EVA_FEATURES = [
    ({}, {}),
    ({"qkv_bias": False}, {"qkv_bias": False}),
    ({"qkv_fused": False}, {"qkv_fused": False}),
    ({"qkv_fused": False, "qkv_bias": False}, {"qkv_fused": False, "qkv_bias": False}),
    ({"attn_type": "rope", "qkv_fused": False}, {"qkv_fused": False, "k_bias": True}),
    ({"attn_type": "rope", "qk_norm": True}, {"k_bias": True, "qk_norm": True}),
    ({"scale_attn_inner": True, "init_values": 0.2}, {"scale_attn_norm": True, "init_values": 0.2}),
    ({"swiglu_mlp": True}, {"mlp_layer": "swiglu_packed"}),
    ({"swiglu_mlp": True, "scale_mlp": True}, {"mlp_layer": "swiglu", "scale_mlp_norm": True}),
]


@pytest.mark.parametrize(("theirs", "ours"), EVA_FEATURES, ids=str)
def test_features_of_evas_blocks(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    timms = randomise(EvaBlock(WIDTH, HEADS, **theirs), 0.3)
    block = Block(WIDTH, BlockOptions(HEADS, **{"k_bias": False, **ours})).eval()
    block.load_state_dict({k.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v
                           for k, v in timms.state_dict().items()})  # fmt: skip
    x = noise(3, 7, WIDTH)
    torch.testing.assert_close(block(x.flatten(0, 1), layout_of(7, 7, 7)), timms(x).flatten(0, 1), atol=2e-5, rtol=1e-5)


def our_windows(attention: Attention, grid: Tensor, size: int, rotary: Rotary | None = None) -> Tensor:
    layout = build_layout(torch.zeros(1, *grid.shape[:2], dtype=torch.int8), 1, size)
    tables = None if rotary is None else rotary_tables(rotary, WIDTH // HEADS, layout)
    rows = attention(grid[layout.y_N, layout.x_N], layout, tables)
    return torch.empty_like(grid).index_put((layout.y_N, layout.x_N), rows)


@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": False}, {"qk_norm": True}, {"qk_norm": True, "scale_attn_norm": True}], ids=str
)
def test_padding_of_windows_with_normalised_keys(options: dict[str, bool]) -> None:
    """A padded cell has the key of a row of zeros: the bias, and the norm of the bias."""
    theirs = {"qkv_bias": True, **{k.replace("scale_attn", "scale"): v for k, v in options.items()}}
    timms = randomise(TimmAttention(WIDTH, HEADS, norm_layer=nn.LayerNorm, **theirs), 0.5)
    ours = Attention(WIDTH, BlockOptions(HEADS, norm_eps=1e-5, **options), windowed=True)
    ours.load_state_dict(timms.state_dict())
    grid = noise(5, 7, WIDTH)
    torch.testing.assert_close(our_windows(ours, grid, 4), in_padded_windows(timms, grid, 4), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_windows_with_rotary_positions_as_in_eva02s_detectors(fused: bool) -> None:
    """Positions restart in each window, scaled to the grid of pre-training; padded cells have a value but no key."""
    timms = randomise(EvaAttention(WIDTH, HEADS, qkv_fused=fused, num_prefix_tokens=0, scale_norm=False), 0.5)
    ours = Attention(WIDTH, BlockOptions(HEADS, qkv_fused=fused, k_bias=False), windowed=True)
    ours.load_state_dict(timms.state_dict())
    grid = noise(5, 7, WIDTH)
    rope = RotaryEmbeddingCat(WIDTH // HEADS, in_pixels=False, ref_feat_shape=(16, 16)).get_embed((4, 4))
    expected = in_padded_windows(timms, grid, 4, rope=rope)
    out = our_windows(ours, grid, 4, Rotary(ref_feat_shape=(16, 16)))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert (out - our_windows(ours, grid, 4)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_layer": "glu"}, "mlp_layer='glu' must be one of"),
        ({"act_layer": "relu"}, "act_layer='relu' must be one of"),
        ({"norm_layer": "batchnorm"}, "norm_layer='batchnorm' must be one of"),
    ],
)
def test_unknown_layers_are_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Block(WIDTH, BlockOptions(HEADS, **options))


@pytest.mark.parametrize("width", [48, 49, 1000, 1536])
def test_hidden_widths_survive_the_ratio(width: int) -> None:
    for hidden in (1, 7, 341, 2730, 4096):
        assert make_mlp(width, BlockOptions(1, mlp_ratio=hidden / width)).fc1.out_features == hidden


def test_images_of_different_lengths_do_not_mix() -> None:
    block = randomise(Block(WIDTH, PLAIN), 0.3)
    images = [noise(length, WIDTH, seed=length) for length in (3, 1, 6)]
    together = block(torch.cat(images), layout_of(3, 1, 6)).split([3, 1, 6])
    for image, out in zip(images, together, strict=True):
        torch.testing.assert_close(out, block(image, layout_of(len(image))), atol=1e-5, rtol=1e-5)


def test_norm_eps_reaches_both_norms() -> None:
    block = Block(WIDTH, BlockOptions(HEADS, norm_eps=0.125))
    assert block.norm1.eps == block.norm2.eps == 0.125


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="embed_dim=16 is not a multiple of num_heads=3"):
        Attention(16, BlockOptions(3))


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2.0, float("nan")])
def test_drop_path_rate_must_be_a_probability(rate: float) -> None:
    with pytest.raises(ValueError, match=r"drop path rate .* is not in \[0, 1\)"):
        DropPath(rate)


def dropped(rate: float, lengths: tuple[int, ...], branch: Tensor | None = None) -> Tensor:
    branch = torch.ones(sum(lengths), 2) if branch is None else branch
    return DropPath(rate).train()(branch, layout_of(*lengths))


def test_drop_path_keeps_or_loses_whole_images() -> None:
    lengths = (3, 1, 5) * 20
    rows = dropped(0.4, lengths)
    per_image = [part.unique().tolist() for part in rows.split(lengths)]
    assert all(len(values) == 1 for values in per_image)
    kept = torch.tensor(per_image).flatten()
    assert set(kept.tolist()) == {0.0, kept.max().item()} and kept.max().item() == pytest.approx(1 / 0.6)


def test_drop_path_preserves_the_expectation() -> None:
    # 20,000 images: four standard errors of the mean are 0.023.
    assert dropped(0.4, (1,) * 20_000).mean().item() == pytest.approx(1, abs=0.023)


def test_prefix_rows_go_with_their_image() -> None:
    layout = build_layout(torch.zeros(30, 1, 2), 1, num_prefix=1)
    rows = DropPath(0.5).train()(torch.ones(90, 1), layout).view(30, 3)
    assert (rows == rows[:, :1]).all() and len(rows.unique()) == 2


@pytest.mark.parametrize(("rate", "training"), [(0.5, False), (0.0, True), (0.0, False)])
def test_drop_path_does_nothing_in_eval_or_at_rate_0(rate: float, training: bool) -> None:
    branch = noise(4, 2)
    assert DropPath(rate).train(training)(branch, layout_of(4)) is branch


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_drop_path_keeps_the_type(dtype: torch.dtype) -> None:
    assert dropped(0.3, (2, 2), torch.ones(4, 2, dtype=dtype)).dtype == dtype


def test_dropped_block_is_the_identity() -> None:
    block = randomise(Block(WIDTH, PLAIN, drop_path=0.5)).train()
    x, layout = noise(64, WIDTH), layout_of(*[2] * 32)
    unchanged = (block(x, layout) == x).all(1).view(32, 2)
    assert (unchanged[:, 0] == unchanged[:, 1]).all()
    assert 0 < unchanged[:, 0].sum() < 32


# ---- proportional attention


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("window_size", "num_prefix"), [(0, 0), (0, 2), (4, 0)])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_coarse_key_weighs_as_several(power: float, window_size: int, num_prefix: int, fixed: bool) -> None:
    """timm's attention over the rows of each segment, every key as often as it weighs; windows are whole."""
    scale_map = random_scale_map(random.Random(3), 2, 8, 12, 3, window_size)
    scale_map[1] = scale_map[0].flip(-1)  # as many tokens
    layout = build_layout(scale_map, 3, window_size, num_prefix)
    if fixed:
        layout = build_fixed_layout(scale_map, 3, len(layout.image_N) // 2, window_size, num_prefix, False)
    timms = randomise(TimmAttention(WIDTH, HEADS, qkv_bias=True), 0.5)
    ours = Attention(WIDTH, BlockOptions(HEADS, proportional_attention=power), bool(window_size)).eval()
    ours.load_state_dict(timms.state_dict())
    x, found = noise(layout.images.total, WIDTH), []
    for window in (window for image in tokens_by_window(scale_map, window_size) for window in image):
        scales = [0] * num_prefix + [token.scale for token in window]
        times = torch.tensor([round(4 ** (scale * power)) for scale in scales])
        start = sum(len(part) for part in found)
        rows = x[start : start + len(scales)].repeat_interleave(times, 0)
        found.append(timms(rows[None])[0, times.cumsum(0) - times])
    assert max(layout.scale_N) == 2
    torch.testing.assert_close(ours(x, layout), torch.cat(found), atol=1e-5, rtol=1e-4)
