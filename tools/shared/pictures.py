"""Draw patch partitions, label maps and captions onto photographs.

All images are (H, W, 3) uint8 RGB in [0, 255]; drawing never changes its input.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = Sequence[int]  # (R, G, B) in [0, 255]

# Patches of scale 1, 2, ... are tinted so; those of scale 0 are left as they are.
SCALE_COLOURS = ((0, 225, 255), (255, 0, 190), (255, 225, 0), (110, 90, 255))  # hues that are rare in photographs
TINT = 0.25  # share of the tint inside a coarse patch
EDGE = 0.85  # share of the tint on its border
FINE_EDGE = 0.4  # share of black (in dark cells: white) on the border of a patch of scale 0
DROPPED_LIGHT = 0.25  # brightness of cells without a token
INK, PAPER = (20, 20, 20), (255, 255, 255)


def draw_patches(image: np.ndarray, scale_map: np.ndarray, patch_size: int, line: int = 1) -> np.ndarray:
    """Draw the outline of every patch, and tint each patch of scale 1 and more by its scale.

    Args:
        image: (H, W, 3).
        scale_map: (h, w) integers that cover the image: scale of the patch over each cell, -1 where none is.
        patch_size: pixels of a cell in this image, which may be an enlarged one.
        line: width of the outlines in pixels.
    """
    height, width = image.shape[:2]
    scale = scale_map.repeat(patch_size, axis=0).repeat(patch_size, axis=1)[:height, :width].astype(np.int64)
    edge = _patch_edges(scale, patch_size, line)
    drawn = image.astype(np.float32)
    for number in range(1, scale.max(initial=0) + 1):
        colour = np.array(scale_colour(number), np.float32)
        share = np.where(edge, EDGE, TINT)[scale == number, None].astype(np.float32)
        drawn[scale == number] += (colour - drawn[scale == number]) * share
    fine = edge & (scale == 0)
    drawn[fine] += (_contrast(image, patch_size)[fine] - drawn[fine]) * FINE_EDGE
    drawn[scale < 0] *= DROPPED_LIGHT
    return np.rint(drawn).astype(np.uint8)


def _patch_edges(scale: np.ndarray, patch_size: int, line: int) -> np.ndarray:
    """Which pixels (H, W) lie on the top or left edge of their patch, given the scale of each pixel's patch.

    The next patch draws the other two edges, and the image's border the last ones.
    """
    size = patch_size << np.maximum(scale, 0)
    y, x = np.ogrid[: scale.shape[0], : scale.shape[1]]
    return (y % size < line) | (x % size < line) | (y >= scale.shape[0] - line) | (x >= scale.shape[1] - line)


def _contrast(image: np.ndarray, patch_size: int) -> np.ndarray:
    """White where a cell is dark, black elsewhere: (H, W, 1) float32, so that a line does not flicker along its way."""
    height, width = image.shape[:2]
    cells = cv2.resize(image, (-(-width // patch_size), -(-height // patch_size)), interpolation=cv2.INTER_AREA)
    dark = (cells.mean(axis=2) < 90).repeat(patch_size, axis=0).repeat(patch_size, axis=1)
    return np.where(dark[:height, :width, None], 255, 0).astype(np.float32)


def scale_colour(scale: int) -> tuple[int, int, int]:
    """The tint of scale 1, 2, ...; for scale 0 a grey, which only legends use."""
    return SCALE_COLOURS[(scale - 1) % len(SCALE_COLOURS)] if scale else (128, 128, 128)


def paint_labels(image: np.ndarray, labels: np.ndarray, palette: Sequence[Colour], share: float = 0.65) -> np.ndarray:
    """Mix the colours of a label map (H, W) into the image's brightness; labels beyond the palette stay grey."""
    grey = image.mean(axis=2, keepdims=True)
    colours = np.array([*palette, (128, 128, 128)], np.float32)[np.minimum(labels, len(palette))]
    return np.rint(grey + (colours - grey) * share).astype(np.uint8)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, ``size`` pixels high."""
    return ImageFont.load_default(size)


def text_bar(width: int, entries: Sequence[tuple[str, Colour | None]], size: int = 16) -> np.ndarray:
    """A white bar of at least ``width`` pixels with texts side by side, each behind a square of its colour if it has one.

    Entries that do not fit go to the next line; a single one that is too long widens the bar.
    """
    gap, height = size // 2, 2 * size
    swatches = [size + gap if colour is not None else 0 for _, colour in entries]
    lengths = [round(font(size).getlength(text)) + swatch for (text, _), swatch in zip(entries, swatches, strict=True)]
    width = max([width, *(length + 2 * gap for length in lengths)])
    places = _flow(lengths, width - gap, gap, 2 * gap)
    bar = Image.new("RGB", (width, height * (places[-1][1] + 1 if places else 1)), PAPER)
    draw = ImageDraw.Draw(bar)
    for (text, colour), swatch, (x, row) in zip(entries, swatches, places, strict=True):
        middle = row * height + height // 2
        if colour is not None:
            draw.rectangle((x, middle - size // 2, x + size - 1, middle + size // 2 - 1), tuple(colour), INK)
        draw.text((x + swatch, middle), text, INK, font(size), anchor="lm")
    return np.asarray(bar)


def _flow(lengths: Sequence[int], right: int, left: int, gap: int) -> list[tuple[int, int]]:
    """Where boxes of these lengths go, line after line between ``left`` and ``right``: (x, line) of each."""
    places, x, line = [], left, 0
    for length in lengths:
        if x > left and x + length > right:
            x, line = left, line + 1
        places.append((x, line))
        x += length + gap
    return places


def stack(images: Sequence[np.ndarray], gap: int = 0) -> np.ndarray:
    """Images below each other, left-aligned on white, ``gap`` pixels apart."""
    width = max(image.shape[1] for image in images)
    rows = [fit_canvas(image, image.shape[0] + gap * (number > 0), width) for number, image in enumerate(images)]
    return np.concatenate(rows)


def side_by_side(images: Sequence[np.ndarray], gap: int = 0) -> np.ndarray:
    """Images beside each other, top-aligned on white, ``gap`` pixels apart."""
    return stack([image.swapaxes(0, 1) for image in images], gap).swapaxes(0, 1)


def fit_canvas(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The image at the bottom left of a white canvas that is at least as large."""
    canvas = np.full((height, width, 3), 255, np.uint8)
    canvas[height - image.shape[0] :, : image.shape[1]] = image
    return canvas


def resize_longer_side(image: np.ndarray, longer: int) -> np.ndarray:
    """Resize to ``longer`` pixels along the longer side, keeping the shape: area averages down, cubic up."""
    scale = longer / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write beside ``path``, then rename, so that no half-written picture has its name. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes())
    os.replace(partial, path)


def describe_tokens(per_scale: Sequence[int], cells: int) -> str:
    """For example "tokens kept 1234 of 4096 (30 %)"."""
    kept = sum(per_scale)
    return f"tokens kept {kept} of {cells} ({100 * kept / cells:.0f} %)"


def token_caption(per_scale: Sequence[int], cells: int, patch_size: int) -> list[tuple[str, Colour | None]]:
    """Entries of a ``text_bar``: the share of tokens kept, then the number of patches of each size."""
    sizes = [(f"{patch_size << s} px: {count}", scale_colour(s) if s else PAPER) for s, count in enumerate(per_scale)]
    return [(describe_tokens(per_scale, cells), None), *sizes]
