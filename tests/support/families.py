"""The families of timm's plain ViTs that the backbone rebuilds, each as a small model with random weights."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from support.references import randomise

WIDTH, HEADS = 48, 3

FAMILIES = {
    "augreg": "vit_small_patch16_224.augreg_in21k",
    "mae": "vit_base_patch16_224.mae",
    "deit3": "deit3_small_patch16_224",
    "clip": "vit_base_patch16_clip_224",
    "openai clip": "vit_base_patch16_clip_quickgelu_224",
    "siglip": "vit_base_patch16_siglip_224",
    "siglip so400m": "vit_so400m_patch14_siglip_224",
    "siglip giant": "vit_giantopt_patch16_siglip_256",
    "beit3": "beit3_base_patch16_224",
    "dinov2": "vit_small_patch14_dinov2",
    "dinov2 reg": "vit_small_patch14_reg4_dinov2",
    "dinov2 giant": "vit_giant_patch14_dinov2",
    "dinov2 giant reg": "vit_giant_patch14_reg4_dinov2",
    "eva": "eva_giant_patch14_224",
    "eva02 tiny": "eva02_tiny_patch14_224",
    "eva02 base": "eva02_base_patch14_448",
    "eva02 clip": "eva02_base_patch16_clip_224",
    "dinov3": "vit_small_patch16_dinov3",
    "dinov3 bias": "vit_small_patch16_dinov3_qkvb",
    "dinov3 plus": "vit_small_plus_patch16_dinov3",
    "pe core": "vit_pe_core_tiny_patch16_384",
    "pe spatial": "vit_pe_spatial_tiny_patch16_512",
    "pe lang": "vit_pe_lang_large_patch14_448",
    "pe lang giant": "vit_pe_lang_gigantic_patch14_448",
    "rope": "vit_small_patch16_rope_224",
    "aimv2": "aimv2_large_patch14_224",
    "rope and positions": "vit_small_patch16_rope_ape_224",
    "rope reg gap": "vit_medium_patch16_rope_reg1_gap_256",
}
#: Options that no named model has, or none together.
VARIANTS = {
    "positions of registers": ("vit_small_patch16_224", {"reg_tokens": 3}),
    "qk-norm": ("vit_small_patch16_224", {"qk_norm": True, "pos_embed": "none"}),
    "rms norm": ("vit_small_patch16_224", {"norm_layer": timm.layers.RmsNorm, "proj_bias": False, "pre_norm": True}),
    "eva02 without biases": ("eva02_base_patch14_224", {"qkv_bias": False, "num_reg_tokens": 2}),
    "dinov3 with half of the scales": ("vit_small_patch16_dinov3", {"rope_rotate_half": False, "qk_norm": True}),
}
ALL = [*FAMILIES, *VARIANTS]


def timm_model(family: str, cells: int = 4, seed: int = 0, **options: Any) -> nn.Module:
    """The smallest of a family, with random weights, for images of that many patches; any input size runs."""
    name, extra = VARIANTS.get(family) or (FAMILIES[family], {})
    patch = 14 if "patch14" in name else 16
    small = {"embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "num_classes": 0, "img_size": cells * patch}
    dynamic = {"dynamic_img_size": True, "dynamic_img_pad": True}
    return randomise(timm.create_model(name, **{**small, **dynamic, **extra, **options}), 0.1, seed)
