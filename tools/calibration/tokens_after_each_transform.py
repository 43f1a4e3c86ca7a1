"""Tokens of photos after each transform of a training pipeline of MMSegmentation, and after padding, over random draws.

Each draw follows from the seed, the photo's number and the draw's number alone, whichever worker makes it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from apt_dense import PatchSelector
from apt_dense.hosts.mmseg.dataset_checks import one_line
from apt_dense.hosts.randomness_from_seeds import random_numbers
from apt_dense.hosts.readable_images import DataError

from calibration.token_curves import one_thread
from shared.token_counts import choose_patches

Made = TypeVar("Made")
TRIES = 20  # draws of a photo before it is left out


class Pipeline(NamedTuple):
    """A training pipeline.

    Args:
        names: of the steps: those of ``transforms``, and the model's preprocessor, which pads.
        transforms: the config's, built.
        normalise: the preprocessor without padding, for images of any size.
        preprocessor: the model's.
        selector: chooses the patches.
    """

    names: list[str]
    transforms: list[BaseTransform]
    normalise: nn.Module
    preprocessor: nn.Module
    selector: PatchSelector


class Draw(NamedTuple):
    """One draw of a photo; all but ``none`` have an entry for each step.

    Args:
        tokens, cells: (S,) tokens kept, and those of a uniform ViT; 0 where there is no image yet.
        sizes: (S, 2) height and width of the image in pixels.
        changed: (S,) bool, whether the step changed the image.
        none: steps that returned None before this draw.
    """

    tokens: np.ndarray
    cells: np.ndarray
    sizes: np.ndarray
    changed: np.ndarray
    none: list[int]


class Measured(NamedTuple):
    """The draws of all photos, and why others were left out."""

    draws: list[Draw]
    left_out: list[str]


def measure_pipeline(
    pipeline: Pipeline, photos: Sequence[Mapping[str, Any]], draws: int, seed: int, workers: int
) -> Measured:
    """Count the tokens of each photo after each step, in so many random draws.

    Args:
        photos: what the pipeline starts from, such as ``{"img_path": ...}``.
        workers: processes that read photos; the result does not depend on them.

    Raises:
        ValueError: if a transform fails for another reason than an unreadable file, or all photos are left out.
    """
    if workers:
        # Ends OpenCV's threads: a forked worker inherits their pool without them, and would wait for them forever.
        cv2.setNumThreads(1)
    source = _Photos(pipeline, photos, draws, seed)
    loader = DataLoader(source, None, num_workers=workers, collate_fn=_as_they_are, worker_init_fn=one_thread)
    found = Measured([], [])
    for made in tqdm(loader, "photos", total=len(photos), unit="photo"):
        if isinstance(made, DataError):
            found.left_out.append(str(made))
        elif isinstance(made, Exception):
            raise made
        else:
            found.draws.extend(made)
    if not found.draws:
        raise ValueError(f"none of {len(photos)} photos comes through the pipeline: {found.left_out[0]}")
    return found


def _as_they_are(made: Any) -> Any:
    return made


class _Photos(Dataset):
    """Photos -> their draws, or the error that prevents them (a worker would add its traceback to one raised)."""

    def __init__(self, pipeline: Pipeline, photos: Sequence[Mapping[str, Any]], draws: int, seed: int) -> None:
        self.pipeline, self.photos, self.draws, self.seed = pipeline, photos, draws, seed

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, number: int) -> list[Draw] | Exception:
        try:
            return [self._draw(number, draw) for draw in range(self.draws)]
        except ValueError as error:
            return error

    def _draw(self, number: int, draw: int) -> Draw:
        made, none = draw_until_made(draw_once, self.pipeline, self.photos[number], (self.seed, number, draw))
        return made._replace(none=none)


def draw_until_made(
    make: Callable[[Pipeline, Mapping[str, Any]], Made | int],
    pipeline: Pipeline,
    photo: Mapping[str, Any],
    seeds: tuple[int, int, int],
) -> tuple[Made, list[int]]:
    """Draw a photo again while a step returns None.

    Args:
        make: returns what it makes of the photo, or the number of the step that returned None.
        seeds: seed, number of the photo, number of the draw.

    Returns:
        What was made, and the steps that returned None before.

    Raises:
        DataError: if none of ``TRIES`` draws gives an image.
    """
    none: list[int] = []
    for attempt in range(TRIES):
        with random_numbers(*seeds, attempt):
            made = make(pipeline, photo)
        if not isinstance(made, int):
            return made, none
        none.append(made)
    raise DataError(f"{photo['img_path']}: {pipeline.names[none[-1]]} returned None in {TRIES} draws")


def last_image(pipeline: Pipeline, photo: Mapping[str, Any]) -> Tensor | int:
    """What the model sees of a photo in training, (1, C, H, W); the number of the step if one returned None."""
    results: Any = dict(photo)
    for step, transform in enumerate(pipeline.transforms):
        results = _apply(pipeline.names[step], transform, results, photo)
        if results is None:
            return step
    return _padded(pipeline.preprocessor, results)


def draw_once(pipeline: Pipeline, photo: Mapping[str, Any]) -> Draw | int:
    """Send a photo through the pipeline; the number of the step that returned None if one did."""
    counts, image = _Counts(pipeline.selector), None
    results: Any = dict(photo)
    for step, transform in enumerate(pipeline.transforms):
        before = None if image is None else image.copy()  # a transform may work in place
        results = _apply(pipeline.names[step], transform, results, photo)
        if results is None:
            return step
        image = results.get("img", image)
        if image is None or (before is not None and np.array_equal(image, before)):
            counts.repeat()
        else:
            counts.add(_normalised(pipeline.normalise, image))
    counts.add_padded(_padded(pipeline.preprocessor, results))
    return counts.draw()


def _apply(name: str, transform: BaseTransform, results: dict, photo: Mapping[str, Any]) -> dict | None:
    try:
        return transform(results)
    except DataError:
        raise
    except Exception as error:  # a transform may be anybody's
        reason = one_line(error)
        raise ValueError(f"{name}, a step of the pipeline, fails for {photo['img_path']}: {reason}") from error


class _Counts:
    """Collects the entries of a :class:`Draw`."""

    def __init__(self, selector: PatchSelector) -> None:
        self.selector, self.changed = selector, []
        self.entries: list[tuple[int, ...]] = []

    def add(self, image: Tensor) -> None:
        """Count the tokens of an image (1, C, H, W)."""
        patches = choose_patches(self.selector, image)
        self.entries.append((int(patches.per_scale.sum()), patches.cells, *image.shape[-2:]))
        self.changed.append(True)

    def add_padded(self, image: Tensor) -> None:
        """Count the tokens of the last image with its padding."""
        self.add(image)
        self.changed[-1] = self.entries[-1][2:] != self.entries[-2][2:]

    def repeat(self) -> None:
        """Note a step that left the image as it was."""
        self.entries.append(self.entries[-1] if self.entries else (0, 0, 0, 0))
        self.changed.append(False)

    def draw(self) -> Draw:
        entries = np.array(self.entries)
        return Draw(entries[:, 0], entries[:, 1], entries[:, 2:], np.array(self.changed), [])


def _normalised(normalise: nn.Module, image: np.ndarray) -> Tensor:
    """An image (H, W, C) of a pipeline as the model would see it without padding, (1, C, H, W)."""
    pixels = torch.from_numpy(np.ascontiguousarray(np.atleast_3d(image).transpose(2, 0, 1)))
    return normalise({"inputs": [pixels]}, training=False)["inputs"]


def _padded(preprocessor: nn.Module, packed: Mapping[str, Any]) -> Tensor:
    """What the model sees in training, (1, C, H, W). Raises ValueError if nothing is packed."""
    missing = [name for name in ("inputs", "data_samples") if name not in packed]
    if missing:
        raise ValueError(f"the pipeline leaves no {' and no '.join(missing)}: it should end with PackSegInputs")
    batch = {name: [packed[name]] for name in ("inputs", "data_samples")}
    return preprocessor(batch, training=True)["inputs"]
