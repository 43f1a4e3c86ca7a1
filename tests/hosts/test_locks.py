"""One run at a time in a folder; locks of processes that have ended are taken over."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from apt_dense.hosts.locks import NAME, lock_folder

HOLD = """
import sys
from apt_dense.hosts.locks import lock_folder
with lock_folder(sys.argv[1]):
    print(1, flush=True)
    input()
"""


def holder(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert process.stdout.readline() == b"1\n"
    return process


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    process = holder(tmp_path / "new")
    expected = f"another run, process {process.pid} on .*choose another folder"
    with pytest.raises(FileExistsError, match=expected), lock_folder(tmp_path / "new"):
        pass
    process.communicate(b"\n")
    with lock_folder(tmp_path / "new"):
        assert [path.name for path in (tmp_path / "new").iterdir()] == [NAME]
    assert list((tmp_path / "new").iterdir()) == []


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock_folder(tmp_path):
        assert f" {os.getpid()}" in (tmp_path / NAME).read_text()


def test_what_a_killed_run_has_half_written_goes_with_its_lock(tmp_path: Path) -> None:
    process = holder(tmp_path)
    names = {f"iter_2.pth.{process.pid}.partial", f"last_checkpoint.{process.pid}.partial"}
    others = {f"iter_2.pth.{os.getpid()}.partial", f"iter_2.pth.1{process.pid}.partial", "iter_1.pth", "x.partial"}
    for name in names | others:
        (tmp_path / name).touch()
    process.kill()
    process.wait()
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
