"""Quickstart: stages that are kept and continued, tables that say what was measured. CI runs the whole with --short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for package in ("mmseg", "skimage", "pycocotools", "torchvision"):
    pytest.importorskip(package, reason="the quickstart needs it")

import quickstart

from demo.resumable_stages import RECORD, Stage, run_stage


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
