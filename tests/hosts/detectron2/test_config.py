"""Reading and completing lazy configs: overrides, wrong files, machines without a GPU."""

from __future__ import annotations

import logging
import os

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from apt_dense.hosts.detectron2.config import apply_overrides, complete_config, load_config, logger

from support.tiny_coco import ADAPTIVE, ROOT, one_thread  # noqa: F401 (a fixture)


def test_overrides_keep_equals_signs_and_add_options_of_the_backbone() -> None:
    cfg = load_config(str(ADAPTIVE))
    weights = "train.init_checkpoint=a/b.pth?matching_heuristics=True"
    apply_overrides(cfg, [weights, "model.backbone.net.scorer=laplacian", "model.backbone.net.thresholds=[3.0]"])
    assert cfg.train.init_checkpoint == "a/b.pth?matching_heuristics=True"
    assert (cfg.model.backbone.net.scorer, list(cfg.model.backbone.net.thresholds)) == ("laplacian", [3.0])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.maxiter=3", "train has no 'maxiter'; it has .*max_iter"),
        ("max_iter=3", "the config has no 'max_iter'; it has dataloader"),
        ("--resume", "'--resume' is not key=value; options that begin with -- go before"),
    ],
)
def test_overrides_without_effect_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_overrides(load_config(str(ADAPTIVE)), [override])


@pytest.mark.parametrize(
    ("config", "message"),
    [("", "no config file"), ("gone.py", "no config file gone.py"),
     (str(ROOT / "configs" / "detectron2" / "mask_rcnn_apt_vitdet_b.yaml"), "is a yacs config.*add_apt_config")],
)  # fmt: skip
def test_config_must_be_a_lazy_one(config: str, message: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        load_config(config)


def test_without_a_gpu_it_runs_on_the_cpu_without_amp(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = load_config(str(ADAPTIVE))
    with caplog.at_level(logging.WARNING, logger.name):
        logger.addHandler(caplog.handler)
        complete_config(cfg)
        logger.removeHandler(caplog.handler)
    assert "train.device=cuda, but no GPU was found: running on the CPU without mixed precision" in caplog.text
    assert (cfg.train.device, cfg.train.amp.enabled) == ("cpu", False)
    assert cfg.dataloader.evaluator.output_dir == os.path.join(cfg.train.output_dir, "inference")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = load_config(str(ADAPTIVE))
    complete_config(cfg)
    assert (cfg.train.device, cfg.train.amp.enabled) == ("cuda", True)


def test_negative_seed_is_refused() -> None:
    cfg = load_config(str(ADAPTIVE))
    cfg.train.seed = -1
    with pytest.raises(ValueError, match="train.seed=-1"):
        complete_config(cfg)
