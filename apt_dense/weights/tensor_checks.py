"""Refuse what has the name of a weight and is none: integers, masks, sparse and empty tensors, numbers, odd keys."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: Weights of a backbone under any of the names in formats.py, and buffers of whole numbers among them.
_WEIGHT = re.compile(r"(patch_embed|pos_embed|cls_token|reg_token|norm\w*|blocks\.\d+|coarse_embed)(\.|$)")
_NUMBERS = re.compile(r"(.*\.)?(relative_position_index|num_batches_tracked|\w*mask)$")


def check_kinds(state: Mapping[Any, Any], own: Mapping[str, Tensor] | None = None) -> None:
    """Check that the weights of a state dict are strided tensors of real numbers. NaN is warned of.

    Args:
        own: the model's state dict, whose weights are then the ones looked at; without it, those of a backbone.

    Raises:
        ValueError: naming the first weight that is something else.
    """
    check_names(state)
    for name, value in state.items():
        weight = name in own and own[name].is_floating_point() if own is not None else _is_weight(name)
        problem = _problem(value) if weight else None
        if problem:
            raise ValueError(
                f"the checkpoint's {name} is {problem}; expected a dense tensor of floating-point numbers. Convert it "
                "with the tool that wrote it, or take another file"
            )
        if weight and value.isnan().any():
            warnings.warn(f"the checkpoint's {name} holds NaN: all outputs will be NaN", stacklevel=3)


def check_names(state: Mapping[Any, Any]) -> None:
    """Raise ValueError for a key that is not text."""
    for name in state:
        if not isinstance(name, str):
            raise ValueError(
                f"the checkpoint has the key {name!r} ({type(name).__name__}); weights have names, as text"
            )


def _is_weight(name: str) -> bool:
    return bool(_WEIGHT.match(name)) and not _NUMBERS.match(name)


def _problem(value: Any) -> str | None:
    """Say what a value is instead of a weight; None if it is one."""
    if not isinstance(value, Tensor):
        return f"{value!r:.40} ({type(value).__name__})"
    if value.is_meta:
        return "on the meta device, a shape without numbers"
    if value.layout is not torch.strided:
        return f"sparse ({value.layout})"
    if value.is_quantized or not value.is_floating_point():
        return f"of {value.dtype}"
    return None
