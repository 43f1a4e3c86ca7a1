"""What a page says of photos in numbers: of each, and of all together."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from apt_dense import PatchSelector
from apt_dense.patches.labels_under_coarse_patches import mixing_by_factor
from apt_dense.patches.token_curve import patches_by_factor

from calibration.token_curves import Source
from shared.normalise import normalise, to_grey_levels
from shared.photo_files import read_photo
from shared.token_counts import choose_patches

#: Factors of the thresholds for which a page says what would be kept: from half to double.
FACTORS = tuple(2 ** (step / 4) for step in range(-4, 5))
BINS = 20  # of the histogram of shares


class Mixing(NamedTuple):
    """What the coarse patches of labelled photos hide: see ``apt_dense.patches.labels_under_coarse_patches``."""

    coarse: int
    mixed: int
    border: int
    borders: int


class PhotoFigures(NamedTuple):
    """The patches of a photo.

    Args:
        size: (H, W) pixels as they were cut into patches.
        cells: of the base grid, the tokens of a uniform ViT.
        per_scale: patches of scale 0, 1, ...
        by_factor: tokens with thresholds scaled by each of ``FACTORS``; empty where nothing can be scaled.
        mixing: None without a mask.
    """

    path: Path
    size: tuple[int, int]
    cells: int
    per_scale: tuple[int, ...]
    by_factor: tuple[int, ...] = ()
    mixing: Mixing | None = None

    @property
    def tokens(self) -> int:
        return sum(self.per_scale)

    @property
    def share(self) -> float:
        """Tokens as a share of the cells."""
        return self.tokens / self.cells


class PhotoLeftOut(NamedTuple):
    """A photo without figures, and why."""

    path: Path
    reason: str


def can_scale(selector: PatchSelector) -> bool:
    """Check whether thresholds alone decide and can be scaled: not with a budget or a minimum, nor infinite ones."""
    thresholds_decide = selector.token_budget is None and selector.min_tokens is None
    return thresholds_decide and bool(selector.thresholds) and all(map(math.isfinite, selector.thresholds))


def read_picture(path: Path, source: Source) -> np.ndarray:
    """Read a photo in the size in which it is cut into patches: (H, W, 3) uint8 RGB. Raises ValueError, OSError."""
    return source.sizes.apply(read_photo(path))


def to_image(picture: np.ndarray, selector: PatchSelector) -> Tensor:
    """Normalise a picture (H, W, 3) uint8 RGB to (1, 3, H, W)."""
    return normalise(to_grey_levels(picture), selector.pixel_format)


def measure_photos(paths: Sequence[Path], source: Source) -> Iterator[PhotoFigures | PhotoLeftOut]:
    """Cut photos into patches, one at a time."""
    for path in paths:
        try:
            yield measure_photo(path, source)
        except (ValueError, OSError) as error:
            yield PhotoLeftOut(path, str(error))


def measure_photo(path: Path, source: Source) -> PhotoFigures:
    """Cut a photo into patches. Raises ValueError, OSError."""
    photo = read_photo(path)
    picture = source.sizes.apply(photo)
    found = measure_picture(picture, source.selector, path)
    if path not in source.masks:
        return found
    size = picture.shape[:2]
    labels = source.sizes.apply_to_labels(source.labels(path, photo.shape[:2]).map, size)
    return found._replace(mixing=_mixing(picture, labels, source.selector))


def measure_picture(picture: np.ndarray, selector: PatchSelector, path: Path = Path()) -> PhotoFigures:
    """Cut a picture (H, W, 3) uint8 RGB into patches."""
    image = to_image(picture, selector)
    patches = choose_patches(selector, image)
    by_factor: tuple[int, ...] = ()
    if can_scale(selector):
        by_factor = tuple(patches_by_factor(selector, image, torch.tensor(FACTORS).double())[0].sum(1).tolist())
    return PhotoFigures(path, picture.shape[:2], patches.cells, tuple(patches.per_scale[0].tolist()), by_factor)


def _mixing(picture: np.ndarray, labels: np.ndarray, selector: PatchSelector) -> Mixing:
    found = mixing_by_factor(
        selector, to_image(picture, selector), torch.from_numpy(labels.astype(np.int64)), torch.ones(1)
    )
    return Mixing(int(found.coarse), int(found.mixed), int(found.border), found.borders)


class Summary(NamedTuple):
    """Figures of all photos together.

    Args:
        share: mean over photos of the share of tokens kept.
        quantiles: the shares that 5, 50 and 95 % of the photos do not exceed.
        histogram: photos in each of ``BINS`` equal intervals of the share; the last one includes 1.
        per_scale: patches of all photos.
        by_factor: mean share with thresholds scaled by each of ``FACTORS``; empty where nothing can be scaled.
        mixing: sums; None without masks.
    """

    share: float
    quantiles: tuple[float, float, float]
    histogram: tuple[int, ...]
    per_scale: tuple[int, ...]
    by_factor: tuple[float, ...]
    mixing: Mixing | None

    @property
    def area(self) -> tuple[float, ...]:
        """Share of all cells that have a token under patches of each scale."""
        cells = [patches << 2 * scale for scale, patches in enumerate(self.per_scale)]
        return tuple(each / max(sum(cells), 1) for each in cells)


def summarise(photos: Sequence[PhotoFigures]) -> Summary:
    """Sum up the figures of one or more photos."""
    shares = np.array([photo.share for photo in photos])
    bins = [min(photo.tokens * BINS // photo.cells, BINS - 1) for photo in photos]
    curves = np.array([np.array(photo.by_factor) / photo.cells for photo in photos])
    mixing = [photo.mixing for photo in photos if photo.mixing is not None]
    return Summary(
        share=float(shares.mean()),
        quantiles=tuple(np.quantile(shares, (0.05, 0.5, 0.95), method="inverted_cdf").tolist()),
        histogram=tuple(np.bincount(bins, minlength=BINS).tolist()),
        per_scale=tuple(np.sum([photo.per_scale for photo in photos], axis=0).tolist()),
        by_factor=tuple(curves.mean(0).tolist()),
        mixing=Mixing(*np.sum(mixing, axis=0).tolist()) if mixing else None,
    )
