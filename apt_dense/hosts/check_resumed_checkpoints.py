"""Checkpoints of training runs: all that a run needs to go on is there, or one line says what is not.

The hosts' own loaders skip what a file lacks: a run then goes on with a new optimizer or schedule, without a word.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from apt_dense.option_checks import whole
from apt_dense.weights.files import CheckpointError

_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}
_REMEDY = "continue from an older one, or start a new run"


def check_parts(content: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]], path: str | Path) -> None:
    """Check that a checkpoint has these parts, of these kinds.

    Raises:
        CheckpointError: naming what is missing or of another kind.
    """
    for name, kind in kinds.items():
        if name not in content:
            raise CheckpointError(f"{path} cannot be continued from: it lacks {name}, which it was saved without")
        if not isinstance(content[name], kind) or isinstance(content[name], bool):
            found = f"{content[name]!r:.40}" if isinstance(content[name], int | float | str) else ""
            raise CheckpointError(
                f"{path} cannot be continued from: its {name} is {found or 'a'} {type(content[name]).__name__}; it is "
                f"damaged, {_REMEDY}"
            )


def check_iteration(done: Any, end: int | None, path: str | Path) -> None:
    """Check the number of iterations that a checkpoint says are done, of ``end``; None for any number.

    Raises:
        CheckpointError: if it is not a whole number, or above ``end``, where nothing would be trained.
    """
    try:
        done = whole(0)("iteration", done)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be continued from: its {error}; {_REMEDY}") from error
    if end is not None and done > end:
        raise CheckpointError(
            f"{path} cannot be continued from: {done} iterations are done, more than the {end} that are asked for; "
            f"ask for more, or start a new run from its weights"
        )


ENTRIES = "optimizer_entries"  # in checkpoints: the number of parameters that the optimizer has a state of


def entries_of(state: Mapping[str, Any]) -> dict[str, int]:
    """The entries to save next to the state dict of an optimizer, or of several optimizers by name."""
    return {ENTRIES: sum(len(one["state"]) for one in _optimizers(state))}


def check_optimizer(state: Mapping[str, Any], content: Mapping[str, Any], path: str | Path) -> None:
    """Check that the state dict of an optimizer, or of several by name, is complete: torch silently reinitialises what
    is missing.

    Args:
        state: of the optimizer.
        content: of the checkpoint, with what :func:`entries_of` has returned; older ones are without.

    Raises:
        CheckpointError: if there is no state, or less than was saved.
    """
    with continuing_from(path):
        optimizers = _optimizers(state)
        found, saved = sum(len(one["state"]) for one in optimizers), content.get(ENTRIES)
        groups = [group for one in optimizers for group in one["param_groups"]]
        uneven = [key for one in optimizers for key in _uneven(one)]
    if saved is None and not found and any("betas" in group or group.get("momentum") for group in groups):
        saved = "one for each parameter"
    if saved is not None and found != saved:
        raise CheckpointError(
            f"{path} cannot be continued from: its optimizer has {found} states of parameters, expected {saved}; some "
            f"were taken out, and would be reinitialised. Take a complete checkpoint, or start a new run from its "
            f"weights"
        )
    if uneven:
        raise CheckpointError(
            f"{path} cannot be continued from: the optimizer's state of parameter {uneven[0]!r:.40} lacks parts "
            f"that those of others have; it is damaged, {_REMEDY}"
        )


def _optimizers(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [state] if "param_groups" in state else [one for one in state.values() if isinstance(one, Mapping)]


def _uneven(state: Mapping[str, Any]) -> list[Any]:
    """The parameters whose state lacks parts that those of others have, with the same switches (such as amsgrad)."""
    parts: dict[tuple, dict[Any, set[str]]] = {}
    for group in state["param_groups"]:
        switches = (*((key, on) for key, on in group.items() if isinstance(on, bool)), bool(group.get("momentum")))
        entries = {key: set(state["state"][key]) for key in group["params"] if key in state["state"]}
        parts.setdefault(switches, {}).update(entries)
    return [key for alike in parts.values() for key, own in alike.items() if own != set().union(*alike.values())]


def check_moments(optimizer: torch.optim.Optimizer, path: str | Path) -> None:
    """Check that the averages of gradients which were loaded have the shapes of their parameters.

    Raises:
        CheckpointError: naming the first that has not.
    """
    for parameter, state in optimizer.state.items():
        for name in _MOMENTS & state.keys():
            shape = getattr(state[name], "shape", None)
            if state[name] is not None and shape != parameter.shape:
                raise CheckpointError(
                    f"{path} cannot be continued from: the optimizer's {name} is {shape and tuple(shape)} for a "
                    f"parameter {tuple(parameter.shape)}; it is damaged, {_REMEDY}"
                )


@contextmanager
def continuing_from(path: str | Path) -> Iterator[None]:
    """Turn errors of loading a damaged part of a checkpoint into a CheckpointError that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} cannot be continued from: a part of it is damaged ({type(error).__name__}: {reason}); {_REMEDY}"
        ) from error
