"""The first signal asks a run to stop, the second acts; forked workers leave Ctrl-C to their parent; the processes of a
run agree. tests/tools/test_interruptions.py stops whole runs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from apt_dense.hosts import interrupts
from apt_dense.hosts.interrupts import Stopped, agreement, outlive_sigterm, passing_signals_on, stop_requests


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with stop_requests() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
    assert signal.getsignal(number) is before


def test_a_second_signal_acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "ECHO", 0.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for jobs in the background
    with pytest.raises(KeyboardInterrupt), stop_requests():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_the_same_signal_from_terminal_and_launcher_is_one() -> None:
    with stop_requests() as asked:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert asked()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 7), (signal.SIGTERM, 143)])
def test_workers_ignore_ctrl_c_and_end_when_asked(number: int, status: int) -> None:
    with stop_requests() as asked:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), number)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
        assert not asked()


class Group(Dataset):
    """Its worker gets the signal that its job gets, and reads on."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        outlive_sigterm()
        if index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return index


def test_workers_of_torch_outlive_the_signal_that_stops_their_job() -> None:
    outlive_sigterm()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "only workers do"
    assert [int(index) for index in DataLoader(Group(), num_workers=1)] == [0, 1, 2]


@pytest.mark.parametrize("sender, stays", [("main process", 60), ("scheduler", 1)])
def test_a_worker_ends_without_an_error(monkeypatch: pytest.MonkeyPatch, sender: str, stays: int) -> None:
    """At once for the main process, which waits for it at its end (here a minute, were it to stay); soon for others."""
    monkeypatch.setattr(interrupts, "WORKER_STAYS", stays)
    monkeypatch.setattr(interrupts, "get_worker_info", lambda: "a worker")
    ready, child_end = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        outlive_sigterm()
        child_end.send(True)
        if sender == "scheduler":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        os._exit(7)
    assert ready.recv()
    if sender == "main process":
        os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_other_threads_are_left_alone() -> None:
    found = []

    def body() -> None:
        with stop_requests() as asked:
            found.append(asked())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [False] and issubclass(Stopped, KeyboardInterrupt)


def test_a_run_of_one_process_asks_nobody() -> None:
    def asked() -> bool:
        return True

    assert agreement(asked) is asked


def ask_thrice(rank: int, store: str, answers: Connection) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = iter([False, rank == 1, False])
    agreed = agreement(lambda: next(mine))
    answers.send([agreed() for _ in range(3)])
    dist.destroy_process_group()


def test_processes_agree(tmp_path: Path) -> None:
    """On a store in a file, so that no port is needed."""
    context, pipes = multiprocessing.get_context("fork"), [multiprocessing.Pipe() for _ in range(2)]
    for rank in range(2):
        context.Process(target=ask_thrice, args=(rank, str(tmp_path / "store"), pipes[rank][1])).start()
    assert [pipe.recv() if pipe.poll(60) else None for pipe, _ in pipes] == [[False, True, False]] * 2


def end_with_the_signal(ready: Connection) -> None:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(number))
    ready.send(True)
    time.sleep(60)


def test_signals_are_passed_on_to_started_processes() -> None:
    before, (ready, child_end) = signal.getsignal(signal.SIGINT), multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=end_with_the_signal, args=(child_end,))
    process.start()
    assert ready.recv()
    with passing_signals_on() as passed:
        assert not passed()
        os.kill(os.getpid(), signal.SIGINT)
        process.join(30)
    assert passed() and process.exitcode == signal.SIGINT and signal.getsignal(signal.SIGINT) is before
