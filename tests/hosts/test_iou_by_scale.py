"""Counts behind IoU and boundary IoU by scale, against loops over pixels; void, groups without pixels, odd sizes."""

from __future__ import annotations

import numpy as np
import pytest

from apt_dense.hosts.iou_by_scale import Labelled, border_distance, count_by_scale, groups_of_scales, ious, near_border

VOID = 255


def labels_of(shape: tuple[int, int], seed: int, void: float = 0.0, classes: int = 3) -> np.ndarray:
    """Blocks of random classes, so that there are pixels without a border nearby."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, classes, (-(-shape[0] // 5), -(-shape[1] // 7)))
    labels = blocks.repeat(5, 0).repeat(7, 1)[: shape[0], : shape[1]].astype(np.int64)
    labels[random.random(shape) < void] = VOID
    return labels


def plain_near_border(labels: np.ndarray, distance: int, ignored: np.ndarray) -> np.ndarray:
    found = np.zeros(labels.shape, bool)
    for y, x in np.ndindex(labels.shape):
        for other_y in range(max(0, y - distance), min(labels.shape[0], y + distance + 1)):
            for other_x in range(max(0, x - distance), min(labels.shape[1], x + distance + 1)):
                if not ignored[y, x] and not ignored[other_y, other_x] and labels[y, x] != labels[other_y, other_x]:
                    found[y, x] = True
    return found


def plain_counts(image: Labelled, classes: int, num_scales: int, share: float) -> np.ndarray:
    distance = max(1, round(share * (image.truth.shape[0] ** 2 + image.truth.shape[1] ** 2) ** 0.5))
    ignored = image.truth == VOID
    near = [plain_near_border(labels, distance, ignored) for labels in (image.prediction, image.truth)]
    counts = np.zeros((num_scales + 1, 2, 3, classes), int)
    for y, x in zip(*np.nonzero(~ignored), strict=True):
        row, predicted, true = image.scales[y, x] + 1, image.prediction[y, x], image.truth[y, x]
        for kind, (in_prediction, in_truth) in enumerate([(True, True), (near[0][y, x], near[1][y, x])]):
            counts[row, kind, 0, true] += in_prediction and in_truth and predicted == true
            counts[row, kind, 1, predicted] += in_prediction
            counts[row, kind, 2, true] += in_truth
    return counts


@pytest.mark.parametrize("distance", [1, 2, 4])
@pytest.mark.parametrize("void", [0.0, 0.2])
def test_borders_are_those_of_a_loop(distance: int, void: float) -> None:
    labels = labels_of((23, 31), 0, void)
    found = near_border(labels, distance, labels == VOID)
    assert np.array_equal(found, plain_near_border(labels, distance, labels == VOID))
    assert 0.1 < found.mean() < 0.99


def test_borders_by_hand() -> None:
    """Also across a gap of no class; the edges of the image are none."""
    labels = np.array([[0, 0, 0, 0, VOID, 1, 1]])
    expected = np.array([[False, False, False, True, False, True, False]])
    assert np.array_equal(near_border(labels, 2, labels == VOID), expected)
    assert not near_border(np.zeros((4, 5), int), 3, np.zeros((4, 5), bool)).any()
    assert not near_border(labels, 2, np.ones((1, 7), bool)).any()


def test_what_is_near_is_what_the_papers_erosion_takes() -> None:
    """Away from the image's edges, where the paper has a border."""
    import cv2

    labels = np.pad(labels_of((20, 28), 1), 6, mode="edge")
    found = near_border(labels, 2, np.zeros(labels.shape, bool))
    for label in range(3):
        mask = (labels == label).astype(np.uint8)
        eroded = cv2.erode(mask, np.ones((3, 3), np.uint8), iterations=2)
        assert np.array_equal(found & (mask > 0), (mask > eroded))


@pytest.mark.parametrize(("shape", "share"), [((23, 31), 0.02), ((40, 17), 0.1), ((1, 1), 0.02), ((9, 50), 0.05)])
@pytest.mark.parametrize("void", [0.0, 0.3])
def test_counts_are_those_of_a_loop(shape: tuple[int, int], share: float, void: float) -> None:
    scales = np.random.default_rng(2).integers(-1, 3, shape)
    image = Labelled(labels_of(shape, 3), labels_of(shape, 4, void), scales)
    found = count_by_scale(image, 3, 3, border_share=share)
    assert np.array_equal(found, plain_counts(image, 3, 3, share)) and found.dtype == np.int32


@pytest.mark.parametrize(("shape", "pixels"), [((300, 400), 10), ((2, 2), 1), ((512, 512), 14)])
def test_distances(shape: tuple[int, int], pixels: int) -> None:
    assert border_distance(shape) == pixels


def test_right_predictions_have_an_iou_of_one_also_next_to_void() -> None:
    truth = labels_of((30, 42), 5, void=0.1)
    prediction = np.where(truth == VOID, 0, truth)  # where there is no label, anything may be said
    counts = count_by_scale(Labelled(prediction, truth, np.zeros(truth.shape, int)), 3, 1)
    assert (ious(counts.sum(0)) == 1).all()
    assert counts[1, 1, 2].sum() > 50


def test_shifted_borders_cost_more_near_borders() -> None:
    truth = np.zeros((100, 100), int)
    truth[:, 50:] = 1
    counts = count_by_scale(Labelled(np.roll(truth, 1, 1), truth, np.ones(truth.shape, int)), 2, 2)
    assert counts[:2].sum() == 0, "all are under patches of scale 1"
    plain, boundary = ious(counts[2])
    assert (plain > 0.95).all() and (boundary < plain - 0.2).all()


def test_labels_that_are_no_class_are_mistakes() -> None:
    truth, prediction = np.array([[0, 0, 7]]), np.array([[0, 9, 1]])
    counts = count_by_scale(Labelled(prediction, truth, np.zeros((1, 3), int)), 2, 1)
    assert counts[1, 0].tolist() == [[1, 0], [1, 1], [2, 0]]


def test_all_void() -> None:
    counts = count_by_scale(Labelled(labels_of((8, 9), 0), np.full((8, 9), VOID), np.zeros((8, 9), int)), 3, 2)
    assert not counts.any() and np.isnan(ious(counts.sum(0))).all()


def test_groups() -> None:
    assert list(groups_of_scales(1)) == list(groups_of_scales(2)) == ["all", "fine", "coarse"]
    rows = np.arange(-1, 3)
    assert {name: rows[place].tolist() for name, place in groups_of_scales(3).items()} == {
        "all": [-1, 0, 1, 2], "fine": [0], "coarse": [1, 2], "scale1": [1], "scale2": [2],
    }  # fmt: skip
    assert np.zeros((2, 1))[groups_of_scales(1)["coarse"]].sum() == 0


def test_sizes_must_be_equal() -> None:
    with pytest.raises(ValueError, match=r"must have one size, but have \(2, 3\), \(2, 3\) and \(3, 2\)"):
        count_by_scale(Labelled(np.zeros((2, 3), int), np.zeros((2, 3), int), np.zeros((3, 2), int)), 2, 1)
