"""Checkpoints of runs: all parts, or a line that names the one that is missing or damaged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from apt_dense.hosts.check_resumed_checkpoints import check_iteration, check_parts, continuing_from
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
