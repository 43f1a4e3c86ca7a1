"""The rules for the parameters of a model with an ``APTViT``: layer, weight decay, and which ones only APT has.

Every host and trainer asks here, so that layer-wise decay of the learning rate and weight decay mean the same
everywhere. Names are those of the backbone's own state dict; :func:`inner_name` gets them from a whole model's names.
"""

import re
from typing import Any

from torch import Tensor, nn

#: Prefix of the parameters that only APT has. They start neutral, and no checkpoint of a plain ViT holds them.
COARSE = "coarse_embed."
#: Learned vectors for which zero is not a neutral value.
UNDECAYED = "pos_embed", "cls_token", "reg_token"

_EMBEDDING = rf"(?:{'|'.join(UNDECAYED)})$|(?:patch_embed|norm_pre)\."
_BLOCK = re.compile(r"blocks\.(\d+)\.(?!residual\.)")
_NEW = re.compile(rf"(?:^|\.){re.escape(COARSE)}")
# Segmentors keep their backbone in "backbone.", detectors one module deeper, such as in "backbone.net.".
_INSIDE = re.compile(rf"backbone\.(?:.*?\.)?((?:{_EMBEDDING}|blocks\.|{re.escape(COARSE)}).*)")


def inner_name(name: str) -> str:
    """Strip what a segmentor or detector puts around the backbone: "backbone.net.blocks.0.norm1.bias" becomes
    "blocks.0.norm1.bias". Parameters outside the backbone or after its blocks become "", for which all rules are the
    same."""
    inside = _INSIDE.match(name)
    return inside[1] if inside else ""


def is_new(name: str) -> bool:
    """Check whether only APT has a parameter, named as in the backbone or as in a model around it."""
    return _NEW.search(name) is not None


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter of the backbone, for layer-wise decay of the learning rate.

    0 for the embedding (patches, positions, class and register tokens, the norm before the blocks), i + 1 for block i,
    and ``depth`` + 1 for parameters that follow the blocks or start from scratch: the final norm, convolutional
    residuals and everything that only APT has. This is Detectron2's rule (``get_vit_lr_decay_rate``), which leaves
    tokens and ``norm_pre`` open because ViTDet has none.

    Raises:
        ValueError: if the block is not one of ``depth`` blocks; its rate would exceed the full one.
    """
    if re.match(_EMBEDDING, name):
        return 0
    block = _BLOCK.match(name)
    if block is None:
        return depth + 1
    if int(block[1]) >= depth:
        raise ValueError(f"{name} is beyond num_layers={depth}; set num_layers to the depth of the backbone")
    return int(block[1]) + 1


def lr_scale(name: str, depth: int, decay_rate: float) -> float:
    """The share of the learning rate for a parameter of the backbone: decay_rate ** (depth + 1 - layer)."""
    return decay_rate ** (depth + 1 - layer_of(name, depth))


def decays(name: str, parameter: Tensor) -> bool:
    """Check whether weight decay applies to a parameter, named as in the backbone or as in a model around it.

    It applies to matrices, kernels and tables of relative positions. It does not apply to vectors (biases, norms,
    LayerScale), absolute positions, class and register tokens.
    """
    return parameter.ndim > 1 and name.rpartition(".")[2] not in UNDECAYED


def parameter_groups(
    model: nn.Module, depth: int, lr: float, weight_decay: float, decay_rate: float = 1.0, backbone_mult: float = 1.0
) -> list[dict[str, Any]]:
    """Group the trainable parameters of a model for a torch optimizer, by layer and weight decay.

    Args:
        model: a segmentor or detector with the ViT in ``backbone``.
        depth: blocks of the ViT.
        lr, weight_decay: of parameters that are not scaled down or exempt.
        decay_rate: factor of the learning rate from each layer to the one before it.
        backbone_mult: another factor for all that is in ``backbone``.

    Returns:
        Groups in order of their layers, with the keys "params", "param_names", "lr", "lr_scale" and "weight_decay".

    Raises:
        ValueError: if the ViT has more than ``depth`` blocks.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decayed = lr_scale(inner_name(name), depth, decay_rate), decays(name, parameter)
        if name.startswith("backbone."):
            scale *= backbone_mult
        rates = {"lr": scale * lr, "lr_scale": scale, "weight_decay": weight_decay if decayed else 0.0}
        group = groups.setdefault((scale, decayed), {"params": [], "param_names": [], **rates})
        group["params"].append(parameter)
        group["param_names"].append(name)
    return [groups[key] for key in sorted(groups)]
