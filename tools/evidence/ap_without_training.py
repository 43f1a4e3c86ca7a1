"""AP of one trained detector of any trainer with the same weights: uniform, adaptive, on smaller images."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from apt_dense.hosts.trained_model_types import TrainedDetector
from apt_dense.nn.attention import Attention
from apt_dense.nn.patch_embed import CoarseEmbed
from apt_dense.options import BlockOptions
from apt_dense.patches.image_preparation import filled_region
from apt_dense.patches.replaceable_selector import CHANGEABLE

from evidence.detection_scores import scores_in_per_cent
from evidence.equal_token_rows import SMALLER, Case
from evidence.model_forms import Form
from evidence.trained_detectors import category_ids_of, entries_of
from shared.photo_files import evenly_spread
from shared.thresholds_for_share import scores_of, thresholds_for
from torchvision_detection.data import CocoSplit, read_image

POWER = "proportional_attention"
_SWITCHED = "thresholds", "scorer", "keep_fine", "keep_coarse"
_OFF = {"thresholds": (), "token_budget": None, "min_tokens": None}  # which thresholds alone decide, if they are given
_TRIED = 16  # photos by which the size of a smaller image is chosen


def check_switchable(forms: Sequence[Form]) -> None:
    """Raise a ValueError or TypeError for a form whose options a detector that is built already cannot change, and for
    values out of range."""
    for form in forms:
        fixed = sorted(form.options.keys() - {*_SWITCHED, POWER})
        if fixed:
            names = ", ".join((*_SWITCHED, POWER))
            raise ValueError(f"form {form.text!r}: a trained detector cannot change {fixed[0]}, only {names}")
        if POWER in form.options:
            BlockOptions(proportional_attention=form.options[POWER])


class SwitchedDetector:
    """A trained detector on labelled photos, whose patches and image size change from row to row, whatever it was
    trained as.

    Args:
        detector: in eval mode; it is changed.
        split: without masks unless the detector finds some.

    Raises:
        ValueError: if the detector finds other categories than the data have.
    """

    def __init__(self, detector: TrainedDetector, split: CocoSplit) -> None:
        self.category_ids = category_ids_of(detector, split)
        self.detector, self.split, self.net, self.factor = detector, split, detector.backbone, 1.0
        if self.net.coarse_embed is None:
            self.net.coarse_embed = CoarseEmbed(self.net.embed_dim).to(detector.device)  # neutral until it is trained
        self.given = {name: getattr(self.net.patches, name) for name in CHANGEABLE}
        self.layers = [module for module in self.net.modules() if isinstance(module, Attention)]
        self.power = self.layers[0].proportional
        self.full = cache(self._tokens)

    def measure(self, case: Case, ratios: Sequence[float]) -> dict[str, Any]:
        """The results of a row: COCO's AP in per cent of boxes and, where there are masks, of masks; tokens as a share
        of the uniform model's at the case's size; milliseconds of a photo (median).

        Args:
            case: whose ``size`` is the factor of the photos' size in the run's tests, twice.
            ratios: of the thresholds, which are scaled.
        """
        factor, options = case.size[0], {**self.given, **_OFF}
        if case.form is not None:
            options |= {name: value for name, value in case.form.options.items() if name != POWER}
            options["thresholds"] = self.thresholds(factor, {**options, "thresholds": tuple(ratios)}, case.share)
        self.net.set_patches(**options)
        for layer in self.layers:
            layer.proportional = self.power if case.form is None else case.form.options.get(POWER, self.power)
        full = self.full(factor)
        factor = self.smaller(factor, case.share) if case.variant == SMALLER else factor
        found = self._detect(factor)
        return {**found, "tokens": found["tokens"] / full, "thresholds": list(options["thresholds"]), "factor": factor}

    def thresholds(self, factor: float, options: Mapping[str, Any], share: float) -> tuple[float, ...]:
        """Those by which all photos together keep a share of the uniform model's tokens."""
        selector = replace(self.net.patches, **options)
        images = self._images(factor)
        images = map(without_padding, images) if selector.drop_padding else images  # as the uniform model's are counted
        return thresholds_for([scores_of(selector, image) for image in images], options["thresholds"], share)

    def smaller(self, factor: float, share: float) -> float:
        """The factor by which some photos, padded to whole strides, are nearest to a share of the tokens."""
        tried = (factor * math.sqrt(share) * (1 - step / 40) for step in range(9))
        full = self.full(factor, _TRIED)
        return min(tried, key=lambda smaller: abs(self._tokens(smaller, _TRIED) / full - share))

    def _tokens(self, factor: float, limit: int | None = None) -> int:
        """Tokens of the uniform model, with those of padding if it keeps them."""
        uniform = replace(self.net.patches, **_OFF)
        return sum(int(uniform.count(image).sum()) for image in self._images(factor, limit))

    def _images(self, factor: float, limit: int | None = None) -> Iterator[Tensor]:
        """The images that the backbone sees, normalised and padded (1, 3, H, W)."""
        self._resize(factor)
        for _, photo in self._photos("scores", limit):
            seen: list[Tensor] = []
            with _first_images(self.detector.model.backbone, seen), suppress(_SeenError):
                self.detector.predict(photo, 0.0)
            yield from seen

    def _resize(self, factor: float) -> None:
        if factor != self.factor:  # some runs have one size only
            self.detector.scale_photos(factor)
            self.factor = factor

    def _photos(self, title: str, limit: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        for image_id in tqdm(evenly_spread(self.split.image_ids, limit), title, leave=False):
            yield image_id, read_image(self.split, image_id)

    def _detect(self, factor: float) -> dict[str, Any]:
        self._resize(factor)
        entries, seconds, tokens = [], [], []
        count = self.net.blocks[0].register_forward_hook(lambda block, given, out: tokens.append(len(given[1].image_N)))
        try:
            for image_id, photo in self._photos("images"):
                start = time.perf_counter()
                found = self.detector.predict(photo, 0.0)
                seconds.append(time.perf_counter() - start)
                entries += entries_of(found, image_id, self.category_ids)
        finally:
            count.remove()
        scores = scores_in_per_cent(self.split.coco, entries, "bbox")
        if self.split.masks:
            scores["mask AP"] = scores_in_per_cent(self.split.coco, entries, "segm")["AP"]
        ms = 1000 * sorted(seconds)[len(seconds) // 2]
        return {**scores, "tokens": sum(tokens), "ms": ms, "images": len(seconds)}


def without_padding(image: Tensor) -> Tensor:
    """Cut the padding off an image (1, 3, H, W)."""
    rows, columns = filled_region(image)[0].tolist()
    return image[..., :rows, :columns]


class _SeenError(Exception):
    """Ends a forward pass of which only the input was wanted."""


@contextmanager
def _first_images(backbone: nn.Module, seen: list[Tensor]) -> Iterator[None]:
    """Put what a backbone is called with into ``seen``, and end the call."""

    def note(module: nn.Module, given: tuple) -> None:
        seen.append(given[0])
        raise _SeenError

    hook = backbone.register_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()
