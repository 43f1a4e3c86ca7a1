"""Adaptive Patch Transformer backbones for dense prediction (method: arXiv 2510.18091)."""

from apt_dense.drawing import draw_patches
from apt_dense.nn.feature_pyramid import SimpleFeaturePyramid
from apt_dense.options import Rotary
from apt_dense.patches.selector import PatchSelector
from apt_dense.vit import APTViT
from apt_dense.weights.files import CheckpointError, read_checkpoint
from apt_dense.weights.load import LoadReport, load_backbone

__all__ = [
    "APTViT",
    "CheckpointError",
    "LoadReport",
    "PatchSelector",
    "Rotary",
    "SimpleFeaturePyramid",
    "draw_patches",
    "load_backbone",
    "read_checkpoint",
]
__version__ = "0.1.0"
