"""Seconds of a training step of a backbone at several numbers of tokens, measured on this machine."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from apt_dense import APTViT
from apt_dense.hosts.vit_sizes_and_windows import SIZES

NOISY_SHARES = 0.0, 0.25, 0.5, 0.75, 1.0


def measure_curve(
    size: str, pixels: int, batch_size: int, rounds: int, autocast: bool = False
) -> tuple[list[int], list[float]]:
    """Train a ViT with random weights on images that are flat but for a noisy part, from none to all of them.

    Args:
        size: of the ViT, by its name in ``SIZES``.
        pixels: side of the images.
        batch_size: images per step.
        rounds: how often each is timed, all in turn, of which the median is taken.
        autocast: compute in bfloat16.

    Returns:
        tokens and seconds of each batch.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = APTViT(img_size=pixels, thresholds=(5.5, 4.0), **SIZES[size]._asdict()).to(device).train()
    batches = [partly_noise(batch_size, pixels, share).to(device) for share in NOISY_SHARES]
    tokens = [int(model.patches.count(batch).sum()) for batch in batches]
    seconds = [[] for _ in batches]
    for number in tqdm(range(rounds + 1), "timing"):
        for batch, times in zip(batches, seconds, strict=True):
            taken = _seconds(lambda batch=batch: _train(model, batch, autocast), device)
            if number:
                times.append(taken)
    return tokens, [float(np.median(times)) for times in seconds]


def partly_noise(images: int, pixels: int, share: float) -> Tensor:
    """Images (N, 3, pixels, pixels), normalised, whose upper part is noise and the rest flat."""
    pictures = torch.zeros(images, 3, pixels, pixels)
    rows = round(share * pixels)
    pictures[:, :, :rows] = torch.rand(images, 3, rows, pixels, generator=torch.Generator().manual_seed(0)) * 4 - 2
    return pictures


def _train(model: APTViT, images: Tensor, autocast: bool) -> None:
    with torch.autocast(images.device.type, torch.bfloat16) if autocast else nullcontext():
        loss = sum(one.float().square().mean() for one in model(images))
    loss.backward()
    model.zero_grad(set_to_none=True)


def _seconds(action: Callable[[], None], device: torch.device) -> float:
    wait: Sequence[Callable] = [torch.cuda.synchronize] if device.type == "cuda" else []
    for one in wait:
        one()
    start = time.perf_counter()
    action()
    for one in wait:
        one()
    return time.perf_counter() - start
