"""Quickstart: stages that are kept and continued, tables that say what was measured. CI runs the whole with --short."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path

import pytest

for package in ("mmseg", "skimage", "pycocotools", "torchvision"):
    pytest.importorskip(package, reason="the quickstart needs it")

import quickstart
import torch

from apt_dense.hosts.torchvision.build_detector import build_model

from demo import build_and_run_segmentors, detection, segmentation
from demo.resumable_stages import LOG, RECORD, Stage, run_stage
from demo.training_bar import TrainingBar


def counting(calls: list[Path], files: tuple[str, ...] = (), **settings: object) -> Stage:
    def run(folder: Path) -> dict:
        calls.append(folder)
        for name in files:
            (folder / name).write_text("x")
        return {"calls": len(calls)}

    return Stage("step", settings, run, files)


def test_a_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    calls: list[Path] = []
    first = run_stage(counting(calls, ("out.txt",), amount=3), tmp_path)
    again = run_stage(counting(calls, ("out.txt",), amount=3), tmp_path)
    assert len(calls) == 1 and again == first and first.results == {"calls": 1}


def test_other_settings_lost_files_damage_and_force_run_it_again(tmp_path: Path) -> None:
    calls: list[Path] = []
    run_stage(counting(calls, ("out.txt",), amount=3), tmp_path)
    run_stage(counting(calls, ("out.txt",), amount=4), tmp_path)
    (tmp_path / "step" / "out.txt").unlink()
    run_stage(counting(calls, ("out.txt",), amount=4), tmp_path)
    (tmp_path / "step" / RECORD).write_text('{"settings": ')
    run_stage(counting(calls, ("out.txt",), amount=4), tmp_path)
    run_stage(counting(calls, ("out.txt",), amount=4), tmp_path, force=True)
    assert len(calls) == 5


def test_a_stage_that_fails_leaves_no_record(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict:
        (folder / "half.txt").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_stage(Stage("step", {}, fail), tmp_path)
    assert not (tmp_path / "step" / RECORD).exists()
    with pytest.raises(RuntimeError, match="without writing model.pth"):
        run_stage(Stage("step", {}, lambda folder: {}, ["model.pth"]), tmp_path)


def test_a_stage_takes_a_line_and_the_rest_goes_to_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """Also where a host goes on writing to the stream that it found in an earlier stage."""
    kept = []

    def run(folder: Path) -> dict:
        if not kept:
            kept.append(logging.StreamHandler(sys.stdout))  # as MMEngine does
        logging.getLogger("host").addHandler(kept[0])
        print("printed by", folder.name)
        logging.getLogger("host").info("logged by %s", folder.name)
        warnings.warn(f"warned by {folder.name}", stacklevel=1)
        return {"mIoU": 47.04}

    handlers = logging.getLogger().handlers
    for name in ("first", "second"):
        run_stage(Stage(name, {}, run, tell=lambda results: f"mIoU {results['mIoU']:.1f}"), tmp_path)
        text = (tmp_path / name / LOG).read_text()
        assert all(f"{kind} by {name}" in text for kind in ("printed", "logged", "warned"))
    run_stage(Stage("first", {}, run, tell=lambda results: f"mIoU {results['mIoU']:.1f}"), tmp_path)
    logging.getLogger("host").removeHandler(kept[0])
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "first: mIoU 47.0 (0 s)", "second: mIoU 47.0 (0 s)", "first: mIoU 47.0 (finished before)"
    ]  # fmt: skip
    assert shown.err == "" and not recwarn.list and logging.getLogger().handlers == handlers


def test_a_stage_that_is_made_again_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_stage(counting([], amount=3), tmp_path)
    run_stage(counting([], amount=4), tmp_path)
    run_stage(counting([], amount=4), tmp_path, force=True)
    lines = capsys.readouterr().out.splitlines()
    assert "made with other settings" in lines[1] and lines[2] == "step: done (0 s; again, --force)"


def test_mmengine_training_has_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    class Runner:
        max_iters = 3
        val_dataloader = (1, 2)

    bar = TrainingBar("uniform")
    bar.before_train(Runner)
    for _ in range(3):
        bar.after_train_iter(Runner, 0, outputs={"loss": 2.5})
    bar.bar.refresh()
    shown = capsys.readouterr().err
    assert "uniform: training: 100%" in shown and "3/3" in shown and "loss=2.500" in shown
    bar.before_val(Runner)
    bar.after_val_iter(Runner, 0)
    bar.after_run(Runner)
    assert "uniform: evaluating" in capsys.readouterr().err and bar.bar is None


def test_detectors_start_from_the_segmentors(tmp_path: Path) -> None:
    """The backbones fit; nothing of them is left at its random start."""
    config = segmentation.demo_config("adaptive", tmp_path, 10)
    segmentor = build_and_run_segmentors.build(config)
    with torch.no_grad():
        for parameter in segmentor.parameters():
            parameter.fill_(0.125)
    build_and_run_segmentors.save_weights(segmentor, tmp_path / "model.pth")
    settings = detection.settings_of("adaptive", detection.SHORT, tmp_path / "model.pth")
    net = build_model(settings, num_classes=3).backbone.net
    held = {name for name, value in net.named_parameters() if bool(((value - 0.125).abs() < 1e-5).all())}
    assert {name for name, _ in net.named_parameters()} - held == {
        f"blocks.{block}.attn.rel_pos_{side}" for block in range(4) for side in "hw"
    }


def test_tables_show_figures_and_ratios() -> None:
    text = quickstart.as_markdown(
        "Task", [("mIoU", [50.0, 40.0]), ("tokens kept, test", [1.0, 0.25]), ("AP", [0.0, 0.5])]
    )
    assert "| mIoU | 50.0 | 40.0 | 0.80 |" in text
    assert "| tokens kept, test | 100% | 25% | 0.25 |" in text
    assert "| AP | 0.000 | 0.500 | - |" in text
    assert quickstart.as_csv({"Task": [("mIoU", [50.0, 40.0])]}).splitlines()[1] == "Task,mIoU,50.0,40.0"


def test_the_record_is_plain_json(tmp_path: Path) -> None:
    record = run_stage(counting([], (), size=(1, 2)), tmp_path)
    content = json.loads((record.folder / RECORD).read_text())
    assert content["settings"] == {"size": [1, 2]} and content["results"] == {"calls": 1}
