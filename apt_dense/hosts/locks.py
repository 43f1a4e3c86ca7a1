"""One run at a time in a folder."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apt_dense.weights.files import remove_partial_files

NAME = "run.lock"


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if needed, by a file that says which process is in it.

    The lock of a process that has ended, however it ended, is taken over, and files that it had half written are
    removed.

    Raises:
        FileExistsError: if another run uses the folder.
    """
    path = Path(folder) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    _take(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _take(path: Path) -> None:
    for _ in range(2):
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            _remove_stale(path)
            continue
        with os.fdopen(file, "w", encoding="utf-8") as lock:
            lock.write(_me())
        return
    raise FileExistsError(f"{path} was taken by another run at the same moment; choose another folder")


def _remove_stale(path: Path) -> None:
    """Remove the lock of a process that has ended, or raise."""
    found = path.read_text(encoding="utf-8").split()
    host, pid = (found[0], found[1]) if len(found) > 1 and found[1].isdigit() else (socket.gethostname(), "0")
    if host != socket.gethostname() or (pid != "0" and _identity(int(pid)) == " ".join(found[1:])):
        raise FileExistsError(
            f"another run, process {pid} on {host}, writes to {path.parent}; wait for it, or choose another folder "
            f"(if it is gone, remove {path})"
        )
    # Only one of several processes that find a stale lock can rename it.
    stale = path.with_name(f"{NAME}.{os.getpid()}")
    try:
        path.rename(stale)
    except FileNotFoundError:
        return
    remove_partial_files(path.parent, int(pid))
    stale.unlink()


def _me() -> str:
    return f"{socket.gethostname()} {_identity(os.getpid())}"


def _identity(pid: int) -> str | None:
    """Tell a process from others that had its number before; None if there is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # there is one, of another user
        pass
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:  # other systems than Linux
        return str(pid)
    return None if state in "ZX" else f"{pid} {fields[18]}"  # clock ticks at its start
