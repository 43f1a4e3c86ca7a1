"""Options of all commands are checked where they are read: by type, and by range."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.option_types import PIXELS, device, number, share_or_count, whole

BAD: list[tuple[Any, str, str]] = [
    (whole(1), "0", "0 must be 1 or more"),
    (whole(0), "-1", "-1 must be 0 or more"),
    (whole(1, PIXELS), "65536", "65536 must be 65535 or less"),
    (whole(1), "1.5", "invalid whole number value: '1.5'"),
    (whole(1), "many", "invalid whole number value: 'many'"),
    (number(above=0), "0", "0.0 must be a finite number, above 0"),
    (number(), "nan", "nan must be a finite number"),
    (number(), "inf", "inf must be a finite number"),
    (number(least=1), "x", "invalid number value: 'x'"),
    (share_or_count, "1.5", "1.5 must be a fraction in (0, 1] or at least 1 token"),
    (share_or_count, "0", "0 must be a fraction in (0, 1] or at least 1 token"),
    (share_or_count, "half", "invalid share or number value: 'half'"),
    (device, "foo", "torch cannot use 'foo' here"),
    (device, "meta", "torch cannot use 'meta' here"),
    (device, "cuda:99", "torch cannot use 'cuda:99' here"),
]


@pytest.mark.parametrize(("kind", "value", "message"), BAD, ids=lambda value: str(value)[:20])
def test_bad_values_are_named(kind: Any, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--amount", type=kind)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([f"--amount={value}"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and "error: argument --amount: " in last and message in last


@given(st.integers(1, PIXELS))
def test_good_values_pass(value: int) -> None:
    assert whole(1, PIXELS)(str(value)) == value and number(above=0)(str(value)) == value
    assert device("cpu") == "cpu" and share_or_count(str(value)) == value and share_or_count("0.5") == 0.5


COMMANDS: list[tuple[str, list[str], str]] = [
    ("benchmark", ["--thresholds", "nan"], "--thresholds"),
    ("benchmark", ["--device", "foo"], "--device"),
    ("benchmark_kernels", ["--heads", "0"], "--heads"),
    ("benchmark_kernels", ["--dim", "0"], "--dim"),
    ("benchmark_kernels", ["--rows", "-3"], "--rows"),
    ("benchmark_partition", ["--size", "7"], "--size"),
    ("benchmark_partition", ["--rounds", "0"], "--rounds"),
    ("calibrate", ["a", "--out", "b", "--tokens", "0.5", "--patch-size", "0"], "--patch-size"),
    ("calibrate", ["a", "--out", "b", "--tokens", "0.5", "--size", "99999999999"], "--size"),
    ("calibrate", ["a", "--out", "b", "--tokens", "0.5", "--workers", "-1"], "--workers"),
    ("predict", ["a", "b", "--out", "c", "--device", "foo"], "--device"),
    ("report", ["a", "--out", "b", "--budget", "0"], "--budget"),
    ("report", ["a", "--out", "b", "--square", "0"], "--square"),
    ("predict", ["a", "b", "--out", "c", "--score-threshold", "nan"], "--score-threshold"),
    ("train_det_torchvision", ["a", "--out", "b", "--device", "foo"], "--device"),
    ("train_over_seeds", ["a", "--out", "b", "--data-root", "c", "--setting", "d", "--seeds", "-1"], "--seeds"),
    ("visualize", ["a", "--out", "b", "--patch-size", "999999999"], "--patch-size"),
    ("visualize", ["a", "--out", "b", "--size", "99999999999"], "--size"),
    ("gpu_report", ["--minutes", "nan"], "--minutes"),
]


@pytest.mark.parametrize(("tool", "argv", "named"), COMMANDS, ids=str)
def test_commands_refuse_bad_values_first(
    tool: str, argv: list[str], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    try:
        main = importlib.import_module(tool).main
    except SystemExit as lacking:
        pytest.skip(str(lacking))
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]
