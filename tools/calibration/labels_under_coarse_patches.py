"""What coarse patches hide of labelled photos, against the tokens that are kept."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apt_dense.patches.calibration import FACTORS

from calibration.curve_record import HIDDEN, PhotoCurve


class HiddenLabels(NamedTuple):
    """Shares over all photos at each of ``FACTORS``.

    Args:
        tokens: mean share of tokens kept.
        mixed: of the coarse patches, those that hold more than one class; NaN where there are none.
        border: of the pixels on borders between classes, those under coarse patches.
        small: of the small objects, those mostly under coarse patches; NaN where there are none.
    """

    tokens: np.ndarray
    mixed: np.ndarray
    border: np.ndarray
    small: np.ndarray

    def at(self, factor: float) -> dict[str, float]:
        """Return the shares at a factor, interpolated."""
        place = np.log2(factor)
        return {name: float(np.interp(place, np.log2(FACTORS), values)) for name, values in self._asdict().items()}


def hidden_labels(curves: Iterable[PhotoCurve]) -> HiddenLabels:
    """Sum up the curves of labelled photos. Raises ValueError if no photo has a mask with a border."""
    tokens, images, totals = np.zeros(len(FACTORS)), 0, np.zeros((len(FACTORS), len(HIDDEN)))
    for curve in curves:
        if curve.patches is None or curve.hidden is None:
            continue
        tokens, images = tokens + curve.patches.sum(1) / curve.cells, images + 1
        totals += curve.hidden
    of = dict(zip(HIDDEN, totals.T, strict=True))
    if not images or not of["borders"][0]:
        raise ValueError("the labels hold no border between two classes, so that nothing can be said about them")
    with np.errstate(invalid="ignore"):
        small = of["hidden_objects"] / of["small_objects"]
        return HiddenLabels(tokens / images, of["mixed"] / of["coarse"], of["border"] / of["borders"], small)


def draw_hidden(path: Path, found: HiddenLabels, factor: float) -> None:
    """Draw the shares against the tokens kept, and where the chosen thresholds are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axes.plot(100 * found.tokens, 100 * found.mixed, color="#b03030", label="coarse patches with several classes")
    axes.plot(100 * found.tokens, 100 * found.border, color="#4878a8", label="class borders under coarse patches")
    if np.isfinite(found.small).any():
        axes.plot(100 * found.tokens, 100 * found.small, color="#3f8f4f", label="small objects under coarse patches")
    axes.axvline(100 * found.at(factor)["tokens"], color="grey", linestyle="--", label="chosen")
    axes.set(xlabel="tokens kept, %", ylabel="%", xlim=(0, 100), ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
