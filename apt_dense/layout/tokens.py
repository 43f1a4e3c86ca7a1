"""The types of a layout: where every token of a batch lies, and which tokens attend to each other.

The **packed sequence** (R, C) holds the rows of all images one after the other, without padding and without a batch
axis: for each image its prefix rows (class token), then its patches. Patches are ordered by (image, window, place in
the window), row by row, so that windowed and global attention work on the same rows with different offsets.

Shape letters: B images, h x w cells of the base grid, N patches, R = N + B * num_prefix rows, S segments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from apt_dense.runtime import outside_graphs

Result = TypeVar("Result")


class Bucket(NamedTuple):
    """Segments of about the same length, padded to one, so that they run as one batch."""

    rows: Tensor  # (n, L) int64 packed rows; padded places repeat the segment's first row
    valid: Tensor | None  # (n, L) bool, False at padded places; None if there are none


class Segments(NamedTuple):
    """Runs of rows that attend to each other. Lengths (2, 4, 3) have offsets [0, 2, 6, 9]; a segment may be empty."""

    offsets: Tensor  # (S + 1,) int32 on the device, the cu_seqlens of variable-length attention kernels
    total: int  # rows in all, R
    longest: int  # no segment has more rows
    buckets: tuple[Bucket, ...]  # all segments whose outputs matter
    place_R: Tensor  # for each row, its place in the concatenated (n * L) places of all buckets

    @property
    def is_even(self) -> bool:
        """Check whether all segments have the same length, so that the packed rows are a contiguous batch."""
        return len(self.buckets) == 1 and self.buckets[0].valid is None and self.buckets[0].rows.numel() == self.total

    @property
    def mean_length(self) -> float:
        """Rows of a segment whose outputs matter, on average, padding included."""
        count = sum(len(bucket.rows) for bucket in self.buckets)
        return sum(bucket.rows.numel() for bucket in self.buckets) / max(count, 1)


class Cells(NamedTuple):
    """Places of patches inside their segment (a window or the whole grid), for relative positions."""

    size: tuple[int, int]  # rows and columns of cells of a whole segment
    y_N: Tensor  # row of each patch's top left cell
    x_N: Tensor  # and column
    scale_N: Tensor
    num_scales: int
    rows_N: Tensor | None = None  # rows and columns of the patch's segment that lie in the grid, where a window
    columns_N: Tensor | None = None  # may be cut short by its edge; None if every segment is whole


@dataclass(frozen=True, eq=False)  # not a tuple: torch.compile would guard the shape of every tensor in it
class Candidates:
    """The patches of one scale that an embedding is made for, n in all."""

    scale: int
    numbers: Tensor | None  # (n,) which of the layout's patches, ascending; None for every complete patch of the images
    image: Tensor | None  # (n,) image of each patch
    y: Tensor | None  # (n,) base-grid row of its top left cell
    x: Tensor | None  # and column
    batch: int

    @property
    def are_all(self) -> bool:
        """Check whether these are all complete patches of the scale in all images, row by row."""
        return self.numbers is None

    def take(self, maps: Tensor) -> Tensor:
        """Values (B, h >> scale, w >> scale, C) of all patches -> those of the candidates (n, C)."""
        if self.are_all:
            return maps.flatten(0, 2)
        _, h, w, _ = maps.shape
        index = (self.image * h + (self.y >> self.scale)) * w + (self.x >> self.scale)
        return maps.flatten(0, 2).index_select(0, index)  # whose backward is a fast index_add

    def take_shared(self, table: Tensor) -> Tensor:
        """Values (h >> scale, w >> scale, C) that all images share -> those of the candidates (n, C)."""
        if self.are_all:
            return table.expand(self.batch, *table.shape).flatten(0, 2)
        return table.flatten(0, 1).index_select(0, (self.y >> self.scale) * table.shape[1] + (self.x >> self.scale))

    def take_parts(self, cells: Tensor) -> Tensor:
        """Values (B, h, w, C) of the base grid's cells -> those of the cells of each patch (n, 2**s, 2**s, C)."""
        _, h, w, channels = cells.shape
        side = torch.arange(2**self.scale, device=cells.device)
        y, x = self.y.view(-1, 1, 1) + side[:, None], self.x.view(-1, 1, 1) + side
        index = (self.image.view(-1, 1, 1) * h + y) * w + x
        return cells.flatten(0, 2).index_select(0, index.flatten()).view(*index.shape, channels)


@dataclass(frozen=True, eq=False)  # not a tuple, as above
class TokenLayout:
    """The origin of every patch and the packed row that it went to. All index tensors are int64."""

    grid: tuple[int, int]  # h, w
    num_prefix: int  # rows before the patches of each image
    image_N: Tensor  # image of each patch
    scale_N: Tensor
    y_N: Tensor  # base-grid row of its top left cell
    x_N: Tensor  # and column
    candidates: tuple[Candidates, ...]  # for each scale
    source_R: (
        Tensor | None
    )  # each row's place in [candidates of scale 0, of scale 1, ..., prefix of image 0, of 1, ...]
    image_R: Tensor  # image of each row
    scale_R: Tensor  # scale of each row, 0 for prefix rows
    row_Bhw: Tensor  # (B, h, w) row that covers each cell, -1 where none does
    images: Segments  # one per image, prefix included
    windows: Segments | None  # one per window, images in order; None without windows
    image_cells: Cells
    window_cells: Cells | None
    is_fixed: bool = False  # whether its shapes depend on nothing but those of the images (fixed.py)

    @property
    def batch(self) -> int:
        return len(self.row_Bhw)

    @property
    def cuts_windows(self) -> bool:
        """Check whether windows at the edge of the grid are cut short."""
        return self.window_cells is not None and self.window_cells.rows_N is not None

    @property
    def tokens_kept(self) -> float:
        """Patches as a share of the base grid's cells; in fixed shapes the budget's, also where dropped padding leaves
        some of them inert."""
        return len(self.image_N) / self.row_Bhw.numel()

    @property
    def every_cell_has_its_row(self) -> bool:
        """Check whether each cell is a patch and nothing else has a row, so that rows and cells are the same in
        number."""
        return not self.is_fixed and self.row_Bhw.numel() == len(self.image_N) and not self.num_prefix

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows (R, ...) of the values (n, ...) of the candidates of each scale, then of the prefix rows, if any."""
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        return values if self.source_R is None else values.index_select(0, self.source_R)

    def real_rows(self, rows: Tensor) -> Tensor:
        """Rows (R, ...) without trailing ones that fill them up."""
        return rows[: self.images.total]

    def outside_graphs(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """The function, kept out of compiled graphs where its shapes or loops depend on the images' content."""
        return function if self.is_fixed else outside_graphs(function)
