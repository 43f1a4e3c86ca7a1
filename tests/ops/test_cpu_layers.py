"""Calls of modules: values are PyTorch's own, and right where PyTorch's are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.layers import GluMlp, LayerNorm2d, Mlp, SwiGLU
from torch import Tensor, nn
from torch.nn import SiLU

from apt_dense.nn.layers import make_mlp
from apt_dense.ops import onednn_matmul
from apt_dense.ops.cpu_layers import call_layer, call_on_map
from apt_dense.options import BlockOptions

from support.references import Convolutions, litter, noise

ROWS, IN, OUT = 1400, 64, 48  # large enough for oneDNN
HALVES = [torch.bfloat16, torch.float16]
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@needs_onednn
def test_layers_are_called_and_their_products_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of PyTorch's, linear layers nested in it; outside the call nothing is routed."""
    shapes, plain = [], onednn_matmul._product
    monkeypatch.setattr(onednn_matmul, "_FEW_PRODUCTS", 0)
    monkeypatch.setattr(onednn_matmul, "_product", lambda x, w, *bias: shapes.append(w.shape) or plain(x, w, *bias))
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT), torch.nn.GELU(), torch.nn.Linear(OUT, IN))
    x = noise(ROWS, IN)
    expected = model(x)
    assert not shapes
    torch.testing.assert_close(call_layer(model, x), expected, atol=1e-4, rtol=1e-5)
    assert shapes == [(OUT, IN), (IN, OUT)]


@pytest.mark.parametrize("size", [(6, 4), (2, 2), (2, 6), (5, 4)])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_of_blocks_are_pytorchs(size: tuple[int, int], channels_last: bool, bias: bool) -> None:
    conv = torch.nn.Conv2d(IN, OUT, 2, stride=2, bias=bias)
    x = noise(3, IN, *size).requires_grad_()
    given = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    found, expected = call_layer(conv, given), conv(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    weights = noise(*expected.shape, seed=1)
    operands = [x, *conv.parameters()]
    for own, other in zip(
        *(torch.autograd.grad((y * weights).sum(), operands) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)


def test_other_convolutions_are_left_alone() -> None:
    x = noise(1, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    for options in ({"padding": 1}, {"stride": 1}, {"dilation": 2}, {"groups": 2}, {"padding": "same", "stride": 1}):
        conv = torch.nn.Conv2d(4, 8, 2, **{"stride": 2, **options})
        assert torch.equal(call_layer(conv, x), conv(x))


@pytest.mark.parametrize("settings", [(), (None, 2), (None, 2, 0, 1, 1), (None, 2, "valid")], ids=str)
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_convolutions_may_be_called_with_defaults_and_single_numbers(name: str, settings: tuple) -> None:
    """As functions take them; nn.Conv2d hands on pairs."""
    if name == "conv_transpose2d":
        settings = settings[:2]

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(noise(4, 4, 2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return getattr(nn.functional, name)(x, self.weight, *settings)

    layer = Convolution()
    for x in (noise(2, 4, 4, 4), noise(2, 4, 2, 2)):
        torch.testing.assert_close(call_layer(layer, x), layer(x), atol=1e-5, rtol=1e-5)
        half, narrow = layer.bfloat16(), x.bfloat16()
        torch.testing.assert_close(call_on_map(half, narrow).float(), layer.float()(x), atol=0.1, rtol=0.1)


def test_no_images_to_convolve() -> None:
    conv = torch.nn.Conv2d(IN, OUT, 2, stride=2)
    assert call_layer(conv, torch.zeros(0, IN, 2, 2)).shape == (0, OUT, 1, 1)


@pytest.mark.parametrize("name, kind", [("mlp", Mlp), ("swiglu", SwiGLU), ("swiglu_packed", GluMlp)])
def test_mlps_are_timms(name: str, kind: type) -> None:
    mlp = make_mlp(IN, BlockOptions(2, 2.0, mlp_layer=name))
    assert isinstance(mlp, kind)
    oracle = kind(IN, 4 * IN, act_layer=SiLU, gate_last=False) if kind is GluMlp else kind(IN, 2 * IN)
    oracle.load_state_dict(mlp.state_dict())
    x = noise(ROWS, IN)
    torch.testing.assert_close(call_layer(mlp, x), oracle(x), atol=1e-4, rtol=1e-5)


# ---- maps of one row or column in 16 bits

NARROW = [(1, 1), (1, 2), (2, 1), (5, 1), (1, 5), (8, 1), (32, 1), (1, 32)]
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "patches": lambda: nn.Conv2d(32, OUT, 4, stride=4),
    "1 x 1": lambda: nn.Conv2d(32, OUT, 1, bias=False),
    "3 x 3": lambda: nn.Conv2d(32, OUT, 3, padding=1),
    "strides": lambda: nn.Conv2d(32, OUT, 3, padding=1, stride=2),
    "gaps": lambda: nn.Conv2d(32, OUT, 3, padding=2, dilation=2, groups=4),
    "same": lambda: nn.Conv2d(32, OUT, 3, padding="same"),
    "mirrored": lambda: nn.Conv2d(32, OUT, 3, padding=1, padding_mode="replicate"),
    "enlarged": lambda: nn.ConvTranspose2d(32, OUT, 2, stride=2),
    "overlapping": lambda: nn.ConvTranspose2d(32, OUT, 3, stride=2, padding=1, output_padding=1),
    "several": lambda: nn.Sequential(nn.Conv2d(32, 8, 1), LayerNorm2d(8), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1)),
}  # fmt: skip


def sizes_of(kind: str) -> list[tuple[int, int]]:
    return [(4 * h, 4 * w) for h, w in NARROW] if kind == "patches" else NARROW


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_narrow_maps_in_16_bits_stay_near_float32(kind: str, dtype: torch.dtype) -> None:
    """Weights of 16 bits and autocast, either layout in memory, gradients too; memory is littered before."""
    layer = LAYERS[kind]()
    half = LAYERS[kind]().to(dtype)
    half.load_state_dict(layer.state_dict())
    for size in sizes_of(kind):
        x = noise(3, 32, *size).to(dtype).float()
        expected = value_and_gradient(layer, x)
        for memory in (torch.contiguous_format, torch.channels_last):
            given = x.contiguous(memory_format=memory)
            for _ in range(3):
                litter(dtype)
                assert_near(value_and_gradient(half, given.to(dtype)), expected)
                with torch.autocast("cpu", dtype):
                    assert_near(value_and_gradient(layer, given), expected)


def value_and_gradient(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = call_on_map(layer, x)
    (out.float() * noise(*out.shape, seed=1)).sum().backward()
    return out.detach(), x.grad


def assert_near(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for own, other in zip(found, expected, strict=True):
        assert own.shape == other.shape
        torch.testing.assert_close(own.float(), other, atol=0.02 * other.abs().max().item() + 0.01, rtol=0.02)


@pytest.mark.parametrize("call", [call_layer, call_on_map])
@pytest.mark.parametrize("kind", ["patches", "1 x 1", "3 x 3", "enlarged"])
def test_no_convolution_of_pytorchs_makes_a_single_row_or_column_in_16_bits(kind: str, call: Callable) -> None:
    """On processors on which PyTorch's is right, too."""
    with Convolutions() as made:
        for size in sizes_of(kind):
            call(LAYERS[kind]().bfloat16(), noise(2, 32, *size).bfloat16())
    assert 1 not in made.sides
    assert bool(made.sides) == (kind in ("3 x 3", "enlarged"))


@pytest.mark.parametrize("kind", LAYERS)
def test_maps_in_float32_and_wide_ones_are_left_alone(kind: str) -> None:
    layer = LAYERS[kind]()
    for size in sizes_of(kind):
        x = noise(2, 32, *size)
        assert torch.equal(call_on_map(layer, x), layer(x))
    x, layer = noise(2, 32, 12, 8).bfloat16(), layer.bfloat16()
    assert torch.equal(call_on_map(layer, x), layer(x))


def test_mistakes_are_named_by_pytorch() -> None:
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        call_on_map(nn.Conv2d(4, 4, 3).bfloat16(), noise(1, 4, 2, 1).bfloat16())
    with pytest.raises(RuntimeError, match="channels"):
        call_on_map(nn.Conv2d(4, 4, 3, padding=1).bfloat16(), noise(1, 3, 5, 1).bfloat16())
