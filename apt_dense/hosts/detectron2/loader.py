"""A training loader for Detectron2 that takes up an interrupted run at the very image where it stopped.

Detectron2 begins a new random order whenever a loader is built, and its augmentations draw from the random numbers of
the worker that happens to read an image.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.build import build_detection_train_loader, trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, Sampler


def resumable(loader: DictConfig, seed: int, start_iter: int) -> DictConfig:
    """The config of a training loader that begins at ``start_iter`` as if the iterations before had run.

    Only Detectron2's own loader of a list of images can be replaced; any other config is returned as it is.
    """
    target = loader._target_
    if (locate(target) if isinstance(target, str) else target) is not build_detection_train_loader:
        return loader
    # A copy keeps its parent, which interpolations look up.
    loader = loader.copy()
    loader.update(_target_=build_resumable_loader, seed=seed, start_iter=start_iter)
    return loader


def build_resumable_loader(
    dataset: list[dict],
    *,
    mapper: Any,
    total_batch_size: int,
    seed: int,
    start_iter: int = 0,
    sampler: Sampler | None = None,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Any = None,
    **options: Any,
) -> DataLoader:
    """Detectron2's ``build_detection_train_loader``, whose images and augmentations follow from seed and iteration.

    The batches are drawn up in the main process, where those already seen cost nothing to skip, and each image is read
    with random numbers of its own, whichever worker reads it.

    Args:
        seed: of the order (unless there is a ``sampler``) and of the augmentations.
        start_iter: iterations to skip.
        **options: as for torch's DataLoader.
    """
    ranks = comm.get_world_size()
    if total_batch_size % ranks or total_batch_size <= 0:
        raise ValueError(f"total_batch_size={total_batch_size} must be a positive multiple of the {ranks} processes")
    wide = [image["width"] > image["height"] for image in dataset] if aspect_ratio_grouping else [False] * len(dataset)
    sampler = TrainingSampler(len(dataset), seed=seed) if sampler is None else sampler
    return DataLoader(
        SeededDataset(MapDataset(DatasetFromList(dataset, copy=False), mapper), (seed, comm.get_rank())),
        batch_sampler=BatchesFrom(start_iter, sampler, total_batch_size // ranks, wide),
        num_workers=num_workers,
        collate_fn=trivial_batch_collator if collate_fn is None else collate_fn,
        # The loader draws a number when it starts; not from the generator of the model, which a resumed run shares.
        generator=torch.Generator(),
        **options,
    )


class BatchesFrom(Sampler):
    """Endless batches of (image, draw) from an endless sampler, wide and tall images apart, without the first ones.

    ``draw`` counts the images that the sampler gave out.
    """

    def __init__(self, start: int, sampler: Sampler, batch_size: int, wide: Sequence[bool]) -> None:
        self.start, self.sampler, self.batch_size, self.wide = start, sampler, batch_size, wide

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._batches(), self.start, None)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for draw, image in enumerate(self.sampler):
            batch = waiting[self.wide[image]]
            batch.append((image, draw))
            if len(batch) == self.batch_size:
                waiting[self.wide[image]] = []
                yield batch


class SeededDataset(Dataset):
    """Reads image ``i`` of its ``draw``-th use with random numbers that depend on nothing else."""

    def __init__(self, dataset: Dataset, seed: tuple[int, ...]) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        image, draw = key
        with random_numbers(*self.seed, draw):
            return self.dataset[image]


@contextmanager
def random_numbers(*seed: int) -> Iterator[None]:
    """Inside, random numbers of Python, NumPy and torch (CPU) follow from ``seed``; after, they go on as before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            seed_all(*seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def seed_all(*seed: int) -> None:
    """Seed Python, NumPy and torch, on all devices, with several numbers, none negative, at once."""
    first, second, third = (int(word) for word in np.random.SeedSequence(seed).generate_state(3))
    random.seed(first)
    np.random.seed(second)
    torch.manual_seed(third)
