"""Draw what the detection twins find."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import torch
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from apt_dense.drawing import draw_patches
from apt_dense.hosts.trained_models import TrainedDetector

from shared.normalise import to_grey_levels
from shared.picture_layout import Colour, describe_tokens, side_by_side, stack, text_bar
from shared.token_counts import choose_patches
from torchvision_detection.data import CocoSplit, read_image, read_objects

TITLE = "scene and its objects | patches | found by the uniform model | found by the adaptive model"
GAP = 8  # pixels between pictures
SURE = 0.15  # lowest score of a box that is drawn: models that saw so little are never sure
PALETTE: tuple[Colour, ...] = (
    (240, 150, 40), (190, 60, 50), (80, 170, 60), (130, 140, 160), (235, 230, 200), (150, 110, 200), (240, 210, 60),
    (250, 120, 150),
)  # fmt: skip


def draw_sheet(val: CocoSplit, image_ids: Sequence[int], models: Mapping[str, TrainedDetector]) -> np.ndarray:
    """Draw images with their objects, their patches, and what each twin finds in them."""
    rows = [_row(val, image_id, models) for image_id in image_ids]
    width = rows[0].shape[1]
    legend = text_bar(width, [(name, PALETTE[i % len(PALETTE)]) for i, name in enumerate(val.names)])
    return stack([text_bar(width, [(TITLE, None)]), *rows, legend], GAP)


def _row(val: CocoSplit, image_id: int, models: Mapping[str, TrainedDetector]) -> np.ndarray:
    """Put a picture with its objects, its patches and what each model finds side by side."""
    pixels = read_image(val, image_id)
    masks, labels = read_objects(val, image_id)
    truth = draw_objects(pixels, np.array(masks, bool), labels)
    found = []
    for model in models.values():
        objects = model.predict(pixels, SURE)
        found.append(draw_objects(pixels, objects.masks, (objects.labels + 1).tolist()))
    return side_by_side([truth, draw_detector_patches(models["adaptive"].model, pixels), *found], GAP)


def draw_objects(pixels: np.ndarray, masks: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Draw masks (n, H, W) bool of labels from 1, and their boxes, over pixels (H, W, 3) uint8."""
    filled = [i for i, mask in enumerate(masks) if mask.any()]
    if not filled:
        return pixels
    chosen = torch.from_numpy(np.ascontiguousarray(masks[filled]))
    colours = [tuple(PALETTE[(labels[i] - 1) % len(PALETTE)]) for i in filled]
    drawn = draw_segmentation_masks(
        torch.from_numpy(pixels.copy()).permute(2, 0, 1), chosen, alpha=0.45, colors=colours
    )
    boxes = torch.tensor([_box(mask) for mask in masks[filled]], dtype=torch.float32)
    return draw_bounding_boxes(drawn, boxes, colors=colours, width=2).permute(1, 2, 0).numpy()


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    y, x = np.nonzero(mask)
    return x.min(), y.min(), x.max() + 1, y.max() + 1


def draw_detector_patches(model: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    """Draw the patches that the detector cuts a picture into, at the size that it resizes pictures to."""
    images, _ = model.transform([to_grey_levels(pixels)[0] / 255])
    patches = choose_patches(model.backbone.net.patches, images.tensors)
    height, width = images.image_sizes[0]
    shown = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    drawn = draw_patches(shown, patches.scale_map[0].numpy(), model.backbone.net.patch_size)
    drawn = cv2.resize(drawn, pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
    return stack([drawn, text_bar(drawn.shape[1], [(describe_tokens(patches), None)])])
