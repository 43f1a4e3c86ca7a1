"""Cut the frames of a video into patches with and without memory of earlier ones, and draw the difference."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from apt_dense import PatchSelector
from apt_dense.patches.frame_scores import FrameScorer
from apt_dense.weights.files import write_whole

from shared.normalise import normalise, to_grey_levels
from shared.token_counts import choose_patches

WAYS = "alone", "with memory"


class Frame(NamedTuple):
    """A frame in one of the ``WAYS``.

    Args:
        tokens: share of the cells.
        changed: share of the cells that are in patches of another size than in the frame before; 0 in the first.
    """

    tokens: float
    changed: float


def cut_frames(frames: Iterable[np.ndarray], selector: PatchSelector, tolerance: float) -> dict[str, list[Frame]]:
    """Cut frames (H, W, 3) uint8 RGB in both ``WAYS``. Raises ValueError for frames of several sizes."""
    memory = FrameScorer(selector.scorer, tolerance, selector.pixel_format)
    selectors = dict(zip(WAYS, (selector, replace(selector, scorer=memory)), strict=True))
    found: dict[str, list[Frame]] = {way: [] for way in WAYS}
    before: dict[str, Tensor] = {}
    for image in frames:
        pixels = normalise(to_grey_levels(image), selector.pixel_format)
        for way, one in selectors.items():
            patches = choose_patches(one, pixels)
            last = before.get(way, patches.scale_map)
            if last.shape != patches.scale_map.shape:
                raise ValueError(f"a frame has {image.shape[1]} x {image.shape[0]} pixels, others not; give one video")
            changed = (patches.scale_map != last).float().mean().item()
            found[way].append(Frame(patches.tokens_kept, changed))
            before[way] = patches.scale_map
    return found


def describe(videos: Mapping[str, Mapping[str, Sequence[Frame]]]) -> str:
    """A table in Markdown: means over the frames of each video, but for the first."""
    lines = ["| video | frames | patches chosen | tokens | cells that change a frame |", "|---|---:|---|---:|---:|"]
    for video, ways in videos.items():
        for way, frames in ways.items():
            tokens, changed = np.mean(frames[1:], axis=0)
            lines.append(f"| {video} | {len(frames)} | {way} | {tokens:.1%} | {changed:.2%} |")
    return "\n".join(lines)


def write_csv(videos: Mapping[str, Mapping[str, Sequence[Frame]]], path: Path) -> None:
    """Write a line for each frame and way, whole or not at all. Raises OSError."""
    with write_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "patches", "frame", *Frame._fields])
        for video, ways in videos.items():
            for way, frames in ways.items():
                writer.writerows([video, way, number, *frame] for number, frame in enumerate(frames))


def draw(videos: Mapping[str, Mapping[str, Sequence[Frame]]], path: Path) -> None:
    """Draw tokens and changes against the frame to a PNG, a row for each video. Raises OSError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(10, 2.8 * len(videos)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(videos), 2, squeeze=False)
    labels = "tokens kept", "cells in another patch size"
    for axes, (video, ways) in zip(grid, videos.items(), strict=True):
        for axis, name, label in zip(axes, Frame._fields, labels, strict=True):
            for way, frames in ways.items():
                axis.plot([getattr(frame, name) for frame in frames], marker=".", label=way)
            axis.set(xlabel="frame", ylabel=label, ylim=(0, None), title=video)
            axis.yaxis.set_major_formatter(PercentFormatter(1))
            axis.grid(alpha=0.3)
    grid[0][0].legend(loc="lower right")
    with write_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
