"""Trained models of any host, which take a photo and return what is in it, as NumPy arrays."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from apt_dense.vit import APTViT

NO_SIZE = "the run does not resize photos, so there is no size to scale"
SCORE_THRESHOLD = 0.5  # lowest score of a detection, unless another is asked for


class Detections(NamedTuple):
    """Objects found in a photo, best first.

    Args:
        boxes: (n, 4) float32, x1, y1, x2, y2 in pixels of the photo.
        scores: (n,) float32 in [0, 1].
        labels: (n,) int64, places in the model's ``class_names``.
        masks: (n, H, W) bool; None from detectors without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None


class TrainedModel:
    """A model that is ready to use, in eval mode.

    Args:
        model: the host's own model.
        backbone: the adaptive ViT inside of it.
        class_names: one name a class.
    """

    def __init__(self, model: nn.Module, backbone: APTViT, class_names: Sequence[str]) -> None:
        self.model, self.backbone, self.class_names = model.eval(), backbone, tuple(map(str, class_names))

    def to(self, device: str | torch.device) -> TrainedModel:
        """Move the model to a device; return this object."""
        self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return next(self.model.parameters()).device


class TrainedDetector(TrainedModel, ABC):
    """A detector.

    Args:
        category_ids: of the classes in the data set's annotation files.
    """

    def __init__(
        self, model: nn.Module, backbone: APTViT, class_names: Sequence[str], category_ids: Sequence[int]
    ) -> None:
        super().__init__(model, backbone, class_names)
        self.category_ids = tuple(category_ids)

    def predict(self, photo: np.ndarray, score_threshold: float = SCORE_THRESHOLD) -> Detections:
        """Find the objects in a photo (H, W, 3) uint8 RGB whose score is at least ``score_threshold`` in [0, 1].

        Raises:
            ValueError: if the photo is of another shape or type.
        """
        check_photo(photo)
        with torch.inference_mode():
            found = self._detect(photo)
        order = np.argsort(-found.scores, kind="stable")
        chosen = order[found.scores[order] >= score_threshold]
        return Detections(*(None if part is None else part[chosen] for part in found))

    def scale_photos(self, factor: float) -> None:
        """Resize photos from now on to ``factor`` times their size in the run's tests; 1 is that size again.

        Raises:
            ValueError: for a factor that is not finite and above 0, and a detector that does not resize photos.
        """
        raise ValueError(NO_SIZE)

    @abstractmethod
    def _detect(self, photo: np.ndarray) -> Detections:
        """Return all that the host finds, in any order."""


class TrainedSegmentor(TrainedModel, ABC):
    """A segmentor.

    Args:
        palette: (n, 3) colours of the classes, RGB in [0, 255].
        first_label: what the first class is called in the data set's masks: 1 where 0 is "unlabelled"
            (``reduce_zero_label``), else 0.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: APTViT,
        class_names: Sequence[str],
        palette: Sequence[Sequence[int]],
        first_label: int = 0,
    ) -> None:
        super().__init__(model, backbone, class_names)
        self.palette, self.first_label = tuple(map(tuple, palette)), first_label

    def predict(self, photo: np.ndarray) -> np.ndarray:
        """Find the class of each pixel of a photo (H, W, 3) uint8 RGB: (H, W) int64, places in ``class_names``.

        Raises:
            ValueError: if the photo is of another shape or type.
        """
        check_photo(photo)
        with torch.inference_mode():
            return self._segment(photo)

    @abstractmethod
    def _segment(self, photo: np.ndarray) -> np.ndarray:
        """Return the class of each pixel."""


def check_factor(factor: float) -> None:
    """Raise ValueError unless a factor is finite and above 0."""
    if not 0 < factor < math.inf:
        raise ValueError(f"factor={factor!r} must be finite and above 0")


def check_photo(photo: np.ndarray) -> None:
    """Raise ValueError unless a photo is (H, W, 3) uint8 with at least one pixel."""
    is_array = isinstance(photo, np.ndarray)
    if not is_array or photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8 or not photo.size:
        found = f"{photo.dtype} of shape {photo.shape}" if is_array else f"a {type(photo).__name__}"
        raise ValueError(f"the photo is {found}; expected an array (H, W, 3) uint8 RGB in [0, 255]")
