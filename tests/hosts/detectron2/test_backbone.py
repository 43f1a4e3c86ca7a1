"""The Detectron2 backbone: equal to Detectron2's ViT, names, arguments, training."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from detectron2.modeling import ViT
from detectron2.utils.events import EventStorage

from apt_dense.hosts.detectron2 import APTViT
from apt_dense.layout.scatter import scatter_tokens

from support.references import noise, randomise
from support.tiny_coco import one_thread  # noqa: F401 (a fixture)
from support.tiny_detectors import TINY, WINDOWED, compare, pair

# ---- values


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (dict(window_size=14, window_block_indexes=[0], use_rel_pos=True), (256, 256)),  # 2 cells beyond a window
        (dict(window_size=14, window_block_indexes=[0, 1], use_rel_pos=True), (480, 224)),
        (dict(window_size=14, window_block_indexes=[1], use_rel_pos=False), (240, 336)),
        (dict(window_size=16, window_block_indexes=[0], use_rel_pos=True), (256, 256)),
        (dict(window_size=16, window_block_indexes=[0], use_rel_pos=True), (256, 304)),
        (dict(use_rel_pos=True, residual_block_indexes=[1]), (208, 272)),
        (dict(use_rel_pos=False, use_abs_pos=False, qkv_bias=False), (64, 96)),
        (dict(window_size=4, window_block_indexes=[0], use_rel_pos=True, residual_block_indexes=[0, 1]), (112, 80)),
        (dict(window_size=4, window_block_indexes=[0, 1], use_rel_pos=True, qkv_bias=False), (80, 80)),
        (dict(pretrain_img_size=64, pretrain_use_cls_token=False, norm_layer=nn.LayerNorm, patch_size=8), (72, 40)),
        (dict(window_size=14, window_block_indexes=[0], use_rel_pos=True, embed_dim=96), (384, 400)),  # long segments
        (dict(window_size=4, window_block_indexes=[0], use_rel_pos=True), (75, 101)),  # partial patches
    ],
)
def test_without_thresholds_it_is_detectron2_s_vit(options: dict, size: tuple[int, int]) -> None:
    theirs, ours = pair(**{**TINY, **options})
    assert compare(theirs, ours, noise(2, 3, *size)) <= 1e-4


def test_positional_arguments_mean_the_same() -> None:
    sizes, norms, positions = (64, 8, 3, 48, 2, 2, 3.0, False, 0.0), (nn.LayerNorm, nn.GELU), (True, True, True)
    arguments = (*sizes, *norms, *positions, 4, (0,), (1,), False, 32, False, "y")
    theirs = randomise(ViT(*arguments))
    ours = APTViT(*arguments).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.allclose(ours(noise(1, 3, 64, 64))["y"], theirs(noise(1, 3, 64, 64))["y"], atol=1e-4)


def test_arguments_and_defaults_are_detectron2_s() -> None:
    theirs, ours = (list(inspect.signature(cls).parameters.values()) for cls in (ViT, APTViT))
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert len(theirs) == 21 and ours[-1].kind is inspect.Parameter.VAR_KEYWORD


def test_thresholds_make_fewer_tokens_and_the_same_shapes() -> None:
    flat = torch.zeros(1, 3, 128, 128) + 0.5
    model = APTViT(**WINDOWED, thresholds=(5.5, 4.0)).eval()
    assert model.partition(flat).unique().tolist() == [2]
    assert model(flat)["last_feat"].shape == (1, 48, 8, 8)


@torch.no_grad()
def test_regions_reach_the_core() -> None:
    model = APTViT(**TINY, thresholds=(100.0,)).eval()
    images = noise(1, 3, 64, 64)
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 5, 5] = True
    outputs, layout = model.forward_tokens(images, mask)
    expected = scatter_tokens(outputs[0], layout)
    assert torch.equal(model(images, mask)["last_feat"], expected) and not torch.equal(
        model(images)["last_feat"], expected
    )


def test_weights_of_timm_models_keep_timm_s_values() -> None:
    timm = pytest.importorskip("timm")
    options = dict(num_classes=0, depth=2, img_size=64, dynamic_img_size=True)
    vit = randomise(timm.create_model("vit_tiny_patch16_224", **options))
    images = noise(2, 3, 96, 64)
    with torch.no_grad():
        (expected,) = vit.get_intermediate_layers(images, n=1, reshape=True, norm=True)
        found = APTViT.from_timm(vit).eval()(images)["last_feat"]
    assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_quickgelu_224", "vit_small_patch16_dinov3"])
def test_other_families_of_timm(name: str) -> None:
    """Activations and norms given by name instead of by class as in Detectron2's ``ViT``."""
    timm = pytest.importorskip("timm")
    options = dict(num_classes=0, depth=2, embed_dim=48, num_heads=3, img_size=64, dynamic_img_size=True)
    vit = randomise(timm.create_model(name, **options))
    images = noise(2, 3, 96, 64)
    with torch.no_grad():
        expected = vit.forward_features(images)[:, vit.num_prefix_tokens :].mT
        found = APTViT.from_timm(vit).eval()(images)["last_feat"]
    assert (found.flatten(2) - expected).abs().max() <= 1e-4


def test_rms_norms_by_name() -> None:
    model = APTViT(**{**TINY, "norm_layer": "rmsnorm"}, norm_eps=1e-3)
    assert type(model.blocks[0].norm1).__name__ == "RmsNorm" and model.blocks[0].norm1.eps == 1e-3


# ---- arguments


@pytest.mark.parametrize(
    ("norm_layer", "eps"),
    [(nn.LayerNorm, 1e-5), (partial(nn.LayerNorm, eps=1e-6), 1e-6), (partial(nn.LayerNorm), 1e-5)],
)
def test_norm_layers_set_the_epsilon(norm_layer: Any, eps: float) -> None:
    assert APTViT(**{**TINY, "norm_layer": norm_layer}).blocks[0].norm1.eps == eps


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(norm_layer=nn.BatchNorm2d), ValueError, r"norm_layer=.*BatchNorm2d.*expected nn.LayerNorm or partial"),
        (dict(norm_layer=partial(nn.LayerNorm, bias=False)), ValueError, "norm_layer="),
        (dict(act_layer=nn.ReLU), ValueError, "act_layer=.*ReLU.*nn.GELU"),
        (dict(out_indices=(0, 1)), ValueError, r"out_indices=\(0, 1\).*one output"),
        (dict(drop_padding=True, pixel_mean=(128, 128, 128)), ValueError, "cannot be told from padding"),
        (dict(tresholds=(5.5,)), TypeError, "tresholds"),
        (dict(channel_order="L"), ValueError, "channel_order='L' must be one of"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        APTViT(**{**TINY, **options})


def test_out_feature_names_the_map() -> None:
    model = APTViT(**TINY, out_feature="map")
    assert list(model(noise(1, 3, 32, 48))) == ["map"]
    assert model.output_shape()["map"].channels == 48 and model.output_shape()["map"].stride == 16


def test_relative_positions_start_at_zero_or_not() -> None:
    for zero in (True, False):
        table = APTViT(**WINDOWED, rel_pos_zero_init=zero).blocks[0].attn.rel_pos_h
        assert bool((table == 0).all()) == zero
        assert table.abs().max() <= 0.1


# ---- training


def test_share_of_tokens_is_logged_while_training_inside_a_storage() -> None:
    model = APTViT(**WINDOWED, thresholds=(5.5, 4.0)).train()
    flat = torch.zeros(2, 3, 128, 128) + 0.5
    model(flat)
    with EventStorage() as storage:
        model(flat)
        assert storage.latest()["tokens_kept"][0] == pytest.approx(1 / 16)
    with EventStorage() as storage:
        model.eval()(flat)
        assert "tokens_kept" not in storage.latest()
        APTViT(**WINDOWED, thresholds=(5.5, 4.0), token_budget=0.5).train()(flat)
        assert 0.4 < storage.latest()["tokens_kept"][0] <= 0.5


def test_activation_checkpointing_needs_no_fairscale_and_changes_nothing() -> None:
    results = []
    for use in (False, True):
        model = randomise(APTViT(**WINDOWED, thresholds=(3.0,), drop_path_rate=0.5, use_act_checkpoint=use)).train()
        torch.manual_seed(1)
        loss = model(noise(3, 3, 64, 64))["last_feat"].square().mean()
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    assert "fairscale" not in sys.modules
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


def test_stochastic_depth_drops_whole_images() -> None:
    model = randomise(APTViT(**WINDOWED, drop_path_rate=0.9, thresholds=(3.0,))).train()
    image = noise(1, 3, 64, 64)
    maps = model(image.expand(16, -1, -1, -1))["last_feat"]
    # Of two branches, each image loses none, one or both: at most four different results.
    assert 2 <= len({tuple(feature_map.flatten()[:8].tolist()) for feature_map in maps}) <= 4


BAD_ARGUMENTS = {
    "out_feature": [3, None, "", True],
    "norm_layer": [3, None, torch.nn.BatchNorm2d, "bn", True],
    "act_layer": [torch.nn.ReLU, 3, "relu"],
    "rel_pos_zero_init": ["no", 0, 1, 2, None],
    "strict_loading": ["no", 0, 1, 2, None],
    "use_act_checkpoint": ["no", 0, 1, 2, None],
    "pretrain_img_size": [0, 1.5, "224", True],
    "pretrain_use_cls_token": ["no", 0, 1, 2, None],
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_by_name(name: str) -> None:
    for value in BAD_ARGUMENTS[name]:
        with pytest.raises((TypeError, ValueError), match=name):
            APTViT(**{**dict(img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2), name: value})
