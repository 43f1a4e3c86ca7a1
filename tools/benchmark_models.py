"""What the benchmark compares: our backbone, adaptive and uniform, and dense baselines with the same weights."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from apt_dense import APTViT
from apt_dense.layout import count_tokens

Runner = Callable[[Tensor], Tensor]


class Variant(NamedTuple):
    """One model of the comparison: ``run`` gives a feature map of normalised images, ``module`` holds the weights."""

    name: str
    module: nn.Module
    run: Runner
    tokens: Callable[[Tensor], int]  # tokens that the blocks see


WIDTHS = {"b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}  # embed_dim, depth, num_heads


def model_arguments(model: str) -> dict:
    """Arguments of ``APTViT`` for "vit-b" (global attention) or "vitdet-b" (windows of 14, relative positions)."""
    family, _, size = model.partition("-")
    if family not in ("vit", "vitdet") or size not in WIDTHS:
        raise ValueError(f"model {model!r} is unknown; expected vit-b, vit-l, vit-h, vitdet-b, vitdet-l or vitdet-h")
    embed_dim, depth, num_heads = WIDTHS[size]
    arguments = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    if family == "vitdet":
        every = depth // 4
        windowed = tuple(i for i in range(depth) if i % every != every - 1)
        arguments |= {"window_size": 14, "window_block_indexes": windowed, "use_rel_pos": True}
    return arguments


def build_variants(model: str, size: int, thresholds: tuple[float, ...], device: torch.device) -> list[Variant]:
    """The uniform twin first, which efficiency refers to, then the adaptive one, then the baselines at hand."""
    torch.manual_seed(0)
    arguments = model_arguments(model)
    host = {"pretrain_img_size": 224, "pretrain_use_cls_token": True, "partial_patches": "crop", "pos_antialias": False}
    is_vitdet = model.startswith("vitdet")
    uniform = APTViT(img_size=size, **arguments, **(host if is_vitdet else {}))
    _randomise_relative_positions(uniform)
    adaptive = APTViT(img_size=size, thresholds=thresholds, **arguments, **(host if is_vitdet else {}))
    adaptive.load_state_dict(uniform.state_dict(), strict=False)
    variants = [_ours("apt_dense, thresholds=()", uniform), _ours("apt_dense, adaptive", adaptive)]
    baseline = detectron2_vit(uniform, size, arguments) if is_vitdet else timm_vit(uniform, size, arguments)
    for variant in [*variants, *filter(None, [baseline])]:
        variant.module.to(device)
    return [*variants, *filter(None, [baseline])]


def _randomise_relative_positions(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            nn.init.trunc_normal_(parameter, std=0.02)


def _ours(name: str, model: APTViT) -> Variant:
    def tokens(images: Tensor) -> int:
        return int(count_tokens(model.partition(images), len(model.thresholds) + 1).sum())

    return Variant(name, model, lambda images: model(images)[-1], tokens)


def _all_tokens(images: Tensor) -> int:
    return len(images) * (images.shape[-2] // 16) * (images.shape[-1] // 16)


def timm_vit(twin: APTViT, size: int, arguments: dict) -> Variant:
    """timm's dense ViT without a class token, which attends by PyTorch's fused kernels."""
    model = timm.models.VisionTransformer(
        img_size=size, num_classes=0, class_token=False, global_pool="avg", fc_norm=True, qkv_bias=True, **arguments
    )
    model.load_state_dict(twin.state_dict(), strict=False)
    return Variant("timm, fused attention", model, model.forward_features, _all_tokens)


def detectron2_vit(twin: APTViT, size: int, arguments: dict) -> Variant | None:
    """Detectron2's ViT, where it is installed."""
    try:
        from detectron2.modeling import ViT
    except ImportError:
        return None
    norm_layer = partial(nn.LayerNorm, eps=1e-6)
    model = ViT(img_size=size, norm_layer=norm_layer, **arguments)
    model.load_state_dict(twin.state_dict())
    return Variant("Detectron2", model, lambda images: model(images)["last_feat"], _all_tokens)
