"""The hook of MMEngine: what it sets, logs and notes; tests/tools/test_patch_schedules.py has runs."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

pytest.importorskip("mmengine", reason="this is a hook of MMEngine's Runner")

from mmengine.logging import MessageHub
from mmengine.registry import HOOKS

from apt_dense.hosts.mmseg import APTViT, patch_schedule_hook
from apt_dense.hosts.mmseg.patch_schedule_hook import PatchScheduleHook

from support.tiny_segmentors import SMALL


def runner(iteration: int, **options: Any) -> SimpleNamespace:
    """A stand-in for the Runner of a run of five iterations."""
    return SimpleNamespace(
        model=nn.Sequential(APTViT(**SMALL, **{"thresholds": (4.0, 2.0), **options})), iter=iteration, max_iters=5,
        cfg={}, _resume=True, message_hub=MessageHub.get_instance(uuid.uuid4().hex),
    )  # fmt: skip


def test_patches_follow_the_iteration() -> None:
    hook, run = HOOKS.build(dict(type="PatchScheduleHook", begin=0.25, end=0.75)), runner(3)
    hook.before_train(run)
    assert run.model[0].thresholds == (2.0, 1.0), "those of the iteration before, for an evaluation that is due"
    for run.iter, expected in enumerate([0.0, 0.0, 2.0, 4.0, 4.0]):
        hook.before_train_iter(run, 0)
        assert run.model[0].thresholds == (expected, expected / 2)
        assert run.message_hub.get_scalar("train/threshold_1").current() == expected
    run.iter = 0
    hook.before_train_iter(run, 0)
    hook.after_train(run)
    assert run.model[0].thresholds == (4.0, 2.0)


def test_another_schedule_than_the_checkpoint_s_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(patch_schedule_hook, "print_log", lambda words, *_, **__: said.append(words))
    before, checkpoint = PatchScheduleHook(end=0.5), {}
    before.before_save_checkpoint(runner(0), checkpoint)
    assert checkpoint == {}, "nothing is noted outside of training"
    before.before_train(runner(0))
    before.before_save_checkpoint(runner(0), checkpoint)
    for end in 0.5, 0.75:
        hook, run = PatchScheduleHook(end=end), runner(2)
        hook.after_load_checkpoint(run, checkpoint)
        hook.before_train(run)
        assert said == ([] if end == 0.5 else ["another patch schedule than before: end: 0.5, now 0.75"])
    fresh = runner(0)
    fresh._resume = False  # the weights of another run
    hook.after_load_checkpoint(fresh, checkpoint)
    hook.before_train(fresh)
    assert len(said) == 1


def test_runs_that_compile_need_few_budgets() -> None:
    run = runner(0, token_budget=0.7)
    run.cfg["compile"] = True
    with pytest.raises(ValueError, match="steps=None with a compiled model"):
        PatchScheduleHook().before_train(run)
    PatchScheduleHook(steps=3).before_train(run)
    assert run.model[0].token_budget == 1
