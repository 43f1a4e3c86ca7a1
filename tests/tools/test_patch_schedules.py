"""Schedules of patches in all three trainers: a run that is interrupted and resumed has the losses, thresholds and
validations of one that is not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from support.tiny_trainings import (  # noqa: F401 (fixtures)
    ITERATIONS,
    NAMES,
    Job,
    interrupt_at_step,
    jobs,
    one_thread,
    read_lines,
    run,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the hosts' own
    pytest.mark.usefixtures("one_thread"),
]


def scheduled(name: str, job: Job, folder: Path) -> Job:
    """The job with thresholds that rise over the whole run; the segmentor is validated in its middle."""
    added = {
        "det": ["train.patch_schedule={end:1.0}", "train.expected_tokens=0.5"],
        "torchvision": ["--anneal", "0", "1"],
        "seg": [],
    }[name]

    def argv(out: Path, resume: bool) -> list[str]:
        config, *others = job.argv(out, resume)
        return [str(folder / "scheduled.py") if name == "seg" else config, *others, *added]

    if name == "seg":
        (folder / "scheduled.py").write_text(
            f"_base_ = {job.argv(folder, False)[0]!r}\n"
            f"custom_hooks = [dict(type='PatchScheduleHook', end=1.0)]\n"
            "train_cfg = dict(val_interval=2)\n"
        )
    return job._replace(argv=argv)


def logged(name: str, out: Path) -> dict[int, Mapping[str, float]]:
    """The losses, thresholds and shares of tokens that were logged, by iteration."""
    files = {"seg": "*/vis_data/scalars.json", "det": "metrics.json", "torchvision": "log.jsonl"}[name]
    keys = "loss", "total_loss", "threshold_1", "threshold_2", "tokens_kept", "mIoU"
    found: dict[int, dict[str, float]] = {}
    for line in read_lines(sorted(out.glob(files), key=lambda path: path.stat().st_mtime_ns)):
        # A validation logs the step that it follows.
        values = {f"val_{key}" if "mIoU" in line else key: line[key] for key in keys if key in line}
        if values:
            found.setdefault(line.get("step", line.get("iteration")), {}).update(values)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_where_it_was(name: str, jobs: dict[str, Job], tmp_path: Path) -> None:
    job = scheduled(name, jobs[name], tmp_path)
    assert run(job, tmp_path / "whole") == (0, "")
    whole = logged(name, tmp_path / "whole")
    entries = [whole[step] for step in sorted(whole) if "threshold_1" in whole[step]]
    assert len(entries) == ITERATIONS
    assert [entry["threshold_1"] for entry in entries] == pytest.approx([5.5 * i / 3 for i in range(4)])
    assert [entry["threshold_2"] for entry in entries] == pytest.approx([4 * i / 3 for i in range(4)])
    assert entries[0]["tokens_kept"] == 1 and all(entry["tokens_kept"] < 1 for entry in entries[1:])
    out = tmp_path / "out"
    run(job, out, False, partial(interrupt_at_step, 2))
    [path] = job.checkpoints(out)
    noted = job.read(path)
    if name == "seg":
        assert noted["patch_schedule"]["iterations"] == ITERATIONS
        assert "val_tokens_kept" in whole[2] and "val_tokens_kept" not in logged(name, out)[2]
    elif name == "det":
        assert noted["trainer"]["hooks"]["PatchScheduleHook"]["thresholds"] == [5.5, 4.0]
    assert run(job, out, True) == (0, "")
    resumed = logged(name, out)
    assert resumed.keys() == whole.keys()
    for step, entry in whole.items():
        assert resumed[step] == pytest.approx(entry, rel=1e-5), step


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_annealed_is_said_in_a_line(name: str, jobs: dict[str, Job], tmp_path: Path) -> None:
    job = scheduled(name, jobs[name], tmp_path)
    if name == "det":
        wrong = job._replace(argv=lambda out, resume: [*job.argv(out, resume), "train.expected_tokens=60"])
        assert run(wrong, tmp_path / "wrong") == (
            1, "train_det: train.expected_tokens: expected=60 must be a share of the tokens, above 0 and at most 1"
        )  # fmt: skip
    uniform = {
        "seg": ["--cfg-options", "model.backbone.thresholds=()"],
        "det": ["model.backbone.net.thresholds=[]"],
        "torchvision": ["--thresholds", "none"],
    }[name]
    refused = job._replace(argv=lambda out, resume: [*job.argv(out, resume), *uniform])
    code, words = run(refused, tmp_path / "out")
    assert code == 1 and "a schedule has nothing to anneal" in words and "\n" not in words, (code, words)
