"""Blocks and rotary positions of timm's ViTs and EVAs: the ``APTViT`` arguments that rebuild them, and a name for each
feature that no argument does."""

from collections.abc import Iterable, Iterator
from typing import Any

from timm.layers import (
    Attention,
    AttentionRope,
    GluMlp,
    LayerNorm,
    LayerScale,
    Mlp,
    RmsNorm,
    RotaryEmbeddingCat,
    SwiGLU,
)
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models import eva, vision_transformer, vision_transformer_sam
from torch import nn

from apt_dense.nn.layers import ACTIVATIONS
from apt_dense.options import Rotary, usual_activation

_BLOCKS = vision_transformer.Block, vision_transformer_sam.Block, eva.EvaBlock
_ATTENTIONS = Attention, vision_transformer_sam.Attention, eva.EvaAttention, AttentionRope
_MLPS = {Mlp: "mlp", SwiGLU: "swiglu", GluMlp: "swiglu_packed"}
_NORMS = {nn.LayerNorm: "layernorm", LayerNorm: "layernorm", RmsNorm: "rmsnorm"}


def block_arguments(block: nn.Module) -> dict[str, Any]:
    """Return the keyword arguments of ``APTViT`` that rebuild a block; call :func:`unsupported_in_block` first."""
    attn, mlp = block.attn, block.mlp
    q_bias, k_bias = _has_biases(attn)
    return {
        "num_heads": attn.num_heads,
        "mlp_ratio": mlp.fc2.in_features / mlp.fc2.out_features,
        "qkv_bias": q_bias,
        "k_bias": k_bias or not q_bias,
        "qkv_fused": attn.qkv is not None,
        "qk_norm": not is_identity(attn.q_norm),
        "proj_bias": attn.proj.bias is not None,
        "init_values": _init_values(block),
        "scale_attn_norm": not is_identity(getattr(attn, "norm", None)),
        "scale_mlp_norm": not is_identity(mlp.norm),
        "mlp_layer": _MLPS[type(mlp)],
        "act_layer": None if _activation(mlp.act) == usual_activation(_MLPS[type(mlp)]) else _activation(mlp.act),
        "norm_layer": _NORMS[type(block.norm1)],
        "norm_eps": block.norm1.eps,
    }


def rotary_arguments(rope: nn.Module | None, rotate_half: bool) -> Rotary | None:
    """Return the rotary positions of an EVA; call :func:`unsupported_in_rotary` first."""
    if rope is None:
        return None
    return Rotary(
        rope_type="dinov3" if isinstance(rope, RotaryEmbeddingDinoV3) else "cat",
        temperature=float(rope.temperature),
        ref_feat_shape=None if getattr(rope, "ref_feat_shape", None) is None else tuple(rope.ref_feat_shape),
        grid_offset=float(rope.grid_offset),
        grid_indexing=rope.grid_indexing,
        rotate_half=rotate_half,
    )


def unsupported_in_rotary(rope: nn.Module | None) -> Iterator[str]:
    """Name the features of an EVA's rotary positions that ``APTViT`` cannot reproduce."""
    if type(rope) not in (type(None), RotaryEmbeddingCat, RotaryEmbeddingDinoV3):
        yield f"rotary positions of type {type(rope).__name__}"
    if getattr(rope, "in_pixels", False) or getattr(rope, "grid_type", "index") != "index":
        yield "rotary positions in pixels"
    if getattr(rope, "normalize_coords", "separate") != "separate" or getattr(rope, "min_period", None) is not None:
        yield "rotary positions that are normalised by one side or given by periods"


def unsupported_in_block(block: nn.Module) -> Iterator[str]:
    """Name the features of a block that ``APTViT`` cannot reproduce."""
    if type(block) not in _BLOCKS:
        yield f"blocks of type {type(block).__name__}"
        return
    attn = block.attn
    if type(attn) not in _ATTENTIONS:
        yield f"attention of type {type(attn).__name__}"
        return
    if getattr(attn, "gate", None) is not None:
        yield "gated attention"
    if getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
        yield f"grouped-query attention ({attn.num_kv_heads} heads of keys for {attn.num_heads} of queries)"
    if attn.proj.in_features != attn.proj.out_features:
        yield "attention of another width than its tokens"
    if is_identity(attn.q_norm) != is_identity(attn.k_norm):
        yield "a norm of queries or keys alone"
    if len(set(_branch_scales(block))) > 1:
        yield "LayerScale of one branch alone"
    yield from _unsupported_in_mlp(block.mlp, attn.proj.bias is not None)


def _unsupported_in_mlp(mlp: nn.Module, biased: bool) -> Iterator[str]:
    if type(mlp) not in _MLPS or getattr(mlp, "gate_last", False):
        yield f"an MLP of type {type(mlp).__name__}"
        return
    if _activation(mlp.act) is None:
        yield f"an MLP with {type(mlp.act).__name__}"
    if any((layer.bias is not None) != biased for layer in mlp.children() if isinstance(layer, nn.Linear)):
        yield "biases in some of the linear layers of attention and MLP"


def unsupported_norms(norms: Iterable[nn.Module | None], like: nn.Module) -> Iterator[str]:
    """Name those of a model's norms that are of another kind than ``like``, or of an unknown one."""
    for norm in norms:
        if is_identity(norm):
            continue
        kind = _NORMS.get(type(norm))
        complete = norm.weight is not None and (kind != "layernorm" or norm.bias is not None)
        if kind is None or not complete:
            yield f"the norm {norm}"
        elif kind != _NORMS.get(type(like)) or norm.eps != like.eps:
            yield f"the norm {norm} next to {like}"


def norms_of_block(block: nn.Module) -> Iterator[nn.Module | None]:
    """Iterate over all norms of a block, None for those that it lacks."""
    yield from (block.norm1, block.norm2, block.attn.q_norm, block.attn.k_norm)
    yield from (getattr(block.attn, "norm", None), block.mlp.norm)


def is_identity(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _has_biases(attn: nn.Module) -> tuple[bool, bool]:
    """Check whether queries have a bias, and whether keys have. EVA keeps that of queries outside its fused
    projection."""
    if attn.qkv is None:
        return attn.q_proj.bias is not None, attn.k_proj.bias is not None
    fused = attn.qkv.bias is not None
    return fused or getattr(attn, "q_bias", None) is not None, fused


def _branch_scales(block: nn.Module) -> list[bool]:
    """Check whether LayerScale acts on attention, and whether on the MLP, by ViT's names or EVA's."""
    if isinstance(block, eva.EvaBlock):
        return [gamma is not None for gamma in (block.gamma_1, block.gamma_2)]
    return [isinstance(scale, LayerScale) for scale in (block.ls1, block.ls2)]


def _init_values(block: nn.Module) -> float | None:
    if not _branch_scales(block)[0]:
        return None
    return block.init_values if isinstance(block, eva.EvaBlock) else block.ls1.init_values


def _activation(module: nn.Module) -> str | None:
    """Return the name of an activation in :mod:`apt_dense.nn.layers`, None if it has none."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return next((name for name, kind in ACTIVATIONS.items() if type(module) is kind), None)
