"""Training under ``torch.use_deterministic_algorithms`` runs, and gives the same bits each time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from apt_dense import APTViT

from support.references import noise, randomise

VIT = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2, "thresholds": (5.5, 4.0)}
MODELS = {
    "thresholds": {},
    "token budget": {"token_budget": 0.6},
    "windows and relative positions": {"window_size": 4, "window_block_indexes": (0,), "use_rel_pos": True},
    "other sizes, padding without tokens": {"drop_padding": True},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(autouse=True)
def deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS asks for
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients_of(options: dict, device: str) -> list[Tensor]:
    torch.manual_seed(0)  # drop path
    model = randomise(APTViT(**VIT, drop_path_rate=0.2, **options), 0.2, 0).to(device).train()
    images = noise(2, 3, 56, 72, seed=1)
    images[0, :, :, :40] = 0.1  # flat in part
    images[1, :, 40:] = 0  # padding
    model(images.to(device))[0].square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_repeat_to_the_last_bit(name: str, device: str) -> None:
    first, second = (gradients_of(MODELS[name], device) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in first)
