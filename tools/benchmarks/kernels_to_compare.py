"""Kernels to compare: a linear layer and the attention of one image, ours and PyTorch's.

Options are those of tools/benchmark_kernels.py.
"""

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.layout.packed import build_layout
from apt_dense.layout.tokens import Cells, Segments
from apt_dense.ops.attention import BACKENDS, packed_attention
from apt_dense.ops.bias import RelativeBias
from apt_dense.ops.kernels.interface import Inputs
from apt_dense.ops.onednn_matmul import linear

from benchmarks.kernel_timings import Step, step_of
from benchmarks.meters import seconds_of


def linear_variants(options: argparse.Namespace, trains: bool) -> list[tuple[str, Step]]:
    """Return the first layer of an MLP by name, PyTorch's first."""
    operands = _leaves(trains, options, (options.rows, options.dim), (4 * options.dim, options.dim), (4 * options.dim,))
    return [(name, step_of(partial(f, *operands), operands)) for name, f in (("PyTorch", F.linear), ("ours", linear))]


def attention_variants(options: argparse.Namespace, trains: bool, biased: bool) -> list[tuple[str, Step]]:
    """Return attention by name: PyTorch's fused attention, which knows no relative positions, then our kernels."""
    shape = options.rows, options.heads, options.dim // options.heads
    side = math.isqrt(options.rows - 1) + 1
    *qkv, queries = _leaves(trains, options, shape, shape, shape, (*shape[:2], 2 * side))
    segments, cells = _one_image(options.rows, side, torch.device(options.device))
    bias = RelativeBias(queries, cells) if biased else None

    def fused() -> Tensor:
        return F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in qkv))

    operands = [*qkv, queries] if biased else qkv
    # On a CPU "flex" is not compiled: it serves as a check only.
    backends = [name for name in BACKENDS if name != "flex" or qkv[0].is_cuda]
    return [
        ("PyTorch, fused, no positions" if biased else "PyTorch, fused", step_of(fused, qkv)),
        *((f"ours, {name}", step_of(partial(_attend, qkv, segments, bias, name), operands)) for name in backends),
    ]


def _attend(qkv: Sequence[Tensor], segments: Segments, bias: RelativeBias | None, backend: str) -> Tensor:
    return packed_attention(Inputs(*qkv, segments, bias), backend)


def _one_image(rows: int, side: int, device: torch.device) -> tuple[Segments, Cells]:
    """Lay out a square grid of which ``rows`` cells hold a patch."""
    scale_map = torch.full((1, side * side), -1, dtype=torch.int8, device=device)
    scale_map[:, :rows] = 0
    layout = build_layout(scale_map.view(1, side, side), 1)
    return layout.images, layout.image_cells


def _leaves(trains: bool, options: argparse.Namespace, *shapes: tuple[int, ...]) -> list[Tensor]:
    kind = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    return [torch.randn(shape, **kind).mul_(0.1).requires_grad_(trains) for shape in shapes]


def compare(title: str, variants: Sequence[tuple[str, Step]], options: argparse.Namespace) -> Iterator[str]:
    """Time the variants and yield the lines of the table."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in variants}
    failures: dict[str, str] = {}
    for _ in range(options.rounds + 1):
        for name, run in variants:
            if name not in failures:
                try:
                    seconds[name].append(seconds_of(run, torch.device(options.device)))
                except (ValueError, RuntimeError) as error:
                    failures[name] = str(error).splitlines()[0]
    first = statistics.median(seconds[variants[0][0]][1:] or [math.nan])
    for name, _ in variants:
        if name in failures:
            yield f"| {title} | {name} | | | {failures[name]} |"
            continue
        rounds = seconds[name][1:]  # the first does not count
        median, spread = statistics.median(rounds), f"{min(rounds) * 1e3:.1f}-{max(rounds) * 1e3:.1f}"
        yield f"| {title} | {name} | {median * 1e3:.1f} ({spread}) | {first / median:.2f} | |"
