"""Patch embedding: images + layout -> packed tokens (R, C).

A patch P of scale s becomes E(resize(P)) + position + Zero(ConvDown(E(parts of P))): the host's patch embedding E of
the patch shrunk to the base size, plus a correction from its base-size parts that starts at zero (paper, section 3;
the released code's form). So a new model sees of a coarse patch just what the host would see of the shrunk image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_dense.layout.packed import TokenLayout
from apt_dense.nn.layers import Linear
from apt_dense.nn.positions import positions_of_scale
from apt_dense.ops.linear import linear


class PatchEmbed(nn.Module):
    """The host's patch embedding E, parameters named as in timm (``proj``)."""

    def __init__(self, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> one embedding per complete patch (B, H // p, W // p, C)."""
        return self.proj(images).permute(0, 2, 3, 1)


class CoarseEmbed(nn.Module):
    """The correction Zero(ConvDown(parts)) of coarse patches: one 2 x 2 convolution of stride 2 for all scales,
    applied s times, then a linear layer that starts at zero."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(embed_dim, embed_dim, kernel_size=2, stride=2)
        self.zero = Linear(embed_dim, embed_dim)
        self.reset_zero()

    def reset_zero(self) -> None:
        """Make the correction zero."""
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, parts: Tensor) -> Tensor:
        """Embedded parts (N, 2**s, 2**s, C) of N patches of scale s -> corrections (N, C)."""
        while parts.shape[1] > 1:
            parts = self.halve(parts)
        return self.zero(parts.flatten(1))

    def halve(self, parts: Tensor) -> Tensor:
        """ConvDown once: (N, h, w, C) -> (N, h // 2, w // 2, C)."""
        # A stride-2 convolution of disjoint 2 x 2 blocks is one matrix product.
        weight = self.down.weight.permute(0, 2, 3, 1).flatten(1)
        n, h, w, channels = parts.shape
        blocks = parts[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, channels).transpose(2, 3)
        return linear(blocks.reshape(n, h // 2, w // 2, 4 * channels), weight, self.down.bias)


def embed_patches(
    images: Tensor,
    layout: TokenLayout,
    patch_embed: PatchEmbed,
    coarse_embed: CoarseEmbed | None,
    positions: Tensor | None,
    prefix: Tensor | None = None,
    antialias: bool = True,
) -> Tensor:
    """The packed rows (R, C) of a batch.

    Args:
        images: (B, 3, H, W) normalised, whole patches.
        coarse_embed: the correction of coarse patches; None if the layout has scale 0 only.
        positions: (gh, gw, C) absolute embedding on its trained grid; None for none.
        prefix: (num_prefix, C), positions included.
        antialias: how ``positions`` are resampled to the base grid.
    """
    cells = patch_embed(images)
    if layout.is_fixed:
        return _embed_in_fixed_shapes(images, cells, layout, patch_embed, coarse_embed, positions, prefix, antialias)
    parts = []
    for scale, chosen in enumerate(layout.by_scale):
        image, y, x = layout.image_N[chosen], layout.y_N[chosen], layout.x_N[chosen]
        if scale == 0:
            tokens = _take(cells.flatten(0, 2), image, y, x, layout.grid)
        else:
            shrunk = _shrunk_patches(images, image, y, x, scale, patch_embed)
            tokens = shrunk + coarse_embed(_blocks(cells, image, y, x, scale))
        if positions is not None:
            tokens = tokens + _positions(positions, layout.grid, scale, y, x, antialias)
        parts.append(tokens)
    if layout.num_prefix:
        parts.append(prefix.repeat(layout.batch, 1))
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rows.index_select(0, layout.source_R)


def _embed_in_fixed_shapes(
    images: Tensor, cells: Tensor, layout: TokenLayout, patch_embed: PatchEmbed, coarse_embed: CoarseEmbed | None,
    positions: Tensor | None, prefix: Tensor | None, antialias: bool,
) -> Tensor:  # fmt: skip
    """The same rows: embed all patches of every scale, of which each token then takes its own. For a third more
    embedding, no shape depends on what was chosen."""
    tables, first, index = [], 0, torch.zeros_like(layout.scale_N)
    corrections = cells
    for scale in range(layout.image_cells.num_scales):
        h, w = (n >> scale for n in layout.grid)
        table = cells
        if scale > 0:
            corrections = coarse_embed.halve(corrections)
            table = _shrunk(images, scale, patch_embed) + coarse_embed.zero(corrections)
        if positions is not None:
            table = table + positions_of_scale(positions, layout.grid, scale, antialias)
        tables.append(table.flatten(0, 2))
        place = (layout.image_N * h + (layout.y_N >> scale)) * w + (layout.x_N >> scale)
        index = torch.where(layout.scale_N == scale, place + first, index)
        first += len(tables[-1])
    rows = torch.cat(tables).index_select(0, index)
    if not layout.num_prefix:
        return rows
    rows = rows.unflatten(0, (layout.batch, -1))
    return torch.cat([prefix.to(rows.dtype).expand(len(rows), -1, -1), rows], 1).flatten(0, 1)


def _take(flat: Tensor, image: Tensor, y: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rows of (B * h * w, C) at those cells. index_select, whose backward is a fast index_add."""
    h, w = grid
    return flat.index_select(0, (image * h + y) * w + x)


def _positions(positions: Tensor, grid: tuple[int, int], scale: int, y: Tensor, x: Tensor, antialias: bool) -> Tensor:
    table = positions_of_scale(positions, grid, scale, antialias)
    return table.flatten(0, 1).index_select(0, (y >> scale) * table.shape[1] + (x >> scale))


def _blocks(cells: Tensor, image: Tensor, y: Tensor, x: Tensor, scale: int) -> Tensor:
    """Embedded cells (B, h, w, C) -> those of the patches at (image, y, x): (N, 2**s, 2**s, C)."""
    _, h, w, channels = cells.shape
    side = torch.arange(2**scale, device=cells.device)
    image, y, x = image.view(-1, 1, 1), y.view(-1, 1, 1) + side[:, None], x.view(-1, 1, 1) + side
    index = (image * h + y) * w + x
    return cells.flatten(0, 2).index_select(0, index.flatten()).view(*index.shape, channels)


def _shrunk_patches(images: Tensor, image: Tensor, y: Tensor, x: Tensor, scale: int, patch_embed: PatchEmbed) -> Tensor:
    """E of the patches at (image, y, x), shrunk by 2**scale (bilinear): (N, C)."""
    size = patch_embed.patch_size
    small = _shrunk_image(images, scale, size)
    if small.numel() == 0:
        patches = images.new_zeros(0, images.shape[1], size, size)
    else:
        tiles = small.unfold(2, size, size).unfold(3, size, size)  # (B, 3, rows, columns, p, p)
        patches = tiles[image, :, y >> scale, x >> scale]
    weight = patch_embed.proj.weight.flatten(1)
    return linear(patches.flatten(1).to(weight.dtype), weight, patch_embed.proj.bias)


def _shrunk(images: Tensor, scale: int, patch_embed: PatchEmbed) -> Tensor:
    """E of all complete patches of a scale, shrunk: (B, h >> scale, w >> scale, C)."""
    small = _shrunk_image(images, scale, patch_embed.patch_size)
    if small.numel() == 0:
        h, w = (n // patch_embed.patch_size for n in small.shape[-2:])
        return images.new_zeros(len(images), h, w, patch_embed.proj.out_channels)
    return patch_embed(small)


def _shrunk_image(images: Tensor, scale: int, patch_size: int) -> Tensor:
    """Complete patches of a scale, shrunk by 2**scale. Samples of a patch lie inside it, so that shrinking the image
    shrinks each patch on its own."""
    size = patch_size << scale
    rows, columns = (n // size * size for n in images.shape[-2:])
    if rows == 0 or columns == 0:
        return images.new_zeros(*images.shape[:2], rows >> scale, columns >> scale)
    return F.interpolate(images[..., :rows, :columns], scale_factor=0.5**scale, mode="bilinear")
