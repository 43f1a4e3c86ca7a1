"""What each transform of a training pipeline does to the tokens: a table and a plot."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apt_dense.weights.files import write_whole

from calibration.tokens_after_each_transform import Measured, Pipeline

_QUANTILES = (0.05, 0.5, 0.95)


class Row(NamedTuple):
    """What is left after a step, over all draws.

    Args:
        height, width, tokens: means.
        share: mean share of tokens kept.
        quantiles: 5, 50 and 95 % of the draws keep at most these shares.
    """

    name: str
    height: float
    width: float
    tokens: float
    share: float
    quantiles: tuple[float, ...]


def rows_of(names: Sequence[str], found: Measured) -> list[Row]:
    """Summarise the steps that changed an image in any draw."""
    tokens, cells, sizes, changed = (np.stack([getattr(draw, field) for draw in found.draws])
                                     for field in ("tokens", "cells", "sizes", "changed"))  # fmt: skip
    rows = []
    for step in changed.any(0).nonzero()[0]:
        shares = tokens[:, step] / cells[:, step]
        quantiles = tuple(map(float, np.quantile(shares, _QUANTILES, method="inverted_cdf")))
        height, width = map(float, sizes[:, step].mean(0))
        rows.append(Row(names[step], height, width, float(tokens[:, step].mean()), float(shares.mean()), quantiles))
    return rows


def describe_pipeline(pipeline: Pipeline, found: Measured, photos: int) -> str:
    """Describe the result in Markdown: a table, and what it leaves out."""
    rows = rows_of(pipeline.names, found)
    lines = ["| after | mean size | tokens | kept | change | 5 % | 50 % | 95 % |", "| --- |" + " --- |" * 7]
    for row, before in zip(rows, [None, *rows[:-1]], strict=True):
        change = "" if before is None else f"{100 * (row.share - before.share):+.1f}"
        cells = [row.name, f"{row.height:.0f} x {row.width:.0f}", f"{row.tokens:.0f}", f"{row.share:.1%}", change,
                 *(f"{share:.1%}" for share in row.quantiles)]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    selector = pipeline.selector
    scorer = selector.scorer if isinstance(selector.scorer, str) else "a function"
    lines += [
        "",
        f"{len(found.draws)} draws of {photos - len(found.left_out)} photos. Kept: the mean share of an image's "
        f"tokens, and the shares that 5, 50 and 95 % of the draws keep at most; change: of the mean, in points. "
        f"Patches of {selector.patch_size} pixels, thresholds {selector.thresholds}, {scorer}.",
    ]
    shown = {row.name for row in rows}
    idle = [name for name in pipeline.names if name not in shown]
    if idle:
        lines += ["", f"Changed no image: {', '.join(idle)}."]
    again = Counter(pipeline.names[step] for draw in found.draws for step in draw.none)
    lines += [f"\n{name} returned None {count} times; these draws were made again." for name, count in again.items()]
    return "\n".join(lines)


def draw_pipeline(path: Path, rows: Sequence[Row]) -> None:
    """Draw the share of tokens after each step: its mean, its median, and where 90 % of the draws lie."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.45 * len(rows)), layout="constrained")
    places = np.arange(len(rows))
    low, middle, high = 100 * np.array([row.quantiles for row in rows]).T
    means = [100 * row.share for row in rows]
    axes.hlines(places, low, high, color="#4878a8", linewidth=6, alpha=0.4, label="5 to 95 % of the draws")
    axes.plot(middle, places, "|", color="#203a58", markersize=12, markeredgewidth=2, label="median")
    axes.plot(means, places, "o-", color="#b03030", linewidth=1, label="mean")
    axes.set_yticks(places, [f"{row.name}\n{row.tokens:.0f} tokens" for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="tokens kept, % of those of a uniform ViT", xlim=(0, 102))
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    with write_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    pyplot.close(figure)
