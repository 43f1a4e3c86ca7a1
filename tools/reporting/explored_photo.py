"""What the interactive page shows of a photo for given settings."""

from typing import NamedTuple

import numpy as np

from apt_dense import PatchSelector

from reporting.html_elements import Markup, element, percent
from reporting.photo_card import colour_key, sentence, size_table
from reporting.photo_figures import PhotoFigures, measure_picture
from reporting.pictures import draw_grid, draw_scores, score_maps
from shared.picture_layout import resize_longer_side

SHOWN = 640  # pixels of the longer side of score maps
BY_THRESHOLDS, BY_BUDGET = "thresholds", "budget"
RESTS_ON = (
    "The prediction counts the floating point operations of a plain ViT with global attention (no heads), uniform "
    "against adaptive. It holds where matrix products take the time, as for large models and images; nothing was timed."
)


class Settings(NamedTuple):
    """What the page's controls are set to.

    Args:
        by: ``BY_THRESHOLDS`` or ``BY_BUDGET``.
        first, second: thresholds of patches of 2 and 4 times the patch size, in bits.
        budget: share of all tokens, in percent.
        longer: pixels of the photo's longer side.
        model: the size of ViT that speed is predicted for.
    """

    by: str
    first: float
    second: float
    budget: float
    patch_size: int
    longer: int
    model: str

    def selector(self) -> PatchSelector:
        """Return the choice of patches. Thresholds may not rise with the size, so the second is the first at most."""
        thresholds = self.first, min(self.first, self.second)
        budget = self.budget / 100 if self.by == BY_BUDGET else None
        return PatchSelector(patch_size=int(self.patch_size), thresholds=thresholds, token_budget=budget)


class Explored(NamedTuple):
    """The photo's patches and scores (H, W, 3) uint8 RGB, and its figures as HTML."""

    patches: np.ndarray
    scores: list[np.ndarray]
    figures: Markup


def explore_photo(photo: np.ndarray, settings: Settings) -> Explored:
    """Cut a photo (H, W, 3) uint8 RGB into patches. Raises ValueError for settings out of range."""
    selector = settings.selector()
    picture = resize_longer_side(photo, int(settings.longer))
    found, maps = measure_picture(picture, selector), score_maps(picture, selector)
    grid = tuple(-(-side // selector.patch_size) for side in picture.shape[:2])
    enlarged = max(1, SHOWN // max(grid))
    scores = [draw_scores(each, grid).repeat(enlarged, 0).repeat(enlarged, 1) for each in maps]
    sizes = size_table("explored", found, selector, maps)
    figures = element("div", *_sentences(settings, selector, found), colour_key(selector), sizes, _small(RESTS_ON))
    return Explored(draw_grid(picture, selector), scores, figures)


def _sentences(settings: Settings, selector: PatchSelector, found: PhotoFigures) -> list[Markup]:
    parts = [
        element("p", element("strong", f"{percent(found.share)} of the tokens kept")),
        element("p", sentence(found, selector, settings.model)),
    ]
    if settings.second > settings.first:
        lowered = f"Thresholds may not rise with the size: {settings.first:g} was taken for the largest patches, too."
        parts.append(element("p", lowered))
    if settings.by == BY_BUDGET:
        parts.append(element("p", "With a budget only the ratio of the thresholds matters: which merges come first."))
    else:
        parts.append(element("p", "Scores below the threshold are blue, those above it orange."))
    return parts


def _small(text: str) -> Markup:
    return element("p", element("small", text))
