"""Python processes in which nothing of this project or of its hosts has been imported.

Those of one run of pytest are forked from a server that has imported what all of them need and what takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import tempfile
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torchvision", "timm"])


def run_fresh(code: str) -> subprocess.CompletedProcess[str]:
    """Run code as ``__main__`` in a process that has imported torch, torchvision and timm, on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = _CONTEXT.Process(target=_run, args=(code, *files))
        process.start()
        process.join()
        return subprocess.CompletedProcess(code, process.exitcode, *(path.read_text() for path in files))


def _run(code: str, *files: Path) -> None:
    for descriptor, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), descriptor)
    exec(compile(code, "<fresh>", "exec"), {"__name__": "__main__"})
