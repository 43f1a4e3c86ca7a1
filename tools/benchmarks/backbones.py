"""Backbones to compare: ours, adaptive and uniform, with and without the simple feature pyramid, and dense baselines
with the same weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from apt_dense import APTViT
from apt_dense.hosts.torchvision import PyramidBackbone
from apt_dense.weights.convert import from_apt

from benchmarks.cheap_rivals import Rival, cheap_rivals
from benchmarks.measure_in_turns import Candidate, Variant
from benchmarks.model_cases import (
    AS_DETECTRON2,
    Case,
    feature_variant,
    load_weights,
    model_arguments,
    our_variants,
    randomise_relative_positions,
)
from shared.token_counts import choose_patches


def backbone_candidates(case: Case) -> list[Candidate]:
    """Return the uniform twin, the adaptive variants, then the baselines."""
    torch.manual_seed(0)
    twin = build_backbone(case)
    randomise_relative_positions(twin)
    state = twin.state_dict()
    candidates = [
        Candidate(name, role, partial(_our_backbone, case, state, choice)) for name, role, choice in our_variants(case)
    ]
    candidates += [Candidate(rival.name, "cheap", partial(_cheap_backbone, rival)) for rival in cheap_rivals(case)]
    if case.is_vitdet:
        candidates += [Candidate("Detectron2", "detectron2", partial(_detectron2_backbone, case, state))]
    else:
        candidates += [
            Candidate("timm, fused attention", "timm", partial(_timm_backbone, case, state)),
            Candidate("MMSegmentation", "mmseg", partial(_mmseg_backbone, case, state)),
        ]
    return [c._replace(name=f"{c.name}, compiled") for c in candidates] if case.compiles_now else candidates


def build_backbone(case: Case, **options: Any) -> APTViT:
    """Build our ViT in the size of the case; without ``thresholds`` the uniform twin."""
    host = AS_DETECTRON2 if case.is_vitdet else {}
    return APTViT(img_size=case.size, **model_arguments(case.model), **host, **options)


def _our_backbone(case: Case, state: Mapping[str, Tensor], choice: Mapping[str, Any]) -> Variant:
    model = build_backbone(case, **choice)
    load_weights(model, state)
    variant = _plain_or_compiled(model, case)
    return variant._replace(tokens=choose_patches(model.patches, case.images).tokens_kept)


def _plain_or_compiled(model: APTViT, case: Case) -> Variant:
    if not case.compiles_now:
        return feature_variant(model, model, case, blocks=model.blocks)
    has_budget = model.token_budget is not None
    # On a GPU constant shapes allow CUDA graphs, which is what a budget is for.
    mode = "reduce-overhead" if has_budget and case.images.is_cuda else None
    compiled = torch.compile(model, fullgraph=has_budget, mode=mode)
    return feature_variant(model, compiled, case, is_compiled=True)  # compiled code does not stop between blocks


def _cheap_backbone(rival: Rival) -> Variant:
    """Build our uniform ViT, with weights of its own: its time does not depend on them."""
    model = build_backbone(rival.case, patch_size=rival.patch_size)
    return _plain_or_compiled(model, rival.case)._replace(tokens=rival.tokens)


def _dense_variant(model: nn.Module, run: Callable[[Tensor], Sequence[Tensor]], case: Case) -> Variant:
    """Build a variant of a baseline, compiled where ours are."""
    if not case.compiles_now:
        return feature_variant(model, run, case)
    return feature_variant(model, torch.compile(run), case, is_compiled=True)


def _timm_backbone(case: Case, state: Mapping[str, Tensor]) -> Variant:
    """Build timm's dense ViT without a class token, which attends with PyTorch's fused kernels."""
    model = timm.models.VisionTransformer(
        img_size=case.size, num_classes=0, class_token=False, global_pool="avg", fc_norm=True, qkv_bias=True,
        **model_arguments(case.model),
    )  # fmt: skip
    load_weights(model, state, may_lack=("fc_norm.",))
    return _dense_variant(model, lambda images: [model.forward_features(images)], case)


def _mmseg_backbone(case: Case, state: Mapping[str, Tensor]) -> Variant:
    from mmseg.models.backbones import VisionTransformer

    sizes = model_arguments(case.model)
    model = VisionTransformer(
        img_size=(case.size, case.size), embed_dims=sizes["embed_dim"], num_layers=sizes["depth"],
        num_heads=sizes["num_heads"], with_cls_token=False, patch_bias=True, norm_cfg={"type": "LN", "eps": 1e-6},
    )  # fmt: skip
    load_weights(model, as_mmseg(state, case))
    return _dense_variant(model, model, case)


def as_mmseg(state: Mapping[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Rename the weights of our uniform ViT to MMSegmentation's; it always has a class token, which it may ignore."""
    cells = case.size // 16
    return from_apt(dict(state), "mmseg", grid=(cells, cells)).state


def _detectron2_backbone(case: Case, state: Mapping[str, Tensor]) -> Variant:
    model = build_detectron2_vit(case)
    load_weights(model, state, may_lack=())
    return _dense_variant(model, lambda images: list(model(images).values()), case)


def build_detectron2_vit(case: Case) -> nn.Module:
    """Build Detectron2's ViT in the size of the case."""
    from detectron2.modeling import ViT

    return ViT(img_size=case.size, norm_layer=partial(nn.LayerNorm, eps=1e-6), **model_arguments(case.model))


# ---- backbone and simple feature pyramid -----------------------------------------------------------------------------


def pyramid_candidates(case: Case) -> list[Candidate]:
    """Return the uniform twin, the adaptive variants, then Detectron2's ViT and pyramid."""
    torch.manual_seed(0)
    twin = _build_pyramid(case, {})
    randomise_relative_positions(twin)
    state = twin.state_dict()
    ours = [
        Candidate(name, role, partial(_our_pyramid, case, state, choice)) for name, role, choice in our_variants(case)
    ]
    return [*ours, Candidate("Detectron2", "detectron2", partial(_detectron2_pyramid, case, state))]


def _build_pyramid(case: Case, choice: Mapping[str, Any]) -> PyramidBackbone:
    net = APTViT(img_size=case.size, **model_arguments(case.model), **AS_DETECTRON2, **choice)
    return PyramidBackbone(net)


def _our_pyramid(case: Case, state: Mapping[str, Tensor], choice: Mapping[str, Any]) -> Variant:
    model = _build_pyramid(case, choice)
    load_weights(model, state)
    variant = feature_variant(model, lambda images: list(model(images).values()), case)
    return variant._replace(tokens=choose_patches(model.net.patches, case.images).tokens_kept)


def _detectron2_pyramid(case: Case, state: Mapping[str, Tensor]) -> Variant:
    from detectron2.modeling import SimpleFeaturePyramid
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool

    net = build_detectron2_vit(case)
    model = SimpleFeaturePyramid(net, "last_feat", 256, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), "LN", case.size)
    load_weights(model, state, may_lack=())
    return feature_variant(model, lambda images: list(model(images).values()), case)
