"""Draw the patches of a scale map onto a picture. Arrays or tensors in, a NumPy array out; no file is touched."""

from typing import Any

import numpy as np

#: Tints (R, G, B) of patches of scale 1, 2, ...: hues that are rare in photographs. Scale 0 keeps its colours.
SCALE_COLOURS = ((0, 225, 255), (255, 0, 190), (255, 225, 0), (110, 90, 255))
TINT = 0.25  # share of the tint inside a coarse patch
EDGE = 0.85  # share of the tint on its border
FINE_EDGE = 0.4  # share of black (in dark cells: white) on the border of a patch of scale 0
DARK = 90  # mean grey level below which a cell counts as dark
DROPPED_LIGHT = 0.25  # brightness of cells without a token


def scale_colour(scale: int) -> tuple[int, int, int]:
    """Return the tint of scale 1, 2, ...; for scale 0 a grey, which only legends use."""
    return SCALE_COLOURS[(scale - 1) % len(SCALE_COLOURS)] if scale else (128, 128, 128)


def draw_patches(
    image: np.ndarray, scale_map: np.ndarray, patch_size: int, line: int = 1, strength: float = 1.0
) -> np.ndarray:
    """Draw the outline of every patch, and tint each patch of scale 1 and more by its scale.

    Args:
        image: (H, W, 3) uint8 RGB in [0, 255]; it is not changed.
        scale_map: (h, w) integers: the scale of the patch over each cell, -1 where there is none. The cells must cover
            the image; what lies beyond its edges is ignored. Tensors are taken for either, on any device.
        patch_size: pixels of a cell in this image, which may be enlarged.
        line: width of the outlines in pixels.
        strength: of the outlines, in [0, 1]. Lower it for pictures of many small patches, which outlines would hide.

    Returns:
        A new picture (H, W, 3) uint8.

    Raises:
        ValueError: if an argument has another shape or type, or the cells do not cover the image.
    """
    image, scale_map = _to_numpy(image), _to_numpy(scale_map)
    _check(image, scale_map, patch_size, line)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength} must be in [0, 1]")
    scale = _per_pixel(scale_map, patch_size, image.shape[:2]).astype(np.int64)
    edge = _patch_edges(scale, patch_size, line)
    drawn = image.astype(np.float32)
    for number in range(1, scale.max(initial=0) + 1):
        colour = np.array(scale_colour(number), np.float32)
        share = np.where(edge, TINT + (EDGE - TINT) * strength, TINT)[scale == number, None].astype(np.float32)
        drawn[scale == number] += (colour - drawn[scale == number]) * share
    fine = edge & (scale == 0)
    drawn[fine] += (_contrast(image, scale_map.shape, patch_size)[fine] - drawn[fine]) * (FINE_EDGE * strength)
    drawn[scale < 0] *= DROPPED_LIGHT
    return np.rint(drawn).astype(np.uint8)


def _to_numpy(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _check(image: np.ndarray, scale_map: np.ndarray, patch_size: int, line: int) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} of shape {image.shape}; expected uint8 (H, W, 3) in [0, 255]")
    if scale_map.ndim != 2 or scale_map.dtype.kind not in "iu":
        one = ", such as scale_map[0] of a batch" if scale_map.ndim == 3 else ""
        raise ValueError(f"scale_map is {scale_map.dtype} of shape {scale_map.shape}; expected integers (h, w){one}")
    if patch_size < 1 or line < 1:
        raise ValueError(f"patch_size={patch_size} and line={line}: expected pixels, at least 1")
    covered = tuple(cells * patch_size for cells in scale_map.shape)
    if any(pixels < side for pixels, side in zip(covered, image.shape[:2], strict=True)):
        raise ValueError(
            f"scale_map of shape {scale_map.shape} covers {covered} pixels, fewer than the image's {image.shape[:2]}; "
            f"patch_size={patch_size} must be the pixels of a cell in this image"
        )


def _per_pixel(cells: np.ndarray, patch_size: int, size: tuple[int, int]) -> np.ndarray:
    """Repeat the values of cells (h, w) over their pixels, cut to an image's size (H, W)."""
    return cells.repeat(patch_size, axis=0).repeat(patch_size, axis=1)[: size[0], : size[1]]


def _patch_edges(scale: np.ndarray, patch_size: int, line: int) -> np.ndarray:
    """Find the pixels (H, W) on the top or left edge of their patch, given the scale of each pixel's patch.

    The next patch draws the other two edges, and the image's border the last ones.
    """
    size = patch_size << np.maximum(scale, 0)
    y, x = np.ogrid[: scale.shape[0], : scale.shape[1]]
    return (y % size < line) | (x % size < line) | (y >= scale.shape[0] - line) | (x >= scale.shape[1] - line)


def _contrast(image: np.ndarray, grid: tuple[int, int], patch_size: int) -> np.ndarray:
    """Return white where a cell is dark, black elsewhere: (H, W, 1) float32. By cell, so that lines do not flicker."""
    dark = _cell_means(image.mean(axis=2), grid, patch_size) < DARK
    return np.where(_per_pixel(dark, patch_size, image.shape[:2])[..., None], 255, 0).astype(np.float32)


def _cell_means(grey: np.ndarray, grid: tuple[int, int], patch_size: int) -> np.ndarray:
    """Average a picture (H, W) over the cells of a grid (h, w); those at the edges over the part inside."""
    height, width = grey.shape
    padding = (0, max(0, grid[0] * patch_size - height)), (0, max(0, grid[1] * patch_size - width))
    sums, counts = (
        np.pad(values, padding).reshape(grid[0], patch_size, grid[1], patch_size).sum(axis=(1, 3))
        for values in (grey, np.ones_like(grey))
    )
    return sums / np.maximum(counts, 1)
