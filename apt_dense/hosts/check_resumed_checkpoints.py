"""Checkpoints of training runs: all that a run needs to go on is there, or one line says what is not.

The hosts' own loaders skip what a file lacks: a run then goes on with a new optimizer or schedule, without a word.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apt_dense.option_checks import whole
from apt_dense.weights.files import CheckpointError

_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
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
