"""Tuning: times are of the cases they are said to be of, kept in a file, and taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm", reason="tune_kernels shows progress with it")

import tune_kernels

from apt_dense.ops.attention import ON_CPUS, case_of
from apt_dense.ops.measured_kernel_choice import LENGTHS, Case, Seconds, times_of_machine, timings_path
from apt_dense.ops.onednn_matmul import PRODUCTS

from benchmarks import kernel_timings
from benchmarks.kernel_timings import all_cases, attention_inputs, quartiles, steps_of, time_case


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_timings, "FEWEST_ROWS", 128)
    monkeypatch.setattr(kernel_timings, "LINEAR_ROWS", 16)
    times_of_machine.cache_clear()
    yield
    times_of_machine.cache_clear()


@pytest.mark.parametrize("case", [case for case in all_cases((64, 128)) if case.work == "attention"], ids=str)
def test_operands_are_those_of_the_case(case: Case) -> None:
    inputs, operands = attention_inputs(case)
    assert case_of(inputs) == case and inputs.segments.mean_length == case.length
    assert len(inputs.q) >= 128 and all(leaf.requires_grad == case.trains for leaf in operands)


def test_each_kernel_takes_its_turn_in_every_round() -> None:
    for case in (all_cases()[1], all_cases((64,))[-1]):
        steps, calls = steps_of(case), []
        times = time_case(case, 3, lambda step, calls=calls: calls.append(step()) or float(len(calls)))
        assert set(times) == set(steps) == set(PRODUCTS if case.work == "linear" else ON_CPUS)
        count = len(steps)
        first = next(iter(times.values()))
        assert len(calls) == 4 * count and first.median == 1 + 2 * count  # the third of four rounds


def test_slow_cases_take_fewer_rounds() -> None:
    case = all_cases()[1]
    for seconds, rounds in ((0.1, 7), (1.0, 4), (100.0, 3)):
        calls: list[float] = []
        time_case(case, 7, lambda step, calls=calls, seconds=seconds: calls.append(seconds) or seconds)
        assert len(calls) == 2 * (1 + rounds)


def test_long_segments_have_fewer_heads() -> None:
    heads = {case.length: attention_inputs(case)[0].q.shape[1] for case in all_cases((64, 512))[2:]}
    assert heads == {64: 6, 512: 2}  # of 128 rows at least


def test_an_interrupted_tuning_continues_and_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    cases, measured = all_cases((64,)), []
    monkeypatch.setattr(tune_kernels, "all_cases", lambda lengths=(): cases)
    monkeypatch.setattr(kernel_timings, "all_cases", lambda: cases)

    def stop_at_the_fourth(case: Case, rounds: int) -> dict[str, Seconds]:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(case)
        return {"sdpa": Seconds(1, 1, 1), "pytorch": Seconds(1, 1, 1)}

    monkeypatch.setattr(tune_kernels, "time_case", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        tune_kernels.main(["--rounds", "3"])
    threads = torch.get_num_threads()
    assert not times_of_machine(threads) and not timings_path(threads).exists()
    monkeypatch.setattr(
        tune_kernels, "time_case", lambda case, rounds: measured.append(case) or {"sdpa": Seconds(1, 1, 1)}
    )
    tune_kernels.main(["--rounds", "3"])
    assert measured == cases and set(times_of_machine(threads)) == {case.key for case in cases}
    assert [path.name for path in timings_path(threads).parent.iterdir()] == [timings_path(threads).name]


def test_quartiles() -> None:
    assert quartiles([5, 1, 2, 4, 3]) == Seconds(2, 3, 4) and quartiles([2.0]) == Seconds(2, 2, 2)


def test_it_measures_keeps_shows_and_forgets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    cases = all_cases((64,))
    monkeypatch.setattr(tune_kernels, "all_cases", lambda lengths=(): cases if lengths == () else cases[:2])
    monkeypatch.setattr(kernel_timings, "all_cases", lambda: cases)
    fast, slow = Seconds(0.001, 0.001, 0.001), Seconds(0.002, 0.002, 0.002)
    times = {"mask": fast, "rows": slow, "sdpa": slow, "pytorch": slow, "onednn": fast}
    monkeypatch.setattr(tune_kernels, "time_case", lambda case, rounds: times)
    tune_kernels.main(["--rounds", "3"])
    path = timings_path(torch.get_num_threads())
    said = capsys.readouterr().out
    assert str(path) in said and said.count("| mask | measured here |") == len(cases) - 2
    tune_kernels.main(["--show"])
    assert capsys.readouterr().out == said
    tune_kernels.main(["--forget"])
    assert not path.exists() and "measured here" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--rounds", "2"], "--rounds 2"), (["--threads", "0"], "--threads 0")]
)
def test_options_out_of_range(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        tune_kernels.main(arguments)


def test_all_lengths_are_measured() -> None:
    assert {case.length for case in all_cases()} == {0, *LENGTHS}
