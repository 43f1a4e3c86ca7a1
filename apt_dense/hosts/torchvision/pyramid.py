"""An adaptive ViT and its feature pyramid, as a backbone of torchvision's detectors."""

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from apt_dense.nn.feature_pyramid import SCALE_FACTORS, SimpleFeaturePyramid, check_patch_size, runs_as_written
from apt_dense.vit import APTViT


class PyramidBackbone(SimpleFeaturePyramid):
    """An :class:`APTViT` and its simple feature pyramid, as a backbone of torchvision's detectors.

    Levels are named by their stride, as in Detectron2: level "p5" has stride 2**5 = 32 pixels. With patches of 16
    pixels they are

        "p2" (stride 4), "p3" (8), "p4" (16), "p5" (32), "p6" (64: every other cell of p5, for the RPN alone)

    and with patches of 8 pixels "p1" to "p5". These are the names that torchvision's ``MultiScaleRoIAlign`` takes as
    ``featmap_names``; the attribute ``levels`` holds them, ``strides`` the strides.

    Parameters are named ``net.*`` and ``simfp_2.*`` to ``simfp_5.*``, as in Detectron2's SimpleFeaturePyramid, so that
    ``backbone.*`` weights of detectors can be moved between the two.

    Args:
        net: the ViT; its last output is used. ``patch_size`` must be a power of 2; ``APTViT.from_timm(NAME,
            patch_size=16)`` resamples DINOv2's patches of 14 pixels.
        out_channels: channels of every level.
        scale_factors: size of each level relative to the ViT's feature map, from 4, 2, 1 and 0.5; the last level
            subsampled by 2 follows them.
    """

    def __init__(self, net: APTViT, out_channels: int = 256, scale_factors: Sequence[float] = SCALE_FACTORS) -> None:
        check_patch_size(net.patch_size)
        super().__init__(net.embed_dim, out_channels, net.patch_size, scale_factors)
        self.net = net
        self.strides = tuple(self.strides)

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the levels, large to small."""
        return tuple(f"p{stride.bit_length() - 1}" for stride in self.strides)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Compute the levels of normalised images.

        Args:
            images: (B, 3, H, W), H and W multiples of twice the patch size.

        Returns:
            {"p2": (B, C, H/4, W/4), ..., "p6": (B, C, H/64, W/64)} for patches of 16 pixels, the size of the last level
            rounded up.
        """
        if runs_as_written(self.net):
            outputs, layout = self.net.forward_tokens(images)
            levels = self.from_tokens(outputs[-1], layout)
        else:
            levels = super().forward(self.net(images)[-1])
        return OrderedDict(zip(self.levels, levels, strict=True))


class OneStagePyramid(PyramidBackbone):
    """The levels that one-stage detectors such as RetinaNet look at: "p3" to "p7" with patches of 16 pixels.

    They look at every cell of every level, so the finest is left out, which has most of the cells.
    """

    def __init__(self, net: APTViT, out_channels: int = 256) -> None:
        super().__init__(net, out_channels, SCALE_FACTORS[1:])
        self.strides = (*self.strides, 2 * self.strides[-1])

    def _with_extra_level(self, levels: list[Tensor]) -> list[Tensor]:
        levels = super()._with_extra_level(levels)
        return [*levels, F.max_pool2d(levels[-1], kernel_size=1, stride=2)]
