"""Adaptive Patch Transformer backbones for dense prediction (method: arXiv 2510.18091)."""

from apt_dense.vit import APTViT

__all__ = ["APTViT"]
__version__ = "0.1.0"
