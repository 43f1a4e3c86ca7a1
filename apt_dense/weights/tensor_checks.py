"""Refuse what has the name of a weight and is none: integers, masks, sparse and empty tensors, numbers, odd keys."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

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
        if weight and not _is_finite(value):
            kind = "NaN" if value.isnan().any() else "infinite numbers, or such beyond float32,"
            warnings.warn(f"the checkpoint's {name} holds {kind}: outputs will be NaN", stacklevel=3)


def _is_finite(value: Tensor) -> bool:
    """Check for NaN, infinities and numbers beyond float32, as which weights are used."""
    if value.dtype == torch.float64:
        value = value.float()
    return not value.numel() or bool(value.sum(dtype=torch.float64).isfinite())


def check_names(state: Mapping[Any, Any]) -> None:
    """Raise ValueError for a key that is not text."""
    for name in state:
        if not isinstance(name, str):
            raise ValueError(
                f"the checkpoint has the key {name!r} ({type(name).__name__}); weights have names, as text"
            )


def _is_weight(name: str) -> bool:
    return bool(_WEIGHT.match(name)) and not _NUMBERS.match(name)


def describe(value: Any) -> str:
    """Describe what is no tensor, in a few words: files may hold lists of lists without an end."""
    shown = f"{value!r:.40} " if isinstance(value, int | float | str | bytes | np.generic | None) else ""
    return f"{shown}({type(value).__name__})"


def _problem(value: Any) -> str | None:
    """Say what a value is instead of a weight; None if it is one."""
    if not isinstance(value, Tensor):
        return describe(value)
    if is_lazy(value) or type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(value).__name__}, which stands for a tensor"
    if value.is_meta:
        return "on the meta device, a shape without numbers"
    if value.is_nested or value.layout is not torch.strided:
        return f"{'nested' if value.is_nested else 'sparse'} ({value.layout})"
    if value.is_quantized or not value.is_floating_point():
        return f"of {value.dtype}"
    if value.element_size() == 1:
        return f"of {value.dtype}, whose scale is kept elsewhere"
    return None
