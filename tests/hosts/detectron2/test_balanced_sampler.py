"""Detectron2's balanced sampler: counts as the model sees images, order, batches, resuming, configs."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")
pytest.importorskip("shapely", reason="Detectron2's training loader crops masks with shapely: pip install shapely")

from detectron2.config import LazyConfig, instantiate
from detectron2.data.build import build_detection_train_loader
from omegaconf import DictConfig, OmegaConf

from apt_dense.hosts.balanced_order import BalancedOrder
from apt_dense.hosts.detectron2 import BalancedTrainingSampler, balanced_sampler
from apt_dense.hosts.detectron2.balanced_sampler import use_balanced_sampler
from apt_dense.hosts.detectron2.coco_data import use_data_root
from apt_dense.hosts.detectron2.resumable_loader import build_resumable_loader, resumable
from apt_dense.hosts.token_counts import read_counts

from shared.token_counts import TokenCounter
from support.tiny_coco import ADAPTIVE, one_thread, tiny_config, write_coco  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data") / "coco", images=7)


def config(coco: Path, counts: Path, *overrides: str) -> DictConfig:
    cfg = tiny_config(ADAPTIVE, "train.device=cpu", *overrides)
    use_data_root(cfg, str(coco), ["train"])
    use_balanced_sampler(cfg, str(counts))
    return cfg


def names(loader: Any, batches: int) -> list[list[int]]:
    return [[int(Path(image["file_name"]).stem) for image in batch] for batch in islice(loader, batches)]


def test_counts_are_those_of_the_model_in_training(coco: Path, tmp_path: Path) -> None:
    """Through the mapper's own augmentations, whose random numbers follow from the image."""
    cfg = config(coco, tmp_path / "x.json")
    loader = cfg.dataloader.train
    dataset, mapper, model = instantiate(loader.dataset), instantiate(loader.mapper), instantiate(cfg.model)
    tokens, counter, found = instantiate(loader.balance)(dataset, mapper), TokenCounter(model.backbone.net), []
    for index, image in enumerate(dataset):
        with balanced_sampler.random_numbers(index, 0):
            model.backbone(model.preprocess_image([mapper(image)]).tensor)
        found.append(counter.take_counts()[0])
    assert tokens == found == read_counts(tmp_path / "x.json")[0] and len(set(found)) > 2


def test_each_image_once_an_epoch_in_whole_batches_and_resumed(coco: Path, tmp_path: Path) -> None:
    cfg = config(coco, tmp_path / "x.json")
    whole = names(instantiate(resumable(cfg.dataloader.train, 5, 0)), 14)
    seen = [image for batch in whole for image in batch]
    for so_far in range(2, 29, 2):
        times = [seen[:so_far].count(image) for image in range(1, 8)]
        assert max(times) - min(times) <= 1
    assert names(instantiate(resumable(cfg.dataloader.train, 5, 6)), 8) == whole[6:]
    assert names(instantiate(resumable(cfg.dataloader.train, 6, 0)), 14) != whole
    sides = [{name % 2 for name in batch} for batch in whole]
    assert {0, 1} in sides, "wide and tall images share batches, or the order would not be the balanced one"


def test_detectron2_s_own_loader_takes_it(coco: Path, tmp_path: Path) -> None:
    loader = config(coco, tmp_path / "x.json").dataloader.train
    dataset, mapper = instantiate(loader.dataset), instantiate(loader.mapper)
    sampler = BalancedTrainingSampler(instantiate(loader.balance)(dataset, mapper), total_batch_size=2, seed=5)
    stock = build_detection_train_loader(
        dataset, mapper=mapper, sampler=sampler, total_batch_size=2, aspect_ratio_grouping=False
    )
    assert names(stock, 7) == names(instantiate(resumable(loader, 5, 0)), 7)


def test_other_settings_are_counted_again(coco: Path, tmp_path: Path) -> None:
    found = []
    for overrides in ([], ["model.backbone.net.thresholds=[5.0]"], ["dataloader.image_size=96"]):
        loader = config(coco, tmp_path / "x.json", *overrides).dataloader.train
        instantiate(loader.balance)(instantiate(loader.dataset), instantiate(loader.mapper))
        found.append(read_counts(tmp_path / "x.json")[1])
    assert found[0]["patches"] != found[1]["patches"] and found[0]["pipeline"] != found[2]["pipeline"]
    assert found[2]["square_pad"] == 96 and found[0]["names"] == found[2]["names"]


def test_augmentations_taken_in_turn_have_the_tokens_that_were_counted(coco: Path, tmp_path: Path) -> None:
    cfg = config(coco, tmp_path / "x.json", "dataloader.train.total_batch_size=1")
    use_balanced_sampler(cfg, str(tmp_path / "x.json"), draws=3)
    loader, model, found = cfg.dataloader.train, instantiate(cfg.model), []
    order = BalancedOrder(
        instantiate(loader.balance)(instantiate(loader.dataset), instantiate(loader.mapper)), 1, 1, 5, draws=3
    )
    counter = TokenCounter(model.backbone.net)
    for place, [image] in zip(order.images_of(0), islice(instantiate(resumable(loader, 5, 0)), 28), strict=False):
        model.backbone(model.preprocess_image([image]).tensor)
        found.append((image["image_id"], counter.take_counts()[0]))
        assert found[-1][1] == order.tokens[place] and place % 7 == image["image_id"] - 1
    by_image = [{tokens for image, tokens in found if image == number} for number in range(1, 8)]
    assert sum(len(tokens) > 1 for tokens in by_image) > 3, "augmentations differ"
    assert sorted(found[:7]) == sorted(found[21:]), "the fourth epoch takes the first again"
    resumed = names(instantiate(resumable(loader, 5, 9)), 9)
    assert [[number] for number, _ in found[9:18]] == resumed


@pytest.mark.parametrize("draws", [0, -1])
def test_draws_are_a_number(draws: int, coco: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least 1 augmentation"):
        use_balanced_sampler(config(coco, tmp_path / "x.json"), str(tmp_path / "x.json"), draws)


def test_the_config_of_the_run_can_be_written_and_read(coco: Path, tmp_path: Path) -> None:
    LazyConfig.save(config(coco, tmp_path / "x.json"), str(tmp_path / "config.yaml"))
    assert (tmp_path / "config.yaml").is_file()
    loader = LazyConfig.load(str(tmp_path / "config.yaml")).dataloader.train
    assert len(names(instantiate(resumable(loader, 5, 0)), 2)) == 2


@pytest.mark.parametrize("key, value, message", [
    ("model.backbone.net._target_", "detectron2.modeling.ViT", "the backbone is detectron2.modeling.ViT, expected APT"),
    ("dataloader.train._target_", "torch.utils.data.DataLoader", "which makes its own batches"),
    ("dataloader.train.sampler", {"_target_": "x"}, "sampler sets the order; remove it"),
])  # fmt: skip
def test_configs_that_cannot_be_balanced_are_refused(key: str, value: object, message: str, tmp_path: Path) -> None:
    cfg = tiny_config(ADAPTIVE)
    OmegaConf.update(cfg, key, value, merge=False)
    with pytest.raises(ValueError, match=message):
        use_balanced_sampler(cfg, str(tmp_path / "x.json"))


def test_batches_must_divide_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balanced_sampler.comm, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match="total_batch_size=4 must be a positive multiple of the 3 processes"):
        BalancedTrainingSampler([1.0], total_batch_size=4, seed=0)


def test_only_one_order_is_taken() -> None:
    with pytest.raises(ValueError, match="sampler and balance both set the order"):
        build_resumable_loader(
            [{}], mapper=None, total_batch_size=1, seed=0, sampler=torch.utils.data.SequentialSampler([0]),
            balance=lambda dataset, mapper: [1],
        )  # fmt: skip
