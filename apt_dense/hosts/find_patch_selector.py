"""The choice of patches of the adaptive ViT inside a host's model or config."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import nn

from apt_dense.patches.selector import PatchSelector
from apt_dense.vit import APTViT

_OPTIONS = {field.name for field in fields(PatchSelector)}


def patch_options_of(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an ``APTViT`` in a config that decide about patches, as ``PatchSelector`` takes them: windows only
    where blocks have them, whose borders no patch crosses."""
    options = {name: value for name, value in backbone.items() if name in _OPTIONS}
    if not backbone.get("window_block_indexes"):
        options.pop("window_size", None)
    return options


def find_patch_selector(model: nn.Module, thresholds: Sequence[float] | None = None) -> PatchSelector:
    """Return the selector of the only adaptive ViT in a model.

    Args:
        model: a segmentor or detector around an ``APTViT``.
        thresholds: to choose patches by these, without a budget or a minimum; None for the model's own choice.

    Raises:
        ValueError: if there is no adaptive ViT in the model, or more than one.
        ValueError, TypeError: for thresholds that the selector does not take.
    """
    found = [module for module in model.modules() if isinstance(module, APTViT)]
    if len(found) != 1:
        raise ValueError(
            f"quality by scale needs a model with one APTViT, whose patches it looks at, but {type(model).__name__} "
            f"has {len(found)}; set the backbone to APTViT (with thresholds=() it is the plain ViT)"
        )
    if thresholds is None:
        return found[0].patches
    return replace(found[0].patches, thresholds=tuple(thresholds), token_budget=None, min_tokens=None)
