"""Names of weights in other ViTs' checkpoints, and which of them a dense backbone leaves out. Pure functions."""

import math
import re

import torch
from torch import Tensor

StateDict = dict[str, Tensor]

#: Parts of other models that a dense backbone has no use for.
NOT_BACKBONE = re.compile(
    r"(head|head_dist|head_drop|fc_norm|attn_pool|pre_logits|neck|decoder_\w+|decode_head|lm_head|local_cls_norm)\."
    r"|mask_token|decoder_"
)
#: Tables that follow from the arguments: of rotary positions (not timm's ``rope.freqs``, which are learned) and of
#: DINOv3's missing key bias.
_TABLES = re.compile(r"(blocks\.\d+\.attn\.)?rope(_\w+)?\.(?!freqs$)\w+$|blocks\.\d+\.attn\.qkv\.bias_mask$")
#: Parameters that start at a neutral value and that checkpoints may lack: those that only APT has, and relative
#: positions, which a classification ViT does not bring to a detector.
NEW = re.compile(r"coarse_embed\.|blocks\.\d+\.attn\.rel_pos_[hw]$")

_OTHER_NAMES = (
    # MMSeg's VisionTransformer (mmseg/models/backbones/vit.py)
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.ln1\.", r"blocks.\1.norm1."),
    (r"^layers\.(\d+)\.ln2\.", r"blocks.\1.norm2."),
    (r"^layers\.(\d+)\.attn\.attn\.in_proj_(weight|bias)$", r"blocks.\1.attn.qkv.\2"),
    (r"^layers\.(\d+)\.attn\.attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"^layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
    (r"^layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
    (r"^ln1\.", "norm."),
    # SAM's MLP
    (r"^blocks\.(\d+)\.mlp\.lin([12])\.", r"blocks.\1.mlp.fc\2."),
    # timm's Eva and EVA's own files
    (r"^blocks\.(\d+)\.gamma_([12])$", r"blocks.\1.ls\2.gamma"),
    (r"^blocks\.(\d+)\.attn\.inner_attn_ln\.", r"blocks.\1.attn.norm."),
    (r"^blocks\.(\d+)\.mlp\.ffn_ln\.", r"blocks.\1.mlp.norm."),
    (r"^blocks\.(\d+)\.mlp\.w1\.", r"blocks.\1.mlp.fc1_g."),
    (r"^blocks\.(\d+)\.mlp\.w2\.", r"blocks.\1.mlp.fc1_x."),
    # DINOv2's and DINOv3's own files
    (r"^blocks\.(\d+)\.mlp\.w12\.", r"blocks.\1.mlp.fc1."),
    (r"^blocks\.(\d+)\.mlp\.w3\.", r"blocks.\1.mlp.fc2."),
    (r"^(register|storage)_tokens$", "reg_token"),
)


def rename(name: str, targets: StateDict) -> str:
    """Our name of another ViT's weight, for a model with the names in ``targets``; unknown names stay as they are."""
    for pattern, ours in _OTHER_NAMES:
        name = re.sub(pattern, ours, name)
    projection = re.sub(r"\.([qv])_bias$", r".\1_proj.bias", name)
    return projection if name not in targets and projection in targets else name


def is_table(name: str, value: Tensor) -> bool:
    """Whether a weight follows from the arguments of a model: rotary tables, and biases of keys that are all zero."""
    return bool(_TABLES.match(name)) or (name.endswith(".attn.k_bias") and not value.any())


def without_key_biases(state: StateDict, targets: StateDict) -> StateDict:
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
