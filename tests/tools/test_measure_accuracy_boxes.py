"""tools/measure_accuracy.py boxes: a trained detector, switched, against its host's own detections."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import measure_accuracy as tool
import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("pycocotools")

from apt_dense import APTViT
from apt_dense.hosts.load_trained import load_trained
from apt_dense.hosts.torchvision import build_detector
from apt_dense.hosts.torchvision.run_settings import Settings
from apt_dense.hosts.trained_model_types import Detections, TrainedDetector
from apt_dense.nn.attention import Attention
from apt_dense.patches.scorer_files import as_bytes

from calibration.scorer_networks import PatchNetwork
from evidence import ap_without_training as boxes
from evidence import detection_scores
from evidence import trained_detectors as detectors
from evidence.equal_token_rows import SMALLER, UNIFORM, Case
from evidence.model_forms import parse_form
from support.coco_folder import TINY_PRESET, write_coco
from support.references import randomise
from support.threads import one_thread  # noqa: F401
from torchvision_detection.data import load_split, read_boxes
from torchvision_detection.evaluation import detect

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
FORM = "half: proportional_attention=0.5, thresholds=(5.0, 4.0)"


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(build_detector.PRESETS, "tiny", TINY_PRESET)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data") / "coco", images=3)


def write_run(folder: Path, **options: Any) -> Path:
    """A run of random weights, whose detector finds something everywhere."""
    folder.mkdir()
    settings = Settings(model="tiny", size=128, channels=8, box_features=16, proposals=20, **options)
    model = randomise(build_detector.build_model(settings, 3))
    content = {"model": model.state_dict(), "optimizer": {}, "scheduler": {}, "iteration": 1}
    torch.save(
        {**content, "settings": asdict(settings), "categories": [(3, "red"), (90, "green")]}, folder / "last.pth"
    )
    return folder


def arguments(run: Path, data: Path, out: Path, *more: str) -> list[str]:
    argv = ["boxes", "--run", str(run), "--coco", str(data), "--shares", "0.8", "--device", "cpu", "--out", str(out)]
    return [*argv, "--form", "adaptive", "--form", FORM, *more]


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    lines = map(json.loads, (out / "rows.jsonl").read_text().splitlines())
    return {row["settings"]["variant"]: row["results"] for row in lines}


def of_host(run: Path, data: Path, row: Mapping[str, Any], power: float) -> list[dict]:
    """torchvision's own detections of the split, with the thresholds that a row found."""
    detector = load_trained(run, device="cpu")
    detector.backbone.set_patches(thresholds=tuple(row["thresholds"]))
    for module in detector.model.modules():
        if isinstance(module, Attention):
            module.proportional = power
    transform = detector.model.transform
    transform.min_size, transform.max_size = (round(128 * row["factor"]),), round(128 * row["factor"])
    return detect(detector.model, load_split(data, "val"), progress=False)


def numbers(entries: Sequence[Mapping]) -> np.ndarray:
    """Each detection's numbers, sorted by image and score."""
    rows = sorted((e["image_id"], -e["score"], e["category_id"], *e["bbox"]) for e in entries)
    return np.array(rows)


def masks(entries: Sequence[Mapping]) -> list[str]:
    return sorted(str(entry["segmentation"]) for entry in entries)


def test_detections_are_those_of_the_host(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, judged, judge = write_run(tmp_path / "run", thresholds=(5.5,)), [], detection_scores.coco_scores

    def coco_scores(truth: object, entries: list[dict], kind: str) -> dict[str, float]:
        judged.extend([entries] if kind == "bbox" else [])
        return judge(truth, entries, kind)

    monkeypatch.setattr(detection_scores, "coco_scores", coco_scores)
    tool.main(arguments(run, data, tmp_path / "out"))
    found = rows_of(tmp_path / "out")
    assert list(found) == [UNIFORM, SMALLER, "adaptive", "half"]
    for (name, row), entries in zip(found.items(), judged, strict=True):
        expected = of_host(run, data, row, 0.5 if name == "half" else 0.0)
        assert len(entries) > 0 and masks(entries) == masks(expected)
        np.testing.assert_allclose(numbers(entries), numbers(expected), atol=1e-4)
        assert row["images"] == 3 and row["ms"] > 0 and {"AP", "AP50", "mask AP"} <= row.keys()
    assert found[UNIFORM]["tokens"] == 1 and found[UNIFORM]["thresholds"] == found[SMALLER]["thresholds"] == []
    assert all(0.3 < row["tokens"] <= 0.8 for name, row in found.items() if name != UNIFORM)  # a grid of 6 x 8 cells
    first, second = found["half"]["thresholds"]
    assert first / second == pytest.approx(5 / 4)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| size x 1 | uniform |" in table and (tmp_path / "out" / "curves.png").is_file()


def test_a_uniform_detector_is_switched_and_rows_are_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", thresholds=(), task="boxes")
    tool.main(arguments(run, data, tmp_path / "out"))
    before = rows_of(tmp_path / "out")
    assert before["adaptive"]["thresholds"] and "mask AP" not in before["adaptive"]
    monkeypatch.setattr(boxes.SwitchedDetector, "measure", lambda *args: pytest.fail("measured again"))
    tool.main(arguments(run, data, tmp_path / "out"))
    assert rows_of(tmp_path / "out") == before


class Knowing(TrainedDetector):
    """Finds the true boxes, and so all but those of coarse patches."""

    def __init__(self, data: Path) -> None:
        model = nn.Module()
        model.backbone = APTViT(img_size=128, embed_dim=12, depth=1, num_heads=2, thresholds=(5.5,))
        super().__init__(model, model.backbone, ["red", "green"], [3, 90])
        self.split, self.place = load_split(data, "val"), 0

    def _detect(self, photo: np.ndarray) -> Detections:
        self.model.backbone(torch.zeros(1, 3, 96, 128))
        corners, labels = read_boxes(self.split, self.split.image_ids[self.place])
        self.place = (self.place + 1) % len(self.split.image_ids)
        return Detections(corners, np.ones(len(corners), np.float32), np.array(labels) - 1, None)


def test_true_boxes_have_the_full_ap(data: Path) -> None:
    switched = boxes.SwitchedDetector(Knowing(data), detectors.load_boxes(data, None, False))
    found = switched.measure(Case(UNIFORM, (1.0, 1.0)), (5.5,))
    assert found["AP"] == found["AP50"] == pytest.approx(100)
    with pytest.raises(ValueError, match="the run does not resize photos, so there is no size to scale"):
        switched.measure(Case(SMALLER, (1.0, 1.0), 0.5), (5.5,))


def test_some_photos_are_judged_alone(data: Path) -> None:
    split = detectors.load_boxes(data, 2, True)
    assert len(split.image_ids) == 2 and {image["id"] for image in split.coco.dataset["images"]} == {*split.image_ids}
    assert {each["image_id"] for each in split.coco.dataset["annotations"]} == {*split.image_ids}


def test_the_run_s_own_choice_comes_back(data: Path) -> None:
    """Options of a form hold for its rows alone."""
    detector = Knowing(data)
    detector.backbone.set_patches(scorer="laplacian")
    switched = boxes.SwitchedDetector(detector, detectors.load_boxes(data, None, False))
    form = parse_form("other: scorer='entropy', proportional_attention=1.0")
    switched.measure(Case("other", (1.0, 1.0), 0.9, form), (5.5,))
    assert detector.backbone.patches.scorer == "entropy" and switched.layers[0].proportional == 1.0
    switched.measure(Case("adaptive", (1.0, 1.0), 0.9, parse_form("adaptive")), (0.1,))
    assert detector.backbone.patches.scorer == "laplacian" and switched.layers[0].proportional == 0.0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--form", "windows: window_size=4"], "a trained detector cannot change window_size, only thresholds"),
        (["--form", "budget: token_budget=0.5"], "a trained detector cannot change token_budget"),
        (["--form", "least: min_tokens=9"], "a trained detector cannot change min_tokens"),
        (["--form", "power: proportional_attention=-1"], "proportional_attention=-1"),
        (["--shares", "0.01"], "a share of 0.01 of the tokens cannot be reached"),
        (["--run", "nowhere"], "nowhere does not exist"),
        (["--coco", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(more: list[str], message: str, data: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(SystemExit, match=f"^measure_accuracy: .*{message}"):
        tool.main(arguments(run, data, tmp_path / "out", *more))


def test_other_categories_are_refused(tmp_path: Path) -> None:
    other = write_coco(tmp_path / "coco", change=lambda content: content["categories"].append({"id": 91, "name": "x"}))
    with pytest.raises(SystemExit, match=r"finds 2 categories and the data have 3; .* only one side has \[91\]"):
        tool.main(arguments(write_run(tmp_path / "run"), other, tmp_path / "out"))


@pytest.mark.parametrize(("ids", "expected"), [((90, 3), (90, 3)), ((3, 90), (3, 90)), ((1, 2), (3, 90))])
def test_categories_of_the_classes(ids: tuple, expected: tuple, data: Path) -> None:
    """Runs note them in any order; (1, 2) is what is known of a run that noted none."""
    detector = Knowing(data)
    detector.category_ids = ids
    assert detectors.category_ids_of(detector, detector.split) == expected


def test_photos_without_objects_are_refused(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "empty")
    path = tmp_path / "empty" / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    first = min(image["id"] for image in content["images"])
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != first]
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="there is no object to find in 1 photos"):
        tool.main(arguments(write_run(tmp_path / "run"), tmp_path / "empty", tmp_path / "out", "--limit", "1"))


def test_runs_without_a_size_have_no_rows_of_smaller_images(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(detectors, "load_trained", lambda *args: Knowing(data))
    tool.main(arguments(write_run(tmp_path / "run"), data, tmp_path / "out"))
    assert list(rows_of(tmp_path / "out")) == [UNIFORM, "adaptive", "half"]
    assert (
        "without rows of smaller images: the run does not resize photos, so there is no size to scale"
        in capsys.readouterr().out
    )


def test_a_missing_host_is_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object) -> None:
        raise ImportError("no detectron2")

    monkeypatch.setattr(detectors, "load_trained", load)
    with pytest.raises(SystemExit, match="no detectron2"):
        tool.main(arguments(tmp_path, data, tmp_path / "out"))


def test_rows_depend_on_the_run_s_settings_and_scorers_files(data: Path, tmp_path: Path) -> None:
    run, file = write_run(tmp_path / "run"), tmp_path / "own.safetensors"
    argv = arguments(run, data, tmp_path / "out", "--form", f"own: scorer={str(file)!r}, thresholds=(0.5,)")

    def added() -> int:
        lines = tmp_path / "out" / "rows.jsonl"
        before = len(lines.read_text().splitlines()) if lines.exists() else 0
        tool.main(argv)
        return len(lines.read_text().splitlines()) - before

    file.write_bytes(as_bytes(PatchNetwork().scorer()))
    assert (added(), added()) == (5, 0)
    file.write_bytes(as_bytes(PatchNetwork().scorer()))  # refit
    assert added() == 1
    content = torch.load(run / "last.pth", weights_only=True)
    content["settings"]["proposals"] = 10
    torch.save(content, run / "last.pth")
    assert added() == 5


@pytest.mark.parametrize("drop_padding", [True, False])
@pytest.mark.parametrize("share", [0.8, 0.6, 0.3])
def test_a_share_is_of_what_the_uniform_model_sees(
    share: float, drop_padding: bool, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of photos whose right quarter and lower half are padding."""
    detector = Knowing(data)
    detector.model.backbone = APTViT(
        img_size=128, embed_dim=12, depth=1, num_heads=2, thresholds=(5.5,), drop_padding=drop_padding
    )
    detector.backbone = detector.model.backbone
    switched = boxes.SwitchedDetector(detector, detectors.load_boxes(data, None, False))
    images = [torch.zeros(1, 3, 256, 256) for _ in range(3)]
    for number, image in enumerate(images):
        strength = torch.linspace(0.01, 2, 192) * (number + 1)
        image[..., :128, :192] = torch.randn(3, 128, 192, generator=torch.Generator().manual_seed(number)) * strength
    monkeypatch.setattr(switched, "_images", lambda factor, limit=None: iter(images))
    full = switched._tokens(1.0)
    assert full == 3 * (8 * 12 if drop_padding else 16 * 16)
    options = {**switched.given, "thresholds": (5.5,), "token_budget": None, "min_tokens": None}
    found = replace(detector.backbone.patches, thresholds=switched.thresholds(1.0, options, share))
    kept = sum(int(found.count(image).sum()) for image in images) / full
    # Without dropping it, padding is the first to be merged, all of it at once.
    assert share - (0.02 if drop_padding else 0.5) < kept <= share


def test_weights_are_told_apart(tmp_path: Path) -> None:
    first = load_trained(write_run(tmp_path / "a"), device="cpu").model
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    second = load_trained(tmp_path / "b", device="cpu").model
    assert detectors.weights_digest(first) == detectors.weights_digest(second)
    with torch.no_grad():
        next(second.parameters()).view(-1)[0] += 1
    assert detectors.weights_digest(first) != detectors.weights_digest(second)
    counts = nn.BatchNorm2d(2), nn.BatchNorm2d(2)  # a number of no dimension, too
    assert detectors.weights_digest(counts[0]) == detectors.weights_digest(counts[1])
    counts[1].num_batches_tracked += 1
    assert detectors.weights_digest(counts[0]) != detectors.weights_digest(counts[1])
