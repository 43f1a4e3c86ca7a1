"""The cost of a step of one process as a function of the tokens in its batch, from measured points."""

import csv
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apt_dense.weights.files import write_whole

COLUMNS = "tokens", "seconds"


class CostCurve(NamedTuple):
    """Seconds of a step: constant + linear * tokens + square * tokens**2, none of them negative.

    The constant is what does not depend on tokens (heads, the optimizer), the linear part the layers, the square
    attention over the image.

    Args:
        error: the largest distance of a measured point from the curve, as a share of it.
    """

    constant: float
    linear: float
    square: float
    error: float = 0.0

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Seconds for numbers of tokens, of any shape."""
        tokens = np.asarray(tokens, dtype=np.float64)
        return self.constant + self.linear * tokens + self.square * tokens**2


def fit_curve(tokens: Sequence[float], seconds: Sequence[float]) -> CostCurve:
    """Fit a curve to measured points, with the least squares of relative errors.

    Raises:
        ValueError: for fewer than two different numbers of tokens, negative ones, and times that are not above 0.
    """
    tokens, seconds = np.asarray(tokens, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if len(np.unique(tokens)) < 2 or not np.isfinite(tokens).all() or (tokens < 0).any():
        raise ValueError(f"cost curve: expected two or more different numbers of tokens, got {tokens.tolist()}")
    if not np.isfinite(seconds).all() or (seconds <= 0).any():
        raise ValueError(f"cost curve: expected seconds above 0, got {seconds.tolist()}")
    scale = tokens.max()
    powers = np.stack([np.ones_like(tokens), tokens / scale, (tokens / scale) ** 2], axis=1) / seconds[:, None]
    constant, linear, square = _least_squares_above_zero(powers)
    curve = CostCurve(constant, linear / scale, square / scale**2)
    return curve._replace(error=float(np.abs(curve(tokens) / seconds - 1).max()))


def _least_squares_above_zero(columns: np.ndarray) -> np.ndarray:
    """The factors of the columns, none negative, whose sum is nearest to 1 everywhere."""
    best, least = np.zeros(columns.shape[1]), np.inf
    for number in range(1, columns.shape[1] + 1):
        for chosen in map(list, combinations(range(columns.shape[1]), number)):
            found = np.linalg.lstsq(columns[:, chosen], np.ones(len(columns)), rcond=None)[0]
            error = ((columns[:, chosen] @ found - 1) ** 2).sum()
            if (found >= 0).all() and error < least - 1e-12:  # of equally good ones, the first and simplest
                best, least = np.zeros(columns.shape[1]), error
                best[chosen] = found
    return best


def read_points(path: Path) -> tuple[list[float], list[float]]:
    """Read tokens and seconds from a CSV file with those columns.

    Raises:
        ValueError: if it has other columns, or no numbers in them.
        OSError: if it cannot be read.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {*COLUMNS} <= {*(reader.fieldnames or ())}:
            raise ValueError(f"{path} has the columns {reader.fieldnames}; expected {', '.join(COLUMNS)}")
        try:
            points = [[float(line[name]) for name in COLUMNS] for line in reader]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds something other than numbers: {error}") from None
    return [tokens for tokens, _ in points], [seconds for _, seconds in points]


def write_points(path: Path, tokens: Sequence[float], seconds: Sequence[float]) -> None:
    """Write points as :func:`read_points` reads them, whole or not at all. Raises OSError."""
    with write_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(zip(tokens, seconds, strict=True))
