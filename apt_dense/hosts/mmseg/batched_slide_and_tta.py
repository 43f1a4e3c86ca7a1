"""Packed inference for MMSegmentation: crops, images and augmentations go through the network together.

    model = dict(type="APTEncoderDecoder", test_cfg=dict(mode="slide", crop_size=..., stride=..., crops_per_forward=8))
    tta_model = dict(type="APTSegTTAModel")

MMSegmentation runs one forward per position of the sliding window and per augmentation. Here, all crops of one size are
batched, at most ``crops_per_forward`` at a time. This gives the same logits in fewer forward passes, for any backbone.

Shape letters: B images, K channels of the logits, H and W the image, h and w the crop.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise, product
from typing import Any, NamedTuple

import torch
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from mmseg.models.segmentors import EncoderDecoder, SegTTAModel
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from apt_dense.hosts.mmseg.token_heads import TokenHeads

CROPS_PER_FORWARD = 8


class View(NamedTuple):
    """A batch of images of one size, from the data set or from one augmentation."""

    images: Tensor  # (B, 3, H, W), normalised
    metas: Sequence[Mapping[str, Any]]  # MMSeg's, one per image
    windows: list[tuple[slice, slice]]  # rows and columns of the crops, all of the same size

    @property
    def crop_size(self) -> tuple[int, int]:
        """(h, w) in pixels; smaller than the sliding window if the image is."""
        rows, columns = self.windows[0]
        return rows.stop - rows.start, columns.stop - columns.start


class Crop(NamedTuple):
    """A view of a part of an image."""

    pixels: Tensor  # (3, h, w)
    meta: Mapping[str, Any]


@MODELS.register_module()
class APTEncoderDecoder(TokenHeads, EncoderDecoder):
    """MMSeg's ``EncoderDecoder``, with the crops of all images of a batch in shared forward passes, and with the
    pointwise layers of MMSeg's Feature2Pyramid, FCNHead and UPerHead on tokens (``token_heads``).

    Takes the same arguments and checkpoints, and gives the same logits. Peak memory is that of ``crops_per_forward``
    crops in the backbone and head, plus the logits of whole images, (B, K, H, W).

    Args:
        test_cfg: as for ``EncoderDecoder``, plus ``crops_per_forward``: crops in one forward, at least 1 (default 8).
            In mode "whole" an image is one crop, and only :meth:`predict_views` combines several batches.
            ``whole_patches=True`` (this project's configs) departs from MMSeg where patches do not divide an image or
            crop: MMSeg squeezes the logits of the padding at the right and bottom into the image, so that all others
            lie up to a patch too far left and up. Here, the logits of the padding are cut off.
        *args, **options: as for ``EncoderDecoder``.

    Raises:
        ValueError: if ``crops_per_forward`` is not a positive integer.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._crops_per_forward()  # fails before training, not at the first validation

    def slide_inference(self, inputs: Tensor, batch_img_metas: Sequence[Mapping[str, Any]]) -> Tensor:
        """Normalised images (B, 3, H, W) -> logits (B, K, H, W), averaged where crops overlap."""
        view = self._view(inputs, batch_img_metas)
        return self._add_up(view, self._crop_logits(crops_of(view)))

    def predict_views(self, batches: Sequence[Mapping[str, Any]]) -> list[list[SegDataSample]]:
        """Predict several preprocessed batches together, with the results of ``predict`` for each of them.

        Args:
            batches: dicts of ``inputs`` (B, 3, H, W), normalised, and B ``data_samples``. Sizes may differ between
                batches; crops (in mode "whole", images) of the same size share forward passes.
        """
        views = [self._view(one["inputs"], [sample.metainfo for sample in one["data_samples"]]) for one in batches]
        order = sorted(range(len(views)), key=lambda i: views[i].crop_size)
        logits = self._crop_logits([crop for i in order for crop in crops_of(views[i])])
        predictions = {
            i: self.postprocess_result(self._add_up(views[i], logits), batches[i]["data_samples"]) for i in order
        }
        return [predictions[i] for i in range(len(views))]

    def encode_decode(self, inputs: Tensor, batch_img_metas: Sequence[Mapping[str, Any]]) -> Tensor:
        """Normalised images or crops (B, 3, h, w) -> logits (B, K, h, w)."""
        patch = getattr(self.backbone, "patch_size", None)
        height, width = inputs.shape[2:]
        if not self.test_cfg.get("whole_patches", False) or not isinstance(patch, int):
            return super().encode_decode(inputs, batch_img_metas)
        padded = nn.functional.pad(inputs, (0, -width % patch, 0, -height % patch))  # as the backbone pads
        metas = [dict(meta, img_shape=padded.shape[2:]) for meta in batch_img_metas]
        return super().encode_decode(padded, metas)[..., :height, :width]

    def _view(self, images: Tensor, metas: Sequence[Mapping[str, Any]]) -> View:
        size = tuple(images.shape[2:])
        mode = self.test_cfg.get("mode", "whole")
        if mode not in ("slide", "whole"):
            raise ValueError(f'test_cfg.mode={mode!r}: expected "slide" or "whole"')
        if mode == "whole":
            return View(images, metas, crop_windows(size, size, size))
        return View(images, metas, crop_windows(size, self.test_cfg["crop_size"], self.test_cfg["stride"]))

    def _crop_logits(self, crops: Sequence[Crop]) -> Iterator[Tensor]:
        """Yield the logits (K, h, w) of each crop in turn, keeping those of one forward at a time."""
        limit = self._crops_per_forward()
        for size, group in groupby(crops, key=lambda crop: crop.pixels.shape[1:]):
            same_size = list(group)
            for first in range(0, len(same_size), limit):
                batch = same_size[first : first + limit]
                # MMSeg's heads take img_shape for the size of a crop because it is a torch.Size.
                metas = [dict(crop.meta, img_shape=size) for crop in batch]
                yield from self.encode_decode(torch.stack([crop.pixels for crop in batch]), metas)

    def _add_up(self, view: View, logits: Iterator[Tensor]) -> Tensor:
        """Average the next logits, one (K, h, w) per crop of the view, at each pixel: (B, K, H, W)."""
        count, (height, width) = len(view.images), view.images.shape[2:]
        total = view.images.new_zeros(count, self.out_channels, height, width)
        for image, (rows, columns) in product(range(count), view.windows):
            total[image, :, rows, columns] += next(logits)
        return total.div_(coverage((height, width), view.windows).to(total))

    def _crops_per_forward(self) -> int:
        count = (self.test_cfg or {}).get("crops_per_forward", CROPS_PER_FORWARD)
        if type(count) is not int or count < 1:
            raise ValueError(
                f"test_cfg.crops_per_forward={count!r}: expected a whole number of crops from 1; fewer need less memory"
            )
        return count


def crops_of(view: View) -> list[Crop]:
    """Cut out the crops of each image in turn, in the order in which ``_add_up`` expects their logits."""
    return [
        Crop(image[:, rows, columns], meta)
        for image, meta in zip(view.images, view.metas, strict=True)
        for rows, columns in view.windows
    ]


def crop_windows(size: Sequence[int], crop_size: Sequence[int], stride: Sequence[int]) -> list[tuple[slice, slice]]:
    """List the positions of MMSeg's sliding window, row by row. All arguments are (height, width) in pixels."""
    rows, columns = (axis_windows(*axis) for axis in zip(size, crop_size, stride, strict=True))
    return list(product(rows, columns))


def axis_windows(length: int, crop: int, stride: int) -> list[slice]:
    """List the windows along one axis; the last one is moved back inside: 10, 4, 3 -> 0:4, 3:7, 6:10, but
    9, 4, 3 -> 0:4, 3:7, 5:9.

    Raises:
        ValueError: if ``crop`` or ``stride`` is below 1, or there are pixels between two windows.
    """
    if crop < 1 or stride < 1:
        raise ValueError(f"test_cfg.crop_size={crop} and stride={stride} must be at least one pixel")
    steps = max(-(-(length - crop) // stride), 0)
    stops = [min(i * stride + crop, length) for i in range(steps + 1)]
    windows = [slice(max(stop - crop, 0), stop) for stop in stops]
    if any(after.start > before.stop for before, after in pairwise(windows)):
        raise ValueError(f"test_cfg.stride={stride} leaves gaps between crops of {crop} pixels: set at most {crop}")
    return windows


def coverage(size: Sequence[int], windows: Sequence[tuple[slice, slice]]) -> Tensor:
    """Count the windows that cover each pixel: (H, W)."""
    count = torch.zeros(*size)
    for rows, columns in windows:
        count[rows, columns] += 1
    return count


@MODELS.register_module()
class APTSegTTAModel(SegTTAModel):
    """MMSeg's ``SegTTAModel``, with all augmentations of a batch in shared forward passes.

    In mode "slide", crops of all scales and flips are batched together; in mode "whole", images of the same size. A
    batch has at most ``test_cfg.crops_per_forward``. Predictions are merged by ``SegTTAModel``, except those of models
    with one output channel: they are probabilities already, but ``SegTTAModel`` takes the sigmoid again, which makes
    all of them larger than 0.5. Here, their average is compared with the head's threshold.

    Args:
        module: an :class:`APTEncoderDecoder` or its config.
        data_preprocessor: as for ``SegTTAModel``.

    Raises:
        TypeError: if ``module`` is another kind of segmentor.
    """

    def __init__(self, module: nn.Module | dict, data_preprocessor: nn.Module | dict | None = None) -> None:
        super().__init__(module, data_preprocessor)
        if not isinstance(self.module, APTEncoderDecoder):
            raise TypeError(
                f"APTSegTTAModel needs a model of type APTEncoderDecoder, but got {type(self.module).__name__}: "
                "set model.type to that, or tta_model.type to SegTTAModel"
            )

    def test_step(self, data: Mapping[str, Sequence]) -> list[SegDataSample]:
        """Predict and merge: one sample per image.

        Args:
            data: ``inputs`` and ``data_samples`` as ``TestTimeAug`` collates them: lists over augmentations of lists
                over images.
        """
        if not isinstance(data, Mapping):
            raise TypeError(f"expected a dict of inputs and data_samples, but got {type(data).__name__}")
        augmented = [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]
        batches = [self.module.data_preprocessor(batch, False) for batch in augmented]
        return self.merge_preds(list(zip(*self.module.predict_views(batches), strict=True)))

    def merge_preds(self, data_samples_list: Sequence[Sequence[SegDataSample]]) -> list[SegDataSample]:
        """Average the predictions of each image over its augmentations."""
        if self.module.out_channels > 1:
            return super().merge_preds(data_samples_list)
        return [self._merge_probabilities(samples) for samples in data_samples_list]

    def _merge_probabilities(self, samples: Sequence[SegDataSample]) -> SegDataSample:
        """Average probabilities (1, H, W), which the segmentor keeps as seg_logits."""
        mean = torch.stack([sample.seg_logits.data for sample in samples]).mean(0)
        merged = samples[-1]  # as SegTTAModel returns
        merged.seg_logits = PixelData(data=mean)
        merged.pred_sem_seg = PixelData(data=(mean > self.module.decode_head.threshold).to(mean))
        if "gt_sem_seg" in samples[0]:
            merged.gt_sem_seg = samples[0].gt_sem_seg
        merged.set_metainfo({"img_path": samples[0].img_path})
        return merged
