"""One run at a time in a folder; locks of processes that have ended are taken over."""

from __future__ import annotations

import multiprocessing
import os
import socket
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from apt_dense.hosts.locks import NAME, lock_folder

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, pipe: Connection) -> None:
    """Lock a folder until something is sent."""
    with lock_folder(folder):
        pipe.send("locked")
        pipe.recv()


def holder(folder: Path) -> tuple[BaseProcess, Connection]:
    """Another process, which has locked the folder."""
    pipe, other = FORK.Pipe()
    process = FORK.Process(target=hold, args=(folder, other))
    process.start()
    assert pipe.recv() == "locked"
    return process, pipe


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    process, pipe = holder(tmp_path / "new")
    expected = f"another run, process {process.pid} on .*choose another folder"
    with pytest.raises(FileExistsError, match=expected), lock_folder(tmp_path / "new"):
        pass
    pipe.send("free")
    process.join()
    with lock_folder(tmp_path / "new"):
        assert [path.name for path in (tmp_path / "new").iterdir()] == [NAME]
    assert list((tmp_path / "new").iterdir()) == []


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    process, _ = holder(tmp_path)
    process.kill()
    process.join()
    with lock_folder(tmp_path):
        assert f" {os.getpid()}" in (tmp_path / NAME).read_text()


def test_what_a_killed_run_has_half_written_goes_with_its_lock(tmp_path: Path) -> None:
    process, _ = holder(tmp_path)
    names = {f"iter_2.pth.{process.pid}.partial", f"last_checkpoint.{process.pid}.partial"}
    others = {f"iter_2.pth.{os.getpid()}.partial", f"iter_2.pth.1{process.pid}.partial", "iter_1.pth", "x.partial"}
    for name in names | others:
        (tmp_path / name).touch()
    process.kill()
    process.join()
    with lock_folder(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {NAME, *others}


@pytest.mark.parametrize("content", ["", "damaged", "{host} 999999999 5", "{host} {pid} 5", "{host} x y"])
def test_stale_and_damaged_locks_are_taken_over(content: str, tmp_path: Path) -> None:
    """Also where another process has the number now."""
    (tmp_path / NAME).write_text(content.format(host=socket.gethostname(), pid=os.getpid()))
    with lock_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_locks_of_other_machines_stay(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("elsewhere 1 2")
    expected = "process 1 on elsewhere.*if it is gone, remove"
    with pytest.raises(FileExistsError, match=expected), lock_folder(tmp_path):
        pass


def test_an_error_inside_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock_folder(tmp_path):
        raise KeyError
    assert not (tmp_path / NAME).exists()
