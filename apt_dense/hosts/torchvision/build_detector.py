"""The detector that a run's settings describe."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torchvision.models.detection import FasterRCNN

from apt_dense import APTViT
from apt_dense.hosts.torchvision.detectors import faster_rcnn, mask_rcnn
from apt_dense.hosts.torchvision.run_settings import Settings
from apt_dense.hosts.vit_sizes_and_windows import SIZES, WINDOW_SIZE, windowed_blocks
from apt_dense.nn.feature_pyramid import check_patch_size
from apt_dense.weights.files import read_checkpoint
from apt_dense.weights.load import load_backbone
from apt_dense.weights.timm_arguments import apt_arguments, create_timm_model, timm_model_without_weights

log = logging.getLogger(__name__)

DROP_PATH = {"base": 0.1, "large": 0.4, "huge": 0.5}  # ViTDet's

#: ViTDet's models, with smaller ones. Positions are shaped as in an ImageNet ViT's file.
PRESETS: dict[str, dict[str, Any]] = {
    f"vit_{name}": {**size._asdict(), "drop_path_rate": DROP_PATH.get(name, 0.0)} for name, size in SIZES.items()
}
PRESETS["vit_demo"]["pretrain_use_cls_token"] = False  # its weights are those of the demo's segmentor


def build_model(settings: Settings, num_classes: int, pretrained: bool = True) -> FasterRCNN:
    """Build the detector on the CPU: Mask R-CNN, or Faster R-CNN for the task "boxes".

    Args:
        num_classes: including the background.
        pretrained: load the weights that the settings name; False where a checkpoint brings all of them.

    Raises:
        FileNotFoundError, ValueError: for an unknown model, and weights that are missing, damaged or do not fit.
    """
    build = mask_rcnn if settings.task == "masks" else faster_rcnn
    return build(
        _backbone(settings, settings.pretrained if pretrained else None),
        num_classes, settings.size, settings.size,
        channels=settings.channels,
        scale_factors=settings.scale_factors,
        box_features=settings.box_features,
        resize_in_training=False,
        box_batch_size_per_image=settings.box_samples,
        rpn_post_nms_top_n_train=settings.proposals,
        rpn_post_nms_top_n_test=settings.proposals,
    )  # fmt: skip


def _backbone(settings: Settings, weights: str | None) -> APTViT:
    """Build the ViT, with the weights of a file or of "timm"."""
    common = {name: getattr(settings, name) for name in ("thresholds", "scorer", "drop_padding", "checkpoint_blocks")}
    if settings.model in PRESETS:
        if weights == "timm":
            raise ValueError(f"--pretrained timm goes with a timm model; {settings.model} is one of {list(PRESETS)}")
        common |= {} if settings.patch_size is None else {"patch_size": settings.patch_size}
        backbone = _preset(settings, common)
    else:
        backbone = _of_timm(settings, weights == "timm", common)
    if weights not in (None, "timm"):
        _load_pretrained(backbone, Path(weights).expanduser(), settings.patch_size is not None)
    return backbone


def _of_timm(settings: Settings, pretrained: bool, common: dict[str, Any]) -> APTViT:
    """Build a ViT of timm with ViTDet's windows. Patches are looked at before any weights are loaded."""
    patch_size = settings.patch_size
    plain = timm_model_without_weights(settings.model, patch_size=patch_size)
    check_patch_size(apt_arguments(plain)["patch_size"])
    vit = create_timm_model(settings.model, pretrained, None, patch_size)
    windowed = windowed_blocks(len(vit.blocks))
    common |= {"class_token": False, "window_size": WINDOW_SIZE, "window_block_indexes": windowed}
    return APTViT.from_timm(vit, **common)


def _preset(settings: Settings, common: dict[str, Any]) -> APTViT:
    """Build a plain ViT as ViTDet does: windows, relative positions, absolute ones of 224 pixels, no final norm."""
    own = PRESETS[settings.model]
    vitdet = {
        "pretrain_img_size": 224,
        "pretrain_use_cls_token": True,
        "use_rel_pos": True,
        "window_size": WINDOW_SIZE,
        "window_block_indexes": windowed_blocks(own["depth"]),
        "pos_antialias": False,
    }
    return APTViT(**{"img_size": settings.size, **vitdet, **own, **common})


def _load_pretrained(backbone: APTViT, path: Path, resize_patches: bool = False) -> None:
    """Load a ViT's file. Relative positions, which ImageNet ViTs do not have, may be missing: they start at zero."""
    try:
        report = load_backbone(backbone, read_checkpoint(path), strict=False, resize_patches=resize_patches)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    missing = [name for name in report.missing if "rel_pos" not in name]
    if missing or report.unexpected:
        raise ValueError(f"{path} does not fit the backbone: {report}. Choose --model as in the checkpoint")
    log.info("backbone weights from %s: %s", path, report.summary())
