"""Runs of all three trainers that are killed, stopped, or meet a full disk, with a single checkpoint kept: what was
saved stays, and the resumed run has the losses of the uninterrupted one.

This is a sample; tests/tools/test_interruptions_at_every_write.py kills at each write and at random moments.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from apt_dense.hosts.locks import lock_folder

from support.coco_folder import TOOLS
from support.file_writes import Write, die_at_write, read_writes, record_writes
from support.tiny_trainings import (  # noqa: F401 (fixtures)
    ITERATIONS,
    NAMES,
    Job,
    interrupt_at_step,
    jobs,
    one_thread,
    run,
    run_processes,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the hosts' own
    pytest.mark.usefixtures("one_thread"),
]
PORT = 20_000 + os.getpid() % 10_000


@pytest.fixture(scope="module")
def whole(jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, float]]:
    """The losses of runs that nothing interrupts."""
    found = {}
    for name, job in jobs.items():
        out = tmp_path_factory.mktemp("whole") / name
        assert run(job, out) == (0, ""), name
        found[name] = job.losses(out)
        assert len(found[name]) == ITERATIONS and len(set(found[name].values())) == ITERATIONS
    return found


def is_checkpoint(write: Write) -> bool:
    return write.renames and write.path.name.endswith((".pth", "last_checkpoint"))


@pytest.mark.parametrize("name", NAMES)
def test_killed_while_it_saves(
    name: str, jobs: dict[str, Job], whole: dict[str, dict[int, float]], tmp_path: Path
) -> None:
    """Three times in one folder."""
    job, out = jobs[name], tmp_path / "out"
    second = 1 if name == "torchvision" else 2  # the others note the name of each
    for number, when in (second, "torn"), (0, "before"), (0, "after"):
        assert run(job, out, out.exists(), die_at_write(out, number, when, is_checkpoint)) == (-signal.SIGKILL, "")
        assert job.checkpoints(out), "the only checkpoint is lost"
        for path in job.checkpoints(out):
            job.read(path)
    assert run(job, out, True) == (0, "")
    found = job.losses(out)
    assert found == pytest.approx({step: whole[name][step] for step in found}, rel=1e-5)
    # Detectron2 logs an iteration after its checkpoint, so a kill between the two loses a line, though no iteration.
    assert len(found) == ITERATIONS or (name == "det" and len(found) == ITERATIONS - 1)


def stopped_after(iteration: int) -> tuple[int, str]:
    """Exit status and last words of a run that was stopped."""
    return 130, f"KeyboardInterrupt: stopped after iteration {iteration}; add --resume to continue"


def checkpoint_names(job: Job, log: Path) -> list[str]:
    """The checkpoints that a process has written."""
    return [w.path.name for w in read_writes(log) if w.renames and w.path.match(job.checkpoint)]


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_ends_the_run_with_a_checkpoint(
    name: str, jobs: dict[str, Job], whole: dict[str, dict[int, float]], tmp_path: Path
) -> None:
    job, out, log = jobs[name], tmp_path / "out", tmp_path / "writes"

    def prepare() -> None:
        record_writes(out, log)()
        interrupt_at_step(2)

    ended = run(job, out, False, prepare)
    assert ended == ((0, "") if name == "torchvision" else stopped_after(2))  # whose main returns None
    assert len(checkpoint_names(job, log)) == 2  # one was due at each iteration: none is written twice
    assert len(job.checkpoints(out)) == 1 and not list(out.glob("*.lock"))
    assert run(job, out, True) == (0, "")
    assert job.losses(out) == pytest.approx(whole[name], rel=1e-5)


WORKERS = {
    "seg": ["--cfg-options", "train_dataloader.num_workers=2"],
    "det": ["dataloader.train.num_workers=2"],
    "torchvision": ["--workers", "2"],
}


@pytest.mark.parametrize("name", NAMES)
def test_sigterm_to_all_processes_of_a_run_ends_it_as_to_one(
    name: str, jobs: dict[str, Job], whole: dict[str, dict[int, float]], tmp_path: Path
) -> None:
    """As schedulers and `kill -- -GROUP` send it, also to the workers that read data."""
    job, out, errors = jobs[name], tmp_path / "out", tmp_path / "errors"
    job = job._replace(argv=lambda out, resume, argv=job.argv: [*argv(out, resume), *WORKERS[name]])

    def prepare() -> None:
        os.setpgid(0, 0)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        interrupt_at_step(2, lambda: os.killpg(0, signal.SIGTERM))

    ended = run(job, out, False, prepare)
    assert ended == ((0, "") if name == "torchvision" else stopped_after(2))
    assert "Traceback" not in errors.read_text() and not list(out.glob("*.lock")) and not list(out.glob("errors.log"))
    assert run(job, out, True) == (0, "")
    assert job.losses(out) == pytest.approx(whole[name], rel=1e-5)


def emptied(state: dict) -> None:
    state["state"] = {}


def shortened(state: dict) -> None:
    del state["state"][max(state["state"])]


def torn(state: dict) -> None:
    del state["state"][max(state["state"])]["exp_avg"]


def resized(state: dict) -> None:
    entry = state["state"][max(state["state"])]
    entry["exp_avg"] = entry["exp_avg"].flatten()[1:]


@pytest.mark.parametrize("name", NAMES)
def test_optimizers_that_are_not_whole_are_refused(name: str, jobs: dict[str, Job], tmp_path: Path) -> None:
    """torch begins anew where a state lacks something."""
    job, out = jobs[name], tmp_path / "out"
    run(job, out, False, partial(interrupt_at_step, 2))
    (path,) = job.checkpoints(out)
    for damage, message in (
        (emptied, "has 0 states"), (shortened, "some were taken out"), (torn, "lacks parts"), (resized, "exp_avg"),
    ):  # fmt: skip
        content = dict(job.read(path))
        damage(content["trainer"]["optimizer"] if name == "det" else content["optimizer"])
        shutil.copytree(out, copy := tmp_path / damage.__name__)
        torch.save(content, copy / path.name)
        if name == "seg":
            (copy / "last_checkpoint").write_text(str(copy / path.name))
        code, said = run(job, copy, True)
        assert code == 1 and "cannot be continued from" in said and message in said and "\n" not in said, (code, said)


def start_seg(job: Job, out: Path, rank: int) -> None:
    """As torchrun does."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT), "WORLD_SIZE": "2"}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
    saving = ["--cfg-options", "default_hooks.checkpoint.interval=100"]
    job.main([*job.argv(out, False), "--launcher", "pytorch", *saving])


def start_det(job: Job, out: Path, rank: int) -> None:
    """As Detectron2's launch does."""
    import train_det
    from detectron2.engine.launch import _distributed_worker

    args = train_det.parse_args([*job.argv(out, False), "train.checkpointer.period=100"])
    _distributed_worker(rank, train_det.main_worker, 2, 2, 0, f"file://{out}.store", (args,))


@pytest.mark.parametrize("name", NAMES[:2])
def test_several_processes_stop_at_the_same_iteration(name: str, jobs: dict[str, Job], tmp_path: Path) -> None:
    start = start_seg if name == "seg" else start_det
    job, out, logs = jobs[name], tmp_path / "out", [tmp_path / "0.writes", tmp_path / "1.writes"]

    def main(rank: int) -> None:
        record_writes(out, logs[rank])()
        if rank == 1:  # which writes nothing
            interrupt_at_step(2)
        start(job, out, rank)

    ended = run_processes([partial(main, rank) for rank in range(2)], out)
    # Detectron2's launch drops what all but the first process of a run say.
    assert ended == [stopped_after(2), (130, "") if name == "seg" else stopped_after(2)]
    [path] = job.checkpoints(out)
    assert checkpoint_names(job, logs[0]) == [path.name] and checkpoint_names(job, logs[1]) == []
    assert job.read(path) and not list(out.glob("*.lock"))


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_named_and_the_last_checkpoint_stays(name: str, jobs: dict[str, Job], tmp_path: Path) -> None:
    """A limit on the size of files, set after the first checkpoint, stands for the disk."""
    job, out = jobs[name], tmp_path / "out"

    def prepare() -> None:
        replace = os.replace

        def replace_and_fill(source: Path, target: Path) -> None:
            replace(source, target)
            if str(target).endswith(("last_checkpoint", "last.pth")):
                resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))

        os.replace = replace_and_fill

    status, words = run(job, out, False, prepare)
    assert status == 1 and "\n" not in words and "cannot be written" in words and "MB free" in words, words
    assert str(out) in words and ".pth" in words
    [left] = job.checkpoints(out)
    job.read(left)
    assert not list(out.rglob("*.partial")) and not list(out.glob("*.lock"))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_in_the_folder_is_refused(name: str, jobs: dict[str, Job], tmp_path: Path) -> None:
    job, out = jobs[name], tmp_path / "out"
    out.mkdir()
    with lock_folder(out):
        status, words = run(job, out)
    assert status == 1 and "another run, process" in words and "\n" not in words, words


@pytest.mark.parametrize("tool", sorted(path.name for path in TOOLS.glob("*.py")))
def test_ctrl_c_during_the_imports_ends_in_a_line(tool: str) -> None:
    if tool == "train_det.py":
        pytest.importorskip("detectron2", reason="without Detectron2 the tool says so before the signal comes")
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", str(TOOLS / tool), "--help"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(TOOLS.parent)},
    )  # fmt: skip
    lines = iter(process.stderr.readline, "")
    if not any("shared.interrupts" in line for line in lines):
        pytest.fail("the tool does not import shared.interrupts first")
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    words = [line for line in lines if not line.startswith("import time:")]
    assert process.wait() == 130 and words == [f"{tool.removesuffix('.py')}: stopped\n"]
