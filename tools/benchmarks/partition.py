"""Steps to compare: choosing the patches, one-hot histograms, a whole forward pass; their time and memory."""

import ctypes
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense import APTViT
from apt_dense.patches.blocks_of_pixels import grey_levels
from apt_dense.patches.histogram_scores import ENTROPY_BINS
from apt_dense.patches.image_preparation import denormalise

from benchmarks.photos import photos

THRESHOLDS = (5.5, 4.0)


def one_hot_entropy(pixels: Tensor, patch_size: int) -> Tensor:
    """Compute entropy the textbook way: a one-hot vector of bins for every pixel, summed over each patch."""
    bins = (grey_levels(pixels) * (ENTROPY_BINS / 256)).long().clamp(0, ENTROPY_BINS - 1)
    patches = bins.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size).flatten(3)
    share = F.one_hot(patches, ENTROPY_BINS).float().sum(-2) / patch_size**2
    return -(share * (share + 1e-10).log2()).sum(-1)


def choose_and_lay_out(model: APTViT, images: Tensor) -> None:
    model.layout(images, model.partition(images))


def one_hot_scores(model: APTViT, images: Tensor) -> None:
    pixels = denormalise(images, model.pixel_format)
    for scale in range(1, len(model.thresholds) + 1):
        one_hot_entropy(pixels, model.patch_size * 2**scale)


def forward(model: APTViT, images: Tensor) -> None:
    model(images)


def build(thresholds: tuple[float, ...], size: int) -> APTViT:
    torch.manual_seed(0)
    return APTViT(img_size=size, thresholds=thresholds).eval()


def timed(run: Callable[[APTViT, Tensor], None], thresholds: tuple[float, ...], size: int, rounds: int) -> list[float]:
    """Return the seconds of each round, after one that does not count."""
    model, images = build(thresholds, size), photos(size, 1)
    seconds = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            start = time.perf_counter()
            run(model, images)
            seconds.append(time.perf_counter() - start)
    return seconds[1:]


def peak_growth(run: Callable[[APTViT, Tensor], None], size: int) -> float:
    """Return the MiB by which the peak resident set of a fresh process grows during the call."""
    model, images = build(THRESHOLDS, size), photos(size, 1)
    with torch.inference_mode():
        run(model, images[..., :128, :128])  # allocators and thread pools
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that is free but held would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # restarts the peak
        before = peak_resident_set()
        run(model, images)
    return peak_resident_set() - before


def peak_resident_set() -> float:
    """Return MiB (Linux). Not from getrusage, whose peak a process inherits from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def in_fresh_process(function: Callable[..., float], *arguments: object) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def row(name: str, seconds: Sequence[float], reference: float, memory: float | None = None) -> str:
    median = statistics.median(seconds)
    spread = f"{min(seconds) * 1e3:.0f}-{max(seconds) * 1e3:.0f}"
    extra = "" if memory is None else f"{memory:.0f}"
    return f"| {name} | {median * 1e3:.1f} | {spread} | {median / reference:.2%} | {extra} |"
