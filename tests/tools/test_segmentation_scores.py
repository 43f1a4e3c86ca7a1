"""Scores of predicted classes, against sets of pixels counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from apt_dense.hosts.iou_by_scale import border_distance, near_border

from evidence.labelled_photos import IGNORED
from evidence.segmentation_scores import score


def maps(classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found, truth = (torch.randint(0, classes, (3, 24, 30), generator=generator, dtype=torch.uint8) for _ in range(2))
    found = torch.where(torch.rand(found.shape, generator=generator) < 0.6, truth, found)
    truth[torch.rand(truth.shape, generator=generator) < 0.1] = IGNORED
    return found, truth


def mean_iou(found: np.ndarray, truth: np.ndarray, counted: tuple[np.ndarray, np.ndarray], classes: int) -> float:
    values = []
    for label in range(classes):
        one, other = (found == label) & counted[0], (truth == label) & counted[1]
        if (one | other).any():
            values.append((one & other).sum() / (one | other).sum())
    return 100 * float(np.mean(values))


def test_scores_are_those_of_sets_of_pixels() -> None:
    classes, (found, truth) = 4, maps(4)
    scale_maps = torch.tensor([[[0, 1, 1], [1, 0, 2]]] * 3, dtype=torch.int8)
    scores = score(zip(found.split(2), truth.split(2), strict=True), classes + 1, scale_maps)  # one does not occur
    found, truth, valid = found.numpy(), truth.numpy(), truth.numpy() != IGNORED
    distance = border_distance(truth.shape[1:])
    near = [np.stack([near_border(m, distance, ~v) for m, v in zip(x, valid, strict=True)]) for x in (found, truth)]
    under = scale_maps.numpy().repeat(12, 1).repeat(10, 2)
    assert scores == {
        "mIoU": pytest.approx(mean_iou(found, truth, (valid, valid), classes)),
        "boundary": pytest.approx(mean_iou(found, truth, (near[0], near[1]), classes)),
        "accuracy": pytest.approx(100 * (found == truth)[valid].mean()),
        "fine": pytest.approx(mean_iou(found, truth, (valid & (under == 0),) * 2, classes)),
        "coarse": pytest.approx(mean_iou(found, truth, (valid & (under > 0),) * 2, classes)),
    }


def test_classes_that_do_not_occur_are_left_out() -> None:
    labels = torch.tensor([[[0, 0, 1, IGNORED]]], dtype=torch.uint8)
    found = torch.tensor([[[0, 1, 1, 2]]])
    scores = score([(found, labels)], 4)
    assert (scores["mIoU"], scores["accuracy"]) == (pytest.approx(50), pytest.approx(200 / 3))
    assert set(scores) == {"mIoU", "boundary", "accuracy"}
    with pytest.raises(ValueError, match="class 1, and the model 1 classes"):
        score([(found, labels)], 1)


def test_one_image_of_one_class_has_no_borders() -> None:
    truth = torch.zeros(1, 5, 5, dtype=torch.uint8)
    assert score([(truth.clone(), truth)], 2) == {"mIoU": 100, "boundary": 0, "accuracy": 100}
