"""MMSegmentation's UPerHead, whose last 3 x 3 convolution does not need the coarser levels enlarged.

    decode_head = dict(type="APTUPerHead", ...)  # else as UPerHead

That convolution takes all levels at the size of the finest and is two thirds of the head's work. On CPUs each coarser
level is convolved at its own size (``ops/enlarged_conv.py``), to the same result.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmengine.registry import MODELS
from mmseg.models.decode_heads import UPerHead
from mmseg.models.utils import resize
from torch import Tensor, nn

from apt_dense.nn.feature_pyramid import runs_as_written
from apt_dense.ops.enlarged_conv import conv_of_levels
from apt_dense.runtime import is_traced

_PLAIN = {"kernel_size": (3, 3), "padding": (1, 1), "stride": (1, 1), "dilation": (1, 1), "groups": 1}


class ConvOfLevels(ConvModule):
    """MMCV's ``ConvModule`` of levels that are enlarged to the size of the first and concatenated.

    Args:
        align_corners: of the bilinear interpolation.
        *args, **options: as for ``ConvModule``.
    """

    def __init__(self, *args: Any, align_corners: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.align_corners = align_corners

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels (B, C_i, h_i, w_i) -> (B, channels, h_0, w_0)."""
        if self._takes_levels():
            x = conv_of_levels(levels, self.conv.weight, self.conv.bias, self.align_corners)
            return self._after_convolution(x)
        size, options = levels[0].shape[2:], {"mode": "bilinear", "align_corners": self.align_corners}
        enlarged = [resize(level, size, **options) for level in levels[1:]]
        return super().forward(torch.cat([levels[0], *enlarged], dim=1))

    def _takes_levels(self) -> bool:
        conv = self.conv
        if is_traced() or conv.weight.device.type != "cpu" or self.order[0] != "conv" or not runs_as_written(conv):
            return False
        same = type(conv) is nn.Conv2d and all(getattr(conv, name) == value for name, value in _PLAIN.items())
        return same and conv.padding_mode == "zeros"

    def _after_convolution(self, x: Tensor) -> Tensor:
        for layer in self.order[1:]:
            x = self.norm(x) if layer == "norm" and self.with_norm else x
            x = self.activate(x) if layer == "act" and self.with_activation else x
        return x


@MODELS.register_module()
class APTUPerHead(UPerHead):
    """``UPerHead`` with the same arguments, weights and names; values and gradients agree with its own to rounding."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fpn_bottleneck = ConvOfLevels(
            len(self.in_channels) * self.channels, self.channels, 3,
            padding=1, conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg,
            align_corners=self.align_corners,
        )  # fmt: skip

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """Levels of the backbone or neck, large to small -> (B, channels, H, W) of the largest."""
        return self.fpn_bottleneck(self._levels(self._transform_inputs(inputs)))

    def _levels(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The levels of the feature pyramid. Its laterals are let go here, before the last convolution."""
        laterals = [lateral(x) for lateral, x in zip(self.lateral_convs, inputs[:-1], strict=True)]
        laterals.append(self.psp_forward(inputs))
        for i in reversed(range(len(self.lateral_convs))):
            above = resize(laterals[i + 1], laterals[i].shape[2:], mode="bilinear", align_corners=self.align_corners)
            laterals[i] = laterals[i] + above
        return [*(conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)), laterals[-1]]
