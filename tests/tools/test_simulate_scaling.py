"""The simulation of many processes: against closed forms and all orders there are, and its command."""

from __future__ import annotations

import csv
from itertools import islice, permutations
from math import comb
from pathlib import Path

import numpy as np
import pytest

for package in ("tqdm", "matplotlib"):
    pytest.importorskip(package, reason="simulate_scaling needs it")

import simulate_scaling

from apt_dense.hosts.token_counts import write_counts

from scaling.cost_curve import CostCurve, fit_curve, read_points, write_points
from scaling.measure_curve import measure_curve
from scaling.report import Row, table
from scaling.step_times import (
    Setup,
    StepTimes,
    balanced_steps,
    budget_times,
    resampled,
    shuffled_steps,
    step_times,
    times_of,
)

CURVE = CostCurve(0.5, 2e-3, 3e-6)


def random_times(tokens: list[int], setup: Setup, steps: int = 20_000) -> StepTimes:
    return step_times(CURVE, tokens, shuffled_steps(len(tokens), setup, 0), setup, steps)


@pytest.mark.parametrize("images", [2, 10, 1000])
def test_two_processes_and_two_sizes(images: int) -> None:
    """They differ with probability N / 2 (N - 1); the slower one then decides."""
    found = random_times([100] * (images // 2) + [700] * (images // 2), Setup(2))
    fast, slow = CURVE(np.array([100, 700]))
    differ = images / 2 / (images - 1)
    seconds = differ * slow + (1 - differ) * (slow + fast) / 2
    assert found.seconds == pytest.approx(seconds, abs=4 * found.standard_error + 1e-9)
    assert found.waste == pytest.approx(1 - (fast + slow) / 2 / seconds, abs=0.01)


@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_the_largest_of_several_is_an_order_statistic(ranks: int) -> None:
    tokens = np.random.default_rng(1).integers(0, 1000, 40)
    costs, found = np.sort(CURVE(tokens)), random_times(tokens.tolist(), Setup(ranks))
    chances = [comb(place, ranks - 1) / comb(40, ranks) for place in range(40)]
    assert sum(chances) == pytest.approx(1)
    assert found.seconds == pytest.approx(chances @ costs, abs=4 * found.standard_error)


@pytest.mark.parametrize("setup", [Setup(3, 2), Setup(2, 3), Setup(2, 1, accumulate=3)])
def test_all_orders_of_six_images(setup: Setup) -> None:
    """Each epoch is one step, so that the mean over all orders is exact."""
    tokens = [0, 10, 100, 300, 800, 1000]
    orders = np.array(list(permutations(tokens))).reshape(-1, setup.accumulate, setup.batch_size, setup.ranks)
    exact = times_of(CURVE(orders.sum(2)).sum(1))
    found = random_times(tokens, setup)
    assert found.seconds == pytest.approx(exact.seconds, abs=4 * found.standard_error)
    assert found.waste == pytest.approx(exact.waste, abs=0.01)


@pytest.mark.parametrize("setup", [Setup(1), Setup(3, 2), Setup(8, 3)])
def test_random_order_reads_each_image_once_an_epoch(setup: Setup) -> None:
    steps = np.stack(list(islice(shuffled_steps(7, setup, 0), 14)))
    stream = steps.swapaxes(1, 2).ravel()  # as processes take turns
    assert steps.shape[1:] == (setup.ranks, setup.batch_size)
    for start in range(0, len(stream) - 6, 7):
        assert sorted(stream[start : start + 7]) == list(range(7))


def test_balanced_steps_wait_for_next_to_nothing() -> None:
    tokens = np.random.default_rng(0).integers(100, 1000, 999).tolist()
    setup = Setup(4, 2, accumulate=2)
    balanced = step_times(CURVE, tokens, balanced_steps(tokens, setup, 0), setup, 300)
    random = random_times(tokens, setup, 300)
    assert random.waste > 0.1 and balanced.waste < 0.005
    budget = budget_times(CURVE, 550, setup)
    assert budget.waste == 0 and budget.seconds == pytest.approx(2 * CURVE(np.array(1100)))


def test_one_process_waits_for_nobody() -> None:
    assert random_times([1, 500, 900], Setup(1, 2), 100).waste == 0


def test_samples_stand_for_whole_data_sets() -> None:
    assert resampled([1, 2], None, 0).tolist() == [1, 2]
    many = resampled([1, 2, 3], 3000, 0)
    assert len(many) == 3000 and many.mean() == pytest.approx(2, abs=0.05)
    assert (many == resampled([1, 2, 3], 3000, 0)).all() and not (many == resampled([1, 2, 3], 3000, 1)).all()


def test_curves_are_found_again() -> None:
    tokens = [0, 100, 500, 1000]
    found = fit_curve(tokens, CURVE(np.array(tokens)))
    assert found[:3] == pytest.approx(CURVE[:3], rel=1e-6) and found.error < 1e-9
    assert fit_curve([0, 1, 2], [1, 2.9, 4.1])[2] == 0, "no part is negative, so that more tokens never take less time"
    two_points = fit_curve([1000, 3000], [1.0, 2.0])
    assert two_points[:3] == pytest.approx((0.5, 5e-4, 0)) and two_points.error < 1e-9, "a line, if nothing says more"
    assert fit_curve([0, 10, 20], [1, 1.5, 1]).error > 0.1


@pytest.mark.parametrize(
    "tokens, seconds, message",
    [([5, 5], [1, 2], "two or more different"), ([1], [1], "two or more"), ([-1, 2], [1, 1], "two or more"),
     ([1, 2], [0, 1], "seconds above 0"), ([1, 2], [1, float("nan")], "seconds above 0")],
)  # fmt: skip
def test_points_that_make_no_curve_are_refused(tokens: list, seconds: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_curve(tokens, seconds)


def test_points_are_read_as_written(tmp_path: Path) -> None:
    write_points(tmp_path / "x.csv", [1, 2], [0.5, 0.75])
    assert read_points(tmp_path / "x.csv") == ([1, 2], [0.5, 0.75])
    for text, message in (("a,b\n1,2\n", "expected tokens, seconds"), ("tokens,seconds\n1,x\n", "other than numbers")):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_points(tmp_path / "x.csv")


def test_a_curve_is_measured_from_flat_to_noise() -> None:
    tokens, seconds = measure_curve("demo", 64, batch_size=2, rounds=1)
    assert tokens == sorted(tokens) and tokens[0] == 2 and tokens[-1] == 2 * 16 and min(seconds) > 0


def test_tables_name_what_balance_removes() -> None:
    row = Row(2, 4, StepTimes(2.0, 0.5), StepTimes(1.2, 0.1), StepTimes(1.0, 0.0))
    assert row.waiting_removed == pytest.approx(0.88)
    head, _, cells = table([row]).splitlines()
    assert cells == "| 2 | 2 | 50.0% | 1.2 | 10.0% | 88.0% | 1 | 2 | 3.333 | 4 |" and head.count("|") == cells.count(
        "|"
    )
    assert row._replace(random=StepTimes(2.0, 0.0)).waiting_removed is None


def command(folder: Path, *more: str) -> list[Row]:
    write_counts(folder / "tokens.json", np.random.default_rng(0).integers(1, 65, 50).tolist(), {"a": 1})
    write_points(folder / "given.csv", [0, 100], [0.1, 0.6])
    argv = [str(folder / "tokens.json"), "--curve", str(folder / "given.csv"), "--out", str(folder / "out")]
    simulate_scaling.main([*argv, "--steps", "20", *more])
    with (folder / "out" / "table.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_command_writes_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = command(tmp_path, "--ranks", "4", "1", "--batch-size", "2", "--images", "400")
    assert [(row["ranks"], row["images"]) for row in rows] == [("1", "2"), ("4", "8")]
    assert float(rows[0]["random_waste"]) == 0 < float(rows[1]["balanced_waste"]) < float(rows[1]["random_waste"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"curve.csv", "table.csv", "table.md", "scaling.png"}
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip() and "over 400 images of tokens.json" in text


def test_the_command_goes_up_to_1024_processes(tmp_path: Path) -> None:
    assert [int(row["ranks"]) for row in command(tmp_path)] == [2**power for power in range(11)]


def test_a_budget_may_be_named(tmp_path: Path) -> None:
    [row] = command(tmp_path, "--ranks", "2", "--budget", "20", "--accumulate", "3")
    assert float(row["budget_seconds"]) == pytest.approx(3 * 0.2, rel=1e-3) and float(row["budget_waste"]) == 0


@pytest.mark.parametrize("alike, removed", [(1.0, 0.9), (0.0, -0.4)])
def test_new_draws_are_balanced_as_far_as_they_are_like_those_counted(
    alike: float, removed: float, tmp_path: Path
) -> None:
    """Two draws of each image, either the same or of no relation, in which case the order is as good as any."""
    first, other = np.random.default_rng(0).integers(1, 1000, (2, 300))
    last = (alike * first + (1 - alike) * other).astype(int)
    write_counts(tmp_path / "two.json", [*first.tolist(), *last.tolist()], {"draws": 2})
    write_points(tmp_path / "x.csv", [0, 1000], [0.1, 1.1])
    argv = [str(tmp_path / "two.json"), "--curve", str(tmp_path / "x.csv"), "--out", str(tmp_path), "--ranks", "4"]
    [new] = simulate_scaling.run(simulate_scaling.parse([*argv, "--new-draws"]))
    [counted] = simulate_scaling.run(simulate_scaling.parse([*argv, "--images", "700"]))
    assert removed <= new.waiting_removed < removed + 0.8 and counted.waiting_removed > 0.9


def test_new_draws_need_two(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="tokens.json holds one draw of each image"):
        command(tmp_path, "--new-draws")


@pytest.mark.parametrize("more, message", [(["--steps", "0"], "--steps 0"), (["--ranks", "0"], "--ranks 0")])
def test_numbers_out_of_range_are_refused(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        command(tmp_path, *more)
    assert message in capsys.readouterr().err


def test_a_missing_or_foreign_file_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    for name in ("x.json", "y.json"):
        with pytest.raises(SystemExit, match=f"simulate_scaling: .*{name}"):
            simulate_scaling.main([str(tmp_path / name), "--measure", "demo", "--out", str(tmp_path / "out")])
