"""What each parameter of a backbone is: its layer, whether it decays, whether only APT has it.

Names are those of an ``APTViT``'s state dict, without the prefix of the model around it. Every host and trainer asks
here, so that layer-wise learning rate decay and weight decay mean the same everywhere.
"""

import re

from torch import Tensor

#: Where the parameters begin that only APT has. They start neutral, and no checkpoint of a plain ViT brings them.
COARSE = "coarse_embed."
#: Learned vectors for which zero is not a neutral value.
UNDECAYED = "pos_embed", "cls_token", "reg_token"
_EMBEDDING = re.compile(r"(pos_embed|cls_token|reg_token)$|(patch_embed|norm_pre)\.")
_BLOCK = re.compile(r"blocks\.(\d+)\.(?!residual\.)")


def is_new(name: str) -> bool:
    """Check whether only APT has a parameter."""
    return name.startswith(COARSE)


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter, for layer-wise decay of the learning rate.

    0 for the embedding (patches, positions, class and register tokens, the norm before the blocks), i + 1 for block i,
    and ``depth`` + 1 for what starts from scratch or follows the blocks: the final norm, convolutional residuals and
    what only APT has. So says Detectron2 (``get_vit_lr_decay_rate``) of the names it knows.

    Raises:
        ValueError: for a block beyond ``depth``, whose rate would be greater than the full one.
    """
    if _EMBEDDING.match(name):
        return 0
    block = _BLOCK.match(name)
    if block is None:
        return depth + 1
    if int(block[1]) >= depth:
        raise ValueError(f"{name} is beyond the {depth} layers; set num_layers to the depth of the backbone")
    return int(block[1]) + 1


def lr_scale(name: str, depth: int, decay_rate: float) -> float:
    """The share of the learning rate of a parameter: decay_rate ** (depth + 1 - layer)."""
    return decay_rate ** (depth + 1 - layer_of(name, depth))


def decays(name: str, parameter: Tensor) -> bool:
    """Check whether weight decay acts on a parameter: on matrices and kernels, not on vectors (biases, norms,
    LayerScale) nor on positions, class and register tokens. Tables of relative positions decay, as in ViTDet."""
    return parameter.ndim > 1 and not name.endswith(UNDECAYED)
