"""timm's models: the arguments that rebuild one, and a refusal by name of every feature that has none."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import timm
import torch
from references import noise, randomise
from timm.layers import RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from apt_dense import APTViT, backbone
from apt_dense.checkpoints import load_backbone
from apt_dense.timm_models import apt_arguments, create_timm_model

TINY = {"depth": 1, "embed_dim": 32, "num_heads": 2}


def tiny(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    return timm.create_model(name, **{**TINY, **options})


# ---- arguments


def test_arguments_of_a_mae() -> None:
    assert apt_arguments(timm.create_model("vit_small_patch16_224", depth=2, img_size=(64, 96))) == {
        "img_size": (64, 96),
        "patch_size": 16,
        "in_chans": 3,
        "embed_dim": 384,
        "depth": 2,
        "num_heads": 6,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "patch_bias": True,
        "class_token": True,
        "no_embed_class": False,
        "norm_eps": 1e-6,
        "final_norm": True,
        "pixel_mean": (127.5, 127.5, 127.5),
        "pixel_std": (127.5, 127.5, 127.5),
    }


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("deit_tiny_patch16_224", {}, {"pixel_mean": (0.485 * 255, 0.456 * 255, 0.406 * 255)}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, {"class_token": False, "final_norm": False}),
        ("vit_tiny_patch16_224", {"no_embed_class": True}, {"class_token": True, "no_embed_class": True}),
        ("vit_tiny_patch16_224", {"final_norm": False}, {"final_norm": False}),
        ("vit_tiny_patch16_224", {"qkv_bias": False}, {"qkv_bias": False}),
        ("vit_tiny_patch16_224", {"mlp_ratio": 1.5}, {"mlp_ratio": 1.5}),
        ("vit_tiny_patch16_224", {"in_chans": 1}, {"in_chans": 1}),
        ("vit_small_patch32_224", {}, {"patch_size": 32}),
        ("vit_tiny_patch16_224", {"norm_layer": functools.partial(nn.LayerNorm, eps=1e-3)}, {"norm_eps": 1e-3}),
    ],
)
def test_arguments_follow_the_model(name: str, options: dict, expected: dict) -> None:
    arguments = apt_arguments(tiny(name, **options))
    for key, value in expected.items():
        assert arguments[key] == pytest.approx(value), key


def test_every_weight_of_the_model_is_copied() -> None:
    model = randomise(tiny(num_classes=0))
    ours = APTViT.from_timm(model).state_dict()
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())


def test_from_timm_by_name_and_options() -> None:
    options = {"thresholds": (5.0,), "out_indices": (0, 3), "final_norm": False}
    model = APTViT.from_timm("vit_tiny_patch16_224.augreg_in21k", img_size=64, **options)
    assert model.img_size == (64, 64) and model.pos_grid == (4, 4) and model.thresholds == (5.0,)
    assert model.pixel_format.mean == (127.5, 127.5, 127.5)
    assert len(model.blocks) == 4 and model.norm is None


def test_a_vit_built_without_create_model() -> None:
    """Such a model carries no pretrained_cfg."""
    model = randomise(VisionTransformer(img_size=32, embed_dim=32, depth=1, num_heads=2, num_classes=0))
    images = noise(1, 3, 32, 32)
    (ours,) = APTViT.from_timm(model)(images)
    torch.testing.assert_close(ours.flatten(2).mT, model.forward_features(images)[:, 1:], atol=1e-4, rtol=0)


# ---- refusals

UNSUPPORTED = {
    "deit3_small_patch16_224": ({}, "LayerScale"),
    "vit_small_patch14_dinov2": ({}, "LayerScale"),
    "vit_small_patch14_reg4_dinov2": ({}, "register tokens, LayerScale"),
    "vit_base_patch16_clip_224": ({}, r"pre-norm \(norm_pre\)"),
    "vit_base_patch16_clip_quickgelu_224": ({}, "QuickGELU"),
    "vit_giant_patch14_dinov2": ({}, "an MLP of type GluMlp"),
    "deit_tiny_distilled_patch16_224": ({}, "the architecture VisionTransformerDistilled"),
    "beit_base_patch16_224": ({}, "the architecture Beit"),
    "eva02_tiny_patch14_224": ({}, "the architecture Eva"),
    "vit_small_patch16_18x2_224": ({}, "blocks of type ParallelThingsBlock"),
    "vit_small_r26_s32_224": ({}, "its patch embedding"),
    "vit_relpos_small_patch16_224": ({}, "the architecture VisionTransformerRelPos"),
    "resnet18": (None, "the architecture ResNet"),
}

UNSUPPORTED_OPTIONS = [
    ({"qk_norm": True}, "qk-norm"),
    ({"init_values": 1e-5}, "LayerScale"),
    ({"reg_tokens": 2}, "register tokens"),
    ({"pre_norm": True}, "pre-norm"),
    ({"scale_attn_norm": True}, "a norm inside attention"),
    ({"scale_mlp_norm": True}, "an MLP with GELU and LayerNorm"),
    ({"pos_embed": "none"}, "the lack of absolute positions"),
    ({"patch_size": (16, 8)}, r"patches of \(16, 8\) pixels"),
    ({"act_layer": "gelu_tanh"}, "an MLP with GELUTanh"),
    ({"act_layer": nn.ReLU}, "an MLP with ReLU"),
    ({"proj_bias": False}, "its attention widths or biases"),
    ({"norm_layer": RmsNorm}, "norm RmsNorm"),
    ({"embed_norm_layer": nn.LayerNorm}, "its patch embedding"),
]


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that comes as far as copying weights."""

    def load(*_: Any) -> None:
        raise AssertionError("weights were copied from a model that is not supported")

    monkeypatch.setattr(backbone, "load_backbone", load)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_models_with_other_features_are_refused_by_name(name: str) -> None:
    options, feature = UNSUPPORTED[name]
    model = timm.create_model(name) if options is None else tiny(name, **options)
    with pytest.raises(ValueError, match=f"does not support .*{feature}.* of timm's {name}"):
        APTViT.from_timm(model)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(("options", "feature"), UNSUPPORTED_OPTIONS, ids=str)
def test_options_without_a_counterpart_are_refused(options: dict, feature: str) -> None:
    with pytest.raises(ValueError, match=f"does not support .*{feature}"):
        APTViT.from_timm(tiny(**options))


@pytest.mark.usefixtures("no_loading")
def test_a_feature_of_a_single_block_is_found() -> None:
    model = tiny(depth=3)
    model.blocks[1] = tiny(init_values=0.1).blocks[0]
    with pytest.raises(ValueError, match="LayerScale"):
        APTViT.from_timm(model)


def test_all_features_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"register tokens, pre-norm \(norm_pre\), LayerScale, qk-norm of timm's"):
        apt_arguments(tiny(reg_tokens=1, pre_norm=True, init_values=0.1, qk_norm=True))


def test_other_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="the architecture Linear of timm's Linear"):
        APTViT.from_timm(nn.Linear(2, 2))


# ---- names


@pytest.mark.parametrize(
    ("name", "alike"),
    [
        ("vit_tiny_patch16_223", "vit_tiny_patch16_224"),
        ("vit_bse_patch16_224.mae", "vit_base_patch16_224"),
        ("deit_tny_patch16_224", "deit_tiny_patch16_224"),
    ],
)
def test_unknown_names_suggest_others(name: str, alike: str) -> None:
    with pytest.raises(ValueError, match=f"timm has no model '{name}'.*'{alike}'"):
        APTViT.from_timm(name)


def test_unknown_tags_are_refused() -> None:
    with pytest.raises((ValueError, RuntimeError), match="nonsense"):
        create_timm_model("vit_tiny_patch16_224.nonsense", False, None)


def test_create_timm_model_has_no_head() -> None:
    model = create_timm_model("vit_tiny_patch16_224", False, (32, 48))
    assert model.patch_embed.grid_size == (2, 3) and isinstance(model.head, nn.Identity)


@pytest.mark.parametrize("size", [(96, 96), (64, 144)])
def test_the_trunk_of_sams_encoder_is_timms(size: tuple[int, int]) -> None:
    """Windows that are cut short, relative positions, and both from SAM's own file."""
    theirs = timm.create_model(
        "samvit_base_patch16", img_size=96, patch_size=8, window_size=5, depth=3, embed_dim=48, num_heads=3,
        global_attn_indexes=(1,), num_classes=0,
    ).eval()  # fmt: skip
    theirs.neck = torch.nn.Identity()
    randomise(theirs)
    images = noise(2, 3, *size)
    expected = theirs.forward_features(images)
    ours = APTViT.from_timm(theirs).eval()
    torch.testing.assert_close(ours(images)[0], expected, atol=1e-4, rtol=0)

    names = {f"image_encoder.{k.replace('mlp.fc', 'mlp.lin')}": v for k, v in theirs.state_dict().items()}
    fresh = APTViT(**apt_arguments(theirs))
    report = load_backbone(fresh, {**names, "mask_decoder.x": torch.zeros(1)})
    assert not report.missing and not report.unexpected
    torch.testing.assert_close(fresh.eval()(images)[0], expected, atol=1e-4, rtol=0)
