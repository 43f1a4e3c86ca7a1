"""Draw what the segmentation twins predict."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import nn

from apt_dense.drawing import draw_patches

from demo.build_and_run_segmentors import partition, predict
from shared.photo_files import read_photo
from shared.picture_layout import (
    describe_tokens,
    fit_canvas,
    paint_labels,
    patch_key,
    side_by_side,
    stack,
    text_bar,
)

TITLES = ("picture", "patches", "uniform model", "adaptive model", "truth")
SHOWN_PATCH = 10  # pixels of the smallest patches
COLUMN = 440  # pixels that the widest picture takes
GAP = 8  # pixels between pictures


def draw_sheet(
    models: Mapping[str, nn.Module], scenes: Sequence[Path], photos: Sequence[np.ndarray], classes: Mapping[str, Any]
) -> np.ndarray:
    """Draw test scenes, then whole photos, each with its patches, what each twin predicts, and the truth if known.

    Args:
        models: of both twins.
        scenes: pictures of the demo data; their masks are found from their paths.
        classes: names and colours, a data set's ``metainfo``.
    """
    rows = [_row(models, read_photo(path), classes["palette"], read_truth(path)) for path in scenes]
    rows += [_row(models, photo, classes["palette"], None) for photo in photos]
    width = rows[0].shape[1]
    heads = [text_bar(width // len(TITLES) - GAP, [(title, None)]) for title in TITLES]
    backbone = models["adaptive"].backbone
    key = text_bar(width, patch_key(backbone.patch_size, backbone.patches.num_scales))
    legend = text_bar(width, [("classes", None), *zip(classes["classes"], map(tuple, classes["palette"]), strict=True)])
    return stack([side_by_side(heads, GAP), *rows, key, legend], GAP)


def read_truth(scene: Path) -> np.ndarray:
    """Read the class of each pixel (H, W) of a scene of the demo data."""
    path = scene.parents[2] / "annotations" / scene.parent.name / f"{scene.stem}.png"
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED).astype(np.int64) - 1


def _row(models: Mapping[str, nn.Module], image: np.ndarray, palette: list, truth: np.ndarray | None) -> np.ndarray:
    """Put pictures of one width side by side, enlarged so that the smallest patches can be told apart."""
    factor = SHOWN_PATCH / models["adaptive"].backbone.patch_size
    patches = partition(models["adaptive"], image)
    shown = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    pictures = [shown, draw_patches(shown, patches.scale_map[0].numpy(), SHOWN_PATCH)]
    labels = [predict(model, image) for model in models.values()] + ([] if truth is None else [truth])
    for label in labels:
        large = cv2.resize(label.astype(np.uint8), shown.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        pictures.append(paint_labels(shown, large, palette))
    pictures += [np.full((*shown.shape[:2], 3), 255, np.uint8)] * (len(TITLES) - len(pictures))
    row = side_by_side([fit_canvas(picture, shown.shape[0], COLUMN) for picture in pictures], GAP)
    return stack([row, text_bar(1, [(describe_tokens(patches), None)], 13)])
