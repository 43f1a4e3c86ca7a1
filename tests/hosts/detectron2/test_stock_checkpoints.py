"""Checkpoints of Detectron2's own models, from its trainer and from its zoo, in ours."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.modeling import SimpleFeaturePyramid as PlainFeaturePyramid
from detectron2.modeling import ViT
from torch import nn

import apt_dense
from apt_dense.hosts.detectron2 import APTViT

from support.references import randomise
from support.tiny_coco import ADAPTIVE, UNIFORM, one_thread, tiny_config, tiny_model  # noqa: F401 (a fixture)
from support.tiny_detectors import detect

STOCK = ("model.backbone._target_=detectron2.modeling.SimpleFeaturePyramid", "model.roi_heads.num_classes=3",
         "model.roi_heads.box_predictor.test_score_thresh=0.0")  # fmt: skip


def stock_model() -> nn.Module:
    """Detectron2's own Mask R-CNN with random parameters: the uniform config without our parts."""
    cfg = tiny_config(UNIFORM, *STOCK)
    cfg.model.backbone.net._target_ = ViT
    for key in ("thresholds", "drop_padding", "pixel_mean", "pixel_std", "channel_order"):
        cfg.model.backbone.net.pop(key)
    return randomise(instantiate(cfg.model), std=0.05)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """The stock model, and a folder with its weights in Detectron2's format, model.pth, and in its zoo's, model.pkl."""
    model, folder = stock_model(), tmp_path_factory.mktemp("stock")
    DetectionCheckpointer(model, str(folder)).save("model")
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    (folder / "model.pkl").write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2"}))
    return model, folder


def load(model: nn.Module, path: str) -> Any:
    """Load with Detectron2's checkpointer; returns the names that were missing and unexpected."""
    checkpointer, reports = DetectionCheckpointer(model), []
    checkpointer._log_incompatible_keys = reports.append
    checkpointer.load(path)
    (report,) = reports
    assert not report.incorrect_shapes
    return report


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
def test_stock_checkpoint_gives_the_same_detections(stock: tuple[nn.Module, Path], name: str) -> None:
    theirs, folder = stock
    ours = tiny_model(UNIFORM, *STOCK[1:])
    report = load(ours, str(folder / name))
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    expected, found = detect(theirs), detect(ours)
    assert len(found) == len(expected) >= 20
    assert torch.equal(found.pred_classes, expected.pred_classes)
    assert torch.allclose(found.scores, expected.scores, atol=1e-5)
    assert torch.allclose(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-3)
    assert (found.pred_masks != expected.pred_masks).float().mean() < 1e-3


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
def test_only_the_documented_parameters_are_missing_in_a_stock_checkpoint(stock: tuple, name: str) -> None:
    ours = tiny_model(ADAPTIVE, *STOCK[1:])
    report = load(ours, str(stock[1] / name))
    new = {f"backbone.net.coarse_embed.{layer}.{kind}" for layer in ("down", "zero") for kind in ("weight", "bias")}
    assert set(report.missing_keys) == new and report.unexpected_keys == []
    assert not ours.backbone.net.coarse_embed.zero.weight.any()
    assert len(detect(ours)) > 0


def test_stock_config_needs_its_one_line_changed_and_no_other(stock: tuple[nn.Module, Path]) -> None:
    one_line = "model.backbone.net._target_=apt_dense.hosts.detectron2.APTViT"
    ours = tiny_model(UNIFORM, *STOCK, one_line)
    assert type(ours.backbone) is PlainFeaturePyramid and type(ours.backbone.net) is APTViT
    load(ours, str(stock[1] / "model.pth"))
    assert torch.allclose(detect(ours).scores, detect(stock[0]).scores, atol=1e-5)


def test_mae_weights_go_to_the_backbone_by_matching_heuristics(tmp_path: Path) -> None:
    source = randomise(apt_dense.APTViT(embed_dim=48, depth=2, num_heads=2, class_token=True, final_norm=True))
    torch.save({"model": source.state_dict()}, tmp_path / "mae.pth")
    ours = tiny_model(ADAPTIVE)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    report = load(ours, f"{tmp_path / 'mae.pth'}?matching_heuristics=True")
    assert set(report.unexpected_keys) == {"cls_token", "norm.weight", "norm.bias"}
    for name, value in ours.state_dict().items():
        from_mae = source.state_dict().get(name.removeprefix("backbone.net."))
        taken = name.startswith("backbone.net.") and from_mae is not None
        assert torch.equal(value, from_mae if taken else before[name]), name
        assert (name in report.missing_keys) != taken
