"""Videos made of one photo: a camera that stands still while something passes, and one that pans."""

from collections.abc import Iterator

import numpy as np

PASSING = 1 / 6  # of the shorter side: the square that passes by


def still_camera(photo: np.ndarray, frames: int, step: int) -> Iterator[np.ndarray]:
    """The photo (H, W, 3) uint8, across whose middle a striped square moves by ``step`` pixels a frame."""
    height, width = photo.shape[:2]
    side = max(2, round(PASSING * min(height, width)))
    stripes = np.where(np.arange(side)[:, None, None] // 4 % 2, np.uint8(230), np.uint8(20))
    top, range_of_left = (height - side) // 2, max(1, width - side)
    for number in range(frames):
        left = number * step % range_of_left
        frame = photo.copy()
        frame[top : top + side, left : left + side] = stripes
        yield frame


def panning_camera(photo: np.ndarray, frames: int, step: int) -> Iterator[np.ndarray]:
    """Parts of the photo, ``step`` pixels further to the right each frame; all of the same size.

    Raises:
        ValueError: if the photo is not wide enough for that many.
    """
    width = photo.shape[1] - (frames - 1) * step
    if width < 1:
        raise ValueError(
            f"a photo {photo.shape[1]} pixels wide is too narrow for {frames} frames {step} pixels apart; give fewer "
            f"--frames or a smaller --step"
        )
    return (photo[:, number * step : number * step + width] for number in range(frames))


def with_noise(frames: Iterator[np.ndarray], deviation: float) -> Iterator[np.ndarray]:
    """Frames with a camera's noise: normal, of that standard deviation in grey levels, other in each frame."""
    for number, frame in enumerate(frames):
        noise = np.random.default_rng(number).normal(0, deviation, frame.shape) if deviation else 0
        yield np.clip(np.rint(frame + noise), 0, 255).astype(np.uint8)
