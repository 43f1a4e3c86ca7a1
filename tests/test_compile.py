"""torch.compile: one graph with a token budget, a handful of graphs without, the same values in both cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from apt_dense import APTViT
from apt_dense.ops.onednn_matmul import whole_rows

from support.references import normalise, randomise

MODELS = {
    "class token": {"class_token": True, "reg_tokens": 2, "pre_norm": True, "rotary": {"rope_type": "dinov3"}},
    "windows": {"window_size": 5, "window_block_indexes": (0,), "use_rel_pos": True, "residual_block_indexes": (1,)},
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def backbone(name: str, **options: Any) -> APTViT:
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "thresholds": (4.0, 3.5)}
    return randomise(APTViT(**{**sizes, **MODELS[name], **options}), 0.2)


def images_of(seed: int, batch: int = 2, size: int = 32) -> Tensor:
    """Noise in some places and not in others, more of it for greater seeds."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (batch, 3, size, size), generator=generator)
    flat = torch.rand(batch, 1, size // 8, size // 8, generator=generator) > seed / 8
    return normalise(torch.where(flat.repeat_interleave(8, 2).repeat_interleave(8, 3), 90, pixels))


@pytest.mark.parametrize(("name", "drop_padding"), [("class token", False), ("windows", True)])
def test_a_budget_compiles_to_one_graph(name: str, drop_padding: bool) -> None:
    model = backbone(name, token_budget=0.6, drop_padding=drop_padding)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in range(4):
        images = images_of(seed)
        images[1, :, -9:] = 0
        with torch.no_grad():
            torch.testing.assert_close(compiled(images)[-1], model(images)[-1], atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("name", "trains"), [("class token", False), ("windows", True)])
def test_images_of_any_content_share_graphs(name: str, trains: bool) -> None:
    model = backbone(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    graphs, tokens = [], []
    for seed in range(8):
        images = images_of(seed, size=96)
        with torch.set_grad_enabled(trains):
            torch.testing.assert_close(compiled(images)[-1], model(images)[-1], atol=1e-5, rtol=1e-4)
        graphs.append(counter.frame_count)
        tokens.append(len(model.layout(images, model.partition(images)).image_N))
    assert len(set(tokens)) > 5 and len({whole_rows(count) for count in tokens}) > 5
    # A few pieces per kind of block, each at most three times: for one number of rows, for any, for an odd case.
    assert graphs[-1] <= 16 and graphs[4:] == graphs[4:5] * 4


def test_blocks_alone_compile_for_any_number_of_tokens() -> None:
    model, plain = backbone("windows"), backbone("windows")
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(dynamic=True, backend=counter)
    graphs = []
    for seed in range(5):
        images = images_of(seed)
        with torch.no_grad():
            torch.testing.assert_close(model(images)[-1], plain(images)[-1], atol=1e-5, rtol=1e-4)
        graphs.append(counter.frame_count)
    assert graphs[1:] == graphs[:1] * 4


@pytest.mark.cuda
def test_cuda_graphs() -> None:
    model = backbone("windows", token_budget=0.6).cuda()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(6):
            images = images_of(seed).cuda()
            torch.testing.assert_close(compiled(images)[-1].clone(), model(images)[-1], atol=1e-4, rtol=1e-3)
