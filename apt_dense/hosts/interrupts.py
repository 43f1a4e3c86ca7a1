"""Runs that end on a signal after their current iteration instead of in the middle of it."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal, after a checkpoint. Its argument is the number of iterations done."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGINT or SIGTERM came; a second one acts at once.

    Data workers forked meanwhile leave Ctrl-C, which reaches all processes of a terminal, to the main process.
    """
    asked, before, main = threading.Event(), {}, os.getpid()

    def note(number: int, frame: object) -> None:
        if os.getpid() != main:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        asked.set()
        signal.signal(number, before[number])
        log.warning("stopping after this iteration; repeat to stop at once")

    try:
        if threading.current_thread() is threading.main_thread():  # other threads cannot handle signals
            before.update({number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)})
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
