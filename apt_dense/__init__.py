"""Adaptive Patch Transformer backbones for dense prediction (method: arXiv 2510.18091)."""

from apt_dense.drawing import draw_patches
from apt_dense.patches.selector import PatchSelector
from apt_dense.vit import APTViT
from apt_dense.weights.load import LoadReport, load_backbone

__all__ = ["APTViT", "LoadReport", "PatchSelector", "draw_patches", "load_backbone"]
__version__ = "0.1.0"
