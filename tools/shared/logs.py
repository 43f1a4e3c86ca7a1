"""Show what apt_dense logs, such as counts of a data set, before a host has set up its own log."""

import logging
import os
import sys


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
