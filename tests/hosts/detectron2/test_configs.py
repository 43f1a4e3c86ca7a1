"""The lazy configs: complete, with ViTDet's published values; adaptive and uniform twins differ in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is built from source (its INSTALL page)")

from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.modeling.roi_heads import CascadeROIHeads
from omegaconf import DictConfig, OmegaConf

from apt_dense.hosts.detectron2 import APTViT
from apt_dense.hosts.detectron2.read_lazy_config import apply_overrides, load_config

from support.tiny_coco import (  # noqa: F401 (skips the tests where there is no Detectron2)
    ADAPTIVE,
    CONFIGS,
    SHRINK,
    SHRINK_MASK_RCNN,
    one_thread,
    tiny_config,
)

#: ViTDet as published: width, blocks, heads, drop path, global blocks, rate decay, iterations, steps, weights.
PUBLISHED = {
    "b": (768, 12, 12, 0.1, [2, 5, 8, 11], 0.7, 184375, [163889, 177546], "base"),
    "l": (1024, 24, 16, 0.4, [5, 11, 17, 23], 0.8, 184375, [163889, 177546], "large"),
    "h": (1280, 32, 16, 0.5, [7, 15, 23, 31], 0.9, 138281, [122916, 133159], "huge_p14to16"),
}
SHRINK_CASCADE = [
    *SHRINK,
    *(f"model.roi_heads.box_heads.{i}.{key}" for i in range(3)
      for key in ("input_shape.channels=16", "conv_dims=[16]", "fc_dims=[32]")),
    *(f"model.roi_heads.box_predictors.{i}.input_shape.channels=32" for i in range(3)),
]  # fmt: skip

#: EVA-02-L as published: pixels of a side, cells of a window, global blocks, rate, images per iteration.
EVA02 = {
    "1024": (1024, 16, [5, 11, 17, 23], 6e-5, 144),
    "1536": (1536, 32, [2, 5, 8, 11, 14, 17, 20, 23], 5e-5, 128),
}
VITDET_CONFIGS = [path for path in CONFIGS if "_vitdet_" in path.stem]
EVA02_CONFIGS = [path for path in CONFIGS if "_eva02_" in path.stem]
PAPER_PATCHES = sorted((ADAPTIVE.parent / "paper_patches").glob("*.py"))

every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def size_of(path: Path) -> str:
    return path.stem.split("_vitdet_")[1][0]


def test_there_are_three_sizes_of_two_heads_in_two_ways() -> None:
    assert len(VITDET_CONFIGS) == 12
    assert {size_of(path) for path in VITDET_CONFIGS} == set(PUBLISHED)
    assert {path.stem.rpartition("_")[2] for path in EVA02_CONFIGS} == set(EVA02)
    assert len(EVA02_CONFIGS) == 4 and len(CONFIGS) == 16


@pytest.mark.parametrize("path", EVA02_CONFIGS, ids=lambda path: path.stem)
def test_eva02_s_values_are_the_published_ones(path: Path) -> None:
    cfg = LazyConfig.load(str(path))
    net, steps, decay = cfg.model.backbone.net, cfg.lr_multiplier.scheduler, cfg.optimizer.params.lr_factor_func
    in_windows = set(net.window_block_indexes)
    found = (
        net.img_size, net.window_size, [i for i in range(net.depth) if i not in in_windows], cfg.optimizer.lr,
        cfg.dataloader.train.total_batch_size,
    )  # fmt: skip
    assert found == EVA02[path.stem.rpartition("_")[2]]
    assert net.img_size == cfg.dataloader.image_size == cfg.model.backbone.square_pad
    assert (net.embed_dim, net.depth, net.num_heads, net.drop_path_rate) == (1024, 24, 16, 0.4)
    assert decay.keywords == {"lr_decay_rate": 0.8, "num_layers": 24}
    assert (cfg.train.max_iter, list(steps.milestones), steps.num_updates) == (60000, [48000, 54000], 60000)
    assert (net.k_bias, net.qkv_fused, net.mlp_layer, net.use_rel_pos) == (False, False, "swiglu", False)


@pytest.mark.parametrize("path", VITDET_CONFIGS, ids=lambda path: path.stem)
def test_values_are_the_published_ones(path: Path) -> None:
    cfg = LazyConfig.load(str(path))
    net, steps, decay = cfg.model.backbone.net, cfg.lr_multiplier.scheduler, cfg.optimizer.params.lr_factor_func
    in_windows = set(net.window_block_indexes)
    weights = re.search(r"mae_pretrain_vit_(\w+)\.", cfg.train.init_checkpoint)[1]
    found = (
        net.embed_dim, net.depth, net.num_heads, net.drop_path_rate,
        [i for i in range(net.depth) if i not in in_windows], decay.keywords["lr_decay_rate"],
        cfg.train.max_iter, list(steps.milestones), weights,
    )  # fmt: skip
    assert found == PUBLISHED[size_of(path)]
    assert decay.keywords["num_layers"] == net.depth and steps.num_updates == cfg.train.max_iter
    assert cfg.train.init_checkpoint.endswith(".pth?matching_heuristics=True")
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.dataloader.train.total_batch_size) == (1e-4, 0.1, 64)
    assert (cfg.lr_multiplier.warmup_factor, cfg.lr_multiplier.warmup_length) == (0.001, 250 / 184375)
    assert (net.window_size, net.use_rel_pos, net.img_size, cfg.model.backbone.square_pad) == (14, True, 1024, 1024)
    is_huge = size_of(path) == "h"
    undecayed = {name: {"weight_decay": 0.0} for name in ("pos_embed", "cls_token", "reg_token")}
    assert dict(cfg.optimizer.params.overrides) == ({} if is_huge else undecayed)
    assert cfg.optimizer.params.weight_decay_norm == (None if is_huge else 0.0)


@every_config
def test_pixels_are_described_once(path: Path) -> None:
    cfg = LazyConfig.load(str(path))
    cfg.model.pixel_mean, cfg.model.pixel_std, cfg.model.input_format = [1.5, 2.5, 3.5], [9.0, 8.0, 7.0], "BGR"
    net = cfg.model.backbone.net
    assert (list(net.pixel_mean), list(net.pixel_std), net.channel_order) == ([1.5, 2.5, 3.5], [9.0, 8.0, 7.0], "BGR")


@every_config
def test_every_config_builds_and_answers(path: Path) -> None:
    cfg = load_config(str(path))
    is_cascade = path.stem.startswith("cascade")
    apply_overrides(cfg, SHRINK_CASCADE if is_cascade else SHRINK_MASK_RCNN)
    model = instantiate(cfg.model).eval()
    assert isinstance(model, GeneralizedRCNN) and isinstance(model.roi_heads, CascadeROIHeads) == is_cascade
    net = model.backbone.net
    assert isinstance(net, APTViT)
    assert (net.thresholds, net.drop_padding) == (((5.5, 4.0), True) if "_apt_" in path.stem else ((), False))
    with torch.no_grad():
        assert "instances" in model([{"image": torch.zeros(3, 60, 90, dtype=torch.uint8)}])[0]


@pytest.mark.parametrize("path", [path for path in CONFIGS if "_apt_" in path.stem], ids=lambda path: path.stem)
def test_the_uniform_twin_is_one_line_away(path: Path) -> None:
    twin = path.with_name(path.name.replace("_apt_", "_uniform_"))
    lines = [line for line in twin.read_text().splitlines() if line and not line.startswith(("#", "from"))]
    assert lines == ["model.backbone.net.update(thresholds=(), drop_padding=False)"]
    adaptive, uniform = (comparable(LazyConfig.load(str(file))) for file in (path, twin))
    net = adaptive["model"]["backbone"]["net"]
    assert (net["thresholds"], net["drop_padding"]) == ([5.5, 4.0], True)
    net.update(thresholds=[], drop_padding=False)
    assert adaptive == uniform


@pytest.mark.parametrize("path", PAPER_PATCHES, ids=lambda path: path.stem)
def test_the_paper_s_patches_differ_in_thresholds_only(path: Path) -> None:
    paper, ours = (comparable(LazyConfig.load(str(file))) for file in (path, path.parents[1] / path.name))
    assert paper["model"]["backbone"]["net"].pop("thresholds") == [2.0, 2.0, 0.3]
    assert ours["model"]["backbone"]["net"].pop("thresholds") == [5.5, 4.0] and paper == ours


def test_four_sizes_of_patches_run_in_windows() -> None:
    cfg = load_config(str(PAPER_PATCHES[-1]))
    apply_overrides(cfg, [*SHRINK_MASK_RCNN, "model.backbone.net.window_size=8", "dataloader.image_size=256"])
    model = instantiate(cfg.model).eval()
    assert model.backbone.net.patches.num_scales == 4
    with torch.no_grad():
        assert "instances" in model([{"image": torch.zeros(3, 250, 200, dtype=torch.uint8)}])[0]


def comparable(cfg: DictConfig) -> dict:
    """Convert to plain containers, and partial functions, which never equal each other, to text."""
    content = OmegaConf.to_container(cfg, resolve=True)
    content["model"]["backbone"]["net"]["norm_layer"] = str(content["model"]["backbone"]["net"]["norm_layer"])
    content["optimizer"]["params"]["lr_factor_func"] = str(content["optimizer"]["params"]["lr_factor_func"])
    return content


def test_one_size_reaches_loader_and_model() -> None:
    cfg = load_config(str(ADAPTIVE))
    apply_overrides(cfg, ["dataloader.image_size=256"])
    _, resize, crop = cfg.dataloader.train.mapper.augmentations
    assert (resize.target_height, resize.target_width, list(crop.crop_size)) == (256, 256, [256, 256])
    assert cfg.dataloader.test.mapper.augmentations[0].max_size == cfg.model.backbone.square_pad == 256
    assert cfg.model.backbone.net.img_size == 1024  # the size of the checkpoint's relative positions


def test_a_stock_config_takes_the_backbone_in_one_line() -> None:
    model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    model.backbone.net.update(embed_dim=48, depth=2, num_heads=2, window_block_indexes=[0])
    model.backbone.net._target_ = APTViT
    assert isinstance(instantiate(model).backbone.net, APTViT)


def test_the_saved_config_builds_the_same_model(tmp_path: Path) -> None:
    cfg = tiny_config(ADAPTIVE)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    names = [list(instantiate(config.model).state_dict()) for config in (cfg, again)]
    assert names[0] == names[1]


def test_optimizer_gives_each_parameter_its_rate() -> None:
    cfg = tiny_config(ADAPTIVE)
    cfg.optimizer.params.lr_factor_func.keywords["num_layers"] = 2
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    groups = instantiate(cfg.optimizer).param_groups
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        group = of[id(parameter)]
        assert group["lr"] == pytest.approx(1e-4 * get_vit_lr_decay_rate(name, 0.7, 2)), name
    new = [parameter for name, parameter in model.named_parameters() if ".coarse_embed." in name]
    decayed = {name: of[id(parameter)]["weight_decay"] for name, parameter in model.backbone.net.named_parameters()}
    assert decayed["pos_embed"] == decayed["blocks.0.norm1.weight"] == 0
    assert decayed["blocks.0.attn.qkv.weight"] == decayed["coarse_embed.down.weight"] == 0.1
    assert len(new) == 4 and all(of[id(parameter)]["lr"] == pytest.approx(1e-4) for parameter in new)
