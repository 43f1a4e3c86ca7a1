"""MMEngine's Runner on damaged checkpoints, and on backbones that expect other images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor, BaseModel, ImgDataPreprocessor
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from apt_dense import APTViT
from apt_dense.hosts.mmseg.config_errors import ConfigError
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


class Segmentor(BaseModel):
    """A model of which nothing but the backbone and the preprocessor are looked at."""

    def __init__(self, preprocessor: BaseDataPreprocessor, **options: object) -> None:
        super().__init__(preprocessor)
        self.backbone = APTViT(img_size=32, embed_dim=12, depth=1, num_heads=2, thresholds=(5.5,), **options)

    def forward(self, *args: object, **options: object) -> None: ...


class Wrapped(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


PIXELS = {"pixel_mean": (127.5,) * 3, "pixel_std": (60.0,) * 3}


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped, lambda model: Wrapped(Wrapped(model))])
def test_backbones_expect_the_images_that_they_get(
    wrap: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in ("train", "test"):
        monkeypatch.setattr(Runner, step, lambda self, step=step: step)
    images = ImgDataPreprocessor(PIXELS["pixel_mean"], PIXELS["pixel_std"])
    APTRunner(wrap(Segmentor(images, **PIXELS)), str(tmp_path)).check_pixels(is_new=True)
    APTRunner(wrap(Segmentor(BaseDataPreprocessor())), str(tmp_path)).check_pixels(is_new=True)  # pipelines may
    runner, warned = APTRunner(wrap(Segmentor(images)), str(tmp_path)), []
    with pytest.raises(
        ConfigError, match=r"do not agree: images come with mean=\[127.5, .* undoes pixel_mean=.123.675"
    ):
        runner.train()
    monkeypatch.setattr(runner.logger, "warning", warned.append)
    assert runner.test() == "test"
    runner._resume = True
    assert runner.train() == "train"
    assert len(warned) == 2 and "undoes pixel_mean" in warned[0]
