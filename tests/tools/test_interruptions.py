"""Runs of all three trainers that are killed, stopped, or meet a full disk, with a single checkpoint kept: what was
saved stays, and the resumed run has the losses of the uninterrupted one.

The tools run in forked processes, which share the imports of this one.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("mmseg", reason="runs the tools of all hosts")
pytest.importorskip("detectron2", reason="runs the tools of all hosts")

import cv2
import train_det
import train_det_torchvision
import train_seg

from apt_dense.hosts.locks import lock_folder
from apt_dense.hosts.mmseg.checkpoints import read_run
from apt_dense.hosts.mmseg.training_config import load_config
from apt_dense.hosts.torchvision import run_model as model
from apt_dense.weights.files import read_checkpoint

from support import coco_folder, tiny_coco
from support.tiny_ade import CONFIGS, one_thread, shrink_options, write_ade  # noqa: F401 (a fixture)

pytestmark = pytest.mark.filterwarnings("ignore")  # the hosts' own

ITERATIONS = 6
TOOLS = coco_folder.TOOLS


class Job(NamedTuple):
    """A trainer, its arguments for a folder, and how its checkpoints and losses are read."""

    main: Callable
    argv: Callable[[Path, bool], list[str]]  # out, resume
    checkpoint: str  # pattern
    losses: Callable[[Path], dict[int, float]]


def read_lines(paths: list[Path]) -> list[dict]:
    """The entries of logs of one JSON object a line; a line may have been cut off."""
    entries = []
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
    return entries


def seg_losses(out: Path) -> dict[int, float]:
    lines = read_lines(sorted(out.glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime_ns))
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def det_losses(out: Path) -> dict[int, float]:
    lines = read_lines([out / "metrics.json"])
    return {line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line}


def torchvision_losses(out: Path) -> dict[int, float]:
    return {line["iteration"]: line["loss"] for line in read_lines([out / "log.jsonl"]) if "loss" in line}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    folder = tmp_path_factory.mktemp("jobs")
    real = next(path for path in CONFIGS if path.name.startswith("upernet_apt_vit-b16"))
    options = {"train_cfg.val_interval": 100, "default_hooks.logger.interval": 1, "model.backbone.drop_path_rate": 0.2}
    saving = {"default_hooks.checkpoint.interval": 1, "default_hooks.checkpoint.max_keep_ckpts": 1}
    load_config(str(real), {**shrink_options(real), **options, **saving}).dump(folder / "tiny.py")
    ade, coco = write_ade(folder / "ade", images=3), tiny_coco.write_coco(folder / "coco", images=3)
    ours = coco_folder.write_coco(folder / "ours", images=3)
    seg = [str(folder / "tiny.py"), "--data-root", str(ade), "--max-iters", str(ITERATIONS)]
    det = ["--config-file", str(tiny_coco.ADAPTIVE), "--data-root", str(coco)]
    det_options = [
        *tiny_coco.SHRINK_MASK_RCNN, "train.log_period=1", f"train.max_iter={ITERATIONS}", "train.eval_period=0",
        "train.checkpointer.period=1", "train.checkpointer.max_to_keep=1", "optimizer.lr=0.002",
    ]  # fmt: skip
    tv = [str(ours), *coco_folder.TINY, "--iterations", str(ITERATIONS), "--save-every", "1"]
    return {
        "seg": Job(train_seg.main, lambda out, resume: [*seg, "--work-dir", str(out), *["--resume"] * resume],
                   "iter_*.pth", seg_losses),
        "det": Job(train_det.main, lambda out, resume: [*det, *["--resume"] * resume, *det_options,
                                                        f"train.output_dir={out}"], "model_*.pth", det_losses),
        "torchvision": Job(train_det_torchvision.main, lambda out, resume: [*tv, "--out", str(out),
                                                                            *["--resume"] * resume],
                           "last.pth", torchvision_losses),
    }  # fmt: skip


def run(job: Job, out: Path, resume: bool = False, prepare: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Run a tool in a forked process; return its exit status (negative: the signal that ended it) and last words."""
    said = out.with_suffix(".txt")
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text()
    code = 99
    try:
        words = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        cv2.setNumThreads(0)
        model.PRESETS["tiny"] = coco_folder.TINY_PRESET
        prepare()
        job.main(job.argv(out, resume))
        code = 0
    except SystemExit as ended:
        code = 1
        os.write(words, str(ended.code).encode())
    except BaseException as error:
        code = 130 if type(error) is KeyboardInterrupt else 98
        os.write(words, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(code)


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


def die_at_write(number: int, when: str) -> Callable[[], None]:
    """Kill the process before or after it renames its n-th checkpoint, or in the middle of writing it."""

    def prepare() -> None:
        replace, count = os.replace, iter(range(10**6))

        def replace_or_die(source: Path, target: Path) -> None:
            mine = str(target).endswith((".pth", "last_checkpoint")) and next(count) == number
            if mine and when == "middle":
                os.truncate(source, os.path.getsize(source) // 2)
            if mine and when != "after":
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace_or_die

    return prepare


def die_after(seconds: float) -> Callable[[], None]:
    def prepare() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    return prepare


def checkpoints(job: Job, out: Path) -> list[Path]:
    return sorted(out.glob(job.checkpoint))


@pytest.mark.parametrize("name", ["seg", "det", "torchvision"])
def test_killed_at_each_write_and_at_random_moments(
    name: str, jobs: dict[str, Job], whole: dict[str, dict[int, float]], tmp_path: Path
) -> None:
    job, out, rng = jobs[name], tmp_path / "out", random.Random(name)
    out.mkdir()
    deaths = [die_at_write(n, when) for n, when in ((0, "middle"), (1, "before"), (1, "after"), (2, "middle"))]
    deaths += [die_at_write(2, "before"), *(die_after(rng.uniform(0.2, 2.5)) for _ in range(4))]
    saved = False
    for death in deaths:
        status, words = run(job, out, out.exists(), death)
        assert status in (-signal.SIGKILL, -signal.SIGALRM, 0), words
        left = checkpoints(job, out)
        assert left or not saved, "the only checkpoint is lost"
        saved = bool(left)
        for path in left:
            assert "partial" not in path.name
            try:
                job_reads(name, path)
            except ValueError as error:
                pytest.fail(str(error))
    assert run(job, out, True) == (0, "")
    found = job.losses(out)
    assert found == pytest.approx({step: whole[name][step] for step in found}, rel=1e-5)
    # Detectron2 logs an iteration after its checkpoint, so a kill between the two loses a line, though no iteration.
    assert len(found) == ITERATIONS or (name == "det" and len(found) >= ITERATIONS - 3)


def job_reads(name: str, path: Path) -> None:
    (read_run if name == "seg" else read_checkpoint)(path)


@pytest.mark.parametrize("name", ["seg", "det", "torchvision"])
def test_a_signal_ends_the_run_with_a_checkpoint(
    name: str, jobs: dict[str, Job], whole: dict[str, dict[int, float]], tmp_path: Path
) -> None:
    job, out = jobs[name], tmp_path / "out"

    def prepare() -> None:
        replace = os.replace

        def replace_and_signal(source: Path, target: Path) -> None:
            replace(source, target)
            if str(target).endswith(".pth") and not Path(f"{out}.asked").exists():
                Path(f"{out}.asked").touch()
                os.kill(os.getpid(), signal.SIGINT)

        os.replace = replace_and_signal

    status, words = run(job, out, False, prepare)
    assert (status, words) == (130, "KeyboardInterrupt: stopped after iteration 1; add --resume to continue") or (
        name == "torchvision" and (status, words) == (0, "")  # main returns None
    )
    assert len(checkpoints(job, out)) == 1 and not list(out.glob("*.lock"))
    assert run(job, out, True) == (0, "")
    assert job.losses(out) == pytest.approx(whole[name], rel=1e-5)


@pytest.mark.parametrize("name", ["seg", "det", "torchvision"])
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
    [left] = checkpoints(job, out)
    job_reads(name, left)
    assert not list(out.rglob("*.partial")) and not list(out.glob("*.lock"))
    assert run(job, out, True) == (0, "")


@pytest.mark.parametrize("name", ["seg", "det", "torchvision"])
def test_a_second_run_in_the_folder_is_refused(name: str, jobs: dict[str, Job], tmp_path: Path) -> None:
    job, out = jobs[name], tmp_path / "out"
    out.mkdir()
    with lock_folder(out):
        status, words = run(job, out)
    assert status == 1 and "another run, process" in words and "\n" not in words, words


@pytest.mark.parametrize("tool", sorted(path.name for path in TOOLS.glob("*.py")))
def test_ctrl_c_during_the_imports_ends_in_a_line(tool: str) -> None:
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
