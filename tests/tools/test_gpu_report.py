"""The run on a GPU: its parts can be asked for, time that runs out is said, and a fault costs its own part only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

for package in ("skimage", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason="the benchmark needs it")

import gpu_report
from gpu_report import Work, benchmark_work, everything, kernel_table, run, run_tests

from benchmarks.table import read_csv

TINY = "--model vit-test --sizes 64 --batches 1 --budget 0.6"


def test_parts_write_one_file_and_one_page(tmp_path: Path) -> None:
    out = tmp_path / "found"
    work = [
        *benchmark_work(TINY, "cpu"),
        Work("kernels", lambda: kernel_table("--rows 20 --dim 16 --heads 2 --rounds 1", "cpu")),
        Work("a fault", lambda: 1 / 0),
    ]
    run(work, out, 1e9, "this machine")
    page = out.with_suffix(".md").read_text()
    assert {row.variant for row in read_csv(out.with_suffix(".csv"))} >= {"apt_dense, budget 0.6"}
    assert page.startswith("# this machine") and "ours, sdpa" in page and "failed: ZeroDivisionError" in page
    assert "No time was left" not in page and sorted(p.name for p in tmp_path.iterdir()) == ["found.csv", "found.md"]


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    run(everything("cpu"), tmp_path / "found", 0, "this machine")
    page = (tmp_path / "found.md").read_text()
    assert page.count("\n- ") == len(everything("cpu")) > 20 and "- vit-l backbone, training, 8 x 1024" in page


def test_a_machine_without_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds no GPU"):
        gpu_report.main(["--out", str(tmp_path / "found")])
    assert not list(tmp_path.iterdir())


def test_failed_tests_show_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode, stdout, stderr = 1, "\n".join(f"line {i}" for i in range(60)), ""

    monkeypatch.setattr(gpu_report.subprocess, "run", lambda *_, **__: Done)
    assert "line 20\n" in run_tests() and "line 19\n" not in run_tests()
    Done.returncode = 0
    assert run_tests() == "```\nline 59\n```"
