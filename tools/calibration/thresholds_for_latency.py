"""Thresholds for a time: a model is timed on some of the photos, and the tokens of all say how long they take."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from apt_dense import APTViT, PatchSelector
from apt_dense.hosts.vit_sizes_and_windows import SIZES
from apt_dense.patches.calibration import FACTORS, Calibration, CurveStatistics

from calibration.token_curves import Sizes
from scaling.cost_curve import CostCurve, fit_curve
from shared.normalise import normalise, to_grey_levels
from shared.photo_files import evenly_spread, read_photo

SAMPLE = 8  # photos that are timed
_PLACES = 0.0, 0.33, 0.67, 1.0  # on the way from most to fewest tokens, at which they are timed
USUAL_SIZE = "base"
_ROUNDS = 4  # one more, the first, does not count
_STEPS = 4  # of corrections
_NEAR = 0.02  # relative error of the curve at which corrections end

#: ``clock(factors) -> tokens, milliseconds``: of each photo of the sample, with thresholds scaled by each factor.
Clock = Callable[[Sequence[float]], tuple[np.ndarray, np.ndarray]]


class Timed(NamedTuple):
    """A model, and the photos that it is timed on.

    Args:
        run: the model, of an image (1, 3, H, W) normalised.
        backbone: its part that chooses patches.
    """

    run: Callable[[Tensor], object]
    backbone: APTViT
    selector: PatchSelector
    images: Sequence[Tensor]

    def __call__(self, factors: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """The ``Clock`` of this machine: medians of several rounds, in which all take turns."""
        cuts = [
            replace(self.selector, thresholds=tuple(factor * each for each in self.selector.thresholds))
            for factor in factors
        ]
        pairs = [(cut, image) for cut in cuts for image in self.images]
        rounds = [[self._milliseconds(*pair) for pair in pairs] for _ in tqdm(range(_ROUNDS + 1), "timing")]
        tokens = [int(cut.count(image).sum()) for cut, image in pairs]
        return np.array(tokens), np.median(rounds[1:], axis=0)

    def _milliseconds(self, cut: PatchSelector, image: Tensor) -> float:
        self.backbone.patches = cut
        start = time.perf_counter()
        with torch.inference_mode():
            self.run(image)
        return 1000 * (time.perf_counter() - start)


def find_thresholds(
    options: argparse.Namespace, curves: CurveStatistics, selector: PatchSelector, photos: Sequence[Path], sizes: Sizes
) -> Calibration:
    """Choose thresholds with which a photo takes ``options.milliseconds`` on average: in the whole segmentor of
    ``options.config``, or in a backbone of the size ``options.model``.

    Raises:
        ValueError: for photos of several sizes, and for a time that no share of tokens reaches.
    """
    if sizes.square is None:
        raise ValueError("--milliseconds needs photos of one size: give --square, the model's input size")
    images = _sample(photos, selector, sizes)
    if options.model is None and options.config is not None:
        run, backbone = _segmentor(options.config)
    else:
        run = backbone = _backbone(options.model or USUAL_SIZE, sizes.square, selector)
    cells = int(replace(selector, thresholds=()).count(images[0]).sum())
    return search(Timed(run, backbone, selector, images), curves, selector, options.milliseconds, cells)


def _backbone(size: str, pixels: int, selector: PatchSelector) -> APTViT:
    options = {"img_size": pixels, "patch_size": selector.patch_size, "thresholds": selector.thresholds}
    return APTViT(**options, **SIZES[size]._asdict()).eval()


def _segmentor(config: Path) -> tuple[Callable[[Tensor], object], APTViT]:
    """The segmentor of a config as its tests run it, from images to the logits of pixels, with random weights."""
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    from apt_dense.hosts.mmseg.training_config import load_config

    cfg = load_config(str(config))
    cfg.model.backbone.update(pretrained=None, init_cfg=None)
    init_default_scope(cfg.get("default_scope", "mmseg"))
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()

    def run(image: Tensor) -> Tensor:
        shape = dict.fromkeys(("img_shape", "ori_shape", "pad_shape"), tuple(image.shape[-2:]))
        return model.inference(image, [shape])

    return run, model.backbone


def _sample(photos: Sequence[Path], selector: PatchSelector, sizes: Sizes) -> list[Tensor]:
    """Read photos at even distances; ones that cannot be read are left out."""
    images = []
    for path in evenly_spread(photos, SAMPLE):
        try:
            images.append(normalise(to_grey_levels(sizes.apply(read_photo(path))), selector.pixel_format))
        except (ValueError, OSError):
            continue
    if not images:
        raise ValueError("no photo of the sample can be read, so that nothing can be timed")
    return images


def search(clock: Clock, curves: CurveStatistics, selector: PatchSelector, wanted: float, cells: int) -> Calibration:
    """Fit a cost curve to timed photos, find where the mean cost of all is the wanted one, and correct the curve there.

    The mean over a sample's times alone would be as far off as the sample's tokens are from those of all photos.

    Args:
        wanted: milliseconds.
        cells: of a photo.
    """
    cost = fit_curve(*_distinct(*clock(_factors(curves))))
    for _ in range(_STEPS):
        found = curves.calibrate_by(selector.thresholds, _mean_cost(cost, curves, cells, wanted), wanted)
        tokens, milliseconds = clock([found.factor])
        error = milliseconds.sum() / cost(tokens).sum()
        if abs(error - 1) <= _NEAR:
            break
        cost = CostCurve(cost.constant * error, cost.linear * error, cost.square * error)
    return found


def _factors(curves: CurveStatistics) -> list[float]:
    """Factors at which the mean share of tokens goes from the most to the fewest in equal steps."""
    mean = curves.mean()
    shares = mean[0] + np.array(_PLACES) * (mean[-1] - mean[0])
    return FACTORS[[int(np.abs(mean - share).argmin()) for share in shares]].tolist()


def _distinct(tokens: np.ndarray, milliseconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points of a curve. Raises ValueError where all photos keep the same tokens."""
    if len(np.unique(tokens)) < 2:
        raise ValueError(
            f"--milliseconds: thresholds scaled by {FACTORS[0]:g} to {FACTORS[-1]:g} leave the timed photos "
            f"{tokens[0]} tokens each, so that there is nothing to choose; start from other --thresholds"
        )
    return tokens, milliseconds


def _mean_cost(cost: CostCurve, curves: CurveStatistics, cells: int, wanted: float) -> np.ndarray:
    """Milliseconds of a photo (F,) at each factor, averaged over all. Raises ValueError if none is as wanted."""
    mean = cost.constant + cost.linear * cells * curves.mean() + cost.square * cells**2 * curves.mean_square()
    least, most = mean[-1], mean[0]
    if not least * (1 - _NEAR) <= wanted <= most * (1 + _NEAR):
        low, high = curves.mean()[-1], curves.mean()[0]
        raise ValueError(
            f"--milliseconds {wanted:g} is not reached: at {low:.0%} to {high:.0%} of the tokens a photo takes "
            f"{least:.0f} to {most:.0f} ms here; take another model, --square or larger patches"
        )
    return mean
