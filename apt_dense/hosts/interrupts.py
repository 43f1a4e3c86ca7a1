"""Runs that end on a signal after their current iteration instead of in the middle of it, in all their processes."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch.utils.data import get_worker_info

SIGNALS = signal.SIGINT, signal.SIGTERM
#: Seconds in which a signal that comes again is the same one: launchers pass on what a terminal has sent to all.
ECHO = 1.0
#: Seconds that a data worker goes on after SIGTERM from others than the main process, which ends it before.
WORKER_STAYS = 20
_WAITING = "waits for SIGTERM"  # name of the thread

log = logging.getLogger(__name__)


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal, after a checkpoint. Its argument is the number of iterations done."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGINT or SIGTERM came; a second one, after a second, acts at once.

    Data workers forked meanwhile leave Ctrl-C, which reaches all processes of a terminal, to the main process.
    """
    asked_at, before, main = [], {}, os.getpid()

    def note(number: int, frame: object) -> None:
        if os.getpid() != main:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if not asked_at:
            asked_at.append(time.monotonic())
            if _rank() == 0:
                log.warning("stopping after this iteration; repeat to stop at once")
        elif time.monotonic() > asked_at[0] + ECHO:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    try:
        if threading.current_thread() is threading.main_thread():  # other threads cannot handle signals
            before.update({number: signal.signal(number, note) for number in SIGNALS})
        yield lambda: bool(asked_at)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlive_sigterm() -> None:
    """Let a data worker of torch, in which this is called, go on for a while after SIGTERM, which schedulers send to
    all processes of a run: the iteration that is to be finished may need its data. In other processes, do nothing.

    torch ends its workers at once, and the main process for their sake with an error and without a checkpoint.
    """
    if get_worker_info() is None or not hasattr(signal, "sigtimedwait"):  # which macOS has not
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if not any(thread.name == _WAITING for thread in threading.enumerate()):
        threading.Thread(target=_exit_on_sigterm, name=_WAITING, daemon=True).start()


def _exit_on_sigterm() -> None:
    """Exit without an error status, which the main process would stop for: at once if SIGTERM comes from that process,
    as it does when a run has ended, and otherwise later. A thread waits, since handlers are not told the sender."""
    main = os.getppid()
    sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
    end = time.monotonic() + WORKER_STAYS
    while sender != main and time.monotonic() < end:
        again = signal.sigtimedwait({signal.SIGTERM}, max(0.0, end - time.monotonic()))
        sender = main if again is None else again.si_pid
    os._exit(0)


def agreement(asked: Callable[[], bool]) -> Callable[[], bool]:
    """Make the processes of a run agree: a signal may reach one of them, or several during different iterations.

    All processes must call this, and then the function that it returns equally often; each call waits for the others.
    It returns the same in all of them: whether ``asked`` returned True in any. In a run of one process, that is
    ``asked`` itself.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return asked
    group = dist.new_group(backend="gloo")  # on the CPU: a flag on the GPU would wait for its computations

    def asked_anywhere() -> bool:
        flag = torch.tensor(int(asked()))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        return bool(flag)

    return asked_anywhere


@contextmanager
def passing_signals_on() -> Iterator[Callable[[], bool]]:
    """Pass SIGINT and SIGTERM on to the processes that this one has started and waits for, instead of ending before
    they do. Yields a function that says whether there was one."""
    before, passed = {}, []

    def pass_on(number: int, frame: object) -> None:
        passed.append(number)
        for process in multiprocessing.active_children():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process.pid, number)

    try:
        before.update({number: signal.signal(number, pass_on) for number in SIGNALS})
        yield lambda: bool(passed)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
