"""What a page is made of."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from calibration.token_curves import Source
from reporting.html_elements import Markup
from reporting.measured_speed import MeasuredSpeed
from reporting.photo_figures import PhotoFigures, PhotoLeftOut, Summary
from reporting.predicted_speed import MODELS, speed_up


class Report(NamedTuple):
    """The content of a page.

    Args:
        photos: those that could be read, the ones that keep most tokens first.
        names: how the page calls each photo.
        cards: a part for each photo that is drawn.
        calibration: the content of calibrate's thresholds.json; None without one.
        quality: figures of an evaluation by name, or by name and scale; None without them.
    """

    command: str
    source: Source
    photos: Sequence[PhotoFigures]
    left_out: Sequence[PhotoLeftOut]
    summary: Summary
    names: Mapping[Path, str]
    cards: Sequence[Markup]
    measured: MeasuredSpeed | None = None
    calibration: Mapping[str, Any] | None = None
    quality: Mapping[str, Any] | None = None

    @property
    def model(self) -> str:
        """The size of ViT that the page speaks of."""
        return "base" if self.measured is None else self.measured.model

    def predicted(self, model: str, paths: Collection[Path] | None = None) -> float:
        """The speed-up over those photos, or all, that their tokens promise."""
        photos = [photo for photo in self.photos if paths is None or photo.path in paths]
        counts = [(photo.cells, photo.per_scale) for photo in photos]
        return speed_up(MODELS[model], self.source.selector.patch_size, counts)


def photos_of(number: int) -> str:
    """Say how many photos: "1 photo", "2 photos"."""
    return "1 photo" if number == 1 else f"{number} photos"
