"""Scores of predicted classes: mIoU, also by the patches under the pixels, boundary IoU, pixel accuracy."""

from collections.abc import Iterable, Mapping
from itertools import repeat

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from apt_dense.hosts.iou_by_scale import KINDS, Labelled, count_by_scale, groups_of_scales, ious

from evidence.labelled_photos import IGNORED

_NAMES = dict(zip(KINDS, ("mIoU", "boundary"), strict=True))


def score(
    predictions: Iterable[tuple[Tensor, Tensor]], classes: int, scale_maps: Tensor | None = None
) -> dict[str, float]:
    """Scores in per cent, over all images together.

    Args:
        predictions: batches of predicted and true classes (B, H, W), in order.
        scale_maps: (N, h, w) of all images, by which pixels are grouped: the scale of the patch under each; None for no
            groups.

    Returns:
        "mIoU" and "boundary" (mean boundary IoU, arXiv 2103.16562) over the classes that occur, "accuracy", and with
        scale maps "fine" and "coarse", the mIoU of pixels under the smallest patches and under all others.

    Raises:
        ValueError: for a true class that is not one of ``classes``.
    """
    scales = 1 if scale_maps is None else int(scale_maps.max()) + 1
    counts = np.zeros((scales + 1, len(KINDS), 3, classes), np.int64)
    maps = repeat(None) if scale_maps is None else iter(scale_maps)
    for found, masks in predictions:
        for prediction, truth in zip(found.cpu().numpy(), masks.cpu().numpy(), strict=True):
            _check(truth, classes)
            labelled = Labelled(prediction, truth, _enlarged(next(maps), truth.shape))
            counts += count_by_scale(labelled, classes, scales, void=IGNORED)
    return _percentages(counts, scales)


def _check(truth: np.ndarray, classes: int) -> None:
    highest = truth[truth != IGNORED].max(initial=0)
    if highest >= classes:
        raise ValueError(f"a mask has class {highest}, and the model {classes} classes, from 0")


def _enlarged(scale_map: Tensor | None, shape: tuple[int, int]) -> np.ndarray:
    """The scale of the patch under each pixel of a mask."""
    if scale_map is None:
        return np.zeros(shape, np.int8)
    return F.interpolate(scale_map[None, None].float(), shape, mode="nearest-exact")[0, 0].numpy().astype(np.int8)


def _percentages(counts: np.ndarray, scales: int) -> dict[str, float]:
    whole = counts.sum(0)
    right, _, truth = whole[0].sum(-1)
    scores = {_NAMES[kind]: _mean(whole[i]) for i, kind in enumerate(KINDS)}
    scores["accuracy"] = right / max(truth, 1)
    if scales > 1:
        groups: Mapping[str, slice] = groups_of_scales(scales)
        scores |= {name: _mean(counts[groups[name], 0].sum(0)) for name in ("fine", "coarse")}
    return {name: 100 * float(value) for name, value in scores.items()}


def _mean(counts: np.ndarray) -> float:
    """Mean over the classes that occur; 0 where none does."""
    values = ious(counts)
    return float(np.nanmean(values)) if np.isfinite(values).any() else 0.0
