"""Find the state dict of a backbone inside the content of a checkpoint file, which may be that of a whole model."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apt_dense.weights.formats import StateDict
from apt_dense.weights.tensor_checks import check_names, describe

#: Keys under which files keep a model's state dict.
_WRAPPERS = "state_dict", "model", "model_ema", "module"
#: Prefixes that DDP and torch.compile put before the names of a whole model.
_TRAINING_PREFIXES = "module.", "_orig_mod."
#: And those of transformers' models, of CLIP and of open_clip's around a timm model.
_OF_MODELS = "vit.", "deit.", "dinov2.", "dinov2_with_registers.", "vision_model.", "visual.", "trunk."
_PREFIXES = *_TRAINING_PREFIXES, "backbone.", "net.", "image_encoder.", "model.", *_OF_MODELS
#: Names that a backbone alone has, below any of these prefixes.
_BACKBONE = re.compile(
    rf"({'|'.join(map(re.escape, _PREFIXES))})*"
    r"(patch_embed\.|pos_embed$|cls_token$|blocks\.\d+\.|layers\.\d+\.(ln|attn\.|ffn\.)|mixed_patch\."
    r"|embeddings\.(cls_token$|class_embedding$|patch_embeddings?\.)|class_embedding$)"
)


def unwrap(checkpoint: Mapping, backbone: bool = True) -> StateDict:
    """Find the backbone's state dict inside a checkpoint file's content.

    Looks into "state_dict", "model", "model_ema" and "module". Then takes off ``_PREFIXES``, such as ``module.``,
    ``backbone.`` and ``net.``, in any order, each where all names that a backbone alone has lie below it, and drops
    what lies elsewhere.

    Args:
        backbone: False takes off only ``module.`` and ``_orig_mod.`` and keeps the other parts of the model.

    Raises:
        ValueError: if there is no dictionary of tensors inside.
    """
    state = innermost(checkpoint)
    state = _weights(state) if isinstance(state, Mapping) else {}
    if not state:
        found = list(checkpoint)[:8] if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise ValueError(f"no state dict found in the checkpoint (it holds {found}); expected a dictionary of tensors")
    find = _backbone_prefix if backbone else _training_prefix
    while (prefix := find(state)) is not None:
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return state


def _weights(state: Mapping) -> StateDict:
    """Take the tensors out of a state dict, and arrays of real numbers as tensors.

    Raises:
        ValueError: for a key that is not text, or a weight of a backbone that is something else.
    """
    state = {name: _as_tensor(value) for name, value in state.items()}
    if any(isinstance(value, Tensor) for value in state.values()):
        check_names(state)
    for name, value in state.items():
        if isinstance(name, str) and not isinstance(value, Tensor | Mapping) and _BACKBONE.match(name):
            raise ValueError(f"the checkpoint's {name} is {describe(value)}; expected a tensor")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _as_tensor(value: Any) -> Any:
    real = isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.dtype.itemsize <= 8
    return torch.from_numpy(np.array(value, value.dtype.newbyteorder("="))) if real else value


def innermost(checkpoint: Any) -> Any:
    """Follow the keys under which files keep a model's state dict, as far as there are any."""
    for key in _WRAPPERS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    return checkpoint


def _backbone_prefix(state: StateDict) -> str | None:
    """Find the prefix of all names that a backbone alone has. If they disagree, there are several backbones, or a part
    of one lies elsewhere, and choosing would lose weights."""
    names = [name for name in state if _BACKBONE.match(name)]
    return next((p for p in _PREFIXES if names and all(name.startswith(p) for name in names)), None)


def _training_prefix(state: StateDict) -> str | None:
    return next((p for p in _TRAINING_PREFIXES if any(name.startswith(p) for name in state)), None)
