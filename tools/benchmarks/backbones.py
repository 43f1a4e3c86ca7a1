"""What the benchmark compares on the level of backbones: ours, adaptive and uniform, with and without the simple
feature pyramid, and dense baselines with the same weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_dense import APTViT
from apt_dense.hosts.torchvision import PyramidBackbone
from apt_dense.layout.packed import count_tokens

from benchmarks.measure import Candidate, Variant


class Case(NamedTuple):
    """What candidates are built for.

    Args:
        model: "vit-b", "vitdet-b", ...
        images: (B, 3, S, S), normalised by ImageNet's mean and deviation in RGB.
        token_budget: of the variant with a budget; None for no such variant.
        training: whether a training step is measured.
        compiles: whether our backbones are compiled (in inference).
    """

    model: str
    images: Tensor
    thresholds: tuple[float, ...]
    token_budget: float | None = None
    training: bool = False
    compiles: bool = False

    @property
    def size(self) -> int:
        return self.images.shape[-1]


# embed_dim, depth, num_heads; "test" is for trying out the tool.
WIDTHS = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16), "test": (32, 4, 2)}
MODELS = tuple(f"{family}-{size}" for family in ("vit", "vitdet") for size in WIDTHS)
# Detectron2's positions, which are those of ViTDet's checkpoints.
AS_DETECTRON2 = {
    "pretrain_img_size": 224, "pretrain_use_cls_token": True, "partial_patches": "crop", "pos_antialias": False,
}  # fmt: skip


def is_vitdet(model: str) -> bool:
    return model.startswith("vitdet-")


def model_arguments(model: str) -> dict[str, Any]:
    """Arguments of a ViT for "vit-b" (global attention) or "vitdet-b" (windows of 14, relative positions).

    Raises:
        ValueError: for a model that is not in ``MODELS``.
    """
    if model not in MODELS:
        raise ValueError(f"model {model!r} is unknown; expected one of {', '.join(MODELS)}")
    embed_dim, depth, num_heads = WIDTHS[model.partition("-")[2]]
    arguments = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    if is_vitdet(model):
        every = depth // 4
        windowed = tuple(i for i in range(depth) if i % every != every - 1)
        if every == 1:  # else all four would be global
            windowed = tuple(range(depth - 1))
        arguments |= {"window_size": 14, "window_block_indexes": windowed, "use_rel_pos": True}
    return arguments


def our_variants(case: Case) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, role and the arguments of APTViT that choose patches; the uniform twin comes first."""
    variants = [
        ("apt_dense, uniform", "twin", {"thresholds": ()}),
        ("apt_dense, adaptive", "ours", {"thresholds": case.thresholds}),
    ]
    if case.token_budget is not None:
        budget = {"thresholds": case.thresholds, "token_budget": case.token_budget}
        variants.append((f"apt_dense, budget {case.token_budget:g}", "ours", budget))
    return variants


def tokens_kept(net: APTViT, images: Tensor) -> float:
    """The share of all patches that remain of normalised images."""
    scale_map = net.partition(images)
    return count_tokens(scale_map, len(net.thresholds) + 1).sum().item() / scale_map.numel()


def load_weights(model: nn.Module, state: Mapping[str, Tensor], may_lack: Sequence[str] = ("coarse_embed.",)) -> None:
    """Load all weights; only parameters whose names hold one of ``may_lack`` may stay as they are.

    Raises:
        ValueError: if the names do not agree.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not any(part in name for part in may_lack)]
    if missing or unexpected:
        raise ValueError(f"weights differ: the state dict lacks {missing[:3]} and has {unexpected[:3]} too many")


def randomise_relative_positions(model: nn.Module) -> None:
    """They start at zero, which would hide mistakes."""
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            nn.init.trunc_normal_(parameter, std=0.02)


def variant_of(module: nn.Module, run: Callable[[Tensor], Sequence[Tensor]], case: Case, **more: Any) -> Variant:
    """A variant whose ``run`` gives feature maps; the training loss is their mean square."""
    module.to(case.images.device).train(case.training)

    def loss() -> Tensor:
        return sum(feature_map.float().square().mean() for feature_map in run(case.images))

    return Variant(module, lambda: run(case.images), loss, **more)


# ---- backbone --------------------------------------------------------------------------------------------------------


def backbone_candidates(case: Case) -> list[Candidate]:
    """The uniform twin, the adaptive ones, then the baselines."""
    torch.manual_seed(0)
    twin = build_backbone(case)
    randomise_relative_positions(twin)
    state = twin.state_dict()
    compiled = ", compiled" if _compiles(case) else ""
    ours = [
        Candidate(name + compiled, role, partial(_our_backbone, case, state, choice))
        for name, role, choice in our_variants(case)
    ]
    if is_vitdet(case.model):
        return [*ours, Candidate("Detectron2", "detectron2", partial(_detectron2_backbone, case, state))]
    return [
        *ours,
        Candidate("timm, fused attention", "timm", partial(_timm_backbone, case, state)),
        Candidate("MMSegmentation", "mmseg", partial(_mmseg_backbone, case, state)),
    ]


def build_backbone(case: Case, **options: Any) -> APTViT:
    """Our ViT in the size of the case; without ``thresholds`` the uniform twin."""
    host = AS_DETECTRON2 if is_vitdet(case.model) else {}
    return APTViT(img_size=case.size, **model_arguments(case.model), **host, **options)


def _compiles(case: Case) -> bool:
    return case.compiles and not case.training


def _our_backbone(case: Case, state: Mapping[str, Tensor], choice: Mapping[str, Any]) -> Variant:
    model = build_backbone(case, **choice)
    load_weights(model, state)
    if not _compiles(case):
        variant = variant_of(model, model, case, blocks=model.blocks)
    else:  # without ``blocks``: compiled code does not stop between them
        compiled = torch.compile(model, fullgraph=model.token_budget is not None)
        variant = variant_of(model, compiled, case, is_compiled=True)
    return variant._replace(tokens=tokens_kept(model, case.images))


def _timm_backbone(case: Case, state: Mapping[str, Tensor]) -> Variant:
    """timm's dense ViT without a class token, which attends by PyTorch's fused kernels."""
    model = timm.models.VisionTransformer(
        img_size=case.size, num_classes=0, class_token=False, global_pool="avg", fc_norm=True, qkv_bias=True,
        **model_arguments(case.model),
    )  # fmt: skip
    load_weights(model, state, may_lack=("fc_norm.",))
    return variant_of(model, lambda images: [model.forward_features(images)], case)


def _mmseg_backbone(case: Case, state: Mapping[str, Tensor]) -> Variant:
    from mmseg.models.backbones import VisionTransformer

    sizes = model_arguments(case.model)
    model = VisionTransformer(
        img_size=(case.size, case.size), embed_dims=sizes["embed_dim"], num_layers=sizes["depth"],
        num_heads=sizes["num_heads"], with_cls_token=False, patch_bias=True, norm_cfg={"type": "LN", "eps": 1e-6},
    )  # fmt: skip
    positions = F.pad(state["pos_embed"], (0, 0, 1, 0))  # it keeps a place for a class token that it does not use
    load_weights(model, as_mmseg({**state, "pos_embed": positions}), may_lack=("cls_token",))
    return variant_of(model, model, case)


MMSEG_NAMES = {
    "patch_embed.proj.": "patch_embed.projection.", "blocks.": "layers.", ".norm1.": ".ln1.", ".norm2.": ".ln2.",
    ".attn.qkv.": ".attn.attn.in_proj_", ".attn.proj.": ".attn.attn.out_proj.",
    ".mlp.fc1.": ".ffn.layers.0.0.", ".mlp.fc2.": ".ffn.layers.1.",
}  # fmt: skip


def as_mmseg(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a plain ViT by the names of MMSegmentation's VisionTransformer."""
    renamed = {}
    for name, weight in state.items():
        for ours, theirs in MMSEG_NAMES.items():
            name = name.replace(ours, theirs)
        renamed[name] = weight
    return renamed


def _detectron2_backbone(case: Case, state: Mapping[str, Tensor]) -> Variant:
    model = build_detectron2_vit(case)
    load_weights(model, state, may_lack=())
    return variant_of(model, lambda images: list(model(images).values()), case)


def build_detectron2_vit(case: Case) -> nn.Module:
    from detectron2.modeling import ViT

    return ViT(img_size=case.size, norm_layer=partial(nn.LayerNorm, eps=1e-6), **model_arguments(case.model))


# ---- backbone and simple feature pyramid -----------------------------------------------------------------------------


def pyramid_candidates(case: Case) -> list[Candidate]:
    """The uniform twin, the adaptive ones, then Detectron2's ViT and pyramid."""
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
    variant = variant_of(model, lambda images: list(model(images).values()), case)
    return variant._replace(tokens=tokens_kept(model.net, case.images))


def _detectron2_pyramid(case: Case, state: Mapping[str, Tensor]) -> Variant:
    from detectron2.modeling import SimpleFeaturePyramid
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool

    net = build_detectron2_vit(case)
    model = SimpleFeaturePyramid(net, "last_feat", 256, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), "LN", case.size)
    load_weights(model, state, may_lack=())
    return variant_of(model, lambda images: list(model(images).values()), case)
