"""On a GPU: the values of the CPU, all terms, types and layouts, and no waiting for the device with a budget."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from apt_dense import APTViT

from support.references import noise, normalise

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
PLAIN = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "thresholds": (5.0, 4.0)}
OPTIONS = {
    "plain": {},
    "uniform": {"thresholds": ()},
    "windows": {"window_size": 4, "window_block_indexes": (0,), "use_rel_pos": True},
    "class token": {"class_token": True, "reg_tokens": 2},
    "rotary": {"rotary": {}},
    "budget": {"token_budget": 0.6},
    "budget in windows": {"token_budget": 0.6, "window_size": 4, "window_block_indexes": (0,), "use_rel_pos": True},
}


def images(size: tuple[int, int] = (64, 72)) -> Tensor:
    """Half flat, half noisy, so that all scales occur."""
    picture = torch.full((2, 3, *size), 90.0)
    picture[..., size[1] // 2 :] += 40 * noise(2, 3, size[0], size[1] - size[1] // 2)
    return normalise(picture.round().clamp(0, 255))


def model_of(name: str) -> APTViT:
    torch.manual_seed(0)
    model = APTViT(**{**PLAIN, **OPTIONS[name]})
    for parameter in model.parameters():
        torch.nn.init.trunc_normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_of_the_cpu(name: str) -> None:
    own, there = model_of(name), model_of(name).to(DEVICE)
    found = []
    for model, device in ((own, "cpu"), (there, DEVICE)):
        x = images().to(device).requires_grad_()
        out = model(x)[-1]
        found.append([out, *torch.autograd.grad(out.square().mean(), [x, *model.parameters()], allow_unused=True)])
    assert torch.equal(own.partition(images()), there.partition(images().to(DEVICE)).cpu())
    for expected, value in zip(*found, strict=True):
        assert (expected is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(value.cpu(), expected, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_16_bits_under_autocast(name: str, dtype: torch.dtype) -> None:
    model = model_of(name).to(DEVICE)
    with torch.no_grad():
        expected = model(images().to(DEVICE))[-1]
        with torch.autocast(DEVICE, dtype):
            out = model(images().to(DEVICE))[-1]
    assert out.isfinite().all()
    assert (out.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("backend", ["sdpa", "mask", "varlen", "flex"])
def test_each_kernel_trains(backend: str) -> None:
    """Where it cannot, its error says why."""
    model = model_of("windows").to(DEVICE)
    expected = model(images().to(DEVICE))[-1]
    other = copy.deepcopy(model)
    for block in other.blocks:
        block.attn.backend = backend
    with torch.autocast(DEVICE, torch.bfloat16, enabled=backend == "varlen"):
        try:
            out = other(images().to(DEVICE))[-1]
        except ValueError as error:
            pytest.skip(str(error))
    out.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in other.parameters())
    tolerance = 0.1 if backend == "varlen" else 1e-3
    assert (out.float() - expected).abs().mean() < tolerance * expected.abs().mean()


def test_a_budget_never_waits_for_the_device() -> None:
    model, x = model_of("budget").to(DEVICE), images().to(DEVICE)
    with torch.no_grad():
        model(x)  # tables that depend on the size are made here
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_thresholds_wait_once() -> None:
    model, x = model_of("plain").to(DEVICE), images().to(DEVICE)
    with torch.no_grad():
        model(x)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchroniz") as caught:
                model(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) <= 2
