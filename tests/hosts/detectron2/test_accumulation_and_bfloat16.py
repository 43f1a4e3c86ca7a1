"""Several batches per iteration and bfloat16 in Detectron2's loop; test_two_processes_equal_one.py has whole runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage, get_event_storage
from omegaconf import DictConfig, OmegaConf

from apt_dense.hosts.detectron2.accumulation_and_bfloat16 import AccumulatingTrainer, make_trainer
from apt_dense.hosts.detectron2.read_lazy_config import apply_overrides, complete_config, load_config

from support.tiny_coco import ADAPTIVE


class Regression(nn.Module):
    """Two losses of a line through numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.dtypes: list[torch.dtype] = []

    def forward(self, numbers: list[float]) -> dict[str, torch.Tensor]:
        found = self.line(torch.tensor(numbers)[:, None])
        self.dtypes.append(found.dtype)
        return {"square": found.square().mean(), "plain": found.mean()}


def trained(batches: list[list[float]], accumulate: int, iterations: int) -> tuple[Regression, float]:
    """The model, and the loss that the last iteration logged."""
    torch.manual_seed(0)
    model = Regression()
    trainer = AccumulatingTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), accumulate)
    trainer.data_loader, trainer.iter = batches, 0
    with EventStorage(0):
        for _ in range(iterations):
            trainer.run_step()
        return model, get_event_storage().latest()["total_loss"][0]


def test_several_batches_are_one_large_one() -> None:
    whole, loss = trained([[1.0, 2.0, 3.0, 5.0], [4.0, 1.0, 0.0, 2.0]], 1, 2)
    parts, mean_loss = trained([[1.0, 2.0], [3.0, 5.0], [4.0, 1.0], [0.0, 2.0]], 2, 2)
    assert mean_loss == pytest.approx(loss)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict())


def train_options(**options: object) -> DictConfig:
    return OmegaConf.create({"amp": {"enabled": False}, **options})


@pytest.mark.parametrize(
    "options, kind",
    [
        ({}, SimpleTrainer),
        ({"accumulate": 2}, AccumulatingTrainer),
        ({"amp": {"enabled": True, "dtype": "bfloat16"}}, AccumulatingTrainer),
        ({"amp": {"enabled": True}}, AMPTrainer),
    ],
)
def test_the_config_chooses_the_trainer(options: dict, kind: type) -> None:
    model = Regression()
    trainer = make_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), train_options(**options))
    assert type(trainer) is kind
    if kind is AccumulatingTrainer:
        trainer.data_loader, trainer.iter = [[1.0], [2.0]], 0
        with EventStorage(0):
            trainer.run_step()
        assert model.dtypes[0] is (torch.bfloat16 if "amp" in options else torch.float32)
        assert len(model.dtypes) == options.get("accumulate", 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"accumulate": 0}, "train.accumulate=0: expected a whole number"),
        ({"accumulate": 1.5}, "train.accumulate=1.5"),
        ({"amp": {"enabled": True, "dtype": "float8"}}, "float8.: expected float16 or bfloat16"),
        ({"accumulate": 2, "amp": {"enabled": True}}, "in float16 is not supported: set train.amp.dtype=bfloat16"),
    ],
)
def test_other_options_are_refused(options: dict, message: str) -> None:
    model = Regression()
    with pytest.raises(ValueError, match=message):
        make_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), train_options(**options))


@pytest.mark.parametrize("dtype, stays", [("bfloat16", True), ("float16", False)])
def test_bfloat16_stays_on_without_a_gpu(dtype: str, stays: bool) -> None:
    cfg = load_config(str(ADAPTIVE))
    apply_overrides(cfg, ["train.device=cpu", f"train.amp.dtype={dtype}", "train.accumulate=3"])
    complete_config(cfg)
    assert cfg.train.amp.enabled is stays
    apply_overrides(cfg, ["train.accumulate=0"])
    with pytest.raises(ValueError, match="train.accumulate=0"):
        complete_config(cfg)
