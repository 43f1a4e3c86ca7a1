"""Token maps: pointwise layers run on tiles, everything else on the scattered map, with the same values."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt_dense.layout.fixed import build_fixed_layout
from apt_dense.layout.packed import build_layout
from apt_dense.layout.tokens import TokenLayout
from apt_dense.nn.unscattered_maps import TokenMap

from support.references import noise, random_scale_map

C = 6
LAYOUTS: dict[str, Callable[[], TokenLayout]] = {
    "all scales": lambda: build_layout(random_scale_map(random.Random(0), 2, 6, 8), 3),
    "prefix rows": lambda: build_layout(random_scale_map(random.Random(1), 3, 5, 7), 3, num_prefix=2),
    "dropped cells": lambda: build_layout(random_scale_map(random.Random(2), 2, 6, 8, dropped=0.4), 3),
    "one image, dropped": lambda: build_layout(random_scale_map(random.Random(3), 1, 4, 8, dropped=0.5), 3),
    "uniform": lambda: build_layout(torch.zeros(2, 3, 4, dtype=torch.int8), 1),
    "fixed shapes": lambda: build_fixed_layout(random_scale_map(random.Random(4), 2, 6, 8, dropped=0.2), 3, 48, 0, 1),
    "no tokens": lambda: build_layout(torch.full((2, 2, 4), -1), 1),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "1 x 1": lambda: nn.Conv2d(C, 8, 1),
    "1 x 1 without bias": lambda: nn.Conv2d(C, 8, 1, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(C, 8, 2, stride=2),
    "transposed, oblong": lambda: nn.ConvTranspose2d(C, 8, (1, 3), stride=(1, 3), bias=False),
    "gelu": nn.GELU,
    "relu": lambda: nn.ReLU(inplace=True),
    "batch norm": lambda: nn.BatchNorm2d(C),
    "batch norm, cumulative": lambda: nn.BatchNorm2d(C, momentum=None),
    "batch norm, untracked": lambda: nn.BatchNorm2d(C, track_running_stats=False, affine=False),
    "dropout": lambda: nn.Dropout2d(0.4),
    "a stack": lambda: nn.Sequential(
        nn.ConvTranspose2d(C, C, 2, stride=2), nn.BatchNorm2d(C), nn.GELU(), nn.ConvTranspose2d(C, 4, 2, stride=2),
        nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
    ),
}  # fmt: skip
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "3 x 3": lambda: nn.Conv2d(C, 8, 3, padding=1),
    "strided": lambda: nn.Conv2d(C, 8, 1, stride=2),
    "grouped": lambda: nn.Conv2d(C, C, 1, groups=2),
    "overlapping": lambda: nn.ConvTranspose2d(C, 8, 3, stride=2),
    "max pool": lambda: nn.MaxPool2d(2, 2),
    "average pool": lambda: nn.AdaptiveAvgPool2d(2),
    "dropout of cells": lambda: nn.Dropout(0.5),
    "softmax": lambda: nn.Softmax(1),
    "instance norm": lambda: nn.InstanceNorm2d(C),
    "upsampling": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
}


def rows_of(layout: TokenLayout) -> Tensor:
    return noise(layout.images.total, C)


def run(layer: nn.Module, rows: Tensor, layout: TokenLayout, on_tiles: bool) -> tuple[Tensor, bool]:
    """The output as a map, and whether it is still one of tokens."""
    torch.manual_seed(1)
    x = TokenMap.from_rows(rows, layout)
    out = layer(x if on_tiles else x.dense())
    return (out.dense(), True) if isinstance(out, TokenMap) else (out, False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("which", LAYOUTS)
def test_pointwise_layers_run_on_tiles(which: str, name: str, training: bool) -> None:
    if (which, name, training) == ("no tokens", "a stack", True):
        pytest.skip("batch norm of a constant multiplies rounding errors by 316, and then again")
    layout, layer = LAYOUTS[which](), LAYERS[name]().double().train(training)
    twin, results = copy.deepcopy(layer), []
    for module, on_tiles in ((layer, True), (twin, False)):
        rows = rows_of(layout).double().requires_grad_()
        out, is_map = run(module, rows, layout, on_tiles)
        assert is_map == on_tiles
        weights = noise(*out.shape, seed=5).double()
        gradients = torch.autograd.grad((out * weights).sum(), [rows, *module.parameters()])
        results.append((out, *gradients, *module.buffers()))
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_get_the_scattered_map(name: str) -> None:
    layout, layer = LAYOUTS["dropped cells"](), OTHERS[name]()
    found, expected = (run(layer, rows_of(layout), layout, on_tiles) for on_tiles in (True, False))
    assert not found[1]
    torch.testing.assert_close(found[0], expected[0])


def test_it_answers_like_its_map() -> None:
    layout = LAYOUTS["dropped cells"]()
    x = TokenMap.from_rows(rows_of(layout), layout)
    dense = x.dense()
    assert x.shape == dense.shape == x.size() and x.size(1) == C and x.dim() == 4
    assert x.dtype == dense.dtype and x.device == dense.device and x.is_cuda == dense.is_cuda
    other = torch.ones_like(dense)
    for found, expected in (
        (x + other, dense + other), (other + x, other + dense), (x * 2, dense * 2), (2 - x, 2 - dense), (-x, -dense),
        (x[0], dense[0]), (torch.cat([x, other], 1), torch.cat([dense, other], 1)), (x.mean(1), dense.mean(1)),
        (F.interpolate(input=x, size=(3, 3)), F.interpolate(dense, size=(3, 3))), (x + x, dense + dense),
    ):  # fmt: skip
        assert torch.equal(found, expected)
    with pytest.raises(AttributeError):
        _ = x.no_such_thing


def test_the_map_is_scattered_once() -> None:
    layout = LAYOUTS["all scales"]()
    x = TokenMap.from_rows(rows_of(layout), layout)
    assert x.dense() is x.dense()


@pytest.mark.parametrize("trains", [True, False])
def test_logits_of_a_loss_are_not_copied(trains: bool) -> None:
    """PyTorch's log_softmax copies maps whose channels lie last in memory, to which convolutions keep."""
    layout = LAYOUTS["all scales"]()
    with torch.set_grad_enabled(trains):
        x = TokenMap.from_rows(rows_of(layout), layout)
        logits = nn.Conv2d(C, 5, 3, padding=1)(F.relu(nn.ConvTranspose2d(C, C, 2, stride=2)(x)))
    assert logits.is_contiguous() == trains


def test_counts_of_cells_add_up() -> None:
    for make in LAYOUTS.values():
        layout = make()
        x = TokenMap.from_rows(rows_of(layout), layout)
        assert x.cells.sum() == layout.row_Bhw.numel() and len(x.cells) == len(x.images) == len(x.tiles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_batch_norm_keeps_the_type(dtype: torch.dtype) -> None:
    layout = LAYOUTS["dropped cells"]()
    norm = nn.BatchNorm2d(C).to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = TokenMap.from_rows(rows_of(layout).to(dtype), layout)
    with torch.no_grad():
        found, expected = norm(x), copy.deepcopy(norm)(x.dense())
    assert found.tiles.dtype == dtype
    torch.testing.assert_close(found.dense(), expected, atol=2e-2, rtol=2e-2)
