"""The backbone: equal to timm where it is a plain ViT, and every promise of its adaptive form."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense import APTViT
from apt_dense.ops import onednn_matmul
from apt_dense.ops.kernels import cpu_sliced
from apt_dense.patches.partition import DROPPED

from support.references import noise, normalise, randomise

PATCH = 4
SMALL = {"img_size": 32, "patch_size": PATCH, "embed_dim": 16, "depth": 2, "num_heads": 2}


#: A model of ViTDet's kind: windows that are cut short at the border, relative positions, a convolutional residual.
WINDOWED = {"window_size": 5, "window_block_indexes": (0,), "use_rel_pos": True, "residual_block_indexes": (1,)}


def small(seed: int = 0, **options: Any) -> APTViT:
    """A random model of two scales above the base, in eval mode."""
    return randomise(APTViT(**{**SMALL, "thresholds": (4.0, 3.0), **options}), 0.2, seed)


def flat(rows: int = 32, columns: int = 32, level: float = 90.0) -> Tensor:
    return normalise(torch.full((1, 3, rows, columns), level))


def noisy(rows: int = 32, columns: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalise(torch.randint(0, 256, (1, 3, rows, columns), generator=generator))


def half_flat(rows: int = 32, columns: int = 32) -> Tensor:
    image = noisy(rows, columns)
    image[..., : columns // 2] = flat(rows, columns // 2)
    return image


def mixed_batch() -> Tensor:
    return torch.cat([flat(), noisy(), half_flat(), noisy(seed=1)])


def pad_to(image: Tensor, rows: int, columns: int) -> Tensor:
    """Padding as hosts do it: zeros at the right and bottom, after normalisation."""
    return F.pad(image, (0, columns - image.shape[-1], 0, rows - image.shape[-2]))


def assert_maps_close(maps: tuple[Tensor, ...], expected: tuple[Tensor, ...], atol: float) -> None:
    assert len(maps) == len(expected)
    for map_, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(map_, other, atol=atol, rtol=0)


# ---- identity with timm

TIMM_MODELS = {
    "augreg tiny": ("vit_tiny_patch16_224.augreg_in21k", {"depth": 3}),
    "augreg small": ("vit_small_patch16_224.augreg_in21k", {"depth": 2}),
    "small patch 32": ("vit_small_patch32_224.augreg_in21k", {"depth": 2}),
    "deit": ("deit_tiny_patch16_224.fb_in1k", {"depth": 2}),
    "mae": ("vit_base_patch16_224.mae", {"depth": 2, "embed_dim": 96, "num_heads": 3}),
    "gap": ("vit_tiny_patch16_224", {"depth": 2, "class_token": False, "global_pool": "avg"}),
    "gap norm": ("vit_tiny_patch16_224", {"depth": 2, "class_token": False, "global_pool": "avg", "fc_norm": False}),
    "no_embed_class": ("vit_tiny_patch16_224", {"depth": 2, "no_embed_class": True}),
    "no final norm": ("vit_tiny_patch16_224", {"depth": 2, "final_norm": False}),
    "no qkv bias": ("vit_tiny_patch16_224", {"depth": 2, "qkv_bias": False, "mlp_ratio": 2}),
    "siglip": ("vit_base_patch16_siglip_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}),
}


def timm_model(name: str, seed: int = 0) -> torch.nn.Module:
    """A timm model with random weights that takes any input size."""
    model_name, options = TIMM_MODELS[name]
    options = {"dynamic_img_size": True, "dynamic_img_pad": True, "num_classes": 0, **options}
    return randomise(timm.create_model(model_name, **options), 0.04, seed)


@pytest.mark.parametrize("size", [(224, 224), (96, 160), (100, 50)], ids=str)
@pytest.mark.parametrize("name", TIMM_MODELS)
@torch.inference_mode()
def test_plain_vit_is_timms(name: str, size: tuple[int, int]) -> None:
    theirs = timm_model(name)
    images = noise(2, 3, *size)
    (ours,) = APTViT.from_timm(theirs)(images)
    assert ours.shape[2:] == tuple(-(-side // theirs.patch_embed.patch_size[0]) for side in size)
    features = theirs.forward_features(images)[:, theirs.num_prefix_tokens :]
    torch.testing.assert_close(ours.flatten(2).mT, features, atol=1e-4, rtol=0)
    assert ours.std() > 0.3


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", ["augreg tiny", "mae", "gap norm"])
@torch.inference_mode()
def test_intermediates_are_timms(name: str, norm: bool) -> None:
    theirs = timm_model(name)
    images = noise(2, 3, 64, 96)
    ours = APTViT.from_timm(theirs, out_indices=(0, 1), final_norm=norm, norm_intermediates=norm)
    expected = theirs.forward_intermediates(images, indices=[0, 1], norm=norm, intermediates_only=True)
    assert_maps_close(ours(images), tuple(expected), 1e-4)
    assert len(ours.blocks) == 2


@torch.inference_mode()
def test_final_norm_goes_to_the_last_output_only() -> None:
    theirs = timm_model("augreg tiny")
    images = noise(1, 3, 64, 64)
    plain = theirs.forward_intermediates(images, indices=[1, 2], norm=False, intermediates_only=True)
    normed = theirs.forward_intermediates(images, indices=[1, 2], norm=True, intermediates_only=True)
    assert_maps_close(APTViT.from_timm(theirs, out_indices=(1, 2))(images), (plain[0], normed[1]), 1e-4)


def test_gradients_of_the_plain_vit_are_timms() -> None:
    theirs = timm_model("deit")
    ours = APTViT.from_timm(theirs)
    images, weights = noise(1, 3, 48, 64), noise(1, 192, 3, 4)
    (ours(images)[0] * weights).sum().backward()
    (theirs.forward_features(images)[:, 1:].mT * weights.flatten(2)).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [(32, 32), (24, 44), (30, 17), (3, 5), (1, 1)], ids=str)
def test_thresholds_that_merge_nothing_give_the_plain_vit(size: tuple[int, int]) -> None:
    adaptive = small(class_token=True, thresholds=(-1.0, -1.0))
    plain = small(class_token=True, thresholds=())
    plain.load_state_dict(adaptive.state_dict(), strict=False)
    images = torch.cat([flat(*size), noisy(*size)])
    assert torch.equal(adaptive(images)[0], plain(images)[0])


def test_a_threshold_of_0_merges_nothing() -> None:
    """Entropy is never below 0, not by rounding either."""
    for patch_size in (4, 7, 14):
        model = APTViT(**{**SMALL, "img_size": 56, "patch_size": patch_size}, thresholds=(0.0, 0.0))
        assert (model.partition(flat(56, 56)) == 0).all()


# ---- partition


def test_flat_areas_take_large_patches_and_noise_small_ones() -> None:
    scale_map = small().partition(mixed_batch())
    assert scale_map.dtype == torch.int8
    assert (scale_map[0] == 2).all() and (scale_map[1] == 0).all()
    assert (scale_map[2, :, :4] == 2).all() and (scale_map[2, :, 4:] == 0).all()


def test_thresholds_order_scales() -> None:
    everything = small(thresholds=(float("inf"), -1.0)).partition(noisy())
    assert (everything == 1).all()
    assert (small(thresholds=(float("inf"), float("inf"))).partition(noisy()) == 2).all()


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_pixel_format_makes_partitions_alike(order: str) -> None:
    """The same 8-bit image is cut up the same however its host normalises it."""
    pixels = torch.randint(0, 256, (1, 3, 32, 32))
    pixels[..., :16] //= 32
    formats = [((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)), ((127.5,) * 3, (127.5,) * 3)]
    maps = []
    for mean, std in formats:
        model = small(pixel_mean=mean, pixel_std=std, channel_order=order, thresholds=(3.9, 3.9))
        maps.append(model.partition(normalise(pixels, model.pixel_format)))
    assert torch.equal(*maps) and len(maps[0].unique()) > 1


@pytest.mark.parametrize(("scorer", "threshold"), [("laplacian", 0.3), ("upsampling_error", 0.01)])
def test_other_scorers(scorer: str, threshold: float) -> None:
    scale_map = small(scorer=scorer, thresholds=(threshold, threshold)).partition(half_flat())
    assert (scale_map[0, :, 0] == 2).all() and (scale_map[0, :, -1] == 0).all()


def quarters_score(pixels: Tensor, patch_size: int, scales: tuple[int, ...]) -> tuple[Tensor, ...]:
    """A scorer of one's own: patches whose top left pixel is black are flat."""
    maps = []
    for size in (patch_size << scale for scale in scales):
        rows, columns = (length // size for length in pixels.shape[-2:])
        maps.append(pixels[:, 0, ::size, ::size][:, :rows, :columns])
    return tuple(maps)


def test_a_callable_scorer() -> None:
    pixels = torch.full((1, 3, 16, 16), 200.0)
    pixels[..., 0, 8] = 0
    scale_map = small(scorer=quarters_score, thresholds=(1.0,)).partition(normalise(pixels))
    assert scale_map[0].tolist() == [[0, 0, 1, 1]] * 2 + [[0, 0, 0, 0]] * 2


@torch.inference_mode()
def test_patches_stay_inside_windows() -> None:
    scale_map = small(**WINDOWED).partition(flat(48, 48))
    # Windows of 5 cells: patches of 4 cells begin at multiples of 4, of 2 cells at multiples of 2.
    assert scale_map[0, 0].tolist() == [2, 2, 2, 2, 0, 0, 1, 1, 1, 1, 1, 1]


# ---- contract 2: what a coarse token is


def naive_coarse_token(model: APTViT, image: Tensor, scale: int) -> Tensor:
    """embed(downsampled image) + position of the one patch that covers the whole image."""
    shrunk = F.interpolate(image, scale_factor=0.5**scale, mode="bilinear")
    position = F.interpolate(
        model.pos_embed.unflatten(1, model.pos_grid).permute(0, 3, 1, 2), size=(1, 1), mode="bicubic", antialias=True
    )
    return (model.patch_embed.proj(shrunk) + position).flatten()


@pytest.mark.parametrize("fresh", [True, False])
def test_a_coarse_token_is_the_embedding_of_the_downsampled_patch(fresh: bool) -> None:
    model = APTViT(**SMALL, thresholds=(float("inf"), float("inf")))
    image = noise(1, 3, 16, 16)
    expected = naive_coarse_token(model, image, 2)
    if not fresh:
        down, zero = (randomise(m, 0.3) for m in (model.coarse_embed.down, model.coarse_embed.zero))
        expected = expected + zero(down(down(model.patch_embed.proj(image))).flatten())
    row = model._embed(image, model.layout(image, model.partition(image)))
    assert row.shape == (1, 16)
    torch.testing.assert_close(row[0], expected, atol=1e-5, rtol=1e-4)


# ---- batch invariance


@torch.inference_mode()
def test_the_same_image_twice_in_a_batch_of_others() -> None:
    (out,) = small()(torch.cat([half_flat(), flat(), half_flat(), noisy()]))
    torch.testing.assert_close(out[0], out[2], atol=1e-5, rtol=0)


# ---- padding


@torch.inference_mode()
def test_dropped_padding_makes_no_tokens_and_gives_zeros() -> None:
    model = small(drop_padding=True)
    images = pad_to(half_flat(18, 21), 32, 32)
    scale_map = model.partition(images)
    kept = torch.zeros(8, 8, dtype=torch.bool)
    kept[:5, :6] = True  # 18 and 21 pixels, in cells of 4
    assert torch.equal(scale_map[0] != DROPPED, kept)
    (out,) = model(images)
    assert (out[0, :, ~kept] == 0).all() and (out[0, :, kept] != 0).all()


@pytest.mark.parametrize("thresholds", [(), (4.0, 3.0)], ids=str)
@torch.inference_mode()
def test_the_amount_of_padding_changes_nothing_for_real_cells(thresholds: tuple[float, ...]) -> None:
    """Positions are left out: like the hosts, we stretch them over the padded image."""
    model = small(drop_padding=True, thresholds=thresholds)
    model.pos_embed.zero_()
    image = half_flat(20, 28)
    (bare,) = model(image)
    for size in [(20, 32), (32, 32), (64, 28), (61, 50)]:
        (padded,) = model(pad_to(image, *size))
        torch.testing.assert_close(padded[..., :5, :7], bare, atol=1e-5, rtol=0)
        assert padded.abs().sum() == pytest.approx(bare.abs().sum().item(), rel=1e-4)


@torch.inference_mode()
def test_without_dropping_padding_gets_tokens() -> None:
    model = small()
    images = pad_to(noisy(16, 16), 32, 32)
    scale_map = model.partition(images)
    assert (scale_map[0, :4, :4] == 0).all() and (scale_map[0, 4:] == 2).all()
    assert (model(images)[0][..., 4:, :] != 0).all()


@pytest.mark.parametrize("level", [0.0, 255.0])
def test_black_and_white_photos_keep_their_tokens(level: float) -> None:
    scale_map = small(drop_padding=True).partition(pad_to(flat(16, 32, level), 32, 32))
    assert (scale_map[0, :4] == 2).all() and (scale_map[0, 4:] == DROPPED).all()


def test_zeros_inside_an_image_keep_their_tokens() -> None:
    image = noisy()
    image[..., 4:20, 4:20] = 0
    assert (small(drop_padding=True).partition(image) != DROPPED).all()


@torch.inference_mode()
def test_an_image_of_zeros_keeps_all_tokens() -> None:
    model = small(drop_padding=True)
    images = torch.zeros(1, 3, 32, 32)
    assert (model.partition(images) == 2).all()
    assert (model(images)[0] != 0).all()


@torch.inference_mode()
def test_pixels_that_fill_up_a_patch_are_no_image() -> None:
    """An image of 5 x 6 pixels is padded to 8 x 8 by the model itself: its patch of scale 1 would cross the edge."""
    assert (small().partition(flat(5, 6)) == 0).all()
    assert (small().partition(flat(8, 8)) == 1).all()


# ---- sizes


@torch.inference_mode()
def test_crop_floors_where_pad_ceils() -> None:
    images = noisy(23, 30)
    cropping, padding = small(partial_patches="crop"), small()
    assert cropping(images)[0].shape[2:] == (5, 7) and padding(images)[0].shape[2:] == (6, 8)
    assert torch.equal(cropping(images)[0], padding(images[..., :20, :28])[0])
    with pytest.raises(ValueError, match="images of 3 x 30 pixels hold no whole patch of 4 pixels"):
        cropping(noisy(3, 30))


@torch.inference_mode()
def test_several_outputs_and_negative_indices() -> None:
    model = small(depth=3, out_indices=(0, -1))
    maps = model(mixed_batch())
    assert model.out_indices == (0, 2) and len(maps) == 2
    shorter = small(depth=3, out_indices=0)
    shorter.load_state_dict(model.state_dict(), strict=False)
    assert len(shorter.blocks) == 1
    torch.testing.assert_close(shorter(mixed_batch())[0], maps[0])


# ---- training


def grads(model: APTViT, images: Tensor) -> dict[str, Tensor]:
    """Gradients of every parameter for one fixed loss; None where there is none."""
    model.zero_grad(set_to_none=True)
    sum((map_ * noise(*map_.shape)).sum() for map_ in model(images)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"drop_path_rate": 0.4}, {"class_token": True}, WINDOWED], ids=str)
def test_checkpointing_changes_no_gradient(options: dict) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        results.append(grads(small(checkpoint_blocks=checkpointing, **options).train(), mixed_batch()))
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_before_a_backward(checkpointing: bool) -> None:
    model = small(checkpoint_blocks=checkpointing).train()
    first, second = half_flat(), noisy(20, 24)
    expected = {name: grad.clone() for name, grad in grads(model, first).items()}
    for name, grad in grads(model, second).items():
        expected[name] += grad
    model.zero_grad()
    outputs = [model(images)[0] for images in (first, second)]
    sum((out * noise(*out.shape)).sum() for out in outputs).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_images() -> None:
    images = half_flat().requires_grad_()
    small()(images)[0].square().sum().backward()
    assert images.grad.isfinite().all() and (images.grad[..., 16:] != 0).any()


def test_drop_path_acts_in_training_only_and_on_whole_images() -> None:
    model = small(depth=1, drop_path_rate=0.0)
    model.blocks[0].drop_path.rate = 0.5
    images = flat().expand(24, -1, -1, -1)
    whole = model(images)[0]
    torch.testing.assert_close(whole, whole[:1].expand_as(whole), atol=1e-5, rtol=0)
    per_image = model.train()(images)[0].flatten(1)
    # Two branches, each kept or dropped: at most four different outcomes, and more than one.
    assert 2 <= len(per_image.mul(1e3).round().unique(dim=0)) <= 4


def test_drop_path_rates_rise_to_the_last_block() -> None:
    model = APTViT(**{**SMALL, "depth": 4}, drop_path_rate=0.3, out_indices=(1, 2))
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0.0, 0.1, 0.2])


# ---- modes, types, copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_autocast_keeps_the_partition(dtype: torch.dtype, training: bool, photos: dict[str, Tensor]) -> None:
    images = normalise(photos["coffee"][None, :, :96, :64])
    model = small(img_size=96, thresholds=(3.5, 4.5)[::-1], class_token=True).train(training)
    scale_map, (expected,) = model.partition(images), model(images)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(model.partition(images), scale_map)
        (out,) = model(images)
    assert len(scale_map.unique()) == 3
    torch.testing.assert_close(out.float(), expected, atol=0.15, rtol=0.1)
    out.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_inference_mode_and_no_grad_agree_with_training() -> None:
    model = small(class_token=True)
    (expected,) = model(mixed_batch())
    with torch.inference_mode():
        torch.testing.assert_close(model(mixed_batch())[0], expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(mixed_batch())[0], expected, atol=1e-5, rtol=0)


def torch_saved(model: APTViT) -> APTViT:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_no_weight_decay_names_parameters() -> None:
    model = small(class_token=True)
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


def test_fresh_weights_are_initialised() -> None:
    model = APTViT(**SMALL, class_token=True)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.2)
    assert 0 < model.cls_token.abs().max() < 1e-4
    for block in model.blocks:
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.2)
        assert not block.mlp.fc1.bias.any()


# ---- bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{}, {"thresholds": ()}, {"drop_padding": True}], ids=str)
def test_pixels_that_are_not_finite_name_their_image(value: float, options: dict) -> None:
    images = mixed_batch()
    images[1, 2, 30, 3] = value
    images[3, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"images \[1, 3\] of the batch hold NaN or infinite"):
        small(**options)(images)


def test_infinities_that_cancel_out_are_found() -> None:
    images = noisy()
    images[0, 0, 0, :2] = torch.tensor([float("inf"), -float("inf")])
    with pytest.raises(ValueError, match="NaN or infinite"):
        small()(images)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 1, 32, 32), (1, 1, 3, 32, 32), (32,)], ids=str)
@pytest.mark.parametrize("method", ["forward", "partition"])
def test_images_of_a_wrong_shape_are_refused(method: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        getattr(small(), method)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (1, 3, 0, 32), (1, 3, 32, 0)], ids=str)
def test_empty_batches_and_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one image of one pixel"):
        small()(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_images_that_are_not_normalised_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="expected normalised floating point pixels"):
        small()(torch.zeros(1, 3, 32, 32, dtype=dtype))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"thresholds": 5.5}, TypeError, "must be a sequence"),
        ({"thresholds": "5.5"}, TypeError, "must be a sequence"),
        ({"thresholds": (5.5, True)}, TypeError, "True is not a number"),
        ({"thresholds": (float("nan"),)}, TypeError, "nan is not a number"),
        ({"thresholds": (3.0, 4.0)}, ValueError, "rise with the scale"),
        ({"thresholds": (4.0,) * 4}, ValueError, "give at most 3 thresholds"),
        ({"scorer": "variance"}, ValueError, "scorer='variance' is unknown"),
        ({"out_indices": (0, 2)}, ValueError, r"out_indices=\(0, 2\) must be ascending block numbers from 0 to 1"),
        ({"out_indices": (1, 0)}, ValueError, "ascending"),
        ({"out_indices": (1, 1)}, ValueError, "ascending"),
        ({"out_indices": (0, -2)}, ValueError, "ascending"),
        ({"out_indices": -3}, ValueError, "ascending"),
        ({"out_indices": ()}, ValueError, "at least one"),
        ({"partial_patches": "floor"}, ValueError, "partial_patches='floor' must be one of"),
        ({"channel_order": "rgb"}, ValueError, "channel_order='rgb' must be one of"),
        ({"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}, ValueError, "grey levels"),
        ({"pixel_std": (58.0, 0.0, 57.0)}, ValueError, r"pixel_std=0.0 must be a finite number, above 0"),
        ({"pixel_mean": (120.0,)}, ValueError, "three numbers"),
        ({"in_chans": 4}, ValueError, "in_chans=4 with thresholds"),
        ({"in_chans": 1}, ValueError, "in_chans=1 with pixel_mean=.* a grey image has one mean"),
        ({"num_heads": 3}, ValueError, "embed_dim=16 is not a multiple of num_heads=3"),
        ({"drop_path_rate": 1.5}, ValueError, "drop_path_rate=1.5"),
        ({"final_norm": True, "out_indices": 0}, ValueError, "final_norm normalises block 1"),
        ({"norm_intermediates": True}, ValueError, "set final_norm=True"),
        ({"img_size": 2, "thresholds": ()}, ValueError, "img_size"),
        ({"reg_tokens": -1}, ValueError, "reg_tokens=-1 must be 0 or more"),
        ({"reg_tokens": 2, "use_rel_pos": True}, ValueError, "reg_tokens=2 together with .*use_rel_pos=True"),
        ({"reg_tokens": 2, **WINDOWED}, ValueError, "reg_tokens=2 together with window_size=5"),
        ({"mlp_layer": "moe"}, ValueError, "mlp_layer='moe' must be one of"),
        ({"act_layer": "relu"}, ValueError, "act_layer='relu' must be one of"),
        ({"norm_layer": "batchnorm"}, ValueError, "norm_layer='batchnorm' must be one of"),
        ({"rotary": {"rope_type": "mixed"}}, ValueError, "rotary.rope_type='mixed' must be one of"),
        ({"rotary": {}, "embed_dim": 12}, ValueError, "head channels in fours"),
        ({"rotary": {}, "window_size": 5, "window_block_indexes": (0,)}, ValueError, "need keys without a bias"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        APTViT(**{**SMALL, "thresholds": (4.0,), **options})


def test_other_channels_run_without_thresholds() -> None:
    model = small(in_chans=1, thresholds=(), drop_padding=True)
    assert model(noise(1, 1, 32, 32))[0].shape == (1, 16, 8, 8)


def test_grey_images_run_with_thresholds() -> None:
    model = small(in_chans=1, thresholds=(4.0,), pixel_mean=(120.0,) * 3, pixel_std=(60.0,) * 3)
    images = noise(1, 1, 32, 32)
    images[..., :16] = 0.5
    assert model(images)[0].shape == (1, 16, 8, 8) and {*model.partition(images).unique().tolist()} == {0, 1}


def test_built_models_take_no_name_arguments() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    for options in ({"pretrained": True}, {"img_size": 64}):
        with pytest.raises(ValueError, match="go with a model's name"):
            APTViT.from_timm(model, **options)


def test_thresholds_of_a_config_are_lists() -> None:
    model = APTViT(**SMALL, thresholds=[4.0, np.float64(3)], out_indices=[0, 1])
    assert model.thresholds == (4.0, 3.0) and model.out_indices == (0, 1)


# ---- rows that fill up


@pytest.mark.parametrize(
    "options",
    [{"class_token": True}, WINDOWED, {**WINDOWED, "token_budget": 0.7}],
    ids=["class token", "windows", "budget"],
)
def test_rows_that_fill_up_change_nothing(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(drop_path_rate=0.5, **options).train()
    images, found = mixed_batch(), []
    for whole in (onednn_matmul.whole_rows, lambda count: count, lambda count: count + 1):
        monkeypatch.setattr(onednn_matmul, "whole_rows", whole)
        torch.manual_seed(0)  # of the drawn drop paths
        maps = model(images)
        gradients = torch.autograd.grad(maps[-1].square().sum(), list(model.parameters()))
        found.append((*maps, *gradients))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-3)


def test_images_of_any_content_share_the_shapes_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN makes and keeps a kernel for every shape, 0.7 MB each."""
    shapes, tokens, plain = set(), set(), onednn_matmul._product
    monkeypatch.setattr(
        onednn_matmul, "_product", lambda x, w, *bias: shapes.add((x.shape, w.shape)) or plain(x, w, *bias)
    )
    monkeypatch.setattr(cpu_sliced, "_LONG_SEGMENT", 1)  # so that attention takes part
    monkeypatch.setattr(onednn_matmul, "_FEW_PRODUCTS", 0)
    model = small(img_size=96)
    for seed in range(48):
        is_flat = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(seed)) < 0.1 + seed / 120
        is_flat = is_flat.repeat_interleave(8, 2).repeat_interleave(8, 3)
        image = torch.where(is_flat, flat(96, 96), noisy(96, 96))
        with torch.no_grad():
            model(image)
        tokens.add(len(model.layout(image, model.partition(image)).image_N))
    wholes = len({onednn_matmul.whole_rows(count) for count in tokens})
    assert len(tokens) > 40 and wholes < 25
    # Three of linear layers and four of attention; linear layers of coarse patches besides.
    assert len(shapes) <= 7 * wholes + 40


# ---- forms that differ from the paper's

FORM = {"proportional_attention": 0.5}


@pytest.mark.parametrize("options", [{}, {"class_token": True}, WINDOWED, {"token_budget": 0.8}], ids=str)
def test_forms_change_nothing_where_nothing_is_merged(options: dict[str, Any]) -> None:
    """Not for thresholds=(), and not for images without a flat patch; where there are some they do."""
    budget = "token_budget" in options
    for image, is_merged in ((noisy(30, 37), budget), (half_flat(30, 37), True)):
        plain, other = (small(**options, **form)(image)[0] for form in ({}, FORM))
        assert torch.allclose(plain, other, atol=1e-5) != is_merged
    uniform = {**options, "thresholds": (), "token_budget": None}
    assert torch.equal(small(**uniform)(half_flat())[0], small(**uniform, **FORM)(half_flat())[0])


@pytest.mark.parametrize("options", [{}, WINDOWED, {"token_budget": 0.8}], ids=str)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "mask", "rows"])
def test_forms_train_and_leave_batch_mates_alone(options: dict[str, Any], backend: str) -> None:
    model = small(**options, **FORM, attention_backend=backend)
    together = model(mixed_batch())[0]
    alone = torch.cat([model(image[None])[0] for image in mixed_batch()])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    together.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
