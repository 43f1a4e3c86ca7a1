"""MMEngine's Runner on damaged checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from apt_dense.hosts.mmseg.runner_with_checked_resume import APTRunner
from apt_dense.weights.files import CheckpointError


@pytest.mark.parametrize("meta", [{}, {"epoch": 0}, [], None], ids=str)
def test_damaged_parts_are_named_with_their_file(meta: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = APTRunner.__new__(APTRunner)
    monkeypatch.setattr(runner, "load_checkpoint", lambda *args, **options: {"meta": meta}, raising=False)
    monkeypatch.setattr(APTRunner, "train_loop", torch.nn.Module())
    path = tmp_path / "iter_1.pth"
    with pytest.raises(CheckpointError, match=f"^{path} cannot be continued from: a part of it is damaged"):
        runner.resume(str(path))


def test_configs_can_name_it() -> None:
    assert RUNNERS.get("APTRunner") is APTRunner and issubclass(APTRunner, Runner)
