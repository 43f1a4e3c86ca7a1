"""Layout: scale map -> the packed order of all tokens of a batch, computed once and passed to everything after.

For the same in shapes that do not depend on the images' content, see fixed_layout.py.

The **packed sequence** (R, C) holds the rows of all images one after the other, without padding and without a batch
axis: for each image its prefix rows (class token), then its patches. Patches are ordered by (image, window, place in
the window), row by row, so that windowed and global attention work on the same rows with different offsets.

Shape letters: B images, h x w cells of the base grid, N patches, R = N + B * num_prefix rows, S segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.patches.partition import DROPPED


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
        """Whether all segments have the same length, so that the packed rows are a batch as they lie."""
        return len(self.buckets) == 1 and self.buckets[0].valid is None and self.buckets[0].rows.numel() == self.total


class Cells(NamedTuple):
    """Where patches lie inside their segment (a window or the whole grid), for relative positions."""

    size: tuple[int, int]  # rows and columns of cells of a whole segment
    y_N: Tensor  # row of each patch's top left cell
    x_N: Tensor  # and column
    scale_N: Tensor
    num_scales: int
    rows_N: Tensor | None  # rows and columns of the patch's segment that lie in the grid, where a window
    columns_N: Tensor | None  # may be cut short by its edge; None if every segment is whole


@dataclass(frozen=True, eq=False)  # no tuple: torch.compile would guard the shape of every tensor in it
class TokenLayout:
    """Where every patch comes from and which packed row it went to. All index tensors are int64."""

    grid: tuple[int, int]  # h, w
    num_prefix: int  # rows before the patches of each image
    image_N: Tensor  # image of each patch
    scale_N: Tensor
    y_N: Tensor  # base-grid row of its top left cell
    x_N: Tensor  # and column
    by_scale: tuple[Tensor, ...] | None  # for each scale, the patches of that scale, ascending; None in fixed shapes
    source_R: Tensor | None  # each row's place in [patches of scale 0, of scale 1, ..., prefix of image 0, of 1, ...]
    image_R: Tensor  # image of each row
    row_Bhw: Tensor  # (B, h, w) row that covers each cell, -1 where none does
    images: Segments  # one per image, prefix included
    windows: Segments | None  # one per window, images in order; None without windows
    image_cells: Cells
    window_cells: Cells | None
    is_fixed: bool = False  # whether its shapes depend on nothing but those of the images (fixed_layout.py)

    @property
    def batch(self) -> int:
        return len(self.row_Bhw)


def build_layout(
    scale_map: Tensor, num_scales: int, window_size: int = 0, num_prefix: int = 0, finite: Tensor | None = None
) -> TokenLayout:
    """Number the tokens of a batch.

    Args:
        scale_map: (B, h, w) integers in [-1, num_scales): a partition (see partition.py).
        window_size: cells of an attention window, counted from the top left (the last ones are cut short); 0 for none.
        num_prefix: prefix rows of each image; not together with windows.
        finite: (B,) bool, whether the image of that partition is free of NaN and infinities. It is looked at here
            because here is the only place that waits for the device.

    Raises:
        ValueError: for an image that is not finite, a scale map that is no partition, or prefix rows with windows.
    """
    check_prefix_rows(num_prefix, window_size)
    batch, h, w = scale_map.shape
    scale_map = scale_map.long()
    order_P, window_sizes = window_major_order(h, w, window_size, scale_map.device)
    anchors = anchors_of(scale_map)
    anchors_BP = anchors.flatten(1)[:, order_P]
    per_window, per_scale = _count(scale_map, anchors, anchors_BP, window_sizes, num_scales, finite)

    image_N, y_N, x_N = _unravel(anchors_BP, order_P, w, sum(per_scale))
    row_N = torch.arange(len(image_N), device=image_N.device) + num_prefix * (image_N + 1)
    images = _segments(per_window.sum(1) + num_prefix, scale_map.device)
    scale_N = scale_map[image_N, y_N, x_N]
    by_scale, source_R = _sort_by_scale(scale_N, row_N, per_scale, images.offsets[:-1], num_prefix)
    return TokenLayout(
        grid=(h, w),
        num_prefix=num_prefix,
        image_N=image_N,
        scale_N=scale_N,
        y_N=y_N,
        x_N=x_N,
        by_scale=by_scale,
        source_R=source_R,
        image_R=torch.repeat_interleave(images.offsets.diff().long(), output_size=images.total),
        row_Bhw=_cover(scale_map, row_N, image_N, y_N, x_N),
        images=images,
        windows=_segments(per_window.flatten(), scale_map.device) if window_size else None,
        image_cells=Cells((h, w), y_N, x_N, scale_N, num_scales, None, None),
        window_cells=window_cells((h, w), window_size, y_N, x_N, scale_N, num_scales) if window_size else None,
    )


def real_rows(rows: Tensor, layout: TokenLayout) -> Tensor:
    """Rows (R, ...) without any that follow them to fill them up."""
    return rows[: layout.images.total]


def check_prefix_rows(num_prefix: int, window_size: int) -> None:
    """Raise a ValueError for prefix rows together with windows."""
    if window_size and num_prefix:
        raise ValueError(f"num_prefix={num_prefix} with window_size={window_size}: a prefix row belongs to no window")


def count_tokens(scale_map: Tensor, num_scales: int) -> Tensor:
    """Patches of each scale (B, num_scales) int64 in scale maps (B, h, w)."""
    anchors = anchors_of(scale_map.long())
    return torch.stack([(anchors & (scale_map == s)).sum((1, 2)) for s in range(num_scales)], dim=1)


def anchors_of(scale_map: Tensor) -> Tensor:
    """The top left cell of every patch: (B, h, w) bool."""
    _, h, w = scale_map.shape
    y = torch.arange(h, device=scale_map.device)[:, None]
    x = torch.arange(w, device=scale_map.device)
    within = (1 << scale_map.clamp(min=0)) - 1
    return (scale_map > DROPPED) & ((y & within) == 0) & ((x & within) == 0)


def window_major_order(h: int, w: int, window_size: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """Cells (h * w,) window by window, and the number of cells of each window."""
    if not window_size:
        return torch.arange(h * w, device=device), [h * w]
    order = window_of_cells(h, w, window_size, device).argsort(stable=True)
    rows, columns = ([min(window_size, size - first) for first in range(0, size, window_size)] for size in (h, w))
    return order, [row * column for row in rows for column in columns]


def window_of_cells(h: int, w: int, window_size: int, device: torch.device) -> Tensor:
    """The number (h * w,) of the window that each cell lies in, windows row by row."""
    windows_per_row = -(-w // window_size)
    of_row, of_column = (torch.arange(size, device=device) // window_size for size in (h, w))
    return (of_row[:, None] * windows_per_row + of_column).flatten()


def _count(
    scale_map: Tensor, anchors: Tensor, anchors_BP: Tensor, window_sizes: list[int], num_scales: int,
    finite: Tensor | None,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """Patches per image and window (B, W), and per scale, on the host. Checks the partition and ``finite`` on the way."""
    per_window = torch.stack([part.sum(1) for part in anchors_BP.split(window_sizes, 1)], 1)
    chosen = torch.where(anchors, scale_map, DROPPED)
    per_scale = torch.stack([(chosen == s).sum() for s in range(num_scales)])
    covered = (scale_map > DROPPED).sum()
    stray = ((of_corner(scale_map, scale_map) != scale_map) | (scale_map >= num_scales)).sum()
    finite = per_scale.new_ones(len(scale_map)) if finite is None else finite.long()
    # The one wait for the device of a forward pass.
    host = torch.cat([per_window.flatten(), per_scale, covered[None], stray[None], finite]).cpu()
    per_window, rest = host[: per_window.numel()].view_as(per_window), host[per_window.numel() :].tolist()
    per_scale, covered, stray, finite = (
        rest[:num_scales],
        rest[num_scales],
        rest[num_scales + 1],
        rest[num_scales + 2 :],
    )
    _check(per_scale, covered, stray, finite)
    return per_window, per_scale


def _check(per_scale: list[int], covered: int, stray: int, finite: list[int]) -> None:
    """Raise on pixels that are not finite and on scale maps that are no partition.

    If the top left cell of each cell's patch has its scale (no ``stray`` cells), a patch has at most its 4**s cells,
    and all of them exactly if the areas of all patches add up to the ``covered`` cells.
    """
    check_finite(finite)
    area = sum(count * 4**scale for scale, count in enumerate(per_scale))
    if area != covered or stray:
        raise ValueError(
            f"the scale map is no partition: its patches of scale 0, 1, ... ({per_scale}) cover {area} cells, "
            f"{covered} are marked, and {stray} of them belong to no patch of their scale; every aligned 2**s x 2**s "
            f"block must be marked s as a whole, with s < {len(per_scale)}"
        )


def check_finite(finite: Sequence[int | bool]) -> None:
    """Raise a ValueError that names the images of a batch that are not finite."""
    bad = [i for i, ok in enumerate(finite) if not ok]
    if bad:
        raise ValueError(
            f"images {bad} of the batch hold NaN or infinite pixels; expected finite normalised pixels. "
            f"Look at their files and at the transforms before the backbone"
        )


def _unravel(anchors_BP: Tensor, order_P: Tensor, w: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column of the ``total`` anchors, in packed order."""
    flat = _places_of_true(anchors_BP.flatten(), total)
    image, place = flat // len(order_P), flat % len(order_P)
    cell = order_P[place]
    return image, cell // w, cell % w


def _places_of_true(mask: Tensor, count: int) -> Tensor:
    """Where a mask (P,) with ``count`` true entries is true, ascending. The count is known, so this does not wait for
    the device, as nonzero would."""
    places = torch.arange(len(mask), device=mask.device)
    target = torch.where(mask, mask.cumsum(0) - 1, count)  # one more place takes all that is false
    return places.new_zeros(count + 1).scatter_(0, target, places)[:count]


def _segments(lengths: Tensor, device: torch.device) -> Segments:
    """Segments of these lengths (S,), which are on the host, with the buckets that attention runs in."""
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    starts = torch.zeros_like(lengths)  # place of each segment's first row in the buckets
    buckets, place, longest = [], 0, 0
    for numbers in _bucket_numbers(lengths):
        longest = int(lengths[numbers].max())
        starts[numbers] = place + longest * torch.arange(len(numbers))
        place += longest * len(numbers)
        buckets.append(_bucket(offsets, numbers, longest))
    total = int(offsets[-1])
    place_R = torch.arange(total) + torch.repeat_interleave(starts - offsets[:-1], lengths)
    offsets, place_R, *parts = _on_device([offsets, place_R, *(t for bucket in buckets for t in bucket)], device)
    on_device = (Bucket(rows, valid) for rows, valid in zip(parts[::2], parts[1::2], strict=True))
    return Segments(offsets.int(), total, longest, tuple(on_device), place_R)


def _on_device(tensors: list[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """Host tensors of whole numbers and truth values on the device, by a single copy that nothing waits for."""
    if device.type == "cpu":
        return tensors
    flat = torch.cat([t.flatten().long() for t in tensors if t is not None])
    flat = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
    parts = iter(flat.split([t.numel() for t in tensors if t is not None]))
    return [None if t is None else next(parts).view(t.shape).to(t.dtype) for t in tensors]


def _bucket_numbers(lengths: Tensor) -> list[Tensor]:
    """Segment numbers of at most 17 buckets, short ones first; padding is at most a sixteenth of the longest."""
    if not len(lengths):
        return []
    step = max(1, int(lengths.max()) // 16)
    keys = (lengths + step - 1) // step
    return [(keys == key).nonzero()[:, 0] for key in keys.unique().tolist() if key]


def _bucket(offsets: Tensor, numbers: Tensor, longest: int) -> Bucket:
    first, count = offsets[numbers, None], offsets.diff()[numbers, None]
    place = torch.arange(longest)
    valid = place < count
    rows = torch.where(valid, first + place, first)
    return Bucket(rows, None if bool(valid.all()) else valid)


def window_cells(
    grid: tuple[int, int], window_size: int, y_N: Tensor, x_N: Tensor, scale_N: Tensor, num_scales: int
) -> Cells:
    """Patches inside their windows; the last windows of a grid that does not divide are cut short."""
    inside_y, inside_x = y_N % window_size, x_N % window_size
    if grid[0] % window_size == 0 and grid[1] % window_size == 0:
        return Cells((window_size, window_size), inside_y, inside_x, scale_N, num_scales, None, None)
    rows_N = (grid[0] - y_N + inside_y).clamp(max=window_size)
    columns_N = (grid[1] - x_N + inside_x).clamp(max=window_size)
    return Cells((window_size, window_size), inside_y, inside_x, scale_N, num_scales, rows_N, columns_N)


def _sort_by_scale(
    scale_N: Tensor, row_N: Tensor, per_scale: list[int], first_rows: Tensor, num_prefix: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    """``by_scale`` and ``source_R`` of the layout; ``first_rows`` (B,) of the images."""
    total, batch = len(scale_N), len(first_rows)
    order = scale_N.argsort(stable=True)
    source_R = order.new_empty(total + batch * num_prefix)
    source_R[row_N[order]] = torch.arange(total, device=order.device)
    if num_prefix:
        prefix_rows = first_rows[:, None] + torch.arange(num_prefix, device=first_rows.device)
        source_R[prefix_rows.flatten().long()] = torch.arange(total, total + batch * num_prefix, device=order.device)
    return order.split(per_scale), source_R


def _cover(scale_map: Tensor, row_N: Tensor, image_N: Tensor, y_N: Tensor, x_N: Tensor) -> Tensor:
    """The row that covers each cell (B, h, w), -1 for dropped cells."""
    at_anchor = torch.full_like(scale_map, DROPPED)
    at_anchor[image_N, y_N, x_N] = row_N
    return of_corner(at_anchor, scale_map)


def of_corner(values: Tensor, scale_map: Tensor) -> Tensor:
    """For each cell, the value (B, h, w) at the top left cell of the patch that its scale says it lies in."""
    batch, h, w = scale_map.shape
    corner = -(1 << scale_map.clamp(min=0))  # as a bit mask: clears the place inside the patch
    y = torch.arange(h, device=scale_map.device)[:, None] & corner
    x = torch.arange(w, device=scale_map.device) & corner
    return values[torch.arange(batch, device=scale_map.device).view(-1, 1, 1), y, x]
