"""tools/compare_by_training.py --coco: boxes and photos at any size, features made once, AP, whole tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import compare_by_training as tool
import cv2
import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from apt_dense.layout.scatter import scatter_tokens

from evidence import ap_after_training as training
from evidence.detection_photos import DetectionSet, SizedPhotos, load_photos
from evidence.detection_task import DetectionTask
from evidence.frozen_detector import DetectorOnFeatures, detector_features
from evidence.training_variants import Variant
from evidence.variant_backbones import Plan
from support.coco_folder import COLOURS, write_coco
from support.markdown_blocks import rows_by_name
from support.threads import one_thread  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own

CPU = torch.device("cpu")
ADAPTIVE = Variant("a", {"thresholds": (5.5,), "proportional_attention": 0.5}, tokens=0.6)
FORM = "tokens=0.6, thresholds=(5.5,), proportional_attention=0.5"
ROWS = (
    "uniform", f"adaptive: {FORM}", "smaller: size=(64, 64)", f"switched: {FORM}, start='uniform', epochs=0",
    "merging: tokens=0.75, rival='merging'",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of 96 x 128, and of the first split one upright and one without objects."""
    root = write_coco(tmp_path_factory.mktemp("data") / "coco", images=4, change=without_objects_in_the_last)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), root / "weights.pth")
    return root


def without_objects_in_the_last(content: dict) -> None:
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 40]


def plan_of(data: Path, **fields: object) -> Plan:
    plan = Plan("test_vit", data / "weights.pth", 2, (128, 128), 1, 2, patch_size=16)
    return plan._replace(**fields)


def arguments(data: Path, out: Path, *more: str, listed: Sequence[str] = ROWS) -> list[str]:
    argv = ["--coco", str(data), "--model", "test_vit", "--weights", str(data / "weights.pth"), "--size", "128"]
    argv += [word for row in listed for word in ("--row", row)]
    return [*argv, "--epochs", "1", "--batch", "2", "--seeds", "0", "1", "--device", "cpu", "--out", str(out), *more]


def of_several_shapes(data: Path) -> DetectionSet:
    """The second photo upright, the third four times as wide as high."""
    found = load_photos(data, "train")
    photos = list(found.photos)
    photos[1] = np.ascontiguousarray(photos[1].transpose(1, 0, 2))
    photos[2] = np.ascontiguousarray(photos[2][:32])
    return found._replace(photos=photos)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [128, 64])
def test_boxes_lie_where_the_photo_shows_their_objects(data: Path, size: int, mirrored: bool) -> None:
    found = load_photos(data, "train").at(size)
    for number in range(3):
        image, target = found.image(number, mirrored), found.target(number, mirrored)
        assert image.shape == (3, size * 3 // 4, size) and len(target["boxes"]) == 2
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            left, top, right, bottom = (round(n) for n in box)
            colour = torch.tensor(COLOURS[found.split.category_ids[label - 1]]) / 255
            inside = image[:, top + 2 : bottom - 2, left + 2 : right - 2].mean((1, 2))
            # The second object of a photo may lie over a part of the first.
            assert (inside - colour).abs().max() < 0.5 and inside.argmax() == colour.argmax()
    assert found.target(3, mirrored)["boxes"].shape == (0, 4)


def test_fewer_photos_are_evenly_spread(data: Path) -> None:
    assert load_photos(data, "train", 2).split.image_ids == (10, 30)
    every, some = (DetectionTask(data, limit, CPU).files for limit in (None, 2))
    assert [path.name for path in some["trained"]] == ["instances_train2017.json", "1.png", "3.png"]
    assert len(every["trained"]) == 5 and every["tested"] == some["tested"]


def test_heads_on_features_are_the_whole_detector(data: Path) -> None:
    """Of a batch of several shapes: the same padding, the same proposals, the same detections and losses."""
    torch.manual_seed(0)
    model = training.build(plan_of(data), ADAPTIVE).eval()
    photos = of_several_shapes(data).at(128)
    images = [photos.image(number) for number in range(3)]
    batch, _ = model.transform(images)
    outputs, layout = model.backbone.net.forward_tokens(batch.tensors)
    padded = torch.nn.functional.pad(scatter_tokens(outputs[-1], layout), (0, 2, 0, 4))  # as of a set with larger ones
    found = DetectorOnFeatures(model).eval()(padded, batch.image_sizes)
    expected = model(images)
    assert sum(len(each["boxes"]) for each in expected)
    for one, other in zip(found, expected, strict=True):
        for name, value in other.items():
            torch.testing.assert_close(one[name], value)
    targets = [load_photos(data, "train").at(128).target(0)] * 3
    losses = []
    for run in (lambda: DetectorOnFeatures(model).train()(padded, batch.image_sizes, targets), None):
        torch.manual_seed(1)
        losses.append(run() if run else model.train()(images, targets))
    torch.testing.assert_close(*losses)


def test_features_are_those_of_each_photo(data: Path) -> None:
    model = training.build(plan_of(data), ADAPTIVE).eval()
    photos = of_several_shapes(data).at(128)
    made = detector_features(model, photos, mirrored=True)
    assert made.maps.shape[:2] == (2, 4) and made.maps.shape[-2:] == (8, 8)
    assert made.sizes == [(96, 128), (128, 96), (32, 128), (96, 128)]
    for view in (0, 1):
        for number, (height, width) in enumerate(made.sizes):
            batch, _ = model.transform([photos.image(number, bool(view))])
            outputs, layout = model.backbone.net.forward_tokens(batch.tensors)
            expected = scatter_tokens(outputs[-1], layout)[0]
            rows, columns = height // 16, width // 16
            scale = expected.detach().abs().max()
            maps = made.maps[view, number].float()
            torch.testing.assert_close(
                maps[:, :rows, :columns] / scale, expected / scale, atol=0.03, rtol=0
            )  # bfloat16
            assert not maps[:, rows:].any() and not maps[:, :, columns:].any()


def test_only_the_heads_of_a_frozen_detector_learn(data: Path) -> None:
    photos = training.Photos(*[load_photos(data, "train").at(128)] * 2)

    torch.manual_seed(0)
    before = training.build(plan_of(data), ADAPTIVE).state_dict()
    plan = plan_of(data, backbone_rate=0.0, epochs=2)
    results, after = training.run(plan, ADAPTIVE, 0, photos, None, training.LastFeatures(), CPU)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved and not any(name.startswith("backbone.net.") for name in moved)
    assert {name.split(".")[0] for name in moved} == {"backbone", "rpn", "roi_heads"}
    assert results["share"] <= 0.6 and results["tokens"] == pytest.approx(48 * results["share"], abs=0.01)


@pytest.mark.parametrize("size", [128, 64])
def test_scores_are_those_of_coco(data: Path, size: int) -> None:
    photos: SizedPhotos = load_photos(data, "val").at(size)

    def found(shift: float) -> dict[str, float | None]:
        def detect(number: int) -> dict[str, Tensor]:
            target, height = photos.target(number), photos.photos[number].shape[0]
            boxes = training.resize_boxes(target["boxes"], (height, size), photos.full_sizes[number]) + shift
            return {**target, "boxes": boxes, "scores": torch.ones(len(boxes))}

        return training.score(torch.nn.Identity(), photos.split, detect)

    assert found(0)["AP"] == pytest.approx(100) and found(0)["APm"] == pytest.approx(100) and found(0)["APl"] is None
    assert 0 < found(4)["AP"] < 90 and found(60)["AP50"] < 30
    nothing = {"boxes": torch.zeros(0, 4), "labels": (), "scores": ()}
    assert training.score(torch.nn.Identity(), photos.split, lambda _: nothing)["AP"] == 0


@pytest.mark.parametrize("frozen", [True, False])
def test_a_table_of_rows_and_seeds(data: Path, tmp_path: Path, frozen: bool) -> None:
    more = ["--frozen"] if frozen else []
    tool.main(arguments(data, tmp_path, *more))
    found = rows_by_name(tmp_path / "table.md")
    head = found["uniform"].keys()
    assert list(found) == ["uniform", "adaptive", "smaller", "switched", "merging"]
    assert {row["seeds"] for row in found.values()} == {"2"} and "mIoU" not in head and "AP" in head
    assert {name: found[name]["tokens"] for name in ("uniform", "smaller", "merging")} == {
        "uniform": "48", "smaller": "12", "merging": "36",
    }  # fmt: skip
    assert 12 < float(found["adaptive"]["tokens"]) <= 0.6 * 48 and found["switched"]["loss"] == ""
    assert ("backbone ms" in head) == frozen and ("step ms" in head) != frozen
    kept = (tmp_path / "rows.jsonl").read_bytes()
    tool.main(arguments(data, tmp_path, *more))  # nothing is done again
    assert (tmp_path / "rows.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--classes", "3"], "--coco brings classes, photos and labels"),
        (["--group-by", "adaptive"], "leave out options for masks, and --group-by"),
        (["--size", "128x96"], "size '128x96': with --coco expected N"),
        (["--size", "120"], "size 120x120 is not a multiple of patches of 16 pixels; try 128x128"),
        (["--row", "a: size=(64, 48)"], "row 'a': with --coco a size is of the longer side, twice"),
        (["--row", "a: tokens=0.6, rival='pruning', proportional_attention=0.5"], "a rival cannot be built with"),
        (["--batch", "5"], "row 'uniform': 1 epochs of 4 photos make no step of 5 photos"),
    ],
)
def test_what_does_not_fit_detection_is_named(data: Path, tmp_path: Path, more: list[str], words: str) -> None:
    with pytest.raises(SystemExit, match=f"^compare_by_training: .*{words}"):
        tool.main(arguments(data, tmp_path, "--frozen", *more, listed=ROWS[:1]))


def test_other_categories_are_refused(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco", images=2)
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 5, "name": "blue"})
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the categories .id, name. of the training data differ"):
        DetectionTask(root, None, CPU).run(Plan("test_vit", None, None, (128, 128), 1), ADAPTIVE, 0, None)


def test_one_of_both_kinds_of_data_is_asked_for(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="give --classes, --images, .* or --coco"):
        tool.main(arguments(data, tmp_path)[2:])


def test_photos_are_shrunk_without_steps(data: Path) -> None:
    """As smaller images of the other comparisons are: stripes of single pixels become grey."""
    found = load_photos(data, "train")
    stripes = np.zeros((96, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    small = found._replace(photos=[stripes]).at(64).photos[0]
    assert small.shape == (48, 64, 3) and cv2.Laplacian(small[..., 0], cv2.CV_64F)[2:-2, 2:-2].std() < 10
