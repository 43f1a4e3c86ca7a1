"""Detectron2's two-stage detector, for images larger than the square that its pyramid pads to."""

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import ImageList
from torch import Tensor


@META_ARCH_REGISTRY.register()
class APTGeneralizedRCNN(GeneralizedRCNN):
    """Detectron2's ``GeneralizedRCNN``, which sees all of an image that is larger than ``square_pad``.

    Upstream pads to the square alone: a single image loses the rows and columns beyond it without a word, and two
    images fail with an error of torch. Here, a batch with such an image is padded to the next size that
    ``size_divisibility`` divides. Smaller images, arguments and the state dict are upstream's. For yacs configs, it is
    the MODEL.META_ARCHITECTURE "APTGeneralizedRCNN".
    """

    def preprocess_image(self, batched_inputs: Sequence[Mapping[str, Any]]) -> ImageList:
        """Normalise and batch images: "image" (C, H, W) of each input, padded with 0 to a common size."""
        images = [self._move_to_current_device(inputs["image"]) for inputs in batched_inputs]
        return whole_images([(image - self.pixel_mean) / self.pixel_std for image in images], self.backbone)


def whole_images(images: Sequence[Tensor], backbone: Any) -> ImageList:
    """Batch images (C, H, W) as a backbone asks, with a larger size where its square would cut images off.

    For the ``preprocess_image`` of other detectors: see :class:`APTGeneralizedRCNN`.
    """
    constraints = dict(backbone.padding_constraints)
    if max(side for image in images for side in image.shape[-2:]) > constraints.get("square_size", 0):
        constraints["square_size"] = 0
    return ImageList.from_tensors(list(images), backbone.size_divisibility, padding_constraints=constraints)
