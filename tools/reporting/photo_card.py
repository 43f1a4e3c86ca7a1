"""What a page shows of one photo: its patches, its scores, and both in numbers."""

from collections.abc import Sequence

import numpy as np

from apt_dense import PatchSelector
from apt_dense.drawing import scale_colour

from reporting.html_elements import NOTHING, TIMES, Markup, element, percent, table
from reporting.photo_figures import PhotoFigures
from reporting.pictures import ScoreMap, as_jpeg, as_png, draw_grid, draw_scores, draw_small, score_maps
from reporting.predicted_speed import MODELS, speed_up

_SWATCH = "display:inline-block;width:.9em;height:.9em;border:1px solid #777;margin-right:.35em;background:"


def size_names(selector: PatchSelector) -> list[str]:
    """Name the sizes of patches: ["16 px", "32 px"]."""
    return [f"{selector.patch_size << scale} px" for scale in range(selector.num_scales)]


def colour_key(selector: PatchSelector) -> Markup:
    """List the colours in which patches of each size are drawn."""
    colours = ["var(--fine, #b9bcc1)", *(f"rgb{scale_colour(scale)}" for scale in range(1, selector.num_scales))]
    entries = [
        element("li", element("span", style=f"{_SWATCH}{colour}"), f"patches of {name}")
        for colour, name in zip(colours, size_names(selector), strict=True)
    ]
    return element("ul", *entries, class_="key")


def sentence(found: PhotoFigures, selector: PatchSelector, model: str) -> str:
    """Say in one line what a photo keeps, and what that promises."""
    faster = speed_up(MODELS[model], selector.patch_size, [(found.cells, found.per_scale)])
    return (
        f"{found.size[1]} {TIMES} {found.size[0]} pixels: {found.tokens} of {found.cells} tokens kept "
        f"({percent(found.share)}); predicted {faster:.2f} times as fast (ViT-{model})"
    )


def size_table(name: str, found: PhotoFigures, selector: PatchSelector, maps: Sequence[ScoreMap]) -> Markup:
    """Build the table of a photo: a row for each size of patches."""
    cells = sum(patches << 2 * scale for scale, patches in enumerate(found.per_scale))
    rows = []
    for scale, patches in enumerate(found.per_scale):
        row = [size_names(selector)[scale], patches, percent((patches << 2 * scale) / max(cells, 1))]
        rows.append([*row, *(_score_cells(maps[scale - 1]) if scale else [NOTHING] * 4)])
    head = "patches of", "number", "of the image", "threshold", "lowest score", "highest score", "below threshold"
    return table(name, "Patches and scores by size", head, rows)


def _score_cells(found: ScoreMap) -> list[str]:
    threshold = NOTHING if found.threshold is None else f"{found.threshold:g}"
    if not found.scores.size:
        return [threshold, NOTHING, NOTHING, NOTHING]
    below = NOTHING if found.threshold is None else f"{found.below} of {found.scores.size}"
    return [threshold, f"{found.scores.min():.3g}", f"{found.scores.max():.3g}", below]


def photo_card(
    number: int, name: str, picture: np.ndarray, found: PhotoFigures, look: tuple[PatchSelector, str]
) -> Markup:
    """Build the part of a page for one photo.

    Args:
        number: of the photo in the page, from 1.
        picture: (H, W, 3) uint8 RGB, as it was cut into patches.
        look: the selector, and the model that speed is predicted for.
    """
    selector, model = look
    maps = score_maps(picture, selector)
    grid = tuple(-(-side // selector.patch_size) for side in found.size)
    patches = f"The patches of {name}: {found.tokens} of {found.cells} tokens kept, outlined, larger ones tinted."
    main = [
        _figure(as_jpeg(draw_grid(picture, selector)), patches, None),
        size_table(f"photo-{number}", found, selector, maps),
    ]
    side = [_figure(as_jpeg(draw_small(picture)), f"The photo {name}.", "The photo")]
    side += [_score_figure(each, grid, selector, name) for each in maps]
    shown = element("div", element("div", *main), element("div", *side, class_="side"), class_="photo")
    title = element("h3", name), element("p", sentence(found, selector, model), class_="soft")
    return element("article", *title, shown, class_="card")


def _figure(source: str, alt: str, caption: str | None, class_: str | None = None) -> Markup:
    below = () if caption is None else (element("figcaption", caption),)
    return element("figure", element("img", src=source, alt=alt, class_=class_), *below)


def _score_figure(found: ScoreMap, grid: tuple[int, int], selector: PatchSelector, name: str) -> Markup:
    size = selector.patch_size << found.scale
    if found.threshold is None:
        caption = f"Scores of {size} px, the more orange the higher"
    else:
        caption = f"Scores of {size} px: blue below {found.threshold:g}, orange above"
    return _figure(as_png(draw_scores(found, grid)), f"{caption}; of {name}.", caption, "cells")
