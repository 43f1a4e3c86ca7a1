"""Training data and random numbers that follow from the seed and the iteration, so that a resumed run goes on with the
losses of the uninterrupted one."""

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS
from mmengine.runner import Runner
from torch.utils.data import Dataset

from apt_dense.hosts.interrupts import outlive_sigterm
from apt_dense.hosts.randomness_from_seeds import random_numbers, seed_all


class Draw(int):
    """An index into a data set, with the number of indices drawn before it and, unless it is to follow from that, the
    seed of the random numbers with which its image is read."""

    draw: int
    seed: tuple[int, ...] | None

    @classmethod
    def of(cls, index: int, draw: int, seed: tuple[int, ...] | None = None) -> "Draw":
        """Make a draw of an index."""
        made = cls(index)
        made.draw, made.seed = draw, seed
        return made


@DATA_SAMPLERS.register_module()
class DrawSampler(InfiniteSampler):
    """MMEngine's InfiniteSampler, whose indices know their place in the order; a resumed run skips those seen."""

    def _indices_of_rank(self) -> Iterator[Draw]:
        for draw, index in enumerate(super()._indices_of_rank()):
            yield Draw.of(index, draw)


@DATASETS.register_module()
class SeededDataset(Dataset):
    """A data set that reads an image with random numbers which follow from the seed and the number of its draw, or
    from the seed that it is drawn with, whichever worker reads it."""

    def __init__(self, dataset: dict, seed: int) -> None:
        self.dataset, self.seed = DATASETS.build(dataset), seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        outlive_sigterm()
        seed = getattr(index, "seed", None) or (self.seed, get_rank(), getattr(index, "draw", 0))
        with random_numbers(*seed):
            return self.dataset[int(index)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in self.__dict__:  # asked for while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


@HOOKS.register_module()
class SeedIterations(Hook):
    """Seed the random numbers of each iteration (drop path, dropout) with the seed, the process and the iteration."""

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Seed Python, NumPy and torch."""
        seed_all(runner.seed, get_rank(), runner.iter)


def make_resumable(cfg: Config, resumed_seed: int | None = None) -> None:
    """Change a config so that its training can be continued as if it had not stopped.

    The seed is the config's, that of the resumed run, or else 0. Only training by iterations with MMEngine's
    InfiniteSampler, or with BalancedSampler, is changed; anything else keeps MMEngine's order.
    """
    cfg.setdefault("randomness", {})
    if cfg.randomness.get("seed") is None:
        cfg.randomness.seed = 0 if resumed_seed is None else resumed_seed
    loader = cfg.get("train_dataloader") or {}
    sampler = loader.get("sampler", {}).get("type")
    if sampler not in ("InfiniteSampler", "BalancedSampler"):
        return
    if sampler == "InfiniteSampler":
        loader.sampler.type = "DrawSampler"
    loader.dataset = {"type": "SeededDataset", "dataset": loader.dataset, "seed": cfg.randomness.seed}
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), {"type": "SeedIterations"}]
