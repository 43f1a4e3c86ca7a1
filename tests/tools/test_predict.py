"""predict: what it writes of photos, names that do not collide, photos that cannot be read, files that are there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("tqdm", reason="the tools show their progress with it")
pytest.importorskip("pycocotools", reason="masks are written as COCO's run lengths")

import predict
from pycocotools.coco import COCO

from apt_dense import APTViT
from apt_dense.hosts.torchvision.load_trained_detector import to_tensor
from apt_dense.hosts.trained_model_types import Detections, TrainedDetector, TrainedSegmentor

BACKBONE = APTViT(img_size=64, embed_dim=12, depth=1, num_heads=2, thresholds=(5.5,))
SIZE = (48, 64)  # 3 x 4 cells
COLOURS = [(200, 30, 30), (30, 200, 30)]


def see(photo: np.ndarray) -> None:
    BACKBONE((to_tensor(photo)[None] - 0.45) / 0.22)


class Detector(TrainedDetector):
    """Finds the red and the green rectangle below, and a doubtful third object."""

    def _detect(self, photo: np.ndarray) -> Detections:
        see(photo)
        boxes = np.array([[0, 0, 16, 24], [32, 8, 64, 40], [1, 1, 9, 9]], np.float32)
        masks = np.zeros((3, *photo.shape[:2]), bool)
        masks[0, :24, :16] = masks[1, 8:40, 32:64] = True
        return Detections(boxes, np.array([0.8, 0.9, 0.1], np.float32), np.array([0, 1, 0]), masks)


class Segmentor(TrainedSegmentor):
    """Red pixels are of class 1."""

    def _segment(self, photo: np.ndarray) -> np.ndarray:
        see(photo)
        return (photo[..., 0] > 150).astype(np.int64)


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> TrainedDetector:
    model = Detector(BACKBONE, BACKBONE, ("red thing", "green thing"), (3, 90))
    monkeypatch.setattr(predict, "load_trained", lambda path, config, device: model)
    return model


@pytest.fixture
def segmentor(monkeypatch: pytest.MonkeyPatch) -> TrainedSegmentor:
    model = Segmentor(BACKBONE, BACKBONE, ("ground", "red"), COLOURS, first_label=1)
    monkeypatch.setattr(predict, "load_trained", lambda path, config, device: model)
    return model


def write_photo(path: Path) -> Path:
    pixels = np.full((*SIZE, 3), 90, np.uint8)
    pixels[:24, :16], pixels[8:40, 32:64] = COLOURS
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels[..., ::-1])
    return path


def run(*argv: object) -> None:
    predict.main(["run", *map(str, argv)])


def failure(*argv: object) -> str:
    with pytest.raises(SystemExit) as ended:
        run(*argv)
    assert "\n" not in str(ended.value.code)
    return str(ended.value.code)


def test_detections_are_written_as_coco_has_them(detector: TrainedDetector, tmp_path: Path) -> None:
    photo = write_photo(tmp_path / "photo.png")
    run(photo, write_photo(tmp_path / "other.png"), "--out", tmp_path / "out", "--no-pictures")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["detections.json"]
    found = COCO(str(tmp_path / "out" / "detections.json"))
    assert found.dataset["categories"] == [{"id": 3, "name": "red thing"}, {"id": 90, "name": "green thing"}]
    (image, other) = found.dataset["images"]
    assert image["file_name"] == str(photo) and (image["height"], image["width"]) == SIZE and other["id"] == 2
    assert image["cells"] == 12 and 0 < image["tokens"] < 12 and image["milliseconds"] > 0
    assert image["tokens_kept"] == pytest.approx(image["tokens"] / 12, abs=1e-4)
    first, second = found.imgToAnns[1]  # the third is doubtful
    assert (first["category_id"], first["bbox"], first["area"]) == (90, [32, 8, 32, 32], 32 * 32)
    assert first["score"] == 0.9 and second["score"] == 0.8 and len(found.imgToAnns[2]) == 2
    assert found.annToMask(second).sum() == found.annToMask(second)[:24, :16].sum() == 24 * 16
    assert sorted(found.anns) == [1, 2, 3, 4]


def test_the_threshold_is_that_of_the_command_line(detector: TrainedDetector, tmp_path: Path) -> None:
    photo = write_photo(tmp_path / "photo.png")
    for threshold, expected in ((0.05, 3), (0.85, 1), (1, 0)):
        run(photo, "--out", tmp_path / str(threshold), "--no-pictures", "--score-threshold", threshold)
        content = json.loads((tmp_path / str(threshold) / "detections.json").read_text())
        assert len(content["annotations"]) == expected


def test_detections_are_drawn_with_class_and_score(detector: TrainedDetector, tmp_path: Path) -> None:
    pytest.importorskip("supervision", reason="detections are drawn with it")
    photo = write_photo(tmp_path / "photo.png")
    run(photo, "--out", tmp_path / "out")
    drawn = cv2.imread(str(tmp_path / "out" / "photo.png"))
    assert drawn.shape[1] == 800 and drawn.shape[0] > 600, "small photos are enlarged, under a caption"
    run(photo, "--out", tmp_path / "none", "--score-threshold", "1")
    plain = cv2.imread(str(tmp_path / "none" / "photo.png"))
    changed = np.abs(drawn.astype(int) - plain).max(axis=2)[-600:] > 8
    assert changed[:300, :200].mean() > 0.9, "inside of the red object"
    assert changed[350:, :150].mean() < 0.01, "far from both"


def test_supervision_is_named_where_it_is_missing(
    detector: TrainedDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    monkeypatch.delitem(sys.modules, "shared.detection_drawing", raising=False)
    photo = write_photo(tmp_path / "photo.png")
    assert "supervision cannot be imported" in failure(photo, "--out", tmp_path / "out")
    run(photo, "--out", tmp_path / "out", "--no-pictures")


def test_labels_are_written_as_in_the_data_set(segmentor: TrainedSegmentor, tmp_path: Path) -> None:
    run(write_photo(tmp_path / "photo.png"), "--out", tmp_path / "out")
    labels = cv2.imread(str(tmp_path / "out" / "photo_labels.png"), cv2.IMREAD_UNCHANGED)
    assert labels.dtype == np.uint8 and labels.shape == SIZE
    assert (labels[:24, :16] == 2).all() and (labels[:, 20:] == 1).all()
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert content["classes"] == [
        {"label": 1, "name": "ground", "colour": [200, 30, 30]}, {"label": 2, "name": "red", "colour": [30, 200, 30]},
    ]  # fmt: skip
    assert content["images"][0]["tokens"] < 12
    drawn = cv2.imread(str(tmp_path / "out" / "photo.png"))[..., ::-1].astype(int)
    assert drawn[150, 100, 1] > drawn[150, 100, 0] + 50, "the red object in its class's colour, green"


def test_labels_above_255_take_16_bits(segmentor: TrainedSegmentor, tmp_path: Path) -> None:
    segmentor.first_label = 300
    run(write_photo(tmp_path / "photo.png"), "--out", tmp_path / "out", "--no-pictures")
    labels = cv2.imread(str(tmp_path / "out" / "photo_labels.png"), cv2.IMREAD_UNCHANGED)
    assert labels.dtype == np.uint16 and labels.max() == 301


def test_photos_of_equal_names_in_two_folders_are_kept_apart(segmentor: TrainedSegmentor, tmp_path: Path) -> None:
    for name in ("a/0.png", "b/0.png", "b/1.png", "b/2.png", "b/2.jpg"):
        write_photo(tmp_path / name)
    out = tmp_path / "out"
    run(tmp_path / "a", tmp_path / "b", "--out", out, "--no-pictures")
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*_labels.png"))
    assert written == [
        "1_labels.png", "2.jpg_labels.png", "2.png_labels.png", "a/0_labels.png", "b/0_labels.png"
    ]  # fmt: skip
    assert len(json.loads((out / "predictions.json").read_text())["images"]) == 5
    write_photo(tmp_path / "c" / "a" / "0.png")
    assert "would both become a/0.png" in failure(tmp_path / "a", tmp_path / "c" / "a", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_there_is_not_overwritten(segmentor: TrainedSegmentor, tmp_path: Path) -> None:
    write_photo(tmp_path / "a" / "0.png")
    write_photo(tmp_path / "b" / "0.png")
    out = tmp_path / "out"
    run(tmp_path / "a", "--out", out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    message = failure(tmp_path / "b", "--out", out)
    assert "predictions.json and 2 more files exist" in message and "--overwrite" in message
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    run(tmp_path / "b", "--out", out, "--overwrite")
    content = json.loads((out / "predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == [str(tmp_path / "b" / "0.png")]
    assert "would overwrite the photo" in failure(tmp_path / "a", "--out", tmp_path / "a")


def test_photos_that_cannot_be_read_are_named_and_counted(
    segmentor: TrainedSegmentor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photo(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "1.jpg").write_bytes(b"no photo")
    assert failure(tmp_path / "a", "--out", tmp_path / "out", "--no-pictures").startswith("predict: 1 of 2 photos")
    shown = capsys.readouterr()
    assert "left out" in shown.err and "1.jpg" in shown.err and "1 of 2 photos in" in shown.out
    assert "photo/s" in shown.err or "s/photo" in shown.err, "a progress bar"
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == 1


def test_a_stopped_run_leaves_what_it_has(
    segmentor: TrainedSegmentor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photo(tmp_path / "a" / "0.png")
    write_photo(tmp_path / "a" / "1.png")
    segment, calls = Segmentor._segment, []

    def stop(self: Segmentor, photo: np.ndarray) -> np.ndarray:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return segment(self, photo)

    monkeypatch.setattr(Segmentor, "_segment", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", "--out", tmp_path / "out", "--no-pictures")
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["none.jpg"], "none.jpg does not exist"), (["photo.png", "--config", "x.py"], "does not exist"),
        (["photo.png"], "run does not exist; expected the folder"),
    ],
)  # fmt: skip
def test_bad_input(argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_photo(tmp_path / "photo.png")
    assert message in failure(*argv, "--out", "out")
    assert not (tmp_path / "out").exists()


def test_a_run_of_the_torchvision_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file to the data, with nothing replaced."""
    from dataclasses import asdict

    from apt_dense.hosts.torchvision.build_detector import PRESETS, build_model
    from apt_dense.hosts.torchvision.run_settings import Settings

    monkeypatch.setitem(PRESETS, "tiny", {"embed_dim": 48, "depth": 2, "num_heads": 2})
    settings = Settings(task="boxes", model="tiny", size=96, channels=8, box_features=16, proposals=20)
    content = {"model": build_model(settings, 2).state_dict(), "optimizer": {}, "scheduler": {}, "iteration": 1}
    torch.save(content | {"settings": asdict(settings), "categories": [(7, "thing")]}, tmp_path / "last.pth")
    photo = write_photo(tmp_path / "photo.png")
    argv = [str(tmp_path), str(photo), "--out", str(tmp_path / "out"), "--no-pictures", "--score-threshold", "0"]
    predict.main(argv)
    written = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert written["annotations"] and {entry["category_id"] for entry in written["annotations"]} == {7}
    assert not any("segmentation" in entry for entry in written["annotations"])
    assert written["images"][0]["cells"] == 6 * 6


def test_two_photos_that_would_write_one_file(segmentor: TrainedSegmentor, tmp_path: Path) -> None:
    """The labels of "a" and the picture of "a_labels"; and names that hold suffixes."""
    for names in (("a.png", "a_labels.png"), ("a.jpg", "a.png", "a.jpg.png"), ("b_labels.png", "sub/b.png")):
        photos = [write_photo(tmp_path / "photos" / name) for name in names]
        message = failure(*photos, "--out", tmp_path / "out")
        assert "two photos would both write" in message and "rename one of them" in message
    assert not (tmp_path / "out").exists()
    run(*photos, "--out", tmp_path / "out", "--no-pictures")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["b_labels.png", "b_labels_labels.png"]
