"""Pairs of models with the same weights: the backbone without thresholds, and the implementation that it replaces."""

import copy
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import vision_transformer_sam
from torch import Tensor, nn

from apt_dense import APTViT
from apt_dense.options import PixelFormat
from apt_dense.weights.convert import from_apt
from apt_dense.weights.files import read_checkpoint
from apt_dense.weights.load import load_backbone, unwrap
from apt_dense.weights.timm_arguments import apt_arguments, create_timm_model, weights_of

Outputs = Callable[[Tensor], dict[str, Tensor]]
#: Options that adapt, read or train, and leave the values of a uniform model as they are.
_NEUTRAL = {
    "type", "_target_", "thresholds", "token_budget", "min_tokens", "keep_fine", "keep_coarse", "scorer",
    "drop_padding", "pixel_mean", "pixel_std", "channel_order", "pretrained", "init_cfg", "with_cp", "frozen_stages",
    "norm_eval", "drop_path_rate", "checkpoint_blocks", "attention_backend", "strict_loading",
    "proportional_attention",
}  # fmt: skip
#: Means of random vectors by pattern of their names; 0 for biases.
_CENTRES = {r"norm.*weight$": 1.0, r"gamma(_[12])?$": 0.3}
#: Arguments of MMSeg's VisionTransformer by ours.
_MMSEG_ARGUMENTS = {
    "img_size": "img_size", "patch_size": "patch_size", "in_chans": "in_channels", "embed_dim": "embed_dims",
    "depth": "num_layers", "num_heads": "num_heads", "mlp_ratio": "mlp_ratio", "qkv_bias": "qkv_bias",
    "patch_bias": "patch_bias", "class_token": "with_cls_token", "pre_norm": "pre_norm", "final_norm": "final_norm",
}  # fmt: skip


class Weights(NamedTuple):
    """Where both models of a pair take their weights from: a file, timm, or a seed."""

    checkpoint: Path | None = None
    pretrained: bool = False
    seed: int = 0


class Pair(NamedTuple):
    """Two models with the same weights, and the images that they take."""

    title: str
    ours: Outputs
    original: Outputs
    exact: Outputs  # the original's in float64
    img_size: tuple[int, int]  # pixels (H, W)
    pixel_format: PixelFormat


def in_float64(maps_of: Callable[[nn.Module, Tensor], dict[str, Tensor]], model: nn.Module) -> Outputs:
    """The outputs of a copy of a model in float64, which exists while they are computed."""
    return lambda images: maps_of(copy.deepcopy(model).double(), images.double())


def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter at random, biases and norms too, so that activations stay near unit scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim in (2, 4):  # of a layer, by its fan-in
                centre, std = 0.0, parameter[0].numel() ** -0.5
            elif parameter.ndim == 3:  # tokens and positions
                centre, std = 0.0, 0.5
            else:
                centre, std = next((c for kind, c in _CENTRES.items() if re.search(kind, name)), 0.0), 0.1
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))


# ---- timm


def timm_pair(name: str, weights: Weights, img_size: tuple[int, int] | None) -> Pair:
    """Pair one of timm's models with ours; every block is compared, the last one after the final norm.

    Raises:
        ValueError: for an unknown name, a model that is not supported, or a file that does not fit.
    """
    theirs = create_timm_model(name, weights.pretrained, img_size).eval()
    arguments = {**apt_arguments(theirs), "out_indices": range(len(theirs.blocks))}
    ours, content = APTViT(**arguments).eval(), None
    if weights.checkpoint is not None:
        content = read_checkpoint(weights.checkpoint)
        _load_as_timm_does(theirs, content)
    elif not weights.pretrained:
        randomise(theirs, weights.seed)
    load_backbone(ours, weights_of(theirs) if content is None else content)
    named = f"timm's {type(theirs).__name__} {name}"
    return Pair(
        named, _maps_of(ours), partial(_timm_maps, theirs), in_float64(_timm_maps, theirs), ours.img_size,
        ours.pixel_format,
    )  # fmt: skip


def _load_as_timm_does(model: nn.Module, content: Mapping) -> None:
    """Load a checkpoint through timm's own conversion, so that ours is checked as well."""
    convert = sys.modules[type(model).__module__].checkpoint_filter_fn
    state = convert(dict(unwrap(content)), model)
    report = model.load_state_dict(state, strict=False)
    if report.missing_keys:
        raise ValueError(f"the checkpoint lacks {len(report.missing_keys)} weights: {report.missing_keys[:4]}")


def _timm_maps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    maps = list(model.forward_intermediates(images, norm=False, intermediates_only=True))
    if not isinstance(model, vision_transformer_sam.VisionTransformerSAM):
        tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
        maps[-1] = tokens.mT.unflatten(2, maps[-1].shape[-2:])
    return {f"block {index}": feature_map for index, feature_map in enumerate(maps)}


def _maps_of(model: APTViT) -> Outputs:
    return lambda images: {f"block {i}": m for i, m in zip(model.out_indices, model(images), strict=True)}


# ---- hosts


def _fill(ours: nn.Module, weights: Weights) -> None:
    if weights.pretrained:
        raise ValueError("--pretrained goes with timm's models; give --checkpoint FILE for a config")
    if weights.checkpoint is None:
        randomise(ours, weights.seed)
    else:
        load_backbone(ours, read_checkpoint(weights.checkpoint))


def _refuse(options: Mapping[str, Any], known: set[str], partial_patches: str, original: str, remark: str) -> None:
    """Raise ValueError for options that make our backbone something the original cannot be."""
    usual = {name: p.default for name, p in inspect.signature(APTViT).parameters.items()}
    usual |= {"partial_patches": partial_patches, "pos_antialias": False}
    strange = [name for name, value in options.items() if name not in known | _NEUTRAL and value != usual.get(name)]
    if strange:
        raise ValueError(f"{original} has no {', '.join(strange)}, so there is nothing to compare with{remark}")


def mmseg_pair(path: Path, weights: Weights) -> Pair:
    """Pair the backbone of an MMSegmentation config with MMSeg's VisionTransformer; each output is compared."""
    if importlib.util.find_spec("mmseg") is None:
        raise ValueError('MMSegmentation is not installed; pip install -e ".[mmseg]"')
    from mmengine.config import Config
    from mmseg.models.backbones import VisionTransformer

    from apt_dense.hosts import mmseg as host
    from apt_dense.hosts.mmseg.arguments_from_pretrained import fill_in_config

    cfg = Config.fromfile(path)
    fill_in_config(cfg)
    options = cfg.get("model", {}).get("backbone", {}).to_dict()
    if options.get("type") != "APTViT":
        raise ValueError(f"the backbone of {path} is {options.get('type')!r}, not 'APTViT'")
    remark = "; give the name of the timm model instead"
    known = {*_MMSEG_ARGUMENTS, "norm_eps", "out_indices"}
    _refuse(options, known, "pad", "MMSegmentation's VisionTransformer", remark)
    ours = host.APTViT(**{k: v for k, v in options.items() if k not in _NEUTRAL}, **_pixels(options)).eval()
    _fill(ours, weights)
    theirs = VisionTransformer(
        **_mmseg_arguments(options),
        out_indices=ours.out_indices,
        norm_cfg={"type": "LN", "eps": ours.block_options.norm_eps},
    )
    theirs.eval()  # a statement, since MMSeg's train() returns None
    theirs.load_state_dict(from_apt(ours.state_dict(), "mmseg", grid=ours.pos_grid).state, strict=True)

    def maps_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        return {f"block {i}": m for i, m in zip(ours.out_indices, model(images), strict=True)}

    return Pair(
        f"MMSegmentation's VisionTransformer, {path.name}", _maps_of(ours), partial(maps_of, theirs),
        in_float64(maps_of, theirs), ours.img_size, ours.pixel_format,
    )  # fmt: skip


def _mmseg_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    defaults = inspect.signature(APTViT).parameters
    arguments = {name: options.get(mine, defaults[mine].default) for mine, name in _MMSEG_ARGUMENTS.items()}
    if arguments["mlp_ratio"] != int(arguments["mlp_ratio"]):
        ratio = arguments["mlp_ratio"]
        raise ValueError(f"MMSegmentation's VisionTransformer has no mlp_ratio={ratio}, only whole ones")
    return {**arguments, "mlp_ratio": int(arguments["mlp_ratio"])}


def _pixels(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("pixel_mean", "pixel_std", "channel_order") if name in options}


def _as_detectron2_says(net: MutableMapping[str, Any]) -> None:
    """Give what a weights file told in the way that Detectron2's ViT takes it; what it does not have stays."""
    for name in ("img_size", "pretrain_img_size"):
        sides = net.get(name)
        if sides is not None and not isinstance(sides, int):
            if sides[0] != sides[1]:
                raise ValueError(f"Detectron2's ViT takes square images only, and {name} is {tuple(sides)}")
            net[name] = sides[0]
    if net.get("norm_layer") == "layernorm" and "norm_eps" in net:
        net["norm_layer"] = partial(nn.LayerNorm, eps=net.pop("norm_eps"))
    if net.get("act_layer", "gelu") in (None, "gelu"):
        net.pop("act_layer", None)


def detectron2_pair(path: Path, weights: Weights) -> Pair:
    """Pair the backbone of a lazy config of Detectron2 with ``detectron2.modeling.ViT``."""
    if importlib.util.find_spec("detectron2") is None:
        raise ValueError("Detectron2 is not installed; its INSTALL page says how to build it from source")
    from detectron2.config import instantiate
    from detectron2.modeling import ViT

    from apt_dense.hosts.detectron2.arguments_from_pretrained import describes, fill_in_config
    from apt_dense.hosts.detectron2.train_and_evaluate import load_config

    cfg = load_config(str(path))
    if "backbone" not in cfg.get("model", {}) or "net" not in cfg.model.backbone:
        raise ValueError(f"{path} has no model.backbone.net, as the configs of ViTDet have")
    if describes(cfg.model.backbone.net):
        fill_in_config(cfg, keep_weights=False)
        _as_detectron2_says(cfg.model.backbone.net)
    known = set(inspect.signature(ViT).parameters)
    remark = ". EVA-02's detectors are in no package; tests/weights/test_timm_families.py compares blocks with timm's"
    _refuse(cfg.model.backbone.net, known, "crop", "Detectron2's ViT", remark)
    plain = copy.deepcopy(cfg)
    cfg.model.backbone.net.update(thresholds=(), drop_padding=False)
    for name in [name for name in plain.model.backbone.net if name not in {*known, "_target_"}]:
        plain.model.backbone.net.pop(name)
    plain.model.backbone.net._target_ = ViT
    ours, theirs = (instantiate(config.model.backbone.net).eval() for config in (cfg, plain))
    _fill(ours, weights)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    exact = in_float64(lambda model, images: model(images), theirs)
    return Pair(f"Detectron2's ViT, {path.name}", ours, theirs, exact, ours.img_size, ours.pixel_format)
