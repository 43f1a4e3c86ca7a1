"""Things that users do to modules: hooks, adapters, pruning, parametrisations, quantisation.

A weight is used by calling its module, once per forward pass, and a linear layer is an ``nn.Linear``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations, prune

from apt_dense import APTViT
from apt_dense.ops.linear import is_enabled

from support.contract import photos
from support.references import randomise

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "thresholds": (5.0, 5.0)}
MODELS: dict[str, dict[str, Any]] = {
    "global": {"class_token": True},
    "windows": {"window_size": 5, "window_block_indexes": (0,), "use_rel_pos": True},
    "windows and residual": {"window_size": 4, "window_block_indexes": (1,), "residual_block_indexes": (0,)},
    "no key bias": {"k_bias": False, "window_size": 5, "window_block_indexes": (0,)},
    "separate": {"qkv_fused": False, "k_bias": False, "mlp_layer": "swiglu", "scale_mlp_norm": True},
    "packed mlp": {"mlp_layer": "swiglu_packed", "qk_norm": True, "init_values": 0.1},
    "budget": {"token_budget": 0.6, "window_size": 5, "window_block_indexes": (0,)},
}


def build(name: str) -> APTViT:
    return randomise(APTViT(**SIZES, **MODELS[name]), 0.2)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def images() -> Tensor:
    return photos(28, 36)


@pytest.mark.parametrize("name", MODELS)
def test_hooks_fire_once_and_see_what_the_layer_makes(name: str) -> None:
    model, calls, seen = build(name), Counter(), {}

    def hook(layer: str) -> Callable:
        return lambda module, args, out: calls.update([layer]) or seen.update({layer: (args[0], out)})

    for layer, module in layers_of(model).items():
        module.register_forward_hook(hook(layer))
    model(images())
    blocks = {layer: count for layer, count in calls.items() if layer.startswith("blocks.")}
    assert blocks.keys() == {layer for layer in layers_of(model) if layer.startswith("blocks.")}
    assert set(blocks.values()) == {1}
    for layer, (x, out) in seen.items():
        torch.testing.assert_close(layers_of(model)[layer](x), out, atol=1e-4, rtol=1e-4)


def test_queries_keys_and_values_come_for_all_rows_at_once() -> None:
    """49 tokens in cut windows and a row of zeros for their padding, filled up where oneDNN likes it."""
    model = APTViT(img_size=112, embed_dim=48, depth=1, num_heads=3, window_size=4, window_block_indexes=(0,)).eval()
    shapes = []
    model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    model(torch.randn(1, 3, 112, 112))
    assert shapes == [(64 if is_enabled() else 50, 144)]


class Adapter(nn.Module):
    """A low-rank update of a layer, as PEFT's LoRA layers have it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", MODELS)
def test_adapters_act_and_learn(name: str) -> None:
    model = build(name).requires_grad_(False)
    before = model(images())[0]
    for path, layer in layers_of(model).items():
        if isinstance(layer, nn.Linear):
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, Adapter(layer))
    after = model(images())[0]
    assert (after - before).abs().max() > 0.01
    after.square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not [name for name, p in trained.items() if p.grad is None]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("change", ["pruned", "weight norm", "spectral norm"])
def test_reparametrised_layers_train(name: str, change: str) -> None:
    """Two steps: a weight that is recomputed at each call must be recomputed."""
    model = build(name).train()
    for layer in layers_of(model).values():
        if change == "pruned":
            prune.l1_unstructured(layer, "weight", 0.3)
        elif change == "weight norm":
            parametrizations.weight_norm(layer)
        else:
            parametrizations.spectral_norm(layer)
    for _ in range(2):
        model.zero_grad()
        model(images())[0].square().sum().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_pruned_weights_take_no_part() -> None:
    model = build("global")
    for layer in layers_of(model).values():
        prune.l1_unstructured(layer, "weight", 0.5)
    pruned = model(images())[0]
    for layer in layers_of(model).values():
        prune.remove(layer, "weight")
    torch.testing.assert_close(model(images())[0], pruned)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_all_linear_layers_are_quantised(name: str) -> None:
    model = build(name)
    expected = model(images())[0]
    quantised = quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert not [m for m in quantised.modules() if type(m) is nn.Linear]
    assert (quantised(images())[0] - expected).abs().max() < 0.2 * expected.abs().max()
