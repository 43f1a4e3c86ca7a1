"""MMSegmentation's UPerHead, whose last 3 x 3 convolution does not need the coarser levels enlarged.

    decode_head = dict(type="APTUPerHead", ...)  # else as UPerHead

That convolution takes all levels at the size of the finest and is half of the head's work. On CPUs each coarser level
is convolved at its own size (``ops/enlarged_conv.py``), to the same result. On GPUs the head is MMSegmentation's.
"""

from collections.abc import Sequence

from mmengine.registry import MODELS
from mmseg.models.decode_heads import UPerHead
from mmseg.models.utils import resize
from torch import Tensor, nn

from apt_dense.nn.feature_pyramid import runs_as_written
from apt_dense.ops.enlarged_conv import conv_of_levels
from apt_dense.runtime import is_traced

_PLAIN = {"kernel_size": (3, 3), "padding": (1, 1), "stride": (1, 1), "dilation": (1, 1), "groups": 1}


@MODELS.register_module()
class APTUPerHead(UPerHead):
    """``UPerHead`` with the same arguments, weights and names; values and gradients are its own to rounding."""

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """Levels of the backbone or neck, large to small -> (B, channels, H, W) of the largest."""
        if not self._convolves_small_levels(inputs):
            return super()._forward_feature(inputs)
        last = self.fpn_bottleneck
        levels = self._levels(self._transform_inputs(inputs))
        x = conv_of_levels(levels, last.conv.weight, last.conv.bias, self.align_corners)
        for layer in last.order[1:]:
            x = last.norm(x) if layer == "norm" and last.with_norm else x
            x = last.activate(x) if layer == "act" and last.with_activation else x
        return x

    def _levels(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The levels of the feature pyramid, which the last convolution takes, each at its own size."""
        laterals = [lateral(x) for lateral, x in zip(self.lateral_convs, inputs[:-1], strict=True)]
        laterals.append(self.psp_forward(inputs))
        for i in reversed(range(len(self.lateral_convs))):
            above = resize(laterals[i + 1], laterals[i].shape[2:], mode="bilinear", align_corners=self.align_corners)
            laterals[i] = laterals[i] + above
        return [*(conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)), laterals[-1]]

    def _convolves_small_levels(self, inputs: Sequence[Tensor]) -> bool:
        last = self.fpn_bottleneck
        if inputs[0].device.type != "cpu" or is_traced() or last.order[0] != "conv":
            return False
        plain = type(last.conv) is nn.Conv2d and all(getattr(last.conv, name) == v for name, v in _PLAIN.items())
        return plain and last.conv.padding_mode == "zeros" and runs_as_written(last) and runs_as_written(last.conv)
