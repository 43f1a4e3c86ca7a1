"""MMEngine's Runner on damaged checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config
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


def test_runs_of_the_same_second_have_logs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda *args: "20260101_000000")
    config = tmp_path / "same.py"
    config.write_text("")
    folders = []
    for name in ("first", "second"):
        cfg = Config.fromfile(config)
        cfg.visualizer = {"type": "Visualizer", "vis_backends": [{"type": "LocalVisBackend"}]}
        options = {"cfg": cfg, "visualizer": cfg.visualizer, "default_scope": "mmseg"}
        runner = APTRunner(torch.nn.Linear(1, 1), str(tmp_path / name), **options)
        runner.visualizer.add_scalar("loss", 1.0, 1)
        folders.append([path.parent.parent.parent.name for path in tmp_path.glob("*/*/vis_data/scalars.json")])
    assert folders[0] == ["first"] and sorted(folders[1]) == ["first", "second"]
