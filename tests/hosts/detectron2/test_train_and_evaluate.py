"""Runs of lazy configs in parts: seeds, writers, evaluation; tests/tools/test_train_det.py has whole runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from detectron2.config import instantiate

from apt_dense.hosts.detectron2 import train_and_evaluate as run
from apt_dense.hosts.detectron2.safe_checkpoints import APTCheckpointer

from support.references import randomise
from support.tiny_coco import ADAPTIVE, UNIFORM, one_thread, tiny_config, tiny_model  # noqa: F401 (a fixture)


def drawn(seed: int, iteration: int) -> float:
    hook = run.SeedIterations(seed)
    hook.trainer = SimpleNamespace(iter=iteration)
    hook.before_step()
    return torch.rand(()).item()


def test_random_numbers_follow_from_seed_and_iteration() -> None:
    first = drawn(1, 5)
    assert drawn(2, 5) != first != drawn(1, 6)
    assert drawn(1, 5) == first


@pytest.mark.parametrize("tensorboard", [True, False])
def test_tensorboard_is_written_if_it_is_installed(
    tensorboard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if tensorboard else None)
    monkeypatch.setattr(run, "TensorboardXWriter", lambda *_, **__: "tensorboard")
    printer, json, *others = run.writers(str(tmp_path), max_iter=10, period=2)
    assert (type(printer).__name__, type(json).__name__) == ("CommonMetricPrinter", "JSONWriter")
    assert others == (["tensorboard"] if tensorboard else [])


def test_checkpoints_of_the_run_before_count_among_those_to_keep(tmp_path: Path) -> None:
    for name in ("model_0000003", "model_0000007", "model_0000011", "model_0000015", "model_final", "model_x"):
        (tmp_path / f"{name}.pth").touch()
    assert len(run._kept_checkpoints(str(tmp_path), 11, None)) == 3
    assert len(run._kept_checkpoints(str(tmp_path), 11, 3)) == 3
    kept = run._kept_checkpoints(str(tmp_path), 11, 1)
    assert kept == [str(tmp_path / "model_0000011.pth")]
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {"model_0000011", "model_0000015", "model_final", "model_x"}


def test_configs_without_an_evaluator_are_not_evaluated() -> None:
    cfg = tiny_config(UNIFORM)
    cfg.dataloader.pop("evaluator")
    assert run.evaluate(cfg, torch.nn.Identity()) is None


def test_evaluation_needs_a_whole_model(tmp_path: Path) -> None:
    cfg = tiny_config(UNIFORM, "train.device=cpu")
    with pytest.raises(run.CheckpointError, match="nothing to evaluate: set train.init_checkpoint=FILE"):
        run.evaluate_checkpoint(cfg)
    state = randomise(tiny_model(UNIFORM)).state_dict()
    state.pop("roi_heads.box_predictor.cls_score.bias")
    torch.save({"model": state}, tmp_path / "x.pth")
    cfg.train.init_checkpoint = str(tmp_path / "x.pth")
    with pytest.raises(run.CheckpointError, match=r"1 are missing \(roi_heads.box_predictor.cls_score.bias\)"):
        run.evaluate_checkpoint(cfg)


def test_evaluation_runs_with_the_checkpoint_s_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, evaluated = randomise(tiny_model(UNIFORM)), []
    APTCheckpointer(source, str(tmp_path)).save("model")
    monkeypatch.setattr(run, "evaluate", lambda cfg, model: evaluated.append(model.state_dict()) or {"bbox": {}})
    cfg = tiny_config(UNIFORM, "train.device=cpu", f"train.init_checkpoint={tmp_path / 'model.pth'}")
    assert run.evaluate_checkpoint(cfg) == {"bbox": {}}
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in evaluated[0].items())


@pytest.mark.parametrize(
    ("override", "split", "named"),
    [
        ("model.backbone.net.pixel_mean=[127.5,127.5,127.5]", "train", "undoes pixel_mean=(127.5, 127.5, 127.5)"),
        ("model.backbone.net.channel_order=BGR", "train", "undoes pixel_mean=(123.675, 116.28, 103.53)"),
        ("dataloader.train.mapper.image_format=BGR", "train", "channels in the order BGR"),
        ("dataloader.test.mapper.image_format=BGR", "test", "channels in the order BGR"),
    ],
)
def test_backbones_expect_the_images_that_they_get(
    override: str, split: str, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    def check(config: Path, *overrides: str, split: str = split, is_new: bool = True) -> None:
        cfg = tiny_config(config, *overrides)
        run.check_pixels(cfg, instantiate(cfg.model), split, is_new)

    check(ADAPTIVE)
    check(UNIFORM, override)  # scores nothing
    with pytest.raises(run.PatchOptionError, match=re.escape(named)):
        check(ADAPTIVE, override)
    assert not caplog.messages
    check(ADAPTIVE, override, is_new=False)
    assert named in caplog.messages[0]
    if override.startswith("dataloader.test"):  # of which a training says nothing
        check(ADAPTIVE, override, split="train")


def test_a_training_checks_its_images_and_goes_on_with_a_warning(tmp_path: Path) -> None:
    wrong = "model.backbone.net.pixel_mean=[127.5,127.5,127.5]", "train.device=cpu", f"train.output_dir={tmp_path}"
    with pytest.raises(run.PatchOptionError, match="pixel_mean"):
        run.train(tiny_config(ADAPTIVE, *wrong))
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    with pytest.raises(run.CheckpointError):  # which is not there; the images are not what stops it
        run.train(tiny_config(ADAPTIVE, *wrong), resume=True)
