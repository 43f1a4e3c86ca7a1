"""Boxes decoded in float32, whatever the heads compute in."""

from typing import TypeVar

from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

Detector = TypeVar("Detector", GeneralizedRCNN, RetinaNet)


class _BoxCoder(BoxCoder):
    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        return super().decode_single(rel_codes.float(), boxes)


def with_boxes_in_float32(model: Detector) -> Detector:
    """Have a detector decode its boxes in float32, under autocast, too.

    Upstream rounds them to the type of the heads' outputs: in bfloat16 to 2 pixels from 256 on, and to 4 from 512 on.
    """
    for part in (model,) if isinstance(model, RetinaNet) else (model.rpn, model.roi_heads):
        part.box_coder = _BoxCoder(part.box_coder.weights, part.box_coder.bbox_xform_clip)
    return model
