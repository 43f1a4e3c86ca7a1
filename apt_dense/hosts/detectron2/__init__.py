"""Detectron2 host: in a ViTDet config, change one line,

    model.backbone.net._target_ = APTViT  # from apt_dense.hosts.detectron2

and nothing else changes until ``model.backbone.net.thresholds`` says which patches may be large. For yacs configs, see
:func:`add_apt_config`. Detectron2 is built from source (see its INSTALL page); it is not in the package index.
"""

from apt_dense.hosts.detectron2.backbone import APTViT
from apt_dense.hosts.detectron2.balanced_sampler import BalancedTrainingSampler, TokenCounting
from apt_dense.hosts.detectron2.feature_pyramid import SimpleFeaturePyramid
from apt_dense.hosts.detectron2.large_image_rcnn import APTGeneralizedRCNN
from apt_dense.hosts.detectron2.layer_decay import get_apt_lr_decay_rate
from apt_dense.hosts.detectron2.patch_schedule_hook import PatchScheduleHook
from apt_dense.hosts.detectron2.token_drift_hook import TokenDriftHook
from apt_dense.hosts.detectron2.yacs import add_apt_config, build_apt_vit_sfp_backbone, save_run_config

__all__ = [
    "APTGeneralizedRCNN",
    "APTViT",
    "BalancedTrainingSampler",
    "PatchScheduleHook",
    "SimpleFeaturePyramid",
    "TokenCounting",
    "TokenDriftHook",
    "add_apt_config",
    "build_apt_vit_sfp_backbone",
    "get_apt_lr_decay_rate",
    "save_run_config",
]
