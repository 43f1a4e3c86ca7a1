"""tools/compare_by_training.py --coco: boxes and photos at any size, features made once, AP, whole tables."""

from __future__ import annotations

from pathlib import Path

import compare_by_training as tool
import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from evidence import ap_after_training as training
from evidence.detection_photos import DetectionSet, load_photos
from evidence.training_variants import Variant
from evidence.variant_backbones import Plan
from support.coco_folder import COLOURS, write_coco
from support.threads import one_thread  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own

ADAPTIVE = Variant("a", {"thresholds": (5.5,), "proportional_attention": 0.5}, tokens=0.6)
FORM = "tokens=0.6, thresholds=(5.5,), proportional_attention=0.5"
ROWS = "uniform", f"adaptive: {FORM}", "smaller: size=(64, 64)", f"switched: {FORM}, start='uniform', epochs=0"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_coco(tmp_path_factory.mktemp("data") / "coco", images=4)
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit").state_dict(), root / "weights.pth")
    return root


def plan_of(data: Path, **fields: object) -> Plan:
    return Plan("test_vit", data / "weights.pth", 2, (128, 128), 1, 2, patch_size=16, **fields)


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    argv = ["--coco", str(data), "--model", "test_vit", "--weights", str(data / "weights.pth"), "--size", "128"]
    argv += [word for row in ROWS for word in ("--row", row)]
    return [*argv, "--epochs", "1", "--batch", "2", "--seeds", "0", "1", "--device", "cpu", "--out", str(out), *more]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [128, 64])
def test_boxes_lie_where_the_photo_shows_their_objects(data: Path, size: int, mirrored: bool) -> None:
    found = load_photos(data, "train")
    for number in range(4):
        image, target = found.image(number, size, mirrored), found.target(number, size, mirrored)
        assert image.shape == (3, size * 3 // 4, size) and len(target["boxes"]) == 2
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            left, top, right, bottom = (round(n) for n in box)
            colour = torch.tensor(COLOURS[found.split.category_ids[label - 1]]) / 255
            inside = image[:, top + 2 : bottom - 2, left + 2 : right - 2].mean((1, 2))
            # The second object of a photo may lie over a part of the first.
            assert (inside - colour).abs().max() < 0.5 and inside.argmax() == colour.argmax()


def test_fewer_photos_are_evenly_spread(data: Path) -> None:
    assert load_photos(data, "train", 2).split.image_ids == (10, 30)


def square_photos(data: Path) -> DetectionSet:
    found = load_photos(data, "train")
    return found._replace(photos=[np.pad(photo, ((0, 32), (0, 0), (0, 0)), mode="reflect") for photo in found.photos])


def test_heads_on_features_are_the_whole_detector(data: Path) -> None:
    torch.manual_seed(0)
    model = training.build(plan_of(data), ADAPTIVE).eval()
    photos = square_photos(data)
    image = photos.image(0, 128)
    batch, _ = model.transform([image])
    outputs, layout = model.backbone.net.forward_tokens(batch.tensors)
    maps = training.scatter_tokens(outputs[-1], layout)
    (expected,) = model([image])
    (found,) = training.DetectorOnFeatures(model).eval()(maps, [(128, 128)])
    assert len(expected["boxes"])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    made = training.features_of(model, photos, 128, mirrored=False)
    scale = maps.detach().abs().max()
    torch.testing.assert_close(made.maps[0, :1].float() / scale, maps / scale, atol=0.03, rtol=0)  # bfloat16's


def test_features_are_of_photos_without_their_padding(data: Path) -> None:
    model = training.build(plan_of(data), Variant("u", {}, size=(120, 120))).eval()
    made = training.features_of(model, load_photos(data, "train"), 120, mirrored=True)
    assert made.maps.shape[:2] == (2, 4) and made.maps.shape[-2:] == (8, 8) and made.sizes == [(90, 120)] * 4
    assert not made.maps[..., 6:, :].any() and made.maps[..., :6, :].abs().amin(dim=(2, 3, 4)).numel()
    assert made.maps[..., :6, :].float().abs().mean() > 0.1
    assert made.tokens == 6 * 8
    assert not torch.equal(made.maps[0], made.maps[1])


def test_only_the_heads_of_a_frozen_detector_learn(data: Path) -> None:
    plan, sets = plan_of(data, backbone_rate=0.0, rate=0.01)._replace(epochs=15), (load_photos(data, "train"),) * 2
    torch.manual_seed(0)
    before = training.build(plan, ADAPTIVE).state_dict()
    results, after = training.run(plan, ADAPTIVE, 0, sets, None, training.LastFeatures(), torch.device("cpu"))
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved and not any(name.startswith("backbone.net.") for name in moved)
    assert {name.split(".")[0] for name in moved} == {"backbone", "rpn", "roi_heads"}
    first, _ = training.run(
        plan._replace(epochs=1), ADAPTIVE, 0, sets, None, training.LastFeatures(), torch.device("cpu")
    )
    assert results["loss"] < 0.8 * first["loss"]
    assert results["share"] <= 0.6 and results["tokens"] == pytest.approx(48 * results["share"], abs=1.5)


def test_scores_are_those_of_coco(data: Path) -> None:
    found = load_photos(data, "val")

    def truth(shift: float) -> dict[str, float]:
        def detect(number: int) -> dict[str, Tensor]:
            target = found.target(number, 128)
            return {**target, "boxes": target["boxes"] + shift, "scores": torch.ones(len(target["labels"]))}

        return training._scores(found, detect)

    assert truth(0)["AP"] == pytest.approx(100) and truth(0)["APm"] == pytest.approx(100)
    assert 0 < truth(4)["AP"] < 90 and truth(60)["AP50"] < 30
    nothing = training._scores(found, lambda _: {"boxes": torch.zeros(0, 4), "labels": (), "scores": ()})
    assert nothing["AP"] == 0


@pytest.mark.parametrize("frozen", [True, False])
def test_a_table_of_rows_and_seeds(data: Path, tmp_path: Path, frozen: bool) -> None:
    more = ["--frozen"] if frozen else []
    tool.main(arguments(data, tmp_path, *more))
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    head, *lines = ([cell.strip("| ") for cell in row] for row in rows if "---" not in row[0])
    found = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    assert list(found) == ["uniform", "adaptive", "smaller", "switched"]
    assert {row["seeds"] for row in found.values()} == {"2"} and "mIoU" not in head
    assert found["uniform"]["tokens"] == "48" and found["smaller"]["tokens"] == "12"
    assert float(found["adaptive"]["tokens"]) < 48 and found["switched"]["loss"] == ""
    assert all(0 <= float(row["AP"]) <= 100 for row in found.values())
    assert ("backbone ms" in head) == frozen and ("step ms" in head) != frozen
    kept = (tmp_path / "rows.jsonl").read_bytes()
    tool.main(arguments(data, tmp_path, *more))  # nothing is done again
    assert (tmp_path / "rows.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--classes", "3"], "--coco brings classes, photos and labels"),
        (["--group-by", "adaptive"], "leave out options for masks, and --group-by"),
        (["--size", "128x96"], "size '128x96x128x96'"),
        (["--row", "pruning: tokens=0.6, rival='pruning', proportional_attention=0.5"], "a rival cannot be built with"),
    ],
)
def test_what_does_not_fit_detection_is_named(data: Path, tmp_path: Path, more: list[str], words: str) -> None:
    with pytest.raises(SystemExit, match=f"^compare_by_training: .*{words}"):
        tool.main(arguments(data, tmp_path, "--frozen", *more))


def test_one_of_both_kinds_of_data_is_asked_for(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="give --classes, --images, .* or --coco"):
        tool.main(arguments(data, tmp_path)[2:])
