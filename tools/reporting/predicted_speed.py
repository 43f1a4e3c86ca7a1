"""The speed-up that fewer tokens promise, from the floating point operations of a plain ViT.

The count rests on the architecture alone: matrix products of a ViT whose blocks all attend globally (an MLP ratio of 4,
patches of three channels), a multiply-add as two. It holds where products are what takes the time, as for large models
and images; small ones are slower than this says, and windows make attention cheaper. Heads are not counted.
"""

from collections.abc import Sequence

from apt_dense.hosts.vit_sizes_and_windows import SIZES, ViTSize

MODELS = {name: SIZES[name] for name in ("tiny", "small", "base", "large")}


def flops(size: ViTSize, patch_size: int, cells: int, per_scale: Sequence[int]) -> int:
    """Operations of a forward pass over one image.

    Args:
        cells: of the base grid, all of which are embedded.
        per_scale: tokens of scale 0, 1, ...
    """
    channels, tokens = size.embed_dim, sum(per_scale)
    embedding = 2 * 3 * patch_size**2 * channels
    block = 24 * channels**2 * tokens + 4 * channels * tokens**2
    # Of a coarse patch, the shrunk patch is embedded, too; convolutions join its parts, a linear layer follows.
    coarse = sum(
        count * (embedding + 2 * channels**2 + 8 * channels**2 * sum(4**step for step in range(scale)))
        for scale, count in enumerate(per_scale)
        if scale
    )
    return cells * embedding + coarse + size.depth * block


def speed_up(size: ViTSize, patch_size: int, photos: Sequence[tuple[int, Sequence[int]]]) -> float:
    """Operations of the uniform ViT as a multiple of those of the adaptive one, over photos of (cells, per_scale)."""
    uniform = sum(flops(size, patch_size, cells, [cells]) for cells, _ in photos)
    return uniform / sum(flops(size, patch_size, cells, per_scale) for cells, per_scale in photos)
