"""One table per project with a ViT: the names of its weights, how it is recognised, and what it has a place for.

Patterns and renaming only; what changes values is in convert.py and resize.py.
"""

import functools
import re
from collections.abc import Container
from typing import NamedTuple

from torch import Tensor

from apt_dense.option_checks import parameters_of
from apt_dense.options import BlockOptions, ModelOptions
from apt_dense.weights.parameter_rules import COARSE, is_new

StateDict = dict[str, Tensor]
Table = tuple[tuple[str, str], ...]

_NOTHING = r"(?!)"
_LAYER = r"\.(weight|bias)$"
_BLOCK = r"blocks\.\d+\."
#: Parameters that every backbone has, except that positions may be missing.
_CORE = rf"patch_embed\.proj{_LAYER}|pos_embed$|{_BLOCK}(norm[12]|attn\.proj|mlp\.fc2){_LAYER}"

#: Parameters of optional features: those that options say they bring, and those whose names depend on several options.
#: A new feature is one that timm's models have, unless it is left out of _TIMM below.
FEATURES = parameters_of(ModelOptions, BlockOptions) | {
    "thresholds": rf"{re.escape(COARSE)}(down|zero){_LAYER}",
    "fused qkv": rf"{_BLOCK}attn\.qkv{_LAYER}",
    "fused q_bias": rf"{_BLOCK}attn\.[qv]_bias$",
    "separate qkv": rf"{_BLOCK}attn\.([qv]_proj{_LAYER}|k_proj\.weight$)",
    "separate k_bias": rf"{_BLOCK}attn\.k_proj\.bias$",
    "plain mlp": rf"{_BLOCK}mlp\.fc1{_LAYER}",
    "swiglu": rf"{_BLOCK}mlp\.fc1_[gx]{_LAYER}",
}
_PLAIN = "fused qkv", "plain mlp"
_OF_DETECTORS = "thresholds", "use_rel_pos", "residual_block_indexes"
_TIMM = tuple(feature for feature in FEATURES if feature not in _OF_DETECTORS)


class Place(NamedTuple):
    """Weights that a project's ViT has a place for, by our names."""

    names: re.Pattern
    class_position: bool = False  # pos_embed has a row for a class token, even where there is no class token
    class_token: bool = False  # there always is a class token
    position_grid: bool = False  # pos_embed is (1, rows, columns, C)
    leaves_out: str = _NOTHING  # weights that its users do without


def _place(*features: str, **options: bool | str) -> Place:
    return Place(re.compile("|".join([_CORE, *(FEATURES[feature] for feature in features)])), **options)


#: Detectors and SAM have neither a class token nor a final norm.
_NO_CLASS = f"{FEATURES['class_token']}|{FEATURES['final_norm']}"


class Format(NamedTuple):
    """How a project names the weights of its ViT, and which of them it has."""

    title: str
    table: Table = ()  # how names begin: (ours, theirs); "#" is the number of a block
    sign: str = _NOTHING  # pattern of names that only this format has
    place: Place | None = None  # None if only read


_LAYER_SCALE: Table = (("blocks.#.ls1.gamma", "blocks.#.gamma_1"), ("blocks.#.ls2.gamma", "blocks.#.gamma_2"))
# Next to separate projections only; next to a fused one, EVA's q_bias and v_bias have our names already.
_EVA_BIASES: Table = (
    ("blocks.#.attn.q_proj.bias", "blocks.#.attn.q_bias"),
    ("blocks.#.attn.v_proj.bias", "blocks.#.attn.v_bias"),
)
_SWIGLU: Table = (
    ("blocks.#.mlp.fc1_g.", "blocks.#.mlp.w1."),
    ("blocks.#.mlp.fc1_x.", "blocks.#.mlp.w2."),
    ("blocks.#.mlp.fc2.", "blocks.#.mlp.w3."),
)
_EVA02: Table = (
    *_EVA_BIASES,
    ("blocks.#.attn.norm.", "blocks.#.attn.inner_attn_ln."),
    ("blocks.#.mlp.norm.", "blocks.#.mlp.ffn_ln."),
    *_SWIGLU,
)
#: ViT, DeiT, MAE and DINOv2, then CLIP and SigLIP. Queries, keys and values are joined in convert.py.
_TRANSFORMERS: Table = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("pos_embed", "embeddings.position_embeddings"),
    ("cls_token", "embeddings.cls_token"),
    ("reg_token", "embeddings.register_tokens"),
    ("mask_token", "embeddings.mask_token"),
    ("dist_token", "embeddings.distillation_token"),
    ("blocks.#.norm1.", "encoder.layer.#.layernorm_before."),
    ("blocks.#.norm2.", "encoder.layer.#.layernorm_after."),
    ("blocks.#.attn.query.", "encoder.layer.#.attention.attention.query."),
    ("blocks.#.attn.key.", "encoder.layer.#.attention.attention.key."),
    ("blocks.#.attn.value.", "encoder.layer.#.attention.attention.value."),
    ("blocks.#.attn.proj.", "encoder.layer.#.attention.output.dense."),
    ("blocks.#.mlp.fc1.", "encoder.layer.#.intermediate.dense."),
    ("blocks.#.mlp.fc2.", "encoder.layer.#.output.dense."),
    ("blocks.#.norm1.", "encoder.layer.#.norm1."),
    ("blocks.#.norm2.", "encoder.layer.#.norm2."),
    ("blocks.#.ls1.gamma", "encoder.layer.#.layer_scale1.lambda1"),
    ("blocks.#.ls2.gamma", "encoder.layer.#.layer_scale2.lambda1"),
    ("blocks.#.mlp.fc1.", "encoder.layer.#.mlp.weights_in."),
    ("blocks.#.mlp.fc2.", "encoder.layer.#.mlp.weights_out."),
    ("blocks.#.mlp.", "encoder.layer.#.mlp."),
    ("norm.", "layernorm."),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("pos_embed", "embeddings.position_embedding.weight"),
    ("cls_token", "embeddings.class_embedding"),
    ("blocks.#.norm1.", "encoder.layers.#.layer_norm1."),
    ("blocks.#.norm2.", "encoder.layers.#.layer_norm2."),
    ("blocks.#.attn.query.", "encoder.layers.#.self_attn.q_proj."),
    ("blocks.#.attn.key.", "encoder.layers.#.self_attn.k_proj."),
    ("blocks.#.attn.value.", "encoder.layers.#.self_attn.v_proj."),
    ("blocks.#.attn.proj.", "encoder.layers.#.self_attn.out_proj."),
    ("blocks.#.mlp.", "encoder.layers.#.mlp."),
    ("norm_pre.", "pre_layrnorm."),
    ("norm.", "post_layernorm."),
)
_CLIP_PATCHES: Table = (("patch_embed.proj.", "conv1."),)  # a name that convolutional networks have, too
_OPENAI_CLIP: Table = (
    *_CLIP_PATCHES,
    ("pos_embed", "positional_embedding"),
    ("cls_token", "class_embedding"),
    ("blocks.#.norm1.", "transformer.resblocks.#.ln_1."),
    ("blocks.#.norm2.", "transformer.resblocks.#.ln_2."),
    ("blocks.#.attn.qkv.", "transformer.resblocks.#.attn.in_proj_"),
    ("blocks.#.attn.proj.", "transformer.resblocks.#.attn.out_proj."),
    ("blocks.#.mlp.fc1.", "transformer.resblocks.#.mlp.c_fc."),
    ("blocks.#.mlp.fc2.", "transformer.resblocks.#.mlp.c_proj."),
    ("norm_pre.", "ln_pre."),
    ("norm.", "ln_post."),
)

#: By name. detect_format() takes the first whose sign matches, so the more telling signs come first.
FORMATS = {
    "apt_release": Format(
        "the APT release",
        (
            # The first two names of a pair stand for one tensor in the release, which stores it under both.
            ("patch_embed.", "mixed_patch.patch_embed."),
            ("pos_embed", "mixed_patch.base_pos_embed"),
            ("cls_token", "mixed_patch.cls_token"),
            (f"{COARSE}down.", "mixed_patch.patch_attn."),
            (f"{COARSE}zero.", "mixed_patch.zero_conv."),
            *_LAYER_SCALE,
        ),
        r"mixed_patch\.",
    ),
    "apt": Format("apt_dense", sign=re.escape(COARSE), place=_place(*FEATURES)),
    "mmseg": Format(
        "MMSegmentation's VisionTransformer",
        (
            ("patch_embed.proj.", "patch_embed.projection."),
            ("blocks.#.norm1.", "layers.#.ln1."),
            ("blocks.#.norm2.", "layers.#.ln2."),
            ("blocks.#.attn.qkv.", "layers.#.attn.attn.in_proj_"),
            ("blocks.#.attn.proj.", "layers.#.attn.attn.out_proj."),
            ("blocks.#.mlp.fc1.", "layers.#.ffn.layers.0.0."),
            ("blocks.#.mlp.fc2.", "layers.#.ffn.layers.1."),
            ("norm_pre.", "ln_pre."),
            ("norm.", "ln1."),
        ),
        r"layers\.\d+\.attn\.attn\.",
        _place(*_PLAIN, "class_token", "pre_norm", "final_norm", class_position=True, class_token=True),
    ),
    "sam": Format(
        "SAM's image encoder",
        (("blocks.#.mlp.fc1.", "blocks.#.mlp.lin1."), ("blocks.#.mlp.fc2.", "blocks.#.mlp.lin2.")),
        r"blocks\.\d+\.mlp\.lin1\.",
        _place(*_PLAIN, "use_rel_pos", position_grid=True, leaves_out=_NO_CLASS),
    ),
    "transformers": Format("transformers", _TRANSFORMERS, r"(embeddings|encoder\.layers?\.\d+)\."),
    "openai_clip": Format("OpenAI's CLIP", _OPENAI_CLIP, r"transformer\.resblocks\.\d+\."),
    "mae": Format("MAE", sign=r"decoder_"),
    "dinov3": Format("DINOv3", (("reg_token", "storage_tokens"), *_SWIGLU), r"storage_tokens$|.*\.qkv\.bias_mask$"),
    "dinov2": Format(
        "DINOv2",
        (
            ("reg_token", "register_tokens"),
            ("blocks.#.mlp.fc1.", "blocks.#.mlp.w12."),
            ("blocks.#.mlp.fc2.", "blocks.#.mlp.w3."),
        ),
        r"register_tokens$|.*\.mlp\.w12\.",
    ),
    "eva02_det": Format(
        "EVA-02's detectors",
        _EVA02,
        r"rope_(win|glb)\.",
        _place(
            "separate qkv",
            "swiglu",
            "scale_mlp_norm",
            "residual_block_indexes",
            class_position=True,
            leaves_out=_NO_CLASS,
        ),
    ),
    "eva02": Format("EVA-02", _EVA02, r".*\.mlp\.w1\."),
    "timm_eva": Format("timm's Eva", _LAYER_SCALE, r"blocks\.\d+\.gamma_1$|.*\.attn\.q_proj\.", _place(*_TIMM)),
    "detectron2": Format(
        "Detectron2's ViT",
        sign=r"blocks\.\d+\.(attn\.rel_pos_h|residual\.)",
        place=_place(*_PLAIN, "use_rel_pos", "residual_block_indexes", class_position=True, leaves_out=_NO_CLASS),
    ),
    "timm": Format("timm's VisionTransformer", place=_place(*_TIMM)),
}
#: Names of the formats that can be written.
WRITABLE = tuple(name for name, format_ in FORMATS.items() if format_.place is not None)
#: All names of our own parameters.
OURS = FORMATS["apt"].place.names
#: Parts of other models that a dense backbone has no use for.
NOT_BACKBONE = re.compile(
    r"(head|head_dist|head_drop|fc_norm|attn_pool|pre_logits|neck|decoder_\w+|decode_head|lm_head|local_cls_norm|pooler|classifier)\."
    r"|proj$|embeddings\.position_ids$|mask_token|decoder_|mixed_patch\.base_mini_pos_embed"
)
# Tables that follow from the arguments: those of rotary positions (not timm's rope.freqs, which are learned) and those
# of DINOv3's missing key bias.
_TABLES = re.compile(r"(blocks\.\d+\.attn\.)?rope(_\w+)?\.(?!freqs$)\w+$|blocks\.\d+\.attn\.qkv\.bias_mask$")
_ATTENTION_BIAS = re.compile(r"blocks\.\d+\.attn\.(qkv\.bias|[qkv]_bias)$")
_REL_POS = re.compile(FEATURES["use_rel_pos"])


def may_be_absent(name: str) -> bool:
    """Check whether checkpoints may lack a parameter, which starts at a neutral value: those that only APT has, and
    relative positions, which a classification ViT does not bring to a detector."""
    return is_new(name) or bool(_REL_POS.match(name))


def is_table(name: str, value: Tensor) -> bool:
    """Check whether a weight follows from a model's arguments: rotary tables, and attention biases that are all zero
    (as most files of DINOv3 have)."""
    return bool(_TABLES.match(name)) or (bool(_ATTENTION_BIAS.match(name)) and not value.any())


def detect_format(state: StateDict) -> str:
    """Find the name in :data:`FORMATS` of the project that a backbone's state dict comes from, by its names alone."""
    for name, format_ in FORMATS.items():
        if any(re.match(format_.sign, weight) for weight in state):
            return name
    return "timm"


@functools.cache
def _pattern(beginning: str) -> re.Pattern:
    return re.compile(re.escape(beginning).replace(r"\#", r"(\d+)"))


def translate(name: str, table: Table) -> str:
    """Translate our name to a table's; names that it does not mention stay as they are."""
    for ours, theirs in table:
        if _pattern(ours).match(name):
            return _pattern(ours).sub(theirs.replace("#", r"\1"), name, count=1)
    return name


def translate_back(name: str, table: Table) -> str:
    """Translate a table's name to ours; the inverse of :func:`translate`."""
    return translate(name, _swapped(table))


@functools.cache
def _swapped(table: Table) -> Table:
    return tuple((theirs, ours) for ours, theirs in table)


_EVERYTHING = tuple(dict.fromkeys(pair for format_ in FORMATS.values() for pair in format_.table))


def rename(name: str, others: Container[str]) -> str:
    """Translate a weight's name in any format to ours.

    Args:
        others: all names of the state dict, which tell whether a ``q_bias`` belongs to a ``q_proj``, and ``conv1`` to
            CLIP.
    """
    separate = re.sub(r"\.[qv]_bias$", ".q_proj.weight", name) in others
    return translate_back(name, _tables(separate, "class_embedding" in others))


@functools.cache
def _tables(eva_biases: bool, clip: bool) -> Table:
    left_out = (() if eva_biases else _EVA_BIASES) + (() if clip else _CLIP_PATCHES)
    return tuple(pair for pair in _EVERYTHING if pair not in left_out)
