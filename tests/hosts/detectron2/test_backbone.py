"""The Detectron2 backbone against Detectron2's own: values, names, checkpoint files, padding, yacs."""

from __future__ import annotations

import inspect
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg, instantiate
from detectron2.data import transforms as T
from detectron2.modeling import SimpleFeaturePyramid as PlainFeaturePyramid
from detectron2.modeling import ViT, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

import apt_dense
from apt_dense.hosts.detectron2 import APTViT, SimpleFeaturePyramid, add_apt_config, get_apt_lr_decay_rate
from apt_dense.patches.partition import filled_region

from support.references import noise, randomise
from support.tiny_coco import (  # noqa: F401 (skips the tests where there is no Detectron2)
    ADAPTIVE,
    ROOT,
    TINY_YACS,
    UNIFORM,
    one_thread,
    tiny_config,
    tiny_model,
)

TINY = dict(embed_dim=48, depth=2, num_heads=2, norm_layer=partial(nn.LayerNorm, eps=1e-6), img_size=256)
WINDOWED = dict(TINY, window_size=4, window_block_indexes=[0], use_rel_pos=True)


def pair(**options: Any) -> tuple[ViT, APTViT]:
    """Detectron2's ViT with random parameters, biases and norms too, and ours with the same."""
    theirs = randomise(ViT(**options))
    ours = APTViT(**options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def compare(theirs: ViT, ours: APTViT, images: Tensor) -> float:
    with torch.no_grad():
        expected, found = theirs(images)["last_feat"], ours(images)["last_feat"]
    assert found.shape == expected.shape
    return (found - expected).abs().max().item()


# ---- values ----------------------------------------------------------------------------------------------------------


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
        (dict(window_size=4, window_block_indexes=[0], use_rel_pos=True), (75, 101)),  # no whole number of patches
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


def test_pyramid_has_the_same_names_and_values() -> None:
    theirs, ours = pair(**WINDOWED)
    arguments = ("last_feat", 16, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), "LN", 0)
    plain = randomise(PlainFeaturePyramid(theirs, *arguments))
    adapted = SimpleFeaturePyramid(ours, *arguments).eval()
    adapted.load_state_dict(plain.state_dict(), strict=True)
    assert adapted.output_shape() == plain.output_shape()
    with torch.no_grad():
        expected, found = plain(noise(2, 3, 128, 96)), adapted(noise(2, 3, 128, 96))
    assert list(found) == list(expected) == ["p2", "p3", "p4", "p5", "p6"]
    assert all((found[level] - expected[level]).abs().max() <= 1e-4 for level in found)


@pytest.mark.parametrize("norm", ["LN", "BN"])
def test_pyramid_on_tokens_has_upstream_s_values(norm: str) -> None:
    """Its pointwise layers run on mixed patches, with padding dropped; upstream's run on the scattered map."""
    images = noise(2, 3, 128, 96)
    images[:, :, :70, :] = 0.3
    images[1, :, 100:] = 0
    net = randomise(APTViT(**WINDOWED, thresholds=(5.5, 4.0), drop_padding=True)).eval()
    assert {-1, 0} < set(net.partition(images).unique().tolist())
    arguments = (net, "last_feat", 16, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), norm, 0)
    plain, adapted = PlainFeaturePyramid(*arguments), randomise(SimpleFeaturePyramid(*arguments)).eval()
    plain.eval().load_state_dict(adapted.state_dict(), strict=True)
    with torch.no_grad():
        expected, found = plain(images), adapted(images)
        net.register_forward_hook(lambda *_: None)
        hooked = adapted(images)
    for level in expected:
        torch.testing.assert_close(found[level], expected[level], atol=1e-5, rtol=1e-5)
        assert torch.equal(hooked[level], expected[level])


def test_thresholds_make_fewer_tokens_and_the_same_shapes() -> None:
    flat = torch.zeros(1, 3, 128, 128) + 0.5
    model = APTViT(**WINDOWED, thresholds=(5.5, 4.0)).eval()
    assert model.partition(flat).unique().tolist() == [2]
    assert model(flat)["last_feat"].shape == (1, 48, 8, 8)


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
    """Their activations and norms are names, where Detectron2's ``ViT`` takes classes."""
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


# ---- arguments -------------------------------------------------------------------------------------------------------


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


def test_learning_rates_decay_as_detectron2_s_and_new_parameters_get_the_full_rate() -> None:
    model = tiny_model(ADAPTIVE, "model.backbone.net.residual_block_indexes=[1]")
    names = [name for name, _ in model.named_parameters()]
    ours = {name: get_apt_lr_decay_rate(name, 0.7, 2) for name in names}
    theirs = {name: get_vit_lr_decay_rate(name, 0.7, 2) for name in names}
    assert ours == pytest.approx(theirs)
    coarse = [name for name in names if ".coarse_embed." in name]
    assert len(coarse) == 4 and all(ours[name] == 1.0 for name in coarse)
    assert ours["backbone.net.pos_embed"] == pytest.approx(0.7**3)
    for name in ("reg_token", "norm_pre.weight"):
        assert get_apt_lr_decay_rate(f"backbone.net.{name}", 0.7, 2) == pytest.approx(0.7**3)
    assert ours["backbone.net.blocks.1.attn.qkv.weight"] == pytest.approx(0.7)
    with pytest.raises(ValueError, match="blocks.1.* beyond num_layers=1"):
        get_apt_lr_decay_rate("backbone.net.blocks.1.norm1.weight", 0.7, 1)


# ---- training --------------------------------------------------------------------------------------------------------


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


# ---- checkpoint files ------------------------------------------------------------------------------------------------

STOCK = ("model.backbone._target_=detectron2.modeling.SimpleFeaturePyramid", "model.roi_heads.num_classes=3",
         "model.roi_heads.box_predictor.test_score_thresh=0.0")  # fmt: skip


def stock_model() -> nn.Module:
    """Detectron2's own Mask R-CNN with random parameters: the uniform config without anything of ours."""
    cfg = tiny_config(UNIFORM, *STOCK)
    cfg.model.backbone.net._target_ = ViT
    for key in ("thresholds", "drop_padding", "pixel_mean", "pixel_std", "channel_order"):
        cfg.model.backbone.net.pop(key)
    return randomise(instantiate(cfg.model), std=0.05)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """It, and a folder with its weights as Detectron2 writes them, model.pth, and as its zoo has them, model.pkl."""
    model, folder = stock_model(), tmp_path_factory.mktemp("stock")
    DetectionCheckpointer(model, str(folder)).save("model")
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    (folder / "model.pkl").write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2"}))
    return model, folder


def load(model: nn.Module, path: str) -> Any:
    """Load with Detectron2's checkpointer; the names that were missing and unexpected."""
    checkpointer, reports = DetectionCheckpointer(model), []
    checkpointer._log_incompatible_keys = reports.append
    checkpointer.load(path)
    (report,) = reports
    assert not report.incorrect_shapes
    return report


def detect(model: nn.Module) -> Instances:
    pixels = (noise(3, 90, 120) * 40 + 128).clamp(0, 255).byte()
    with torch.no_grad():
        return model([{"image": pixels, "height": 90, "width": 120}])[0]["instances"]


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
def test_stock_checkpoint_gives_the_same_detections(stock: tuple[nn.Module, Path], name: str) -> None:
    theirs, folder = stock
    ours = tiny_model(UNIFORM, *STOCK[1:])
    report = load(ours, str(folder / name))
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    expected, found = detect(theirs), detect(ours)
    assert len(found) == len(expected) >= 20
    assert torch.equal(found.pred_classes, expected.pred_classes)
    assert torch.allclose(found.scores, expected.scores, atol=1e-5)
    assert torch.allclose(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-3)
    assert (found.pred_masks != expected.pred_masks).float().mean() < 1e-3


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
def test_only_the_documented_parameters_are_missing_in_a_stock_checkpoint(stock: tuple, name: str) -> None:
    ours = tiny_model(ADAPTIVE, *STOCK[1:])
    report = load(ours, str(stock[1] / name))
    new = {f"backbone.net.coarse_embed.{layer}.{kind}" for layer in ("down", "zero") for kind in ("weight", "bias")}
    assert set(report.missing_keys) == new and report.unexpected_keys == []
    assert not ours.backbone.net.coarse_embed.zero.weight.any()
    assert len(detect(ours)) > 0


def test_stock_config_needs_its_one_line_changed_and_no_other(stock: tuple[nn.Module, Path]) -> None:
    one_line = "model.backbone.net._target_=apt_dense.hosts.detectron2.APTViT"
    ours = tiny_model(UNIFORM, *STOCK, one_line)
    assert type(ours.backbone) is PlainFeaturePyramid and type(ours.backbone.net) is APTViT
    load(ours, str(stock[1] / "model.pth"))
    assert torch.allclose(detect(ours).scores, detect(stock[0]).scores, atol=1e-5)


def test_mae_weights_go_to_the_backbone_by_matching_heuristics(tmp_path: Path) -> None:
    source = randomise(apt_dense.APTViT(embed_dim=48, depth=2, num_heads=2, class_token=True, final_norm=True))
    torch.save({"model": source.state_dict()}, tmp_path / "mae.pth")
    ours = tiny_model(ADAPTIVE)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    report = load(ours, f"{tmp_path / 'mae.pth'}?matching_heuristics=True")
    assert set(report.unexpected_keys) == {"cls_token", "norm.weight", "norm.bias"}
    for name, value in ours.state_dict().items():
        from_mae = source.state_dict().get(name.removeprefix("backbone.net."))
        taken = name.startswith("backbone.net.") and from_mae is not None
        assert torch.equal(value, from_mae if taken else before[name]), name
        assert (name in report.missing_keys) != taken


# ---- padding ---------------------------------------------------------------------------------------------------------


def constant(colour: tuple[int, int, int], height: int = 70, width: int = 100) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, height, width).contiguous()


def preprocessed(model: nn.Module, *images: Tensor) -> Tensor:
    return model.preprocess_image([{"image": image} for image in images]).tensor


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return tiny_model(ADAPTIVE)


def photo(height: int = 70, width: int = 100) -> Tensor:
    return (noise(3, height, width) * 60 + 128).clamp(0, 255).byte()


@pytest.mark.parametrize(
    "image",
    [photo(), constant((0, 0, 0)), constant((124, 116, 104)), constant((123, 116, 103)), constant((255, 255, 255))],
    ids=["photo", "black", "mean", "below_mean", "white"],
)
def test_padding_is_dropped_and_nothing_that_the_image_owns(detector: nn.Module, image: Tensor) -> None:
    (scale_map,) = detector.backbone.net.partition(preprocessed(detector, image))
    assert scale_map.shape == (8, 8)  # padded to a square of 128
    owned = torch.zeros(8, 8, dtype=torch.bool)
    owned[:5, :7] = True  # 70 x 100 pixels touch 5 x 7 cells
    assert torch.equal(scale_map >= 0, owned)


def test_no_grey_level_looks_like_padding(detector: nn.Module) -> None:
    images = preprocessed(detector, *(constant((level,) * 3, 20, 20) for level in range(256)))
    assert (filled_region(images) == 20).all()


def test_padding_of_a_fixed_size_crop_is_not_dropped(detector: nn.Module) -> None:
    pixels = photo().permute(1, 2, 0).numpy()
    transform = T.FixedSizeCrop((128, 128), pad=True).get_transform(pixels)
    padded = transform.apply_image(pixels)
    assert (padded[70:] == 128).all()
    image = torch.from_numpy(np.ascontiguousarray(padded.transpose(2, 0, 1)))
    assert (detector.backbone.net.partition(preprocessed(detector, image)) >= 0).all()


def test_zeros_count_as_padding_at_the_right_and_bottom_only(detector: nn.Module) -> None:
    images = noise(1, 3, 128, 128)
    images[..., :64, :32] = 0  # top left
    images[..., 64:80, 64:80] = 0  # inside
    images[..., 112:, :] = 0  # bottom row of cells
    dropped = detector.backbone.net.partition(images)[0] < 0
    assert dropped[7].all() and not dropped[:7].any()


def windowed_twins() -> tuple[APTViT, APTViT]:
    """The same ViT with windows in all blocks, once dropping padding."""
    options = dict(WINDOWED, window_block_indexes=[0, 1])
    keeping, dropping = (randomise(APTViT(**options, drop_padding=drop)) for drop in (False, True))
    return keeping, dropping


def test_windows_without_padding_do_not_notice_that_it_is_dropped(detector: nn.Module) -> None:
    keeping, dropping = windowed_twins()
    images = preprocessed(detector, photo())
    with torch.no_grad():
        kept, dropped = keeping(images)["last_feat"][0], dropping(images)["last_feat"][0]
    # Of 5 x 7 real cells, the window of rows and columns 0-3 alone has no padding.
    changed = (kept - dropped).abs().amax(0) > 1e-6
    assert not changed[:4, :4].any()
    assert changed[:5, 4:7].all() and changed[4, :7].all()  # other real cells lose keys
    assert not dropped[:, 5:].any() and not dropped[:, :, 7:].any()  # and dropped ones are zero


def test_padding_that_is_kept_is_detectron2_s(detector: nn.Module) -> None:
    theirs, ours = pair(**WINDOWED, drop_path_rate=0.0)
    assert compare(theirs, ours, preprocessed(detector, photo(), photo(33, 128))) <= 1e-4


def test_sizes_become_divisible_without_square_padding() -> None:
    model = tiny_model(ADAPTIVE, "model.backbone.square_pad=0")
    assert model.backbone.size_divisibility == 32
    constraints = model.backbone.padding_constraints
    assert constraints["size_divisibility"] == constraints["size_divisiblity"] == 32
    assert preprocessed(model, photo(70, 100)).shape[-2:] == (96, 128)
    with torch.no_grad():
        levels = model.backbone(preprocessed(model, photo(70, 100)))
    assert [tuple(level.shape[-2:]) for level in levels.values()] == [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]


# ---- yacs ------------------------------------------------------------------------------------------------------------

YAML = ROOT / "configs" / "detectron2" / "mask_rcnn_apt_vitdet_b.yaml"


def test_yacs_config_builds_the_same_model_as_the_lazy_one() -> None:
    cfg = get_cfg()
    add_apt_config(cfg)
    cfg.merge_from_file(str(YAML))
    cfg.merge_from_list(TINY_YACS)
    model, lazy = build_model(cfg).eval(), tiny_model(ADAPTIVE, "model.roi_heads.num_classes=3")
    net = model.backbone.net
    assert net.thresholds == (5.5, 4.0) and net.drop_padding and net.pixel_format == lazy.backbone.net.pixel_format
    shapes = [{name: value.shape for name, value in m.backbone.state_dict().items()} for m in (model, lazy)]
    assert shapes[0] == shapes[1]
    model.backbone.load_state_dict(lazy.backbone.state_dict())
    images = preprocessed(model, photo())
    assert torch.equal(images, preprocessed(lazy, photo()))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model.backbone(images).values(), lazy.backbone(images).values()))
    assert isinstance(detect(model), Instances)


def test_yacs_config_takes_a_token_budget() -> None:
    cfg = get_cfg()
    add_apt_config(cfg)
    cfg.merge_from_file(str(YAML))
    cfg.merge_from_list([*TINY_YACS, "MODEL.APT.TOKEN_BUDGET", 0.7, "MODEL.APT.ATTENTION_BACKEND", "mask"])
    model = build_model(cfg).eval()
    net = model.backbone.net
    assert net.token_budget == 0.7 and {block.attn.backend for block in net.blocks} == {"mask"}
    assert isinstance(detect(model), Instances)


def test_yacs_config_without_the_node_says_what_to_call() -> None:
    cfg = get_cfg()
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.NAME = "cpu", "build_apt_vit_sfp_backbone"
    with pytest.raises(ValueError, match=r"call add_apt_config\(cfg\)"):
        build_model(cfg)
