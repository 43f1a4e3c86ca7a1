"""The packed layout, built from the content of the images: scale map -> the order of all tokens of a batch.

It is computed once and passed to everything after. For the same in shapes that do not depend on the content, see
fixed.py. Shape letters as in tokens.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.layout.tokens import Bucket, Candidates, Cells, Segments, TokenLayout
from apt_dense.layout.window_geometry import (
    at_corners,
    check_prefix_rows,
    scale_of_rows,
    window_cells,
    window_major_order,
)
from apt_dense.patches.image_preparation import check_finite
from apt_dense.patches.partition import DROPPED, anchors_of
from apt_dense.runtime import to_device


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
        ValueError: for an image that is not finite, a scale map that is not a partition, or prefix rows with windows.
    """
    check_prefix_rows(num_prefix, window_size)
    _, h, w = scale_map.shape
    scale_map = scale_map.long()
    order_P, window_sizes = window_major_order(h, w, window_size, scale_map.device)
    anchors = anchors_of(scale_map)
    anchors_BP = anchors.flatten(1)[:, order_P]
    per_window, per_scale = _count(scale_map, anchors, anchors_BP, window_sizes, num_scales, finite)

    image_N, y_N, x_N = _unravel(anchors_BP, order_P, w, sum(per_scale))
    row_N = torch.arange(len(image_N), device=image_N.device) + num_prefix * (image_N + 1)
    images = _segments(per_window.sum(1) + num_prefix, scale_map.device)
    scale_N = scale_map[image_N, y_N, x_N]
    image_cells = Cells((h, w), y_N, x_N, scale_N, num_scales)
    order_N = scale_N.argsort(stable=True)
    return TokenLayout(
        grid=(h, w),
        num_prefix=num_prefix,
        image_N=image_N,
        scale_N=scale_N,
        y_N=y_N,
        x_N=x_N,
        candidates=tuple(
            Candidates(scale, numbers, image_N[numbers], y_N[numbers], x_N[numbers], len(scale_map))
            for scale, numbers in enumerate(order_N.split(per_scale))
        ),
        source_R=_sources(row_N[order_N], images.offsets[:-1], num_prefix) if num_scales > 1 or num_prefix else None,
        image_R=torch.repeat_interleave(images.offsets.diff().long(), output_size=images.total),
        scale_R=scale_of_rows(scale_N, image_N, len(scale_map), num_prefix),
        row_Bhw=_cover(scale_map, row_N, image_N, y_N, x_N),
        images=images,
        windows=_segments(per_window.flatten(), scale_map.device) if window_size else None,
        image_cells=image_cells,
        window_cells=window_cells(image_cells, window_size),
    )


def _count(
    scale_map: Tensor, anchors: Tensor, anchors_BP: Tensor, window_sizes: list[int], num_scales: int,
    finite: Tensor | None,
) -> tuple[Tensor, list[int]]:  # fmt: skip
    """Count patches per image and window (B, W), and per scale, on the host. Checks partition and ``finite``, too."""
    per_window = torch.stack([part.sum(1) for part in anchors_BP.split(window_sizes, 1)], 1)
    chosen = torch.where(anchors, scale_map, DROPPED)
    per_scale = torch.stack([(chosen == s).sum() for s in range(num_scales)])
    covered = (scale_map > DROPPED).sum()
    stray = ((at_corners(scale_map, scale_map) != scale_map) | (scale_map >= num_scales)).sum()
    finite = per_scale.new_ones(len(scale_map)) if finite is None else finite.long()
    # The one wait for the device of a forward pass.
    host = torch.cat([per_window.flatten(), per_scale, covered[None], stray[None], finite]).cpu()
    per_window, rest = host[: per_window.numel()].view_as(per_window), host[per_window.numel() :].tolist()
    per_scale, (covered, stray), finite = rest[:num_scales], rest[num_scales : num_scales + 2], rest[num_scales + 2 :]
    _check(per_scale, covered, stray, finite)
    return per_window, per_scale


def _check(per_scale: list[int], covered: int, stray: int, finite: list[int]) -> None:
    """Raise on pixels that are not finite and on scale maps that are not a partition.

    If the top left cell of each cell's patch has its scale (no ``stray`` cells), a patch has at most its 4**s cells,
    and all of them exactly if the areas of all patches add up to the ``covered`` cells.
    """
    check_finite(finite)
    area = sum(count * 4**scale for scale, count in enumerate(per_scale))
    if area != covered or stray:
        raise ValueError(
            f"the scale map is not a partition: its patches of scale 0, 1, ... ({per_scale}) cover {area} cells, "
            f"{covered} are marked, and {stray} of them belong to no patch of their scale; every aligned 2**s x 2**s "
            f"block must be marked s as a whole, with s < {len(per_scale)}"
        )


def _unravel(anchors_BP: Tensor, order_P: Tensor, w: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column of the ``total`` anchors, in packed order."""
    flat = _places_of_true(anchors_BP.flatten(), total)
    image, place = flat // len(order_P), flat % len(order_P)
    cell = order_P[place]
    return image, cell // w, cell % w


def _places_of_true(mask: Tensor, count: int) -> Tensor:
    """Places at which a mask (P,) with ``count`` true entries is true, ascending. The count is known, so this does not
    wait for the device, as nonzero would."""
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
    offsets, place_R, *parts = to_device([offsets, place_R, *(t for bucket in buckets for t in bucket)], device)
    on_device = (Bucket(rows, valid) for rows, valid in zip(parts[::2], parts[1::2], strict=True))
    return Segments(offsets.int(), total, longest, tuple(on_device), place_R)


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


def _sources(rows: Tensor, first_rows: Tensor, num_prefix: int) -> Tensor:
    """``source_R`` of the layout.

    Args:
        rows: (N,) of the patches, scale after scale.
        first_rows: (B,) of the images.
    """
    total = len(rows)
    source_R = rows.new_empty(total + len(first_rows) * num_prefix)
    source_R[rows] = torch.arange(total, device=rows.device)
    if num_prefix:
        prefix_rows = first_rows[:, None] + torch.arange(num_prefix, device=rows.device)
        source_R[prefix_rows.flatten().long()] = torch.arange(total, len(source_R), device=rows.device)
    return source_R


def _cover(scale_map: Tensor, row_N: Tensor, image_N: Tensor, y_N: Tensor, x_N: Tensor) -> Tensor:
    """The row that covers each cell (B, h, w), -1 for dropped cells."""
    at_anchor = torch.full_like(scale_map, DROPPED)
    at_anchor[image_N, y_N, x_N] = row_N
    return at_corners(at_anchor, scale_map)
