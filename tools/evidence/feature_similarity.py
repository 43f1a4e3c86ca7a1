"""How near the features of an adaptive model, or of a smaller image, are to those of the uniform model.

The measure is the mean cosine over cells and photos. Nothing is trained and there is hardly any noise.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense import APTViT, load_backbone

from evidence.equal_token_rows import SMALLER, Case, check_size
from evidence.match_token_counts import model_input, resized, smaller_grid, timed
from evidence.model_forms import Form, set_thresholds, with_thresholds
from shared.normalise import to_grey_levels
from shared.photo_files import center_crop, read_photo
from shared.thresholds_for_share import scores_of, thresholds_for


def load_model(name: str, weights: Path | None, block: int, form: Form, thresholds: Sequence[float]) -> APTViT:
    """A timm model with adaptive patches whose output is that of a block, counted from 0, before any final norm.

    Args:
        weights: a file that ``load_backbone`` reads; None for timm's own, which it downloads.

    Raises:
        ValueError: for an unknown model, weights that do not fit, or options that contradict each other.
    """
    options = {"thresholds": tuple(thresholds), "final_norm": False, "out_indices": (block,), **form.options}
    model = APTViT.from_timm(name, pretrained=weights is None, **options)
    if weights is not None:
        load_backbone(model, weights)
    return model.eval()


def photo_at(path: Path, size: tuple[int, int]) -> Tensor | None:
    """The middle of a photo, cut to the shape of ``size`` and shrunk: grey levels (1, 3, *size). None for photos that
    would have to be enlarged, which makes them flat.

    Raises:
        OSError, ValueError: if it cannot be read.
    """
    pixels = read_photo(path)
    height, width = pixels.shape[:2]
    if height < size[0] or width < size[1]:
        return None
    return resized(to_grey_levels(center_crop(pixels, size)), size)


class Reference(NamedTuple):
    """The photos of a size and the uniform model's features."""

    size: tuple[int, int]
    photos: list[Tensor]  # grey levels (1, 3, *size)
    features: list[Tensor]  # (1, C, h, w)


@torch.inference_mode()
def reference_at(model: APTViT, photos: Sequence[Tensor], size: tuple[int, int]) -> Reference:
    """Features of the uniform model; photos are grey levels at that size."""
    set_thresholds(model, ())
    return Reference(size, list(photos), [model(model_input(photo, model))[0].cpu() for photo in photos])


@torch.inference_mode()
def measure(model: APTViT, case: Case, ratios: Sequence[float], reference: Reference) -> dict[str, Any]:
    """The results of a row: cosine, tokens and milliseconds (median over photos of a forward pass).

    Args:
        model: built for the form of the case.
        ratios: of the thresholds, which are scaled to the share of tokens.
    """
    grid = check_size(reference.size, model.patch_size)
    pictures, used, share = reference.photos, (), 1.0
    if case.form is not None:
        used, share = choose_thresholds(model, reference.photos, ratios, case.share)
    elif case.variant == SMALLER:
        small = smaller_grid(grid, case.share)
        share = small[0] * small[1] / (grid[0] * grid[1])
        pictures = [resized(p, (small[0] * model.patch_size, small[1] * model.patch_size)) for p in pictures]
    set_thresholds(model, used)
    cosines, seconds = [], []
    model(model_input(pictures[0], model))  # the first pass allocates
    for picture, expected in zip(pictures, reference.features, strict=True):
        images = model_input(picture, model)
        found, took = timed(lambda images=images: model(images)[0])
        seconds.append(took)
        cosines.append(cosine(found, expected))
    results = {"tokens": share, "cosine": sum(cosines) / len(cosines)}
    return {
        **results,
        "least_cosine": min(cosines),
        "ms": 1000 * sorted(seconds)[len(seconds) // 2],
        "photos": len(pictures),
        "thresholds": list(used),
    }


def choose_thresholds(
    model: APTViT, photos: Sequence[Tensor], ratios: Sequence[float], share: float
) -> tuple[tuple[float, ...], float]:
    """Thresholds in those ratios that leave a share of the tokens, and the share that photos (grey levels) keep."""
    selector = with_thresholds(model.patches, ratios)
    images = [model_input(photo, model) for photo in photos]
    thresholds = thresholds_for([scores_of(selector, image) for image in images], ratios, share)
    kept = [with_thresholds(selector, thresholds).tokens_kept(image).item() for image in images]
    return thresholds, sum(kept) / len(kept)


def cosine(found: Tensor, expected: Tensor) -> float:
    """Mean cosine over cells of feature maps (1, C, h, w); ``found`` is enlarged bilinearly to the other's size."""
    if found.shape != expected.shape:
        found = F.interpolate(found, size=expected.shape[-2:], mode="bilinear", align_corners=False)
    return F.cosine_similarity(found, expected, dim=1).mean().item()
