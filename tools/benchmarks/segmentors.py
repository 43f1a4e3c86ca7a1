"""Segmentors (MMSegmentation's UPerNet, or a linear head) to compare: with our backbone, adaptive and uniform, and with
MMSegmentation's own."""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.backbones import as_mmseg
from benchmarks.cheap_rivals import Rival, cheap_rivals
from benchmarks.measure_in_turns import Candidate, Variant
from benchmarks.model_cases import (
    CONFIGS,
    TINY_CHANNELS,
    Case,
    backbone_arguments,
    load_weights,
    model_arguments,
    our_variants,
    randomise_relative_positions,
    task_variant,
)

#: head -> config, of which the sizes are replaced by the case's.
HEADS = {
    "upernet": "upernet_apt_vit-b16_160k_ade20k-512x512.py",
    "linear": "linear_apt_vit-b16_160k_ade20k-512x512.py",
}


def segmentor_candidates(case: Case, head: str = "upernet") -> list[Candidate]:
    """Return the segmentor of configs/mmseg with random weights, the same for all.

    MMSegmentation's ViT has no windows, so it is the baseline of vit-* only.

    Args:
        head: one of ``HEADS``.
    """
    ours = our_variants(case)
    build = partial(_segmentor_variant, case, head)
    if not importlib.util.find_spec("mmseg"):
        return [Candidate(name, role, partial(build, {}, choice)) for name, role, choice in ours]  # say what is missing
    torch.manual_seed(0)
    twin = _build_segmentor(case, head, {"thresholds": ()})
    randomise_relative_positions(twin.backbone)
    state = twin.state_dict()
    candidates = [Candidate(name, role, partial(build, state, choice)) for name, role, choice in ours]
    candidates += [
        Candidate(rival.name, "cheap", partial(_cheap_segmentor, rival, head)) for rival in cheap_rivals(case)
    ]
    if case.is_vitdet:
        return candidates
    return [*candidates, Candidate("MMSegmentation", "mmseg", partial(build, _host_names(state, case), None))]


def _host_names(state: Mapping[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Rename the backbone's weights of a segmentor to MMSegmentation's names."""
    inside = {n.removeprefix("backbone."): w for n, w in state.items() if n.startswith("backbone.")}
    outside = {n: w for n, w in state.items() if not n.startswith("backbone.")}
    return outside | {f"backbone.{name}": weight for name, weight in as_mmseg(inside, case).items()}


def _build_segmentor(case: Case, head: str, choice: Mapping[str, Any] | None) -> nn.Module:
    """Build it; ``choice`` is how our backbone chooses patches, None for all of MMSegmentation's own."""
    import mmseg.models  # noqa: F401 (registers the parts)
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS

    import apt_dense.hosts.mmseg  # noqa: F401

    model = Config.fromfile(CONFIGS / "mmseg" / HEADS[head]).model
    sizes = backbone_arguments(case)
    depth, count = sizes["depth"], len(model.backbone.out_indices)
    outputs = tuple(depth * (i + 1) // count - 1 for i in range(count))
    if choice is None:
        model.type, model.backbone = "EncoderDecoder", _mmseg_backbone(case, outputs, model.backbone.final_norm)
        model.decode_head.type = model.decode_head.type.removeprefix("APT")
        model.test_cfg = {"mode": "whole"}
    else:
        model.backbone.update({**sizes, **choice, "out_indices": outputs, "class_token": not case.is_vitdet})
    _resize_heads(model, sizes["embed_dim"], TINY_CHANNELS if case.is_tiny else None)
    with DefaultScope.overwrite_default_scope("mmseg"):
        return revert_sync_batchnorm(MODELS.build(model))


def _mmseg_backbone(case: Case, out_indices: Sequence[int], final_norm: bool) -> dict[str, Any]:
    sizes = model_arguments(case.model)
    return {
        "type": "VisionTransformer", "img_size": (case.size, case.size), "patch_bias": True,
        "embed_dims": sizes["embed_dim"], "num_layers": sizes["depth"], "num_heads": sizes["num_heads"],
        "out_indices": out_indices, "final_norm": final_norm, "norm_cfg": {"type": "LN", "eps": 1e-6},
    }  # fmt: skip


def _resize_heads(model: Any, width: int, channels: int | None) -> None:
    """Fit neck and heads to a backbone of that width; ``channels`` are the heads', None for the config's."""
    if model.neck is None:
        model.decode_head.in_channels = model.decode_head.channels = width  # a linear head has no channels of its own
        return
    model.neck.embed_dim = model.auxiliary_head.in_channels = width
    model.decode_head.in_channels = [width] * 4
    if channels is not None:
        model.decode_head.channels = model.auxiliary_head.channels = channels


def _cheap_segmentor(rival: Rival, head: str) -> Variant:
    """Build ours, uniform, with weights of its own: its time does not depend on them."""
    choice = {"thresholds": (), "patch_size": rival.patch_size}
    return _segmentor_variant(rival.case, head, None, choice)._replace(tokens=rival.tokens)


def _segmentor_variant(
    case: Case, head: str, state: Mapping[str, Tensor] | None, choice: Mapping[str, Any] | None
) -> Variant:
    model = _build_segmentor(case, head, choice)
    if state is not None:
        load_weights(model, state)
    samples = drawn_labels(case.images, 150) if case.training else None

    def losses() -> dict[str, Tensor]:
        return segmentor_losses(model, case.images, samples)

    net = model.backbone if choice is not None else None
    variant = task_variant(model, case, lambda: model(case.images, mode="tensor"), losses, net)
    if len(case.images) == 1:  # batch statistics of the pooled map of one cell would need a second image
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    return variant


def segmentor_losses(model: nn.Module, images: Tensor, samples: Sequence[object]) -> dict[str, Tensor]:
    """The losses that an MMSegmentation model is trained with, without the other figures that it returns."""
    return {name: loss for name, loss in model(images, samples, mode="loss").items() if "loss" in name}


def drawn_labels(images: Tensor, classes: int) -> list[object]:
    """Samples of MMSegmentation for images (B, 3, H, W), with the same random labels each time."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    shape = (len(images), 1, *images.shape[2:])
    maps = torch.randint(0, classes, shape, generator=generator).to(images.device)
    return [SegDataSample(gt_sem_seg=PixelData(data=labels)) for labels in maps]
