"""What of the log reaches the terminal: what apt_dense says, such as counts of a data set, and not what hosts say while
they are imported and built."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


class _Terminal(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def show_log() -> None:
    """Print the package's messages from INFO on; in distributed runs, those of the first process."""
    logger = logging.getLogger("apt_dense")
    if logger.handlers or os.environ.get("RANK", "0") != "0":
        return
    handler = _Terminal()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what is printed and warned meanwhile: MMSegmentation says which of its parts are not installed."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _CurrentFile(io.TextIOBase):
    """Writes to the file that is current. Hosts keep the stream that they found when they set up their log."""

    file: TextIO | None = None

    def write(self, text: str) -> int:
        if self.file is not None:
            self.file.write(text)
        return len(text)


_CURRENT = _CurrentFile()


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write what is printed, logged from INFO on and warned meanwhile to a file. Progress bars, which go to the error
    stream, stay on the terminal. Not to be nested."""
    handler = logging.StreamHandler(_CURRENT)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    root = logging.getLogger()
    before, level = root.handlers, root.level
    with path.open("w", encoding="utf-8", buffering=1) as _CURRENT.file, contextlib.redirect_stdout(_CURRENT):
        root.handlers = [handler]
        root.setLevel(logging.INFO)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, kind, *place: _CURRENT.write(f"{kind.__name__}: {message}\n")
                yield
        finally:
            root.handlers = before
            root.setLevel(level)
            _CURRENT.file = None
