"""Draw what the detection twins find."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from apt_dense.drawing import draw_patches
from apt_dense.hosts.trained_model_types import Detections, TrainedDetector

from shared.detection_drawing import draw_detections
from shared.normalise import to_grey_levels
from shared.picture_layout import Colour, describe_tokens, fit_canvas, patch_key, side_by_side, stack, text_bar
from shared.token_counts import choose_patches
from torchvision_detection.data import CocoSplit, read_boxes, read_image, read_objects

ENLARGED = 2  # times the size in which the detector sees a scene
GAP = 8  # pixels between pictures
PALETTE: tuple[Colour, ...] = (
    (240, 150, 40), (190, 60, 50), (80, 170, 60), (130, 140, 160), (235, 230, 200), (150, 110, 200), (240, 210, 60),
    (250, 120, 150),
)  # fmt: skip


def draw_sheet(
    val: CocoSplit, image_ids: Sequence[int], models: Mapping[str, TrainedDetector], thresholds: Mapping[str, float]
) -> np.ndarray:
    """Draw images with their objects, their patches, and what each twin finds in them.

    Args:
        models, thresholds: of both twins; the lowest scores of boxes that are drawn.
    """
    rows = [_row(val, image_id, models, thresholds) for image_id in image_ids]
    net, width = models["adaptive"].backbone, rows[0].shape[1]
    titles = ["scene and its objects", "patches"]
    titles += [
        f"{twin} model: {f'scores from {threshold:.2f}' if threshold < 1 else 'not sure of anything yet'}"
        for twin, threshold in thresholds.items()
    ]
    heads = [text_bar(width // len(titles) - GAP, [(title, None)]) for title in titles]
    key = text_bar(width, patch_key(net.patch_size, net.patches.num_scales))
    legend = text_bar(
        width, [("classes", None), *((name, PALETTE[i % len(PALETTE)]) for i, name in enumerate(val.names))]
    )
    note = text_bar(width, [("boxes are drawn from the score on above which 70 % are right in the test scenes", None)])
    return stack([side_by_side(heads, GAP), *rows, key, legend, note], GAP)


def _row(
    val: CocoSplit, image_id: int, models: Mapping[str, TrainedDetector], thresholds: Mapping[str, float]
) -> np.ndarray:
    """Put a picture with its objects, its patches and what each model finds side by side, in equal columns."""
    pixels = read_image(val, image_id)
    size = models["adaptive"].model.transform.max_size * ENLARGED
    found = [_truth(val, image_id), *(model.predict(pixels, thresholds[twin]) for twin, model in models.items())]
    colours = [PALETTE[i % len(PALETTE)] for i in range(len(val.names))]
    truth, *others = (draw_detections(pixels, one, val.names, colours, size) for one in found)
    pictures = [truth, draw_detector_patches(models["adaptive"], pixels), *others]
    height = max(picture.shape[0] for picture in pictures)
    return side_by_side([_from_top(picture, height, size) for picture in pictures], GAP)


def _from_top(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    return fit_canvas(picture[::-1], height, width)[::-1]


def _truth(val: CocoSplit, image_id: int) -> Detections:
    """Return the objects of a scene as detections without scores."""
    boxes, labels = read_boxes(val, image_id)
    masks = np.array(read_objects(val, image_id)[0], bool)
    return Detections(
        boxes, np.full(len(labels), np.nan), np.array(labels, np.int64) - 1, masks if len(labels) else None
    )


def draw_detector_patches(model: TrainedDetector, pixels: np.ndarray) -> np.ndarray:
    """Draw the patches that the detector cuts a picture into, above the number of tokens."""
    images, _ = model.model.transform([to_grey_levels(pixels)[0] / 255])
    patches = choose_patches(model.backbone.patches, images.tensors)
    height, width = (side * ENLARGED for side in images.image_sizes[0])
    shown = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC)
    drawn = draw_patches(shown, patches.scale_map[0].numpy(), model.backbone.patch_size * ENLARGED)
    return stack([drawn, text_bar(drawn.shape[1], [(describe_tokens(patches), None)])])
