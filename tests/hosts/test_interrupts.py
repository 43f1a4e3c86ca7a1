"""The first signal asks a run to stop, the second acts; forked workers leave Ctrl-C to their parent."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from apt_dense.hosts.interrupts import Stopped, stop_requests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with stop_requests() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked() and signal.getsignal(number) is before
    assert signal.getsignal(number) is before


def test_a_second_signal_acts_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for jobs in the background
    with pytest.raises(KeyboardInterrupt), stop_requests():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 7), (signal.SIGTERM, 143)])
def test_workers_ignore_ctrl_c_and_end_when_asked(number: int, status: int) -> None:
    with stop_requests() as asked:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), number)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
        assert not asked()


def test_other_threads_are_left_alone() -> None:
    found = []

    def body() -> None:
        with stop_requests() as asked:
            found.append(asked())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [False] and issubclass(Stopped, KeyboardInterrupt)
