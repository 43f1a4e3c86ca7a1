"""Thresholds for a target: from the token curves of many images to the factor by which thresholds are scaled.

Curves come one image at a time and are kept in a histogram, so that memory does not grow with their number.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass

import numpy as np

from apt_dense import option_checks
from apt_dense.option_checks import Options, number, option, optional

#: Factors that curves are made for: from a quarter to four times, 1.1 % apart.
FACTORS = np.exp2(np.arange(-128, 129) / 64)
_BINS = 1000  # of the share of tokens, for quantiles
_SIGNIFICANT = 1.96  # standard errors of 95 %


def _above_0_to_1(name: str, value: object) -> float:
    if number(above=0)(name, value) > 1:
        raise ValueError(f"{name}={value} must be a share of all tokens, above 0 and at most 1")
    return float(value)


@dataclass(frozen=True)
class Target(Options):
    """A share of tokens to reach.

    Args:
        share: tokens kept, in (0, 1].
        quantile: of the images whose tokens are to be at most that share, such as 0.95; None for the mean over images.

    Raises:
        ValueError, TypeError: for values of another type or out of range.
    """

    share: float = option(MISSING, _above_0_to_1, label="target share")
    quantile: float | None = option(None, optional(number(above=0, below=1)), label="target quantile")


@dataclass(frozen=True)
class Calibration:
    """Thresholds, and the shares of tokens that they left on the images they were chosen by.

    Args:
        thresholds: one per coarse scale.
        factor: of the thresholds that were scaled.
        share: mean share of tokens.
        deviation: standard deviation over images.
        expected: interval (low, high) in which the mean of as many other images of the same kind lies in 95 of 100
            cases, if images are independent.
        quantiles: share of tokens at 5, 50 and 95 % of the images.
        cells: mean share of the image under patches of each scale.
        images: their number.
    """

    thresholds: tuple[float, ...]
    factor: float
    share: float
    deviation: float
    expected: tuple[float, float]
    quantiles: tuple[float, float, float]
    cells: tuple[float, ...]
    images: int


def scalable(thresholds: Sequence[float]) -> tuple[float, ...]:
    """Check thresholds that are to be scaled by a factor. Raises ValueError, TypeError."""
    checked = option_checks.thresholds("thresholds", thresholds)
    for each in checked:
        if not 0 <= each < np.inf:
            raise ValueError(f"thresholds={checked} cannot be scaled: {each:g} must be a finite number, 0 or more")
    return checked


class CurveStatistics:
    """Means, deviations and quantiles over images of their token curves.

    Args:
        num_scales: of the patches.
    """

    def __init__(self, num_scales: int) -> None:
        self.images = 0
        self._cells = np.zeros((len(FACTORS), num_scales))
        self._sum, self._squares = np.zeros(len(FACTORS)), np.zeros(len(FACTORS))
        self._histogram = np.zeros((len(FACTORS), _BINS + 1), np.int64)

    def add(self, patches: np.ndarray, total: int | None = None) -> None:
        """Add an image.

        Args:
            patches: (F, num_scales), at each of ``FACTORS`` (``patches_by_factor``).
            total: cells that they are shares of; None for those that have a token.
        """
        cells = patches * 4.0 ** np.arange(patches.shape[1])
        total = cells[0].sum() if total is None else total
        shares = patches.sum(1) / total
        self.images += 1
        self._cells += cells / total
        self._sum += shares
        self._squares += shares**2
        bins = np.ceil(shares * _BINS - 1e-9).astype(int)
        self._histogram[np.arange(len(FACTORS)), bins] += 1

    def mean(self) -> np.ndarray:
        """Mean share of tokens (F,) at each factor. It falls from factor to factor."""
        return self._sum / max(self.images, 1)

    def mean_square(self) -> np.ndarray:
        """Mean of the squared share of tokens (F,) at each factor, which what grows with its square depends on."""
        return self._squares / max(self.images, 1)

    def quantile(self, share_of_images: float) -> np.ndarray:
        """Share of tokens (F,) that so many images do not exceed, rounded up to a thousandth."""
        below = self._histogram.cumsum(1) >= share_of_images * self.images
        return below.argmax(1) / _BINS

    def calibrate(self, thresholds: Sequence[float], target: Target) -> Calibration:
        """Choose the factor with which the images keep the target's share of tokens.

        Raises:
            ValueError, TypeError: without images, for thresholds that cannot be scaled, and for a share that no factor
                reaches, naming those that are.
        """
        thresholds = scalable(thresholds)
        self._check_images()
        curve = self.mean() if target.quantile is None else self.quantile(target.quantile)
        _check_reached(curve, target.share)
        return self._at(_place_of(curve, target.share), thresholds)

    def calibrate_by(self, thresholds: Sequence[float], falling: np.ndarray, wanted: float) -> Calibration:
        """Choose the factor at which something (F,) that falls from factor to factor is as wanted, or the nearest.

        Raises:
            ValueError, TypeError: without images, and for thresholds that cannot be scaled.
        """
        thresholds = scalable(thresholds)
        self._check_images()
        return self._at(_place_of(falling, float(np.clip(wanted, falling[-1], falling[0]))), thresholds)

    def _check_images(self) -> None:
        if not self.images:
            raise ValueError("no images to calibrate on: none could be read")

    def _at(self, place: float, thresholds: tuple[float, ...]) -> Calibration:
        """Describe a place between two factors."""
        at = _Interpolation(place)
        factor, share = float(np.exp2(at(np.log2(FACTORS)))), float(at(self.mean()))
        variance = max(float(at(self.mean_square())) - share**2, 0.0)
        deviation = (variance * self.images / max(self.images - 1, 1)) ** 0.5
        # The means of two sets of n images differ by this standard error.
        margin = _SIGNIFICANT * deviation * (2 / self.images) ** 0.5
        return Calibration(
            thresholds=tuple(factor * threshold for threshold in thresholds),
            factor=factor,
            share=share,
            deviation=deviation,
            expected=(max(share - margin, 0.0), min(share + margin, 1.0)),
            quantiles=tuple(float(at(self.quantile(q))) for q in (0.05, 0.5, 0.95)),
            cells=tuple(at(self._cells / self.images).tolist()),
            images=self.images,
        )


class _Interpolation:
    """Values at a place between two entries of an array."""

    def __init__(self, place: float) -> None:
        self.low = min(int(place), len(FACTORS) - 2)
        self.weight = place - self.low

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return values[self.low] * (1 - self.weight) + values[self.low + 1] * self.weight


def _check_reached(curve: np.ndarray, share: float) -> None:
    """Raise ValueError unless the curve (F,) passes the share."""
    if not curve[-1] <= share <= curve[0]:
        raise ValueError(
            f"a share of {share:.1%} of the tokens is not reached: thresholds scaled by {FACTORS[0]:g} to "
            f"{FACTORS[-1]:g} leave {curve[0]:.1%} to {curve[-1]:.1%}. Start from lower or higher thresholds, or "
            f"from more of them (larger patches)"
        )


def _place_of(curve: np.ndarray, value: float) -> float:
    """Where a falling curve (F,) passes a value between its ends, in entries."""
    low = int((curve > value).sum()) - 1
    if low < 0:
        return 0.0
    return low + float((curve[low] - value) / (curve[low] - curve[low + 1]))
