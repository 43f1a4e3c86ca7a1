"""Blocks: timm's, on packed rows; stochastic depth per image."""

from __future__ import annotations

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from references import layout_of, noise, randomise
from torch import Tensor

from apt_dense.blocks import Attention, Block, DropPath
from apt_dense.layout import build_layout

WIDTH, HEADS = 16, 4


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("mlp_ratio", [4.0, 2.5])
def test_block_is_timms_with_the_same_names(qkv_bias: bool, mlp_ratio: float) -> None:
    timms = randomise(timm_vit.Block(WIDTH, HEADS, mlp_ratio, qkv_bias=qkv_bias, norm_layer=torch.nn.LayerNorm), 0.3)
    ours = Block(WIDTH, HEADS, mlp_ratio, qkv_bias, norm_eps=1e-5).eval()
    ours.load_state_dict(timms.state_dict())
    x = noise(3, 7, WIDTH)
    torch.testing.assert_close(ours(x.flatten(0, 1), layout_of(7, 7, 7)), timms(x).flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_images_of_different_lengths_do_not_mix() -> None:
    block = randomise(Block(WIDTH, HEADS), 0.3)
    images = [noise(length, WIDTH, seed=length) for length in (3, 1, 6)]
    together = block(torch.cat(images), layout_of(3, 1, 6)).split([3, 1, 6])
    for image, out in zip(images, together, strict=True):
        torch.testing.assert_close(out, block(image, layout_of(len(image))), atol=1e-5, rtol=1e-5)


def test_norm_eps_reaches_both_norms() -> None:
    block = Block(WIDTH, HEADS, norm_eps=0.125)
    assert block.norm1.eps == block.norm2.eps == 0.125


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="embed_dim=16 is no multiple of num_heads=3"):
        Attention(16, 3)


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
    block = randomise(Block(WIDTH, HEADS, drop_path=0.5)).train()
    x, layout = noise(64, WIDTH), layout_of(*[2] * 32)
    unchanged = (block(x, layout) == x).all(1).view(32, 2)
    assert (unchanged[:, 0] == unchanged[:, 1]).all()
    assert 0 < unchanged[:, 0].sum() < 32
