"""Trainings of seconds with each of the three trainers, in forked processes, which share the imports of this one."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

pytest.importorskip("mmseg", reason="runs the tools of all hosts")

import cv2
import matplotlib.pyplot  # noqa: F401 (MMEngine imports it late; no forked process has to)
import train_det_torchvision
import train_seg

from apt_dense.hosts.mmseg.safe_checkpoints import read_run
from apt_dense.hosts.mmseg.training_config import load_config
from apt_dense.hosts.torchvision import build_detector as model
from apt_dense.weights.files import read_checkpoint

from support import coco_folder
from support.tiny_ade import CONFIGS, one_thread, shrink_options, write_ade  # noqa: F401 (a fixture)

HAS_DETECTRON2 = importlib.util.find_spec("detectron2") is not None
if HAS_DETECTRON2:
    import train_det

    from support import tiny_coco

NAMES = [
    "seg",
    pytest.param("det", marks=pytest.mark.skipif(not HAS_DETECTRON2, reason="Detectron2 is built from source")),
    "torchvision",
]
ITERATIONS = 4  # each saves a checkpoint, and one is kept


class Job(NamedTuple):
    """A trainer, its arguments for a folder, and how its checkpoints and losses are read."""

    main: Callable
    argv: Callable[[Path, bool], list[str]]  # out, resume
    checkpoint: str  # pattern
    last: str  # checkpoint of the last iteration
    losses: Callable[[Path], dict[int, float]]
    read: Callable[[Path], Mapping]

    def checkpoints(self, out: Path) -> list[Path]:
        """The checkpoints in a run's folder."""
        return sorted(out.glob(self.checkpoint))

    def weights(self, out: Path) -> Mapping[str, Tensor]:
        """The weights of a finished run."""
        content = self.read(out / self.last)
        return content["state_dict" if self.main is train_seg.main else "model"]


def make_jobs(folder: Path) -> dict[str, Job]:
    """Write data and configs to a folder; without Detectron2, only those of the two others."""
    return {"seg": _seg(folder), "torchvision": _torchvision(folder)} | (
        {"det": _det(folder)} if HAS_DETECTRON2 else {}
    )


def _seg(folder: Path) -> Job:
    real = next(path for path in CONFIGS if path.name.startswith("linear_apt_vit-b16"))
    options = {"train_cfg.val_interval": 100, "default_hooks.logger.interval": 1, "model.backbone.drop_path_rate": 0.2}
    saving = {"default_hooks.checkpoint.interval": 1, "default_hooks.checkpoint.max_keep_ckpts": 1}
    load_config(str(real), {**shrink_options(real), **options, **saving}).dump(folder / "tiny.py")
    data = write_ade(folder / "ade", images=3)
    argv = [str(folder / "tiny.py"), "--data-root", str(data), "--max-iters", str(ITERATIONS)]
    return Job(
        train_seg.main, lambda out, resume: [*argv, "--work-dir", str(out), *["--resume"] * resume],
        "iter_*.pth", f"iter_{ITERATIONS}.pth", _seg_losses, read_run,
    )  # fmt: skip


def _det(folder: Path) -> Job:
    data = tiny_coco.write_coco(folder / "coco", images=3)
    argv = ["--config-file", str(tiny_coco.ADAPTIVE), "--data-root", str(data)]
    options = [
        *tiny_coco.SHRINK_MASK_RCNN, "train.log_period=1", f"train.max_iter={ITERATIONS}", "train.eval_period=0",
        "train.checkpointer.period=1", "train.checkpointer.max_to_keep=1", "optimizer.lr=0.002",
    ]  # fmt: skip
    return Job(
        train_det.main, lambda out, resume: [*argv, *["--resume"] * resume, *options, f"train.output_dir={out}"],
        "model_*.pth", "model_final.pth", _det_losses, read_checkpoint,
    )  # fmt: skip


def _torchvision(folder: Path) -> Job:
    data = coco_folder.write_coco(folder / "ours", images=3)
    argv = [str(data), *coco_folder.TINY, "--iterations", str(ITERATIONS), "--save-every", "1"]
    return Job(
        train_det_torchvision.main, lambda out, resume: [*argv, "--out", str(out), *["--resume"] * resume],
        "last.pth", "last.pth", _torchvision_losses, read_checkpoint,
    )  # fmt: skip


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


def _seg_losses(out: Path) -> dict[int, float]:
    lines = read_lines(sorted(out.glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime_ns))
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def _det_losses(out: Path) -> dict[int, float]:
    lines = read_lines([out / "metrics.json"])
    return {line["iteration"] + 1: line["total_loss"] for line in lines if "total_loss" in line}


def _torchvision_losses(out: Path) -> dict[int, float]:
    return {line["iteration"] + 1: line["loss"] for line in read_lines([out / "log.jsonl"]) if "loss" in line}


def run(
    job: Job,
    out: Path,
    resume: bool = False,
    prepare: Callable[[], None] = lambda: None,
    kill_after: float | None = None,
) -> tuple[int, str]:
    """Run a tool in a forked process; return its exit status (negative: the signal that ended it) and last words.

    Args:
        prepare: called in the process before the tool.
        kill_after: seconds until the process gets SIGKILL.
    """
    said = out.with_suffix(".txt")
    child = _fork(lambda: job.main(job.argv(out, resume)), said, prepare)
    if kill_after is not None:
        _kill_after(child, kill_after)
    return _wait(child, said)


def run_processes(mains: Sequence[Callable[[], None]], out: Path) -> list[tuple[int, str]]:
    """Run the processes of one training; return the exit status and last words of each."""
    words = [out.with_suffix(f".{rank}.txt") for rank in range(len(mains))]
    children = [_fork(main, said) for main, said in zip(mains, words, strict=True)]
    return [_wait(child, said) for child, said in zip(children, words, strict=True)]


def _fork(main: Callable[[], None], said: Path, prepare: Callable[[], None] = lambda: None) -> int:
    said.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _run_forked(main, said, prepare)
    return child


def _wait(child: int, said: Path) -> tuple[int, str]:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, said.read_text() if said.exists() else ""


def _kill_after(child: int, seconds: float) -> None:
    """Kill a child that is still running after some seconds; it stays to be waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)


def _run_forked(main: Callable[[], None], said: Path, prepare: Callable[[], None]) -> None:
    code, words = 99, ""
    try:
        gc.freeze()  # collecting what the parent left takes half a second each time
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        cv2.setNumThreads(0)
        model.PRESETS["tiny"] = coco_folder.TINY_PRESET
        prepare()
        main()
        code = 0
    except SystemExit as ended:
        code, words = (ended.code, "") if isinstance(ended.code, int) else (1, str(ended.code))
    except BaseException as error:
        code, words = 130 if type(error) is KeyboardInterrupt else 98, f"{type(error).__name__}: {error}"
    finally:
        said.write_text(words)
        os._exit(code)


def interrupt_at_step(number: int, send: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGINT)) -> None:
    """Send this process a signal at its n-th step of an optimizer."""
    steps = itertools.count(1)

    def interrupt(*_: object) -> None:
        if next(steps) == number:
            send()

    register_optimizer_step_post_hook(interrupt)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    return make_jobs(tmp_path_factory.mktemp("jobs"))
