"""Thresholds for a time: the backbone is timed on some of the photos, and the interval of shares is halved."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from apt_dense import APTViT, PatchSelector
from apt_dense.hosts.vit_sizes_and_windows import SIZES
from apt_dense.patches.calibration import Calibration, CurveStatistics, Target

from calibration.token_curves import Sizes
from shared.normalise import normalise, to_grey_levels
from shared.photo_files import read_photo

SAMPLE = 8  # photos that are timed
_ROUNDS = 3
_STEPS = 8  # of the search
_NEAR = 0.02  # relative distance to the wanted time at which the search ends


def find_share(
    options: argparse.Namespace, curves: CurveStatistics, selector: PatchSelector, photos: Sequence[Path], sizes: Sizes
) -> Calibration:
    """Choose thresholds with which a photo takes ``options.milliseconds`` in the backbone, on average.

    Raises:
        ValueError: for photos of several sizes, and for a time that no share of tokens reaches.
    """
    if sizes.square is None:
        raise ValueError("--milliseconds needs photos of one size: give --square, the model's input size")
    images = _sample(photos, selector, sizes)
    model = APTViT(
        img_size=sizes.square,
        patch_size=selector.patch_size,
        thresholds=selector.thresholds,
        **SIZES[options.model]._asdict(),
    )
    model.eval()
    return search(lambda found: time_of(model, selector, found, images), curves, selector, options.milliseconds)


def _sample(photos: Sequence[Path], selector: PatchSelector, sizes: Sizes) -> list[Tensor]:
    """Read photos at even distances; ones that cannot be read are left out."""
    images = []
    for path in photos[:: max(1, len(photos) // SAMPLE)][:SAMPLE]:
        try:
            images.append(normalise(to_grey_levels(sizes.apply(read_photo(path))), selector.pixel_format))
        except (ValueError, OSError):
            continue
    if not images:
        raise ValueError("no photo of the sample can be read, so that nothing can be timed")
    return images


def time_of(model: APTViT, selector: PatchSelector, found: Calibration, images: Sequence[Tensor]) -> float:
    """Return the mean over images of the median milliseconds in the backbone, with these thresholds."""
    model.patches = replace(selector, thresholds=found.thresholds)
    medians = []
    with torch.inference_mode():
        for image in images:
            seconds = []
            for _ in range(_ROUNDS + 1):
                start = time.perf_counter()
                model(image)
                seconds.append(time.perf_counter() - start)
            medians.append(1000 * statistics.median(seconds[1:]))
    return statistics.mean(medians)


def search(
    milliseconds_of: Callable[[Calibration], float], curves: CurveStatistics, selector: PatchSelector, wanted: float
) -> Calibration:
    """Halve the interval of shares until the time is near the wanted one."""
    curve = curves.mean()
    low, high = float(curve[-1]), float(curve[0])
    fastest, slowest = (_at(curves, selector, share) for share in (low, high))
    least, most = milliseconds_of(fastest), milliseconds_of(slowest)
    if not least * (1 - _NEAR) <= wanted <= most * (1 + _NEAR):
        raise ValueError(
            f"--milliseconds {wanted:g} is not reached: at {low:.0%} to {high:.0%} of the tokens a photo takes "
            f"{least:.0f} to {most:.0f} ms here; take another --model, --square or larger patches"
        )
    found = slowest
    for _ in tqdm(range(_STEPS), "timing"):
        found = _at(curves, selector, (low + high) / 2)
        taken = milliseconds_of(found)
        if abs(taken - wanted) <= _NEAR * wanted:
            break
        low, high = (low, found.share) if taken > wanted else (found.share, high)
    return found


def _at(curves: CurveStatistics, selector: PatchSelector, share: float) -> Calibration:
    return curves.calibrate(selector.thresholds, Target(share))
