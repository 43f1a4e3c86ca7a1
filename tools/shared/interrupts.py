"""Ctrl-C ends every tool in one line, from its first import on.

Tools import this module before all others. Until :func:`run`, nothing has been written that could be lost.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

CODE = 128 + signal.SIGINT  # as shells report it


def _script() -> Path | None:
    """The tool that this process was started with; None inside tests and processes that a tool has started."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    return Path(path) if path is not None and _is_tool(path) else None


def _is_tool(path: str) -> bool:
    return Path(path).resolve().parent == Path(__file__).resolve().parents[1]


def _end(number: int, frame: object) -> None:
    """End at once: libraries that are half imported may swallow an exception, or print one of their own."""
    if _script() is not None:
        os.write(2, f"{_script().stem}: stopped\n".encode())
    os._exit(CODE)


if _is_tool(sys.argv[0]):  # also in a process that a tool has spawned, which has its arguments
    signal.signal(signal.SIGINT, _end)


def run(main: Callable[[], object]) -> None:
    """Run a tool's ``main``; exit in one line if it is interrupted."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt as stopped:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process is ending; a second one must not print a traceback
        print(f"{_script().stem}: {stopped.args[0] if stopped.args else 'stopped'}", file=sys.stderr)
        sys.exit(CODE)
