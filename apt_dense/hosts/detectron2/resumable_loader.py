"""A training loader for Detectron2 that continues an interrupted run at the image where it stopped.

Detectron2 starts a new random order whenever a loader is built, and its augmentations use the random numbers of
whichever worker reads an image.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.build import build_detection_train_loader, trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset, Sampler

from apt_dense.hosts.detectron2.balanced_sampler import BalancedTrainingSampler, TokenCounting
from apt_dense.hosts.detectron2.readable_images import NamingMapper
from apt_dense.hosts.interrupts import outlive_sigterm
from apt_dense.hosts.randomness_from_seeds import random_numbers


def resumable(loader: DictConfig, seed: int, start_iter: int) -> DictConfig:
    """Change the config of a training loader so that it starts at ``start_iter``, as if the iterations before had run.

    Only Detectron2's own loader of a list of images can be replaced; any other config is returned unchanged.
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
    balance: TokenCounting | None = None,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Any = None,
    **options: Any,
) -> DataLoader:
    """Build Detectron2's ``build_detection_train_loader`` with images and augmentations that follow from the seed and
    the iteration.

    Batches are put together in the main process, where skipping those already seen is free, and each image is read with
    its own random numbers, whichever worker reads it.

    Args:
        dataset: Detectron2's dicts, one per image.
        mapper: reads and augments an image.
        total_batch_size: images per iteration, over all processes.
        seed: of the order (unless there is a ``sampler``) and of the augmentations.
        start_iter: iterations to skip.
        sampler: endless indices into ``dataset``; by default all images in a new random order each time.
        balance: counts the tokens of the images, which the processes of an iteration then have nearly equally many of
            (:class:`BalancedTrainingSampler`). Wide and tall images then share batches.
        aspect_ratio_grouping: whether a batch holds either wide or tall images.
        **options: as for torch's DataLoader.

    Raises:
        ValueError: if ``total_batch_size`` is not a positive multiple of the number of processes, or there are both
            ``sampler`` and ``balance``.
    """
    ranks = comm.get_world_size()
    if total_batch_size % ranks or total_batch_size <= 0:
        raise ValueError(f"total_batch_size={total_batch_size} must be a positive multiple of the {ranks} processes")
    if sampler is not None and balance is not None:
        raise ValueError("sampler and balance both set the order of images; give one of them")
    draws = 1 if balance is None else balance.draws or 1
    if balance is not None:
        sampler = BalancedTrainingSampler(balance(dataset, mapper), total_batch_size, seed, draws)
    apart = aspect_ratio_grouping and balance is None
    wide = [image["width"] > image["height"] for image in dataset] if apart else [False] * len(dataset) * draws
    sampler = TrainingSampler(len(dataset), seed=seed) if sampler is None else sampler
    images = MapDataset(DatasetFromList(dataset, copy=False), NamingMapper(mapper))
    in_turn = balance is not None and balance.draws is not None
    return DataLoader(
        DrawnInTurn(images) if in_turn else SeededDataset(images, (seed, comm.get_rank())),
        batch_sampler=BatchesFrom(start_iter, sampler, total_batch_size // ranks, wide),
        num_workers=num_workers,
        collate_fn=trivial_batch_collator if collate_fn is None else collate_fn,
        # Starting draws a number, which must not come from the model's generator: a resumed run starts once more.
        generator=torch.Generator(),
        **options,
    )


class BatchesFrom(Sampler):
    """Endless batches of (image, draw) from an endless sampler, from batch ``start`` on, wide and tall images separate.

    ``draw`` counts the images drawn from the sampler.
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
    """A data set that reads an image with random numbers which follow from the seed and the number of its draw."""

    def __init__(self, dataset: Dataset, seed: tuple[int, ...]) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        outlive_sigterm()
        image, draw = key
        with random_numbers(*self.seed, draw):
            return self.dataset[image]


class DrawnInTurn(Dataset):
    """A data set whose places are images in the first draw of their augmentation, then in the second, and so on, with
    random numbers that follow from the image and its draw: those whose tokens ``TokenCounting`` has counted."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        outlive_sigterm()
        draw, image = divmod(key[0], len(self.dataset))
        with random_numbers(image, draw):
            return self.dataset[image]
