"""Detectron2's sampler of a training whose processes have nearly equally many tokens in each step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.data.build import build_detection_train_loader
from detectron2.structures import ImageList
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Sampler

from apt_dense.hosts.balanced_order import BalancedOrder
from apt_dense.hosts.randomness_from_seeds import random_numbers
from apt_dense.hosts.token_counts import cached_counts, digest, read_counts, selector_options
from apt_dense.patches.selector import PatchSelector

_SELECTOR_OPTIONS = {field.name for field in fields(PatchSelector)}


class BalancedTrainingSampler(Sampler):
    """Detectron2's ``TrainingSampler`` in an order in which no process of a step has many more tokens than the others.

        tokens = TokenCounting("tokens.json", model.backbone.net.patches)(dataset, mapper)
        sampler = BalancedTrainingSampler(tokens, total_batch_size=16, seed=0)
        build_detection_train_loader(
            dataset, mapper=mapper, sampler=sampler, total_batch_size=16, aspect_ratio_grouping=False
        )

    As with that sampler, epochs follow each other without a break and nothing is dropped or repeated. Grouping by
    aspect ratio would form other batches than this order's, so it must be off unless each process has one image.

    Args:
        tokens: of each image.
        total_batch_size: images per iteration, over all processes.
        seed: of the order, the same in all processes.
        draws: of each image's augmentation that ``tokens`` holds. With more than one, the sampler gives places in
            ``tokens`` (:class:`apt_dense.hosts.balanced_order.BalancedOrder`), which ``build_resumable_loader`` reads.

    Raises:
        ValueError: if ``total_batch_size`` is not a positive multiple of the number of processes, and for no images.
    """

    def __init__(self, tokens: Sequence[float], total_batch_size: int, seed: int, draws: int = 1) -> None:
        ranks = comm.get_world_size()
        if total_batch_size % ranks or total_batch_size <= 0:
            raise ValueError(
                f"total_batch_size={total_batch_size} must be a positive multiple of the {ranks} processes"
            )
        self.order = BalancedOrder(tokens, ranks, total_batch_size // ranks, seed, draws=draws)

    def __iter__(self) -> Iterator[int]:
        return self.order.images_of(comm.get_rank())


@dataclass(frozen=True)
class TokenCounting:
    """Counts the tokens of each image of a training set as its mapper gives it, unless a file holds them.

    Random scales and crops change an image's tokens, so that the counts of one draw say little about the next
    (docs/TRAINING.md). With ``draws``, so many augmentations of each image are counted, and training takes them in
    turn, one an epoch, so that the counts are exact.

    Args:
        counts: file in which tokens are kept (:mod:`apt_dense.hosts.token_counts`).
        selector: of the backbone.
        square_pad: pixels of the square that the model pads to; 0 for none.
        draws: augmentations of each image that training takes in turn; None for new ones in each epoch, balanced by
            the counts of one.
        workers: processes that read images.
    """

    counts: str
    selector: PatchSelector
    square_pad: int = 0
    draws: int | None = None
    workers: int = 0

    def __call__(self, dataset: Sequence[dict], mapper: Any) -> list[float]:
        """Return the tokens of each image, in each draw. All processes of a training must call this.

        Raises:
            ValueError: if the file holds something else.
            OSError: if it cannot be read or written.
        """
        counted_with = {
            "patches": selector_options(self.selector), "draws": self.draws, "square_pad": self.square_pad,
            "names": digest(image["file_name"] for image in dataset), "pipeline": _described(mapper),
        }  # fmt: skip

        def count(place: int) -> float:
            draw, index = divmod(place, len(dataset))
            return self._tokens(dataset[index], mapper, index, draw)

        return cached_counts(self.counts, counted_with, count, len(dataset) * (self.draws or 1), self.workers)

    def _tokens(self, image: Mapping, mapper: Any, *seed: int) -> int:
        with random_numbers(*seed):
            pixels = mapper(image)["image"].float()
        mean, std = (torch.tensor(np.array(one), dtype=torch.float32).view(-1, 1, 1) for one in self._pixels())
        square = self.square_pad if max(pixels.shape[-2:]) <= self.square_pad else 0
        padded = ImageList.from_tensors([(pixels - mean) / std], padding_constraints={"square_size": square})
        return int(self.selector.count(padded.tensor).sum())

    def _pixels(self) -> tuple[Sequence[float], Sequence[float]]:
        return self.selector.pixel_mean, self.selector.pixel_std


def _described(mapper: Any) -> str:
    return f"{type(mapper).__name__} {getattr(mapper, 'image_format', '')} {getattr(mapper, 'augmentations', '')}"


def use_balanced_sampler(cfg: DictConfig, counts: str, draws: int | None = None) -> None:
    """Make a lazy config's training balance tokens when ``train_and_evaluate.train`` runs it.

    Args:
        cfg: config with an ``APTViT`` in ``model.backbone`` or its ``net``, whose arguments are complete.
        counts: file of token counts.
        draws: see :class:`TokenCounting`.

    Raises:
        ValueError: if the config trains another backbone, or has its own loader or order, or the file holds something
            else.
    """
    if draws is not None and draws < 1:
        raise ValueError(f"draws={draws}: expected at least 1 augmentation of each image")
    if Path(counts).exists():
        read_counts(counts)
    backbone = cfg.model.get("backbone") or {}
    net = backbone.get("net") or backbone
    target = net.get("_target_")
    if "APTViT" not in str(target):
        raise ValueError(f"tokens cannot be balanced: the backbone is {target}, expected APTViT")
    loader = cfg.dataloader.train
    builder = loader._target_
    if (locate(builder) if isinstance(builder, str) else builder) is not build_detection_train_loader:
        raise ValueError(f"tokens cannot be balanced: dataloader.train is {builder}, which makes its own batches")
    if loader.get("sampler") is not None:
        raise ValueError("tokens cannot be balanced: dataloader.train.sampler sets the order; remove it")
    given = {name: value for name, value in OmegaConf.to_container(net, resolve=True).items() if name != "_target_"}
    options = {"partial_patches": "crop", **{name: given[name] for name in _SELECTOR_OPTIONS & given.keys()}}
    if not given.get("window_block_indexes"):
        options["window_size"] = 0
    # Numbers alone, since the config is written to the run's folder.
    loader.balance = L(TokenCounting)(
        counts=counts,
        selector=L(PatchSelector)(**options),
        square_pad=backbone.get("square_pad", 0),
        draws=draws,
        workers=loader.get("num_workers", 0),
    )
