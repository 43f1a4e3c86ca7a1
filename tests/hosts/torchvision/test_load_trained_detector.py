"""What the torchvision tool wrote, loaded again: the same detections, with masks or without, and nothing run."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from apt_dense.hosts.torchvision import build_detector as run_model
from apt_dense.hosts.torchvision.load_trained_detector import load_trained_detector, to_tensor
from apt_dense.hosts.torchvision.run_settings import Settings

from support.coco_folder import TINY_PRESET, one_thread  # noqa: F401 (an automatic fixture)
from support.references import randomise

SETTINGS = Settings(model="tiny", size=96, channels=8, box_features=16, proposals=20, thresholds=(5.5,))
PHOTO = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(run_model.PRESETS, "tiny", TINY_PRESET)


def write_run(path: Path, used: Settings = SETTINGS, **parts: object) -> torch.nn.Module:
    """Write a checkpoint of random weights, as a run does; return the model."""
    model = randomise(run_model.build_model(used, 3))
    content = {"model": model.state_dict(), "optimizer": {}, "scheduler": {}, "iteration": 1}
    content |= {"settings": asdict(used), "categories": [(3, "red"), (90, "green")], **parts}
    torch.save(content, path)
    return model.eval()


@pytest.mark.parametrize("task", ["masks", "boxes"])
def test_the_trained_detector_finds_what_the_model_found(task: str, tmp_path: Path) -> None:
    model = write_run(tmp_path / "last.pth", replace(SETTINGS, task=task))
    with torch.no_grad():
        (expected,) = model([to_tensor(PHOTO)])
    trained = load_trained_detector(tmp_path / "last.pth")
    assert trained.class_names == ("red", "green") and trained.category_ids == (3, 90)
    assert trained.backbone is trained.model.backbone.net and not trained.model.training
    found = trained.predict(PHOTO, score_threshold=0)
    assert len(found.boxes) == len(expected["boxes"]) > 0
    assert np.array_equal(found.boxes, expected["boxes"]) and np.array_equal(found.labels + 1, expected["labels"])
    if task == "boxes":
        assert found.masks is None
    else:
        assert found.masks.shape == (len(found.boxes), 60, 80) and found.masks.dtype == bool
        assert np.array_equal(found.masks, expected["masks"][:, 0] > 0.5)
    sure = trained.predict(PHOTO, score_threshold=float(found.scores[1]))
    assert len(sure.boxes) >= 2 and (sure.scores >= found.scores[1]).all() and (np.diff(sure.scores) <= 0).all()


@pytest.mark.parametrize("fixed", [None, (96, 64)])
def test_photos_are_seen_at_another_size(fixed: tuple[int, int] | None, tmp_path: Path) -> None:
    model = write_run(tmp_path / "last.pth")
    trained, seen = load_trained_detector(tmp_path / "last.pth"), []
    trained.model.transform.fixed_size = fixed
    trained = type(trained)(trained.model, trained.backbone, trained.class_names, trained.category_ids)
    trained.model.backbone.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape[-2:])))
    at_full_size = trained.predict(PHOTO, 0)
    trained.scale_photos(0.5)
    transform = model.transform
    transform.min_size, transform.max_size = (48,), 48
    transform.fixed_size = None if fixed is None else (48, 32)
    with torch.no_grad():
        (expected,) = model([to_tensor(PHOTO)])
    assert np.array_equal(trained.predict(PHOTO, 0).boxes, expected["boxes"])
    trained.scale_photos(1)
    assert np.array_equal(trained.predict(PHOTO, 0).boxes, at_full_size.boxes)
    assert seen[0] == seen[2] and max(seen[1]) < max(seen[0])


def test_runs_of_before_there_were_tasks_have_masks(tmp_path: Path) -> None:
    settings = asdict(SETTINGS)
    del settings["task"]
    write_run(tmp_path / "last.pth", settings=settings)
    assert load_trained_detector(tmp_path / "last.pth").predict(PHOTO, 0).masks is not None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"settings": {"colour": "red"}}, "settings that this version does not know"),
        ({"settings": {**asdict(SETTINGS), "task": "keypoints"}}, "keypoints"),
        ({"settings": {**asdict(SETTINGS), "model": "local-dir:/tmp"}}, "timm has no model"),
        ({"model": {}}, "does not fit the model"),
        ({"categories": [(3, "red")]}, "does not fit the model"),
    ],
)
def test_checkpoints_that_do_not_fit_themselves(parts: dict, message: str, tmp_path: Path) -> None:
    write_run(tmp_path / "last.pth", **parts)
    with pytest.raises(ValueError, match=message):
        load_trained_detector(tmp_path / "last.pth")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="not a checkpoint of this tool"):
        load_trained_detector(tmp_path / "vit.pth")
