"""Things that users do to modules: hooks, adapters, pruning, parametrisations, quantisation.

A weight is used by calling its module, once per forward pass, and a linear layer is an ``nn.Linear``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

from apt_dense import APTViT
from apt_dense.layout.scatter import scatter_tokens
from apt_dense.nn.feature_pyramid import SimpleFeaturePyramid
from apt_dense.ops.onednn_matmul import is_enabled

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
    assert shapes == [(64 if is_enabled(trains=True) else 50, 144)]


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


# ---- more that is done to modules


class Wrapper(nn.Module):
    """A module around another that shows nothing of it: no weight, no sizes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.factor = inner, nn.Parameter(torch.tensor(1.1))

    def forward(self, *args: Tensor) -> Tensor:
        return self.inner(*args) * self.factor


@pytest.mark.parametrize("kinds", [(nn.Linear,), (nn.Conv2d,), (nn.LayerNorm,), (nn.Linear, nn.Conv2d)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_wrappers_without_weights_act_and_learn(name: str, kinds: tuple[type, ...]) -> None:
    model = build(name)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, kinds):
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, Wrapper(layer))
    model(images())[0].square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("name", MODELS)
def test_hooks_may_change_inputs_and_see_gradients(name: str) -> None:
    model, seen = build(name), Counter()
    before = model(images())[0]
    for path, layer in layers_of(model).items():
        layer.register_full_backward_hook(lambda module, grads, out, path=path: seen.update([path]))
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    after = model(images())[0]
    assert (after - before).abs().max() > 0.01
    after.square().mean().backward()
    assert seen.keys() == layers_of(model).keys()
    assert {count for path, count in seen.items() if path.startswith("blocks.")} == {1}


@pytest.mark.parametrize("name", ["global", "windows", "budget"])
def test_tied_layers_add_up_their_gradients(name: str) -> None:
    model, untied = build(name), build(name)
    for module in (model, untied):
        module.blocks[1].mlp.load_state_dict(module.blocks[0].mlp.state_dict())
    model.blocks[1].mlp = model.blocks[0].mlp
    for module in (model, untied):
        module(images())[0].square().mean().backward()
    expected = sum(block.mlp.fc1.weight.grad for block in untied.blocks)
    torch.testing.assert_close(model.blocks[0].mlp.fc1.weight.grad, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_other_weights_by_functional_calls(name: str) -> None:
    """Values, ``torch.func.grad`` and ``vmap`` over several models' weights."""
    models = [randomise(APTViT(**SIZES, **MODELS[name]), 0.2, seed) for seed in (1, 2)]
    skeleton, x = build(name), images()
    weights = dict(models[0].named_parameters())
    assert torch.equal(functional_call(skeleton, weights, (x,))[0], models[0](x)[0])
    grads = torch.func.grad(lambda w: functional_call(skeleton, w, (x,))[0].square().mean())(weights)
    models[0](x)[0].square().mean().backward()
    for path, parameter in models[0].named_parameters():
        torch.testing.assert_close(grads[path], parameter.grad, atol=1e-5, rtol=1e-3)
    stacked, _ = torch.func.stack_module_state(models)
    together = torch.func.vmap(lambda w: functional_call(skeleton, w, (x,))[0])(stacked)
    for own, model in zip(together, models, strict=True):
        torch.testing.assert_close(own, model(x)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_memory_formats_copies_and_meta_weights_change_nothing(name: str) -> None:
    model, calls = build(name), []
    expected = model(images())[0]
    with torch.device("meta"):
        empty = APTViT(**SIZES, **MODELS[name])
    filled = empty.to_empty(device="cpu").eval()
    filled.load_state_dict(model.state_dict())
    assert torch.equal(filled(images())[0], expected)
    model.blocks[0].attn.proj.register_forward_hook(lambda *args: calls.append(args[2]))
    assert torch.equal(copy.deepcopy(model)(images())[0], expected) and len(calls) == 1
    last = model.to(memory_format=torch.channels_last)
    found = last(images().to(memory_format=torch.channels_last))[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("late", [True, False])
def test_pruned_pyramids_train(late: bool) -> None:
    model, pyramid = build("windows and residual"), SimpleFeaturePyramid(16, 8)
    for module in (model.blocks[0].residual, pyramid):
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                prune.l1_unstructured(layer, "weight", 0.3)
    for _ in range(2):
        pyramid.zero_grad()
        (rows,), layout = model.forward_tokens(images())
        levels = pyramid.from_tokens(rows, layout) if late else pyramid(scatter_tokens(rows, layout))
        sum(level.square().sum() for level in levels).backward()
        assert not [n for n, p in pyramid.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
