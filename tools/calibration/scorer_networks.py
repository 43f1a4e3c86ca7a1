"""Networks of learned scorers while they are trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from apt_dense import APTViT, load_backbone
from apt_dense.options import PixelFormat
from apt_dense.patches.first_block_scores import FirstBlockScorer, features, first_blocks, head_shapes
from apt_dense.patches.image_preparation import rounded_mean
from apt_dense.patches.learned_scores import LAYERS, LearnedScorer, canvas, centred, inside
from apt_dense.patches.scorer_layers import Layer, Shape
from apt_dense.weights.convert import from_apt

from evidence.fast_16_bits import in_16_bits

PADDING = rounded_mean(PixelFormat())  # while training; in use, a scorer gets its host's
#: Rates of learning of layers that start at random, and of pretrained blocks. The first is too much for tokens'
#: features, which are no images.
_RATE, _HEAD_RATE, _BLOCKS_RATE = 4e-3, 2e-3, 1e-4


class NormedConvolutions(nn.Module):
    """Convolutions with a batch norm after each but the last."""

    def __init__(self, shapes: tuple[Shape, ...]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2) for i, o, k, s in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(shape.outside) for shape in shapes[:-1])

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions[:-1], self.norms, strict=True):
            x = norm(convolution(x)).relu()
        return self.convolutions[-1](x)

    def layers(self) -> list[Layer]:
        """Weights that give the same without norms, by their running means."""
        fused = []
        for conv, norm in zip(self.convolutions[:-1], self.norms, strict=True):
            of_norm = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            fused.append(Layer(*(p.detach() for p in fuse_conv_bn_weights(conv.weight, conv.bias, *of_norm))))
        last = self.convolutions[-1]
        return [*fused, Layer(last.weight.detach(), last.bias.detach())]


class PatchNetwork(NormedConvolutions):
    """That of ``LearnedScorer``: each patch and two around it."""

    def __init__(self) -> None:
        super().__init__(LAYERS)

    def groups(self) -> list[dict[str, Any]]:
        """Parameters for an optimizer."""
        return [{"params": list(self.parameters()), "lr": _RATE}]

    def forward(self, pixels: Tensor, size: int) -> Tensor:
        """RGB grey levels (B, 3, H, W) -> logits (B, H // size, W // size)."""
        return inside(super().forward(canvas(centred(pixels, PADDING), size)))

    def scorer(self) -> LearnedScorer:
        return LearnedScorer(self.layers(), PADDING)


class FirstBlocksNetwork(nn.Module):
    """That of ``FirstBlockScorer``: pretrained blocks, which are trained on, and a head.

    Args:
        model: a timm name.
        blocks: how many of its first ones.
        weights: its state dict.
    """

    def __init__(self, model: str, blocks: int, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.vit = model, first_blocks(model, blocks, weights)
        self.head = NormedConvolutions(head_shapes(self.vit))

    def groups(self) -> list[dict[str, Any]]:
        """Parameters for an optimizer."""
        parts = (self.head, _HEAD_RATE), (self.vit, _BLOCKS_RATE)
        return [{"params": list(part.parameters()), "lr": rate} for part, rate in parts]

    def forward(self, pixels: Tensor, size: int) -> Tensor:
        """RGB grey levels (B, 3, H, W) -> logits (B, H // size, W // size)."""
        with in_16_bits(pixels.device.type):
            found = features(self.vit, pixels, size)
        return self.head(found.float())[:, 0]

    def scorer(self) -> FirstBlockScorer:
        return FirstBlockScorer(self.model, self.vit, self.head.layers())


def pretrained_weights(model: str, path: Path | None) -> Mapping[str, Tensor]:
    """The state dict of a timm ViT, from a file that ``load_backbone`` reads, or downloaded.

    Raises:
        ValueError, OSError: for models and files that ``APTViT.from_timm`` and ``load_backbone`` refuse.
    """
    backbone = APTViT.from_timm(model, pretrained=path is None, thresholds=())
    if path is not None:
        load_backbone(backbone, path)
    return from_apt(backbone.state_dict(), "timm").state
