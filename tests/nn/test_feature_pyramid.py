"""The simple feature pyramid: the levels of the dense order, also when its pointwise layers run on tokens."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from apt_dense.layout.packed import build_layout
from apt_dense.layout.scatter import scatter_tiles, scatter_tokens
from apt_dense.layout.tokens import TokenLayout
from apt_dense.nn.feature_pyramid import SimpleFeaturePyramid, late_scatter, runs_as_written

from support.references import noise, random_scale_map, randomise

CHANNELS = 8


def layout_of_mixed_patches(h: int, w: int, num_prefix: int = 0, dropped: float = 0.2) -> TokenLayout:
    scale_map = random_scale_map(random.Random(h), 2, h, w, 3, dropped=dropped)
    return build_layout(scale_map, 3, num_prefix=num_prefix)


def pyramid(**options: object) -> SimpleFeaturePyramid:
    return randomise(SimpleFeaturePyramid(CHANNELS, 6, **options), 0.3)


@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (4, 12), (2, 2)], ids=str)
def test_levels_from_tokens_are_those_of_the_feature_map(grid: tuple[int, int], num_prefix: int) -> None:
    layout = layout_of_mixed_patches(*grid, num_prefix)
    rows = noise(len(layout.image_R), CHANNELS)
    model = pyramid()
    levels, expected = model.from_tokens(rows, layout), model(scatter_tokens(rows, layout))
    assert [tuple(level.shape) for level in levels] == [tuple(level.shape) for level in expected]
    for level, other in zip(levels, expected, strict=True):
        torch.testing.assert_close(level, other, atol=1e-5, rtol=1e-5)


def test_gradients_from_tokens_are_those_of_the_feature_map() -> None:
    layout, model = layout_of_mixed_patches(6, 6), pyramid(scale_factors=(4.0, 1.0, 0.5))
    rows = noise(len(layout.image_R), CHANNELS).requires_grad_()
    leaves = [rows, *model.parameters()]

    def gradients(late: bool) -> tuple[torch.Tensor, ...]:
        levels = model.from_tokens(rows, layout) if late else model(scatter_tokens(rows, layout))
        return torch.autograd.grad(sum(level.square().mean() for level in levels), leaves)

    for own, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)


def test_pointwise_layers_run_once_per_token() -> None:
    """A row that is NaN shows in the cells of its token and in no other."""
    layout = build_layout(torch.tensor([[[1, 1, 0], [1, 1, 0]]]), 2)
    rows = torch.zeros(3, CHANNELS)
    rows[0] = torch.nan
    stage = nn.Sequential(nn.ConvTranspose2d(CHANNELS, 4, 2, 2))
    out = late_scatter(stage, rows, layout)
    assert out[:, :, :, :4].isnan().all() and not out[:, :, :, 4:].isnan().any()


@pytest.mark.parametrize(
    "stage",
    [
        nn.Sequential(nn.Conv2d(CHANNELS, 4, 3, padding=1), nn.GELU()),
        nn.Sequential(nn.Conv2d(CHANNELS, 4, 1), nn.BatchNorm2d(4)),
        nn.Sequential(nn.ConvTranspose2d(CHANNELS, 4, 3, stride=2, padding=1)),
        nn.Sequential(nn.ConvTranspose2d(CHANNELS, 4, 2, stride=2, groups=2)),
        nn.Sequential(nn.ConvTranspose2d(CHANNELS, 4, 2, stride=2, dilation=2)),
        nn.Sequential(nn.Conv2d(CHANNELS, 4, 1, padding=1)),
        nn.Sequential(nn.Conv2d(CHANNELS, 4, 1, groups=4), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(CHANNELS, 4, 1, bias=False), nn.GELU(), nn.Conv2d(4, 4, 1)),
        nn.Sequential(),
    ],
    ids=[
        "3 x 3",
        "batch norm",
        "overlapping",
        "grouped",
        "dilated",
        "padded",
        "grouped 1 x 1",
        "all pointwise",
        "empty",
    ],
)
def test_other_layers_keep_their_order(stage: nn.Sequential) -> None:
    layout = layout_of_mixed_patches(6, 4)
    rows = noise(len(layout.image_R), CHANNELS)
    randomise(stage, 0.3).train()
    torch.testing.assert_close(
        late_scatter(stage, rows, layout), stage(scatter_tokens(rows, layout)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("height", [1, 2])
def test_tiles_lie_in_memory_as_asked(height: int) -> None:
    layout = build_layout(torch.tensor([[[0, 0], [0, -1]]]), 1)
    tiles = noise(4, height, 3, 5)
    last, first = (scatter_tiles(tiles, layout, channels_last) for channels_last in (True, False))
    assert torch.equal(first, last)
    assert first.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)


def test_tiles_are_laid_out_in_place() -> None:
    layout = build_layout(torch.tensor([[[0, -1]]]), 1)
    tiles = torch.arange(2.0 * 2 * 3).view(2, 2, 3, 1)
    assert scatter_tiles(tiles, layout)[0, 0].tolist() == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]


def test_hooks_and_compiled_forwards_are_noticed() -> None:
    module = nn.Linear(2, 2)
    assert runs_as_written(module)
    for register in (
        module.register_forward_hook, module.register_forward_pre_hook,
        module.register_full_backward_hook, module.register_full_backward_pre_hook,
    ):  # fmt: skip
        handle = register(lambda *_: None)
        assert not runs_as_written(module)
        handle.remove()
        assert runs_as_written(module)
    module.compile()
    assert not runs_as_written(module)


@pytest.mark.parametrize("where", ["stage", "layer", "norm"])
def test_hooks_inside_are_called(where: str) -> None:
    layout, model = layout_of_mixed_patches(6, 6), pyramid()
    stage = model.simfp_2
    hooked = {"stage": stage, "layer": stage[0], "norm": stage[-2].norm}[where]
    shapes = []
    hooked.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    rows = noise(len(layout.image_R), CHANNELS)
    levels = model.from_tokens(rows, layout)
    assert len(shapes) == 1 and shapes[0][0] == 2
    torch.testing.assert_close(levels[0], stage(scatter_tokens(rows, layout)), atol=1e-5, rtol=1e-5)


BAD_ARGUMENTS = {
    "in_channels": [0, -1, 1.5, "8", None, 2],
    "out_channels": [0, -4, 1.5, "8", None, True],
    "stride": [0, -16, 12, 1.5, "16", None, 2],
    "scale_factors": [(), (1, 2), (3.0,), "4", None, 4.0, (4, 4), (4.0, "2")],
    "extra_level": ["no", 0, 1, 2, None],
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_by_name(name: str) -> None:
    for value in BAD_ARGUMENTS[name]:
        with pytest.raises((TypeError, ValueError), match=name):
            SimpleFeaturePyramid(**{"in_channels": 16, "out_channels": 8, name: value})
