"""Errors name the arguments to change, and no others."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import torch

from apt_dense import APTViT
from apt_dense.weights.argument_advice import advice
from apt_dense.weights.load import load_backbone
from apt_dense.weights.timm_arguments import apt_arguments

from support.families import timm_model
from support.references import randomise

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def small(**options: Any) -> APTViT:
    return APTViT(**{**SMALL, **options})


#: Options of the weights, of the model, and what the error must say.
DIFFERENCES = [
    ({"init_values": 0.5}, {}, "init_values=1e-05 (now None)"),
    ({}, {"init_values": 0.5}, "init_values=None (now 0.5)"),
    ({"class_token": True, "reg_tokens": 4}, {"class_token": True}, "reg_tokens=4 (now 0)"),
    ({"class_token": True, "reg_tokens": 1}, {"class_token": True, "reg_tokens": 2}, "reg_tokens=1 (now 2)"),
    ({}, {"class_token": True}, "class_token=False (now True)"),
    ({}, {"final_norm": True}, "final_norm=False (now True)"),
    ({"pre_norm": True}, {}, "pre_norm=True (now False)"),
    ({"embed_norm": True}, {}, "embed_norm=True (now False)"),
    ({"patch_bias": False}, {}, "patch_bias=False (now True)"),
    ({"use_abs_pos": False}, {}, "use_abs_pos=False (now True)"),
    ({}, {"use_abs_pos": False}, "use_abs_pos=True (now False)"),
    ({"depth": 1}, {"depth": 2}, "depth=1 (now 2)"),
    ({"depth": 4}, {"depth": 2}, "depth=4 (now 2)"),
    ({"embed_dim": 32}, {}, "embed_dim=32 (now 16)"),
    ({"mlp_ratio": 2.0}, {}, "mlp_ratio=2.0 (now 4.0)"),
    ({"patch_size": 16}, {}, "patch_size=16 (now 8)"),
    ({"in_chans": 1}, {}, "in_chans=1 (now 3)"),
    ({"mlp_layer": "swiglu"}, {}, "mlp_layer='swiglu' (now 'mlp')"),
    ({}, {"mlp_layer": "swiglu_packed"}, "mlp_layer='mlp' (now 'swiglu_packed')"),
    ({"qkv_bias": False}, {}, "qkv_bias=False (now True)"),
    ({"k_bias": False}, {}, "k_bias=False (now True)"),
    ({}, {"k_bias": False}, "k_bias=True (now False)"),
    ({"qkv_fused": False}, {}, "qkv_fused=False (now True)"),
    ({"proj_bias": False}, {}, "proj_bias=False (now True)"),
    ({"qk_norm": True}, {}, "qk_norm=True (now False)"),
    ({"scale_attn_norm": True}, {}, "scale_attn_norm=True (now False)"),
    ({"scale_mlp_norm": True}, {}, "scale_mlp_norm=True (now False)"),
    ({"norm_layer": "rmsnorm"}, {}, "norm_layer='rmsnorm' (now 'layernorm')"),
    ({"residual_block_indexes": (1,)}, {}, "residual_block_indexes=(1,) (now ())"),
    ({"use_rel_pos": True}, {}, "use_rel_pos=True (now False)"),
    ({"use_rel_pos": True, "num_heads": 4}, {"use_rel_pos": True}, "num_heads=4 (now 2)"),
    (
        {"class_token": True, "reg_tokens": 4, "no_embed_class": True, "init_values": 1.0},
        {"class_token": True, "init_values": 1.0},
        "reg_tokens=4 (now 0) and no_embed_class=True (now False)",
    ),
    ({}, {"pretrain_use_cls_token": True}, "pretrain_use_cls_token=False (now True)"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target", "expected"), DIFFERENCES, ids=lambda value: str(value)[:40])
def test_the_argument_to_change_is_named(source: dict, target: dict, expected: str) -> None:
    state = dict(randomise(small(**source)).state_dict())
    with pytest.raises(ValueError) as raised:
        load_backbone(small(**target), state)
    message = str(raised.value)
    assert message.partition("; set ")[2].removesuffix(", or resize_patches=True to resample it") == expected
    changed = {name: ast.literal_eval(value) for name, value in re.findall(r"(\w+)=(.+?) \(now", expected)}
    load_backbone(small(**{**target, **changed}), state)


#: Differences that loading takes care of.
HARMLESS = [
    ({"class_token": True}, {}),
    ({"final_norm": True}, {}),
    ({"depth": 2}, {"depth": 2, "out_indices": 0}),
    ({}, {"use_rel_pos": True}),
    ({"img_size": 64}, {}),
    ({"class_token": True}, {"class_token": True, "no_embed_class": True}),
    ({"class_token": True, "img_size": 64}, {"pretrain_use_cls_token": True}),
    ({"pretrain_use_cls_token": True}, {}),
    ({}, {"num_heads": 4, "act_layer": "silu", "norm_eps": 0.1, "thresholds": (4.0,)}),
    ({"init_values": 0.1}, {"init_values": 1.0}),
    ({"qkv_bias": False}, {"qkv_bias": False, "k_bias": False}),
    ({"no_embed_class": True, "class_token": True}, {}),
]


@pytest.mark.parametrize(("source", "target"), HARMLESS, ids=str)
def test_what_loads_is_no_difference(source: dict, target: dict) -> None:
    """Next to a real one, it is not named."""
    state, model = dict(randomise(small(**source)).state_dict()), small(**target)
    assert advice(state, model) == ""
    assert load_backbone(model, state).advice == ""
    wider = dict(randomise(small(**source, embed_dim=32)).state_dict())
    assert advice(wider, model) == "set embed_dim=32 (now 16)"


def test_patches_that_are_resampled_are_not_named() -> None:
    state = dict(small(patch_size=4).state_dict())
    assert advice(state, small(), resize_patches=True) == ""


def test_dinov2_in_a_plain_vit() -> None:
    """As in a config that names only the sizes."""
    theirs = timm_model("dinov2 reg")
    plain = {**apt_arguments(theirs), "reg_tokens": 0, "init_values": None, "no_embed_class": False}
    with pytest.raises(ValueError, match="0 prefix positions and the model 1; set ") as raised:
        load_backbone(APTViT(**plain), theirs.state_dict())
    said = str(raised.value).partition("; set ")[2]
    assert said == "reg_tokens=4 (now 0) and init_values=1e-05 (now None) and no_embed_class=True (now False)"


def test_reports_of_lenient_loading_say_it_too() -> None:
    state = dict(small(init_values=0.5).state_dict())
    report = load_backbone(small(), state, strict=False)
    assert report.advice == "set init_values=1e-05 (now None)" and str(report).endswith(report.advice)


def test_grids_that_are_known_are_used() -> None:
    state = dict(small(img_size=(16, 64), init_values=0.5, use_rel_pos=True).state_dict())
    assert "init_values" in advice(state, small(img_size=(16, 64), use_rel_pos=True), grid=(2, 8))


@pytest.mark.parametrize("state", [{}, {"blocks.0.norm1.weight": torch.ones(1)}, {"fc.weight": torch.ones(1)}])
def test_what_is_no_vit_gives_no_advice(state: dict) -> None:
    assert advice(state, small()) == ""
