"""Layers that tell one family of ViTs from another, all timm's: norms, activations, MLPs, LayerScale."""

from collections.abc import Callable
from functools import partial

from timm.layers import GELUTanh, LayerScale, Mlp, QuickGELU, RmsNorm, SwiGLU, SwiGLUPacked, trunc_normal_
from torch import nn

from apt_dense.options import BlockOptions

NORMS = {"layernorm": nn.LayerNorm, "rmsnorm": RmsNorm}
ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": GELUTanh, "quick_gelu": QuickGELU, "silu": nn.SiLU}
MLPS = {"mlp": Mlp, "swiglu": SwiGLU, "swiglu_packed": SwiGLUPacked}


def init_linear_layers(module: nn.Module) -> None:
    """Initialise as timm's ViT does: truncated normal weights of 0.02, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def make_norm(options: BlockOptions) -> Callable[..., nn.Module]:
    """The norm layer, still to be called with its width."""
    return partial(NORMS[options.norm_layer], eps=options.norm_eps)


def make_mlp(dim: int, options: BlockOptions) -> nn.Module:
    """The MLP of a block: rows (R, dim) -> (R, dim)."""
    # A little more, so that a ratio of two whole widths gives back the first in floating point too.
    hidden = int(dim * options.mlp_ratio + 1e-6)
    return MLPS[options.mlp_layer](
        dim,
        2 * hidden if options.mlp_layer == "swiglu_packed" else hidden,
        act_layer=ACTIVATIONS[options.activation],
        norm_layer=make_norm(options) if options.scale_mlp_norm else None,
        bias=options.proj_bias,
    )


def make_layer_scale(dim: int, options: BlockOptions) -> nn.Module:
    """One factor per channel of a branch, or nothing."""
    return nn.Identity() if options.init_values is None else LayerScale(dim, options.init_values)
