"""Curves of accuracy against tokens, and against time: a panel for each image size."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from apt_dense.weights.files import write_whole

from evidence.equal_token_rows import SMALLER, UNIFORM


def plot(rows: Sequence[Mapping[str, Any]], measure: str, path: Path, against_time: bool = False) -> None:
    """Draw the rows to a PNG, against the share of tokens and, if wanted, also against milliseconds.

    Args:
        measure: the key of what is drawn upwards.
    """
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    axes_of = ("tokens", "ms") if against_time else ("tokens",)
    shape = (len(axes_of), len(sizes)) if len(sizes) > 1 else (1, len(axes_of))
    figure = Figure(figsize=(5.2 * shape[1], 4.2 * shape[0]), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(*shape, squeeze=False).reshape(len(axes_of), len(sizes))
    for line, along in zip(panels, axes_of, strict=True):
        for panel, size in zip(line, sizes, strict=True):
            _draw(panel, [row for row in rows if row["size"] == size], along, measure)
            panel.set_title(f"{size} pixels" if size[0].isdigit() else size)
    panels[0, 0].legend()
    with write_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def plot_trained(
    lines: Sequence[Mapping[str, Any]], size: str, measure: str, path: Path, against_time: bool = False
) -> None:
    """Draw means over seeds of ``compare_by_training`` to a PNG.

    Rows whose names differ in a share ("N %") are one curve; it begins at the row "uniform".

    Args:
        size: of the images.
        against_time: also against milliseconds ("ms").
    """
    points = [
        {
            "size": size,
            "variant": re.sub(r"\s*\b[\d.]+ ?%", "", line["row"]) or line["row"],
            "share": line["share"],
            "tokens": line["share"],
            "ms": line.get("ms"),
            measure: line[measure],
        }
        for line in lines
    ]
    plot(points, measure, path, against_time)


def _draw(panel: Axes, rows: Sequence[Mapping[str, Any]], along: str, measure: str) -> None:
    """One line a variant with several points; all of them begin at the uniform model, which is marked."""
    uniform = [row for row in rows if row["variant"] == UNIFORM]
    names = dict.fromkeys(row["variant"] for row in rows if row["variant"] != UNIFORM)
    smaller = next((name for name in names if name.startswith(SMALLER)), None)
    colours = {name: f"C{place}" for place, name in enumerate(name for name in names if name != smaller)}
    for name in names:
        own = sorted((row for row in rows if row["variant"] == name), key=lambda row: row["share"])
        own = [*own, *uniform] if len(own) > 1 else own
        style = {"color": colours[name]} if name in colours else {"color": "black", "linestyle": "--"}
        panel.plot([row[along] for row in own], [row[measure] for row in own], label=name, marker=".", **style)
    panel.plot([row[along] for row in uniform], [row[measure] for row in uniform], "k*", label=UNIFORM, markersize=11)
    panel.set(xlabel="share of the tokens" if along == "tokens" else "milliseconds of a forward pass", ylabel=measure)
    panel.grid(alpha=0.3)
