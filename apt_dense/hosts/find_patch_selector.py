"""The choice of patches of the adaptive ViT inside a host's model, to look at what it does to a test's images."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from apt_dense.patches.selector import PatchSelector
from apt_dense.vit import APTViT


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
