"""load_trained: finds out who wrote a run, and refuses what no one did."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from apt_dense import APTViT
from apt_dense.hosts.load_trained import load_trained
from apt_dense.hosts.trained_model_types import Detections, TrainedDetector, TrainedSegmentor


def write(path: Path, **content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> list:
    """Loaders that only say with what they were called."""
    calls: list = []

    class Loaded(nn.Module):
        def to(self, device: object) -> Loaded:
            calls.append(str(device))
            return self

    for host, module in (
        ("torchvision", "load_trained_detector"), ("detectron2", "load_trained_detector"),
        ("mmseg", "load_trained_segmentor"),
    ):  # fmt: skip
        name = f"apt_dense.hosts.{host}.{module}"
        fake = type(sys)(name)

        def load(path: Path, *config: str | None, host: str = host) -> Loaded:
            calls.append((host, path, *config))
            return Loaded()

        setattr(fake, module, load)
        if host != "torchvision":
            monkeypatch.setitem(sys.modules, f"apt_dense.hosts.{host}", type(sys)(f"apt_dense.hosts.{host}"))
        monkeypatch.setitem(sys.modules, name, fake)
    return calls


def test_the_trainer_is_found_out(tmp_path: Path, loaders: list) -> None:
    last = write(tmp_path / "a" / "last.pth", settings={}, categories=[], model={})
    renamed = write(tmp_path / "kept.pth", settings={}, categories=[], model={})
    final = write(tmp_path / "b" / "model_final.pth", model={})
    (tmp_path / "b" / "config.yaml").write_text("model: {}")
    iteration = write(tmp_path / "c" / "iter_1.pth", state_dict={}, meta={})
    other = write(tmp_path / "d" / "detectron2.pth", model={})
    for path, expected in (
        (last, ("torchvision", last)), (last.parent, ("torchvision", last)), (renamed, ("torchvision", renamed)),
        (final, ("detectron2", final, None)), (final.parent, ("detectron2", final.parent, None)),
        (other, ("detectron2", other, None)),
        (iteration, ("mmseg", iteration, None)), (iteration.parent, ("mmseg", iteration.parent, None)),
    ):  # fmt: skip
        loaders.clear()
        load_trained(str(path), device="cpu")
        assert loaders == [expected, "cpu"], path
    load_trained(iteration, config=tmp_path / "own.py")
    assert loaders[-2] == ("mmseg", iteration, str(tmp_path / "own.py"))


def test_what_no_trainer_wrote(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.pth does not exist; expected the folder"):
        load_trained(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="is not a checkpoint of a run"):
        load_trained(write(tmp_path / "vit.pth", pos_embed=torch.zeros(1)))
    with pytest.raises(ValueError, match="brings its own settings"):
        load_trained(write(tmp_path / "last.pth", settings={}, categories=[]), config="own.py")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "vit.pth").read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        load_trained(tmp_path / "cut.pth")


# ---- what all trained models do


class Detector(TrainedDetector):
    def _detect(self, photo: np.ndarray) -> Detections:
        scores = np.array([0.2, 0.9, 0.5], np.float32)
        return Detections(np.arange(12, dtype=np.float32).reshape(3, 4), scores, np.array([0, 1, 0]), None)


class Segmentor(TrainedSegmentor):
    def _segment(self, photo: np.ndarray) -> np.ndarray:
        assert torch.is_inference_mode_enabled()
        return np.zeros(photo.shape[:2], np.int64)


BACKBONE = APTViT(img_size=32, embed_dim=12, depth=1, num_heads=2)
PHOTO = np.zeros((4, 6, 3), np.uint8)


def test_detections_are_sorted_and_cut_off() -> None:
    detector = Detector(BACKBONE.train(), BACKBONE, ["a", 3], [1, 90])
    assert not detector.model.training and detector.class_names == ("a", "3")
    found = detector.predict(PHOTO)
    assert found.scores.tolist() == [np.float32(0.9), 0.5] and found.labels.tolist() == [1, 0]
    assert found.boxes.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]] and found.masks is None
    assert len(detector.predict(PHOTO, score_threshold=0).scores) == 3
    assert len(detector.predict(PHOTO, score_threshold=1).scores) == 0


@pytest.mark.parametrize(
    ("photo", "named"),
    [
        (PHOTO[..., 0], r"uint8 of shape \(4, 6\)"), (PHOTO.astype(float), "float64"), (PHOTO[:0], "shape"),
        (torch.zeros(3, 4, 6), "a Tensor"), ("photo.jpg", "a str"), (PHOTO.transpose(2, 0, 1), "shape"),
    ],
)  # fmt: skip
def test_photos_of_another_kind(photo: object, named: str) -> None:
    for model in (Detector(BACKBONE, BACKBONE, "a", [1]), Segmentor(BACKBONE, BACKBONE, "a", [[1, 2, 3]])):
        with pytest.raises(ValueError, match=f"the photo is .*{named}.*expected an array"):
            model.predict(photo)


def test_labels() -> None:
    segmentor = Segmentor(BACKBONE, BACKBONE, ["a"], np.array([[1, 2, 3]]), first_label=1).to("cpu")
    assert segmentor.predict(PHOTO).shape == (4, 6) and segmentor.device == torch.device("cpu")
    assert segmentor.palette == ((1, 2, 3),) and segmentor.first_label == 1
