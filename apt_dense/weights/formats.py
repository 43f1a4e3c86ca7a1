"""Names of weights in other ViTs' checkpoints, and which of them a dense backbone leaves out. Pure functions."""

import functools
import math
import re
from collections.abc import Container
from typing import NamedTuple

import torch
from torch import Tensor

StateDict = dict[str, Tensor]
Table = tuple[tuple[str, str], ...]

#: Parts of other models that a dense backbone has no use for.
NOT_BACKBONE = re.compile(
    r"(head|head_dist|head_drop|fc_norm|attn_pool|pre_logits|neck|decoder_\w+|decode_head|lm_head|local_cls_norm)\."
    r"|mask_token|decoder_|mixed_patch\.base_mini_pos_embed"
)
#: Tables that follow from the arguments: of rotary positions (not timm's ``rope.freqs``, which are learned) and of
#: DINOv3's missing key bias.
_TABLES = re.compile(r"(blocks\.\d+\.attn\.)?rope(_\w+)?\.(?!freqs$)\w+$|blocks\.\d+\.attn\.qkv\.bias_mask$")
_ATTENTION_BIAS = re.compile(r"blocks\.\d+\.attn\.(qkv\.bias|[qkv]_bias)$")
#: Parameters that start at a neutral value and that checkpoints may lack: those that only APT has, and relative
#: positions, which a classification ViT does not bring to a detector.
NEW = re.compile(r"coarse_embed\.|blocks\.\d+\.attn\.rel_pos_[hw]$")

# How names begin: (ours, theirs). "#" is the number of a block.
_MMSEG: Table = (
    ("patch_embed.proj.", "patch_embed.projection."),
    ("blocks.#.norm1.", "layers.#.ln1."),
    ("blocks.#.norm2.", "layers.#.ln2."),
    ("blocks.#.attn.qkv.", "layers.#.attn.attn.in_proj_"),
    ("blocks.#.attn.proj.", "layers.#.attn.attn.out_proj."),
    ("blocks.#.mlp.fc1.", "layers.#.ffn.layers.0.0."),
    ("blocks.#.mlp.fc2.", "layers.#.ffn.layers.1."),
    ("norm_pre.", "ln_pre."),
    ("norm.", "ln1."),
)
_SAM: Table = (("blocks.#.mlp.fc1.", "blocks.#.mlp.lin1."), ("blocks.#.mlp.fc2.", "blocks.#.mlp.lin2."))
_TIMM_EVA: Table = (("blocks.#.ls1.gamma", "blocks.#.gamma_1"), ("blocks.#.ls2.gamma", "blocks.#.gamma_2"))
#: Beside separate projections; beside a fused one, EVA's ``q_bias`` and ``v_bias`` are ours, too.
_EVA_BIASES: Table = (
    ("blocks.#.attn.q_proj.bias", "blocks.#.attn.q_bias"),
    ("blocks.#.attn.v_proj.bias", "blocks.#.attn.v_bias"),
)
_EVA02: Table = (
    *_EVA_BIASES,
    ("blocks.#.attn.norm.", "blocks.#.attn.inner_attn_ln."),
    ("blocks.#.mlp.norm.", "blocks.#.mlp.ffn_ln."),
    ("blocks.#.mlp.fc1_g.", "blocks.#.mlp.w1."),
    ("blocks.#.mlp.fc1_x.", "blocks.#.mlp.w2."),
    ("blocks.#.mlp.fc2.", "blocks.#.mlp.w3."),
)
_DINOV2: Table = (
    ("reg_token", "register_tokens"),
    ("blocks.#.mlp.fc1.", "blocks.#.mlp.w12."),
    ("blocks.#.mlp.fc2.", "blocks.#.mlp.w3."),
)
_DINOV3: Table = (
    ("reg_token", "storage_tokens"),
    ("blocks.#.mlp.fc1_g.", "blocks.#.mlp.w1."),
    ("blocks.#.mlp.fc1_x.", "blocks.#.mlp.w2."),
    ("blocks.#.mlp.fc2.", "blocks.#.mlp.w3."),
)
# The first two names of a pair stand for one tensor in the release, which trains it under both.
_APT_RELEASE: Table = (
    ("patch_embed.", "mixed_patch.patch_embed."),
    ("pos_embed", "mixed_patch.base_pos_embed"),
    ("cls_token", "mixed_patch.cls_token"),
    ("coarse_embed.down.", "mixed_patch.patch_attn."),
    ("coarse_embed.zero.", "mixed_patch.zero_conv."),
    *_TIMM_EVA,
)


class Format(NamedTuple):
    """How a project names the weights of its ViT."""

    title: str
    table: Table
    sign: str = r"(?!)"  # pattern of names that only this format has


#: By name, the more telling signs first.
FORMATS = {
    "apt_release": Format("the APT release", _APT_RELEASE, r"mixed_patch\."),
    "apt": Format("apt_dense", (), r"coarse_embed\."),
    "mmseg": Format("MMSegmentation's VisionTransformer", _MMSEG, r"layers\.\d+\.attn\.attn\."),
    "sam": Format("SAM's image encoder", _SAM, r"blocks\.\d+\.mlp\.lin1\."),
    "mae": Format("MAE", (), r"decoder_"),
    "dinov3": Format("DINOv3", _DINOV3, r"storage_tokens$|.*\.qkv\.bias_mask$"),
    "dinov2": Format("DINOv2", _DINOV2, r"register_tokens$|.*\.mlp\.w12\."),
    "eva02_det": Format("EVA-02's detectors", _EVA02, r"rope_(win|glb)\."),
    "eva02": Format("EVA-02", _EVA02, r".*\.mlp\.w1\."),
    "timm_eva": Format("timm's Eva", _TIMM_EVA, r"blocks\.\d+\.gamma_1$|.*\.attn\.q_proj\."),
    "detectron2": Format("Detectron2's ViT", (), r"blocks\.\d+\.(attn\.rel_pos_h|residual\.)"),
    "timm": Format("timm's VisionTransformer", ()),
}


def detect_format(state: StateDict) -> str:
    """The name in :data:`FORMATS` of the project that a backbone's state dict comes from, by its names alone."""
    for name, format_ in FORMATS.items():
        if any(re.match(format_.sign, weight) for weight in state):
            return name
    return "timm"


@functools.cache
def _pattern(beginning: str) -> re.Pattern:
    return re.compile(re.escape(beginning).replace(r"\#", r"(\d+)"))


def translate(name: str, table: Table) -> str:
    """Our name -> that of a table; names that it does not mention stay as they are."""
    for ours, theirs in table:
        if _pattern(ours).match(name):
            return _pattern(ours).sub(theirs.replace("#", r"\1"), name, count=1)
    return name


def translate_back(name: str, table: Table) -> str:
    """The other way round."""
    return translate(name, _swapped(table))


@functools.cache
def _swapped(table: Table) -> Table:
    return tuple((theirs, ours) for ours, theirs in table)


_EVERYTHING = tuple(dict.fromkeys(pair for format_ in FORMATS.values() for pair in format_.table))
_WITHOUT_EVA_BIASES = tuple(pair for pair in _EVERYTHING if pair not in _EVA_BIASES)


def rename(name: str, others: Container[str]) -> str:
    """Our name of a weight of any format.

    Args:
        others: names beside it, which tell whether a ``q_bias`` belongs to a ``q_proj``.
    """
    separate = re.sub(r"\.[qv]_bias$", ".q_proj.weight", name) in others
    return translate_back(name, _EVERYTHING if separate else _WITHOUT_EVA_BIASES)


def is_table(name: str, value: Tensor) -> bool:
    """Whether a weight follows from the arguments of a model: rotary tables, and biases of attention that are all zero
    (DINOv3's, in most of its files)."""
    return bool(_TABLES.match(name)) or (bool(_ATTENTION_BIAS.match(name)) and not value.any())


def without_key_biases(state: StateDict, targets: Container[str]) -> StateDict:
    """DINOv3's ``attn.qkv.bias`` as ``q_bias`` and ``v_bias``, for models whose keys have none.

    Only where that of the keys is masked out by ``qkv.bias_mask``, or zero.
    """
    split = {}
    for name, value in state.items():
        attn = name.removesuffix("qkv.bias")
        if not name.endswith("attn.qkv.bias") or name in targets or attn + "q_bias" not in targets:
            split[name] = value
            continue
        q_bias, k_bias, v_bias = value.chunk(3)
        if attn + "qkv.bias_mask" in state or not k_bias.any():
            split |= {attn + "q_bias": q_bias, attn + "v_bias": v_bias}
        else:
            split[name] = value
    return split


def fold_class_position(state: StateDict, shape: torch.Size) -> StateDict:
    """The class token with its position added, for models that have no place for it (``no_embed_class``).

    Position embeddings that have the model's ``shape`` or are those of a square grid stay as they are.
    """
    positions, token = state.get("pos_embed"), state.get("cls_token")
    if positions is None or token is None or positions.ndim != 3 or positions.shape == shape:
        return state
    length = positions.shape[1]
    if math.isqrt(length) ** 2 == length or math.isqrt(length - 1) ** 2 != length - 1:
        return state
    with torch.no_grad():
        return {**state, "cls_token": token + positions[:, :1], "pos_embed": positions[:, 1:]}
