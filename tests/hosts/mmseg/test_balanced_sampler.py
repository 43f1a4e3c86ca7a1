"""MMEngine's balanced sampler: counts as the model sees images, order, resuming, configs."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

pytest.importorskip("mmseg", reason="changes the configs of MMSegmentation")

from mmengine.config import Config
from mmengine.registry import DATA_SAMPLERS, DATASETS, MODELS
from mmengine.runner import Runner

from apt_dense.hosts.mmseg import balanced_sampler
from apt_dense.hosts.mmseg.balanced_sampler import BalancedSampler, use_balanced_sampler
from apt_dense.hosts.mmseg.resumable_data import make_resumable
from apt_dense.hosts.mmseg.training_config import load_config

from shared.token_counts import TokenCounter
from support.tiny_ade import CONFIGS, one_thread, shrink_options, write_ade  # noqa: F401 (a fixture)
from support.tiny_segmentors import mmseg_scope  # noqa: F401 (a fixture)

LINEAR = next(path for path in CONFIGS if path.name.startswith("linear_apt_vit-b16"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ade(tmp_path_factory.mktemp("data") / "ade", images=7)


def config(data: Path, counts: Path | None, **options: object) -> Config:
    cfg = load_config(str(LINEAR), {**shrink_options(LINEAR), **options}, data_root=str(data))
    use_balanced_sampler(cfg, counts and str(counts))
    return cfg


@pytest.fixture
def sampler(data: Path, tmp_path: Path) -> Iterator[BalancedSampler]:
    cfg = config(data, tmp_path / "tokens.json")
    make_resumable(cfg)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    return DATA_SAMPLERS.build(cfg.train_dataloader.sampler, default_args={"dataset": dataset, "seed": 3})


def test_counts_are_those_of_the_model_in_training(sampler: BalancedSampler, data: Path, tmp_path: Path) -> None:
    """Through the data set's own pipeline, whose random scales and crops follow from the image."""
    cfg = config(data, tmp_path / "tokens.json")
    model, dataset = MODELS.build(cfg.model), DATASETS.build(cfg.train_dataloader.dataset)
    counter, found = TokenCounter(model.backbone), []
    for index in range(len(dataset)):
        with balanced_sampler.random_numbers(index, 0):
            sample = dataset[index]
        batch = {"inputs": [sample["inputs"]], "data_samples": [sample["data_samples"]]}
        model.backbone(model.data_preprocessor(batch, training=True)["inputs"])
        found.append(counter.take_counts()[0])
    assert json.loads((tmp_path / "tokens.json").read_text())["tokens"] == found == sampler.order.tokens.tolist()
    assert len(set(found)) > 2


def test_each_image_once_an_epoch_and_resumed_at_any_draw(sampler: BalancedSampler) -> None:
    drawn = list(islice(iter(sampler), 21))
    for so_far in range(2, 21, 2):  # batches of two, so that one of them is shared by two epochs
        times = [drawn[:so_far].count(image) for image in range(7)]
        assert max(times) - min(times) <= 1
    assert [draw.draw for draw in drawn] == list(range(21)) and drawn[:7] != drawn[14:]
    for seen in (0, 4, 9):
        sampler.skip(seen)
        rest = list(islice(iter(sampler), 21 - seen))
        assert rest == drawn[seen:] and [draw.draw for draw in rest] == list(range(seen, 21))


def test_the_runner_s_loader_takes_it(data: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path / "x.json", **{"train_dataloader.batch_size": 3})
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    batch = next(iter(loader))
    assert len(batch["inputs"]) == 3 and loader.sampler.order.batch_size == 3


def test_other_settings_are_counted_again(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    counter = balanced_sampler._counter
    monkeypatch.setattr(balanced_sampler, "_counter", lambda *given: lambda i: counted.append(i) or counter(*given)(i))
    same = {"train_dataloader.batch_size": 1}  # nothing that tokens depend on
    crop = {"train_dataloader.dataset.pipeline.4.crop_size": (32, 64)}
    for options, total in (({}, 7), (same, 7), (crop, 14), ({"model.backbone.thresholds": (5.0,)}, 21)):
        loader = config(data, tmp_path / "x.json", **options).train_dataloader
        DATA_SAMPLERS.build(loader.sampler, default_args={"dataset": DATASETS.build(loader.dataset), "seed": 0})
        assert len(counted) == total, options


def test_augmentations_taken_in_turn_have_the_tokens_that_were_counted(data: Path, tmp_path: Path) -> None:
    cfg = config(data, tmp_path / "x.json", **{"train_dataloader.batch_size": 1})
    use_balanced_sampler(cfg, str(tmp_path / "x.json"), draws=3)
    make_resumable(cfg)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    sampler = DATA_SAMPLERS.build(cfg.train_dataloader.sampler, default_args={"dataset": dataset, "seed": 0})
    counted, order, found = sampler.order.tokens, sampler.order, []
    prepare = MODELS.build(cfg.model.data_preprocessor)
    selector = balanced_sampler.PatchSelector(**cfg.train_dataloader.sampler.backbone)
    for place, draw in zip(order.images_of(0), islice(iter(sampler), 28), strict=False):
        sample = dataset[pickle.loads(pickle.dumps(draw))]
        batch = {"inputs": [sample["inputs"]], "data_samples": [sample["data_samples"]]}
        found.append((draw, int(selector.count(prepare(batch, training=True)["inputs"]).sum())))
        assert found[-1][1] == counted[place] and place % 7 == draw
    by_image = [{tokens for index, tokens in found if index == image} for image in range(7)]
    assert sum(len(tokens) > 1 for tokens in by_image) > 2, "augmentations differ"
    assert sorted(found[:7]) == sorted(found[21:]), "the fourth epoch takes the first again"


def test_configs_are_changed_only_when_asked(data: Path, tmp_path: Path) -> None:
    assert config(data, None).train_dataloader.sampler.type == "InfiniteSampler"
    named = {"train_dataloader.sampler": dict(type="BalancedSampler", counts="x.json", pool_steps=5)}
    cfg = config(data, None, **named)
    sampler = cfg.train_dataloader.sampler
    assert sampler.type == "BalancedSampler" and sampler.counts == "x.json" and sampler.pool_steps == 5
    assert sampler.batch_size == 2 and sampler.backbone.thresholds == (5.5, 4.0)
    make_resumable(cfg)
    assert cfg.train_dataloader.sampler.type == "BalancedSampler"
    assert cfg.train_dataloader.dataset.type == "SeededDataset"


def test_draws_need_a_file_seeds_and_a_number(data: Path, tmp_path: Path) -> None:
    cfg = config(data, None)
    with pytest.raises(ValueError, match="--balance-draws needs --balance FILE"):
        use_balanced_sampler(cfg, None, draws=2)
    with pytest.raises(ValueError, match="draws=0: expected at least 1"):
        use_balanced_sampler(cfg, str(tmp_path / "x.json"), draws=0)
    use_balanced_sampler(cfg, str(tmp_path / "x.json"), draws=2)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    with pytest.raises(ValueError, match="put SeededDataset around it"):
        DATA_SAMPLERS.build(cfg.train_dataloader.sampler, default_args={"dataset": dataset, "seed": 0})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.backbone.type": "VisionTransformer"}, "the backbone is VisionTransformer, expected APTViT"),
        ({"train_dataloader.sampler": dict(type="DefaultSampler", shuffle=True)}, "expected InfiniteSampler"),
        ({"train_dataloader.sampler.shuffle": False}, "sets the order itself"),
        ({"train_dataloader.batch_sampler": dict(type="X")}, "batch_sampler; remove it"),
        ({"train_dataloader.sampler": dict(type="BalancedSampler")}, 'needs counts="FILE"'),
    ],
)
def test_configs_that_cannot_be_balanced_are_refused(change: dict, message: str, data: Path, tmp_path: Path) -> None:
    counts = None if "needs counts" in message else tmp_path / "x.json"
    with pytest.raises(ValueError, match=message):
        config(data, counts, **change)
