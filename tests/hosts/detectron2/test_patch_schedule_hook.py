"""The hook of Detectron2 in its trainers; tests/tools/test_patch_schedules.py has runs of the tool."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from detectron2.engine import SimpleTrainer, TrainerBase

from apt_dense.hosts.detectron2 import APTViT, PatchScheduleHook

from support.threads import one_thread  # noqa: F401 (a fixture)


class Detector(nn.Module):
    """A model whose loss is that of its backbone, which it takes a note of."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        small = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
        self.backbone = APTViT(**small, **{"thresholds": (4.0, 2.0), **options})
        self.seen: list[tuple[float, ...]] = []

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(self.backbone.thresholds)
        return {"loss": self.backbone(images)["last_feat"].mean()}


class NestedTrainer(TrainerBase):
    """A trainer around another one, as ``DefaultTrainer`` is."""

    def __init__(self, trainer: SimpleTrainer) -> None:
        super().__init__()
        self._trainer = trainer

    def run_step(self) -> None:
        self._trainer.iter = self.iter
        self._trainer.run_step()


def trainer_of(model: Detector, nested: bool = False) -> TrainerBase:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(model.train(), [torch.randn(1, 3, 32, 32)] * 9, optimizer)
    return NestedTrainer(trainer) if nested else trainer


@pytest.mark.parametrize("nested", [False, True])
def test_patches_follow_the_iteration(nested: bool) -> None:
    model = Detector()
    trainer = trainer_of(model, nested)
    trainer.register_hooks([PatchScheduleHook(begin=0.25, end=0.75)])
    trainer.train(0, 5)
    assert model.seen == [(each, each / 2) for each in (0, 0, 2, 4, 4)]
    assert trainer.storage.history("threshold_2").values() == [(each / 2, i) for i, each in enumerate((0, 0, 2, 4, 4))]
    assert model.backbone.thresholds == (4.0, 2.0)
    model.seen.clear()
    trainer.train(2, 5)
    assert model.seen == [(2, 1), (4, 2), (4, 2)]


def test_another_schedule_than_the_checkpoint_s_is_said(caplog: pytest.LogCaptureFixture) -> None:
    first = trainer_of(Detector())
    first.register_hooks([PatchScheduleHook(end=0.5)])
    first.train(0, 2)
    for end, said in (0.5, "iterations: 2, now 3"), (0.75, "end: 0.5, now 0.75; iterations: 2, now 3"):
        again = trainer_of(Detector())
        again.register_hooks([PatchScheduleHook(end=end)])
        again.load_state_dict(first.state_dict())
        caplog.clear()
        again.train(2, 3)
        assert caplog.messages[-1] == f"another patch schedule than before: {said}"


def test_models_without_coarse_patches_are_refused() -> None:
    trainer = trainer_of(Detector(thresholds=()))
    trainer.register_hooks([PatchScheduleHook()])
    with pytest.raises(ValueError, match="nothing to anneal"):
        trainer.train(0, 2)
