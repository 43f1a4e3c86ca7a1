"""Every family of plain ViTs, with its own positions, tokens and layers: timm's values without coarse patches, and with
them those of a loop over the tokens, through timm's own blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.layers import RotaryEmbeddingCat
from timm.models.eva import Eva
from torch import Tensor, nn

from apt_dense import APTViT
from apt_dense.layout.packed import build_layout
from apt_dense.nn.patch_embed import Embeddings, embed_patches
from apt_dense.weights.formats import rename
from apt_dense.weights.load import load_backbone
from apt_dense.weights.timm_arguments import apt_arguments

from support.families import ALL, FAMILIES, HEADS, WIDTH, timm_model
from support.references import Token, bicubic, in_padded_windows, naive_rotary, noise, normalise, randomise, tokens_of


def adaptive(theirs: nn.Module, thresholds: tuple[float, ...], **options: Any) -> APTViT:
    """Ours with timm's weights, and with random ones for what only ours has."""
    ours = APTViT.from_timm(theirs, thresholds=thresholds, **options)
    randomise(ours.coarse_embed, 0.1)
    return ours.eval()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


# ---- without coarse patches


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("family", ["clip", "dinov2 reg", "eva02 clip", "dinov3", "pe core"])
@torch.inference_mode()
def test_intermediates_are_timms(family: str, norm: bool) -> None:
    theirs = timm_model(family)
    ours = APTViT.from_timm(theirs, out_indices=(0, 1), final_norm=norm, norm_intermediates=norm)
    images = noise(2, 3, 3 * ours.patch_size, 5 * ours.patch_size)
    expected = theirs.forward_intermediates(images, indices=[0, 1], norm=norm, intermediates_only=True)
    for out, other in zip(ours(images), expected, strict=True):
        assert_close(out, other)


@pytest.mark.parametrize("family", ALL)
def test_gradients_are_timms(family: str) -> None:
    theirs = timm_model(family)
    ours = APTViT.from_timm(theirs)
    images = noise(2, 3, 3 * ours.patch_size, 4 * ours.patch_size)
    weights = noise(2, WIDTH, 12)
    (ours(images)[0].flatten(2) * weights).sum().backward()
    (theirs.forward_features(images)[:, theirs.num_prefix_tokens :].mT * weights).sum().backward()
    expected = {rename(name, {}): parameter for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=2e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", ["dinov2", "eva02 tiny", "eva02 base", "dinov3", "pe core"])
@torch.inference_mode()
def test_another_image_size_by_name(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``img_size`` goes to timm, which resamples absolute positions and knows what becomes of rotary ones."""
    create, built = timm.create_model, []

    def small(name: str, **options: Any) -> nn.Module:
        model = randomise(create(name, embed_dim=WIDTH, depth=2, num_heads=HEADS, **options), 0.1)
        built.append(model)
        return model

    monkeypatch.setattr(timm, "create_model", small)
    name = FAMILIES[family]
    patch = 14 if "patch14" in name else 16
    ours = APTViT.from_timm(name, img_size=(3 * patch, 5 * patch))
    images = noise(1, 3, 3 * patch, 5 * patch)
    assert_close(ours(images)[0].flatten(2), built[0].forward_features(images)[:, built[0].num_prefix_tokens :].mT)


@pytest.mark.parametrize("family", ALL)
def test_state_dicts_load(family: str) -> None:
    """With timm's names, from a model of another size, with what other versions of timm keep next to the weights."""
    theirs = timm_model(family)
    state = {**theirs.state_dict(), "rope.periods": torch.ones(4), "rope.pos_embed": torch.ones(16, 32)}
    state |= {"blocks.0.attn.rope.freqs_cos": torch.ones(4), "blocks.1.attn.k_bias": torch.zeros(WIDTH)}
    ours = APTViT(**{**apt_arguments(theirs), "img_size": 6 * theirs.patch_embed.patch_size[0]}).eval()
    report = load_backbone(ours, state)
    assert not report.missing and not report.unexpected
    images = noise(1, 3, *ours.img_size)
    expected = theirs.forward_features(images)[:, theirs.num_prefix_tokens :].mT
    assert_close(ours(images)[0].flatten(2), expected)


# ---- with coarse patches


def naive_position(positions: Tensor, grid: tuple[int, int], token: Token) -> Tensor:
    """The absolute position at a token's centre, a widened bicubic sample of positions (gh, gw, C)."""
    side, weights = 2**token.scale, []
    for first, trained, cells in zip((token.y, token.x), positions.shape, grid, strict=False):
        spacing = trained / cells
        weights.append(torch.tensor(bicubic((first + side / 2) * spacing, trained, side * spacing)))
    return torch.einsum("h,w,hwc->c", *weights, positions)


def naive_rows(theirs: nn.Module, ours: APTViT, image: Tensor, tokens: list[Token]) -> Tensor:
    """The rows (1, R, C) that enter timm's blocks, token by token."""
    layout = build_layout(ours.partition(image), 3)
    numbers = torch.cat([candidates.numbers for candidates in layout.candidates])
    patches = replace(layout, num_prefix=0, source_R=numbers.argsort())
    rows = list(embed_patches(image, patches, Embeddings(ours.patch_embed, ours.coarse_embed), None))
    prefix = [token[0] for token in (theirs.cls_token, theirs.reg_token) if token is not None]
    prefix = list(torch.cat(prefix)) if prefix else []
    if theirs.pos_embed is not None:
        count = 0 if theirs.no_embed_class else len(prefix)
        positions = theirs.pos_embed[0, count:].unflatten(0, theirs.patch_embed.grid_size)
        rows = [row + naive_position(positions, layout.grid, token) for row, token in zip(rows, tokens, strict=True)]
        prefix = [row + theirs.pos_embed[0, i] for i, row in enumerate(prefix)] if count else prefix
    return theirs.norm_pre(torch.stack(prefix + rows))[None]


def naive_forward(theirs: nn.Module, ours: APTViT, image: Tensor) -> Tensor:
    """The feature map (1, C, h, w) of one image through timm's own blocks."""
    scale_map = ours.partition(image)
    tokens, grid = tokens_of(scale_map), tuple(scale_map.shape[1:])
    x = naive_rows(theirs, ours, image, tokens)
    options = {}
    if ours.rotary is not None:
        table = [naive_rotary(ours.rotary, WIDTH // HEADS, *token.centre(), grid) for token in tokens]
        options = {"rope": torch.stack(table)}
    for block in theirs.blocks:
        x = block(x, **options) if isinstance(theirs, Eva) else block(x)
    x = theirs.norm(x)[0, theirs.num_prefix_tokens :]
    feature_map = torch.empty(1, x.shape[1], *grid)
    for row, token in zip(x, tokens, strict=True):
        for _, cell_y, cell_x in token.cells():
            feature_map[0, :, cell_y, cell_x] = row
    return feature_map


def half_flat(rows: int, columns: int) -> Tensor:
    pixels = torch.randint(0, 256, (1, 3, rows, columns), generator=torch.Generator().manual_seed(0))
    pixels[..., columns // 2 :] = 90
    return normalise(pixels)


@pytest.mark.parametrize("family", ALL)
@torch.inference_mode()
def test_coarse_tokens_are_those_of_a_loop(family: str) -> None:
    """Patches of all scales at once: the trained grid, and one of other, odd sizes."""
    theirs = timm_model(family)
    ours = adaptive(theirs, (5.0, 5.0))
    for rows, columns in ((4, 4), (5, 11)):
        image = half_flat(rows * ours.patch_size, columns * ours.patch_size)
        assert ours.partition(image).unique().tolist() == ([0, 1] if rows == 4 else [0, 1, 2])
        assert_close(ours(image)[0], naive_forward(theirs, ours, image))


@pytest.mark.parametrize("family", ALL)
@torch.inference_mode()
def test_coarse_tokens_within_a_budget(family: str) -> None:
    """In fixed shapes, also those that allow for inert rows."""
    theirs = timm_model(family)
    for drop_padding in (False, True):
        ours = adaptive(theirs, (5.0, 5.0), token_budget=0.45, drop_padding=drop_padding)
        image = half_flat(5 * ours.patch_size, 11 * ours.patch_size)
        assert ours.partition(image).unique().tolist() == [0, 1, 2]
        assert_close(ours(image)[0], naive_forward(theirs, ours, image))


@pytest.mark.parametrize("family", ALL)
@torch.inference_mode()
def test_merging_everything(family: str) -> None:
    theirs = timm_model(family)
    ours = adaptive(theirs, (100.0, 100.0))
    for grid, scales in (((4, 8), [2]), ((6, 5), [0, 1, 2])):
        image = half_flat(*(side * ours.patch_size for side in grid))
        assert ours.partition(image).unique().tolist() == scales
        assert_close(ours(image)[0], naive_forward(theirs, ours, image))


@pytest.mark.parametrize("family", ["dinov2 giant reg", "eva02 base", "dinov3"])
def test_checkpointed_blocks_give_the_same_gradients(family: str) -> None:
    gradients = []
    for recompute in (False, True):
        ours = adaptive(timm_model(family), (5.0, 5.0)).train()
        ours.checkpoint_blocks = recompute
        ours(half_flat(5 * ours.patch_size, 11 * ours.patch_size))[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in ours.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


# ---- windows


def detector_forward(theirs: Eva, images: Tensor, window_size: int) -> Tensor:
    """EVA-02 as its detectors run it: windows in block 0, in which positions start again, padding after the norm."""
    rope = RotaryEmbeddingCat(WIDTH // HEADS, in_pixels=False, ref_feat_shape=(16, 16))
    grid = theirs.patch_embed.dynamic_feat_size(images.shape[2:])
    x, over_image = theirs._pos_embed(theirs.patch_embed(images))
    first, second = theirs.blocks
    inside = [
        in_padded_windows(first.attn, rows.unflatten(0, grid), window_size, rope=rope.get_embed([window_size] * 2))
        for rows in first.norm1(x)
    ]
    x = x + torch.stack(inside).flatten(1, 2)
    x = second(x + first.mlp(first.norm2(x)), rope=over_image)
    return x.mT.unflatten(2, grid)


@pytest.mark.parametrize("cells", [(8, 8), (6, 9)])
@torch.inference_mode()
def test_windows_as_in_eva02s_detectors(cells: tuple[int, int]) -> None:
    theirs = timm_model("eva02 base", class_token=False, patch_size=16, img_size=64, global_pool="avg")
    options = {"window_size": 4, "window_block_indexes": (0,)}
    images = noise(2, 3, *(16 * side for side in cells))
    for thresholds in ((), (-1.0, -1.0)):
        (out,) = APTViT.from_timm(theirs, thresholds=thresholds, **options)(images)
        assert_close(out, detector_forward(theirs, images, 4))


def test_windows_of_coarse_patches_with_rotary_positions() -> None:
    """Gradients everywhere, and images that do not touch."""
    theirs = timm_model("eva02 base", class_token=False, patch_size=16, img_size=64, global_pool="avg")
    ours = APTViT.from_timm(theirs, thresholds=(5.0, 5.0), window_size=4, window_block_indexes=(0,))
    randomise(ours.coarse_embed, 0.1)
    images = torch.cat([half_flat(96, 144), noise(1, 3, 96, 144)])
    assert ours.partition(images).unique().tolist() == [0, 1, 2]
    (out,) = ours(images)
    torch.testing.assert_close(ours(images[:1])[0], out[:1], atol=1e-5, rtol=0)
    out.square().sum().backward()
    assert not [name for name, p in ours.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("family", ["pe core", "dinov3", "eva02 base"])
def test_prefix_tokens_rule_windows_out(family: str) -> None:
    with pytest.raises(ValueError, match=r"class_token=True and reg_tokens=\d together with window_size=4"):
        APTViT.from_timm(timm_model(family), window_size=4, window_block_indexes=(0,))
