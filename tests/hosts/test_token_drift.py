"""Training that keeps another share of tokens than was calibrated: one warning."""

from __future__ import annotations

import math

import pytest

from apt_dense.hosts.token_drift import WINDOW, TokenDrift


@pytest.mark.parametrize(("share", "warns"), [(0.6, False), (0.655, False), (0.545, False), (0.67, True), (0.53, True)])
def test_a_tenth_of_the_expected_share_is_allowed(share: float, warns: bool) -> None:
    drift = TokenDrift(0.6)
    said = [drift.add(share) for _ in range(3 * WINDOW)]
    assert [bool(words) for words in said] == [warns and number == WINDOW - 1 for number in range(3 * WINDOW)]
    if warns:
        assert f"keeps {share:.1%} of the tokens" in said[WINDOW - 1] and "60.0% were expected" in said[WINDOW - 1]


def test_single_passes_do_not_count_and_late_drift_does() -> None:
    drift = TokenDrift(0.5)
    assert not any(drift.add(0.1 if number % 2 else 0.9) for number in range(2 * WINDOW))
    assert sum(bool(drift.add(0.6)) for _ in range(WINDOW)) == 1


@pytest.mark.parametrize("expected", [0, -0.5, 1.1, math.nan, "0.6", True])
def test_what_is_no_share_is_refused(expected: object) -> None:
    with pytest.raises((TypeError, ValueError), match="expected="):
        TokenDrift(expected)
