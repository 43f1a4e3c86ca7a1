"""Pretrained weights of the MMSeg backbone: from files, timm's names, segmentors; refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

pytest.importorskip("mmseg", reason="the MMSeg host needs the packages of the extra 'mmseg'")

from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from mmseg.registry import MODELS

from apt_dense.hosts.mmseg import APTViT
from apt_dense.hosts.mmseg.arguments_from_pretrained import fill_in_config
from apt_dense.options import Rotary
from apt_dense.weights.files import CheckpointError

from support.references import randomise
from support.tiny_segmentors import (  # noqa: F401 (a fixture)
    FCN,
    SMALL,
    backbone,
    half_flat,
    loaded,
    mmseg_scope,
    mmseg_vit,
    segmentor,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # MMSeg's own


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(backbone(1).state_dict(), path)
    return path


@pytest.mark.parametrize("argument", ["pretrained", "init_cfg", "prefix"])
def test_pretrained_weights(weights: Path, argument: str) -> None:
    if argument == "pretrained":
        model = backbone(pretrained=str(weights))
    elif argument == "init_cfg":
        model = backbone(init_cfg={"type": "Pretrained", "checkpoint": str(weights)})
    else:
        state = {f"student.encoder.{name}": value for name, value in torch.load(weights).items()}
        torch.save({"state_dict": state, "meta": {}}, weights)
        model = backbone(init_cfg={"type": "Pretrained", "checkpoint": str(weights), "prefix": "student.encoder"})
    assert not loaded(model)
    model.init_weights()
    assert loaded(model) and model.is_init


def test_a_home_directory_is_understood(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(weights.parent))
    model = backbone(pretrained="~/weights.pth")
    model.init_weights()
    assert loaded(model)


def test_weights_of_mmsegs_vit_with_resized_positions(tmp_path: Path) -> None:
    vit, path = mmseg_vit(img_size=64), tmp_path / "vit.pth"
    torch.save({"state_dict": vit.state_dict()}, path)
    model = backbone(class_token=True, pretrained=str(path))
    model.init_weights()
    assert torch.equal(model.blocks[1].mlp.fc1.weight, vit.layers[1].ffn.layers[0][0].weight)
    assert torch.equal(model.pos_embed[:, 0], vit.pos_embed[:, 0])


def test_wrong_prefix_is_named(weights: Path) -> None:
    model = backbone(init_cfg={"type": "Pretrained", "checkpoint": str(weights), "prefix": "encoder."})
    with pytest.raises(ValueError, match="no weight of the checkpoint starts with prefix='encoder.'"):
        model.init_weights()


@pytest.mark.parametrize("strict", [True, False])
def test_weights_that_do_not_fit(weights: Path, strict: bool) -> None:
    state = torch.load(weights)
    state["blocks.0.ls1.gamma"] = torch.ones(16)
    torch.save(state, weights)
    model = backbone(init_cfg={"type": "Pretrained", "checkpoint": str(weights), "strict": strict})
    if strict:
        with pytest.raises(ValueError, match=r"weights\.pth: .*1 unexpected \(blocks\.0\.ls1\.gamma\)"):
            model.init_weights()
        assert not loaded(model)
    else:
        model.init_weights()
        assert loaded(model)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.pth does not exist"):
        backbone(pretrained=str(tmp_path / "none.pth")).init_weights()


def test_checkpoints_of_mmengine_load_without_running_pickled_code(tmp_path: Path) -> None:
    """Runner.save_checkpoint writes a whole segmentor and log buffers of numpy numbers."""
    hub = MessageHub("log of a training")
    for step in range(3):
        hub.update_scalar("train/loss", np.float64(step))
        hub.update_scalar("train/acc", torch.tensor(0.5))
    hub.update_info("iter", 3)
    state = {f"backbone.{name}": value for name, value in backbone(1).state_dict().items()}
    content = {
        "meta": {"epoch": 0, "iter": 3, "cfg": "model = dict()", "dataset_meta": {"classes": ("a", "b")}, "seed": 1},
        "state_dict": {**state, "decode_head.conv_seg.weight": torch.zeros(2)},
        "message_hub": hub.state_dict(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "param_schedulers": [{"last_step": 3}],
    }
    torch.save(content, tmp_path / "iter_3.pth")
    model = backbone(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "iter_3.pth")})
    model.init_weights()
    assert loaded(model)


@pytest.fixture
def small_timm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make timm build small models with random weights instead of downloading weights; returns their options."""
    create, options = timm.create_model, {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8}

    def create_small(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model = create(name, pretrained=False, **{**options, **kwargs})
        return randomise(model, 0.2) if pretrained else model  # without weights, it may be on the meta device

    monkeypatch.setattr(timm, "create_model", create_small)
    return options


@pytest.mark.usefixtures("small_timm")
def test_weights_of_timm_by_name() -> None:
    model = APTViT(**SMALL, class_token=True, final_norm=True, pretrained="timm://vit_tiny_patch16_224").eval()
    model.init_weights()
    theirs = timm.create_model("vit_tiny_patch16_224", pretrained=True, img_size=32, num_classes=0)
    batch = half_flat(32, 32)
    expected = theirs.forward_features(batch)[:, 1:].mT.unflatten(2, (4, 4))
    torch.testing.assert_close(model(batch)[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        ({"num_heads": 4}, "num_heads=4"),
        ({"act_layer": "gelu_tanh"}, "act_layer=gelu_tanh"),
        ({"init_values": 0.1}, "ls1"),
    ],
)
def test_models_of_timm_that_differ_are_refused(theirs: dict, named: str, small_timm: dict[str, Any]) -> None:
    """Also where all shapes fit and only the model's options differ."""
    small_timm.update(theirs)
    model = APTViT(**SMALL, class_token=True, final_norm=True, pretrained="timm://vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=named):
        model.init_weights()


# ---- weights that tell the arguments


def test_weights_tell_the_arguments(weights: Path) -> None:
    torch.save(dict(torch.load(weights)), weights)  # without notes, as other projects' files
    model = APTViT(pretrained=str(weights), img_size=48, num_heads=2, act_layer="gelu", thresholds=(4.0,))
    assert (model.embed_dim, model.depth, model.patch_size, model.pos_grid) == (16, 2, 8, (6, 6))
    assert not model.position_options.pos_antialias, "MMSegmentation's way stays"
    model.init_weights()
    assert torch.equal(model.blocks[1].mlp.fc1.weight, backbone(1).blocks[1].mlp.fc1.weight)
    with pytest.raises(CheckpointError, match=r"weights\.pth: .* do not tell num_heads and act_layer\. Add num_heads"):
        APTViT(pretrained=str(weights), img_size=48)


@torch.inference_mode()
def test_mmsegs_own_weights_give_its_values(tmp_path: Path) -> None:
    vit = mmseg_vit(final_norm=True)
    torch.save(
        {"state_dict": {f"backbone.{name}": value for name, value in vit.state_dict().items()}}, tmp_path / "x.pth"
    )
    model = APTViT(pretrained=str(tmp_path / "x.pth"), num_heads=2, act_layer="gelu", norm_eps=1e-6).eval()
    model.init_weights()
    images = half_flat(48, 32)
    torch.testing.assert_close(model(images)[0], vit(images)[0], atol=1e-4, rtol=0)


def test_our_own_weights_tell_the_architecture_and_no_choices(weights: Path) -> None:
    """A config without thresholds is that of the plain ViT, whatever the weights were trained with."""
    torch.save(backbone(1, thresholds=(4.0,), out_indices=(0, 1), norm_eps=0.5).state_dict(), weights)
    model = APTViT(init_cfg={"type": "Pretrained", "checkpoint": str(weights)})
    assert model.thresholds == () and model.out_indices == (1,) and model.block_options.norm_eps == 0.5
    model.init_weights()
    assert loaded(model)


@pytest.mark.parametrize("name", ["embed_dim", "depth"])
def test_arguments_that_say_what_the_model_is_are_not_completed(name: str, weights: Path) -> None:
    with pytest.raises(ValueError, match=r"set .*patch_size=8 \(now 16\)"):
        APTViT(pretrained=str(weights), num_heads=2, **{name: SMALL[name]}).init_weights()


@pytest.mark.parametrize("asked", [False, True])
def test_patches_are_resampled_where_the_config_asks(asked: bool, weights: Path) -> None:
    model = APTViT(pretrained=str(weights), **({"patch_size": 16} if asked else {}))
    model.init_weights()
    assert model.patch_embed.proj.weight.shape[-1] == (16 if asked else 8) and model.pos_grid == (4, 4)
    assert torch.equal(model.pos_embed, backbone(1).pos_embed)


@pytest.mark.parametrize("size", [{}, {"patch_size": 16}])
@pytest.mark.usefixtures("small_timm")
def test_names_of_timm_tell_the_arguments(size: dict) -> None:
    model = APTViT(pretrained="timm://vit_tiny_patch16_224", img_size=48, **size)
    assert model.cls_token is not None and model.norm is not None and model.block_options.num_heads == 2
    model.init_weights()
    theirs = timm.create_model("vit_tiny_patch16_224", pretrained=True, img_size=48, num_classes=0, **size)
    assert model.patch_size == size.get("patch_size", 8) and torch.equal(model.pos_embed, theirs.pos_embed)


def test_a_prefix_is_looked_below(weights: Path) -> None:
    state = {f"student.{name}": value for name, value in torch.load(weights).items()}
    torch.save({**state, "teacher.blocks.0.norm1.weight": torch.ones(1)}, weights)
    init_cfg = {"type": "Pretrained", "checkpoint": str(weights), "prefix": "student"}
    model = APTViT(init_cfg=init_cfg, num_heads=2, act_layer="gelu")
    model.init_weights()
    assert loaded(model)


def config(**backbone_options: Any) -> Config:
    return Config({"model": {"type": "EncoderDecoder", "backbone": {"type": "APTViT", **backbone_options}}})


def test_a_config_is_completed_and_can_be_written(weights: Path, tmp_path: Path) -> None:
    cfg = config(pretrained=str(weights), patch_size=16, thresholds=(4.0,), with_cp=True)
    fill_in_config(cfg)
    cfg.dump(tmp_path / "config.py")
    weights.rename(tmp_path / "moved.pth")
    model = MODELS.build(Config.fromfile(tmp_path / "config.py").model.backbone)
    assert model.embed_dim == 16 and model.thresholds == (4.0,) and model.checkpoint_blocks
    assert model.init_cfg == {"type": "Pretrained", "checkpoint": str(weights), "resize_patches": True}
    before = cfg.to_dict()
    fill_in_config(cfg)
    assert cfg.to_dict() == before, "it is complete"


def test_rotary_positions_can_be_written(tmp_path: Path) -> None:
    theirs = APTViT(**SMALL, rotary=Rotary(temperature=7.0), k_bias=False)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    cfg = config(pretrained=str(tmp_path / "x.pth"))
    fill_in_config(cfg)
    cfg.dump(tmp_path / "config.py")
    assert MODELS.build(Config.fromfile(tmp_path / "config.py").model.backbone).rotary == Rotary(temperature=7.0)


def test_a_run_s_checkpoint_tells_what_lost_weights_told(weights: Path, tmp_path: Path) -> None:
    run = {"state_dict": {f"backbone.{name}": value for name, value in torch.load(weights).items()}, "meta": {}}
    torch.save(run, tmp_path / "iter_1.pth")
    cfg = config(pretrained=str(tmp_path / "lost.pth"), num_heads=2, act_layer="gelu")
    with pytest.raises(FileNotFoundError, match="lost.pth"):
        fill_in_config(cfg)
    fill_in_config(cfg, str(tmp_path / "iter_1.pth"))
    assert cfg.model.backbone.embed_dim == 16 and "pretrained" not in cfg.model.backbone


@pytest.mark.parametrize("backbone_config", [{}, {"type": "VisionTransformer", "pretrained": "x.pth"}, SMALL])
def test_other_configs_stay(backbone_config: dict) -> None:
    cfg = Config({"model": {"backbone": backbone_config}})
    before = cfg.to_dict()
    fill_in_config(cfg)
    fill_in_config(Config({}))
    assert cfg.to_dict() == before


# ---- in a segmentor


def test_pretrained_at_the_level_of_the_segmentor(weights: Path) -> None:
    config = {"backbone": {"type": "APTViT", **SMALL, "thresholds": (4.0,)}, "decode_head": FCN}
    model = MODELS.build(ConfigDict(type="EncoderDecoder", pretrained=str(weights), **config))
    model.init_weights()
    assert loaded(model.backbone)


def test_a_segmentor_initialises_the_backbone_once(weights: Path) -> None:
    model = segmentor(pretrained=str(weights))
    model.init_weights()
    assert loaded(model.backbone)
    assert model.backbone.coarse_embed.zero.weight.any()


# ---- positions of a grid that is not square: 2 x 8, as many as of 4 x 4


def rectangle() -> APTViT:
    return backbone(1, img_size=(16, 64))


def cells_of(model: APTViT) -> torch.Tensor:
    return model.pos_embed[:, -model.pos_grid[0] * model.pos_grid[1] :].detach().unflatten(1, model.pos_grid)


@pytest.mark.parametrize("prefix", ["student.encoder", "student.encoder.", None])
@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize("target", [(32, 32), (64, 16), (24, 40)])
def test_a_run_tells_the_grid_below_a_prefix(prefix: str | None, wrapper: str, target: tuple, tmp_path: Path) -> None:
    source = rectangle()
    parts = {"student": nn.ModuleDict({"encoder": source}), "head": nn.Linear(2, 2)} if prefix else {"backbone": source}
    whole = nn.ModuleDict({"module": nn.ModuleDict(parts)} if wrapper else parts)
    torch.save({"state_dict": whole.state_dict(), "meta": {}}, tmp_path / "run.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "run.pth"), "prefix": prefix}
    model = backbone(img_size=target, init_cfg=init_cfg)
    model.init_weights()
    expected = nn.functional.interpolate(
        cells_of(source).movedim(3, 1), model.pos_grid, mode="bicubic", antialias=True
    ).movedim(1, 3)  # fmt: skip
    torch.testing.assert_close(cells_of(model), expected, atol=1e-5, rtol=0)
    assert APTViT(init_cfg=init_cfg).img_size == (16, 64)  # the file tells all


def test_a_config_names_the_grid(tmp_path: Path) -> None:
    """Where the file does not, and the model's or a square would do."""
    source = rectangle()
    torch.save(dict(source.state_dict()), tmp_path / "bare.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "bare.pth")}
    with pytest.raises(CheckpointError, match="its grid may be 2 x 8 after 0 or 4 x 4 after 0 .* rows and columns"):
        backbone(img_size=(16, 64), init_cfg=init_cfg).init_weights()
    model = backbone(img_size=(16, 64), init_cfg={**init_cfg, "grid": (2, 8)})
    model.init_weights()
    assert torch.equal(model.pos_embed, source.pos_embed)
    told = APTViT(init_cfg={**init_cfg, "grid": [2, 8]}, num_heads=2, act_layer="gelu")
    told.init_weights()
    assert told.img_size == (16, 64) and torch.equal(told.pos_embed, source.pos_embed)
    for bad in ((0, 16), (2, 8, 1), "square"):
        with pytest.raises((TypeError, ValueError), match="init_cfg.grid="):
            backbone(init_cfg={**init_cfg, "grid": bad})


@pytest.mark.usefixtures("small_timm")
def test_a_model_of_timm_tells_its_grid() -> None:
    options = {**SMALL, "img_size": (16, 64), "class_token": True, "final_norm": True}
    theirs = timm.create_model("vit_tiny_patch16_224", pretrained=True, img_size=(16, 64), num_classes=0)
    for size, grid in (({}, (2, 8)), ({"pretrain_img_size": 32}, (4, 4))):
        model = APTViT(**options, **size, pretrained="timm://vit_tiny_patch16_224")
        model.init_weights()
        expected = resample_abs_pos_embed(theirs.pos_embed.detach(), list(grid), [2, 8])
        torch.testing.assert_close(model.pos_embed.detach(), expected, atol=1e-6, rtol=0)
