"""Offsets of the cells of coarse patches: a plain reference cell by cell, neutral at the start, equal in all forms."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from apt_dense import APTViT
from apt_dense.hosts.torchvision.pyramid import PyramidBackbone
from apt_dense.layout.fixed import build_fixed_layout
from apt_dense.layout.packed import build_layout
from apt_dense.layout.scatter import scatter_tokens
from apt_dense.layout.tokens import TokenLayout
from apt_dense.nn.cell_offsets import CellOffsets
from apt_dense.nn.feature_pyramid import may_scatter_late
from apt_dense.weights.arguments_from_file import told_by
from apt_dense.weights.convert import from_apt

from support.references import noise, normalise, random_scale_map, randomise, tokens_of

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "thresholds": (4.0, 3.0)}
WINDOWED = {"window_size": 5, "window_block_indexes": (0,), "use_rel_pos": True}


def offsets_of(channels: int = 3) -> CellOffsets:
    module = CellOffsets(channels)
    torch.nn.init.normal_(module.quarters.weight, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(module.quarters.bias, generator=torch.Generator().manual_seed(1))
    return module


def reference(module: CellOffsets, feature_map: Tensor, scale_map: Tensor) -> Tensor:
    """Each cell goes down from its token, quarter by quarter."""
    out = feature_map.clone()
    weight = module.quarters.weight.view(2, 2, -1, feature_map.shape[1])
    bias = module.quarters.bias.view(2, 2, -1)
    for token in tokens_of(scale_map):
        for image, y, x in token.cells():
            value = feature_map[image, :, token.y, token.x]
            for level in reversed(range(token.scale)):
                row, column = (y - token.y) >> level & 1, (x - token.x) >> level & 1
                value = value + weight[row, column] @ value + bias[row, column]
            out[image, :, y, x] = value
    return out


def check(module: CellOffsets, layout: TokenLayout, scale_map: Tensor) -> None:
    feature_map = scatter_tokens(noise(layout.images.total, 3), layout)
    torch.testing.assert_close(
        module(feature_map, layout), reference(module, feature_map, scale_map), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window_size", [0, 5])
def test_each_cell_of_packed_layouts(seed: int, window_size: int) -> None:
    rng = random.Random(seed)
    h, w = rng.randint(1, 13), rng.randint(1, 13)
    scale_map = random_scale_map(rng, 2, h, w, 3, window_size, dropped=0.2)
    check(offsets_of(), build_layout(scale_map, 3, window_size, num_prefix=0 if window_size else seed % 3), scale_map)


@pytest.mark.parametrize("seed", range(6))
def test_each_cell_of_fixed_layouts(seed: int) -> None:
    rng = random.Random(seed)
    scale_map = random_scale_map(rng, 2, rng.randint(1, 13), rng.randint(1, 13), 3, dropped=0.2)
    tokens = max(len(tokens_of(scale_map[image : image + 1])) for image in range(2))
    check(offsets_of(), build_fixed_layout(scale_map, 3, tokens, 0, seed % 2), scale_map)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (3, 4)])
def test_grids_without_complete_patches(shape: tuple[int, int]) -> None:
    scale_map = torch.zeros(1, *shape, dtype=torch.int8)
    check(offsets_of(), build_layout(scale_map, 3), scale_map)
    check(offsets_of(), build_fixed_layout(scale_map, 3, shape[0] * shape[1], 0, 0, False), scale_map)


def images(batch: int = 2) -> Tensor:
    pixels = 128 + 60 * noise(batch, 3, 32, 36)
    pixels[:, :, :, :20] = 90
    return normalise(pixels.clamp(0, 255).round())


@pytest.mark.parametrize("options", [{}, WINDOWED, {"token_budget": 0.7}, {"class_token": True}], ids=str)
def test_a_new_model_is_neutral_and_a_trained_one_is_not(options: dict) -> None:
    model = APTViT(**SMALL, **options, cell_offsets=True, out_indices=(0, 1)).eval()
    for before, after in zip(plain_maps(model), model(images()), strict=True):
        torch.testing.assert_close(before, after)
    for offsets in randomise(model, 0.2).coarse_embed.cells:
        assert offsets.quarters.weight.any()
    for before, after in zip(plain_maps(model), model(images()), strict=True):
        assert not torch.allclose(before, after, atol=1e-2)


def plain_maps(model: APTViT) -> list[Tensor]:
    rows, layout = model.forward_tokens(images())
    return [scatter_tokens(each, layout) for each in rows]


@pytest.mark.parametrize("options", [{}, WINDOWED], ids=str)
def test_a_budget_that_merges_the_same_gives_the_same(options: dict) -> None:
    model = randomise(APTViT(**SMALL, **options, cell_offsets=True), 0.2)
    (expected,) = model(images(1))
    kept = int(model.patches.count(images(1)).sum())
    budget = randomise(APTViT(**SMALL, **options, cell_offsets=True, token_budget=kept), 0.2)
    if torch.equal(budget.partition(images(1)), model.partition(images(1))):
        torch.testing.assert_close(budget(images(1))[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"token_budget": 0.7}], ids=str)
def test_everything_gets_a_gradient(options: dict, dtype: torch.dtype) -> None:
    """Also for images without a coarse patch, as distributed training wants it."""
    noisy = normalise((128 + 60 * noise(1, 3, 32, 36)).clamp(0, 255).round())
    for batch in (images(), noisy):
        model = randomise(APTViT(**SMALL, **options, cell_offsets=True), 0.2)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(batch)[0].float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_uniform_model_has_none_and_thresholds_can_be_taken_away() -> None:
    assert APTViT(**{**SMALL, "thresholds": ()}, cell_offsets=True).coarse_embed is None
    model = randomise(APTViT(**SMALL, cell_offsets=True), 0.2)
    model.set_patches(thresholds=())
    torch.testing.assert_close(model(images())[0], plain_maps(model)[0])


def test_pyramids_see_them() -> None:
    """Nothing runs on tokens, which do not have them."""
    model = randomise(PyramidBackbone(APTViT(**SMALL, cell_offsets=True), 8), 0.2)
    assert not may_scatter_late(model.net)
    expected = super(PyramidBackbone, model).forward(model.net(images())[-1])
    for level, other in zip(model(images()).values(), expected, strict=True):
        torch.testing.assert_close(level, other)
    assert may_scatter_late(APTViT(**SMALL)) and may_scatter_late(APTViT(**{**SMALL, "thresholds": ()}))


def test_files_tell_of_them_and_other_formats_have_no_place() -> None:
    model = APTViT(**SMALL, cell_offsets=True, out_indices=(0, 1))
    assert APTViT.from_weights(model.state_dict()).options.cell_offsets
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert told_by(plain).arguments["cell_offsets"]
    assert any("cells." in name for name in from_apt(plain, "timm").left_out)
    plain["coarse_embed.cells.1.quarters.bias"][0] = 1
    with pytest.raises(ValueError, match=r"coarse_embed.cells.1.quarters.bias, which was trained"):
        from_apt(plain, "timm")
