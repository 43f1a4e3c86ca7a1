"""Names of other ViTs' weights: files as DINOv2, DINOv3 and EVA-02 publish them, built from timm's models by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from apt_dense import APTViT
from apt_dense.weights.convert import without_key_biases
from apt_dense.weights.formats import FEATURES, OURS, is_table, may_be_absent, rename
from apt_dense.weights.load import load_backbone
from apt_dense.weights.timm_arguments import apt_arguments

from support.references import noise, randomise

WIDTH = 48
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
State = dict[str, Tensor]


def timm_model(name: str, **options: Any) -> nn.Module:
    small = {"embed_dim": WIDTH, "depth": 2, "num_heads": 3, "num_classes": 0, "dynamic_img_size": True}
    return randomise(timm.create_model(name, **{**small, **options}), 0.1)


def renamed(state: State, *rules: tuple[str, str]) -> State:
    """timm's names -> another project's, by rules written out by hand."""
    for ours, theirs in rules:
        state = {re.sub(ours, theirs, name): value for name, value in state.items()}
    return state


def load(theirs: nn.Module, state: State, **options: Any) -> APTViT:
    """Ours with the arguments of timm's model and the weights of a state dict."""
    ours = APTViT(**{**apt_arguments(theirs), **options}).eval()
    load_backbone(ours, state)
    return ours


def assert_same_values(theirs: nn.Module, ours: APTViT) -> None:
    images = noise(1, 3, 3 * ours.patch_size, 5 * ours.patch_size)
    expected = theirs.forward_features(images)[:, theirs.num_prefix_tokens :].mT
    torch.testing.assert_close(ours(images)[0].flatten(2), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_giant_patch14_dinov2"])
def test_dinov2(name: str) -> None:
    theirs = timm_model(name, img_size=56)
    rules = [(r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3")] if "giant" in name else []
    state = renamed(theirs.state_dict(), *rules) | {"mask_token": torch.zeros(1, WIDTH)}
    assert_same_values(theirs, load(theirs, state))


def test_dinov2_with_registers() -> None:
    """Its class token has a position, in timm's model it holds it."""
    theirs = timm_model("vit_small_patch14_reg4_dinov2", img_size=56)
    state = renamed(theirs.state_dict(), ("^reg_token$", "register_tokens"))
    position = noise(1, 1, WIDTH)
    state["cls_token"] = state["cls_token"] - position
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    ours = load(theirs, state)
    assert_same_values(theirs, ours)
    report = load_backbone(ours, state)
    assert sorted(report.converted) == ["cls_token", "pos_embed"]


@pytest.mark.parametrize("masked", [True, False])
def test_dinov3(masked: bool) -> None:
    """One bias for all three, of which that of the keys is masked out."""
    theirs = timm_model("vit_small_patch16_dinov3_qkvb")
    state = renamed(theirs.state_dict(), ("^reg_token$", "storage_tokens"), (r"\.gamma_([12])$", r".ls\1.gamma"))
    state |= {name: torch.ones(4) for name in ("rope_embed.periods", "mask_token", "local_cls_norm.weight")}
    for block in ("blocks.0.attn.", "blocks.1.attn."):
        q_bias, v_bias = state.pop(block + "q_bias"), state.pop(block + "v_bias")
        state[block + "qkv.bias"] = torch.cat([q_bias, torch.full((WIDTH,), 0.7 * masked), v_bias])
        if masked:
            state[block + "qkv.bias_mask"] = torch.tensor([1.0, 0, 1]).repeat_interleave(WIDTH)
    assert_same_values(theirs, load(theirs, state))


def test_a_bias_of_keys_that_the_model_lacks_is_unexpected() -> None:
    theirs = timm_model("vit_small_patch16_dinov3_qkvb")
    state = {**theirs.state_dict(), "blocks.0.attn.k_bias": torch.ones(WIDTH)}
    with pytest.raises(ValueError, match=r"1 unexpected \(blocks.0.attn.k_bias\)"):
        load(theirs, state)
    del state["blocks.0.attn.k_bias"], state["blocks.0.attn.q_bias"], state["blocks.0.attn.v_bias"]
    with pytest.raises(ValueError, match=r"1 unexpected \(blocks.0.attn.qkv.bias\)"):
        load(theirs, {**state, "blocks.0.attn.qkv.bias": torch.ones(3 * WIDTH)})


def test_eva02() -> None:
    theirs = timm_model("eva02_base_patch16_clip_224", img_size=64)
    state = renamed(
        theirs.state_dict(),
        (r"([qv])_proj\.bias", r"\1_bias"),
        (r"attn\.norm\.", "attn.inner_attn_ln."),
        (r"mlp\.norm\.", "mlp.ffn_ln."),
        (r"mlp\.fc1_g\.", "mlp.w1."),
        (r"mlp\.fc1_x\.", "mlp.w2."),
        (r"mlp\.fc2\.", "mlp.w3."),
    )
    state |= {f"{prefix}freqs_{kind}": torch.ones(16, 16) for prefix in ("rope.", "blocks.0.attn.rope.", "rope_win.")
              for kind in ("cos", "sin")}  # fmt: skip
    assert not {"blocks.0.attn.q_proj.bias", "blocks.0.mlp.fc2.weight"} & state.keys()
    assert_same_values(theirs, load(theirs, state))


def test_learned_frequencies_are_no_table() -> None:
    assert is_table("rope.freqs_cos", torch.ones(1)) and is_table("blocks.3.attn.rope.bands", torch.ones(1))
    assert not is_table("rope.freqs", torch.ones(1)) and not is_table("blocks.0.attn.k_bias", torch.ones(1))
    assert is_table("blocks.0.attn.k_bias", torch.zeros(1))


def test_names_of_the_model_stay() -> None:
    """EVA's biases next to a fused projection are not those of separate projections."""
    for targets, expected in ((["q_bias"], "q_bias"), (["q_proj.weight"], "q_proj.bias"), ([], "q_bias")):
        state = {f"blocks.0.attn.{name}": torch.zeros(1) for name in targets}
        assert rename("blocks.0.attn.q_bias", state) == f"blocks.0.attn.{expected}"


def test_biases_that_need_no_change_stay_as_they_are() -> None:
    biases = {"blocks.0.attn.qkv.bias": torch.ones(3)}
    assert without_key_biases(biases, biases) == biases


def test_no_feature_has_parameters_that_are_those_of_another() -> None:
    """Each name belongs to one feature, so that leaving a feature out of a project leaves its parameters out."""
    options = {
        "class_token": True, "reg_tokens": 2, "pre_norm": True, "final_norm": True, "embed_norm": True,
        "thresholds": (4.0,), "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True,
        "init_values": 1.0, "k_bias": False,
    }  # fmt: skip
    names = set()
    for more in ({}, {"qkv_fused": False, "k_bias": True, "mlp_layer": "swiglu"}, {"qkv_fused": False}):
        names |= APTViT(**SMALL, **{**options, **more}).state_dict().keys()
    names |= APTViT(**SMALL, use_rel_pos=True, residual_block_indexes=(0,)).state_dict().keys()
    features = {name: [f for f, pattern in FEATURES.items() if re.match(pattern, name)] for name in names}
    assert all(len(found) <= 1 for found in features.values())
    assert {f for found in features.values() for f in found} == FEATURES.keys()
    core = {name for name, found in features.items() if not found}
    assert core == {name for name in APTViT(**SMALL).state_dict() if not re.search(r"qkv|fc1", name)}
    assert all(OURS.match(name) for name in names)


def test_what_checkpoints_may_lack() -> None:
    names = APTViT(**SMALL, thresholds=(4.0,), use_rel_pos=True).state_dict()
    new = {name for name in names if may_be_absent(name)}
    assert new == {name for name in names if "coarse_embed" in name or "rel_pos" in name} and len(new) == 6
