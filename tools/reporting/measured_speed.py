"""Milliseconds of a photo in a ViT on this machine, adaptive and uniform, which take turns."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from apt_dense import APTViT, PatchSelector

from calibration.token_curves import Source
from reporting.photo_figures import read_picture, to_image
from reporting.predicted_speed import MODELS
from shared.machine_and_versions import environment
from shared.photo_files import evenly_spread

SAMPLE = 4  # photos that are timed
MOST_CELLS = 128**2  # of one of them, 2048 x 2048 pixels of patches of 16
_ROUNDS = 3


class Timing(NamedTuple):
    """Medians for one photo."""

    path: Path
    uniform: float  # milliseconds
    adaptive: float


class MeasuredSpeed(NamedTuple):
    """Times of some photos."""

    model: str
    timings: list[Timing]
    machine: str

    @property
    def speed_up(self) -> float:
        """The time of all these photos in the uniform ViT as a multiple of that in the adaptive one."""
        return sum(t.uniform for t in self.timings) / sum(t.adaptive for t in self.timings)


def measure_speed(name: str, paths: Sequence[Path], source: Source) -> MeasuredSpeed:
    """Time the forward pass of a ViT of that size with untrained weights on photos at even distances.

    Raises:
        ValueError: for photos that are too large to be timed, and where there are no coarse patches to compare with.
    """
    selector = source.selector
    if not selector.thresholds:
        raise ValueError("--measure needs thresholds: there is nothing to compare uniform patches with")
    images = {path: to_image(read_picture(path, source), selector) for path in evenly_spread(paths, SAMPLE)}
    for path, image in images.items():
        cells = image.shape[-2] * image.shape[-1] // selector.patch_size**2
        if cells > MOST_CELLS:
            raise ValueError(
                f"--measure: {path} has {cells} patches; give the model's input size by --size or --square"
            )
    model = _model(name, selector, max(max(image.shape[-2:]) for image in images.values()))
    timings = [_time(model, selector, path, image) for path, image in tqdm(images.items(), "timing", unit="photo")]
    return MeasuredSpeed(name, timings, environment(torch.device("cpu")))


def _model(name: str, selector: PatchSelector, longer: int) -> APTViT:
    """Build a ViT for photos of that many pixels; its choice of patches is set later."""
    size = max(longer, selector.patch_size << len(selector.thresholds))
    sizes = MODELS[name]._asdict()
    return APTViT(img_size=size, patch_size=selector.patch_size, thresholds=selector.thresholds, **sizes).eval()


def _time(model: APTViT, selector: PatchSelector, path: Path, image: Tensor) -> Timing:
    ways = replace(selector, thresholds=(), token_budget=None, min_tokens=None), selector
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(_ROUNDS + 1):
            for way, taken in zip(ways, seconds, strict=True):
                model.patches = way
                taken.append(_seconds(lambda: model(image)))
    uniform, adaptive = (1000 * statistics.median(taken[1:]) for taken in seconds)  # the first ones allocate
    return Timing(path, uniform, adaptive)


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
