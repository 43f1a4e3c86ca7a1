"""Detectron2 host: see ``backbone`` for lazy configs, :func:`add_apt_config` for yacs configs."""

from apt_dense.hosts.detectron2.backbone import (
    APTViT,
    SimpleFeaturePyramid,
    add_apt_config,
    build_apt_vit_sfp_backbone,
    get_apt_lr_decay_rate,
)

__all__ = [
    "APTViT",
    "SimpleFeaturePyramid",
    "add_apt_config",
    "build_apt_vit_sfp_backbone",
    "get_apt_lr_decay_rate",
]
