"""A weights file says what it is: every family in every format that can hold it, with what has to be asked for, and the
same values afterwards."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apt_dense import APTViT
from apt_dense.option_checks import defaults_of
from apt_dense.options import BlockOptions, ModelOptions, PositionOptions, Rotary
from apt_dense.weights.arguments_from_file import arguments_of, told_by
from apt_dense.weights.convert import from_apt
from apt_dense.weights.files import CheckpointError
from apt_dense.weights.formats import FORMATS, WRITABLE, translate
from apt_dense.weights.timm_arguments import apt_arguments

from support.families import ALL, FAMILIES, HEADS, WIDTH, timm_model
from support.references import noise, randomise

DEFAULTS = defaults_of(ModelOptions, BlockOptions, PositionOptions)
#: What names and shapes of a family do not tell, beyond the number of heads.
ASKS = {
    "deit3": {"rotary"},
    "clip": {"act_layer", "rotary"},
    "openai clip": {"act_layer", "rotary"},
    "siglip": {"act_layer"},
    "siglip so400m": {"act_layer"},
    "siglip giant": {"act_layer"},
    "pe core": {"act_layer", "rotary"},
    "pe spatial": {"act_layer", "rotary"},
    "pe lang": {"act_layer", "rotary"},
    "pe lang giant": {"act_layer", "rotary"},
    "rope": {"act_layer", "norm_eps", "rotary"},
    "rope and positions": {"rotary"},
    "rope reg gap": {"act_layer", "norm_eps", "rotary"},
    "qk-norm": {"act_layer", "norm_eps", "rotary"},
    "rms norm": {"act_layer", "norm_eps", "rotary"},
    "dinov3 with half of the scales": {"act_layer", "norm_eps", "rotary"},
}
SHOWS_HEADS = "qk-norm", "dinov3 with half of the scales"
#: Files of projects that are only read, and the families that come in them.
FILES = {
    "mae": ("mae",),
    "dinov2": ("dinov2", "dinov2 reg", "dinov2 giant", "dinov2 giant reg"),
    "dinov3": ("dinov3", "dinov3 bias", "dinov3 plus"),
    "eva02": ("eva02 base", "eva02 clip"),
    "apt_release": ("augreg", "mae", "deit3"),
}
IN_FILES = [(format_, family) for format_, families in FILES.items() for family in families]
#: Formats of detectors leave out tokens and norms; they are tested below.
WRITTEN = [name for name in WRITABLE if name not in ("detectron2", "sam", "eva02_det")]
SMALL = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2}


def given(arguments: dict[str, Any], family: str, format_: str = "timm") -> dict[str, Any]:
    """The answers to what a file does not tell."""
    asked = {"num_heads", *ASKS.get(family, ())} | ({"act_layer", "norm_eps"} if format_ == "mmseg" else set())
    asked -= {"num_heads"} if family in SHOWS_HEADS else set()
    asked -= {"rotary"} if format_ == "mmseg" else set()
    return {name: arguments.get(name, DEFAULTS[name]) for name in asked}


def in_format(state: dict[str, Tensor], format_: str) -> dict[str, Tensor]:
    """Our state dict with the names of a format, without metadata, as files of other projects are."""
    if FORMATS[format_].place is not None:
        return dict(from_apt(state, format_).state)
    sign = {"mae": "decoder_norm.bias"}.get(format_, "mask_token")
    return {translate(name, FORMATS[format_].table): value for name, value in state.items()} | {sign: torch.zeros(1)}


def assert_timms(ours: APTViT, theirs: nn.Module) -> None:
    images = noise(1, 3, 3 * ours.patch_size, 5 * ours.patch_size)
    expected = theirs.forward_features(images)[:, theirs.num_prefix_tokens :].mT
    torch.testing.assert_close(ours.eval()(images)[0].flatten(2), expected, atol=1e-4, rtol=0)


# ---- every family, every format


@pytest.mark.parametrize("family", ALL)
@torch.inference_mode()
def test_families_of_timm(family: str) -> None:
    """timm's own state dict: all arguments are those of the model, what is not told is asked for, and nothing else."""
    theirs = timm_model(family)
    arguments, told = apt_arguments(theirs), told_by(theirs.state_dict())
    answers = given(arguments, family)
    assert told.asks.keys() == answers.keys()
    found = {**DEFAULTS, **told.arguments, **answers}
    for name in DEFAULTS.keys() - {"init_values"} - ({"img_size"} if theirs.pos_embed is None else set()):
        assert found[name] == pytest.approx(arguments.get(name, DEFAULTS[name])), name
    assert (found["init_values"] is None) == ("init_values" not in arguments)
    assert_timms(APTViT.from_weights(theirs.state_dict(), **answers), theirs)


def written(theirs: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The weights of a timm model in each format of a classifier that can hold it."""
    own, files = APTViT.from_timm(theirs).state_dict(), {}
    for format_ in WRITTEN:
        # MMSegmentation's ViT always has a class token and never rotary positions.
        if format_ == "mmseg" and (theirs.cls_token is None or getattr(theirs, "rope", None) is not None):
            continue
        with contextlib.suppress(ValueError):  # no place for a weight
            files[format_] = in_format(own, format_)
    return files


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_families_in_other_names(family: str) -> None:
    theirs = timm_model(family)
    files = written(theirs)
    assert {"apt", "timm", "timm_eva"} <= files.keys()
    assert ("mmseg" in files) == (family in ("augreg", "mae", "clip", "openai clip"))
    for format_, state in files.items():
        assert_timms(APTViT.from_weights(state, **given(apt_arguments(theirs), family, format_)), theirs)


@pytest.mark.parametrize(("format_", "family"), IN_FILES)
@torch.inference_mode()
def test_files_of_other_projects(format_: str, family: str, tmp_path: Path) -> None:
    theirs = timm_model(family)
    state = in_format(APTViT.from_timm(theirs).state_dict(), format_)
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "x.pth")
    ours = APTViT.from_weights(tmp_path / "x.pth", **given(apt_arguments(theirs), family))
    assert_timms(ours, theirs)


@pytest.mark.parametrize("family", ALL)
@torch.inference_mode()
def test_our_own_files_tell_everything(family: str, tmp_path: Path) -> None:
    """Also inside a larger model, with thresholds, odd sizes and another output."""
    options = {"thresholds": (5.0, 3.5), "scorer": "laplacian", "pixel_mean": (1.5, 2.0, 3.0), "drop_padding": True}
    ours = APTViT.from_timm(timm_model(family), **options, out_indices=(0, 1)).eval()
    randomise(ours.coarse_embed)
    torch.save({"state_dict": nn.ModuleDict({"backbone": ours}).state_dict()}, tmp_path / "x.pth")
    back = APTViT.from_weights(tmp_path / "x.pth").eval()
    assert back.patches == ours.patches and back.out_indices == (0, 1)
    images = noise(1, 3, 4 * ours.patch_size, 5 * ours.patch_size)
    assert all(map(torch.equal, back(images), ours(images)))
    assert APTViT.from_weights(tmp_path / "x.pth", thresholds=()).thresholds == ()


# ---- detectors


def detector(**options: Any) -> APTViT:
    return randomise(APTViT(**{**SMALL, "norm_eps": 1e-6, **options}), 0.2)


WINDOWS = {"window_size": 3, "window_block_indexes": (0, 2)}
RELATIVE = {**WINDOWS, "use_rel_pos": True, "img_size": 128}
DETECTORS = {
    "detectron2": ({**RELATIVE, "pretrain_img_size": 64, "pretrain_use_cls_token": True}, ()),
    "detectron2 long": ({**RELATIVE, "img_size": (96, 160), "pretrain_use_cls_token": True}, ()),
    "detectron2 with residuals": (
        {"pretrain_use_cls_token": True, "residual_block_indexes": (1,), **WINDOWS},
        ("num_heads", "window_size", "window_block_indexes"),
    ),
    "sam": (RELATIVE, ()),
    "sam without windows": ({**RELATIVE, "window_size": 0}, ()),
    "apt": (RELATIVE, ("norm_eps",)),
    "eva02_det": (
        {"pretrain_use_cls_token": True, "mlp_layer": "swiglu", "scale_mlp_norm": True, "qkv_fused": False,
         "k_bias": False, "rotary": Rotary(ref_feat_shape=(16, 16)), **WINDOWS},
        ("num_heads", "window_size", "window_block_indexes"),
    ),
}  # fmt: skip


def assert_same(found: APTViT, expected: APTViT) -> None:
    images = noise(1, 3, 96, 112)
    torch.testing.assert_close(found.eval()(images)[0], expected(images)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", DETECTORS)
@torch.inference_mode()
def test_detectors(name: str) -> None:
    options, asked = DETECTORS[name]
    source = detector(**options)
    target = name.split(" ")[0]
    grid = source.pos_grid if target in ("sam", "detectron2") else None
    state = dict(from_apt(source.state_dict(), target, grid=grid).state)
    own = {**DEFAULTS, **SMALL, **options, "norm_eps": 1e-6}
    assert told_by(state, grid=grid).asks.keys() == set(asked)
    found = APTViT.from_weights(state, grid=grid, **{name: own[name] for name in asked})
    assert (found.img_size, found.pos_grid) == (source.img_size, source.pos_grid)
    assert_same(found, source)


@torch.inference_mode()
def test_tables_of_eva02s_detectors_tell_windows_and_heads() -> None:
    options, _ = DETECTORS["eva02_det"]
    source = detector(**{**options, "img_size": 128, "pretrain_img_size": 64})
    state = dict(from_apt(source.state_dict(), "eva02_det").state)
    for block, cells in enumerate((9, 64, 9)):
        state |= {f"blocks.{block}.attn.rope.freqs_{kind}": torch.zeros(cells, 16) for kind in ("cos", "sin")}
    state |= {"rope_win.freqs_cos": torch.zeros(9, 16), "rope_glb.freqs_cos": torch.zeros(64, 16)}
    found = APTViT.from_weights(state)
    assert (found.img_size, found.pos_grid) == ((128, 128), (4, 4))
    assert_same(found, source)


@torch.inference_mode()
def test_tables_of_dinov3_tell_heads() -> None:
    theirs = timm_model("dinov3")
    state = in_format(APTViT.from_timm(theirs).state_dict(), "dinov3")
    assert_timms(APTViT.from_weights({**state, "rope_embed.periods": torch.ones(WIDTH // HEADS // 4)}), theirs)


@torch.inference_mode()
def test_dinov2s_registers_without_positions() -> None:
    """DINOv2's file has a position for the class token, timm's model none."""
    theirs = timm_model("dinov2 reg")
    state, position = dict(theirs.state_dict()), noise(1, 1, WIDTH)
    state |= {"cls_token": state["cls_token"] - position, "pos_embed": torch.cat([position, state["pos_embed"]], 1)}
    assert_timms(APTViT.from_weights(state, num_heads=HEADS), theirs)


# ---- arguments that are given


@pytest.mark.parametrize(("size", "expected"), [(None, (64, 64)), (96, (96, 96)), ((32, 80), (32, 80))])
def test_img_size(size: Any, expected: tuple[int, int]) -> None:
    state = timm_model("augreg").state_dict()
    model = APTViT.from_weights(state, img_size=size, num_heads=HEADS)
    assert model.img_size == expected and model.pos_grid == tuple(side // 16 for side in expected)


def test_given_arguments_win() -> None:
    state = timm_model("augreg").state_dict()
    model = APTViT.from_weights(state, num_heads=HEADS, class_token=False, final_norm=False, act_layer="silu")
    assert model.cls_token is model.norm is None and model.block_options.act_layer == "silu"
    assert APTViT.from_weights(state, num_heads=HEADS, out_indices=(0, 1), thresholds=(5.0,)).thresholds == (5.0,)


@pytest.mark.parametrize("size", [None, 96])
def test_patches_of_another_size_are_resampled(size: int | None) -> None:
    """Without a size for the images, there are as many patches as before."""
    theirs = timm_model("dinov2")
    model = APTViT.from_weights(theirs.state_dict(), size, num_heads=HEADS, patch_size=16)
    assert model.pos_grid == ((4, 4) if size is None else (6, 6)) and model.img_size == ((size or 64,) * 2)
    assert model.patch_embed.proj.weight.shape[-1] == 16
    assert torch.equal(model.blocks[0].attn.qkv.weight, theirs.blocks[0].attn.qkv.weight)


@torch.inference_mode()
def test_grids_that_are_not_square_are_named() -> None:
    theirs = timm_model("augreg", img_size=(32, 128))
    state = dict(theirs.state_dict())
    assert APTViT.from_weights(state, num_heads=HEADS).pos_grid == (4, 4)
    model = APTViT.from_weights(state, grid=(2, 8), num_heads=HEADS)
    assert model.img_size == (32, 128)
    assert_timms(model, theirs)
    with pytest.raises(ValueError, match=r"not a grid of 3 x 5 .*\(grid=, --grid\)"):
        APTViT.from_weights(state, grid=(3, 5), num_heads=HEADS)


# ---- refusals


def test_what_is_not_told_is_asked_for_by_name(tmp_path: Path) -> None:
    torch.save(dict(timm_model("openai clip").state_dict()), tmp_path / "clip.pth")
    message = (
        r"clip\.pth: the weights are those of CLIP or PE \(48 channels, 2 blocks, patches of 16 pixels; names of "
        r"timm's VisionTransformer\), whose names and shapes do not tell num_heads, act_layer and rotary\. Add "
        r"num_heads, "
        r'act_layer="gelu" \("quick_gelu" for OpenAI\'s CLIP\), rotary=None for CLIP .*from_timm\(NAME, pretrained=FILE'
    )
    with pytest.raises(CheckpointError, match=message):
        APTViT.from_weights(tmp_path / "clip.pth")
    with pytest.raises(CheckpointError, match="do not tell act_layer and rotary"):
        APTViT.from_weights(tmp_path / "clip.pth", num_heads=3)
    assert APTViT.from_weights(tmp_path / "clip.pth", num_heads=3, act_layer="quick_gelu", rotary=None).depth == 2


def test_the_example_of_heads_is_that_of_published_models() -> None:
    state = timm_model("dinov2", embed_dim=384, num_heads=6).state_dict()
    with pytest.raises(ValueError, match=r"Add num_heads=6 \(as published models of 384 channels have\);"):
        arguments_of(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.1.attn.proj.bias"), "it lacks blocks.1.attn.proj.bias"),
        (lambda state: state.pop("patch_embed.proj.weight"), "it lacks patch_embed.proj.weight"),
        (lambda state: state.update({"blocks.0.gate": torch.ones(1)}), "no known ViT has blocks.0.gate"),
        (lambda state: state.update({"blocks.99999999.norm1.weight": torch.ones(1)}), "of its 3 blocks, some before"),
        (lambda state: state.update({"patch_embed.proj.weight": torch.ones(48, 768)}), r"is \(48, 768\); expected"),
        (lambda state: state.update({"patch_embed.proj.weight": torch.ones(48, 3, 8, 16)}), r"\(48, 3, 8, 16\); ex"),
        (lambda state: state.update({"pos_embed": torch.ones(1, 15, 48)}), "not a square grid"),
    ],
)
def test_what_is_no_whole_vit_is_refused(change: Any, message: str) -> None:
    state = dict(timm_model("augreg").state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        APTViT.from_weights(state, num_heads=HEADS)


def test_windows_of_two_sizes_are_refused() -> None:
    state = dict(from_apt(detector(**RELATIVE).state_dict(), "sam").state)
    state |= {f"blocks.1.attn.rel_pos_{axis}": torch.zeros(9, 16) for axis in "hw"}
    with pytest.raises(ValueError, match=r"over \(8, 8\) and \[\(3, 3\), \(5, 5\)\] rows and columns"):
        APTViT.from_weights(state)


@torch.inference_mode()
def test_one_size_of_relative_positions_may_be_windows_or_the_image() -> None:
    source = detector(use_rel_pos=True, img_size=48, pretrain_img_size=64, pretrain_use_cls_token=True)
    state = dict(from_apt(source.state_dict(), "detectron2").state)
    with pytest.raises(ValueError, match=r"do not tell window_size and window_block_indexes\. Add window_size=0 if"):
        APTViT.from_weights(state)
    model = APTViT.from_weights(state, window_size=0)
    assert (model.img_size, model.pos_grid) == ((48, 48), (4, 4))
    assert_same(model, source)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.pth"))):
        APTViT.from_weights(tmp_path / "none.pth")
