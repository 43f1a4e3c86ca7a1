"""Captions, legends and label maps on pictures, and pictures next to each other.

All pictures are (H, W, 3) uint8 RGB in [0, 255]; no function changes its input.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from apt_dense.drawing import scale_colour
from apt_dense.weights.files import write_whole

from shared.token_counts import Patches

Colour = Sequence[int]  # (R, G, B) in [0, 255]

INK = (20, 20, 20)
PAPER = (255, 255, 255)


def paint_labels(image: np.ndarray, labels: np.ndarray, palette: Sequence[Colour], share: float = 0.65) -> np.ndarray:
    """Mix the colours of a label map (H, W) into the image's brightness; labels beyond the palette become grey."""
    grey = image.mean(axis=2, keepdims=True)
    colours = np.array([*palette, (128, 128, 128)], np.float32)[np.minimum(labels, len(palette))]
    return np.rint(grey + (colours - grey) * share).astype(np.uint8)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font, ``size`` pixels high."""
    return ImageFont.load_default(size)


def text_bar(width: int, entries: Sequence[tuple[str, Colour | None]], size: int = 16) -> np.ndarray:
    """Write texts side by side on a white bar of at least ``width`` pixels, each after a square of its colour if any.

    Entries that do not fit go to the next line; a single entry that is too long widens the bar.
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
    """Place boxes of these lengths line after line between ``left`` and ``right``; return (x, line) of each."""
    places, x, line = [], left, 0
    for length in lengths:
        if x > left and x + length > right:
            x, line = left, line + 1
        places.append((x, line))
        x += length + gap
    return places


def stack(images: Sequence[np.ndarray], gap: int = 0) -> np.ndarray:
    """Put images below each other, left-aligned on white, ``gap`` pixels apart."""
    width = max(image.shape[1] for image in images)
    rows = [fit_canvas(image, image.shape[0] + gap * (number > 0), width) for number, image in enumerate(images)]
    return np.concatenate(rows)


def side_by_side(images: Sequence[np.ndarray], gap: int = 0) -> np.ndarray:
    """Put images next to each other, top-aligned on white, ``gap`` pixels apart."""
    return stack([image.swapaxes(0, 1) for image in images], gap).swapaxes(0, 1)


def fit_canvas(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Put the image at the bottom left of a white canvas that is at least as large."""
    canvas = np.full((height, width, 3), 255, np.uint8)
    canvas[height - image.shape[0] :, : image.shape[1]] = image
    return canvas


def resize_within(image: np.ndarray, scale: Sequence[int]) -> np.ndarray:
    """Resize a picture as MMCV's Resize with keep_ratio: the longer side to at most max(scale) pixels, and the shorter
    one to at most min(scale)."""
    height, width = image.shape[:2]
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    size = max(1, int(width * factor + 0.5)), max(1, int(height * factor + 0.5))
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def resize_longer_side(image: np.ndarray, longer: int) -> np.ndarray:
    """Resize to ``longer`` pixels along the longer side, keeping the proportions: area averages down, cubic up."""
    scale = longer / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write a picture as PNG, whole or not at all. Raises OSError."""
    with write_whole(path) as partial:
        partial.write_bytes(cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes())


def describe_tokens(patches: Patches) -> str:
    """Describe the patches of one image, for example "tokens kept 1234 of 4096 (30 %)"."""
    kept = patches.per_scale.sum().item()
    return f"tokens kept {kept} of {patches.cells} ({100 * patches.tokens_kept:.0f} %)"


def patch_key(patch_size: int, num_scales: int, shown: str = "patches of") -> list[tuple[str, Colour | None]]:
    """Return entries of a ``text_bar``: the colour in which patches of each size are drawn."""
    sizes = [(f"{patch_size << s} pixels", scale_colour(s) if s else PAPER) for s in range(num_scales)]
    return [(shown, None), *sizes]


def token_caption(patches: Patches, patch_size: int) -> list[tuple[str, Colour | None]]:
    """Return entries of a ``text_bar``: the share of tokens kept, then the number of patches of each size."""
    counts = enumerate(patches.per_scale[0].tolist())
    sizes = [(f"{patch_size << s} px: {count}", scale_colour(s) if s else PAPER) for s, count in counts]
    return [(describe_tokens(patches), None), *sizes]
