"""Patch embedding: a coarse token is E(shrunk patch) + position + Zero(ConvDown(E(parts))), term by term."""

from __future__ import annotations

import random

import pytest
import torch
from timm.layers import PatchEmbed as TimmPatchEmbed
from torch import Tensor, nn

from apt_dense.layout.fixed import build_fixed_layout
from apt_dense.layout.packed import build_layout
from apt_dense.nn.patch_embed import CoarseEmbed, Embeddings, PatchEmbed, embed_patches
from apt_dense.nn.positions import AbsolutePositions, positions_of_scale

from support.references import noise, random_scale_map, randomise, tokens_of

PATCH, WIDTH = 4, 6


def embedding(seed: int = 0) -> PatchEmbed:
    return randomise(PatchEmbed(PATCH, 3, WIDTH), seed=seed)


def naive_embed(embed: PatchEmbed, patch: Tensor) -> Tensor:
    """E of one patch (3, p, p): a weighted sum of its pixels."""
    return torch.stack([(kernel * patch).sum() for kernel in embed.proj.weight]) + embed.proj.bias


def naive_shrink(patch: Tensor, scale: int) -> Tensor:
    """Bilinear sampling by 2**s: each sample lies between the four central pixels of its 2**s x 2**s block."""
    if scale == 0:
        return patch
    side, middle = 2**scale, 2 ** (scale - 1) - 1
    small = torch.zeros(3, PATCH, PATCH)
    for y in range(PATCH):
        for x in range(PATCH):
            top, left = y * side + middle, x * side + middle
            small[:, y, x] = patch[:, top : top + 2, left : left + 2].mean((1, 2))
    return small


def naive_correction(coarse: CoarseEmbed, embed: PatchEmbed, patch: Tensor, scale: int) -> Tensor:
    """Zero(ConvDown(E(parts))) of one patch, block by block."""
    parts = {
        (y, x): naive_embed(embed, patch[:, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH])
        for y in range(2**scale)
        for x in range(2**scale)
    }
    for level in reversed(range(scale)):
        parts = {
            (y, x): coarse.down.bias
            + sum(coarse.down.weight[:, :, dy, dx] @ parts[2 * y + dy, 2 * x + dx] for dy in (0, 1) for dx in (0, 1))
            for y in range(2**level)
            for x in range(2**level)
        }
    return coarse.zero.weight @ parts[0, 0] + coarse.zero.bias


def naive_token(
    image: Tensor, embed: PatchEmbed, coarse: CoarseEmbed, positions: Tensor, grid: tuple[int, int],
    scale: int, y: int, x: int,
) -> Tensor:  # fmt: skip
    side = PATCH << scale
    patch = image[:, y * PATCH : y * PATCH + side, x * PATCH : x * PATCH + side]
    token = naive_embed(embed, naive_shrink(patch, scale))
    if scale:
        token = token + naive_correction(coarse, embed, patch, scale)
    return token + positions_of_scale(positions, grid, scale)[y >> scale, x >> scale]


def test_patch_embed_is_timms() -> None:
    timms = randomise(TimmPatchEmbed(None, PATCH, 3, WIDTH, flatten=False, output_fmt="NHWC", strict_img_size=False))
    ours = PatchEmbed(PATCH, 3, WIDTH)
    ours.load_state_dict(timms.state_dict())
    images = noise(2, 3, 8, 12)
    assert torch.equal(ours(images), timms(images))


def test_coarse_embed_is_a_strided_convolution_and_a_linear_layer() -> None:
    coarse = randomise(CoarseEmbed(WIDTH))
    parts = noise(5, 4, 4, WIDTH)
    expected = coarse.zero(coarse.down(coarse.down(parts.permute(0, 3, 1, 2)))[..., 0, 0])
    torch.testing.assert_close(coarse(parts), expected)


def test_coarse_embed_starts_at_zero_and_learns() -> None:
    coarse = CoarseEmbed(WIDTH)
    out = coarse(noise(3, 2, 2, WIDTH))
    assert (out == 0).all()
    out.sum().backward()
    assert coarse.zero.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("side", [1, 2, 4])
def test_coarse_embed_of_no_patches_still_gives_gradients(side: int) -> None:
    coarse = CoarseEmbed(WIDTH)
    coarse(torch.zeros(0, side, side, WIDTH)).sum().backward()
    grads = [p.grad for name, p in coarse.named_parameters() if side > 1 or name.startswith("zero")]
    assert all(grad is not None and not grad.any() for grad in grads)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("grid", [(4, 4), (6, 5), (3, 9), (1, 2)])
def test_every_token_is_the_sum_of_its_terms(grid: tuple[int, int], fixed: bool, fresh: bool) -> None:
    scale_map = random_scale_map(random.Random(1), 2, *grid, dropped=0.0 if fixed else 0.2)
    embed, coarse = embedding(), CoarseEmbed(WIDTH)
    if not fresh:
        randomise(coarse, std=0.3)
    images, positions, prefix = noise(2, 3, grid[0] * PATCH, grid[1] * PATCH), noise(3, 3, WIDTH), noise(1, WIDTH)
    layout = build_layout(scale_map, 3, num_prefix=1)
    if fixed:
        scale_map[1] = scale_map[0]  # as many tokens
        layout = build_fixed_layout(scale_map, 3, len(tokens_of(scale_map)) // 2, num_prefix=1)
    embeddings = Embeddings(embed, coarse)
    rows = embed_patches(images, layout, embeddings, AbsolutePositions(positions), prefix)
    expected = dict.fromkeys(layout.images.offsets.tolist()[:-1], prefix[0])
    for token in tokens_of(scale_map):
        row = layout.row_Bhw[token.image, token.y, token.x].item()
        expected[row] = naive_token(images[token.image], embed, coarse, positions, grid, *token[1:])
    torch.testing.assert_close(rows, torch.stack([expected[row] for row in range(len(rows))]), atol=1e-5, rtol=1e-4)


def test_fresh_coarse_token_ignores_the_parts() -> None:
    """Without the correction, a coarse patch is what E sees of the shrunk image: pixels not sampled change nothing."""
    layout = build_layout(torch.full((1, 4, 4), 2), 3)
    images = noise(1, 3, 16, 16)
    changed = images.clone()
    changed[..., ::4, :] += 1  # bilinear sampling by 4 looks at rows 1 and 2 of each 4
    rows = [
        embed_patches(x, layout, Embeddings(embedding(), CoarseEmbed(WIDTH)), AbsolutePositions(noise(1, 1, WIDTH)))
        for x in (images, changed)
    ]
    torch.testing.assert_close(rows[0], rows[1])


def test_without_positions_and_coarse_embedding() -> None:
    embed, images = embedding(), noise(2, 3, 8, 8)
    rows = embed_patches(images, build_layout(torch.zeros(2, 2, 2), 1), Embeddings(embed), None)
    assert torch.equal(rows, embed(images).flatten(0, 2))


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_all_parameters_get_gradients_when_only_one_scale_is_used(scale: int) -> None:
    embed, coarse = embedding(), CoarseEmbed(WIDTH)
    positions = nn.Parameter(noise(4, 4, WIDTH))
    layout = build_layout(torch.full((1, 4, 4), scale), 3)
    embeddings = Embeddings(embed, coarse)
    embed_patches(noise(1, 3, 16, 16), layout, embeddings, AbsolutePositions(positions)).sum().backward()
    assert all(p.grad is not None for p in [*embed.parameters(), *coarse.parameters(), positions])


def test_no_tokens_at_all() -> None:
    layout = build_layout(torch.full((2, 4, 4), -1), 3)
    rows = embed_patches(
        noise(2, 3, 16, 16),
        layout,
        Embeddings(embedding(), CoarseEmbed(WIDTH)),
        AbsolutePositions(noise(4, 4, WIDTH)),
    )
    assert rows.shape == (0, WIDTH)
