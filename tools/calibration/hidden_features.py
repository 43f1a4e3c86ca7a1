"""What merging patches hides of a ViT's own features: a target for learned scorers that needs no labels."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.patches.first_block_scores import FirstBlocks, count_blocks

from calibration.scorer_networks import with_weights
from evidence.fast_16_bits import in_16_bits


def disagreement(features: Tensor, patch_size: int, size: int) -> Tensor:
    """How much the features of the smallest patches differ within a patch that would replace them.

    Args:
        features: (B, C, h, w), of length 1 along C.
        patch_size: pixels of the smallest patches.
        size: pixels of the patch.

    Returns:
        (B, h // n, w // n) from 0 to 1, where n = size / patch_size: 1 less the squared length of their mean, which is
        half of the mean squared distance between two of them, those with themselves counted.
    """
    mean = F.avg_pool2d(features, size // patch_size)
    return (1 - mean.square().sum(1)).clamp(0, 1)


class HiddenFeatures:
    """A target for ``train_scorer``: the :func:`disagreement` of features after the last block of a ViT.

    Args:
        model: a timm name that ``FirstBlocks`` takes.
        weights: its state dict, by timm's names.
        patch_size: pixels of the smallest patches; the ViT sees images resized until these are its own.
    """

    def __init__(self, model: str, weights: Mapping[str, Tensor], patch_size: int, device: torch.device) -> None:
        self._blocks = with_weights(FirstBlocks(model, count_blocks(weights)), weights).to(device)
        self._patch_size = patch_size

    def __call__(self, pixels: Tensor, masks: Tensor) -> Callable[[int], Tensor]:
        with torch.no_grad(), in_16_bits(pixels.device.type):
            features = self._blocks(self._blocks.normalise(pixels), self._patch_size)
        return partial(disagreement, F.normalize(features.float(), dim=1), self._patch_size)
