"""torchvision_detection.evaluation: hand-made predictions with known scores, crowds, ids, pictures without objects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.coco_folder import rectangle, write_coco

pytest.importorskip("pycocotools", reason="scores are pycocotools'")

from apt_dense import APTViT
from apt_dense.hosts.coco_ap_by_scale import SharesUnderObjects
from apt_dense.hosts.torchvision import mask_rcnn

from shared.token_counts import TokenCounter
from torchvision_detection.data import CocoSplit, load_split, read_boxes, read_objects
from torchvision_detection.evaluation import (
    METRICS,
    coco_scores,
    detect,
    detections_of,
    evaluate,
    score_where_right_ones_dominate,
    shares_noted_in,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own


class Oracle(nn.Module):
    """A detector that has learned the annotations by heart; ``change`` edits what it says of each image."""

    def __init__(self, split: CocoSplit, change: Callable[[dict], dict] = dict) -> None:
        super().__init__()
        self.answers = iter([change(self.truth(split, image_id)) for image_id in split.image_ids])
        self.weight = nn.Parameter(torch.zeros(1))

    @staticmethod
    def truth(split: CocoSplit, image_id: int) -> dict[str, Tensor]:
        masks, labels = read_objects(split, image_id)
        found = [a for a in split.coco.imgToAnns[image_id] if not a["iscrowd"]]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in found)]
        stacked = np.stack(masks) if masks else np.zeros((0, 96, 128))
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.linspace(0.9, 0.5, len(labels)),
            "masks": torch.from_numpy(stacked).float()[:, None] * 0.8,
        }

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [next(self.answers) for _ in images]


def load(root: Path, change: Callable[[dict], None] | None = None) -> CocoSplit:
    return load_split(write_coco(root, 3, change, splits=("val",)), "val", every_class=False)


def scores_of(split: CocoSplit, change: Callable[[dict], dict] = dict) -> dict[str, dict[str, float]]:
    return evaluate(Oracle(split, change), split, progress=False)


def test_perfect_predictions(tmp_path: Path) -> None:
    scores = scores_of(load(tmp_path))
    for kind in ("bbox", "segm"):
        assert list(scores[kind]) == list(METRICS)
        assert scores[kind]["AP"] == scores[kind]["AP50"] == scores[kind]["AP75"] == pytest.approx(1)
        assert scores[kind]["AR100"] == pytest.approx(1)
        assert scores[kind]["APl"] == -1  # no object above 96 x 96 pixels


def test_annotation_ids_from_zero_count_too(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        for number, annotation in enumerate(content["annotations"]):
            annotation["id"] = number

    assert scores_of(load(tmp_path, change))["bbox"]["AP"] == pytest.approx(1)


def test_boxes_and_masks_are_scored_apart(tmp_path: Path) -> None:
    split = load(tmp_path)
    moved = scores_of(split, lambda found: found | {"boxes": found["boxes"] + 50})
    assert moved["bbox"]["AP"] < 0.1 and moved["segm"]["AP"] == pytest.approx(1)
    blank = scores_of(split, lambda found: found | {"masks": torch.zeros_like(found["masks"])})
    assert blank["bbox"]["AP"] == pytest.approx(1) and blank["segm"]["AP"] == 0


def test_wrong_labels(tmp_path: Path) -> None:
    assert scores_of(load(tmp_path), lambda found: found | {"labels": 3 - found["labels"]})["bbox"]["AP"] == 0


def test_no_detections_at_all(tmp_path: Path) -> None:
    scores = scores_of(load(tmp_path), lambda found: {key: value[:0] for key, value in found.items()})
    assert scores["bbox"]["AP"] == scores["segm"]["AP"] == 0


def test_detections_inside_a_crowd_are_no_mistakes(tmp_path: Path) -> None:
    def with_extra(found: dict) -> dict:
        """A third red object in each picture, the surest of all, where nothing but a crowd may be."""
        mask = torch.zeros(1, 1, 96, 128)
        mask[..., 4:24, 4:24] = 1
        box, label = torch.tensor([[4.0, 4, 24, 24]]), torch.ones(1).long()
        extra = {"boxes": box, "labels": label, "scores": torch.ones(1), "masks": mask}
        return {key: torch.cat([value, extra[key]]) for key, value in found.items()}

    def change(content: dict) -> None:
        for number, image_id in enumerate((10, 20, 30)):
            crowd = rectangle(image_id, 3, (0, 0, 60, 30), iscrowd=1, id=100 + number)
            mask = np.zeros((96, 128), np.uint8)
            mask[:30, :60] = 1
            runs = [0] + [30, 66] * 60 + [68 * 96]
            crowd["segmentation"] = {"size": [96, 128], "counts": runs}
            content["annotations"].append(crowd)

    assert scores_of(load(tmp_path / "plain"), with_extra)["bbox"]["AP"] < 0.8
    scores = scores_of(load(tmp_path / "crowd", change), with_extra)
    assert scores["bbox"]["AP"] == scores["segm"]["AP"] == pytest.approx(1)


def test_result_entries() -> None:
    mask = torch.zeros(1, 1, 4, 6)
    mask[..., 1:3, 2:5] = 0.9
    corners = torch.tensor([[2.0, 1, 5, 3]])
    found = {"boxes": corners, "labels": torch.tensor([2]), "scores": torch.tensor([0.7]), "masks": mask}
    (entry,) = detections_of(found, 42, (3, 90))
    assert (entry["image_id"], entry["category_id"], entry["bbox"]) == (42, 90, [2, 1, 3, 2])
    assert entry["segmentation"]["size"] == [4, 6]
    assert entry["score"] == pytest.approx(0.7)
    assert corners.tolist() == [[2, 1, 5, 3]]  # the prediction is left as it was


def test_sizes_of_masks_go_by_their_own_area(tmp_path: Path) -> None:
    """A thin cross in a large box is a small object to the mask score."""

    def change(content: dict) -> None:
        content["annotations"] = [rectangle(i, 3, (10, 10, 60, 60), id=i) for i in (10, 20, 30)]
        for annotation in content["annotations"]:
            annotation.update(segmentation=[[10, 10, 70, 10, 70, 11, 11, 11, 11, 70, 10, 70]], area=119)

    scores = scores_of(load(tmp_path, change))["segm"]
    assert scores["APs"] == pytest.approx(1) and scores["APm"] == -1


def test_the_model_is_left_in_its_mode(tmp_path: Path) -> None:
    split = load(tmp_path)
    model = Oracle(split).train()
    evaluate(model, split, progress=False)
    assert model.training


def test_boxes_alone_are_scored_where_masks_are_not_asked_for(tmp_path: Path) -> None:
    def drop(content: dict) -> None:
        for entry in content["annotations"]:
            del entry["segmentation"]

    split = load_split(write_coco(tmp_path, 3, drop, splits=("val",)), "val", every_class=False, masks=None)
    assert not split.masks
    boxes = {i: read_boxes(split, i) for i in split.image_ids}
    entries = [
        entry
        for i, (corners, labels) in boxes.items()
        for entry in detections_of(
            {"boxes": torch.from_numpy(corners), "labels": torch.tensor(labels), "scores": torch.ones(len(labels))},
            i, split.category_ids,
        )
    ]  # fmt: skip
    assert not any("segmentation" in entry for entry in entries)
    assert coco_scores(split.coco, entries, "bbox")["AP"] == pytest.approx(1)


def test_shares_are_those_of_the_patches_that_the_backbone_makes(tmp_path: Path) -> None:
    """Of each image as torchvision's transform resizes and pads it; boxes are in pixels of the file."""
    split = load(tmp_path)
    torch.manual_seed(0)
    net = APTViT(img_size=192, embed_dim=12, depth=1, num_heads=2, thresholds=(0.5, 0.3))
    model, seen = mask_rcnn(net, 3, 192, 192, channels=8, box_features=8).eval(), []
    net.register_forward_pre_hook(lambda _, args: seen.append(net.partition(args[0])[0]))
    found = SharesUnderObjects()
    detections = detect(model, split, progress=False, note=shares_noted_in(found, model, split, ()))
    assert found.images == list(split.image_ids) and len(found.detections) == len(detections)
    for image_id, cells in zip(split.image_ids, seen, strict=True):
        pixels = (cells > 0).repeat_interleave(16, 0).repeat_interleave(16, 1).float()
        for one in split.coco.imgToAnns[image_id]:
            x, y, w, h = (round(1.5 * value) for value in one["bbox"])  # 128 -> 192
            share = pixels[y : y + h, x : x + w].mean().item()
            assert found.objects[one["id"]] == pytest.approx(share, abs=0.02), "half pixels are rounded here"
    assert len(set(found.objects.values())) > 2
    uniform = SharesUnderObjects()
    net.set_patches(thresholds=())
    detect(model, split, progress=False, note=shares_noted_in(uniform, model, split, (0.5, 0.3)))
    assert uniform.objects == found.objects


def test_tokens_are_counted() -> None:
    backbone = APTViT(img_size=64, embed_dim=12, depth=2, num_heads=2, thresholds=(5.5,), checkpoint_blocks=True)
    counter = TokenCounter(backbone)
    (features,) = backbone(torch.zeros(1, 3, 64, 64))  # 4 of 16 cells' worth
    features.sum().backward()
    assert counter.take() == 0.25
    backbone(torch.rand(1, 3, 64, 64))
    backbone(torch.zeros(1, 3, 64, 64))
    assert counter.take() == 20 / 32
    assert np.isnan(counter.take())


def test_scores_can_be_had_from_a_list_of_detections(tmp_path: Path) -> None:
    split = load(tmp_path)
    entries = [e for i in split.image_ids for e in detections_of(Oracle.truth(split, i), i, split.category_ids)]
    assert coco_scores(split.coco, entries, "segm")["AP"] == pytest.approx(1)
    assert coco_scores(split.coco, entries, "bbox")["AP"] == pytest.approx(1)  # and may be used twice


def test_the_score_above_which_most_boxes_are_right(tmp_path: Path) -> None:
    """Right ones: 0.9, 0.8, 0.6 and 0.4; wrong: another class, another place, and a second box on the same object."""
    split = load(tmp_path)
    (first, second), (third, fourth) = (split.coco.imgToAnns[i] for i in split.image_ids[:2])

    def entry(annotation: dict, score: float, **other: object) -> dict:
        return {key: annotation[key] for key in ("image_id", "category_id", "bbox")} | {"score": score} | other

    found = [
        entry(first, 0.9), entry(second, 0.8), entry(third, 0.7, category_id=90), entry(third, 0.6),
        entry(first, 0.5, bbox=[100, 60, 9, 9]), entry(fourth, 0.4), entry(second, 0.3),
        entry(second, 0.2, bbox=[0, 0, 5, 5]),
    ]  # fmt: skip
    for share, expected in ((1.0, 0.8), (0.75, 0.6), (0.66, 0.4), (0.5, 0.2)):
        assert score_where_right_ones_dominate(split.coco, found, share) == pytest.approx(expected)
    assert score_where_right_ones_dominate(split.coco, [], 0.5) == 1
    assert score_where_right_ones_dominate(split.coco, found[2:3], 0.5) == 1
