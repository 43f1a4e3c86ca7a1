"""Patch embedding: images + layout -> packed tokens (R, C).

A patch P of scale s becomes E(resize(P)) + position + Zero(ConvDown(E(parts of P))): the host's patch embedding E of
the patch shrunk to the base size, plus a correction from its base-size parts that starts at zero (paper, section 3;
the released code's form). So a new model sees of a coarse patch just what the host would see of the shrunk image.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from apt_dense.layout.tokens import Candidates, TokenLayout
from apt_dense.nn.layers import make_norm
from apt_dense.nn.positions import AbsolutePositions
from apt_dense.ops.cpu_layers import call_layer, call_on_map
from apt_dense.options import BlockOptions, ModelOptions


class PatchEmbed(nn.Module):
    """The host's patch embedding E, parameters named as in timm: ``proj``, and ``norm`` if there is one."""

    def __init__(
        self,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)
        self.norm = nn.Identity() if norm is None else norm

    @classmethod
    def from_options(cls, model: ModelOptions, blocks: BlockOptions) -> "PatchEmbed":
        """The embedding of a model; ``blocks`` say what kind of norms it has."""
        norm = make_norm(blocks)(model.embed_dim) if model.embed_norm else None
        return cls(model.patch_size, model.in_chans, model.embed_dim, model.patch_bias, norm)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> one embedding per complete patch (B, H // p, W // p, C)."""
        return self.norm(call_on_map(self.proj, images).permute(0, 2, 3, 1))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Patches (n, in_chans, p, p) cut out of images -> their embeddings (n, C)."""
        return self.norm(call_layer(self.proj, pixels).flatten(1))


class CoarseEmbed(nn.Module):
    """The correction Zero(ConvDown(parts)) of coarse patches: one 2 x 2 convolution of stride 2 for all scales,
    applied s times, then a linear layer that starts at zero."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(embed_dim, embed_dim, kernel_size=2, stride=2)
        self.zero = nn.Linear(embed_dim, embed_dim)
        self.reset_zero()

    def reset_zero(self) -> None:
        """Make the correction zero."""
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, parts: Tensor) -> Tensor:
        """Embedded parts (N, 2**s, 2**s, C) of N patches of scale s -> corrections (N, C)."""
        while parts.shape[1] > 1:
            parts = self.halve(parts)
        return self.add(parts.flatten(1))

    def halve(self, parts: Tensor) -> Tensor:
        """ConvDown once: (N, h, w, C) -> (N, h // 2, w // 2, C)."""
        h, w = (side // 2 for side in parts.shape[1:3])
        blocks = parts[:, : 2 * h, : 2 * w]
        if not h or not w:  # a block at least, which convolutions want, so that the layer gets a gradient
            blocks = F.pad(blocks, (0, 0, 0, 0 if w else 2, 0, 0 if h else 2))
        return call_layer(self.down, blocks.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, :h, :w]

    def add(self, halved: Tensor) -> Tensor:
        """Zero: (..., C) -> (..., C)."""
        return call_layer(self.zero, halved)


class Embeddings(NamedTuple):
    """The embeddings of patches of all scales."""

    patch: PatchEmbed
    coarse: CoarseEmbed | None = None  # the correction of coarse patches; None if there are none


def embed_patches(
    images: Tensor,
    layout: TokenLayout,
    embeddings: Embeddings,
    positions: AbsolutePositions | None,
    prefix: Tensor | None = None,
) -> Tensor:
    """The packed rows (R, C) of a batch.

    Where the layout's candidates are all patches of every scale, of which each token then takes its own, no shape
    depends on what was chosen, for a third more embedding.

    Args:
        images: (B, 3, H, W) normalised, whole patches.
        positions: absolute positions; None for none.
        prefix: (num_prefix, C), positions included.
    """
    patch_embed, coarse_embed = embeddings
    cells = patch_embed(images)
    parts, halved = [], cells
    for patches in layout.candidates:
        if patches.scale == 0:
            tokens = patches.take(cells)
        elif patches.are_all:
            halved = coarse_embed.halve(halved)
            shrunk = _embed_shrunk(images, patches.scale, patch_embed, cells)
            tokens = patches.take(shrunk + coarse_embed.add(halved))
        else:
            shrunk = _embed_chosen(images, patches, patch_embed)
            tokens = shrunk + coarse_embed(patches.take_parts(cells))
        if positions is not None:
            tokens = tokens + patches.take_shared(positions.at_scale(layout.grid, patches.scale))
        parts.append(tokens)
    if layout.num_prefix:
        parts.append(prefix.repeat(layout.batch, 1))
    return layout.assemble(parts)


def _embed_chosen(images: Tensor, patches: Candidates, patch_embed: PatchEmbed) -> Tensor:
    """E of some patches of a scale, shrunk by 2**scale (bilinear): (n, C)."""
    size = patch_embed.patch_size
    small = _shrink(images, patches.scale, size)
    if small.numel() == 0:
        pixels = images.new_zeros(0, images.shape[1], size, size)
    else:
        tiles = small.unfold(2, size, size).unfold(3, size, size)  # (B, 3, rows, columns, p, p)
        pixels = tiles[patches.image, :, patches.y >> patches.scale, patches.x >> patches.scale]
    return patch_embed.embed_pixels(pixels)


def _embed_shrunk(images: Tensor, scale: int, patch_embed: PatchEmbed, cells: Tensor) -> Tensor:
    """E of all complete patches of a scale, shrunk: (B, h >> scale, w >> scale, C), of the type of ``cells``."""
    small = _shrink(images, scale, patch_embed.patch_size)
    if small.numel() == 0:
        h, w = (n // patch_embed.patch_size for n in small.shape[-2:])
        return cells.new_zeros(len(images), h, w, cells.shape[-1])
    return patch_embed(small)


def _shrink(images: Tensor, scale: int, patch_size: int) -> Tensor:
    """The complete patches of a scale, shrunk by 2**scale.

    Samples of a patch lie inside it, so that shrinking the image shrinks each patch separately.
    """
    size = patch_size << scale
    rows, columns = (n // size * size for n in images.shape[-2:])
    if rows == 0 or columns == 0:
        return images.new_zeros(*images.shape[:2], rows >> scale, columns >> scale)
    return F.interpolate(images[..., :rows, :columns], scale_factor=0.5**scale, mode="bilinear")
