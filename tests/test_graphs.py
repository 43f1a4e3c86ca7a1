"""Graphs of whole models: sizes that change under ``torch.compile``, ``torch.export``, TorchScript."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from apt_dense import APTViT

from support.contract import assert_maps_close, photos
from support.references import noise, randomise

SIZES = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
WINDOWS = {"window_size": 5, "window_block_indexes": (0,)}
FORM = {"proportional_attention": 0.5}
BUDGET = {"thresholds": (5.0, 5.0), "token_budget": 0.6}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "class token": {"class_token": True, "reg_tokens": 2, "final_norm": True, **FORM},
    "windows": WINDOWS,
    "relative windows": {**WINDOWS, "use_rel_pos": True, "residual_block_indexes": (1,), **FORM},
    "relative": {"use_rel_pos": True},
    "rotary": {"rotary": {"rope_type": "dinov3"}},
    "rotary windows": {**WINDOWS, "rotary": {}, "qkv_bias": False},
    "residual": {"residual_block_indexes": (0,)},
    "cropped": {"partial_patches": "crop", "out_indices": (0, 1)},
    "checkpointed": {"checkpoint_blocks": True},
}
#: Batches and sizes; the first repeats, so that a graph is used again.
SHAPES = [(2, 32, 32), (1, 32, 48), (2, 32, 32), (3, 30, 45), (1, 8, 40)]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name: str, **options: Any) -> APTViT:
    return randomise(APTViT(**{**SIZES, **MODELS[name], **options}), 0.2)


def images_of(batch: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    return photos(rows, columns, seed).repeat(2, 1, 1, 1)[:batch]


# ---- torch.compile


@pytest.mark.parametrize("name", ["class token", "relative windows"])
def test_a_budget_compiles_for_every_size_and_batch(name: str) -> None:
    """One graph for each."""
    model, counter = build(name, **BUDGET, drop_padding=name == "class token"), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for shape in SHAPES:
        images = images_of(*shape)
        with torch.no_grad():
            assert_maps_close(list(compiled(images)), list(model(images)), 1e-5, 1e-4)
    assert counter.frame_count == len(set(SHAPES))


@pytest.mark.parametrize("name", ["plain", "class token", "relative windows", "rotary windows", "residual", "cropped"])
def test_without_thresholds_models_compile_to_one_graph(name: str) -> None:
    model, counter = build(name), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(2):
        images = images_of(2, 30, 45, seed)
        with torch.no_grad():
            assert_maps_close(list(compiled(images)), list(model(images)), 1e-5, 1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [("relative windows", BUDGET), ("checkpointed", {"residual_block_indexes": (0,)})],
)
def test_fixed_shapes_train_compiled_in_several_sizes(name: str, options: dict[str, Any]) -> None:
    model, plain = build(name, **options), build(name, **options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for shape in SHAPES[:2]:
        for each in (compiled, plain):
            each(images_of(*shape))[0].square().mean().backward()
    for own, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad, atol=1e-5, rtol=1e-3)


def test_unknown_sizes_become_known() -> None:
    model = build("windows", depth=1, **BUDGET)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for shape in SHAPES[:2]:
        with torch.no_grad():
            assert_maps_close(list(compiled(images_of(*shape))), list(model(images_of(*shape))), 1e-5, 1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's compiler needs a C++ compiler on a CPU")
def test_generated_code_gives_the_same_in_a_second_size() -> None:
    model = build("windows", depth=1, **BUDGET)
    compiled = torch.compile(model, fullgraph=True)
    for shape in SHAPES[:2]:
        for seed in range(2):
            images = images_of(*shape, seed)
            with torch.no_grad():
                assert_maps_close(list(compiled(images)), list(model(images)), 1e-5, 1e-4)


# ---- torch.export


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in MODELS), ("relative windows", True), ("checkpointed", True)]
)
def test_without_thresholds_models_are_exported(name: str, strict: bool) -> None:
    """To the rounding of sums in another order. With gradients where checkpointing matters."""
    model = build(name)
    for rows, columns in ((30, 41),) if strict else ((32, 32), (30, 41)):
        with torch.set_grad_enabled(name == "checkpointed"):
            exported = torch.export.export(model, (noise(2, 3, rows, columns),), strict=strict).module()
            images = noise(2, 3, rows, columns, seed=1)
            assert_maps_close(list(exported(images)), list(model(images)), 1e-5)


def test_a_budget_is_exported() -> None:
    model = build("relative windows", **BUDGET, drop_padding=True)
    with torch.no_grad():
        exported = torch.export.export(model, (images_of(3, 30, 41),), strict=False).module()
        for seed in range(3):
            images = images_of(3, 30, 41, seed)
            assert_maps_close(list(exported(images)), list(model(images)), 1e-5, 1e-5)


def test_an_exported_model_refuses_pixels_that_are_not_finite() -> None:
    with torch.no_grad():
        exported = torch.export.export(build("plain", depth=1), (noise(1, 3, 32, 32),)).module()
        with pytest.raises(RuntimeError, match="NaN or infinite pixels"):
            exported(torch.full((1, 3, 32, 32), torch.nan))


@pytest.mark.parametrize("options", [{"thresholds": (5.0,)}, {"drop_padding": True}], ids=str)
def test_what_depends_on_the_image_is_not_exported(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="torch.export with thresholds=.*Set token_budget"):
        torch.export.export(build("plain", **options), (noise(1, 3, 32, 32),), strict=False)


# ---- TorchScript, torch.fx


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options"), [("plain", BUDGET), ("class token", BUDGET), ("residual", {})], ids=str)
def test_fixed_shapes_are_traced_for_their_size(name: str, options: dict[str, Any]) -> None:
    model = build(name, **options)
    with torch.no_grad():
        traced = torch.jit.trace(model, images_of(2, 32, 32))
        images = images_of(2, 32, 32, seed=3)
        assert_maps_close(list(traced(images)), list(model(images)), 1e-6)
        with pytest.raises(RuntimeError):
            traced(images_of(2, 32, 48))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"thresholds": (5.0,)}, {"drop_padding": True}], ids=str)
def test_what_depends_on_the_image_is_not_traced(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="torch.jit.trace with thresholds=.*Set token_budget"):
        torch.jit.trace(build("plain", **options), noise(1, 3, 32, 32))


@pytest.mark.parametrize("options", [{}, BUDGET], ids=str)
@pytest.mark.parametrize("inside", [True, False])
def test_scripts_are_refused(inside: bool, options: dict[str, Any]) -> None:
    model = build("plain", **options)
    with pytest.raises(TypeError, match="torch.jit.script cannot compile APTViT.*use torch.export"):
        torch.jit.script(nn.Sequential(model, nn.ReLU()) if inside else model)


def test_symbolic_tracing_is_refused() -> None:
    with pytest.raises(TypeError, match="torch.fx's symbolic tracing.*use torch.export"):
        torch.fx.symbolic_trace(build("plain"))
