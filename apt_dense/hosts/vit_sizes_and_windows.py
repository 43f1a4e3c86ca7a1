"""Sizes of plain ViTs by name, and which of their blocks ViTDet gives windows."""

from typing import NamedTuple

WINDOW_SIZE = 14  # cells; ViTDet's, and 224 pixels, which most ViTs are trained on
GLOBAL_BLOCKS = 4  # evenly spread, as in ViTDet; the other blocks attend inside windows


class ViTSize(NamedTuple):
    """The arguments of a ViT that its size decides."""

    embed_dim: int
    depth: int
    num_heads: int


#: "demo" trains on two CPU cores within minutes; the others are those of DeiT (tiny, small) and ViTDet.
SIZES = {
    "demo": ViTSize(192, 4, 3),
    "tiny": ViTSize(192, 12, 3),
    "small": ViTSize(384, 12, 6),
    "base": ViTSize(768, 12, 12),
    "large": ViTSize(1024, 24, 16),
    "huge": ViTSize(1280, 32, 16),
}


def windowed_blocks(depth: int) -> tuple[int, ...]:
    """Return the indices of the blocks with windows: of 12, all but 2, 5, 8 and 11; of up to 7, none."""
    every = max(1, depth // GLOBAL_BLOCKS)
    return tuple(block for block in range(depth) if (block + 1) % every)
