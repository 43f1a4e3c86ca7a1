"""The choice of patches in one object without weights: images -> scale maps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from apt_dense.option_checks import option, optional, pair, whole
from apt_dense.options import PatchOptions
from apt_dense.patches.budget import keep_at_least, least_tokens, partition_by_budget, wanted_tokens
from apt_dense.patches.image_preparation import are_finite, check_finite, check_images, filled_region, whole_patches
from apt_dense.patches.partition import Bounds, count_tokens, partition_by_thresholds
from apt_dense.patches.regions import Region, Regions, regions_of
from apt_dense.patches.scores import resolve_scorer, score_maps
from apt_dense.runtime import as_constants, is_compiling, is_exporting, is_tracing, outside_graphs

Result = TypeVar("Result")


@dataclass(frozen=True)
class PatchSelector(PatchOptions):
    """Cuts images into patches, as the ``APTViT`` with these options does.

        selector = PatchSelector(patch_size=16, thresholds=(5.5, 4.0))
        scales = selector.scale_map(images)  # normalised (B, 3, H, W) -> (B, H / 16, W / 16)
        counts = selector.count(images)      # (B, 3): patches of 16, 32 and 64 pixels

    Args:
        thresholds, token_budget, scorer, drop_padding, partial_patches, pixel_mean, pixel_std, channel_order,
            min_tokens, keep_fine, keep_coarse: as for :class:`apt_dense.options.PatchOptions`.
        patch_size: pixels of the smallest patches.
        window_size: cells of the attention windows, whose borders no patch crosses; 0 for none.
        in_chans: image channels; with thresholds, 3, or 1 of grey images.
        img_size: pixels (H, W) that the model is made for, at which thresholds and budget are checked; None for none.

    Raises:
        ValueError, TypeError: for options out of range, naming option, value and remedy.
    """

    patch_size: int = option(16, whole(1))
    window_size: int = option(0, whole(0))
    in_chans: int = option(3, whole(1))
    img_size: tuple[int, int] | None = option(None, optional(pair))

    def _check_together(self) -> None:
        super()._check_together()
        self._set(score=resolve_scorer(self.scorer, self.pixel_format))
        if self.thresholds:
            self._check_channels()
        self._check_scales()
        if self.img_size is not None and self.token_budget is not None:
            self._check_budget()
        if self.min_tokens is not None:
            self._check_minimum()

    def _check_channels(self) -> None:
        if self.in_chans not in (1, 3):
            raise ValueError(
                f"in_chans={self.in_chans} with thresholds={self.thresholds}: only RGB and grey images have scores"
            )
        if self.in_chans == 1 and len({*self.pixel_mean}) + len({*self.pixel_std}) > 2:
            raise ValueError(
                f"in_chans=1 with pixel_mean={self.pixel_mean} and pixel_std={self.pixel_std}: a grey image has one "
                f"mean and one deviation; give each three times"
            )

    def _check_scales(self) -> None:
        scales, coarsest = len(self.thresholds), self.patch_size * 2 ** len(self.thresholds)
        if scales and self.img_size is not None and coarsest > max(self.img_size):
            raise ValueError(
                f"thresholds={self.thresholds!r}: the patch of scale {scales} is {coarsest} pixels wide, more than "
                f"img_size={self.img_size}; give at most {_doublings(max(self.img_size) / self.patch_size)} thresholds"
            )
        if scales and self.window_size and 2**scales > self.window_size:
            raise ValueError(
                f"thresholds={self.thresholds!r}: the patch of scale {scales} covers {2**scales} cells, more than "
                f"window_size={self.window_size}; give at most {_doublings(self.window_size)} thresholds"
            )

    def _check_minimum(self) -> None:
        if self.token_budget is not None:
            raise ValueError(
                f"min_tokens={self.min_tokens!r} with token_budget={self.token_budget!r}: a budget is the number of "
                f"tokens; give one of them"
            )
        if min(self.thresholds, default=1) <= 0:
            raise ValueError(
                f"min_tokens={self.min_tokens!r} with thresholds={self.thresholds}: give positive ones; their ratios "
                f"say which of two merges of different scales is made first"
            )

    def _check_budget(self) -> None:
        grid = tuple(-(-size // self.patch_size) for size in self.img_size)
        least = self._least_tokens(grid)
        if wanted_tokens(self.token_budget, grid) < least:
            raise ValueError(
                f"token_budget={self.token_budget!r} cannot be held: {grid[0]} x {grid[1]} patches leave up to {least} "
                f"tokens when all are merged; give more thresholds (larger patches) or a budget of at least {least}"
            )

    @torch.no_grad()
    def scale_map(self, images: Tensor, keep_fine: Region | None = None, keep_coarse: Region | None = None) -> Tensor:
        """The scale of the patch that covers each cell: (B, H / p, W / p) int8, -1 where padding is dropped.

        Sizes are rounded up (``partial_patches="pad"``) or down ("crop"). Draw it (``apt_dense.draw_patches``) to see
        what the model sees.

        Args:
            images: (B, in_chans, H, W) normalised floating point.
            keep_fine: where patches stay small: a mask (B, H, W) bool of the pixels, boxes x1, y1, x2, y2 in pixels as
                one tensor (n, 4) per image, or a function that makes either from the images. A cell that touches a
                marked pixel (of a box: one that it overlaps) stays at scale 0. With a token budget, merges of such
                cells are made last, and only where the budget cannot be held without them. None for the option's.
            keep_coarse: the same for where they are large whatever their score: a patch wholly inside stays whole
                unless it crosses the border of a window or of padding, or touches ``keep_fine``. With a token budget,
                such merges are made first, and tokens that are left go to the rest of the image.

        Raises:
            ValueError: for a wrong shape or number of channels, and for NaN or infinite pixels.
            TypeError: for images that are not floating point, and masks that are not bool.
        """
        whole = self.whole_patches(images)
        check_finite(are_finite(whole).tolist())
        return self.partition(whole, self.regions(images, keep_fine, keep_coarse))

    def regions(
        self, images: Tensor, keep_fine: Region | None = None, keep_coarse: Region | None = None
    ) -> Regions | None:
        """Those of :meth:`scale_map`, or else the options', for :meth:`partition`; None if there are none."""
        keep_fine = self.keep_fine if keep_fine is None else keep_fine
        keep_coarse = self.keep_coarse if keep_coarse is None else keep_coarse
        return regions_of(images, keep_fine, keep_coarse, self.patch_size, self.partial_patches)

    def count(self, images: Tensor, keep_fine: Region | None = None, keep_coarse: Region | None = None) -> Tensor:
        """Patches of each scale (B, number of scales) int64 that images are cut into. See :meth:`scale_map`."""
        return count_tokens(self.scale_map(images, keep_fine, keep_coarse), self.num_scales)

    def tokens_kept(self, images: Tensor, keep_fine: Region | None = None, keep_coarse: Region | None = None) -> Tensor:
        """Tokens of each image as a share (B,) of the base grid's cells. See :meth:`scale_map`."""
        scale_map = self.scale_map(images, keep_fine, keep_coarse)
        return count_tokens(scale_map, self.num_scales).sum(1) / scale_map[0].numel()

    @property
    def fixes_shapes(self) -> bool:
        """Check whether shapes depend on the sizes of the images alone: with a budget, and where a graph is made of a
        model that chooses nothing."""
        return self.token_budget is not None or (is_compiling() and self._chooses_nothing)

    @property
    def _chooses_nothing(self) -> bool:
        return not self.thresholds and not self.drop_padding

    def whole_patches(self, images: Tensor) -> Tensor:
        """Checked images, padded or cropped to whole patches."""
        images = check_images(images, self.in_chans)
        if self.fixes_shapes:
            as_constants(images.shape)
        return whole_patches(images, self.patch_size, self.partial_patches)

    def outside_graphs(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """The function, kept out of compiled graphs unless all shapes are fixed (:attr:`fixes_shapes`).

        Raises:
            ValueError: for graphs that can have no part outside: those of ``torch.export`` and ``torch.jit.trace``.
        """
        if self.fixes_shapes:
            return function
        if is_exporting() or (is_tracing() and not self._chooses_nothing):
            raise ValueError(
                f"{'torch.export' if is_exporting() else 'torch.jit.trace'} with thresholds={self.thresholds}, "
                f"drop_padding={self.drop_padding} and no token_budget: the number of tokens depends on the image, and "
                f"such a graph is the same for all. Set token_budget, or thresholds=() and drop_padding=False"
            )
        return outside_graphs(function)

    @torch.no_grad()
    def partition(self, images: Tensor, regions: Regions | None = None) -> Tensor:
        """:meth:`scale_map` of images that consist of whole patches and are known to be finite."""
        batch, _, height, width = images.shape
        grid = height // self.patch_size, width // self.patch_size
        if self._chooses_nothing:
            return torch.zeros(batch, *grid, dtype=torch.int8, device=images.device)
        bounds = Bounds(filled_region(images), grid, self.patch_size, self.window_size)
        scores = self.scores(images)
        if self.token_budget is not None:
            tokens = self.tokens_per_image(grid)
            return partition_by_budget(scores, self.thresholds, bounds, tokens, self.drop_padding, regions)
        scale_map = partition_by_thresholds(scores, self.thresholds, bounds, regions)
        scale_map = bounds.drop_padding(scale_map) if self.drop_padding else scale_map
        if self.min_tokens is None:
            return scale_map
        return keep_at_least(self.min_tokens, scale_map, scores, self.thresholds, bounds, regions)

    def scores(self, images: Tensor) -> tuple[Tensor, ...]:
        """One score map (B, H // size, W // size) per threshold, size = patch_size * 2**scale, of normalised images."""
        scales = range(1, self.num_scales)
        return score_maps(images, self.patch_size, scales, self.score, self.pixel_format)

    def tokens_per_image(self, grid: tuple[int, int]) -> int:
        """Tokens that the budget gives each image of a grid: at least as many as any image can be cut into; all if
        there is no budget.

        Where no padding is dropped, a number that merges reach exactly: every image fills all of its tokens.
        """
        total = grid[0] * grid[1]
        if self.token_budget is None:
            return total
        tokens = max(min(wanted_tokens(self.token_budget, grid), total), self._least_tokens(grid))
        return tokens if self.drop_padding else total - 3 * -((tokens - total) // 3)

    def _least_tokens(self, grid: tuple[int, int]) -> int:
        return least_tokens(tuple(grid), len(self.thresholds), self.window_size, self.drop_padding)


def _doublings(factor: float) -> int:
    """Count how often 1 can be doubled without exceeding the factor; 0 for factors below 1."""
    return max(0, int(math.log2(factor)))
