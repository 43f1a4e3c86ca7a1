"""The resumable loader: any start, any workers, reproducible random numbers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")
pytest.importorskip("shapely", reason="Detectron2's training loader crops masks with shapely: pip install shapely")

from detectron2.config import instantiate

from apt_dense.hosts.detectron2 import resumable_loader
from apt_dense.hosts.detectron2.coco_data import use_data_root
from apt_dense.hosts.detectron2.read_lazy_config import apply_overrides, load_config
from apt_dense.hosts.detectron2.resumable_loader import build_resumable_loader, random_numbers, resumable

from support.tiny_coco import ADAPTIVE, batches, one_thread, write_coco  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_starts_at_any_iteration(coco: Path, workers: int) -> None:
    all_of_them = batches(coco, 0, 12, "dataloader.train.num_workers=0")
    assert batches(coco, 7, 5, f"dataloader.train.num_workers={workers}") == all_of_them[7:]
    assert len({str(batch) for batch in all_of_them}) == 12


def test_loader_keeps_wide_and_tall_images_apart(coco: Path) -> None:
    drawn = batches(coco, 0, 10, "dataloader.train.num_workers=0")
    odd = [{int(Path(name).stem) % 2 for name, *_ in batch} for batch in drawn]
    assert all(len(kinds) == 1 for kinds in odd) and {0, 1} == set().union(*odd)


def test_loader_differs_with_another_seed(coco: Path) -> None:
    cfg = load_config(str(ADAPTIVE))
    use_data_root(cfg, str(coco), ["train"])
    apply_overrides(cfg, ["dataloader.image_size=64", "dataloader.train.num_workers=0"])
    first = [next(iter(instantiate(resumable(cfg.dataloader.train, seed, 0))))[0]["image"] for seed in (0, 1)]
    assert first[0].shape != first[1].shape or not torch.equal(*first)


def test_other_loaders_are_left_alone() -> None:
    cfg = load_config(str(ADAPTIVE))
    assert resumable(cfg.dataloader.test, 0, 3) is cfg.dataloader.test


def test_random_numbers_inside_follow_the_seed_and_leave_no_trace() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with random_numbers(1, 2):
        first = draw()
    with random_numbers(1, 2):
        assert draw() == first
    with random_numbers(2, 1):
        assert draw() != first
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all() and torch.equal(torch.get_rng_state(), before[2])


def test_batches_must_divide_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable_loader.comm, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="total_batch_size=4 must be a positive multiple of the 3 processes"):
        build_resumable_loader([{}], mapper=None, total_batch_size=4, seed=0)
