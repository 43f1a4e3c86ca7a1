"""torchvision's detectors on an adaptive ViT: Mask R-CNN, Faster R-CNN and RetinaNet.

The parts are those of ViTDet (arXiv 2203.16527): simple feature pyramid, two convolutions in the RPN, LayerNorm in all
heads.
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import LayerNorm2d
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from apt_dense.hosts.torchvision.anchors import AnchorsOfStrides
from apt_dense.hosts.torchvision.boxes_in_float32 import with_boxes_in_float32
from apt_dense.hosts.torchvision.pixel_transform import make_transform
from apt_dense.hosts.torchvision.pyramid import OneStagePyramid, PyramidBackbone
from apt_dense.nn.feature_pyramid import SCALE_FACTORS
from apt_dense.option_checks import whole
from apt_dense.vit import APTViT

ASPECT_RATIOS = (0.5, 1.0, 2.0)
ANCHOR_STRIDES = 8  # an anchor's side in strides of its level: 32 pixels at stride 4 to 512 at stride 64
BOX_RESOLUTION = 7  # cells of a side that a box is pooled to
MASK_RESOLUTION = 14


def mask_rcnn(
    backbone: APTViT,
    num_classes: int,
    min_size: int | Sequence[int] = 1024,
    max_size: int = 1024,
    *,
    channels: int = 256,
    scale_factors: Sequence[float] = SCALE_FACTORS,
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
        scale_factors: sizes of the pyramid's levels relative to the ViT's feature map: see :class:`PyramidBackbone`.
        box_features: width of the box head's fully connected layer.
        resize_in_training: False if training images already have their final size, as after large-scale jitter.
        **options: other arguments of ``torchvision.models.detection.MaskRCNN``, and ``size_divisible`` and
            ``fixed_size`` of its transform. They can replace any of the parts built here.

    Raises:
        TypeError, ValueError: for a backbone that does not fit, or an argument out of range.
    """
    _check(backbone, num_classes, options)
    body = PyramidBackbone(backbone, whole(1)("channels", channels), scale_factors)
    parts = _rpn_parts(body) | _box_parts(body, box_features, num_classes) | _mask_parts(body, num_classes)
    _check_pairs(options)
    transform = make_transform(backbone, min_size, max_size, resize_in_training, options)
    model = MaskRCNN(body, **(parts | options))
    model.transform = transform
    return with_boxes_in_float32(model)


def faster_rcnn(
    backbone: APTViT,
    num_classes: int,
    min_size: int | Sequence[int] = 1024,
    max_size: int = 1024,
    *,
    channels: int = 256,
    scale_factors: Sequence[float] = SCALE_FACTORS,
    box_features: int = 1024,
    resize_in_training: bool = True,
    **options: Any,
) -> FasterRCNN:
    """Build torchvision's Faster R-CNN, for boxes without masks: :func:`mask_rcnn` without its mask head.

    Targets need "boxes" and "labels" only. All arguments and errors are those of :func:`mask_rcnn`, and the weights
    that both have carry the same names; ``**options`` are those of ``torchvision.models.detection.FasterRCNN``.
    """
    _check(backbone, num_classes, options)
    body = PyramidBackbone(backbone, whole(1)("channels", channels), scale_factors)
    parts = _rpn_parts(body) | _box_parts(body, box_features, num_classes)
    _check_pairs(options)
    transform = make_transform(backbone, min_size, max_size, resize_in_training, options)
    model = FasterRCNN(body, **(parts | options))
    model.transform = transform
    return with_boxes_in_float32(model)


def retinanet(
    backbone: APTViT,
    num_classes: int,
    min_size: int | Sequence[int] = 1024,
    max_size: int = 1024,
    *,
    channels: int = 256,
    resize_in_training: bool = True,
    **options: Any,
) -> RetinaNet:
    """Build torchvision's RetinaNet, for boxes without masks in one stage, with LayerNorm in its heads.

    Targets need "boxes" and "labels" only. Arguments and errors are those of :func:`mask_rcnn`; ``**options`` are those
    of ``torchvision.models.detection.RetinaNet``. The levels are "p3" to "p7" (:class:`OneStagePyramid`).
    """
    _check(backbone, num_classes, options)
    body = OneStagePyramid(backbone, whole(1)("channels", channels))
    sizes = tuple(tuple(int(4 * stride * 2 ** (third / 3)) for third in range(3)) for stride in body.strides)
    anchors = AnchorsOfStrides(sizes, ASPECT_RATIOS, body.strides)
    head = RetinaNetHead(body.out_channels, anchors.num_anchors_per_location()[0], num_classes, LayerNorm2d)
    transform = make_transform(backbone, min_size, max_size, resize_in_training, options)
    model = RetinaNet(body, num_classes, **({"anchor_generator": anchors, "head": head} | options))
    model.transform = transform
    return with_boxes_in_float32(model)


def _check_pairs(options: dict[str, Any]) -> None:
    for head, predictor in (("box_head", "box_predictor"), ("mask_head", "mask_predictor")):
        if head in options and predictor not in options:
            raise ValueError(f"{head} was given without {predictor}, which takes its output; give both")


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


def _rpn_parts(body: PyramidBackbone) -> dict[str, nn.Module]:
    sizes = tuple((ANCHOR_STRIDES * stride,) for stride in body.strides)
    anchors = AnchorsOfStrides(sizes, ASPECT_RATIOS, body.strides)
    head = RPNHead(body.out_channels, anchors.num_anchors_per_location()[0], conv_depth=2)
    return {"rpn_anchor_generator": anchors, "rpn_head": head}


def _box_parts(body: PyramidBackbone, features: int, num_classes: int) -> dict[str, nn.Module]:
    channels, features = body.out_channels, whole(1)("box_features", features)
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
