"""The hook of MMEngine that warns of another share of tokens."""

from __future__ import annotations

import uuid
from types import SimpleNamespace

import pytest
from torch import nn

pytest.importorskip("mmengine", reason="this is a hook of MMEngine's Runner")

from mmengine.logging import MessageHub
from mmengine.registry import HOOKS

from apt_dense.hosts import token_drift
from apt_dense.hosts.mmseg import APTViT, token_drift_hook
from apt_dense.hosts.mmseg.patch_schedule_hook import PatchScheduleHook

from support.tiny_segmentors import SMALL


def test_a_share_far_from_the_expected_one_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_drift, "WINDOW", 2)
    said: list[str] = []
    monkeypatch.setattr(token_drift_hook, "print_log", lambda words, *_, **__: said.append(words))
    hub, hook = MessageHub.get_instance(uuid.uuid4().hex), HOOKS.build(dict(type="TokenDriftHook", expected=0.6))
    schedule = PatchScheduleHook(end=0.5)
    model = nn.Sequential(APTViT(**SMALL, thresholds=(4.0,)))
    runner = SimpleNamespace(
        model=model, iter=0, max_iters=9, cfg={}, _resume=False, message_hub=hub, hooks=[schedule, hook]
    )
    hook.after_train_iter(runner, 0)  # a compiled model logs nothing
    schedule.before_train(runner)
    for runner.iter in range(9):
        hub.update_scalar("train/tokens_kept", 0.9)
        hook.after_train_iter(runner, 0)
        assert len(said) == (runner.iter >= 5), "the target holds from iteration 4 on"
    assert "keeps 90.0% of the tokens" in said[0]
