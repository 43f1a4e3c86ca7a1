"""The patches of images, and the share of tokens they leave."""

from typing import NamedTuple

from torch import Tensor, nn

from apt_dense import APTViT, PatchSelector
from apt_dense.patches.partition import count_tokens


class Patches(NamedTuple):
    """The patches of a batch of images.

    Args:
        scale_map: (B, h, w), the scale of the patch over each cell of the base grid, -1 where there is none.
        per_scale: (B, num_scales) int64, the number of patches of scale 0, 1, ... in each image.
    """

    scale_map: Tensor
    per_scale: Tensor

    @property
    def cells(self) -> int:
        """Cells of the base grid: the tokens of a uniform ViT."""
        return self.scale_map.numel()

    @property
    def tokens_kept(self) -> float:
        """Patches as a share of the cells, in [0, 1]."""
        return self.per_scale.sum().item() / self.cells


def choose_patches(selector: PatchSelector, images: Tensor) -> Patches:
    """Cut normalised images (B, 3, H, W) into patches; the selector of an ``APTViT`` is its ``patches``."""
    return count_patches(selector.scale_map(images), selector.num_scales)


def count_patches(scale_map: Tensor, num_scales: int) -> Patches:
    """Count the patches of a scale map (B, h, w)."""
    return Patches(scale_map, count_tokens(scale_map, num_scales))


class TokenCounter:
    """Counts the tokens and the base grid's cells, padding included, of all forward passes of an :class:`APTViT`."""

    def __init__(self, backbone: APTViT) -> None:
        self._tokens = self._cells = 0
        # The first block is called once per forward pass, with the layout as its argument.
        backbone.blocks[0].register_forward_hook(self._count)

    def _count(self, block: nn.Module, arguments: tuple, output: Tensor) -> None:
        layout = arguments[1]
        self._tokens += len(layout.image_N)
        self._cells += layout.row_Bhw.numel()

    def take_counts(self) -> tuple[int, int]:
        """Return tokens and cells since the last call."""
        counts = self._tokens, self._cells
        self._tokens = self._cells = 0
        return counts

    def take(self) -> float:
        """Return the tokens as a share of the cells since the last call, 1 without thresholds; NaN if there was no
        forward pass."""
        tokens, cells = self.take_counts()
        return tokens / cells if cells else float("nan")
