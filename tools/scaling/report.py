"""Rows of the simulation as a Markdown table, a CSV file and a plot."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from apt_dense.weights.files import write_whole

from scaling.step_times import StepTimes


class Row(NamedTuple):
    """One number of processes: steps in random order, balanced, and with a budget, and the images of a step."""

    ranks: int
    images: int
    random: StepTimes
    balanced: StepTimes
    budget: StepTimes

    @property
    def waiting_removed(self) -> float | None:
        """The share of the waiting in random order that balance removes; None where nobody waits."""
        waited = self.random.seconds * self.random.waste
        return 1 - self.balanced.seconds * self.balanced.waste / waited if waited else None


VARIANTS = "random", "balanced", "budget"
_HEAD = ("processes", "random: s per step", "waiting", "balanced: s per step", "waiting", "waiting removed",
         "budget: s per step", "images/s: random", "balanced", "budget")  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Format rows in Markdown."""
    lines = [_HEAD, ["---:"] * len(_HEAD), *(_cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row) -> list[str]:
    removed = row.waiting_removed
    rates = [f"{row.images / getattr(row, name).seconds:.4g}" for name in VARIANTS]
    return [
        str(row.ranks), f"{row.random.seconds:.4g}", f"{row.random.waste:.1%}", f"{row.balanced.seconds:.4g}",
        f"{row.balanced.waste:.1%}", "" if removed is None else f"{removed:.1%}", f"{row.budget.seconds:.4g}", *rates,
    ]  # fmt: skip


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write rows, a column per number, whole or not at all. Raises OSError."""
    columns = [f"{variant}_{name}" for variant in VARIANTS for name in StepTimes._fields]
    with write_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ranks", "images", *columns])
        for row in rows:
            writer.writerow([row.ranks, row.images, *(value for name in VARIANTS for value in getattr(row, name))])


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw seconds per step and the share of waiting against the number of processes to a PNG. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, (measure, label) in zip(
        axes, (("seconds", "seconds per step"), ("waste", "share of time waiting")), strict=True
    ):
        for variant in VARIANTS:
            axis.plot([row.ranks for row in rows], [getattr(getattr(row, variant), measure) for row in rows],
                      marker="o", label=variant)  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set(xlabel="processes", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title, fontsize=9)
    with write_whole(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
