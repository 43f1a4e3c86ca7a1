"""timm's models: the arguments that rebuild one, and a refusal by name of every feature that has none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import GatedMlp, GluMlp, LayerScale, RmsNorm, SimpleNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from apt_dense import APTViT
from apt_dense.nn.rotary import Rotary
from apt_dense.weights import loading_mixin
from apt_dense.weights.load import load_backbone
from apt_dense.weights.timm_arguments import apt_arguments, create_timm_model

from support.references import noise, randomise

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
        (
            "vit_tiny_patch16_224",
            {"class_token": False, "global_pool": "avg"},
            {"class_token": False, "final_norm": False},
        ),
        ("vit_tiny_patch16_224", {"no_embed_class": True}, {"class_token": True, "no_embed_class": True}),
        ("vit_tiny_patch16_224", {"final_norm": False}, {"final_norm": False}),
        ("vit_tiny_patch16_224", {"qkv_bias": False}, {"qkv_bias": False}),
        ("vit_tiny_patch16_224", {"mlp_ratio": 1.5}, {"mlp_ratio": 1.5}),
        ("vit_tiny_patch16_224", {"in_chans": 1}, {"in_chans": 1}),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}, {"use_abs_pos": False}),
        ("vit_tiny_patch16_224", {"norm_layer": RmsNorm}, {"norm_layer": "rmsnorm", "norm_eps": 1e-6}),
        ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}, {"act_layer": "gelu_tanh"}),
        ("vit_tiny_patch16_224", {"act_layer": nn.GELU}, {}),
        ("deit3_small_patch16_224", {}, {"no_embed_class": True, "init_values": 1e-6}),
        (
            "vit_base_patch16_clip_quickgelu_224",
            {},
            {
                "pre_norm": True,
                "act_layer": "quick_gelu",
                "patch_bias": False,
            },
        ),
        ("vit_base_patch16_siglip_224", {}, {"class_token": False, "final_norm": True}),
        (
            "vit_giant_patch14_reg4_dinov2",
            {"mlp_ratio": 5},
            {
                "mlp_layer": "swiglu_packed",
                "mlp_ratio": 2.5,
                "reg_tokens": 4,
                "no_embed_class": True,
                "init_values": 1e-5,
            },
        ),
        (
            "eva02_base_patch16_clip_224",
            {},
            {
                "mlp_layer": "swiglu",
                "scale_mlp_norm": True,
                "scale_attn_norm": True,
                "qkv_fused": False,
                "k_bias": False,
                "rotary": Rotary(ref_feat_shape=(16, 16)),
            },
        ),
        (
            "vit_small_patch16_dinov3",
            {},
            {
                "qkv_bias": False,
                "reg_tokens": 4,
                "use_abs_pos": False,
                "init_values": 1e-5,
                "rotary": Rotary("dinov3", 100.0, rotate_half=True),
            },
        ),
        (
            "vit_pe_core_tiny_patch16_384",
            {},
            {
                "pre_norm": True,
                "rotary": Rotary(ref_feat_shape=(24, 24), grid_offset=1.0, grid_indexing="xy"),
            },
        ),
        ("vit_small_patch32_224", {}, {"patch_size": 32}),
        ("vit_tiny_patch16_224", {"norm_layer": functools.partial(nn.LayerNorm, eps=1e-3)}, {"norm_eps": 1e-3}),
    ],
)
def test_arguments_follow_the_model(name: str, options: dict, expected: dict) -> None:
    arguments = apt_arguments(tiny(name, **options))
    for key, value in expected.items():
        assert arguments[key] == (pytest.approx(value) if key.startswith("pixel") else value), key
    unusual = set(arguments) - set(apt_arguments(tiny()))
    assert unusual <= set(expected) | {"norm_layer"}


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


# ---- weights of a file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of DINOv2's names, as that project publishes it."""
    torch.save({"model": {**randomise(tiny(DINOV2)).state_dict(), "mask_token": torch.zeros(1)}}, tmp_path / "x.pth")
    return tmp_path / "x.pth"


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """timm's names stand for small models; returns what each was asked for."""
    create, asked = timm.create_model, []

    def create_small(name: str, **options: Any) -> nn.Module:
        asked.append(options)
        return create(name, **{**TINY, **options})

    monkeypatch.setattr(timm, "create_model", create_small)
    return asked


DINOV2 = "vit_small_patch14_dinov2"


@pytest.mark.parametrize("kind", [str, Path])
@torch.inference_mode()
def test_pretrained_takes_a_file(kind: type, file: Path, small_models: list) -> None:
    ours = APTViT.from_timm(DINOV2, pretrained=kind(file), img_size=70)
    assert [options["pretrained"] for options in small_models] == [False]
    theirs = randomise(timm.create_model(DINOV2, img_size=70, num_classes=0))
    state = torch.load(file)["model"]
    positions = timm.layers.resample_abs_pos_embed(state["pos_embed"], (5, 5), num_prefix_tokens=1)
    theirs.load_state_dict({**state, "pos_embed": positions}, strict=False)
    images = noise(1, 3, 70, 70)
    expected = theirs.forward_features(images)[:, 1:]
    torch.testing.assert_close(ours.eval()(images)[0].flatten(2).mT, expected, atol=1e-4, rtol=0)


def test_a_file_of_another_model_is_refused(file: Path, small_models: list) -> None:
    with pytest.raises(ValueError, match=r"does not fit the backbone: .*; set init_values=1e-05 \(now None\)"):
        APTViT.from_timm("vit_huge_patch14_224", pretrained=file)


@pytest.mark.parametrize("text", ["true", "True", "yes", "timm", "weights/none.pth", ""])
def test_text_that_names_no_file_is_not_taken_for_true(text: str, small_models: list) -> None:
    with pytest.raises(FileNotFoundError, match=f"pretrained='{text}': there is no such file; give .* or True for"):
        APTViT.from_timm(DINOV2, pretrained=text)
    assert not small_models


@pytest.mark.parametrize("value", [1, None, b"x.pth", ["x.pth"]])
def test_pretrained_is_a_truth_value_or_a_path(value: object, small_models: list) -> None:
    with pytest.raises(TypeError, match="must be True, False or the path of a file"):
        APTViT.from_timm(DINOV2, pretrained=value)
    assert not small_models


# ---- patches of another size


@pytest.mark.parametrize("source", ["timm", "file", "model"])
def test_patches_are_resampled_on_request(source: str, file: Path, small_models: list) -> None:
    """Positions are resampled once, from 37 x 37 to 4 x 4; by the name of timm's model, timm does both."""
    state = torch.load(file)["model"]
    if source == "model":
        model = tiny(DINOV2)
        model.load_state_dict(state, strict=False)
        ours = APTViT.from_timm(model, patch_size=16, pretrain_img_size=64)
    else:
        ours = APTViT.from_timm(DINOV2, file if source == "file" else False, img_size=64, patch_size=16)
    assert ours.patch_size == 16 and ours.pos_grid == (4, 4) and ours.strides == (16,)
    if source != "timm":
        expected = timm.layers.resample_patch_embed(state["patch_embed.proj.weight"], [16, 16])
        torch.testing.assert_close(ours.patch_embed.proj.weight, expected)
        positions = timm.layers.resample_abs_pos_embed(state["pos_embed"], (4, 4), num_prefix_tokens=1)
        torch.testing.assert_close(ours.pos_embed, positions)


def test_patches_are_not_resampled_unasked(file: Path, small_models: list) -> None:
    with pytest.raises(ValueError, match=r"set patch_size=14 \(now 16\), or resize_patches=True to resample it"):
        APTViT.from_timm("vit_small_patch16_224", pretrained=file, init_values=1e-5)


# ---- refusals

UNSUPPORTED = {
    "deit_tiny_distilled_patch16_224": ({}, "the architecture VisionTransformerDistilled"),
    "beit_base_patch16_224": ({}, "the architecture Beit"),
    "vit_relpos_small_patch16_224": ({}, "the architecture VisionTransformerRelPos"),
    "resnet18": (None, "the architecture ResNet"),
    "vit_small_r26_s32_224": ({}, "its patch embedding"),
    "vit_small_patch16_18x2_224": ({}, "blocks of type ParallelThingsBlock"),
    "eva02_enormous_patch14_clip_224": ({}, "blocks of type EvaBlockPostNorm"),
    "vit_dwee_patch16_reg1_gap_256": ({}, "attention of type DiffAttention"),
    "vit_small_patch16_rope_mixed_224": ({}, "rotary positions of type RotaryEmbeddingMixed"),
    "eva02_tiny_patch14_224": (
        {"rope_type": "mrope", "rope_mrope_section": (2, 3, 3)},
        "rotary positions of type RotaryEmbeddingMRope",
    ),
    "vit_base_patch16_sapiens2": ({"num_kv_heads": 1}, r"grouped-query attention \(1 heads of keys for 2 of q"),
}

UNSUPPORTED_OPTIONS = [
    ({"patch_size": (16, 8)}, r"patches of \(16, 8\) pixels"),
    ({"act_layer": nn.ReLU}, "an MLP with ReLU"),
    ({"mlp_layer": GluMlp}, "an MLP of type GluMlp"),
    ({"mlp_layer": GatedMlp}, "an MLP of type GatedMlp"),
    ({"norm_layer": SimpleNorm}, r"the norm SimpleNorm\(\)"),
    ({"norm_layer": functools.partial(nn.LayerNorm, bias=False)}, r"the norm LayerNorm\(.*bias=False\)"),
    ({"norm_layer": functools.partial(nn.LayerNorm, elementwise_affine=False)}, r"the norm LayerNorm\("),
    ({"embed_norm_layer": nn.LayerNorm}, "the norm LayerNorm"),
]


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that comes as far as copying weights."""

    def load(*_: Any) -> None:
        raise AssertionError("weights were copied from a model that is not supported")

    monkeypatch.setattr(loading_mixin, "load_backbone", load)


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


def gated(model: nn.Module) -> str:
    model.blocks[1].attn.gate = nn.Linear(32, 32)
    return "gated attention of"


def without_a_bias(model: nn.Module) -> str:
    model.blocks[2].mlp.fc1.bias = None
    return "biases in some of the linear layers"


def scaled_in_one_branch(model: nn.Module) -> str:
    model.blocks[0].ls2 = LayerScale(32)
    return "LayerScale of one branch alone"


def scaled_in_one_block(model: nn.Module) -> str:
    model.blocks[1] = tiny(init_values=0.1).blocks[0]
    return "blocks that differ in LayerScale of"


def narrower_in_one_block(model: nn.Module) -> str:
    model.blocks[1] = tiny(mlp_ratio=2, qk_norm=True).blocks[0]
    return "blocks that differ in mlp_ratio, qk_norm of"


def with_a_norm_of_queries(model: nn.Module) -> str:
    model.blocks[2].attn.q_norm = nn.LayerNorm(16)
    return "a norm of queries or keys alone"


def with_another_epsilon(model: nn.Module) -> str:
    model.norm.eps = 0.5
    return r"the norm LayerNorm\(.*eps=0.5.* next to LayerNorm\("


def with_another_norm(model: nn.Module) -> str:
    model.blocks[2].norm2 = RmsNorm(32)
    return r"the norm RmsNorm\(\) next to LayerNorm\("


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    "change",
    [gated, without_a_bias, scaled_in_one_branch, scaled_in_one_block, narrower_in_one_block, with_a_norm_of_queries,
     with_another_epsilon, with_another_norm],
)  # fmt: skip
def test_a_feature_of_a_single_layer_is_found(change: Callable[[nn.Module], str]) -> None:
    model = tiny(depth=3)
    feature = change(model)
    with pytest.raises(ValueError, match=f"does not support {feature}"):
        APTViT.from_timm(model)


def test_all_features_are_named_at_once() -> None:
    model = tiny(patch_size=(16, 8), act_layer=nn.ReLU)
    rotary = tiny("vit_small_patch16_dinov3", rope_type="mixed", rope_rotate_half=False, attn_only_layer_scale=True)
    with pytest.raises(ValueError, match=r"patches of \(16, 8\) pixels, .* not square, an MLP with ReLU of timm's"):
        apt_arguments(model)
    with pytest.raises(ValueError, match="type RotaryEmbeddingMixed, LayerScale of one branch alone of timm's"):
        apt_arguments(rotary)


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
