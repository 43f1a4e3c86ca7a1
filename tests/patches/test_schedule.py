"""Schedules of patches: start, end, monotone shares of tokens, for thresholds and budgets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apt_dense import PatchSelector
from apt_dense.options import PatchOptions
from apt_dense.patches.schedule import PatchSchedule

from support.references import pictures

THRESHOLDS = st.lists(st.floats(0, 8), min_size=1, max_size=3).map(lambda found: tuple(sorted(found, reverse=True)))
SHARES = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)
STEPS = st.none() | st.integers(1, 5)


def selector_at(schedule: PatchSchedule, target: PatchSelector, iteration: int, iterations: int) -> PatchSelector:
    return replace(target, **schedule.at(target, iteration, iterations))


@given(SHARES, STEPS, st.integers(1, 12))
def test_progress_rises_from_uniform_to_the_target(span: list[float], steps: int | None, iterations: int) -> None:
    schedule = PatchSchedule(*span, steps)
    found = [schedule.progress(iteration, iterations) for iteration in range(iterations)]
    assert found == sorted(found) and all(0 <= each <= 1 for each in found) and found[-1] == 1
    for iteration, each in enumerate(found[:-1]):
        place = iteration / (iterations - 1)
        assert place < span[1] or each == 1
        assert place > span[0] or place >= span[1] or each == 0
    if steps is not None:
        assert len(set(found)) <= steps + 1 and all(
            each * steps == pytest.approx(round(each * steps)) for each in found
        )


def test_progress_is_linear() -> None:
    schedule = PatchSchedule(0.2, 0.6)
    assert [schedule.progress(i, 11) for i in range(11)] == pytest.approx([0] * 3 + [0.25, 0.5, 0.75] + [1] * 5)
    stairs = PatchSchedule(0.0, 1.0, steps=2)
    assert [stairs.progress(i, 5) for i in range(5)] == [0, 0, 0.5, 0.5, 1]


@settings(max_examples=20)
@given(THRESHOLDS, STEPS, st.sampled_from([0, 4]), st.booleans(), st.integers(0, 99))
def test_thresholds_keep_fewer_and_fewer_tokens(
    thresholds: tuple[float, ...], steps: int | None, window: int, drop_padding: bool, seed: int
) -> None:
    target = PatchSelector(
        patch_size=4, thresholds=thresholds[: 2 if window else 3], window_size=window, drop_padding=drop_padding
    )
    images = pictures(seed, (32, 32))
    images[1, :, 20:] = 0  # padding
    schedule = PatchSchedule(0.25, 0.75, steps)
    shares = torch.stack([selector_at(schedule, target, i, 9).tokens_kept(images) for i in range(9)])
    assert (shares.diff(dim=0) <= 0).all()
    uniform = replace(target, thresholds=()).tokens_kept(images)
    assert torch.equal(shares[0], uniform) and torch.equal(shares[2], uniform)
    for iteration in (6, 7, 8):
        assert selector_at(schedule, target, iteration, 9) == target


@settings(max_examples=20)
@given(st.floats(0.3, 1) | st.integers(20, 64), STEPS, st.integers(0, 99))
def test_budgets_fall_to_the_target(budget: float | int, steps: int | None, seed: int) -> None:
    target = PatchSelector(patch_size=4, thresholds=(5.0, 3.0), token_budget=budget, img_size=32)
    images = pictures(seed, (32, 32))
    schedule = PatchSchedule(0.0, 0.8, steps)
    found = [selector_at(schedule, target, i, 11) for i in range(11)]
    assert {each.thresholds for each in found} == {(5.0, 3.0)}
    kept = [each.tokens_kept(images) for each in found]
    assert (torch.stack(kept).diff(dim=0) <= 0).all() and (kept[0] == 1).all()
    assert found[8:] == [target] * 3


def test_what_cannot_be_annealed_is_refused() -> None:
    schedule = PatchSchedule()
    for thresholds, message in ((), "nothing to anneal"), ((float("inf"),), "cannot be scaled"), ((-1.0,), "cannot be"):
        with pytest.raises(ValueError, match=message):
            schedule.at(PatchOptions(thresholds), 0, 2)
    with pytest.raises(ValueError, match="number of all tokens"):
        schedule.at(PatchSelector(thresholds=(5.0,), token_budget=30), 1, 9)
    with pytest.raises(ValueError, match=r"begin=0\.5 must not be after end=0\.4"):
        PatchSchedule(0.5, 0.4)
    for wrong in ({"end": 1.5}, {"begin": -0.1}, {"steps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PatchSchedule(**wrong)
