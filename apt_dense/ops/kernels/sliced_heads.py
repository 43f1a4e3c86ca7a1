"""Helpers for kernels that compute attention one head at a time."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from apt_dense.layout.tokens import Segments


class Head(Protocol):
    """One head of one segment: its place in packed rows (R, H), and its outputs (L, D)."""

    part: tuple[slice, int]

    def attend(self) -> Tensor: ...


def rows_of_segments(segments: Segments) -> Iterator[slice]:
    """Yield the rows of each segment that has any."""
    return (slice(start, stop) for start, stop in pairwise(segments.offsets.tolist()) if start < stop)


def attend_by_head(v: Tensor, heads: Iterable[Head]) -> Tensor:
    """Compute the outputs (R, H, D) of all heads, in the shape and type of v."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for head in heads:
        out[head.part] = head.attend()
    return out
