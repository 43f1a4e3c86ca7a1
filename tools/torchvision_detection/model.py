"""Settings of a detection run, and the model and optimizer that follow from them."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN

from apt_dense import APTViT
from apt_dense.hosts.torchvision import mask_rcnn
from apt_dense.weights.files import read_checkpoint
from apt_dense.weights.load import load_backbone
from apt_dense.weights.timm_models import create_timm_model

log = logging.getLogger(__name__)

WINDOW_SIZE = 14  # cells; ViTDet's, and 224 pixels, which most ViTs are trained on
GLOBAL_BLOCKS = 4  # evenly spread, as ViTDet has them; the other blocks attend inside windows

#: ViTDet's models, with two small ones. Positions are shaped as in an ImageNet ViT's file.
PRESETS: dict[str, dict[str, Any]] = {
    "vit_demo": {"embed_dim": 96, "depth": 4, "num_heads": 3},
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "drop_path_rate": 0.1},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "drop_path_rate": 0.4},
    "vit_huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "drop_path_rate": 0.5},
}


_LEAST = {
    "size": 32, "channels": 4, "box_features": 1, "proposals": 1, "box_samples": 1, "batch_size": 1, "iterations": 1,
    "weight_decay": 0, "warmup": 0, "clip": 0, "seed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Everything that the course of a training run depends on, beside the data."""

    model: str = "vit_base"  # one of PRESETS or a timm ViT's name
    pretrained: str | None = None  # a checkpoint file of a ViT, or "timm" for timm's weights
    thresholds: tuple[float, ...] = (5.5, 4.0)  # () for the uniform ViT
    drop_padding: bool = True
    size: int = 1024  # pixels of the longer side
    channels: int = 256  # of pyramid and heads
    box_features: int = 1024
    proposals: int = 1000  # per image
    box_samples: int = 512  # of them, per image, for the loss
    checkpoint_blocks: bool = False
    scale_jitter: tuple[float, float] = (0.1, 2.0)  # ViTDet's
    batch_size: int = 4
    iterations: int = 90_000
    lr: float = 1e-4
    lr_decay: float | None = None  # per layer towards the input; None: 0.7 with pretrained weights, otherwise 1
    weight_decay: float = 0.1
    warmup: int = 250  # iterations
    clip: float = 1.0  # norm of the gradients; 0 for any
    amp: bool = False  # bfloat16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("lr", "lr_decay"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")

    def differences(self, other: Settings) -> list[str]:
        """The settings that differ, as "name: own against other"."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} against {theirs[name]}" for name in mine if mine[name] != theirs[name]]


def build_model(settings: Settings, num_classes: int, pretrained: bool = True) -> MaskRCNN:
    """The detector on the CPU.

    Args:
        num_classes: including the background.
        pretrained: load the weights that the settings name; False where a checkpoint brings all of them.

    Raises:
        FileNotFoundError, ValueError: for an unknown model, and weights that are missing, damaged or do not fit.
    """
    return mask_rcnn(
        _backbone(settings, settings.pretrained if pretrained else None),
        num_classes, settings.size, settings.size,
        channels=settings.channels,
        box_features=settings.box_features,
        resize_in_training=False,
        box_batch_size_per_image=settings.box_samples,
        rpn_post_nms_top_n_train=settings.proposals,
        rpn_post_nms_top_n_test=settings.proposals,
    )  # fmt: skip


def _backbone(settings: Settings, weights: str | None) -> APTViT:
    """The ViT, with the weights of a file or of "timm"."""
    common = {name: getattr(settings, name) for name in ("thresholds", "drop_padding", "checkpoint_blocks")}
    if settings.model in PRESETS:
        if weights == "timm":
            raise ValueError(f"--pretrained timm goes with a timm model; {settings.model} is one of {list(PRESETS)}")
        backbone = _preset(settings, common)
    else:
        vit = create_timm_model(settings.model, weights == "timm", None)
        windowed = windowed_blocks(len(vit.blocks))
        common |= {"class_token": False, "window_size": WINDOW_SIZE, "window_block_indexes": windowed}
        backbone = APTViT.from_timm(vit, **common)
    if weights not in (None, "timm"):
        _load_pretrained(backbone, Path(weights).expanduser())
    return backbone


def _preset(settings: Settings, common: dict[str, Any]) -> APTViT:
    """ViTDet's way to use a plain ViT: windows, relative positions, absolute ones of 224 pixels, no final norm."""
    shape = PRESETS[settings.model]
    return APTViT(
        img_size=settings.size,
        pretrain_img_size=224,
        pretrain_use_cls_token=True,
        use_rel_pos=True,
        window_size=WINDOW_SIZE,
        window_block_indexes=windowed_blocks(shape["depth"]),
        pos_antialias=False,
        **shape,
        **common,
    )


def windowed_blocks(depth: int) -> tuple[int, ...]:
    """Blocks with windows: of 12, all but 2, 5, 8 and 11."""
    every = max(1, depth // GLOBAL_BLOCKS)
    return tuple(block for block in range(depth) if (block + 1) % every)


def _load_pretrained(backbone: APTViT, path: Path) -> None:
    """Load a ViT's file. Relative positions, which ImageNet ViTs do not have, may be missing: they start at zero."""
    try:
        report = load_backbone(backbone, read_checkpoint(path), strict=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    missing = [name for name in report.missing if "rel_pos" not in name]
    if missing or report.unexpected:
        raise ValueError(f"{path} does not fit the backbone: {report.summary()}. Choose --model as in the checkpoint")
    log.info("backbone weights from %s: %s", path, report.summary())


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load a whole detector. One trained with thresholds can be used without, and the other way round.

    Raises:
        ValueError: for weights that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    shared = sorted(own.keys() & state.keys())
    problems = [f"{name} is of another shape" for name in shared if own[name].shape != state[name].shape]
    for word, names in (("missing", own.keys() - state.keys()), ("unknown", state.keys() - own.keys())):
        problems += [f"{name} is {word}" for name in sorted(names) if ".coarse_embed." not in name]
    if problems:
        raise ValueError(f"{path} does not fit the model: {len(problems)} problems, such as {'; '.join(problems[:3])}")
    model.load_state_dict(state, strict=False)


# ---- optimizer ------------------------------------------------------------------------------------------------------


def make_optimizer(model: MaskRCNN, settings: Settings) -> torch.optim.AdamW:
    """AdamW with layer-wise decay: the last block has the full rate, each layer before it ``lr_decay`` of the next."""
    decay = settings.lr_decay or (0.7 if settings.pretrained else 1.0)
    depth = len(model.backbone.net.blocks)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        layer = layer_of(name.removeprefix("backbone.net."), depth)
        # Positions, norms and biases are no directions in feature space that should shrink.
        decays = parameter.ndim > 1 and not name.endswith(("pos_embed", "rel_pos_h", "rel_pos_w"))
        rates = {"lr": settings.lr * decay ** (depth - layer), "weight_decay": settings.weight_decay * decays}
        groups.setdefault((layer, decays), {"params": [], **rates})["params"].append(parameter)
    return torch.optim.AdamW([groups[key] for key in sorted(groups)])


def layer_of(name: str, depth: int) -> int:
    """0 for the patch embedding, i + 1 for block i, ``depth`` for all others: heads, and what only APT has."""
    if name.startswith(("patch_embed.", "pos_embed")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth


def rate_at(iteration: int, warmup: int, iterations: int) -> float:
    """Factor of the learning rate: rises over the warm-up, falls to a tenth at 8/9 and a hundredth at 26/27 of the run
    (ViTDet's schedule)."""
    rise = min(1.0, (iteration + 1) / (warmup + 1))
    return rise * 0.1 ** ((iteration >= iterations * 8 / 9) + (iteration >= iterations * 26 / 27))
