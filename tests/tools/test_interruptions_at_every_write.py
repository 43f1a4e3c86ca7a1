"""All three trainers killed at each write of a run, and at ten random moments: each run resumes, from what it had
saved, and ends with the losses and weights of the uninterrupted one.

About 270 short trainings, nine minutes on two cores; run by ``pytest -m slow -s`` and this file.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from support.file_writes import Write, die_at_write, read_writes, record_writes
from support.tiny_trainings import ITERATIONS, NAMES, Job, jobs, one_thread, run  # noqa: F401 (fixtures)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the hosts' own
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.slow,
]
MOMENTS = 10


class Whole(NamedTuple):
    """A run that nothing interrupts."""

    writes: list[Write]  # in the order of time
    seconds: float
    losses: dict[int, float]
    weights: dict[str, torch.Tensor]
    files: set[str]


def files_of(out: Path) -> set[str]:
    """What a run leaves in its folder, without the times in names of logs."""
    names = (str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    return {re.sub(r"\d{8}_\d{6}", "TIME", name) for name in names if "tfevents" not in name}


def run_whole(job: Job, out: Path) -> Whole:
    start = time.monotonic()
    assert run(job, out, False, record_writes(out, out.with_suffix(".writes"))) == (0, "")
    seconds = time.monotonic() - start
    return Whole(read_writes(out.with_suffix(".writes")), seconds, job.losses(out), job.weights(out), files_of(out))


def deaths_at_writes(writes: list[Write]) -> Iterator[tuple[int, str]]:
    for number, write in enumerate(writes):
        yield from ((number, when) for when in ("before", "after", *["torn"] * write.renames))


def checkpoints_written(job: Job, writes: list[Write]) -> int:
    return sum(write.renames and write.path.match(job.checkpoint) for write in writes)


def complaints(job: Job, out: Path, whole: Whole, saved: int, logs_late: bool) -> Iterator[str]:
    """Resume a run that was killed, and say what is not as it would have been.

    Args:
        saved: checkpoints that the killed run had completed, at least.
        logs_late: whether the line of an iteration is written after its checkpoint.
    """
    left = job.checkpoints(out)
    if saved and not left:
        yield "the only checkpoint is lost"
    for path in left:
        job.read(path)  # raises if it is damaged
    status, words = run(job, out, True, record_writes(out, out.with_suffix(".writes")))
    if (status, words) != (0, ""):
        yield f"resuming ended with {status}: {words}"
        return
    again = checkpoints_written(job, read_writes(out.with_suffix(".writes")))
    if again > checkpoints_written(job, whole.writes) - saved + 1:  # one may have been complete but not yet noted
        yield f"{again} checkpoints were written by the resumed run, though the killed one had written {saved}"
    losses, weights = job.losses(out), job.weights(out)
    if {step: whole.losses[step] for step in losses} != losses or len(losses) < ITERATIONS - logs_late:
        yield f"losses {losses}, not {whole.losses}"
    if weights.keys() != whole.weights.keys() or not all(map(torch.equal, weights.values(), whole.weights.values())):
        yield "other weights at the end"
    files = files_of(out)
    if files != whole.files:
        yield f"files {sorted(whole.files - files)} are missing, {sorted(files - whole.files)} are too many"


@pytest.fixture
def say(capsys: pytest.CaptureFixture) -> Callable[[str], None]:
    def shown(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    return shown


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_each_write(name: str, jobs: dict[str, Job], tmp_path: Path, say: Callable[[str], None]) -> None:
    job, out = jobs[name], tmp_path / "out"
    whole = run_whole(job, out)
    assert checkpoints_written(job, whole.writes) >= ITERATIONS
    found, deaths = [], list(deaths_at_writes(whole.writes))
    for number, when in deaths:
        shutil.rmtree(out)
        status, words = run(job, out, False, die_at_write(out, number, when))
        saved = checkpoints_written(job, whole.writes[: number + (when == "after")])
        wrong = [] if status == -signal.SIGKILL else [f"not killed: {status}, {words}"]
        wrong += complaints(job, out, whole, saved, logs_late=name == "det")
        where = f"{name}: {when} write {number}, {whole.writes[number].call} {whole.writes[number].path.name}"
        found += [f"{where}: {complaint}" for complaint in wrong]
        say(f"{where}: {'; '.join(wrong) or 'resumed, same losses and weights'}")
    say(f"{name}: {len(whole.writes)} writes, {len(deaths)} kills, {len(found)} complaints")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_random_moments(name: str, jobs: dict[str, Job], tmp_path: Path, say: Callable[[str], None]) -> None:
    job, out, rng = jobs[name], tmp_path / "out", random.Random(name)
    whole, found, kills = run_whole(job, out), [], 0
    while kills < MOMENTS:
        shutil.rmtree(out)
        seconds = rng.uniform(0, whole.seconds)
        log = out.with_suffix(".writes")
        status, words = run(job, out, False, record_writes(out, log), kill_after=seconds)
        if status == 0:  # faster than the first
            continue
        kills += 1
        saved = checkpoints_written(job, read_writes(log)[:-1])  # the last may not have happened any more
        wrong = [] if status == -signal.SIGKILL else [f"not killed: {status}, {words}"]
        out.mkdir(exist_ok=True)
        wrong += complaints(job, out, whole, saved, logs_late=name == "det")
        found += [f"{name}: killed after {seconds:.2f} s: {complaint}" for complaint in wrong]
        say(f"{name}: killed after {seconds:.2f} s with {saved} saved: {'; '.join(wrong) or 'resumed, same losses'}")
    say(f"{name}: {kills} kills at random moments, {len(found)} complaints")
    assert not found, "\n".join(found)
