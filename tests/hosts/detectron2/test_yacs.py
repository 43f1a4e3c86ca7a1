"""yacs configs: the same model as the lazy one, token budgets, a clear error without the node."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Instances

import apt_dense
from apt_dense.hosts.detectron2 import add_apt_config

from support.tiny_coco import ADAPTIVE, ROOT, TINY_YACS, one_thread, tiny_model  # noqa: F401 (a fixture)
from support.tiny_detectors import detect, photo, preprocessed

YAML = ROOT / "configs" / "detectron2" / "mask_rcnn_apt_vitdet_b.yaml"


def test_yacs_config_builds_the_same_model_as_the_lazy_one() -> None:
    cfg = get_cfg()
    add_apt_config(cfg)
    cfg.merge_from_file(str(YAML))
    cfg.merge_from_list(TINY_YACS)
    model, lazy = build_model(cfg).eval(), tiny_model(ADAPTIVE, "model.roi_heads.num_classes=3")
    net = model.backbone.net
    assert net.thresholds == (5.5, 4.0) and net.drop_padding and net.pixel_format == lazy.backbone.net.pixel_format
    shapes = [{name: value.shape for name, value in m.backbone.state_dict().items()} for m in (model, lazy)]
    assert shapes[0] == shapes[1]
    model.backbone.load_state_dict(lazy.backbone.state_dict())
    images = preprocessed(model, photo())
    assert torch.equal(images, preprocessed(lazy, photo()))
    with torch.no_grad():
        levels, expected = model.backbone(images), lazy.backbone(images)
    assert levels.keys() == expected.keys()
    assert all(torch.equal(levels[name], expected[name]) for name in expected)
    assert isinstance(detect(model), Instances)


def test_yacs_config_takes_a_token_budget() -> None:
    cfg = get_cfg()
    add_apt_config(cfg)
    cfg.merge_from_file(str(YAML))
    cfg.merge_from_list([*TINY_YACS, "MODEL.APT.TOKEN_BUDGET", 0.7, "MODEL.APT.ATTENTION_BACKEND", "mask"])
    cfg.merge_from_list(["MODEL.APT.PROPORTIONAL_ATTENTION", 0.5])
    model = build_model(cfg).eval()
    net = model.backbone.net
    assert net.token_budget == 0.7 and {block.attn.backend for block in net.blocks} == {"mask"}
    assert {block.attn.proportional for block in net.blocks} == {0.5}
    assert isinstance(detect(model), Instances)


def test_yacs_config_without_the_node_says_what_to_call() -> None:
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.NAME = "cpu", "build_apt_vit_sfp_backbone"
    with pytest.raises(ValueError, match=r"call add_apt_config\(cfg\)"):
        build_model(cfg)


def test_options_of_apt_alone_have_the_core_s_defaults() -> None:
    cfg, arguments = get_cfg(), inspect.signature(apt_dense.APTViT).parameters
    add_apt_config(cfg)
    found = {name: cfg.MODEL.APT[name.upper()] for name in ("thresholds", "token_budget", "scorer", "drop_padding")}
    assert found == {"thresholds": (), "token_budget": None, "scorer": "entropy", "drop_padding": False}
    assert found == {name: arguments[name].default for name in found}
    assert cfg.MODEL.APT.ATTENTION_BACKEND == "auto"
    assert cfg.MODEL.APT.PROPORTIONAL_ATTENTION == 0
