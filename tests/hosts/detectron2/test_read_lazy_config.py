"""Reading and completing lazy configs: overrides, wrong files, machines without a GPU."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from omegaconf import OmegaConf

from apt_dense.hosts.detectron2.read_lazy_config import (
    apply_overrides,
    check_parts,
    complete_config,
    load_config,
    logger,
)

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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(", "SyntaxError"),
        ("from .nowhere import model", "cannot be read"),
        ("import nowhere_at_all", "ModuleNotFoundError"),
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
    ],
)
def test_configs_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(ValueError, match="own.py") as raised:
        load_config(str(path))
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks model, dataloader, train, which training needs"),
        ("model = dict(a=1)\ndataloader = dict(b=1)", "lacks train, which training needs"),
        ("model = 3\ndataloader = dict(b=1)\ntrain = dict(seed=0)", "lacks model, which training needs"),
    ],
)
def test_configs_without_the_main_parts(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        check_parts(load_config(str(path)), training=True)


@pytest.mark.parametrize("text", ["model: {_target_: a", "- _target_"])
def test_yaml_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"own.yaml cannot be read as a lazy config"):
        load_config(str(path))


@pytest.mark.parametrize("override", ["model.backbone.net.depth=[1", "train.seed.x.y=1", "model.backbone.net.depth={"])
def test_overrides_that_do_not_fit(override: str) -> None:
    with pytest.raises(ValueError, match=r"the overrides .* do not fit: ") as raised:
        apply_overrides(load_config(str(ADAPTIVE)), [override])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("removed", "training", "message"),
    [
        ("dataloader.train", True, "lacks dataloader.train, which training needs"),
        ("optimizer", True, "lacks optimizer, which training needs"),
        ("lr_multiplier", True, "lacks lr_multiplier, which training needs"),
        ("dataloader.test", True, "lacks dataloader.test, which training needs"),
        ("dataloader.test", False, "lacks dataloader.test, which --eval-only needs"),
        ("dataloader.evaluator", False, "lacks dataloader.evaluator, which --eval-only needs"),
    ],
)
@pytest.mark.parametrize("none", [True, False])
def test_missing_parts_are_named(removed: str, training: bool, message: str, none: bool) -> None:
    cfg = load_config(str(ADAPTIVE))
    parent, _, key = removed.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    node[key] = None
    if not none:
        del node[key]
    with pytest.raises(ValueError, match=message):
        check_parts(cfg, training)


def test_parts_that_are_not_needed_may_be_missing() -> None:
    cfg = load_config(str(ADAPTIVE))
    del cfg.dataloader["evaluator"], cfg.dataloader["test"]
    check_parts(cfg, training=True)
    cfg = load_config(str(ADAPTIVE))
    del cfg.dataloader["train"], cfg["optimizer"]
    check_parts(cfg, training=False)


def test_evaluators_may_be_a_list_or_none() -> None:
    cfg = load_config(str(ADAPTIVE))
    cfg.dataloader.evaluator = [cfg.dataloader.evaluator]
    complete_config(cfg)
    assert cfg.dataloader.evaluator[0].output_dir == os.path.join(cfg.train.output_dir, "inference")
    cfg.dataloader.evaluator = None
    complete_config(cfg)
