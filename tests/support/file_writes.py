"""Calls that change files: counted, killed at, or followed by something else."""

from __future__ import annotations

import builtins
import io
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_CALLS = ((builtins, "open"), (io, "open"), *((os, n) for n in ("open", "replace", "rename", "remove", "unlink")))
_REMOVES = "remove", "unlink"
_RENAMES = "replace", "rename"


class Write(NamedTuple):
    """A call that changes a file: opens it for writing, renames another to it, or removes it."""

    call: str
    path: Path

    @property
    def renames(self) -> bool:
        """Whether a whole file appears under this name."""
        return self.call in _RENAMES


def watch_writes(folder: Path, around: Callable[[Write, Callable[[], Any], Any], Any]) -> None:
    """Hand every write below a folder, for the rest of this process, to ``around(write, do, source)``, which calls
    ``do()``. ``source`` is the file that a rename takes. What C++ opens (``torch.save``) is seen when it is renamed."""

    def wrap(original: Callable, name: str) -> Callable:
        def wrapped(path: Any, *args: Any, **options: Any) -> Any:
            target = args[0] if name in _RENAMES and args else path
            if not (isinstance(target, str | Path) and _changes(name, args, options) and _is_below(target, folder)):
                return original(path, *args, **options)
            return around(Write(name, Path(target)), lambda: original(path, *args, **options), path)

        return wrapped

    for module, name in _CALLS:
        setattr(module, name, wrap(getattr(module, name), name))


def _is_below(path: str | Path, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(folder)


def _changes(name: str, args: tuple, options: dict) -> bool:
    if name != "open":
        return True
    mode = args[0] if args else options.get("mode", options.get("flags", "r"))
    return bool(mode & (os.O_WRONLY | os.O_RDWR)) if isinstance(mode, int) else any(sign in mode for sign in "wax+")


def record_writes(folder: Path, log: Path) -> Callable[[], None]:
    """Make a process note each write below a folder in ``log``, which is elsewhere; see ``read_writes``."""

    def prepare() -> None:
        lines = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)

        def note(write: Write, do: Callable[[], Any], source: Any) -> Any:
            os.write(lines, f"{write.call} {write.path}\n".encode())
            return do()

        watch_writes(folder, note)

    return prepare


def read_writes(log: Path) -> list[Write]:
    """Read what ``record_writes`` wrote."""
    return [Write(call, Path(path)) for call, path in (line.split(" ", 1) for line in log.read_text().splitlines())]


def die_at_write(
    folder: Path, number: int, when: str, counts: Callable[[Write], bool] = lambda write: True
) -> Callable[[], None]:
    """Make a process kill itself at its n-th write below a folder of those that count.

    Args:
        when: "before", "after", or "torn": before a rename, of a file of which half is written.
    """

    def prepare() -> None:
        numbers = itertools.count()

        def act(write: Write, do: Callable[[], Any], source: Any) -> Any:
            if not counts(write) or next(numbers) != number:
                return do()
            if when == "torn":
                os.truncate(source, os.path.getsize(source) // 2)
            try:
                return do() if when == "after" else None
            finally:  # also where it fails, such as to remove a file that is not there
                os.kill(os.getpid(), signal.SIGKILL)

        watch_writes(folder, act)

    return prepare
