"""MMEngine's sampler of a training whose processes have nearly equally many tokens in each step."""

import re
from collections.abc import Callable, Iterator, Sized
from itertools import islice
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.registry import DATA_SAMPLERS, MODELS

from apt_dense.hosts.balanced_order import POOL_STEPS, BalancedOrder
from apt_dense.hosts.find_patch_selector import patch_options_of
from apt_dense.hosts.mmseg.resumable_data import Draw, SeededDataset
from apt_dense.hosts.randomness_from_seeds import random_numbers
from apt_dense.hosts.token_counts import cached_counts, digest, read_counts, selector_options
from apt_dense.patches.selector import PatchSelector


@DATA_SAMPLERS.register_module()
class BalancedSampler(InfiniteSampler):
    """MMEngine's ``InfiniteSampler`` in an order in which no process of a step has many more tokens than the others.

    As with that sampler, epochs follow each other without a break and nothing is dropped or repeated. Tokens are those
    of each image after the data set's own pipeline. They are counted when the training starts, unless ``counts`` holds
    them (:mod:`apt_dense.hosts.token_counts`). Use it with loops by iterations.

    Random scales and crops change an image's tokens, so that the counts of one draw say little about the next
    (docs/TRAINING.md). With ``draws``, so many augmentations of each image are counted, and training takes them in
    turn, one an epoch, so that the counts are exact. A config needs no more than

        sampler=dict(type="BalancedSampler", counts="work_dirs/tokens.json", draws=20)

    if ``tools/train_seg.py`` runs it, which knows the other arguments from the config (``use_balanced_sampler``).

    Args:
        dataset: the training set; the Runner gives it.
        counts: file in which tokens are kept.
        batch_size: images per process and step, the data loader's.
        backbone: the options of the backbone that decide about patches, as :class:`apt_dense.PatchSelector` takes them.
        data_preprocessor: config of the model's, which normalises and pads.
        seed: of the order; the Runner gives it.
        draws: augmentations of each image that training takes in turn; None for new ones in each epoch, balanced by
            the counts of one. Needs ``SeededDataset`` around the data set, which ``make_resumable`` puts there.
        workers: processes that read images to count them.
        pool_steps: see :class:`apt_dense.hosts.balanced_order.BalancedOrder`.

    Raises:
        ValueError: if ``counts`` is a file that holds something else, and for options out of range.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        counts: str,
        batch_size: int,
        backbone: dict,
        data_preprocessor: dict,
        seed: int | None = None,
        draws: int | None = None,
        workers: int = 0,
        pool_steps: int = POOL_STEPS,
    ) -> None:
        super().__init__(dataset, seed=seed)
        selector, seeded = PatchSelector(**backbone), isinstance(dataset, SeededDataset)
        if draws is not None and not seeded:
            raise ValueError(f"draws={draws} needs a data set that is read by seeds: put SeededDataset around it")
        source, self.draws = dataset.dataset if seeded else dataset, draws
        count = _counter(source, selector, data_preprocessor)
        counted_with = {
            "patches": selector_options(selector), "draws": draws, "data_preprocessor": str(data_preprocessor),
            **_described(source),
        }  # fmt: skip
        tokens = cached_counts(counts, counted_with, count, len(source) * (draws or 1), workers)
        self.order = BalancedOrder(tokens, self.world_size, batch_size, self.seed, pool_steps, draws or 1)

    def _indices_of_rank(self) -> Iterator[Draw]:
        for number, place in enumerate(self.order.images_of(self.rank)):
            draw, index = divmod(place, self.order.images)
            yield Draw.of(index, number, None if self.draws is None else (index, draw))

    def skip(self, num_samples: int) -> None:
        """Go to the place after so many samples of this process, as a resumed run does."""
        self.indices = islice(self._indices_of_rank(), num_samples, None)


def _counter(dataset: Sized, selector: PatchSelector, preprocessor: dict) -> Callable[[int], float]:
    """Make a function that counts the tokens of a place of :class:`BalancedOrder` as they are in training, with the
    same random numbers in all processes."""
    prepare = MODELS.build(dict(preprocessor))

    def tokens(place: int) -> int:
        draw, index = divmod(place, len(dataset))
        with random_numbers(index, draw):
            sample = dataset[index]
        batch = prepare({"inputs": [sample["inputs"]], "data_samples": [sample["data_samples"]]}, training=True)
        return int(selector.count(batch["inputs"]).sum())

    return tokens


def _described(dataset: Any) -> dict[str, str]:
    """Name the images of a data set and what is done to them."""
    names = digest(str(dataset.get_data_info(i).get("img_path")) for i in range(len(dataset)))
    parts = getattr(dataset, "datasets", [dataset])  # of one that joins others
    pipelines = " ".join(repr(getattr(part, "pipeline", part)) for part in parts)
    return {"names": names, "pipeline": re.sub(r" at 0x[0-9a-f]+", "", pipelines)}


def use_balanced_sampler(cfg: Config, counts: str | None = None, draws: int | None = None) -> None:
    """Make a config's training balance tokens, or complete the ``BalancedSampler`` that it names.

    Args:
        cfg: config with an ``APTViT`` whose arguments are complete (``fill_in_config``).
        counts: file of token counts; None to leave configs alone that name no ``BalancedSampler``.
        draws: see :class:`BalancedSampler`; None for the config's.

    Raises:
        ValueError: if the config trains another backbone, or has another order or form of batches, or the file holds
            something else.
    """
    loader = cfg.train_dataloader
    sampler = loader.get("sampler") or {}
    if counts is None and sampler.get("type") != "BalancedSampler":
        if draws is not None:
            raise ValueError("--balance-draws needs --balance FILE, in which token counts are kept")
        return
    if draws is not None and draws < 1:
        raise ValueError(f"draws={draws}: expected at least 1 augmentation of each image")
    backbone = cfg.model.get("backbone") or {}
    if backbone.get("type") != "APTViT":
        raise ValueError(f"tokens cannot be balanced: the backbone is {backbone.get('type')}, expected APTViT")
    if sampler.get("type") not in ("InfiniteSampler", "BalancedSampler") or sampler.get("shuffle") is False:
        raise ValueError(
            f"tokens cannot be balanced with train_dataloader.sampler={dict(sampler)}: it sets the order itself; "
            f"expected InfiniteSampler in random order, which trains by iterations"
        )
    if loader.get("batch_sampler"):
        raise ValueError("tokens cannot be balanced with a train_dataloader.batch_sampler; remove it")
    given = sampler if sampler.get("type") == "BalancedSampler" else {}
    if not (counts or given.get("counts")):
        raise ValueError('BalancedSampler needs counts="FILE", in which token counts are kept')
    if Path(counts or given["counts"]).exists():
        read_counts(counts or given["counts"])
    loader.sampler = {
        "batch_size": loader.batch_size, "workers": loader.get("num_workers", 0),
        "backbone": patch_options_of(backbone),
        "data_preprocessor": cfg.model.get("data_preprocessor") or cfg.get("data_preprocessor"),
        **given, "type": "BalancedSampler", **({"counts": counts} if counts else {}),
        **({} if draws is None else {"draws": draws}),
    }  # fmt: skip
