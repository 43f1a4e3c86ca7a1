"""Draw detections with their class and score."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import supervision

from apt_dense.hosts.trained_model_types import Detections

from shared.picture_layout import Colour, resize_longer_side

SMALLEST = 800  # pixels of the longer side below which pictures are enlarged, so that labels can be read
MASK_OPACITY = 0.4
DARK = 140  # grey level of a colour below which text on it is white

#: Comes with matplotlib, which supervision needs; Pillow's own font has no letters beyond ASCII.
_FONT = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
_PALETTE = supervision.ColorPalette.DEFAULT


def class_colours(count: int) -> list[Colour]:
    """Return a colour for each of ``count`` classes; after some twenty, they repeat."""
    return [_PALETTE.by_idx(number).as_rgb() for number in range(count)]


def draw_detections(
    photo: np.ndarray,
    found: Detections,
    class_names: Sequence[str],
    colours: Sequence[Colour] | None = None,
    size: int | None = None,
) -> np.ndarray:
    """Draw masks, boxes, classes and scores over a photo (H, W, 3) uint8 RGB, enlarged if it is small.

    Args:
        found: what to draw; scores of NaN are not written.
        class_names, colours: of the labels in ``found``.
        size: pixels of the longer side of the picture, whatever the photo's.
    """
    size = size or max(SMALLEST, *photo.shape[:2])
    canvas = photo if max(photo.shape[:2]) == size else resize_longer_side(photo, size)
    canvas = np.ascontiguousarray(canvas[..., ::-1])  # supervision draws in OpenCV's order
    if not len(found.boxes):
        return canvas[..., ::-1].copy()
    detections = _detections(found, photo.shape[:2], canvas.shape[:2])
    colours = colours or class_colours(len(class_names))
    colour, ink = (_palette(values) for values in (colours, [_ink(colour) for colour in colours]))
    longer = max(canvas.shape[:2])
    scores = ["" if np.isnan(score) else f" {score:.2f}" for score in found.scores]
    labels = [f"{class_names[label]}{score}" for label, score in zip(found.labels, scores, strict=True)]
    drawings = [supervision.MaskAnnotator(colour, MASK_OPACITY)] if detections.mask is not None else []
    drawings.append(supervision.BoxAnnotator(colour, max(2, longer // 400)))
    for drawing in drawings:
        canvas = drawing.annotate(canvas, detections)
    text = supervision.RichLabelAnnotator(
        colour,
        text_color=ink,
        font_path=_FONT,
        font_size=max(12, longer // 60),
        text_padding=3,
        smart_position=True,
    )
    return text.annotate(canvas, detections, labels)[..., ::-1].copy()


def _detections(found: Detections, size: tuple[int, int], shown: tuple[int, int]) -> supervision.Detections:
    """Convert detections in a picture of one size to supervision's in a picture of another size."""
    factors = np.divide(shown, size)[::-1]
    masks = found.masks
    if masks is not None and shown != size:
        flat = cv2.INTER_NEAREST
        masks = np.stack([cv2.resize(mask.astype(np.uint8), shown[::-1], interpolation=flat) for mask in masks]) > 0
    return supervision.Detections(
        xyxy=found.boxes * np.tile(factors, 2), mask=masks, confidence=found.scores, class_id=found.labels
    )


def _palette(colours: Sequence[Colour]) -> supervision.ColorPalette:
    return supervision.ColorPalette([supervision.Color(*map(int, colour)) for colour in colours])


def _ink(colour: Colour) -> Colour:
    return (255, 255, 255) if np.dot(colour, (0.299, 0.587, 0.114)) < DARK else (0, 0, 0)
