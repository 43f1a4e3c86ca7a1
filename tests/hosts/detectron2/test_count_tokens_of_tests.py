"""The share of tokens of a test: over all cells, in the log and in the metrics of a run."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from detectron2.utils.events import EventStorage

from apt_dense.hosts.detectron2 import APTViT
from apt_dense.hosts.detectron2.count_tokens_of_tests import tokens_counted

from support.threads import one_thread  # noqa: F401 (a fixture)


@torch.inference_mode()
def test_shares_are_weighted_by_cells(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Sequential(
        APTViT(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, thresholds=(5.0,)).eval()
    )
    noise = torch.randn(1, 3, 32, 32)
    with EventStorage() as storage, caplog.at_level("INFO", "detectron2.apt_dense"):
        with tokens_counted(model):
            model(torch.zeros(1, 3, 32, 64))  # flat: 8 tokens of 32
            model(noise)  # all 16 of 16
        assert storage.latest()["test/tokens_kept"][0] == pytest.approx(24 / 48)
        assert "tokens_kept of the test: 0.5000" in caplog.text
        model(noise)
        assert storage.latest()["test/tokens_kept"][0] == pytest.approx(24 / 48), "only inside the block"


def test_models_without_our_backbone_log_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with tokens_counted(torch.nn.Identity()), caplog.at_level("INFO"):
        pass
    assert "tokens_kept" not in caplog.text
