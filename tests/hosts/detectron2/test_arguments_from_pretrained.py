"""Weights files that describe Detectron2's backbones: in constructors, lazy configs, yacs configs and the tool."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from detectron2.config import LazyCall, LazyConfig, get_cfg, instantiate
from detectron2.modeling import ViT, build_model
from omegaconf import DictConfig, OmegaConf

from apt_dense.hosts.detectron2 import APTViT, SimpleFeaturePyramid, add_apt_config
from apt_dense.hosts.detectron2.arguments_from_pretrained import fill_in_config
from apt_dense.weights.files import CheckpointError

from support.families import HEADS, WIDTH, timm_model
from support.references import noise, randomise
from support.tiny_coco import ROOT, one_thread  # noqa: F401 (a fixture)

YAML = ROOT / "configs" / "detectron2" / "mask_rcnn_apt_vitdet_b.yaml"
WINDOWS = {"window_size": 2, "window_block_indexes": (0,), "use_rel_pos": True}


@pytest.fixture
def dinov2(tmp_path: Path) -> Path:
    torch.save(dict(timm_model("dinov2").state_dict()), tmp_path / "dinov2.pth")
    return tmp_path / "dinov2.pth"


@pytest.fixture
def mae(tmp_path: Path) -> Path:
    torch.save({"model": dict(timm_model("mae").state_dict())}, tmp_path / "mae.pth")
    return tmp_path / "mae.pth"


@torch.inference_mode()
def test_a_file_tells_the_arguments(mae: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = timm_model("mae")
    with caplog.at_level("INFO", "detectron2.apt_dense"):
        model = APTViT(pretrained=str(mae), num_heads=HEADS, out_feature="map").eval()
    assert f"APTViT weights from {mae}: {len(theirs.state_dict())} loaded" in caplog.text
    images = noise(1, 3, 64, 64)
    expected = theirs.forward_features(images)[:, 1:].mT
    torch.testing.assert_close(model(images)["map"].flatten(2), expected, atol=1e-4, rtol=0)
    with pytest.raises(CheckpointError, match=r"mae\.pth: .* do not tell num_heads\. Add num_heads"):
        APTViT(pretrained=str(mae))


@torch.inference_mode()
def test_detectron2s_own_weights_give_its_values(tmp_path: Path) -> None:
    options = {"img_size": 128, "embed_dim": 48, "depth": 2, "num_heads": 3, "pretrain_img_size": 64, **WINDOWS}
    theirs = randomise(ViT(**options, norm_layer=partial(nn.LayerNorm, eps=1e-6)))
    torch.save({"model": {f"backbone.net.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "x.pth")
    model = APTViT(pretrained=str(tmp_path / "x.pth")).eval()
    assert model.window_size == 2 and model.img_size == (128, 128) and model.pos_grid == (4, 4)
    for size in ((128, 128), (96, 160)):
        images = noise(1, 3, *size)
        found, expected = model(images)["last_feat"], theirs(images)["last_feat"]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_vitdet_from_a_classifier(mae: Path) -> None:
    """Windows leave no place for the class token; positions keep the size of their pre-training."""
    model = APTViT(128, pretrained=str(mae), num_heads=HEADS, norm_layer=partial(nn.LayerNorm, eps=1e-3), **WINDOWS)
    assert model.cls_token is None and model.pos_grid == (4, 4) and model.img_size == (128, 128)
    assert model.block_options.norm_eps == 1e-3
    assert torch.equal(model.blocks[1].mlp.fc1.weight, timm_model("mae").blocks[1].mlp.fc1.weight)
    assert not model.blocks[0].attn.rel_pos_h.any()


def test_a_model_that_is_given_is_loaded(mae: Path) -> None:
    options = {"img_size": 64, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "class_token": True}
    model = APTViT(**options, pretrained=str(mae), pretrain_img_size=64)
    assert torch.equal(model.cls_token, timm_model("mae").cls_token)
    with pytest.raises(CheckpointError, match=r"mae\.pth: .*; set depth=2 \(now 3\)"):
        APTViT(**{**options, "depth": 3}, pretrained=str(mae))


def test_patches_that_no_pyramid_takes_are_refused_before_anything_is_built(
    dinov2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__init__", lambda self: pytest.fail("a module was built"))
        with pytest.raises(CheckpointError, match=r"patches of 14 pixels, .* Add patch_size=16, which resamples them"):
            APTViT(pretrained=str(dinov2), num_heads=HEADS)
    model = APTViT(pretrained=str(dinov2), num_heads=HEADS, patch_size=16)
    levels = SimpleFeaturePyramid(model, "last_feat", 16, (4.0, 2.0, 1.0, 0.5))(noise(1, 3, 64, 96))
    assert [tuple(level.shape[2:]) for level in levels.values()] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    kept = APTViT(pretrained=str(dinov2), num_heads=HEADS, patch_size=14)
    assert kept.patch_size == 14
    with pytest.raises(ValueError, match=r"cannot be built on patches of 14 pixels: .* patch_size=16"):
        SimpleFeaturePyramid(kept, "last_feat", 16, (4.0, 2.0, 1.0, 0.5))


def test_the_signature_is_detectron2s() -> None:
    names = list(inspect.signature(APTViT.__init__).parameters)
    assert names[:4] == ["self", "img_size", "patch_size", "in_chans"] and "pretrained" in names
    with pytest.raises(TypeError, match="positional"):
        APTViT(*range(40))


# ---- lazy configs


def lazy(pretrained: Path, **options: Any) -> DictConfig:
    net = LazyCall(APTViT)(pretrained=str(pretrained), num_heads=HEADS, thresholds=(5.0,), **options)
    pyramid = LazyCall(SimpleFeaturePyramid)(
        net=net, in_feature="last_feat", out_channels=16, scale_factors=(4.0, 2.0, 1.0, 0.5)
    )
    return OmegaConf.create({"model": {"backbone": pyramid}}, flags={"allow_objects": True})


def test_a_lazy_config_is_completed_and_can_be_saved(dinov2: Path, tmp_path: Path) -> None:
    cfg = lazy(dinov2, patch_size=16, drop_padding=True)
    fill_in_config(cfg, keep_weights=True)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    loaded = instantiate(LazyConfig.load(str(tmp_path / "config.yaml")).model.backbone).net
    assert torch.equal(loaded.blocks[0].attn.qkv.weight, timm_model("dinov2").blocks[0].attn.qkv.weight)
    assert loaded.patch_size == 16 and loaded.drop_padding and loaded.thresholds == (5.0,)
    before = OmegaConf.to_container(cfg, resolve=False)
    fill_in_config(cfg, keep_weights=True)
    assert OmegaConf.to_container(cfg, resolve=False) == before


def test_a_run_s_config_needs_no_weights(dinov2: Path, tmp_path: Path) -> None:
    cfg = lazy(dinov2, patch_size=16)
    fill_in_config(cfg, keep_weights=False)
    dinov2.unlink()
    assert instantiate(cfg.model.backbone).net.embed_dim == WIDTH


@pytest.mark.parametrize(
    ("options", "message"), [({}, "Add patch_size=16"), ({"patch_size": 14}, "cannot be built on")]
)
def test_lazy_configs_are_refused_before_anything_is_built(dinov2: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill_in_config(lazy(dinov2, **options), keep_weights=True)


def test_lazy_configs_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.pth"):
        fill_in_config(lazy(tmp_path / "none.pth"), keep_weights=True)


@pytest.mark.parametrize("model", [{}, {"backbone": {"net": {"_target_": "torch.nn.Linear", "pretrained": "x.pth"}}}])
def test_other_lazy_configs_stay(model: dict) -> None:
    cfg = OmegaConf.create({"model": model})
    fill_in_config(cfg, keep_weights=False)
    assert cfg.model == model


def test_rotary_positions_can_be_saved(tmp_path: Path) -> None:
    torch.save(dict(timm_model("eva02 base", patch_size=16, img_size=64).state_dict()), tmp_path / "eva.pth")
    cfg = lazy(tmp_path / "eva.pth", img_size=64)
    fill_in_config(cfg, keep_weights=True)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    net = instantiate(LazyConfig.load(str(tmp_path / "config.yaml")).model.backbone).net
    assert net.rotary.ref_feat_shape == (16, 16) and net.blocks[0].attn.qkv is None


# ---- yacs


def yacs(*options: Any) -> nn.Module:
    cfg = get_cfg()
    add_apt_config(cfg)
    cfg.merge_from_file(str(YAML))
    small = ["MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", 8, "MODEL.APT.IMG_SIZE", 64, "MODEL.APT.WINDOW_SIZE", 2]
    small += ["MODEL.APT.WINDOW_BLOCK_INDEXES", (0,), "MODEL.APT.PYRAMID.SQUARE_PAD", 64]
    small += ["MODEL.APT.THRESHOLDS", (5.0,), "MODEL.APT.DROP_PATH_RATE", 0.0]
    cfg.merge_from_list([*small, *options])
    return build_model(cfg).backbone.net


def test_yacs_configs(dinov2: Path) -> None:
    file = ["MODEL.APT.PRETRAINED.FILE", str(dinov2), "MODEL.APT.PRETRAINED.NUM_HEADS", HEADS]
    net = yacs(*file, "MODEL.APT.PRETRAINED.PATCH_SIZE", 16)
    assert (net.embed_dim, net.depth, net.patch_size, net.window_size) == (WIDTH, 2, 16, 2)
    assert torch.equal(net.blocks[1].mlp.fc2.weight, timm_model("dinov2").blocks[1].mlp.fc2.weight)
    with pytest.raises(ValueError, match="Add patch_size=16"):
        yacs(*file)
    with pytest.raises(ValueError, match=r"do not tell num_heads.*given in MODEL\.APT\.PRETRAINED: .*NUM_HEADS"):
        yacs(*file[:2], "MODEL.APT.PRETRAINED.PATCH_SIZE", 16)


def test_a_file_in_place_of_the_node_is_refused() -> None:
    cfg = get_cfg()
    add_apt_config(cfg)
    cfg.merge_from_file(str(YAML))
    cfg.MODEL.APT.PRETRAINED = "dinov2.pth"
    with pytest.raises(ValueError, match=r"'dinov2\.pth' is a node; set MODEL\.APT\.PRETRAINED\.FILE"):
        build_model(cfg)


def test_yacs_answers(tmp_path: Path) -> None:
    torch.save(dict(randomise(timm_model("openai clip")).state_dict()), tmp_path / "clip.pth")
    answers = {"FILE": str(tmp_path / "clip.pth"), "NUM_HEADS": HEADS, "ACT_LAYER": "quick_gelu", "NO_ROTARY": True}
    options = [part for name, value in answers.items() for part in (f"MODEL.APT.PRETRAINED.{name}", value)]
    net = yacs(*options)
    assert net.block_options.act_layer == "quick_gelu" and net.rotary is None
