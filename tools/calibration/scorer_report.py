"""Evaluate a learned scorer on held-out photos, and find thresholds for given shares of tokens."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from apt_dense import PatchSelector
from apt_dense.options import PixelFormat
from apt_dense.patches.learned_scores import NEXT_SCALE
from apt_dense.patches.scores import SCORERS, Scorer

from calibration.learned_scorer_training import LABELS, Fit, Target
from evidence.photos_in_memory import LabelledSet
from shared.normalise import normalise
from shared.tables import markdown
from shared.thresholds_for_share import scores_of, short, thresholds_for

TOKENS = 0.8, 0.6, 0.4  # shares that are printed


def hidden_table(scorer: Scorer, batches: Sequence[LabelledSet], fit: Fit, target: Target = LABELS) -> str:
    """Format what is hidden on held-out photos, and the thresholds, for each share of tokens."""
    size = 2 * fit.patch_size
    batches = [batch for batch in batches if min(batch.masks.shape[1:]) >= size]
    if not batches:
        raise ValueError(f"no photo held out holds a patch of {size} pixels; the scorer is written, but was not tested")
    scorers = {"learned": scorer, "entropy": SCORERS["entropy"]}
    hidden = [target.of(batch.photos.float(), batch.masks)(size) for batch in batches]
    found = {name: hidden_by(each, batches, fit, TOKENS, hidden) for name, each in scorers.items()}
    found["thresholds"] = thresholds_of(scorer, batches, fit)
    rows = [{"tokens": kept, **{name: values[i] for name, values in found.items()}} for i, kept in enumerate(TOKENS)]
    columns = {"tokens": "{:.0%}", "learned": "{:.1%}", "entropy": "{:.1%}", "thresholds": "{}"}
    count = sum(len(batch.masks) for batch in batches)
    return (
        f"On {count} photos held out, when patches of {size} pixels are merged in the order of their scores: hidden of "
        f"the {target.name}. And the thresholds of {fit.scales} coarse "
        f"scale{'s' * (fit.scales > 1)} with which these photos keep as many tokens:\n\n{markdown(rows, columns)}"
    )


@torch.inference_mode()
def hidden_by(
    scorer: Scorer, batches: Sequence[LabelledSet], fit: Fit, tokens: Sequence[float], hidden: Sequence[Tensor]
) -> list[float]:
    """Sum the target over the lowest-scoring patches of scale 1, which are merged first.

    Args:
        tokens: shares of an image's tokens to keep on average, each from 1/4 to 1.
        hidden: the target of each batch's patches of scale 1 (``Target``).

    Returns:
        For each share, the sum over the merged patches as a fraction of the sum over all patches.
    """
    scores = torch.cat([scorer(photos.float(), fit.patch_size, [1])[0].flatten() for photos, _ in batches])
    each = torch.cat([part.flatten() for part in hidden]).nan_to_num(0)
    order = each[scores.argsort(stable=True)].cumsum(0)
    cells = sum(len(masks) * math.prod(n // fit.patch_size for n in masks.shape[1:]) for _, masks in batches)
    merged = [min(len(order), round((1 - share) * cells / 3)) for share in tokens]  # each merge saves 3 of 4
    return [float(order[count - 1] / order[-1]) if count and order[-1] else 0.0 for count in merged]


def thresholds_of(scorer: Scorer, batches: Sequence[LabelledSet], fit: Fit) -> list[str | None]:
    """Thresholds for each share of ``TOKENS``, those of a scale ``NEXT_SCALE`` times those of the scale before; None
    for a share that cannot be reached."""
    ratios = tuple(NEXT_SCALE**scale for scale in range(fit.scales))
    selector = PatchSelector(patch_size=fit.patch_size, thresholds=ratios, scorer=scorer)
    photos = (photo for batch in batches for photo in batch.photos.cpu().split(1))
    scores = [scores_of(selector, normalise(photo.float(), PixelFormat())) for photo in photos]
    found: list[str | None] = []
    for share in TOKENS:
        try:
            found.append(" ".join(map(short, thresholds_for(scores, ratios, share))))
        except ValueError:
            found.append(None)
    return found
