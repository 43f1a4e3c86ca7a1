"""What anyone can do with a plain ViT to save tokens: a smaller image, or larger patches, as many tokens as ours."""

from typing import NamedTuple

import torch.nn.functional as F

from apt_dense import PatchSelector

from benchmarks.model_cases import Case
from shared.token_counts import choose_patches

PATCH_SIZE = 16


class Rival(NamedTuple):
    """A uniform model on resized images."""

    name: str
    case: Case  # without thresholds, its images resized
    patch_size: int
    tokens: float  # as a share of the tokens of the original case


def cheap_rivals(case: Case) -> list[Rival]:
    """Resize the case's images so that a uniform model sees about as many tokens as our adaptive one does."""
    share = choose_patches(PatchSelector(thresholds=case.thresholds), case.images).tokens_kept
    cells = case.size // PATCH_SIZE
    side = max(1, round(cells * share**0.5))
    return [_rival(case, side, PATCH_SIZE, "smaller image"), _rival(case, side, 2 * PATCH_SIZE, "larger patches")]


def _rival(case: Case, side: int, patch_size: int, what: str) -> Rival:
    size = (side * patch_size, side * patch_size)
    images = F.interpolate(case.images, size=size, mode="bicubic", antialias=True)
    name = f"uniform, {what} ({side * patch_size} pixels, patches of {patch_size})"
    resized = case._replace(images=images, thresholds=(), token_budget=None)
    return Rival(name, resized, patch_size, (side / (case.size // PATCH_SIZE)) ** 2)
