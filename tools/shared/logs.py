"""What of the log reaches the terminal: what apt_dense says, such as counts of a data set, and not what hosts say while
they are imported and built."""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator


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
