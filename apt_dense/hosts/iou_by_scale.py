"""IoU and boundary IoU of label maps, split by the scale of the patch under each pixel.

Coarse patches lie where an image is flat, which is where labels are easy: compare a group with the same group of
another model (the plain ViT, grouped by the same patches), not with the other group.

Shape letters: H and W the label map, K classes, S scales.
"""

from typing import NamedTuple

import cv2
import numpy as np

#: Rows of the counts: pixels of whole maps, and pixels near a border between classes.
KINDS = "all", "boundary"


class Labelled(NamedTuple):
    """An image's labels.

    Args:
        prediction: (H, W) integer classes.
        truth: (H, W) integer classes, or ``void``.
        scales: (H, W) integers, the scale of the patch under each pixel: 0 for the smallest, -1 for none.
    """

    prediction: np.ndarray
    truth: np.ndarray
    scales: np.ndarray


def border_distance(shape: tuple[int, int], share: float = 0.02) -> int:
    """Pixels to a border of classes up to which boundary IoU counts: a share of the diagonal, at least 1."""
    return max(1, round(share * float(np.hypot(*shape))))


def near_border(labels: np.ndarray, distance: int, ignored: np.ndarray) -> np.ndarray:
    """Mark the pixels (H, W) that have another class within so many rows and columns, diagonals included.

    That is, for all classes at once, what a mask loses when it is eroded ``distance`` times by 3 x 3 pixels. The edges
    of the image, and pixels of no class, are no border.

    Args:
        labels: (H, W) integers below 2**24.
        ignored: (H, W) bool, pixels of no class. They are not marked.
    """
    kernel = np.ones((2 * distance + 1,) * 2, np.uint8)
    plain = labels.astype(np.float32)
    highest = cv2.dilate(np.where(ignored, -np.inf, plain).astype(np.float32), kernel)
    lowest = cv2.erode(np.where(ignored, np.inf, plain).astype(np.float32), kernel)
    return (highest != lowest) & ~ignored


def count_by_scale(
    image: Labelled, classes: int, num_scales: int, *, void: int = 255, border_share: float = 0.02
) -> np.ndarray:
    """Count what IoUs are made of: (S + 1, 2, 3, K) int32. Counts of several images may be added up.

    Axes are the scale from -1 up, ``KINDS``, and intersection, prediction, truth. Pixels of no class are left out, also
    of the prediction; labels that are no class count as mistakes.

    Args:
        classes: K.
        num_scales: S.
        void: label of pixels of no class.
        border_share: of the image's diagonal, up to which boundary IoU counts.

    Raises:
        ValueError: if the three maps differ in size.
    """
    prediction, truth, scales = image
    if not prediction.shape == truth.shape == scales.shape:
        raise ValueError(
            f"prediction, labels and scale map must have one size, but have {prediction.shape}, {truth.shape} and "
            f"{scales.shape}"
        )
    ignored, distance = truth == void, border_distance(truth.shape, border_share)
    # What is predicted where there is no label makes no border.
    near = [near_border(labels, distance, ignored) for labels in (prediction, truth)]
    counts = np.zeros((num_scales + 1, len(KINDS), 3, classes), np.int32)
    for kind, (near_prediction, near_truth) in enumerate([(~ignored, ~ignored), near]):
        both = near_prediction & near_truth & (prediction == truth)
        for place, (labels, mask) in enumerate([(truth, both), (prediction, near_prediction), (truth, near_truth)]):
            counts[:, kind, place] = _histogram(labels[mask], scales[mask], counts.shape[0], classes)
    return counts


def _histogram(labels: np.ndarray, scales: np.ndarray, rows: int, classes: int) -> np.ndarray:
    """Count labels by scale from -1 up: (rows, classes)."""
    is_class = (labels >= 0) & (labels < classes)
    place = (scales[is_class].astype(np.int64) + 1) * classes + labels[is_class]
    return np.bincount(place, minlength=rows * classes).reshape(rows, classes)


def groups_of_scales(num_scales: int) -> dict[str, slice]:
    """Rows of the counts by name: all, fine, coarse and, where there are several coarse scales, each of them."""
    groups = {"all": slice(None), "fine": slice(1, 2), "coarse": slice(2, None)}
    each = {f"scale{scale}": slice(scale + 1, scale + 2) for scale in range(1, num_scales)}
    return groups | (each if len(each) > 1 else {})


def ious(counts: np.ndarray) -> np.ndarray:
    """IoU of each class in [0, 1] from (..., 3, K) counts; NaN for classes that neither map has."""
    intersection, prediction, truth = np.moveaxis(counts.astype(np.float64), -2, 0)
    with np.errstate(invalid="ignore"):
        return intersection / (prediction + truth - intersection)
