"""Scores of a video: where nothing moved, a patch keeps the scores of an earlier frame, and so is cut as it was.

Noise of a camera moves scores a little in each frame, and those near a threshold cross it back and forth: a detector
then sees the same wall in other patches each time. Here a patch gets new scores only when something in it moved.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from apt_dense.options import PixelFormat
from apt_dense.patches.blocks_of_pixels import block_means, blocks, enlarged, grey_levels
from apt_dense.patches.scores import Scorer, resolve_scorer
from apt_dense.runtime import is_compiling

_LARGEST_BLOCK = 8  # pixels; means of so many hardly feel a camera's noise, and feel small things that move


class _Kept(NamedTuple):
    """State carried over from earlier frames."""

    kinds: tuple[int, ...]  # pixels of a patch, and the scales
    scores: tuple[Tensor, ...]  # one map (B, h, w) per scale
    means: tuple[Tensor, ...]  # per scale, grey levels of blocks (B, H // block, W // block) when scores were made


class FrameScorer:
    """A scorer (``apt_dense.patches.scores.Scorer``) for the frames of a video, one after the other.

        frames = FrameScorer(tolerance=2.0)
        model.set_patches(scorer=frames)
        for frame in video:          # (B, 3, H, W): B videos side by side
            features = model(frame)
        frames.forget()              # before the next video

    It is stateful: use one per video, in eager mode (with a token budget, ``torch.compile`` would trace it). Its state
    is reset if the size, the batch size or the device of the frames changes. Each call must be the next frame, so it
    does not work with sliding windows or test-time augmentation, or if other images are scored in between.

    Args:
        scorer: name, file or callable that makes the scores, as the option ``scorer``.
        tolerance: grey levels (0 to 255) by which the mean of a block of up to 8 x 8 pixels may differ from the frame
            whose scores are kept; where one in a patch differs by as much, the patch gets new scores. 0: all do.
        pixel_format: of the images; their mean is a learned scorer's padding.

    Raises:
        ValueError: for a negative tolerance, or an unknown scorer.
    """

    def __init__(
        self, scorer: str | Scorer = "entropy", tolerance: float = 2.0, pixel_format: PixelFormat | None = None
    ) -> None:
        if not tolerance >= 0:
            raise ValueError(f"tolerance={tolerance!r} must be 0 grey levels or more")
        self.scorer, self.tolerance = resolve_scorer(scorer, pixel_format or PixelFormat()), tolerance
        self._kept: _Kept | None = None

    def forget(self) -> None:
        """Reset the state, so that the next frame is scored from scratch."""
        self._kept = None

    def __call__(self, pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
        """Score pixels (B, 3, H, W) float32 RGB in [0, 255]: one map (B, H // size, W // size) per scale.

        Raises:
            RuntimeError: in a compiled graph, which would not remember.
        """
        if is_compiling():
            raise RuntimeError("FrameScorer remembers earlier frames, which a compiled graph cannot; run in eager mode")
        block = next(size for size in range(_LARGEST_BLOCK, 0, -1) if patch_size % size == 0)
        means = block_means(grey_levels(pixels), block)
        scores = tuple(self.scorer(pixels, patch_size, scales))
        found = _Kept((patch_size, *scales), scores, (means,) * len(scales))
        if self._kept is not None and _alike(self._kept, found):
            sides = [patch_size * 2**scale // block for scale in scales]
            before = self._kept
            maps = map(self._update, before.scores, before.means, found.scores, found.means, sides)
            found = _Kept(found.kinds, *zip(*maps, strict=True))
        self._kept = found
        return found.scores

    def _update(
        self, scores: Tensor, means: Tensor, new_scores: Tensor, new_means: Tensor, side: int
    ) -> tuple[Tensor, Tensor]:
        """Scores (B, h, w) and means of blocks of one scale, whose patches are ``side`` blocks wide, replaced where
        something moved."""
        moved = blocks((new_means - means).abs(), side).amax((2, 4)) >= self.tolerance
        rows, columns = (n * side for n in moved.shape[1:])
        replaced = means.clone()
        inside = replaced[:, :rows, :columns]
        inside.copy_(torch.where(enlarged(moved, side), new_means[:, :rows, :columns], inside))
        return torch.where(moved, new_scores, scores), replaced


def _alike(kept: _Kept, found: _Kept) -> bool:
    """Check whether two frames have the same patches, shapes and device."""
    places = ([(m.shape, m.device) for m in (*each.scores, *each.means)] for each in (kept, found))
    return kept.kinds == found.kinds and next(places) == next(places)
