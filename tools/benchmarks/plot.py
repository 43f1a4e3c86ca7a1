"""Plot the benchmark's rows: time and memory against image size."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from apt_dense.weights.files import write_whole

from benchmarks.table import Row

MEASURES = (("seconds", "median time, s"), ("memory_mib", "growth of peak memory, MiB"))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows that were measured to a PNG: two panels per comparison, a curve per variant.

    The shade spans the fastest and the slowest round. All axes are logarithmic.

    Raises:
        ValueError: if nothing was measured.
    """
    rows = sorted((row for row in rows if row.seconds is not None), key=lambda row: row.size)
    titles = dict.fromkeys(_title(row) for row in sorted(rows, key=lambda row: row.setting))
    groups = {title: [row for row in rows if _title(row) == title] for title in titles}
    if not groups:
        raise ValueError("nothing was measured, so there is nothing to plot; the table's notes say why")
    figure = Figure(figsize=(12, 4.6 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(groups), 2, squeeze=False)
    for pair, (title, group) in zip(axes, groups.items(), strict=True):
        for axis, (measure, label) in zip(pair, MEASURES, strict=True):
            _draw(axis, group, measure)
            axis.set_title(title, fontsize=9)
            axis.set_ylabel(label)
        pair[0].legend(fontsize=9)
    with write_whole(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _title(row: Row) -> str:
    return f"{row.scope}, {row.model}, {row.step}, batch {row.batch}, {row.dtype}\n{row.options}\n{row.environment}"


def _draw(axis: Axes, rows: Sequence[Row], measure: str) -> None:
    for number, variant in enumerate(dict.fromkeys(row.variant for row in rows)):
        line = [row for row in rows if row.variant == variant]
        sizes = [row.size for row in line]
        # Each line is thinner than the last, so that curves on top of each other all show.
        style = {"color": f"C{number}", "marker": "osD^vP"[number % 6], "linewidth": 4 - 0.6 * number}
        axis.plot(sizes, [getattr(row, measure) for row in line], label=variant, **style)
        if measure == "seconds":
            spread = [row.fastest for row in line], [row.slowest for row in line]
            axis.fill_between(sizes, *spread, color=style["color"], alpha=0.15, linewidth=0)
    axis.set(xscale="log", yscale="log", xlabel="image side, pixels")
    sizes = sorted({row.size for row in rows})
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)
