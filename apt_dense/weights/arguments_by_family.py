"""Published families of ViTs: what each has in common that names and shapes of weights do not say.

A family is told by the arguments that names and shapes do say. Only where all of its published models agree on an
activation, an epsilon or on rotary positions are these taken from here; what they differ in is asked for. The number of
heads is never taken from a family.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from apt_dense.options import Rotary


class Family(NamedTuple):
    """Models with the same features.

    Args:
        title: names of the models.
        has: features, each with its value or a tuple of values.
        norm_eps: epsilon of all norms; not used where it is asked for.
        asks: arguments in which the models differ, with an example of what to give.
        rotary: their rotary positions; not used where they are asked for.
        usual_widths, usual_head: widths that come with heads of so many channels, for examples in messages.
    """

    title: str
    has: Mapping[str, Any]
    norm_eps: float | None
    asks: Mapping[str, str] = {}
    rotary: Rotary | None = None
    usual_widths: tuple[int, ...] = (192, 384, 512, 768, 1024)
    usual_head: int = 64

    def includes(self, features: Mapping[str, Any]) -> bool:
        """Check whether a model with these features may be one of the family."""
        return all(
            features[name] in value if isinstance(value, tuple) else features[name] == value
            for name, value in self.has.items()
        )


_ACTIVATION = 'act_layer="gelu"'
_EPSILON = "norm_eps=1e-6"
_NO_ROTARY = "rotary=None"

#: Attention with one projection and all biases, positions that are added, LayerNorms at the usual places.
_USUAL = {
    "qkv_fused": True, "qkv_bias": True, "k_bias": True, "use_abs_pos": True, "use_rel_pos": False, "qk_norm": False,
    "embed_norm": False, "scale_attn_norm": False, "scale_mlp_norm": False, "norm_layer": "layernorm",
}  # fmt: skip
_PLAIN = {**_USUAL, "mlp_layer": "mlp", "pre_norm": False}
_WITH_SCALES = {**_USUAL, "pre_norm": False, "class_token": True, "layer_scale": True}
_DINOV2 = {**_WITH_SCALES, "mlp_layer": ("mlp", "swiglu_packed")}

#: The first one that includes a model is taken.
FAMILIES = (
    Family(
        "MMSegmentation's VisionTransformer",
        {"format": "mmseg"},
        None,
        {"act_layer": _ACTIVATION, "norm_eps": _EPSILON},
    ),
    Family("SAM", {"format": "sam"}, 1e-6),
    Family("ViTDet", {"use_rel_pos": True, "class_position": True}, 1e-6),
    Family("SAM", {"use_rel_pos": True}, None, {"norm_eps": f"{_EPSILON} (1e-5 in timm's SAM)"}),
    Family("EVA-02", {"qkv_fused": False, "mlp_layer": "swiglu"}, 1e-6, rotary=Rotary(ref_feat_shape=(16, 16))),
    Family(
        "EVA-02 tiny or small",
        {**_USUAL, "k_bias": False, "mlp_layer": "swiglu_packed", "pre_norm": False, "layer_scale": False},
        1e-6,
        rotary=Rotary(ref_feat_shape=(16, 16)),
    ),
    Family(
        "DINOv3",
        {"qkv_fused": True, "use_abs_pos": False, "class_token": True, "registers": True, "layer_scale": True,
         "qk_norm": False, "pre_norm": False, "mlp_layer": ("mlp", "swiglu")},
        1e-5,
        rotary=Rotary("dinov3", 100.0, rotate_half=True),
    ),
    Family(
        "AIMv2",
        {"embed_norm": True, "norm_layer": "rmsnorm", "mlp_layer": "swiglu", "use_abs_pos": True},
        1e-5,
        usual_widths=(1024, 1536, 2048, 3072),
        usual_head=128,
    ),
    Family("BEiT-3", {**_PLAIN, "scale_attn_norm": True, "scale_mlp_norm": True, "layer_scale": False}, 1e-5),
    Family(
        "CLIP or PE",
        {**_USUAL, "mlp_layer": "mlp", "pre_norm": True},
        1e-5,
        {
            "act_layer": f'{_ACTIVATION} ("quick_gelu" for OpenAI\'s CLIP)',
            "rotary": f"{_NO_ROTARY} for CLIP (PE has rotary positions)",
        },
    ),
    Family("DINOv2 with registers", {**_DINOV2, "registers": True}, 1e-6),
    Family("DINOv2", {**_DINOV2, "registers": False, "no_embed_class": False}, 1e-6),
    Family(
        "DeiT-3",
        {**_WITH_SCALES, "mlp_layer": "mlp", "registers": False, "no_embed_class": True},
        1e-6,
        {"rotary": f"{_NO_ROTARY} for DeiT-3 (others with these names have rotary positions)"},
    ),
    Family("ViT, DeiT, MAE or DINO", {**_PLAIN, "class_token": True, "layer_scale": False}, 1e-6),
    Family("ViTDet", {**_PLAIN, "class_position": True, "layer_scale": False}, 1e-6),
    Family(
        "SigLIP",
        {**_PLAIN, "class_token": False, "registers": False, "layer_scale": False},
        1e-6,
        {"act_layer": f'{_ACTIVATION} ("gelu_tanh" for some of SigLIP)'},
    ),
    Family("EVA", {**_PLAIN, "k_bias": False, "class_token": True, "registers": False, "layer_scale": False}, 1e-6),
    Family(
        "a model of no family that is known",
        {},
        None,
        {
            "act_layer": _ACTIVATION,
            "norm_eps": _EPSILON,
            "rotary": f"{_NO_ROTARY} if it has none, else an apt_dense.Rotary",
        },
    ),
)  # fmt: skip


def family_of(features: Mapping[str, Any]) -> Family:
    """The first family that may have made a model with these features."""
    return next(family for family in FAMILIES if family.includes(features))
