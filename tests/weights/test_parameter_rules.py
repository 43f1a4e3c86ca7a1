"""One rule for parameters: by hand, against Detectron2's and MMSeg's own rules, and the same in all hosts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from apt_dense import APTViT
from apt_dense.weights.convert import to_apt
from apt_dense.weights.parameter_rules import (
    COARSE,
    UNDECAYED,
    decays,
    inner_name,
    is_new,
    layer_of,
    lr_scale,
    parameter_groups,
)

DEPTH, RATE = 3, 0.7
SMALL = {"img_size": 64, "embed_dim": 24, "depth": DEPTH, "num_heads": 2}
WINDOWED = {
    "window_size": 2, "window_block_indexes": (0, 1), "use_rel_pos": True, "residual_block_indexes": (1, 2),
}  # fmt: skip


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


# ---- by hand

LAYERS = {
    "patch_embed.proj.weight": 0,
    "patch_embed.proj.bias": 0,
    "patch_embed.norm.weight": 0,
    "pos_embed": 0,
    "cls_token": 0,
    "reg_token": 0,
    "norm_pre.weight": 0,
    "norm_pre.bias": 0,
    "blocks.0.norm1.weight": 1,
    "blocks.0.attn.qkv.weight": 1,
    "blocks.1.attn.q_proj.bias": 2,
    "blocks.1.attn.q_norm.weight": 2,
    "blocks.1.attn.norm.weight": 2,
    "blocks.1.ls1.gamma": 2,
    "blocks.1.mlp.fc1_g.weight": 2,
    "blocks.1.mlp.norm.weight": 2,
    "blocks.2.attn.rel_pos_h": 3,
    "blocks.10.mlp.fc2.bias": 11,
    "blocks.11.norm2.bias": 12,
    # From scratch or after the blocks: the full rate.
    "blocks.5.residual.conv1.weight": 13,
    "blocks.5.residual.norm3.bias": 13,
    "norm.weight": 13,
    "norm.bias": 13,
    "coarse_embed.down.weight": 13,
    "coarse_embed.down.bias": 13,
    "coarse_embed.zero.weight": 13,
    "coarse_embed.zero.bias": 13,
}


@pytest.mark.parametrize(("name", "layer"), LAYERS.items())
def test_layers(name: str, layer: int) -> None:
    assert layer_of(name, 12) == layer
    assert lr_scale(name, 12, 0.7) == pytest.approx(0.7 ** (13 - layer))


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if not name.startswith("norm.")])
@pytest.mark.parametrize("prefix", ["backbone.", "backbone.net.", "backbone.bottom_up.", "backbone.net._orig_mod."])
def test_names_in_a_whole_model(prefix: str, name: str) -> None:
    assert inner_name(prefix + name) == name


@pytest.mark.parametrize(
    "name",
    [
        "backbone.norm.bias",
        "backbone.simfp_4.0.norm.weight",
        "backbone.simfp_2.0.weight",
        "decode_head.blocks.0.weight",
        "decode_head.pos_embed",
        "neck.convs.0.conv.weight",
        "blocks.0.norm1.weight",
        "pos_embed",
        "my_backbone.blocks.0.norm1.weight",
    ],
)
def test_names_outside_the_backbone_get_the_full_rate(name: str) -> None:
    assert inner_name(name) == ""
    assert lr_scale(inner_name(name), 12, 0.7) == 1.0


def test_blocks_beyond_the_depth_are_errors() -> None:
    assert layer_of("blocks.1.norm1.weight", 2) == 2
    with pytest.raises(ValueError, match=r"blocks\.2\.norm1\.weight is beyond num_layers=2; set num_layers"):
        layer_of("blocks.2.norm1.weight", 2)


def test_parameters_that_only_apt_has() -> None:
    names = names_of(APTViT(**SMALL, thresholds=(4.0,), class_token=True))
    new = {f"coarse_embed.{layer}.{kind}" for layer in ("down", "zero") for kind in ("weight", "bias")}
    assert {name for name in names if is_new(name)} == {name for name in names if name.startswith(COARSE)} == new
    assert all(is_new(prefix + name) for name in new for prefix in ("backbone.", "backbone.net.", "module.backbone."))
    assert not is_new("my_coarse_embed.down.weight") and not is_new("blocks.0.attn.qkv.weight")


def test_weight_decay() -> None:
    model = APTViT(**SMALL, thresholds=(4.0,), class_token=True, reg_tokens=2, init_values=0.1, qk_norm=True,
                   pre_norm=True, final_norm=True)  # fmt: skip
    windowed = APTViT(**SMALL, **WINDOWED)
    matrices = [f"blocks.{i}.{name}" for i in range(DEPTH) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    matrices += ["patch_embed.proj", "coarse_embed.down", "coarse_embed.zero"]
    decayed = {f"{name}.weight" for name in matrices}
    assert {name for name, parameter in model.named_parameters() if decays(name, parameter)} == decayed
    flags = {name: decays(name, parameter) for name, parameter in windowed.named_parameters()}
    assert flags["blocks.0.attn.rel_pos_h"] and flags["blocks.2.attn.rel_pos_w"]
    assert flags["blocks.1.residual.conv2.weight"] and not flags["blocks.1.residual.norm2.weight"]
    assert set(UNDECAYED) == {"pos_embed", "cls_token", "reg_token"}


@pytest.mark.parametrize("name", ["pos_embed", "backbone.pos_embed", "backbone.net.cls_token", "decode_head.reg_token"])
def test_weight_decay_of_positions_and_tokens(name: str) -> None:
    assert not decays(name, torch.zeros(1, 4, 8))
    assert decays(f"{name}_proj.weight", torch.zeros(8, 8)) and decays(name.replace("_", "_x_"), torch.zeros(8, 8))


# ---- groups of a whole model


class Model(nn.Module):
    """A backbone and a head, with a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = APTViT(**SMALL, thresholds=(4.0,))
        self.head = nn.Linear(24, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_groups_hold_every_trainable_parameter_once() -> None:
    model = Model()
    groups = parameter_groups(model, DEPTH, lr=2.0, weight_decay=0.05, decay_rate=0.5)
    found = {name: parameter for group in groups for name, parameter in zip(group["param_names"], group["params"],
                                                                            strict=True)}  # fmt: skip
    assert found.keys() == {name for name in names_of(model) if not name.startswith("frozen")}
    assert all(parameter is model.get_parameter(name) for name, parameter in found.items())
    assert len(groups) == 2 * (DEPTH + 2)
    assert [group["lr_scale"] for group in groups] == sorted(group["lr_scale"] for group in groups)
    assert all(group["lr"] == 2.0 * group["lr_scale"] for group in groups)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    torch.optim.AdamW(groups).step()


def test_groups_without_decay_of_the_rates() -> None:
    groups = parameter_groups(Model(), DEPTH, lr=2.0, weight_decay=0.05)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(2.0, 0.0), (2.0, 0.05)]


# ---- against the hosts' own rules


@pytest.mark.parametrize("prefix", ["backbone.net.", "backbone.bottom_up.", "net.", ""])
@pytest.mark.parametrize(
    "options", [WINDOWED, {"use_rel_pos": True}, {"use_abs_pos": False, "qkv_bias": False}], ids=str
)
def test_rates_of_detectron2_s_vit(options: dict, prefix: str) -> None:
    modeling = pytest.importorskip("detectron2.modeling", reason="Detectron2 is built from source")
    from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate

    from apt_dense.hosts.detectron2 import get_apt_lr_decay_rate

    names = [prefix + name for name in names_of(modeling.ViT(**SMALL, **options))]
    assert len(names) > 11 * DEPTH
    for name in names:
        assert get_apt_lr_decay_rate(name, RATE, DEPTH) == get_vit_lr_decay_rate(name, RATE, DEPTH), name


def test_rates_of_a_whole_detector_of_detectron2() -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is built from source")
    from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate

    from apt_dense.hosts.detectron2 import get_apt_lr_decay_rate

    from support.tiny_coco import ADAPTIVE, tiny_model

    names = names_of(tiny_model(ADAPTIVE, "model.backbone.net.residual_block_indexes=[1]"))
    parts = {".".join(name.split(".")[:2]) for name in names}
    assert {"backbone.net", "backbone.simfp_2", "proposal_generator.rpn_head", "roi_heads.mask_head"} < parts
    for name in names:
        assert get_apt_lr_decay_rate(name, RATE, 2) == get_vit_lr_decay_rate(name, RATE, 2), name


def test_rates_of_mmseg_s_own_constructor() -> None:
    """Except the weight decay of positions and class token, which it looks for outside the backbone."""
    pytest.importorskip("mmseg", reason="MMSeg's packages are optional")
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import DefaultScope
    from mmseg.models.backbones import VisionTransformer

    class ViTOfMAE(VisionTransformer):
        """MMSeg's constructor looks for "MAE" in this name."""

    segmentor = nn.Module()
    segmentor.backbone = ViTOfMAE(img_size=64, embed_dims=24, num_layers=DEPTH, num_heads=2, patch_bias=True)
    segmentor.head = nn.Linear(2, 2)
    config = optim_config("LearningRateDecayOptimizerConstructor", num_layers=DEPTH)
    with DefaultScope.overwrite_default_scope("mmseg"):
        theirs = rates_of(build_optim_wrapper(segmentor, config).optimizer, segmentor)
    shapes = {name.removeprefix("backbone."): p for name, p in segmentor.named_parameters() if "head" not in name}
    ours = {id(value): name for name, value in to_apt(shapes, "mmseg").items()}
    assert len(ours) == len(shapes)
    for name, parameter in segmentor.named_parameters():
        renamed = ours.get(id(parameter), "")
        assert theirs[name][0] == pytest.approx(lr_scale(renamed, DEPTH, RATE)), name
        if renamed not in UNDECAYED:
            assert (theirs[name][1] > 0) == decays(name, parameter), name


def optim_config(constructor: str, **paramwise: Any) -> Any:
    from mmengine.config import ConfigDict

    return ConfigDict(
        type="OptimWrapper",
        optimizer={"type": "AdamW", "lr": 1.0, "weight_decay": 0.05},
        constructor=constructor,
        paramwise_cfg={"decay_rate": RATE, **paramwise},
    )


def rates_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter of a model."""
    settings = {
        id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    return {name: settings[id(parameter)] for name, parameter in model.named_parameters()}


# ---- the same in all hosts

FEATURES = {"thresholds": (4.0,), **WINDOWED}
TOKENS = {"thresholds": (4.0,), "class_token": True, "reg_tokens": 2, "pre_norm": True, "init_values": 0.1}


@pytest.mark.parametrize("options", [FEATURES, TOKENS], ids=["windows and residuals", "tokens and LayerScale"])
def test_all_hosts_give_the_same_rates_to_the_same_backbone(options: dict) -> None:
    core = APTViT(**SMALL, **options)
    expected = {
        name: (RATE ** (DEPTH + 1 - layer_of(name, DEPTH)), 0.05 if decays(name, parameter) else 0.0)
        for name, parameter in core.named_parameters()
    }
    for found in (in_mmseg(options), in_torchvision(core)):
        assert found.keys() == expected.keys()
        assert all(found[name] == pytest.approx(rates) for name, rates in expected.items())
    assert in_detectron2(core) == pytest.approx({name: rate for name, (rate, _) in expected.items()})


def in_mmseg(options: dict) -> dict[str, tuple[float, float]]:
    pytest.importorskip("mmengine", reason="MMSeg's packages are optional")
    from mmengine.optim import build_optim_wrapper

    from apt_dense.hosts import mmseg

    segmentor = nn.Module()
    segmentor.backbone = mmseg.APTViT(**SMALL, **options)
    optimizer = build_optim_wrapper(segmentor, optim_config("APTLearningRateDecayOptimWrapperConstructor")).optimizer
    return {name.removeprefix("backbone."): rates for name, rates in rates_of(optimizer, segmentor).items()}


def in_torchvision(core: APTViT) -> dict[str, tuple[float, float]]:
    from apt_dense.hosts.torchvision import mask_rcnn

    model = mask_rcnn(core, num_classes=2, channels=8, box_features=8)
    groups = parameter_groups(model, DEPTH, lr=1.0, weight_decay=0.05, decay_rate=RATE)
    rates = rates_of(torch.optim.AdamW(groups), model)
    inside = {
        name.removeprefix("backbone.net."): pair for name, pair in rates.items() if name.startswith("backbone.net.")
    }
    assert {rates[name][0] for name in rates.keys() - {f"backbone.net.{name}" for name in inside}} == {1.0}
    return inside


def in_detectron2(core: APTViT) -> dict[str, float]:
    pytest.importorskip("detectron2", reason="Detectron2 is built from source")
    from apt_dense.hosts.detectron2 import get_apt_lr_decay_rate

    return {name: get_apt_lr_decay_rate(f"backbone.net.{name}", RATE, DEPTH) for name in names_of(core)}
