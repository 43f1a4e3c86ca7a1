"""Checkpoints of runs: all parts, or a line that names the one that is missing or damaged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from apt_dense.hosts.check_resumed_checkpoints import (
    ENTRIES,
    check_iteration,
    check_moments,
    check_optimizer,
    check_parts,
    continuing_from,
    entries_of,
)
from apt_dense.weights.files import CheckpointError

KINDS = {"optimizer": dict, "iteration": int}


def test_whole_checkpoints_pass() -> None:
    check_parts({"optimizer": {}, "iteration": 3, "more": None}, KINDS, "a.pth")
    for done in (0, 3, np.int64(3)):
        check_iteration(done, 3, "a.pth")
    check_iteration(10**9, None, "a.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"iteration": 3}, "it lacks optimizer"),
        ({"optimizer": None, "iteration": 3}, "its optimizer is a NoneType"),
        ({"optimizer": [1], "iteration": 3}, "its optimizer is a list"),
        ({"optimizer": {}, "iteration": "3"}, "its iteration is '3' str"),
        ({"optimizer": {}, "iteration": True}, "its iteration is True bool"),
    ],
)
def test_parts_that_are_missing_or_of_another_kind_are_named(content: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^a.pth cannot be continued from: {message}"):
        check_parts(content, KINDS, "a.pth")


@pytest.mark.parametrize("done", [-1, 1.5, None, "3", True, float("nan")])
def test_iterations_that_are_no_number_are_named(done: Any) -> None:
    with pytest.raises(CheckpointError, match=f"^a.pth cannot be continued from: its iteration={done!r}"):
        check_iteration(done, 10, "a.pth")


def test_more_iterations_than_asked_for_are_refused() -> None:
    with pytest.raises(CheckpointError, match="4 iterations are done, more than the 3 that are asked for"):
        check_iteration(4, 3, "a.pth")


# ---- optimizers


def optimizer_after_a_step(kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **options: Any) -> Any:
    """Of three parameters, one of which takes no part."""
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (2, 3, 4)]
    optimizer = kind([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1, **options)
    sum(parameter.sum() for parameter in parameters[:2]).backward()
    optimizer.step()
    return optimizer


def refusal(state: Any, content: dict) -> str:
    with pytest.raises(CheckpointError, match=r"^a.pth cannot be continued from: ") as raised:
        check_optimizer(state, content, "a.pth")
    return str(raised.value)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_whole_optimizers_pass(kind: type[torch.optim.Optimizer]) -> None:
    """With parameters that take no part, and with and without the note that older checkpoints lack."""
    optimizer = optimizer_after_a_step(kind)
    state = optimizer.state_dict()
    for given in (state, {"one": state, "other": state, "base_iter": 3}):
        check_optimizer(given, {}, "a.pth")
        check_optimizer(given, entries_of(given), "a.pth")
    check_moments(optimizer, "a.pth")


def test_a_run_that_has_not_learned_yet_passes() -> None:
    """Steps are skipped while a loss scale is found."""
    state = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    check_optimizer(state, entries_of(state), "a.pth")


def test_parts_that_were_taken_out_are_missed() -> None:
    state = optimizer_after_a_step().state_dict()
    note = entries_of(state)
    assert note == {ENTRIES: 2}
    assert "0 states of parameters, expected 2" in refusal({**state, "state": {}}, note)
    assert "0 states of parameters, expected one for each" in refusal({**state, "state": {}}, {})
    assert "1 states of parameters, expected 2" in refusal({**state, "state": {0: state["state"][0]}}, note)
    assert "expected one for each" in refusal(
        {**optimizer_after_a_step(torch.optim.SGD, momentum=0.9).state_dict(), "state": {}}, {}
    )


@pytest.mark.parametrize("state", [None, 3, {0: None}, {0: 3}])
def test_states_of_another_kind_are_damaged(state: Any) -> None:
    assert "damaged" in refusal({**optimizer_after_a_step().state_dict(), "state": state}, {})


def test_parts_of_a_state_are_missed() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.step()
    state = optimizer.state_dict()
    del state["state"][1]["exp_avg"]
    assert "state of parameter 1 lacks parts" in refusal(state, {})
    optimizer.state[parameters[1]]["exp_avg"] = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"exp_avg is \(3,\) for a parameter \(2,\)"):
        check_moments(optimizer, "a.pth")


@pytest.mark.parametrize(
    "error", [KeyError("x"), TypeError("a\nb"), AttributeError("y"), AssertionError(), ValueError("z"), IndexError(1)]
)
def test_errors_of_damaged_parts_name_the_file_in_a_line(error: Exception) -> None:
    message = f"^a.pth .* is damaged .{type(error).__name__}"
    with pytest.raises(CheckpointError, match=message) as raised, continuing_from("a.pth"):
        raise error
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [CheckpointError("x"), OSError("full"), KeyboardInterrupt()])
def test_other_errors_stay(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, continuing_from("a.pth"):
        raise error
    assert raised.value is error
