"""Rows of the benchmark: ratios between variants, a Markdown table, a CSV file."""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure_in_turns import Result
from shared import tables


class Setting(NamedTuple):
    """Everything that the variants of one comparison share."""

    scope: str
    model: str
    step: str
    size: int
    batch: int
    dtype: str
    options: str  # thresholds and what else was asked for
    environment: str


class Row(NamedTuple):
    """One variant at one setting; None where nothing was measured or does not apply."""

    variant: str
    scope: str
    model: str
    step: str
    size: int
    batch: int
    dtype: str
    tokens: float | None = None  # share of all tokens
    seconds: float | None = None  # median of the rounds
    fastest: float | None = None
    slowest: float | None = None
    of_timm: float | None = None  # the baseline's median time / this one's
    of_detectron2: float | None = None
    of_mmseg: float | None = None
    of_twin: float | None = None  # the uniform twin's median time / this one's
    gflops: float | None = None
    efficiency: float | None = None  # of_twin / (the twin's FLOPs / this one's)
    memory_mib: float | None = None  # growth of the peak
    memory_of_twin: float | None = None  # this one's / the uniform twin's
    outside_blocks: float | None = None  # share of the time
    thresholds: str = ""  # bits, after scaling to the share that was asked for
    note: str = ""
    options: str = ""
    environment: str = ""

    @property
    def setting(self) -> Setting:
        return Setting(*(getattr(self, name) for name in Setting._fields))


BASELINES = {"timm": "of_timm", "detectron2": "of_detectron2", "mmseg": "of_mmseg"}  # role -> column
TEXT = {"variant", "scope", "model", "step", "dtype", "thresholds", "note", "options", "environment"}
WHOLE = {"size", "batch"}


def rows_of(setting: Setting, results: Sequence[Result], thresholds: Sequence[float]) -> list[Row]:
    """Compare the results of one setting, whose adaptive variants had these thresholds, with each other."""
    medians = {r.role: statistics.median(r.seconds) for r in results if r.seconds and r.role != "ours"}
    twin = next((r for r in results if r.role == "twin"), None)
    rows = [_row(setting, result, medians, twin) for result in results]
    text = " ".join(f"{threshold:g}" for threshold in thresholds)
    used = [text if result.role == "ours" else "" for result in results]
    return [row._replace(thresholds=thresholds) for row, thresholds in zip(rows, used, strict=True)]


def _row(setting: Setting, result: Result, medians: dict[str, float], twin: Result | None) -> Row:
    row = Row(variant=result.name, **setting._asdict())
    if result.failure or not result.seconds:
        return row._replace(note=result.failure)
    seconds = statistics.median(result.seconds)
    twin_ratio = _ratio(medians.get("twin"), seconds)
    flops_of_twin = _ratio(twin and twin.gflops, result.gflops)
    baselines = {column: _ratio(medians.get(role), seconds) for role, column in BASELINES.items()}
    return row._replace(
        tokens=result.tokens, seconds=seconds, fastest=min(result.seconds), slowest=max(result.seconds),
        **baselines, of_twin=twin_ratio, gflops=result.gflops, efficiency=_ratio(twin_ratio, flops_of_twin),
        memory_mib=result.memory_mib, memory_of_twin=_ratio(result.memory_mib, twin and twin.memory_mib),
        outside_blocks=result.outside_blocks,
    )  # fmt: skip


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


# ---- Markdown --------------------------------------------------------------------------------------------------------

COLUMNS = {
    "variant": ("variant", "{}"), "scope": ("scope", "{}"), "model": ("model", "{}"), "step": ("step", "{}"),
    "size": ("size", "{}"), "batch": ("batch", "{}"), "dtype": ("type", "{}"), "tokens": ("tokens", "{:.0%}"),
    "seconds": ("median s (spread)", "{}"),
    "of_timm": ("x timm", "{:.2f}"), "of_detectron2": ("x Detectron2", "{:.2f}"), "of_mmseg": ("x MMSeg", "{:.2f}"),
    "of_twin": ("x twin", "{:.2f}"), "gflops": ("GFLOP", "{:.4g}"), "efficiency": ("efficiency", "{:.2f}"),
    "memory_mib": ("memory MiB", "{:.4g}"), "memory_of_twin": ("memory/twin", "{:.2f}"),
    "outside_blocks": ("outside blocks %", "{:.1%}"),
    "thresholds": ("thresholds", "{}"), "note": ("note", "{}"), "options": ("options", "{}"),
    "environment": ("environment", "{}"),
}  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Format the rows in Markdown, without the columns that no row has."""
    lines = [{heading: _value(row, name) for name, (heading, _) in COLUMNS.items()} for row in rows]
    return tables.markdown(lines, dict(COLUMNS.values()))


def _value(row: Row, name: str) -> object:
    value = getattr(row, name)
    if name == "seconds" and value is not None:
        return f"{value:.3g} ({row.fastest:.3g}-{row.slowest:.3g})"
    return None if value == "" else value


# ---- CSV -------------------------------------------------------------------------------------------------------------


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the rows, whole or not at all."""
    tables.write_csv([row._asdict() for row in rows], path)


def read_csv(path: Path) -> list[Row]:
    """Read what ``write_csv`` wrote.

    Raises:
        ValueError: if the columns are not this version's, or a number is not one.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != Row._fields:
            raise ValueError(f"{path} has the columns {reader.fieldnames}; expected {list(Row._fields)}. Move it away")
        return [Row(**{name: _parse(name, text) for name, text in line.items()}) for line in reader]


def _parse(name: str, text: str) -> str | int | float | None:
    if name in TEXT:
        return text
    if name in WHOLE:
        return int(text)
    return float(text) if text else None
