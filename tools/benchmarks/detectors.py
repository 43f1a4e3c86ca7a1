"""What the benchmark compares on the level of whole models: Mask R-CNN (Detectron2's, else torchvision's) and UPerNet
(MMSegmentation's), each with our backbone, adaptive and uniform, and with the host's own."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apt_dense import APTViT
from apt_dense.hosts.torchvision import mask_rcnn
from apt_dense.patches.scores import PixelFormat

from benchmarks.backbones import (
    AS_DETECTRON2,
    Case,
    as_mmseg,
    is_vitdet,
    load_weights,
    model_arguments,
    our_variants,
    randomise_relative_positions,
    tokens_kept,
)
from benchmarks.measure import Candidate, Variant

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
INSTANCES = 8  # per image, in training
CLASSES = 80
# Random classifiers say 1/81 for every class, below the threshold of 0.05: nothing would be found, no mask computed.
# With so much more for one class each proposal is a candidate, and about as many are found as a detector may report.
FAVOUR = 3.0
TINY_CHANNELS = 16  # of the heads of models named "test"


def _is_tiny(case: Case) -> bool:
    return case.model.endswith("-test")


def _sizes(case: Case) -> dict[str, Any]:
    """Arguments of the backbone, those of windows included where it has none."""
    plain = {"window_size": 0, "window_block_indexes": (), "use_rel_pos": False}
    return {**plain, **model_arguments(case.model), "img_size": case.size, "drop_path_rate": 0.0}


def _pixels(images: Tensor) -> Tensor:
    """Normalised images -> RGB grey levels 0-255."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in PixelFormat()[:2])
    return (images * std + mean).round().clamp(0, 255)


def _boxes_and_masks(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``INSTANCES`` rectangles (n, 4) as x1, y1, x2, y2 in pixels of an S x S image, and their masks (n, S, S)."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(INSTANCES, 2, generator=generator) * 0.6
    sides = torch.rand(INSTANCES, 2, generator=generator) * 0.35 + 0.05
    boxes = torch.cat([corners, corners + sides], 1) * size
    ruler = torch.arange(size) + 0.5
    inside = [(ruler > boxes[:, i, None]) & (ruler < boxes[:, i + 2, None]) for i in (0, 1)]
    return boxes.to(device), (inside[1][:, :, None] & inside[0][:, None, :]).to(device)


def _model_variant(
    model: nn.Module, case: Case, infer: Callable[[], object], losses: Callable[[], Mapping[str, Tensor]],
    net: APTViT | None = None,
) -> Variant:  # fmt: skip
    model.to(case.images.device).train(case.training)
    tokens = 1.0 if net is None else tokens_kept(net, case.images)
    return Variant(model, infer, lambda: sum(losses().values()), tokens)


# ---- detector --------------------------------------------------------------------------------------------------------


def detector_candidates(case: Case) -> list[Candidate]:
    """Mask R-CNN by Detectron2 where it is installed, with its own backbone as baseline, else by torchvision."""
    if importlib.util.find_spec("detectron2"):
        return detectron2_candidates(case)
    return torchvision_candidates(case)


def detectron2_candidates(case: Case) -> list[Candidate]:
    """Mask R-CNN of configs/detectron2 with random weights, the same for all."""
    torch.manual_seed(0)
    twin = _build_detectron2(case, {"thresholds": ()})
    randomise_relative_positions(twin.backbone)
    nn.init.constant_(twin.roi_heads.box_predictor.cls_score.bias[:1], FAVOUR)
    state = twin.state_dict()
    ours = [
        Candidate(f"{name}, Detectron2", role, partial(_detectron2_variant, case, state, choice))
        for name, role, choice in our_variants(case)
    ]
    return [*ours, Candidate("Detectron2", "detectron2", partial(_detectron2_variant, case, state, None))]


def _build_detectron2(case: Case, choice: Mapping[str, Any] | None) -> nn.Module:
    """``choice``: how our backbone chooses patches; None for Detectron2's backbone and pyramid."""
    from detectron2.config import instantiate
    from detectron2.modeling import SimpleFeaturePyramid, ViT

    from apt_dense.hosts.detectron2.run import load_config

    config = load_config(str(CONFIGS / "detectron2" / "mask_rcnn_apt_vitdet_b_100ep.py"))
    config.dataloader.image_size = case.size
    model, backbone = config.model, config.model.backbone
    # Square photos have no padding to drop.
    backbone.net.update(drop_padding=False, **_sizes(case), **(choice or {}))
    if choice is None:
        backbone._target_, backbone.net._target_ = SimpleFeaturePyramid, ViT
        for name in ("thresholds", "drop_padding", "pixel_mean", "pixel_std", "channel_order"):
            del backbone.net[name]
    if _is_tiny(case):
        _shrink_detectron2(model)
    return instantiate(model)


def _shrink_detectron2(model: Any) -> None:
    heads, channels = model.roi_heads, TINY_CHANNELS
    model.backbone.out_channels = model.proposal_generator.head.in_channels = channels
    model.proposal_generator.post_nms_topk = (50, 20)
    heads.batch_size_per_image = 16
    heads.box_predictor.test_topk_per_image = 20
    heads.mask_head.update(conv_dims=[channels, channels])
    heads.box_head.update(conv_dims=[channels], fc_dims=[channels])
    heads.mask_head.input_shape.channels = heads.box_head.input_shape.channels = channels
    heads.box_predictor.input_shape.channels = channels


def _detectron2_variant(case: Case, state: Mapping[str, Tensor], choice: Mapping[str, Any] | None) -> Variant:
    from detectron2.utils.events import EventStorage

    model = _build_detectron2(case, choice)
    load_weights(model, state)
    batch = _detectron2_batch(case.images)

    def losses() -> Mapping[str, Tensor]:
        with EventStorage():  # the heads log there
            return model(batch)

    net = model.backbone.net if choice is not None else None
    return _model_variant(model, case, lambda: model(batch), losses, net)


def _detectron2_batch(images: Tensor) -> list[dict[str, Any]]:
    from detectron2.structures import BitMasks, Boxes, Instances

    size = images.shape[-1]
    boxes, masks = _boxes_and_masks(size, images.device)
    instances = Instances(
        (size, size),
        gt_boxes=Boxes(boxes), gt_masks=BitMasks(masks), gt_classes=torch.arange(INSTANCES, device=images.device),
    )  # fmt: skip
    return [{"image": p, "height": size, "width": size, "instances": instances} for p in _pixels(images)]


def torchvision_candidates(case: Case) -> list[Candidate]:
    """apt_dense.hosts.torchvision's Mask R-CNN; torchvision has no ViT detector of its own."""
    torch.manual_seed(0)
    twin = _build_torchvision(case, {"thresholds": ()})
    randomise_relative_positions(twin.backbone)
    nn.init.constant_(twin.roi_heads.box_predictor.cls_score.bias[1:2], FAVOUR)  # 0 is the background
    state = twin.state_dict()
    return [
        Candidate(f"{name}, torchvision", role, partial(_torchvision_variant, case, state, choice))
        for name, role, choice in our_variants(case)
    ]


def _build_torchvision(case: Case, choice: Mapping[str, Any]) -> nn.Module:
    backbone = APTViT(**_sizes(case), **AS_DETECTRON2, **choice)
    tiny = {}
    if _is_tiny(case):
        tiny = {"channels": TINY_CHANNELS, "box_features": TINY_CHANNELS, "box_batch_size_per_image": 16}
        tiny |= {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 20}
    return mask_rcnn(backbone, CLASSES + 1, case.size, case.size, **tiny)


def _torchvision_variant(case: Case, state: Mapping[str, Tensor], choice: Mapping[str, Any]) -> Variant:
    model = _build_torchvision(case, choice)
    load_weights(model, state)
    images = list(_pixels(case.images) / 255)
    boxes, masks = _boxes_and_masks(case.size, case.images.device)
    labels = torch.arange(1, INSTANCES + 1, device=boxes.device)
    targets = [{"boxes": boxes, "masks": masks.to(torch.uint8), "labels": labels}] * len(images)
    return _model_variant(model, case, lambda: model(images), lambda: model(images, targets), model.backbone.net)


# ---- segmentor -------------------------------------------------------------------------------------------------------


def segmentor_candidates(case: Case) -> list[Candidate]:
    """UPerNet of configs/mmseg with random weights, the same for all; MMSegmentation's ViT has no windows, so that it
    is the baseline of vit-* only."""
    ours = our_variants(case)
    build = partial(_segmentor_variant, case)
    if not importlib.util.find_spec("mmseg"):
        return [Candidate(name, role, partial(build, {}, choice)) for name, role, choice in ours]  # say what is missing
    torch.manual_seed(0)
    twin = _build_segmentor(case, {"thresholds": ()})
    randomise_relative_positions(twin.backbone)
    state = twin.state_dict()
    candidates = [Candidate(name, role, partial(build, state, choice)) for name, role, choice in ours]
    if is_vitdet(case.model):
        return candidates
    return [*candidates, Candidate("MMSegmentation", "mmseg", partial(build, _host_names(state), None))]


def _host_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A segmentor's weights, those of its backbone by MMSegmentation's names."""
    inside = {n.removeprefix("backbone."): w for n, w in state.items() if n.startswith("backbone.")}
    outside = {n: w for n, w in state.items() if not n.startswith("backbone.")}
    return outside | {f"backbone.{name}": weight for name, weight in as_mmseg(inside).items()}


def _build_segmentor(case: Case, choice: Mapping[str, Any] | None) -> nn.Module:
    """``choice``: how our backbone chooses patches; None for MMSegmentation's VisionTransformer."""
    import mmseg.models  # noqa: F401 (registers the parts)
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS

    import apt_dense.hosts.mmseg  # noqa: F401

    model = Config.fromfile(CONFIGS / "mmseg" / "upernet_apt_vit-b16_160k_ade20k-512x512.py").model
    sizes = _sizes(case)
    width, depth = sizes["embed_dim"], sizes["depth"]
    quarters = tuple(depth * (i + 1) // 4 - 1 for i in range(4))
    if choice is None:
        model.backbone = _mmseg_backbone(case, quarters)
    else:
        options = {**sizes, **choice, "out_indices": quarters, "class_token": not is_vitdet(case.model)}
        model.backbone.update(options)
    _resize_heads(model, width, TINY_CHANNELS if _is_tiny(case) else None)
    with DefaultScope.overwrite_default_scope("mmseg"):
        return revert_sync_batchnorm(MODELS.build(model))


def _mmseg_backbone(case: Case, out_indices: Sequence[int]) -> dict[str, Any]:
    sizes = model_arguments(case.model)
    return {
        "type": "VisionTransformer", "img_size": (case.size, case.size), "patch_bias": True,
        "embed_dims": sizes["embed_dim"], "num_layers": sizes["depth"], "num_heads": sizes["num_heads"],
        "out_indices": out_indices, "norm_cfg": {"type": "LN", "eps": 1e-6},
    }  # fmt: skip


def _resize_heads(model: Any, width: int, channels: int | None) -> None:
    """Fit neck and heads to a backbone of that width; ``channels`` are the heads' own, None for the config's."""
    model.neck.embed_dim = model.auxiliary_head.in_channels = width
    model.decode_head.in_channels = [width] * 4
    if channels is not None:
        model.decode_head.channels = model.auxiliary_head.channels = channels


def _segmentor_variant(case: Case, state: Mapping[str, Tensor], choice: Mapping[str, Any] | None) -> Variant:
    model = _build_segmentor(case, choice)
    load_weights(model, state)
    samples = _labels(case) if case.training else None

    def losses() -> dict[str, Tensor]:
        return {name: loss for name, loss in model(case.images, samples, mode="loss").items() if "loss" in name}

    net = model.backbone if choice is not None else None
    variant = _model_variant(model, case, lambda: model(case.images, mode="tensor"), losses, net)
    if len(case.images) == 1:  # batch statistics of the pooled map of one cell would need a second image
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    return variant


def _labels(case: Case) -> list[object]:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    shape = (len(case.images), 1, case.size, case.size)
    maps = torch.randint(0, 150, shape, generator=generator).to(case.images.device)
    return [SegDataSample(gt_sem_seg=PixelData(data=labels)) for labels in maps]
