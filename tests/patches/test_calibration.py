"""Calibration: statistics of known curves, targets that are met, and expectations that hold on other images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt_dense import PatchSelector
from apt_dense.patches.calibration import FACTORS, CurveStatistics, Target
from apt_dense.patches.token_curve import patches_by_factor

from support.references import normalise

SELECTOR = PatchSelector(patch_size=4, thresholds=(5.5, 4.0))


def curves_of(seed: int, count: int) -> tuple[list[np.ndarray], list[torch.Tensor]]:
    """Token curves of pictures, and the pictures: blocks of 8 pixels of several amounts of noise."""
    generator = torch.Generator().manual_seed(seed)
    curves, pictures = [], []
    for _ in range(count):
        amount = torch.rand(1, 1, 8, 8, generator=generator) * 30 * torch.rand(1, generator=generator)
        amount = amount.repeat_interleave(8, 2).repeat_interleave(8, 3)
        grey = 128 + amount * torch.randn(1, 3, 64, 64, generator=generator)
        pictures.append(normalise(grey.round().clamp(0, 255)))
        curves.append(patches_by_factor(SELECTOR, pictures[-1], torch.from_numpy(FACTORS))[0].numpy())
    return curves, pictures


def statistics_of(curves: list[np.ndarray]) -> CurveStatistics:
    statistics = CurveStatistics(3)
    for curve in curves:
        statistics.add(curve)
    return statistics


def test_means_and_quantiles_of_the_shares() -> None:
    curves, _ = curves_of(0, 20)
    shares = np.stack([curve.sum(1) / 256 for curve in curves])
    statistics = statistics_of(curves)
    np.testing.assert_allclose(statistics.mean(), shares.mean(0))
    for quantile in (0.05, 0.5, 0.95):
        expected = np.quantile(shares, quantile, axis=0, method="inverted_cdf")
        found = statistics.quantile(quantile)
        assert ((found >= expected - 1e-9) & (found < expected + 0.001)).all()


@pytest.mark.parametrize("share", [0.35, 0.6, 0.85])
def test_the_target_is_met_by_a_selector_with_the_found_thresholds(share: float) -> None:
    curves, pictures = curves_of(1, 24)
    found = statistics_of(curves).calibrate(SELECTOR.thresholds, Target(share))
    chosen = replace(SELECTOR, thresholds=found.thresholds)
    shares = torch.cat([chosen.tokens_kept(picture) for picture in pictures])
    assert found.share == pytest.approx(share, abs=1e-6) and shares.mean().item() == pytest.approx(share, abs=0.01)
    assert found.deviation == pytest.approx(shares.std().item(), abs=0.02) and sum(found.cells) == pytest.approx(1)
    assert found.thresholds == pytest.approx([found.factor * t for t in SELECTOR.thresholds]) and found.images == 24


def test_a_quantile_is_met() -> None:
    curves, pictures = curves_of(2, 40)
    found = statistics_of(curves).calibrate(SELECTOR.thresholds, Target(0.7, quantile=0.95))
    chosen = replace(SELECTOR, thresholds=found.thresholds)
    shares = torch.cat([chosen.tokens_kept(picture) for picture in pictures])
    assert (shares <= 0.71).float().mean() >= 0.94 and found.quantiles[2] == pytest.approx(0.7, abs=0.002)


def test_other_images_lie_in_the_expected_interval_about_95_times_of_100() -> None:
    """Thirty pairs of sets, of which one or two may miss; a margin of no width would miss nearly all."""
    pool, _ = curves_of(3, 300)
    generator, held, narrow = np.random.default_rng(0), 0, 0
    for _ in range(30):
        order = generator.permutation(len(pool))
        found = statistics_of([pool[i] for i in order[:40]]).calibrate(SELECTOR.thresholds, Target(0.6))
        others = statistics_of([pool[i] for i in order[40:80]])
        share = np.interp(found.factor, FACTORS, others.mean())
        held += found.expected[0] <= share <= found.expected[1]
        narrow += abs(share - found.share) < 0.002
    assert held >= 27 and narrow < 10


@given(st.integers(0, 20), st.floats(0.07, 0.99))
def test_any_share_that_is_reached_is_found(seed: int, share: float) -> None:
    curves, _ = curves_of(seed, 2)
    statistics = statistics_of(curves)
    curve = statistics.mean()
    if curve[-1] <= share <= curve[0]:
        found = statistics.calibrate((5.5, 4.0), Target(share))
        assert found.share == pytest.approx(share, abs=1e-9) and FACTORS[0] <= found.factor <= FACTORS[-1]
    else:
        with pytest.raises(ValueError, match="is not reached"):
            statistics.calibrate((5.5, 4.0), Target(share))


@pytest.mark.parametrize(("share", "quantile"), [(0, None), (1.1, None), (float("nan"), None), (0.5, 0), (0.5, 1)])
def test_targets_out_of_range(share: float, quantile: float | None) -> None:
    with pytest.raises(ValueError, match="target"):
        Target(share, quantile)


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], float("inf")])
@pytest.mark.parametrize("name", ["share", "quantile"])
def test_targets_of_another_kind(name: str, value: object) -> None:
    if (name, value) == ("quantile", None):
        return
    with pytest.raises((TypeError, ValueError), match=f"^target {name}="):
        Target(**{"share": 0.5, name: value})


@pytest.mark.parametrize(
    "thresholds", [(np.inf, 3.0), (-3.0,), (3.0, -1.0), (np.nan,), (3.0, 4.0), ("3",), 3.0, "3", None, (True,)]
)
def test_thresholds_that_cannot_be_scaled(thresholds: object) -> None:
    statistics = CurveStatistics(2)
    with pytest.raises((TypeError, ValueError), match="^thresholds="):
        statistics.calibrate(thresholds, Target(0.5))


def test_no_images() -> None:
    with pytest.raises(ValueError, match="no images"):
        CurveStatistics(3).calibrate((5.5, 4.0), Target(0.5))
