"""A share of tokens that training is expected to keep, and a warning where it does not: the part that hosts share."""

from __future__ import annotations

from collections import deque

from apt_dense.option_checks import number

WINDOW = 50  # forward passes that are averaged
TOLERANCE = 0.1  # of the expected share


class TokenDrift:
    """Compares the share of tokens of the last ``WINDOW`` forward passes with the calibrated one.

    Args:
        expected: share of tokens, in (0, 1], such as tools/calibrate.py found for the thresholds.

    Raises:
        ValueError, TypeError: for another value.
    """

    def __init__(self, expected: float) -> None:
        if number(above=0)("expected", expected) > 1:
            raise ValueError(f"expected={expected} must be a share of the tokens, above 0 and at most 1")
        self.expected, self.said = float(expected), False
        self._shares: deque[float] = deque(maxlen=WINDOW)

    def add(self, share: float) -> str | None:
        """Take note of the share of a forward pass. Returns a warning the first time that the mean is more than
        ``TOLERANCE`` of the expected share away from it."""
        self._shares.append(share)
        mean = sum(self._shares) / len(self._shares)
        if self.said or len(self._shares) < WINDOW or abs(mean - self.expected) <= TOLERANCE * self.expected:
            return None
        self.said = True
        return (
            f"training keeps {mean:.1%} of the tokens (mean of {WINDOW} forward passes), {self.expected:.1%} were "
            f"expected: its images are not as those that thresholds were calibrated on. Crops, resizing, noise and "
            f"padding change the share"
        )
