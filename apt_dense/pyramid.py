"""The simple feature pyramid of ViTDet: one feature map of stride 16 -> maps of stride 4, 8, 16, 32 and 64."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn


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
        self.out_channels, self.extra_level = out_channels, extra_level
        self.strides = [int(stride / scale) for scale in scale_factors]
        if list(scale_factors) != sorted(set(scale_factors), reverse=True) or stride & (stride - 1):
            raise ValueError(f"scale_factors={tuple(scale_factors)} must descend and stride={stride} be a power of 2")
        for scale, level_stride in zip(scale_factors, self.strides, strict=True):
            resize, channels = _resize_layers(in_channels, scale)
            lateral = ConvNorm(channels, out_channels, 1), ConvNorm(out_channels, out_channels, 3)
            self.add_module(f"simfp_{int(math.log2(level_stride))}", nn.Sequential(*resize, *lateral))
        if extra_level:
            self.strides.append(2 * self.strides[-1])

    def forward(self, feature_map: Tensor) -> list[Tensor]:
        """(B, in_channels, h, w) -> levels (B, out_channels, h * scale, w * scale), large to small."""
        levels = [stage(feature_map) for name, stage in self.named_children() if name.startswith("simfp_")]
        if self.extra_level:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return levels


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
    if scale == 0.5:
        return [nn.MaxPool2d(kernel_size=2, stride=2)], channels
    raise ValueError(f"scale factor {scale} is not supported; expected 4, 2, 1 or 0.5")
