"""Hooks of runs: outdated checkpoints go last, what is loaded must fit; tests/tools/test_interruptions.py has runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("mmengine", reason="these are hooks of MMEngine's Runner")

from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.runner import IterBasedTrainLoop

from apt_dense.hosts.interrupts import Stopped
from apt_dense.hosts.mmseg.runner_hooks import (
    APTCheckpointHook,
    CheckLoadedWeights,
    DueEvaluationHook,
    StopHook,
    use_hooks,
)
from apt_dense.weights.files import CheckpointError


class FakeRunner(SimpleNamespace):
    """A stand-in for a Runner that records which files exist while it saves."""

    def __init__(self, folder: Path) -> None:
        hub = MessageHub.get_instance(f"hooks-{folder.name}-{id(self)}")
        logger = SimpleNamespace(info=lambda *_: None, warning=lambda *_: None)
        super().__init__(work_dir=str(folder), message_hub=hub, logger=logger, iter=0, epoch=0, hooks=[], seen=[])

    def save_checkpoint(self, folder: str, filename: str, *args: Any, **kwargs: Any) -> None:
        self.seen.append(sorted(path.name for path in Path(folder).glob("*.pth")))
        Path(folder, filename).write_text("weights")


def hook(runner: FakeRunner, **options: Any) -> APTCheckpointHook:
    made = APTCheckpointHook(by_epoch=False, interval=1, **options)
    made.before_train(runner)
    return made


@pytest.mark.parametrize("kept", [1, 2])
def test_the_old_checkpoint_is_there_until_the_new_one_is(kept: int, tmp_path: Path) -> None:
    runner = FakeRunner(tmp_path)
    saving = hook(runner, max_keep_ckpts=kept)
    for runner.iter in range(4):
        saving._save_checkpoint(runner)
        assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / f"iter_{runner.iter + 1}.pth")
    assert [len(names) for names in runner.seen] == [0, 1, min(2, kept), min(3, kept)]
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == [f"iter_{n}.pth" for n in range(5 - kept, 5)]
    saving._save_checkpoint(runner)  # the same step again
    assert (tmp_path / "iter_4.pth").is_file()


@pytest.mark.parametrize("best", ["mIoU", ["mIoU", "aAcc"]])
def test_the_old_best_is_there_until_the_new_one_is(best: Any, tmp_path: Path) -> None:
    runner = FakeRunner(tmp_path)
    saving = hook(runner, max_keep_ckpts=1, save_best=best, rule="greater")
    for score in (1.0, 2.0, 1.5, 3.0):
        runner.iter += 1
        runner.seen.clear()
        before = sorted(p.name for p in tmp_path.glob("best*"))
        saving._save_best_checkpoint(runner, {"mIoU": score, "aAcc": score})
        assert all(set(before) <= set(names) for names in runner.seen[:1])
    names = ["best_mIoU_iter_4.pth"] if best == "mIoU" else ["best_aAcc_iter_4.pth", "best_mIoU_iter_4.pth"]
    assert sorted(p.name for p in tmp_path.glob("best*")) == names
    saving._save_best_checkpoint(runner, {"mIoU": 9.0, "aAcc": 9.0})  # the same name again
    assert sorted(p.name for p in tmp_path.glob("best*")) == names


def test_a_failed_write_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeRunner(tmp_path)
    saving = hook(runner, max_keep_ckpts=1)
    saving._save_checkpoint(runner)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    runner.iter, runner.save_checkpoint = 1, fail
    with pytest.raises(OSError, match="disk full"):
        saving._save_checkpoint(runner)
    assert [p.name for p in tmp_path.glob("*.pth")] == ["iter_1.pth"]
    assert (tmp_path / "last_checkpoint").read_text().endswith("iter_1.pth")


def test_what_a_killed_run_did_not_remove_goes_when_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = FakeRunner(tmp_path)
    saving = hook(runner, max_keep_ckpts=1)
    saving._save_checkpoint(runner)
    runner.iter = 1

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(APTCheckpointHook, "_remove", die)
        saving._save_checkpoint(runner)
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["iter_1.pth", "iter_2.pth"]
    resumed = hook(runner, max_keep_ckpts=1)
    assert [p.name for p in tmp_path.glob("*.pth")] == ["iter_2.pth"] and list(resumed.keep_ckpt_ids) == [2]


@pytest.mark.parametrize(
    ("done", "begin", "intervals", "due"),
    [(0, 1, [2], False), (1, 1, [2], False), (2, 1, [2], True), (2, 3, [2], False), (3, 1, [2, 3], True),
     (4, 1, [2, 3], False), (5, 1, [2], True)],
)  # fmt: skip
def test_an_evaluation_that_a_resumed_run_missed_is_made(
    done: int, begin: int, intervals: list[int], due: bool
) -> None:
    """Intervals may change at the third iteration; the fifth is the last."""
    found: list[int] = []
    loop = object.__new__(IterBasedTrainLoop)
    loop._iter, loop.val_begin = done, begin
    loop.dynamic_milestones, loop.dynamic_intervals = [0, 3][: len(intervals)], intervals
    evaluation = SimpleNamespace(run=lambda: found.append(done))
    for val_loop in (evaluation, None):
        runner = SimpleNamespace(iter=done, max_iters=5, val_loop=val_loop, train_loop=loop)
        DueEvaluationHook().before_train_epoch(runner)
    assert found == [done] * due
    DueEvaluationHook().before_train_epoch(
        SimpleNamespace(iter=done, max_iters=5, val_loop=evaluation, train_loop=object())
    )
    assert found == [done] * due, "epoch-based loops must not restart"


@pytest.mark.parametrize("saved", [True, False])
def test_a_stopped_run_saves_once(saved: bool, tmp_path: Path) -> None:
    runner = FakeRunner(tmp_path)
    saving = hook(runner, max_keep_ckpts=2)
    runner.hooks = [saving]
    StopHook(lambda: False).after_train_iter(runner)
    if saved:
        saving._save_checkpoint(runner)
    with pytest.raises(Stopped) as stopped:
        StopHook(lambda: True).after_train_iter(runner)
    assert stopped.value.args == (1,) and len(runner.seen) == 1


@pytest.mark.parametrize("whole", [True, False])
def test_loaded_weights_must_fit(whole: bool) -> None:
    model, check = torch.nn.Linear(2, 2), CheckLoadedWeights(whole)
    runner = SimpleNamespace(model=model, _load_from="x.pth")
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    check.after_load_checkpoint(runner, {"state_dict": state})
    for other in ({"state_dict": {"other": torch.ones(1)}}, {"weight": torch.ones(3)}, {0: torch.ones(1)}, {}):
        with pytest.raises(CheckpointError, match="x.pth"):
            check.after_load_checkpoint(runner, other)
    del state["module.bias"]
    if whole:
        with pytest.raises(CheckpointError, match=r"1 missing \(bias\)"):
            check.after_load_checkpoint(runner, {"state_dict": state})
    else:
        check.after_load_checkpoint(runner, {"state_dict": state})


@pytest.mark.parametrize("hook_config, expected", [
    ({"type": "CheckpointHook"}, {"type": "APTCheckpointHook", "backend_args": {"backend": "apt_atomic"}}),
    ({"interval": 2}, {"interval": 2, "type": "APTCheckpointHook", "backend_args": {"backend": "apt_atomic"}}),
    ({"type": "CheckpointHook", "backend_args": {"backend": "petrel"}},
     {"type": "APTCheckpointHook", "backend_args": {"backend": "petrel"}}),
    ({"type": "TheirHook"}, {"type": "TheirHook"}),
])  # fmt: skip
def test_mmengine_s_hook_is_replaced(hook_config: dict, expected: dict) -> None:
    cfg = Config(dict(default_hooks=dict(checkpoint=hook_config), resume=True))
    use_hooks(cfg)
    use_hooks(cfg)
    assert cfg.default_hooks.checkpoint == expected
    assert cfg.custom_hooks == [{"type": "CheckLoadedWeights", "whole": True}]
