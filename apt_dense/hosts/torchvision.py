"""torchvision host: Mask R-CNN on an adaptive ViT, which needs nothing but packages from the index.

    model = mask_rcnn(APTViT.from_timm("vit_base_patch16_224.mae", ..., drop_padding=True), num_classes=1 + 80)

The parts are those of ViTDet (arXiv 2203.16527): simple feature pyramid, two convolutions in the RPN, LayerNorm in all
heads.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from apt_dense.nn.feature_pyramid import SimpleFeaturePyramid, check_patch_size, runs_as_written
from apt_dense.option_checks import whole
from apt_dense.vit import APTViT

ASPECT_RATIOS = (0.5, 1.0, 2.0)
ANCHOR_STRIDES = 8  # an anchor's side in strides of its level: 32 pixels at stride 4 to 512 at stride 64
BOX_RESOLUTION = 7  # cells of a side that a box is pooled to
MASK_RESOLUTION = 14


class PyramidBackbone(SimpleFeaturePyramid):
    """An :class:`APTViT` and its simple feature pyramid, as a backbone of torchvision's detectors.

    Parameters are named ``net.*`` and ``simfp_2.*`` to ``simfp_5.*``, as in Detectron2's SimpleFeaturePyramid, so that
    ``backbone.*`` weights of detectors can be moved between the two.

    Args:
        net: the ViT; its last output is used. ``patch_size`` must be a power of 2; ``APTViT.from_timm(NAME,
            patch_size=16)`` resamples DINOv2's patches of 14 pixels.
        out_channels: channels of every level.
    """

    def __init__(self, net: APTViT, out_channels: int = 256) -> None:
        check_patch_size(net.patch_size)
        super().__init__(net.embed_dim, out_channels, net.patch_size)
        self.net = net
        self.strides = tuple(self.strides)
        self.levels = tuple(f"p{stride.bit_length() - 1}" for stride in self.strides)  # p2 has stride 2**2

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


class OnlyPaddingIsZero(GeneralizedRCNNTransform):
    """torchvision's normalise, resize and pad, where only padding is exactly 0.

    Images here are floats, so pixels may have exactly the mean's colour and become 0. They are replaced by the smallest
    step above 0, which is far less than a grey level, so that ``drop_padding`` finds the padding exactly.
    """

    def batch_images(self, images: Sequence[Tensor], size_divisible: int = 32) -> Tensor:
        """Pad normalised images (3, H, W) of any sizes with 0 at the right and bottom: (B, 3, H, W)."""
        marked = [torch.where(image == 0, torch.finfo(image.dtype).eps, image) for image in images]
        return super().batch_images(marked, size_divisible)


def mask_rcnn(
    backbone: APTViT,
    num_classes: int,
    min_size: int | Sequence[int] = 1024,
    max_size: int = 1024,
    *,
    channels: int = 256,
    box_features: int = 1024,
    resize_in_training: bool = True,
    **options: Any,
) -> MaskRCNN:
    """Build torchvision's Mask R-CNN with an adaptive ViT, ViTDet's pyramid and ViTDet's heads.

    The model takes a list of RGB images (3, H, W) in [0, 1] and, in training, a list of targets: see
    ``torchvision.models.detection.MaskRCNN``. It normalises them with the backbone's ``pixel_mean`` and ``pixel_std``
    and pads them to a batch. Give the backbone ``drop_padding=True``, so that this padding makes no tokens.

    Args:
        backbone: with RGB ``channel_order``. Its weights are ``backbone.net.*`` in the state dict (PyramidBackbone).
        num_classes: classes including the background, which is label 0: 81 for COCO.
        min_size, max_size: pixels that the shorter side is resized to, unless the longer one would exceed
            ``max_size``. If several sizes are given, training draws one of them and evaluation uses the last.
        channels: of the pyramid's levels and of all convolutions in the heads.
        box_features: width of the box head's fully connected layer.
        resize_in_training: False if training images already have their final size, as after large-scale jitter.
        **options: other arguments of ``torchvision.models.detection.MaskRCNN``, and ``size_divisible`` and
            ``fixed_size`` of its transform. They can replace any of the parts built here.

    Raises:
        TypeError, ValueError: for a backbone that does not fit, or an argument out of range.
    """
    _check(backbone, num_classes, options)
    for name, width in (("channels", channels), ("box_features", box_features)):
        whole(1)(name, width)
    body = PyramidBackbone(backbone, channels)
    transform = _transform(backbone, min_size, max_size, resize_in_training, options)
    parts = _rpn_parts(body) | _box_parts(body, box_features, num_classes) | _mask_parts(body, num_classes)
    for head, predictor in (("box_head", "box_predictor"), ("mask_head", "mask_predictor")):
        if head in options and predictor not in options:
            raise ValueError(f"{head} was given without {predictor}, which takes its output; give both")
    model = MaskRCNN(body, **(parts | options))
    model.transform = transform
    return model


def _check(backbone: APTViT, num_classes: int, options: dict[str, Any]) -> None:
    if not isinstance(backbone, APTViT):
        raise TypeError(f"backbone is a {type(backbone).__name__}; expected an apt_dense.APTViT")
    if backbone.in_chans != 3 or backbone.pixel_format.channel_order != "RGB":
        raise ValueError(
            f"the backbone takes {backbone.in_chans} channels in the order {backbone.pixel_format.channel_order}, but "
            f"torchvision's detectors feed RGB; build it with in_chans=3 and channel_order='RGB' (and the pixel_mean "
            f"and pixel_std of its weights in that order)"
        )
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(
            f"num_classes={num_classes!r}: expected at least 2, as the background counts (81 for COCO's 80 categories)"
        )
    twice = sorted({"image_mean", "image_std"} & options.keys())
    if twice:
        raise ValueError(f"{' and '.join(twice)} follow from the backbone; set its pixel_mean and pixel_std instead")
    divisor, cells = options.get("size_divisible"), 2 * backbone.patch_size
    if divisor is not None and (divisor < 1 or divisor % cells):
        raise ValueError(
            f"size_divisible={divisor} must be a multiple of {cells}, the stride of the coarsest level that boxes are "
            f"pooled from; other sizes would shift the levels against each other"
        )


def _transform(
    backbone: APTViT, min_size: int | Sequence[int], max_size: int, resize_in_training: bool, options: dict[str, Any]
) -> OnlyPaddingIsZero:
    """Build the transform with the backbone's pixel format, and take its arguments out of ``options``."""
    # torchvision's pixels are in [0, 1], the backbone's pixel format is in grey levels.
    pixels = backbone.pixel_format
    mean, std = ([level / 255 for level in levels] for levels in (pixels.mean, pixels.std))
    divisor = options.pop("size_divisible", 2 * backbone.patch_size)
    fixed_size = options.pop("fixed_size", None)
    sizes = (min_size,) if isinstance(min_size, str) or not isinstance(min_size, Sequence) else tuple(min_size)
    sizes = tuple(whole(1)("min_size", size) for size in sizes)
    max_size = whole(1)("max_size", max_size)
    if not sizes:
        raise ValueError(f"min_size={min_size} and max_size={max_size} must be pixels, one size at least")
    return OnlyPaddingIsZero(sizes, max_size, mean, std, divisor, fixed_size, _skip_resize=not resize_in_training)


def _rpn_parts(body: PyramidBackbone) -> dict[str, nn.Module]:
    sizes = tuple((ANCHOR_STRIDES * stride,) for stride in body.strides)
    anchors = AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes))
    head = RPNHead(body.out_channels, anchors.num_anchors_per_location()[0], conv_depth=2)
    return {"rpn_anchor_generator": anchors, "rpn_head": head}


def _box_parts(body: PyramidBackbone, features: int, num_classes: int) -> dict[str, nn.Module]:
    channels = body.out_channels
    shape = (channels, BOX_RESOLUTION, BOX_RESOLUTION)
    head = FastRCNNConvFCHead(shape, [channels] * 4, [features], norm_layer=LayerNorm2d)
    predictor = FastRCNNPredictor(features, num_classes)
    return {"box_roi_pool": _pool(body, BOX_RESOLUTION), "box_head": head, "box_predictor": predictor}


def _mask_parts(body: PyramidBackbone, num_classes: int) -> dict[str, nn.Module]:
    channels = body.out_channels
    head = MaskRCNNHeads(channels, [channels] * 4, dilation=1, norm_layer=LayerNorm2d)
    predictor = MaskRCNNPredictor(channels, channels, num_classes)
    return {"mask_roi_pool": _pool(body, MASK_RESOLUTION), "mask_head": head, "mask_predictor": predictor}


def _pool(body: PyramidBackbone, resolution: int) -> MultiScaleRoIAlign:
    """Pool boxes from all levels except the last, which only the RPN uses."""
    strides = body.strides[:-1]
    pool = MultiScaleRoIAlign(list(body.levels[:-1]), resolution, sampling_ratio=2)
    # By default it infers the strides from the first batch and keeps them, wrongly if that is mostly padding.
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(*(stride.bit_length() - 1 for stride in (strides[0], strides[-1])))
    return pool
