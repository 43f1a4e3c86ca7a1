"""Data and random numbers of MMSegmentation's training follow from the seed and the iteration."""

from __future__ import annotations

import itertools
import pickle
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

pytest.importorskip("mmengine", reason="changes the configs of MMEngine's Runner")

from mmengine.config import Config
from mmengine.registry import DATASETS

from apt_dense.hosts.mmseg.resumable_data import Draw, DrawSampler, SeededDataset, SeedIterations, make_resumable


@DATASETS.register_module(force=True)
class Noise(Dataset):
    """Random numbers instead of images."""

    metainfo: ClassVar = {"classes": ("a",)}

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[int, float]:
        assert type(index) is int
        return index, np.random.rand()


def test_indices_know_their_place_also_in_another_process() -> None:
    sampler = DrawSampler(range(5), seed=3)
    draws = list(itertools.islice(sampler, 12))
    assert [draw.draw for draw in draws] == list(range(12)) and sorted(draws[:5]) == [0, 1, 2, 3, 4]
    copy = pickle.loads(pickle.dumps(draws[7]))
    assert (copy, copy.draw) == (draws[7], 7)


@pytest.mark.parametrize("seen", [0, 3, 7])
def test_a_resumed_run_sees_what_comes_next(seen: int) -> None:
    whole = list(itertools.islice(DrawSampler(range(5), seed=3), 12))
    sampler, data = DrawSampler(range(5), seed=3), SeededDataset({"type": "Noise"}, 1)
    sampler.skip(seen)
    expected = [data[draw] for draw in whole[seen:]]
    np.random.seed(99)
    assert [data[draw] for draw in itertools.islice(sampler, 12 - seen)] == expected


def test_the_same_image_is_augmented_anew_at_each_draw() -> None:
    data = SeededDataset({"type": "Noise"}, 1)
    assert data[Draw.of(2, 0)] == data[Draw.of(2, 0)] != data[Draw.of(2, 5)]
    assert len(data) == 5 and data.metainfo == Noise.metainfo and len(pickle.loads(pickle.dumps(data))) == 5


def test_iterations_are_seeded() -> None:
    runner, found = SimpleNamespace(seed=1, iter=4), []
    for iteration in (4, 5, 4):
        runner.iter = iteration
        SeedIterations().before_train_iter(runner, batch_idx=0)
        found.append(torch.rand(()).item())
    assert found[0] == found[2] != found[1]


def config(sampler: str = "InfiniteSampler", **other: object) -> Config:
    return Config(dict(train_dataloader=dict(sampler=dict(type=sampler), dataset=dict(type="Noise")), **other))


@pytest.mark.parametrize("given, resumed, seed", [(None, None, 0), (None, 7, 7), (3, 7, 3)])
def test_the_seed_is_the_config_s_or_the_run_s(given: int | None, resumed: int | None, seed: int) -> None:
    cfg = config(randomness=dict(seed=given))
    make_resumable(cfg, resumed)
    assert cfg.randomness.seed == cfg.train_dataloader.dataset.seed == seed
    assert cfg.train_dataloader.sampler.type == "DrawSampler" and cfg.custom_hooks[-1].type == "SeedIterations"


def test_other_samplers_keep_mmengine_s_order() -> None:
    cfg = config("DefaultSampler")
    make_resumable(cfg)
    assert cfg.train_dataloader.dataset.type == "Noise" and "custom_hooks" not in cfg
