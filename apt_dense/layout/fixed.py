"""The fixed layout, in shapes that depend on nothing but those of the images, for token budgets.

Nothing waits for the device, so that ``torch.compile(fullgraph=True)`` and CUDA graphs apply, and time does not depend
on the content. Every image has ``tokens`` patch rows; where it has fewer patches (dropped padding), the last ones are
**inert**: no row attends to them, no cell takes their output. Shape letters as in tokens.py, T tokens of an image.
"""

import torch
from torch import Tensor

from apt_dense.layout.tokens import Bucket, Candidates, Cells, Segments, TokenLayout
from apt_dense.layout.window_geometry import (
    at_corners,
    check_prefix_rows,
    scale_of_rows,
    window_cells,
    window_major_order,
    window_of_cells,
)
from apt_dense.patches.partition import DROPPED, anchors_of
from apt_dense.runtime import require


def build_fixed_layout(
    scale_map: Tensor,
    num_scales: int,
    tokens: int,
    window_size: int = 0,
    num_prefix: int = 0,
    may_be_inert: bool = True,
) -> TokenLayout:
    """Number the tokens of a batch, ``tokens`` for every image.

    Args:
        scale_map: (B, h, w), a partition of at most ``tokens`` patches per image; exactly so many if not
            ``may_be_inert``. Whether it is a partition is not checked.
        window_size, num_prefix: as for ``packed.build_layout``.

    Raises:
        ValueError: for prefix rows with windows; on a CPU also for more patches than ``tokens`` (elsewhere or compiled:
            a RuntimeError, perhaps later).
    """
    check_prefix_rows(num_prefix, window_size)
    batch, h, w = scale_map.shape
    device, scale_map = scale_map.device, scale_map.long()
    order_P, window_sizes = window_major_order(h, w, window_size, device)
    anchors_BP = anchors_of(scale_map).flatten(1)[:, order_P]
    counts_B = anchors_BP.sum(1)
    fits = counts_B <= tokens if may_be_inert else counts_B == tokens
    require(fits.all(), f"an image was cut into another number of patches than its {tokens} tokens")

    rank_BP = anchors_BP.cumsum(1) - 1
    place_BT = _places(anchors_BP, rank_BP, tokens)
    cell_BT = order_P[place_BT]
    valid_BT = torch.arange(tokens, device=device) < counts_B[:, None]
    image_BT = torch.arange(batch, device=device)[:, None].expand(batch, tokens)
    scale_BT = torch.where(valid_BT, scale_map.flatten(1).gather(1, cell_BT), 0)
    image_N, scale_N, y_N, x_N = (t.flatten() for t in (image_BT, scale_BT, cell_BT // w, cell_BT % w))
    image_cells = Cells((h, w), y_N, x_N, scale_N, num_scales)
    rows = tokens + num_prefix
    first_B = torch.arange(batch, device=device) * rows + num_prefix
    windows = None
    if window_size:
        window_P = window_of_cells(h, w, window_size, device)[order_P]
        windows = _window_segments(anchors_BP, place_BT, window_P, window_sizes, may_be_inert)
    return TokenLayout(
        grid=(h, w),
        num_prefix=num_prefix,
        image_N=image_N,
        scale_N=scale_N,
        y_N=y_N,
        x_N=x_N,
        candidates=tuple(Candidates(scale, None, None, None, None, batch) for scale in range(num_scales)),
        source_R=_sources(image_N, image_cells, batch, num_prefix),
        image_R=torch.arange(batch, device=device).repeat_interleave(rows),
        scale_R=scale_of_rows(scale_N, image_N, batch, num_prefix),
        row_Bhw=_cover(scale_map, anchors_BP, rank_BP, first_B, order_P),
        images=_image_segments(counts_B, tokens, num_prefix, valid_BT if may_be_inert else None),
        windows=windows,
        image_cells=image_cells,
        window_cells=window_cells(image_cells, window_size),
        is_fixed=True,
    )


def _sources(image_N: Tensor, cells: Cells, batch: int, num_prefix: int) -> Tensor:
    """``source_R`` of the layout: of the patches of every scale in all images, each token takes its own."""
    first, index = 0, torch.zeros_like(cells.scale_N)
    for scale in range(cells.num_scales):
        h, w = (n >> scale for n in cells.size)
        place = (image_N * h + (cells.y_N >> scale)) * w + (cells.x_N >> scale)
        index = torch.where(cells.scale_N == scale, place + first, index)
        first += batch * h * w
    if not num_prefix:
        return index
    prefix = torch.arange(first, first + batch * num_prefix, device=index.device).view(batch, num_prefix)
    return torch.cat([prefix, index.view(batch, -1)], 1).flatten()


def _places(anchors_BP: Tensor, rank_BP: Tensor, tokens: int) -> Tensor:
    """The place of each token among the cells (B, T); 0 for inert ones."""
    batch, cells = anchors_BP.shape
    places = torch.arange(cells, device=anchors_BP.device).expand(batch, cells)
    target = torch.where(anchors_BP & (rank_BP < tokens), rank_BP, tokens)  # the last column takes what is no token
    return torch.zeros(batch, tokens + 1, dtype=torch.int64, device=places.device).scatter(1, target, places)[
        :, :tokens
    ]


def _cover(scale_map: Tensor, anchors_BP: Tensor, rank_BP: Tensor, first_B: Tensor, order_P: Tensor) -> Tensor:
    """The row that covers each cell (B, h, w), -1 for dropped cells."""
    rows_BP = torch.where(anchors_BP, rank_BP + first_B[:, None], DROPPED)
    at_anchor = torch.empty_like(rows_BP).scatter(1, order_P.expand_as(rows_BP), rows_BP)
    return at_corners(at_anchor.view(scale_map.shape), scale_map)


def _image_segments(counts_B: Tensor, tokens: int, num_prefix: int, valid_BT: Tensor | None) -> Segments:
    """One segment per image, and one of inert rows behind each where there may be any."""
    batch, rows = len(counts_B), tokens + num_prefix
    places = torch.arange(batch * rows, device=counts_B.device)
    if valid_BT is None:
        offsets = torch.arange(0, batch * rows + 1, rows, device=counts_B.device, dtype=torch.int32)
        return Segments(offsets, batch * rows, rows, (Bucket(places.view(batch, rows), None),), places)
    lengths = torch.stack([counts_B + num_prefix, tokens - counts_B], 1)
    valid = torch.nn.functional.pad(valid_BT, (num_prefix, 0), value=True)
    return Segments(_offsets(lengths), batch * rows, rows, (Bucket(places.view(batch, rows), valid),), places)


def _window_segments(
    anchors_BP: Tensor, place_BT: Tensor, window_P: Tensor, window_sizes: list[int], may_be_inert: bool
) -> Segments:
    """One segment per window, all in one bucket, and one of inert rows behind each image where there may be any."""
    (batch, tokens), device = place_BT.shape, anchors_BP.device
    longest = min(max(window_sizes), tokens)
    counts_BW = torch.zeros(batch, len(window_sizes), dtype=torch.int64, device=device).index_add(
        1, window_P, anchors_BP.long()
    )
    starts_BW = counts_BW.cumsum(1) - counts_BW
    first = starts_BW + torch.arange(batch, device=device)[:, None] * tokens
    place = torch.arange(longest, device=device)
    valid = place < counts_BW[..., None]
    rows = torch.where(valid, first[..., None] + place, first[..., None].clamp(max=batch * tokens - 1))

    window_BT = window_P[place_BT]
    inside_BT = torch.arange(tokens, device=device) - starts_BW.gather(1, window_BT)
    window_BT = window_BT + torch.arange(batch, device=device)[:, None] * len(window_sizes)
    counts_B = counts_BW.sum(1, keepdim=True)
    is_inert = torch.arange(tokens, device=device) >= counts_B
    place_R = torch.where(is_inert, 0, window_BT * longest + inside_BT).flatten()
    lengths = torch.cat([counts_BW, tokens - counts_B], 1) if may_be_inert else counts_BW
    bucket = Bucket(rows.flatten(0, 1), valid.flatten(0, 1))
    return Segments(_offsets(lengths), batch * tokens, tokens if may_be_inert else longest, (bucket,), place_R)


def _offsets(lengths: Tensor) -> Tensor:
    """(B, segments) -> (B * segments + 1,) int32, from 0."""
    return torch.nn.functional.pad(lengths.flatten().cumsum(0), (1, 0)).int()
