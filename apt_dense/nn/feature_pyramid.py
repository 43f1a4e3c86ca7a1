"""The simple feature pyramid of ViTDet: one feature map of stride 16 -> maps of stride 4, 8, 16, 32 and 64.

Its layers up to the first 3 x 3 convolution treat every cell alone, and the cells of a coarse token are alike. So these
layers can run on tokens, which are fewer, and be scattered afterwards (:func:`late_scatter`).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from apt_dense.layout.scatter import scatter_tiles, scatter_tokens
from apt_dense.layout.tokens import TokenLayout
from apt_dense.ops.cpu_layers import call_on_map
from apt_dense.ops.onednn_matmul import linear
from apt_dense.option_checks import flag, whole

SCALE_FACTORS = 4.0, 2.0, 1.0, 0.5


class ConvNorm(nn.Conv2d):
    """A convolution without bias and a LayerNorm over channels, named ``norm`` as in Detectron2's Conv2d."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = LayerNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class SimpleFeaturePyramid(nn.Module):
    """Builds every level from the last feature map alone (arXiv 2203.16527, section 3).

    Parameter names and values as in Detectron2's SimpleFeaturePyramid with norm="LN": ``simfp_2`` has stride 4.

    Args:
        in_channels: channels of the feature map.
        out_channels: channels of every level.
        stride: stride of the feature map in pixels, a power of 2 (the patch size).
        scale_factors: size of each level relative to the feature map, descending, from 4, 2, 1 and 0.5.
        extra_level: append the last level subsampled by 2 (Detectron2's LastLevelMaxPool), which RPNs want.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        stride: int = 16,
        scale_factors: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        extra_level: bool = True,
    ) -> None:
        super().__init__()
        in_channels, self.out_channels = whole(1)("in_channels", in_channels), whole(1)("out_channels", out_channels)
        self.extra_level = flag("extra_level", extra_level)
        scale_factors = _check_scales(scale_factors, whole(1)("stride", stride), in_channels)
        self.strides = [int(stride / scale) for scale in scale_factors]
        for scale, level_stride in zip(scale_factors, self.strides, strict=True):
            resize, channels = _resize_layers(in_channels, scale)
            lateral = ConvNorm(channels, out_channels, 1), ConvNorm(out_channels, out_channels, 3)
            self.add_module(f"simfp_{int(math.log2(level_stride))}", nn.Sequential(*resize, *lateral))
        if extra_level:
            self.strides.append(2 * self.strides[-1])

    def forward(self, feature_map: Tensor) -> list[Tensor]:
        """(B, in_channels, h, w) -> levels (B, out_channels, h * scale, w * scale), large to small."""
        return self._with_extra_level([call_on_map(stage, feature_map) for stage in self._stages()])

    def from_tokens(self, rows: Tensor, layout: TokenLayout) -> list[Tensor]:
        """Packed rows (R, in_channels) -> the levels that :meth:`forward` gives for their feature map, to rounding:
        what acts on each cell alone is done once per token and scattered afterwards."""
        return self._with_extra_level([late_scatter(stage, rows, layout) for stage in self._stages()])

    def _stages(self) -> list[nn.Sequential]:
        return [stage for name, stage in self.named_children() if name.startswith("simfp_")]

    def _with_extra_level(self, levels: list[Tensor]) -> list[Tensor]:
        if self.extra_level:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return levels


def fits_pyramid(patch_size: int) -> bool:
    """Check whether a pyramid can be built on a ViT with patches of that size: its strides are powers of 2."""
    return patch_size & (patch_size - 1) == 0


def check_patch_size(patch_size: int) -> None:
    """Raise ValueError if a pyramid cannot be built on a ViT with patches of that size, as DINOv2's of 14 pixels."""
    if not fits_pyramid(patch_size):
        raise ValueError(
            f"a feature pyramid cannot be built on patches of {patch_size} pixels: its strides are powers of 2. Build "
            f"the ViT with patch_size=16, which resamples the patches of its weights (from_timm, from_weights)"
        )


def _check_scales(factors: object, stride: int, channels: int) -> tuple[float, ...]:
    """The scale factors, which the stride and the channels allow. Raises TypeError or ValueError."""
    if isinstance(factors, str) or not isinstance(factors, Sequence):
        raise TypeError(f"scale_factors={factors!r} must be a sequence of numbers from {SCALE_FACTORS}")
    factors = tuple(factors)
    if not factors or not set(factors) <= set(SCALE_FACTORS) or list(factors) != sorted(set(factors), reverse=True):
        raise ValueError(f"scale_factors={factors} must be numbers from {SCALE_FACTORS}, descending, at least one")
    if not fits_pyramid(stride) or stride < factors[0]:
        raise ValueError(f"stride={stride} must be a power of 2, at least the largest of scale_factors={factors}")
    if channels < factors[0]:
        raise ValueError(f"in_channels={channels} must be at least the largest of scale_factors={factors}")
    return factors


def _resize_layers(channels: int, scale: float) -> tuple[list[nn.Module], int]:
    """Layers that resize a map of that many channels by ``scale``, and the channels they leave."""
    if scale == 4.0:
        half, quarter = channels // 2, channels // 4
        return [
            nn.ConvTranspose2d(channels, half, kernel_size=2, stride=2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, kernel_size=2, stride=2),
        ], quarter
    if scale == 2.0:
        return [nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)], channels // 2
    if scale == 1.0:
        return [], channels
    return [nn.MaxPool2d(kernel_size=2, stride=2)], channels


def runs_as_written(module: nn.Module) -> bool:
    """Check whether nothing is hooked to a module (FSDP, feature extractors) and it is not compiled, so that a part of
    it may be called instead."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not any(hooks) and getattr(module, "_compiled_call_impl", None) is None


def late_scatter(stage: nn.Sequential, rows: Tensor, layout: TokenLayout) -> Tensor:
    """Compute ``stage(scatter_tokens(rows, layout))`` with the leading pointwise layers applied to tokens.

    Args:
        stage: layers of this pyramid or of Detectron2's (norm "LN"); others run on the feature map, in the same order.
        rows: (R, C) packed tokens.

    Returns:
        (B, C', h * scale, w * scale).
    """
    if not runs_as_written(stage):
        return call_on_map(stage, scatter_tokens(rows, layout))
    layers = list(stage)
    count = next((i for i, layer in enumerate(layers) if not _is_pointwise(layer)), len(layers))
    if count == 0:
        feature_map = scatter_tokens(rows, layout)
    else:
        # One more row stands for dropped cells, which the dense order fills with zeros before these layers.
        tiles = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])[:, None, None]
        for layer in layers[:count]:
            tiles = _on_tiles(layer, tiles)
        feature_map = scatter_tiles(tiles, layout)
    for layer in layers[count:]:
        feature_map = call_on_map(layer, feature_map)
    return feature_map


def _is_pointwise(layer: nn.Module) -> bool:
    """Check whether a layer maps each cell to a tile of cells without looking at others, and we know how."""
    if layer is None or not runs_as_written(layer):
        return False
    if isinstance(layer, nn.ConvTranspose2d):
        tiles = layer.kernel_size == layer.stride and layer.dilation == (1, 1)
        return tiles and layer.padding == layer.output_padding == (0, 0) and layer.groups == 1
    if isinstance(layer, nn.Conv2d):
        norm, is_plain = getattr(layer, "norm", None), getattr(layer, "activation", None) is None
        alone = layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
        return alone and is_plain and (norm is None or (_is_norm(norm) and runs_as_written(norm)))
    return isinstance(layer, nn.GELU) or _is_norm(layer)


def _is_norm(norm: nn.Module) -> bool:
    """A LayerNorm over channels, timm's or Detectron2's. (Batch norms need the statistics of the map.)"""
    is_detectron2 = type(norm).__name__ == "LayerNorm" and not isinstance(norm, nn.LayerNorm)
    return isinstance(norm, LayerNorm2d) or is_detectron2


def _on_tiles(layer: nn.Module, tiles: Tensor) -> Tensor:
    """Apply a pointwise layer to tiles (R, th, tw, C), channels last."""
    if isinstance(layer, nn.ConvTranspose2d):
        return _enlarge(layer, tiles)
    if isinstance(layer, nn.Conv2d):
        tiles = linear(tiles, layer.weight.flatten(1), layer.bias)
        return tiles if getattr(layer, "norm", None) is None else _on_tiles(layer.norm, tiles)
    if isinstance(layer, nn.GELU):
        return layer(tiles)
    return F.layer_norm(tiles, layer.weight.shape, layer.weight, layer.bias, layer.eps)


def _enlarge(layer: nn.ConvTranspose2d, tiles: Tensor) -> Tensor:
    """A transposed convolution whose kernels do not overlap is a linear layer with kh * kw outputs per cell."""
    kh, kw = layer.kernel_size
    weight = layer.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (kh * kw * out, in)
    bias = None if layer.bias is None else layer.bias.repeat(kh * kw)
    n, th, tw, _ = tiles.shape
    out = linear(tiles, weight, bias).view(n, th, tw, kh, kw, -1)
    return out.transpose(2, 3).reshape(n, th * kh, tw * kw, -1)
