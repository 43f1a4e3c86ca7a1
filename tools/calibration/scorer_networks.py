"""Networks of learned scorers while they are trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from apt_dense import APTViT, load_backbone
from apt_dense.options import PixelFormat
from apt_dense.patches.first_block_scores import HEAD, VIT, FirstBlocks, FirstBlockScorer
from apt_dense.patches.image_preparation import rounded_mean
from apt_dense.patches.learned_scores import LAYERS, RANGE, LearnedScorer, canvas, inside
from apt_dense.patches.scorer_layers import Layer, Shape, normalised, weights_of
from apt_dense.weights.convert import from_apt
from apt_dense.weights.files import read_checkpoint

from evidence.fast_16_bits import in_16_bits

PADDING = rounded_mean(PixelFormat())  # while training; in use, a scorer gets its host's
#: Learning rates: of the network that starts at random, of a head on pretrained blocks, and of these.
_RATE, _HEAD_RATE, _BLOCKS_RATE = 4e-3, 2e-3, 1e-4


class NormedConvolutions(nn.Module):
    """Convolutions, all but the last with a batch norm and a ReLU."""

    def __init__(self, shapes: tuple[Shape, ...]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2) for i, o, k, s in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(shape.out_channels) for shape in shapes[:-1])

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions[:-1], self.norms, strict=True):
            x = norm(convolution(x)).relu()
        return self.convolutions[-1](x)

    def layers(self) -> list[Layer]:
        """Weights that give the same without norms, by their running means."""
        fused = [_fuse(conv, norm) for conv, norm in zip(self.convolutions[:-1], self.norms, strict=True)]
        last = self.convolutions[-1]
        return [*fused, Layer(last.weight.detach(), last.bias.detach())]


def _fuse(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Layer:
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    return Layer(weight.detach(), bias.detach())


class PatchNetwork(NormedConvolutions):
    """The network of a ``LearnedScorer``."""

    def __init__(self) -> None:
        super().__init__(LAYERS)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters for an optimizer."""
        return [{"params": list(self.parameters()), "lr": _RATE}]

    def forward(self, pixels: Tensor, size: int) -> Tensor:
        """RGB grey levels (B, 3, H, W) -> logits (B, H // size, W // size)."""
        return inside(super().forward(canvas(normalised(pixels, PADDING, RANGE), size)))

    def scorer(self) -> LearnedScorer:
        return LearnedScorer(weights_of(self.layers()), PADDING)


class FirstBlocksNetwork(nn.Module):
    """The network of a ``FirstBlockScorer``, whose blocks go on learning.

    Args:
        blocks: without weights.
        weights: the state dict of their ViT, by timm's names.
    """

    def __init__(self, blocks: FirstBlocks, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        own = {name: weights[name.removeprefix(VIT)].clone() for name in blocks.sizes}
        self.blocks = blocks.assign(own).requires_grad_()
        self.head = NormedConvolutions(blocks.head_shapes)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters for an optimizer."""
        parts = (self.head, _HEAD_RATE), (self.blocks, _BLOCKS_RATE)
        return [{"params": list(part.parameters()), "lr": rate} for part, rate in parts]

    def forward(self, pixels: Tensor, size: int) -> Tensor:
        """RGB grey levels (B, 3, H, W) -> logits (B, H // size, W // size)."""
        with in_16_bits(pixels.device.type):
            features = self.blocks(self.blocks.normalise(pixels), size)
        return self.head(features.float())[:, 0]

    def scorer(self) -> FirstBlockScorer:
        weights = {name: value.detach().cpu() for name, value in self.blocks.state_dict().items()}
        without_weights = FirstBlocks(self.blocks.model, len(self.blocks.vit.blocks))
        return FirstBlockScorer(without_weights, weights | weights_of(self.head.layers(), HEAD))


def pretrained_weights(model: str, path: Path | None) -> Mapping[str, Tensor]:
    """The state dict of a timm ViT without its last norm, by timm's names: from a file that ``load_backbone`` reads, or
    downloaded. Patches of another size are resampled, since the first blocks see photos resized to theirs.

    Raises:
        ValueError, OSError: for models and files that ``APTViT.from_timm`` and ``load_backbone`` refuse.
    """
    if path is None:
        backbone = APTViT.from_timm(model, pretrained=True, thresholds=(), final_norm=False)
    else:
        role = f"{path}, whose first blocks score as those of {model}"
        backbone = trained_vit(model, read_checkpoint(path), role, resize_patches=True)
    return from_apt(backbone.state_dict(), "timm").state


def trained_vit(model: str, content: Any, role: str, resize_patches: bool = False, **options: Any) -> APTViT:
    """A timm ViT with patches of one size, without its last norm, and the weights in a file's ``content``.

    Args:
        role: the file, and what it serves as, for errors.
        **options: of ``APTViT``.

    Raises:
        ValueError: as ``APTViT.from_timm`` and ``load_backbone``.
    """
    backbone = APTViT.from_timm(model, pretrained=False, thresholds=(), final_norm=False, **options)
    try:
        load_backbone(backbone, content, resize_patches=resize_patches)
    except ValueError as error:
        raise ValueError(f"{role}: {error}") from None
    return backbone
