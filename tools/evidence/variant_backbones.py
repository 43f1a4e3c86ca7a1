"""The backbone of a variant with pretrained weights, and its thresholds for a share of tokens."""

import math
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from torch import Tensor

from apt_dense import APTViT, load_backbone
from apt_dense.weights.timm_arguments import apt_arguments, timm_model_without_weights

from evidence.equal_token_rows import check_size
from evidence.model_forms import set_thresholds, with_thresholds
from evidence.rival_backbones import RANDOM, RIVALS, RivalViT, random_scores
from evidence.training_variants import Variant
from shared.thresholds_for_share import mean_share, scores_of, thresholds_for


class Plan(NamedTuple):
    """Settings that all variants of a comparison share.

    Args:
        model: a timm name.
        weights: of the backbone, a file; None for timm's, downloaded.
        classes: of objects or pixels, without background and void; None where the data say it.
        rate: of learning of the head, in AdamW.
        new_rate: of what only APT has, which starts neutral, as a share of that; a variant's own rate does not scale
            it, since what starts from another row's weights has to learn it still.
        backbone_rate: of all else in the backbone, as a share of that; 0 leaves it frozen, and its features are made
            once.
        calibrated: about how many of the photos tested, evenly spread, thresholds are chosen by.
        patch_size: pixels of patches where variants say nothing else; None for the pretrained model's.
    """

    model: str
    weights: Path | None
    classes: int | None
    size: tuple[int, int]
    epochs: int
    batch: int = 4
    rate: float = 1e-3
    new_rate: float = 0.1
    backbone_rate: float = 0.02
    weight_decay: float = 0.05
    calibrated: int = 100
    patch_size: int | None = None

    @property
    def plain_patch_size(self) -> int:
        """Pixels of the uniform model's patches."""
        return self.patch_size or apt_arguments(timm_model_without_weights(self.model))["patch_size"]


def build_backbone(plan: Plan, variant: Variant, **defaults: Any) -> APTViT:
    """Build the backbone of a variant with the pretrained weights; patches of another size are resampled.

    Args:
        **defaults: options of the backbone, where the variant has none.
    """
    options = {**defaults, "thresholds": (1.0,) if variant.is_adaptive else (), **variant.options}
    if plan.patch_size is not None:
        options = {"patch_size": plan.patch_size, **options}
    if variant.rival == RANDOM:
        options["scorer"] = random_scores
    kind = RIVALS.get(variant.rival, APTViT)
    backbone = kind.from_timm(plan.model, pretrained=plan.weights is None, **options)
    if plan.weights is not None:
        load_backbone(backbone, plan.weights, resize_patches="patch_size" in options)
    if isinstance(backbone, RivalViT):
        backbone.keep(variant.tokens / cells_of(backbone, variant, plan))
    return backbone


def backbone_key(plan: Plan, variant: Variant) -> tuple[Any, ...]:
    """Everything that the features of a frozen backbone depend on: not seeds, rates or the name of a row."""
    return plan, variant.size, variant.tokens, variant.rival, variant.options


def cells_of(model: APTViT, variant: Variant, plan: Plan) -> float:
    """Cells of an image as a share of those of the uniform model at the plan's size.

    Raises:
        ValueError: for sizes that are not whole patches.
    """
    cells = check_size(variant.size or plan.size, model.patch_size)
    return math.prod(cells) / math.prod(check_size(plan.size, plan.plain_patch_size))


def _share_kept(model: APTViT, images: Iterable[Tensor]) -> float:
    """Tokens of images by the model's own thresholds or budget, as a share of their cells."""
    if not model.thresholds:
        return 1.0
    counts = ((model.patches.count(image).sum().item(), image.shape[-2:]) for image in images)
    return fmean(tokens / math.prod(-(-side // model.patch_size) for side in size) for tokens, size in counts)


def choose_thresholds(model: APTViT, variant: Variant, plan: Plan, images: Iterable[Tensor]) -> float:
    """Scale the thresholds of an adaptive variant to its share of tokens, if it names one.

    Args:
        images: some of those tested, normalised (1, 3, H, W) on the CPU.

    Returns:
        Tokens of these images as a share of those of the uniform model at the plan's size.

    Raises:
        ValueError: as :func:`cells_of`, and if the share cannot be reached.
    """
    cells = cells_of(model, variant, plan)
    if not variant.is_adaptive:
        return cells * (model.share if isinstance(model, RivalViT) else _share_kept(model, images))
    ratios = model.thresholds
    selector = with_thresholds(model.patches, ratios)
    scores = [scores_of(selector, image) for image in images]
    thresholds = thresholds_for(scores, ratios, variant.tokens / cells)
    set_thresholds(model, thresholds)
    return mean_share(scores, thresholds) * cells
