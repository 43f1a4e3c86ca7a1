"""AP by the share of coarse patches, against a plain matching of boxes; groups without objects; shares of boxes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason="scores are pycocotools'")

from pycocotools.coco import COCO

from apt_dense.hosts.coco_ap_by_scale import (
    GROUPS,
    SharesUnderObjects,
    ap_by_coarse_share,
    coarse_shares,
    gathered,
    read_truth,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
SIDE, CELL = 256, 16


# ---- shares


def plain_share(scale_map: np.ndarray, box: np.ndarray) -> float:
    """The sum of the overlaps with each coarse cell."""
    x, y, width, height = box
    covered = 0.0
    for row, column in np.argwhere(scale_map > 0):
        across = min(x + width, column + 1) - max(x, column)
        down = min(y + height, row + 1) - max(y, row)
        covered += max(0, across) * max(0, down)
    return covered / (width * height)


def test_shares_are_those_of_a_loop() -> None:
    random = np.random.default_rng(0)
    scale_map = random.integers(-1, 3, (7, 9))
    boxes = np.concatenate([random.uniform(-2, 8, (60, 2)), random.uniform(0.02, 5, (60, 2))], axis=1)
    expected = [plain_share(scale_map, box) for box in boxes]
    assert coarse_shares(scale_map, boxes) == pytest.approx(expected, abs=1e-6)
    assert min(expected) == 0 and max(expected) > 0.8


def test_shares_by_hand() -> None:
    scale_map = np.array([[0, 2, 2], [-1, 2, 2]])
    boxes = [[0, 0, 1, 2], [1, 0, 2, 2], [0.5, 0, 1, 1], [0, 0, 3, 2], [1.2, 0.3, 0, 0], [0.2, 0.3, 0, 0], [5, 5, 1, 1]]
    assert coarse_shares(scale_map, np.array(boxes)).tolist() == [0, 1, 0.5, 0.666667, 1, 0, 0]
    assert coarse_shares(scale_map, np.zeros((0, 4))).shape == (0,)


# ---- AP


def iou(first: list, second: list) -> float:
    across = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    down = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    both = max(0, across) * max(0, down)
    return both / (first[2] * first[3] + second[2] * second[3] - both)


def plain_ap(objects: list[dict], detections: list[dict], counts: Callable[[dict], bool]) -> float:
    """COCO's AP of one class; ``counts`` says of an object or detection whether it is in the group."""
    values = []
    total = sum(counts(one) for one in objects)
    if not total:
        return -1
    for threshold in np.linspace(0.5, 0.95, 10):
        taken, outcomes = set(), []
        for found in sorted(detections, key=lambda one: -one["score"]):
            free = [o for o in objects if o["image_id"] == found["image_id"] and o["id"] not in taken]
            near = [o for o in free if iou(o["bbox"], found["bbox"]) >= threshold]
            # One that counts is taken before one that does not.
            best = max(near, key=lambda o: (counts(o), iou(o["bbox"], found["bbox"])), default=None)
            if best is not None:
                taken.add(best["id"])
            if counts(best or found):
                outcomes.append(best is not None)
        right = np.cumsum(outcomes)
        precision = right / np.arange(1, len(outcomes) + 1)
        recall = right / total
        for wanted in np.linspace(0, 1, 101):
            reached = precision[recall >= wanted]
            values.append(reached.max() if len(reached) else 0.0)
    return float(np.mean(values))


def scene(seed: int, images: int = 3, objects: int = 14) -> tuple[dict, SharesUnderObjects]:
    """Random boxes of one class, detections near them and elsewhere, and scale maps that are coarse on the left."""
    random = np.random.default_rng(seed)
    truth: dict = {"images": [], "annotations": [], "categories": [{"id": 4, "name": "thing"}]}
    detections = []
    for image_id in range(1, images + 1):
        truth["images"].append({"id": image_id, "width": SIDE, "height": SIDE})
        for _ in range(objects):
            x, y = random.uniform(0, 200, 2)
            width, height = random.uniform(10, 56, 2)
            box = [float(value) for value in (x, y, width, height)]
            fields = {"image_id": image_id, "category_id": 4}
            number = len(truth["annotations"]) + 1
            polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
            truth["annotations"].append(
                fields | {"id": number, "bbox": box, "area": width * height, "iscrowd": 0, "segmentation": [polygon]}
            )
            moved = [float(value) for value in np.add(box, random.normal(0, 3, 4))]
            detections.append(fields | {"bbox": moved, "score": float(random.random())})
        x, y = random.uniform(0, 200, 2)
        detections.append(fields | {"bbox": [float(x), float(y), 30.0, 30.0], "score": float(random.random())})
    coco, found = indexed(truth), SharesUnderObjects()
    for image_id in range(1, images + 1):
        scale_map = np.zeros((SIDE // CELL, SIDE // CELL), int)
        scale_map[:, : 4 + 2 * image_id] = 1
        own = [one for one in detections if one["image_id"] == image_id]
        found.add(image_id, scale_map, (1 / CELL, 1 / CELL), coco, own)
    return truth, found


def indexed(truth: dict) -> COCO:
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    return coco


@pytest.mark.parametrize("seed", range(3))
def test_ap_is_that_of_plain_matching(seed: int) -> None:
    truth, found = scene(seed)
    scores = ap_by_coarse_share(indexed(truth), found, "bbox")
    shares = {id(one): found.objects[one["id"]] for one in truth["annotations"]}
    shares |= {id(one): one["coarse_share"] for one in found.detections}

    for group, (low, high) in GROUPS.items():
        for letter, largest in (("", np.inf), ("s", 32**2)):

            def counts(one: dict, bounds: tuple = (low, high, largest)) -> bool:
                area = one["bbox"][2] * one["bbox"][3]
                return bounds[0] <= shares[id(one)] <= bounds[1] and area <= bounds[2]

            expected = plain_ap(truth["annotations"], found.detections, counts)
            assert scores[f"AP{letter}_{group}"] == pytest.approx(expected, abs=1e-6), (group, letter)
            assert 0.05 < expected < 0.95 or letter
            number = sum(counts(one) for one in truth["annotations"])
            assert scores[f"{'small_' if letter else ''}objects_{group}"] == number


def test_detections_of_other_groups_are_no_mistakes() -> None:
    truth, found = scene(0)
    before = ap_by_coarse_share(indexed(truth), found, "bbox")
    shot = {"image_id": 1, "category_id": 4, "score": 1.0, "bbox": [2.0, 200.0, 20.0, 20.0], "coarse_share": 1.0}
    found.detections.append(shot)
    after = ap_by_coarse_share(indexed(truth), found, "bbox")
    assert after["AP_fine"] == before["AP_fine"] and after["AP_mixed"] == before["AP_mixed"]
    assert after["AP_coarse"] < before["AP_coarse"]


def test_masks_are_scored_too_and_crowds_are_not_counted() -> None:
    truth, found = scene(1)
    coco = indexed(truth)
    perfect = SharesUnderObjects(found.objects, [], found.images)
    for one in truth["annotations"]:
        fields = {"image_id": one["image_id"], "category_id": 4, "score": 0.9, "bbox": one["bbox"]}
        outline = {"segmentation": coco.annToRLE(one), "coarse_share": found.objects[one["id"]]}
        perfect.detections.append(fields | outline)
    scores = ap_by_coarse_share(coco, perfect, "segm")
    assert [scores[f"AP_{group}"] for group in GROUPS] == pytest.approx([1, 1, 1])
    truth["annotations"][0]["iscrowd"] = 1
    numbers = ap_by_coarse_share(indexed(truth), perfect, "bbox")
    assert sum(numbers[f"objects_{group}"] for group in GROUPS) == len(truth["annotations"]) - 1


def test_groups_without_objects_have_no_ap() -> None:
    truth, found = scene(2)
    fine = SharesUnderObjects(
        dict.fromkeys(found.objects, 0.0), [one | {"coarse_share": 0.0} for one in found.detections], found.images
    )
    scores = ap_by_coarse_share(indexed(truth), fine, "bbox")
    assert scores["AP_mixed"] == scores["AP_coarse"] == scores["APs_coarse"] == -1 and scores["AP_fine"] > 0
    assert scores["objects_coarse"] == 0 and scores["objects_fine"] == len(truth["annotations"])


def test_no_detections_and_no_objects() -> None:
    truth, found = scene(0)
    nothing = SharesUnderObjects(found.objects, [], found.images)
    scores = ap_by_coarse_share(indexed(truth), nothing, "segm")
    assert [scores[f"AP_{group}"] for group in GROUPS] == [0, 0, 0]
    empty = ap_by_coarse_share(indexed(truth | {"annotations": []}), SharesUnderObjects(images=[1]), "bbox")
    assert {empty[f"AP_{group}"] for group in GROUPS} == {-1} and empty["objects_fine"] == 0


def test_inputs_are_left_as_they_were() -> None:
    truth, found = scene(0)
    areas, entries = [one["area"] for one in truth["annotations"]], [dict(one) for one in found.detections]
    first = ap_by_coarse_share(indexed(truth), found, "bbox")
    assert [one["area"] for one in truth["annotations"]] == areas and found.detections == entries
    assert ap_by_coarse_share(indexed(truth), found, "bbox") == first


def test_parts_of_several_processes_are_joined() -> None:
    truth, found = scene(0)
    parts = []
    for image_id in (2, 1, 3):
        ids = [one["id"] for one in truth["annotations"] if one["image_id"] == image_id]
        own = [one for one in found.detections if one["image_id"] == image_id]
        parts.append(SharesUnderObjects({number: found.objects[number] for number in ids}, own, [image_id]))
    joined = ap_by_coarse_share(indexed(truth), gathered(parts), "bbox")
    assert joined == pytest.approx(ap_by_coarse_share(indexed(truth), found, "bbox"))


def test_only_images_that_were_tested_count(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    truth, found = scene(0)
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    own = [one for one in found.detections if one["image_id"] == 1]
    ids = [one["id"] for one in truth["annotations"] if one["image_id"] == 1]
    one_image = SharesUnderObjects({number: found.objects[number] for number in ids}, own, [1])
    capsys.readouterr()
    read = read_truth(str(path))
    assert not capsys.readouterr().out
    scores = ap_by_coarse_share(read, one_image, "bbox")
    alone = truth | {"annotations": [one for one in truth["annotations"] if one["image_id"] == 1]}
    assert scores == pytest.approx(ap_by_coarse_share(indexed(alone), one_image, "bbox"))
