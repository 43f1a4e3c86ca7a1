"""Backbones of Detectron2 that a weights file describes: ``APTViT(pretrained=FILE)`` without width and depth."""

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from apt_dense.nn.feature_pyramid import check_patch_size, fits_pyramid
from apt_dense.option_checks import flag, text
from apt_dense.weights.arguments_from_file import architecture_of
from apt_dense.weights.arguments_in_own_metadata import plain_options
from apt_dense.weights.files import CheckpointError, read_checkpoint
from apt_dense.weights.load import load_backbone

logger = logging.getLogger("detectron2.apt_dense")  # below Detectron2's, whose lines its trainers show

#: A config with one of these says what its backbone is; without, its weights do.
SAY_IT_ALL = "embed_dim", "depth"
#: Options next to which a class token has no place; ViTDet leaves it out.
_WITHOUT_CLASS_TOKEN = "window_size", "use_rel_pos", "residual_block_indexes"


def described_by_file(init: Callable) -> Callable:
    """Decorate the constructor of a backbone with ``pretrained``, a file that tells the arguments that are not given,
    unless width or depth are, and whose weights are loaded; ``resize_patches`` resamples its patches."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def initialise(self: Any, *args: Any, **options: Any) -> None:
        if options.get("pretrained") is None:
            init(self, *args, **options)
            return
        path = text("pretrained", options["pretrained"])
        content = read_checkpoint(Path(path).expanduser())
        positional = signature.bind_partial(self, *args).arguments
        try:
            options = completed(content, {**positional, **options})
            options.pop("self", None)
            init(self, **options)
            resize = flag("resize_patches", options.get("resize_patches", False))
            logger.info("APTViT weights from %s: %s", path, load_backbone(self, content, resize_patches=resize))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error

    return initialise


def describes(options: Mapping[str, Any]) -> bool:
    """Check whether the weights are to tell what the backbone is."""
    return options.get("pretrained") is not None and options.keys().isdisjoint(SAY_IT_ALL)


def completed(content: Mapping, options: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the arguments of a backbone by what a checkpoint tells, unless they say its width or depth.

    As in ViTDet, positions keep the size of their pre-training, and a model with windows or relative positions has no
    class token.

    Raises:
        ValueError: if the checkpoint does not tell an argument that is not given, naming it, or has patches that no
            pyramid takes and ``patch_size`` does not say what shall become of them.
    """
    if not describes(options):
        return dict(options)
    host = {name: options[name] for name in ("self", "pretrained", "img_size") if name in options}
    given = {name: value for name, value in options.items() if name not in host}
    if callable(given.get("norm_layer")):
        given |= {**norm_arguments(given["norm_layer"]), "norm_layer": "layernorm"}
    if any(given.get(name) for name in _WITHOUT_CLASS_TOKEN):
        given.setdefault("class_token", False)
    told = architecture_of(content, **given)
    _check_patches(told["patch_size"], "patch_size" in options)
    if told["pretrain_img_size"] is None and told["use_abs_pos"]:
        told["pretrain_img_size"] = told["img_size"]
    return {**told, **host, **({"resize_patches": True} if "patch_size" in options else {})}


def _check_patches(patch_size: int, asked: bool) -> None:
    if not asked and not fits_pyramid(patch_size):
        raise ValueError(
            f"the weights have patches of {patch_size} pixels, and the strides of feature pyramids are powers of 2. "
            f"Add patch_size=16, which resamples them, or patch_size={patch_size} to keep them"
        )


def fill_in_config(cfg: DictConfig, keep_weights: bool) -> None:
    """Write into a lazy config what the weights of its backbone tell, so that it is complete without them, and check
    that its pyramid can be built.

    Args:
        keep_weights: False takes out the weights, for runs in which a checkpoint brings all of them.

    Raises:
        FileNotFoundError, ValueError: if the weights cannot be read or do not tell an argument that is not given, and
            for patches that the pyramid cannot be built on.
    """
    net = OmegaConf.select(cfg, "model.backbone.net")
    if not OmegaConf.is_dict(net) or not _name_of(net).endswith("APTViT"):
        return
    given = {name: net[name] for name in net if name != "_target_"}
    if describes(given):
        try:
            told = completed(read_checkpoint(Path(given["pretrained"]).expanduser()), given)
        except ValueError as error:
            raise CheckpointError(f"{given['pretrained']}: {error}") from error
        net.update({name: value for name, value in plain_options(told).items() if name not in given})
    if not keep_weights and "pretrained" in net:
        net.pretrained = None
    if _name_of(cfg.model.backbone).endswith("SimpleFeaturePyramid"):
        check_patch_size(net.get("patch_size", 16))


def _name_of(node: DictConfig) -> str:
    target = node.get("_target_")
    return target if isinstance(target, str) else getattr(target, "__qualname__", "")


def norm_arguments(norm_layer: Callable[[int], nn.Module] | str) -> dict[str, Any]:
    """Translate Detectron2's ``norm_layer`` into the core's arguments."""
    if isinstance(norm_layer, str):
        return {"norm_layer": norm_layer}
    norm, settings = norm_layer, {}
    if isinstance(norm_layer, functools.partial) and not norm_layer.args:
        norm, settings = norm_layer.func, norm_layer.keywords
    if norm is not nn.LayerNorm or not settings.keys() <= {"eps"}:
        raise ValueError(
            f"norm_layer={norm_layer} is not supported; expected nn.LayerNorm or partial(nn.LayerNorm, eps=...)"
        )
    return {"norm_eps": settings.get("eps", 1e-5)}
