"""The hook of Detectron2 that warns of another share of tokens."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from detectron2.engine import SimpleTrainer
from torch import nn

from apt_dense.hosts import token_drift
from apt_dense.hosts.detectron2 import APTViT, PatchScheduleHook, TokenDriftHook

from support.threads import one_thread  # noqa: F401 (a fixture)


class Detector(nn.Module):
    """A model whose loss is that of its backbone."""

    def __init__(self, thresholds: tuple[float, ...]) -> None:
        super().__init__()
        self.backbone = APTViT(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, thresholds=thresholds)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.backbone(images)["last_feat"].mean()}


@pytest.mark.parametrize(("expected", "annealed", "warnings"), [(0.9, False, 1), (0.25, False, 0), (0.9, True, 0)])
def test_a_share_far_from_the_expected_one_is_said_once(
    expected: float, annealed: bool, warnings: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(token_drift, "WINDOW", 2)
    model = Detector((9.0,)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(model, [torch.randn(1, 3, 32, 32)] * 9, optimizer)
    schedule = [PatchScheduleHook(end=1.0)] * annealed  # the target holds in the last iteration alone
    trainer.register_hooks([*schedule, TokenDriftHook(expected)])
    trainer.train(0, 5)
    assert sum(f"{expected:.1%} were expected" in message for message in caplog.messages) == warnings
