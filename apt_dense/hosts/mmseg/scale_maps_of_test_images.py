"""The scale of the patch under each pixel of MMSegmentation's label maps.

The choice of patches depends on pixels alone. So it is made again of what the data preprocessor gives, for the crops of
the sliding window and the augmentations that the segmentor sees, and carried back as MMSeg carries its logits. No model
need keep anything, and any segmentor and head will do.

Shape letters: B images, h and w what the network sees, H and W the label map.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apt_dense.hosts.mmseg.batched_slide_and_tta import crop_windows
from apt_dense.patches.selector import PatchSelector


@torch.no_grad()
def scale_maps_of_batch(segmentor: nn.Module, selector: PatchSelector, batch: Mapping[str, Any]) -> list[np.ndarray]:
    """The scale under each pixel of the label map of each image: B arrays (H, W) int8, -1 where no patch is.

    Where crops overlap, and with augmentations, it is that of most of them, the coarsest of several.

    Args:
        segmentor: with MMSeg's ``data_preprocessor`` and ``test_cfg``.
        batch: as the data loader gives it, of one augmentation or several.

    Raises:
        ValueError: for a ``test_cfg.mode`` other than "whole" and "slide".
    """
    views = [_maps_of_view(segmentor, selector, view) for view in _augmentations(batch)]
    return [most_common(np.stack(maps), selector.num_scales) for maps in zip(*views, strict=True)]


def _augmentations(batch: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Take apart what ``TestTimeAug`` has collated: lists over augmentations of lists over images."""
    if isinstance(batch["inputs"][0], Tensor):
        yield batch
        return
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def _maps_of_view(segmentor: nn.Module, selector: PatchSelector, view: Mapping[str, Any]) -> list[np.ndarray]:
    data = segmentor.data_preprocessor(dict(view), False)
    images = data["inputs"]
    windows = _windows(segmentor.test_cfg or {}, tuple(images.shape[2:]))
    scales = scales_of_pixels(selector, images, windows)
    return [to_label_map(one, sample.metainfo) for one, sample in zip(scales, data["data_samples"], strict=True)]


def _windows(test_cfg: Mapping[str, Any], size: tuple[int, int]) -> list[tuple[slice, slice]]:
    mode = test_cfg.get("mode", "whole")
    if mode == "whole":
        return crop_windows(size, size, size)
    if mode == "slide":
        return crop_windows(size, test_cfg["crop_size"], test_cfg["stride"])
    raise ValueError(f'quality by scale knows test_cfg.mode="whole" and "slide", not {mode!r}; use one of them')


def scales_of_pixels(selector: PatchSelector, images: Tensor, windows: Sequence[tuple[slice, slice]]) -> np.ndarray:
    """The scale under each pixel, of most of the windows: (B, h, w) int8, -1 where no patch is.

    Args:
        images: (B, 3, h, w) normalised.
        windows: rows and columns of the crops, each of which is cut into patches for itself.
    """
    votes = np.zeros((selector.num_scales + 1, len(images), *images.shape[2:]), np.uint16)
    for rows, columns in windows:
        scales = _of_pixels(selector, images[:, :, rows, columns])
        for scale, mask in _masks(scales, selector.num_scales):
            votes[scale + 1, :, rows, columns] += mask
    return _elected(votes)


def _of_pixels(selector: PatchSelector, crops: Tensor) -> np.ndarray:
    """(B, h, w) int8 of crops that are each cut into patches from its corner."""
    height, width = crops.shape[2:]
    cells = selector.scale_map(crops).cpu().numpy()
    pixels = cells.repeat(selector.patch_size, 1).repeat(selector.patch_size, 2)[:, :height, :width]
    found = np.full((len(crops), height, width), -1, np.int8)
    found[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return found


def to_label_map(scales: np.ndarray, meta: Mapping[str, Any]) -> np.ndarray:
    """Carry a map (h, w) to the size of the label map, as ``BaseSegmentor.postprocess_result`` carries logits: without
    padding, mirrored back, and resized, here to the nearest."""
    left, right, top, bottom = meta.get("img_padding_size", meta.get("padding_size", [0] * 4))
    height, width = scales.shape
    scales = scales[top : height - bottom, left : width - right]
    if meta.get("flip"):
        scales = scales[:, ::-1] if meta["flip_direction"] == "horizontal" else scales[::-1]
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(meta["ori_shape"][:2], scales.shape, strict=True)
    )
    return scales[np.ix_(rows, columns)]


def most_common(maps: np.ndarray, num_scales: int) -> np.ndarray:
    """The scale that most of (V, ...) maps have at each pixel, the coarsest of several: (...) int8."""
    return _elected(np.stack([mask.sum(0) for _, mask in _masks(maps, num_scales)]))


def _masks(scales: np.ndarray, num_scales: int) -> Iterator[tuple[int, np.ndarray]]:
    for scale in range(-1, num_scales):
        yield scale, scales == scale


def _elected(votes: np.ndarray) -> np.ndarray:
    """The scale with the most votes (S + 1, ...), counted from -1; of several the last."""
    return (len(votes) - 2 - votes[::-1].argmax(0)).astype(np.int8)
