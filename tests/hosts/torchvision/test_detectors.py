"""torchvision's detectors: levels, anchors, pixels, padding that costs nothing, gradients, names of weights, errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN

from apt_dense import APTViT
from apt_dense.hosts.torchvision import PyramidBackbone, faster_rcnn, mask_rcnn, retinanet
from apt_dense.patches.scores import denormalise

from support.coco_folder import one_thread  # noqa: F401 (an automatic fixture)
from support.references import noise, randomise

TINY = {"img_size": 128, "embed_dim": 48, "depth": 2, "num_heads": 3}
WINDOWS = {"window_size": 4, "window_block_indexes": (0,), "use_rel_pos": True}
ADAPTIVE = {"thresholds": (5.5, 4.0), "drop_padding": True}


def vit(**options: object) -> APTViT:
    return APTViT(**{**TINY, **WINDOWS, **options})


def detector(backbone: APTViT | None = None, **options: object) -> MaskRCNN:
    defaults = {"num_classes": 3, "min_size": 128, "max_size": 128, "channels": 16, "box_features": 32}
    return mask_rcnn(backbone or vit(**ADAPTIVE), **{**defaults, **options})


def target(boxes: list[tuple[int, int, int, int]], size: tuple[int, int]) -> dict[str, Tensor]:
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    labels = torch.arange(len(boxes)) % 2 + 1
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4), "labels": labels, "masks": masks}


def grey(photo: Tensor, side: int = 128) -> Tensor:
    """The top left part of a photograph (3, H, W) uint8, in [0, 1]."""
    return photo[:, :side, :side].float() / 255


# ---- levels, anchors, pooling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch_size", "strides"), [(16, (4, 8, 16, 32, 64)), (8, (2, 4, 8, 16, 32))])
def test_levels_fit_their_anchors(patch_size: int, strides: tuple[int, ...]) -> None:
    model = detector(vit(patch_size=patch_size))
    height, width = 96, 128
    maps = model.backbone(torch.rand(2, 3, height, width))
    sizes = [(-(-height // stride), -(-width // stride)) for stride in strides]  # p6 is rounded up
    assert [tuple(level.shape) for level in maps.values()] == [(2, 16, *size) for size in sizes]
    assert model.backbone.strides == strides
    anchors = model.rpn.anchor_generator
    assert anchors.sizes == tuple((8 * stride,) for stride in strides)
    assert [len(cell) for cell in anchors.cell_anchors] == [3] * 5
    assert model.backbone.out_channels == 16


@pytest.mark.parametrize(
    ("scale_factors", "strides"), [((2.0, 1.0, 0.5), (4, 8, 16, 32)), ((1.0, 0.5), (8, 16, 32)), ((1.0,), (8, 16))]
)
def test_levels_can_be_chosen(scale_factors: tuple[float, ...], strides: tuple[int, ...]) -> None:
    """With patches of 8 pixels the default's finest level has a stride of 2."""
    model = detector(vit(patch_size=8), scale_factors=scale_factors)
    assert model.backbone.strides == strides
    assert model.rpn.anchor_generator.sizes == tuple((8 * stride,) for stride in strides)
    pool = model.roi_heads.box_roi_pool
    assert pool.featmap_names == list(model.backbone.levels[:-1])
    assert pool.scales == [1 / stride for stride in strides[:-1]]
    losses = model.train()([torch.rand(3, 96, 128)], [target([(10, 10, 60, 60)], (96, 128))])
    sum(losses.values()).backward()
    assert model.eval()([torch.rand(3, 96, 128)])[0]["boxes"].shape[1] == 4


def test_level_names() -> None:
    assert PyramidBackbone(vit(), 8).levels == ("p2", "p3", "p4", "p5", "p6")
    assert PyramidBackbone(vit(patch_size=8), 8).levels == ("p1", "p2", "p3", "p4", "p5")
    model = retinanet(vit(), 3, 128, 128, channels=8)
    levels = model.backbone(torch.rand(1, 3, 128, 128))
    assert {name: tuple(level.shape[2:]) for name, level in levels.items()} == {
        "p3": (16, 16), "p4": (8, 8), "p5": (4, 4), "p6": (2, 2), "p7": (1, 1),
    }  # fmt: skip
    assert [sizes[0] for sizes in model.anchor_generator.sizes] == [32, 64, 128, 256, 512]


@pytest.mark.parametrize("size", [(33, 50), (96, 128)])
def test_boxes_are_pooled_at_the_true_strides(size: tuple[int, int]) -> None:
    """For 33 x 50 pixels padded to 64 x 64, strides inferred from the sizes would be wrong."""
    model = detector()
    images, _ = detector_batch(model, [torch.rand(3, *size)])
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        pool(model.backbone(images.tensors), [torch.tensor([[4.0, 4.0, 30.0, 30.0]])], images.image_sizes)
        assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
        assert (pool.map_levels.k_min, pool.map_levels.k_max) == (2, 5)


def test_a_box_is_pooled_from_where_it_lies() -> None:
    model = detector()
    strides = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
    levels = {name: torch.zeros(1, 16, 128 // stride, 128 // stride) for name, stride in strides.items()}
    levels["p2"][..., 8:16, 8:16] = 1  # pixels 32 to 64
    boxes = [torch.tensor([[36.0, 36.0, 60.0, 60.0], [70.0, 70.0, 100.0, 100.0]])]
    pooled = model.roi_heads.box_roi_pool(levels, boxes, [(128, 128)])
    assert pooled.shape == (2, 16, 7, 7)
    assert pooled[0].min() > 0.9 and pooled[1].max() == 0


# ---- pixels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean_std", [{}, {"pixel_mean": (127.5,) * 3, "pixel_std": (127.5,) * 3}])
def test_the_backbone_gets_back_the_8_bit_image(photos: dict[str, Tensor], mean_std: dict) -> None:
    backbone = vit(**ADAPTIVE, **mean_std)
    batch, _ = detector(backbone).transform([grey(photos["astronaut"])])
    assert torch.equal(denormalise(batch.tensors, backbone.pixel_format)[0], photos["astronaut"][:, :128, :128].float())


def test_transform_resizes_and_pads_to_whole_cells() -> None:
    batch, _ = detector(min_size=100, max_size=120).eval().transform([torch.rand(3, 50, 80), torch.rand(3, 70, 60)])
    assert batch.image_sizes == [(75, 120), (116, 100)]
    assert batch.tensors.shape == (2, 3, 128, 128)
    assert detector(size_divisible=64).transform.size_divisible == 64


def test_resize_in_training_can_be_left_to_the_data() -> None:
    transform = detector(resize_in_training=False).transform
    assert transform.train()([torch.rand(3, 50, 80)])[0].image_sizes == [(50, 80)]
    assert transform.eval()([torch.rand(3, 50, 80)])[0].image_sizes == [(80, 128)]


# ---- padding costs nothing ------------------------------------------------------------------------------------------


def owned_cells(sizes: list[tuple[int, int]], grid: tuple[int, int]) -> Tensor:
    owned = torch.zeros(len(sizes), *grid, dtype=torch.bool)
    for cells, (height, width) in zip(owned, sizes, strict=True):
        cells[: -(-height // 16), : -(-width // 16)] = True
    return owned


def plain_photos(mean: Tensor) -> dict[str, Tensor]:
    """Images (3, 128, 128) in [0, 1] with large parts that are easily mistaken for padding."""
    noise, black, plain = torch.rand(3, 128, 128), torch.zeros(3, 128, 128), mean.view(3, 1, 1).expand(3, 128, 128)
    right, bottom = torch.arange(128) >= 50, (torch.arange(128) >= 70)[:, None]
    return {
        "black": black,
        "mean": plain,
        "black at the right": torch.where(right, black, noise),
        "mean at the right": torch.where(right, plain, noise),
        "mean at the bottom": torch.where(bottom, plain, noise),
        "noise in the corner": torch.where(right & bottom, noise, plain),
    }


@pytest.mark.parametrize("thresholds", [(), (5.5, 4.0)])
@pytest.mark.parametrize("mean", [(123.675, 116.28, 103.53), (127.5, 127.5, 127.5), (128.0, 128.0, 128.0)])
def test_photos_keep_their_black_and_mean_coloured_parts(mean: tuple, thresholds: tuple) -> None:
    model = detector(vit(thresholds=thresholds, drop_padding=True, pixel_mean=mean))
    means = torch.tensor(mean, dtype=torch.float64).div(255).float()
    for size in ((128, 128), (96, 70), (37, 128), (16, 33)):
        for name, photo in plain_photos(means).items():
            images = [photo[:, : size[0], : size[1]], torch.rand(3, 128, 128)]
            batch, _ = detector_batch(model, images)
            dropped = model.backbone.net.partition(batch.tensors) < 0
            assert torch.equal(~dropped, owned_cells(batch.image_sizes, (8, 8))), (name, size)


def detector_batch(model: MaskRCNN, images: list[Tensor]) -> tuple:
    """The batch without resizing."""
    model.transform._skip_resize = True
    return model.train().transform(images)


def test_levels_are_those_of_the_feature_map() -> None:
    """The pyramid's pointwise layers run on tokens, unless a hook needs the output of the backbone."""
    backbone = PyramidBackbone(randomise(vit(thresholds=(5.5, 4.0))), 8).eval()
    images = noise(2, 3, 64, 96)
    images[:, :, :40, :40] = 0.3
    assert len(backbone.net.partition(images).unique()) > 1
    with torch.no_grad():
        levels = backbone(images)
        backbone.net.register_forward_hook(lambda *_: None)
        for name, expected in backbone(images).items():
            torch.testing.assert_close(levels[name], expected, atol=1e-5, rtol=1e-5)


def test_interpolated_pixels_that_hit_the_mean_are_no_padding() -> None:
    """Halving a fine grid of 127 and 128 gives exactly 127.5, the mean."""
    model = detector(vit(pixel_mean=(127.5,) * 3, drop_padding=True))
    grid = (torch.arange(256)[:, None] + torch.arange(256)) % 2
    image = (127 + grid).float().div(255).expand(3, 256, 256).clone()
    batch, _ = model.eval().transform([image])
    assert batch.tensors.abs().max() < 1e-3 and bool((batch.tensors != 0).all())


def test_padding_stays_exactly_zero_and_costs_no_tokens(photos: dict[str, Tensor]) -> None:
    model = detector(vit(**ADAPTIVE))
    images = [grey(photos["chelsea"])[:, :64], grey(photos["rocket"])[:, :, :64]]
    together, _ = detector_batch(model, images)
    assert bool((together.tensors[0, :, 64:] == 0).all()) and bool((together.tensors[1, ..., 64:] == 0).all())
    tokens = [count(model, detector_batch(model, [image])[0].tensors) for image in images]
    assert count(model, together.tensors) == sum(tokens)
    uniform = detector(vit(drop_padding=True))
    assert count(uniform, together.tensors) == 2 * 4 * 8


def count(model: MaskRCNN, batch: Tensor) -> int:
    net = model.backbone.net
    return len(net.layout(batch, net.partition(batch)).image_N)


def test_features_are_zero_in_padding_only() -> None:
    model = detector()
    batch, _ = detector_batch(model, [torch.zeros(3, 64, 128), torch.rand(3, 128, 128)])
    (features,) = model.backbone.net(batch.tensors)
    filled = features.abs().sum(1) > 0
    assert torch.equal(filled, owned_cells(batch.image_sizes, (8, 8)))


# ---- training and prediction ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("boxes", [[(10, 10, 60, 60), (30, 70, 60, 110)], []], ids=["objects", "no objects"])
@pytest.mark.parametrize("flat", [True, False], ids=["large patches only", "small patches only"])
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_all_parameters_get_a_gradient(boxes: list, flat: bool, amp: bool) -> None:
    model = detector().train()
    images = [torch.full((3, 128, 128), 0.4) if flat else torch.rand(3, 128, 128)] * 2
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        losses = model(images, [target(boxes, (128, 128)), target([], (128, 128))])
    sum(losses.values()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_predictions_have_the_size_of_the_image() -> None:
    model = detector(box_score_thresh=0.0).eval()
    with torch.no_grad():
        found = model([torch.rand(3, 50, 80), torch.zeros(3, 300, 40)])
    assert [tuple(entry["masks"].shape[1:]) for entry in found] == [(1, 50, 80), (1, 300, 40)]
    assert all(len(entry["boxes"]) and entry["labels"].min() >= 1 and entry["labels"].max() <= 2 for entry in found)


def test_options_reach_torchvision() -> None:
    model = detector(box_detections_per_img=7, rpn_nms_thresh=0.5, num_classes=5)
    assert (model.roi_heads.detections_per_img, model.rpn.nms_thresh) == (7, 0.5)
    assert model.roi_heads.box_predictor.cls_score.out_features == 5
    assert model.roi_heads.mask_predictor.mask_fcn_logits.out_channels == 5
    assert len(model.rpn.head.conv) == 2


def test_a_timm_model_as_backbone() -> None:
    backbone = APTViT.from_timm("vit_tiny_patch16_224", img_size=64, class_token=False, **ADAPTIVE)
    losses = detector(backbone)([torch.rand(3, 60, 90)], [target([(5, 5, 40, 40)], (60, 90))])
    assert all(value.isfinite() for value in losses.values())


# ---- boxes without masks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boxes", [[(10, 10, 60, 60), (30, 70, 60, 110)], []], ids=["objects", "no objects"])
@pytest.mark.parametrize("build", [faster_rcnn, retinanet])
def test_detectors_of_boxes_train_without_masks(build: Callable, boxes: list) -> None:
    model = build(vit(**ADAPTIVE), 3, 128, 128, channels=16).train()
    targets = [target(found, (128, 128)) for found in (boxes, [])]
    for entry in targets:
        del entry["masks"]
    losses = model([torch.rand(3, 128, 128)] * 2, targets)
    sum(losses.values()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        found = model.eval()([torch.rand(3, 50, 80)])[0]
    assert set(found) == {"boxes", "labels", "scores"}


def test_faster_rcnn_finds_the_boxes_of_a_mask_rcnn_with_its_weights() -> None:
    with_masks = randomise(detector(box_score_thresh=0.0)).eval()
    without = faster_rcnn(vit(**ADAPTIVE), 3, 128, 128, channels=16, box_features=32, box_score_thresh=0.0).eval()
    state = {name: value for name, value in with_masks.state_dict().items() if ".mask_" not in name}
    without.load_state_dict(state, strict=True)
    image = noise(3, 100, 128).sigmoid()
    with torch.no_grad():
        (expected,), (found,) = with_masks([image]), without([image])
    assert len(found["boxes"]) and all(torch.equal(found[name], expected[name]) for name in found)


# ---- names of weights -----------------------------------------------------------------------------------------------


def test_names_of_weights_are_stable() -> None:
    names = set(detector().state_dict())
    assert names >= {
        "backbone.net.pos_embed", "backbone.net.patch_embed.proj.weight", "backbone.net.blocks.0.attn.qkv.bias",
        "backbone.net.blocks.1.attn.rel_pos_h", "backbone.simfp_2.0.weight", "backbone.simfp_2.5.norm.weight",
        "backbone.simfp_3.1.weight", "backbone.simfp_4.0.norm.bias", "backbone.simfp_5.2.weight",
        "rpn.head.conv.1.0.weight", "roi_heads.box_head.0.1.weight", "roi_heads.mask_head.0.1.weight",
    }  # fmt: skip
    assert {name.split(".")[0] for name in names} == {"backbone", "rpn", "roi_heads"}


def test_a_trained_state_gives_the_same_detections(tmp_path: Path) -> None:
    """A state after a training step, saved with torch.save and loaded in a new model."""
    model, fresh = detector(box_score_thresh=0.0), detector(box_score_thresh=0.0)
    before = model.backbone.net.coarse_embed.zero.bias.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    losses = model.train()([torch.full((3, 128, 128), 0.4)], [target([(10, 10, 60, 60)], (128, 128))])
    sum(losses.values()).backward()
    optimizer.step()
    assert not torch.equal(model.backbone.net.coarse_embed.zero.bias, before)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    fresh.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
    image = torch.rand(3, 100, 128)
    with torch.no_grad():
        (expected,), (found,) = model.eval()([image]), fresh.eval()([image])
    assert len(expected["boxes"]) and all(torch.equal(found[name], expected[name]) for name in expected)


def test_detectron2_weights_fit_and_give_the_same_levels() -> None:
    modeling = pytest.importorskip("detectron2.modeling", reason="Detectron2 is built from source")
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool

    options = {**TINY, **WINDOWS, "pretrain_img_size": 64, "pretrain_use_cls_token": True}
    net = modeling.ViT(**options, out_feature="last_feat")
    scales = (4.0, 2.0, 1.0, 0.5)
    theirs = modeling.SimpleFeaturePyramid(net, "last_feat", 16, scales, top_block=LastLevelMaxPool(), norm="LN")
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = PyramidBackbone(APTViT(**options, norm_eps=1e-5, pos_antialias=False), 16)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        levels, expected = ours.eval()(images), theirs.eval()(images)
    assert list(levels) == list(expected)
    for name, level in levels.items():
        assert (level - expected[name]).abs().max() < 1e-4, name


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        (vit(channel_order="BGR"), {}, "BGR.*torchvision's detectors feed RGB"),
        (vit(in_chans=4), {}, "4 channels"),
        (vit(), {"num_classes": 1}, "num_classes=1: expected at least 2, as the background counts"),
        (vit(), {"num_classes": 2.0}, "num_classes=2.0"),
        (vit(), {"image_mean": [0.5] * 3}, "image_mean follow from the backbone; set its pixel_mean"),
        (vit(), {"size_divisible": 16}, "size_divisible=16 must be a multiple of 32"),
        (vit(), {"max_size": 0}, "max_size=0 must be 1 or more"),
        (vit(), {"box_head": torch.nn.Identity()}, "box_head was given without box_predictor"),
        (vit(img_size=112, patch_size=14), {}, "patches of 14 pixels: .* with patch_size=16"),
    ],
)
def test_errors(backbone: APTViT, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detector(backbone, **options)


def test_a_backbone_of_another_kind() -> None:
    with pytest.raises(TypeError, match="a Linear; expected an apt_dense.APTViT"):
        mask_rcnn(torch.nn.Linear(2, 2), num_classes=2)


def test_pixels_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        detector().eval()([torch.full((3, 64, 64), float("nan"))])


BAD_ARGUMENTS = {
    "channels": [0, -1, 1.5, "8", None, True],
    "box_features": [0, -1, 1.5, "8", None],
    "scale_factors": [(), (3.0,), (1.0, 2.0), (1.0, 1.0), "1", None, 1.0],
    "num_classes": [0, 1, -1, 1.5, "3", None],
    "min_size": [0, -1, None, 1.5, "64", (), (0,), (64, "32"), True],
    "max_size": [0, -1, 1.5, "64", None],
    "backbone": [3, None, torch.nn.Linear(2, 2)],
}


@pytest.mark.parametrize("build", [mask_rcnn, faster_rcnn, retinanet])
@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_by_name(name: str, build: Callable) -> None:
    if build is retinanet and name in ("box_features", "scale_factors"):
        return  # it has no box head, and its levels are given
    for value in BAD_ARGUMENTS[name]:
        backbone = APTViT(img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2)
        with pytest.raises((TypeError, ValueError), match=name):
            build(**{"backbone": backbone, "num_classes": 3, name: value})
