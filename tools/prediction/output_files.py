"""The files that predictions for a photo become: pictures, labels, and an entry in a JSON file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from apt_dense.hosts.trained_model_types import Detections, TrainedDetector, TrainedModel, TrainedSegmentor
from apt_dense.weights.files import write_whole

from prediction import coco_json
from shared.picture_layout import Colour, paint_labels, resize_longer_side, stack, text_bar, write_png

SMALLEST = 800  # pixels of the longer side below which pictures are enlarged


class Output(ABC):
    """What to predict and to write with a model.

    Args:
        model: a trained model.
        pictures: whether pictures are written, too.
    """

    json_name: str
    data_suffixes: Sequence[str] = ()

    def __init__(self, model: TrainedModel, pictures: bool = True) -> None:
        self.model, self.pictures = model, pictures

    def files(self, base: Path) -> list[Path]:
        """List the files that are written for a photo and named after ``base``."""
        return [beside(base, suffix) for suffix in (*self.data_suffixes, *[".png"] * self.pictures)]

    @abstractmethod
    def predict(self, photo: np.ndarray) -> Any:
        """Run the model on a photo (H, W, 3) uint8 RGB."""

    @abstractmethod
    def write(self, base: Path, photo: np.ndarray, found: Any, image: dict[str, Any]) -> None:
        """Write the files of a photo. ``found`` is what was predicted, ``image`` the photo's entry in the JSON file."""

    @abstractmethod
    def content(self, images: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the content of the JSON file."""


class DetectorOutput(Output):
    """Boxes, masks, classes and scores: NAME.png, and detections.json in COCO's layout."""

    json_name = "detections.json"

    def __init__(self, model: TrainedDetector, pictures: bool = True, score_threshold: float = 0.5) -> None:
        super().__init__(model, pictures)
        self.score_threshold = score_threshold
        self.entries: list[dict[str, Any]] = []
        if pictures:
            from shared.detection_drawing import draw_detections  # needs supervision

            self.draw = draw_detections

    def predict(self, photo: np.ndarray) -> Detections:
        return self.model.predict(photo, self.score_threshold)

    def write(self, base: Path, photo: np.ndarray, found: Detections, image: dict[str, Any]) -> None:
        ids = self.model.category_ids
        self.entries += coco_json.annotations(found, image["id"], ids, len(self.entries) + 1)
        if self.pictures:
            drawn = self.draw(photo, found, self.model.class_names)
            count = f"{len(found.boxes)} found with a score of {self.score_threshold:g} or more"
            write_png(beside(base, ".png"), stack([caption(drawn.shape[1], image, count), drawn]))

    def content(self, images: list[dict[str, Any]]) -> dict[str, Any]:
        named = coco_json.categories(self.model.category_ids, self.model.class_names)
        return {"images": images, "annotations": self.entries, "categories": named}


class SegmentorOutput(Output):
    """A class for each pixel: NAME.png, NAME_labels.png as in the data set's masks, and predictions.json."""

    json_name = "predictions.json"
    data_suffixes = ("_labels.png",)

    def __init__(self, model: TrainedSegmentor, pictures: bool = True) -> None:
        super().__init__(model, pictures)

    def predict(self, photo: np.ndarray) -> np.ndarray:
        return self.model.predict(photo)

    def write(self, base: Path, photo: np.ndarray, found: np.ndarray, image: dict[str, Any]) -> None:
        write_labels(beside(base, "_labels.png"), found + self.model.first_label)
        if self.pictures:
            drawn = draw_labels(photo, found, self.model.class_names, self.model.palette)
            write_png(beside(base, ".png"), stack([caption(drawn.shape[1], image), drawn]))

    def content(self, images: list[dict[str, Any]]) -> dict[str, Any]:
        first, named = self.model.first_label, zip(self.model.class_names, self.model.palette, strict=True)
        classes = [{"label": first + i, "name": name, "colour": colour} for i, (name, colour) in enumerate(named)]
        return {"images": images, "classes": classes}


def beside(base: Path, suffix: str) -> Path:
    """Append a suffix to a name, which may hold dots of its own."""
    return base.with_name(base.name + suffix)


def caption(width: int, image: dict[str, Any], found: str = "") -> np.ndarray:
    """Write a photo's name, tokens and time on a bar, and what was found."""
    tokens = f"tokens kept {image['tokens']} of {image['cells']} ({image['tokens_kept']:.0%})"
    parts = [Path(image["file_name"]).name, found, tokens, f"{image['milliseconds']:.0f} ms"]
    return text_bar(width, [(part, None) for part in parts if part], max(14, width // 70))


def draw_labels(photo: np.ndarray, labels: np.ndarray, names: Sequence[str], palette: Sequence[Colour]) -> np.ndarray:
    """Paint labels (H, W) over a photo (H, W, 3) uint8 RGB, enlarged if it is small, above the classes in it, each with
    its share of the picture."""
    if max(photo.shape[:2]) < SMALLEST:
        photo = resize_longer_side(photo, SMALLEST)
    counts = np.bincount(labels.ravel(), minlength=len(names))
    shown = cv2.resize(labels.astype(np.int32), photo.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    order = [label for label in np.argsort(-counts, kind="stable") if counts[label]]
    key = [(f"{names[label]} {counts[label] / labels.size:.1%}", palette[label]) for label in order]
    width = photo.shape[1]
    return stack([paint_labels(photo, shown, palette), text_bar(width, key, max(14, width // 70))])


def write_labels(path: Path, labels: np.ndarray) -> None:
    """Write labels (H, W) as a PNG of 8 bits, or of 16 where they need them; whole or not at all. Raises OSError."""
    kind = np.uint8 if labels.max(initial=0) < 256 else np.uint16
    with write_whole(path) as partial:
        partial.write_bytes(cv2.imencode(".png", labels.astype(kind))[1].tobytes())
