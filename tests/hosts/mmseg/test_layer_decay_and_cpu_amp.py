"""Layer-wise decay of learning rates in MMSeg: every parameter in its group, with the rates of the shared rule."""

from __future__ import annotations

import pytest
from torch import nn

pytest.importorskip("mmseg", reason="the MMSeg host needs the packages of the extra 'mmseg'")

from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper

from apt_dense.hosts.mmseg import layer_decay_and_cpu_amp

from support.tiny_segmentors import mmseg_scope, segmentor  # noqa: F401 (a fixture)

pytestmark = pytest.mark.filterwarnings("ignore")  # MMSeg's own


def optimizer_groups(model: nn.Module, paramwise_cfg: dict | None = None) -> list[dict]:
    config = {
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.05},
        "constructor": "APTLearningRateDecayOptimWrapperConstructor",
        "paramwise_cfg": paramwise_cfg or {"decay_rate": 0.5},
    }
    return build_optim_wrapper(model, ConfigDict(config)).optimizer.param_groups


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = segmentor("upernet", class_token=True, final_norm=True)
    groups = optimizer_groups(model)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]


def test_each_group_is_a_line_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(layer_decay_and_cpu_amp, "print_log", lambda words, *_: logged.append(words))
    groups = optimizer_groups(segmentor(class_token=True, final_norm=True))
    (words,) = logged
    assert len(words.splitlines()) == 1 + len(groups)
    for line, group in zip(words.splitlines()[1:], groups, strict=True):
        rates = f"lr {group['lr']:.3g}, weight decay {group['weight_decay']:g}: {len(group['params'])} parameters"
        assert rates in line and group["param_names"][0] in line and line.endswith(group["param_names"][-1])


def test_rates_fall_towards_the_embedding() -> None:
    groups = optimizer_groups(segmentor(class_token=True, final_norm=True))
    settings = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["param_names"]}
    expected = {
        "backbone.patch_embed.proj.weight": (0.125, 0.05),
        "backbone.patch_embed.proj.bias": (0.125, 0.0),
        "backbone.pos_embed": (0.125, 0.0),
        "backbone.cls_token": (0.125, 0.0),
        "backbone.blocks.0.attn.qkv.weight": (0.25, 0.05),
        "backbone.blocks.0.norm1.weight": (0.25, 0.0),
        "backbone.blocks.1.mlp.fc2.weight": (0.5, 0.05),
        "backbone.blocks.1.mlp.fc2.bias": (0.5, 0.0),
        "backbone.norm.weight": (1.0, 0.0),
        "backbone.coarse_embed.down.weight": (1.0, 0.05),
        "backbone.coarse_embed.zero.bias": (1.0, 0.0),
        "decode_head.conv_seg.weight": (1.0, 0.05),
        "decode_head.convs.0.bn.weight": (1.0, 0.0),
    }
    assert {name: settings[name] for name in expected} == expected


def test_a_backbone_can_learn_more_slowly_than_new_heads() -> None:
    """Its final norm and its parameters for coarse patches, too, which layer-wise decay leaves at the full rate."""
    groups = optimizer_groups(segmentor(final_norm=True), {"decay_rate": 0.5, "backbone_lr_mult": 0.1})
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    expected = {"backbone.norm.weight": 0.1, "backbone.coarse_embed.down.weight": 0.1, "backbone.pos_embed": 0.0125,
                "backbone.blocks.1.norm1.bias": 0.05, "decode_head.conv_seg.weight": 1.0}  # fmt: skip
    assert {name: rates[name] for name in expected} == pytest.approx(expected)


def test_num_layers_replaces_the_depth() -> None:
    groups = optimizer_groups(segmentor(), {"decay_rate": 0.5, "num_layers": 4})
    assert min(group["lr"] for group in groups) == 0.5**5 and max(group["lr"] for group in groups) == 1.0


def test_frozen_parameters_are_left_out() -> None:
    groups = optimizer_groups(segmentor(frozen_stages=2))
    names = [name for group in groups for name in group["param_names"]]
    assert "backbone.coarse_embed.down.weight" in names and "decode_head.conv_seg.bias" in names
    assert not any(name.startswith(("backbone.blocks", "backbone.pos_embed", "backbone.patch_embed")) for name in names)


def test_a_missing_weight_decay_is_named() -> None:
    config = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1.0}, "paramwise_cfg": {"decay_rate": 0.5},
              "constructor": "APTLearningRateDecayOptimWrapperConstructor"}  # fmt: skip
    with pytest.raises(ValueError, match="give optim_wrapper.optimizer.weight_decay"):
        build_optim_wrapper(segmentor(), ConfigDict(config))


def test_fewer_layers_than_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.1\..* is beyond num_layers=1"):
        optimizer_groups(segmentor(), {"decay_rate": 0.5, "num_layers": 1})


def test_convolutional_residuals_start_from_scratch() -> None:
    groups = optimizer_groups(segmentor(residual_block_indexes=(0,)))
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert rates["backbone.blocks.0.residual.conv1.weight"] == 1.0 and rates["backbone.blocks.0.norm1.weight"] == 0.25


def test_a_missing_decay_rate_is_named() -> None:
    with pytest.raises((KeyError, ValueError), match="decay_rate"):
        optimizer_groups(segmentor(), {"num_layers": 4})
