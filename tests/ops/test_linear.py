"""oneDNN's products: PyTorch's own, to rounding, wherever they take over and wherever they must not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import SiLU
from torch.utils.flop_counter import FlopCounterMode

from apt_dense.nn.layers import make_mlp
from apt_dense.ops import linear as onednn
from apt_dense.ops.linear import call_layer, linear, product, whole_rows
from apt_dense.options import BlockOptions

from support.references import noise

ROWS, IN, OUT = 1400, 64, 48  # large enough for oneDNN


def operands(rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    return noise(rows, IN, seed=1), noise(OUT, IN, seed=2), noise(OUT, seed=3)


def operators_of(action: Callable[[], object]) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        action()
    return {event.key for event in profiler.key_averages()}


ONEDNN = "mkldnn::_linear_pointwise"
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@needs_onednn
def test_onednn_is_what_runs() -> None:
    assert ONEDNN in operators_of(lambda: linear(*operands()))
    assert ONEDNN in operators_of(lambda: product(*operands()[:2]))


@pytest.mark.parametrize(
    "shape", [(ROWS, IN), (7, 200, IN), (1, 1, ROWS, IN), (5, IN), (1, IN), (0, IN), (0, 3, IN), (IN,)]
)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("few", [0, onednn._FEW_PRODUCTS])
def test_linear_is_pytorchs(shape: tuple[int, ...], with_bias: bool, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_FEW_PRODUCTS", few)
    x, (_, weight, bias) = noise(*shape), operands()
    bias = bias if with_bias else None
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("lay", ["columns first", "every other row", "part of the channels"])
def test_rows_that_do_not_lie_side_by_side(lay: str) -> None:
    x, weight, bias = operands(2 * ROWS)
    if lay == "columns first":
        x, weight = x.T.contiguous().T, weight.T.contiguous().T
    if lay == "every other row":
        x = x[::2]
    if lay == "part of the channels":
        x, weight = x[:, 3:40], weight[:, 3:40]
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("wanted", [(0, 1, 2), (0,), (1,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("outputs", [OUT, 2 * IN])  # the smaller operand of the weights' gradient is copied
def test_gradients_are_pytorchs(wanted: tuple[int, ...], outputs: int) -> None:
    operands = noise(ROWS, IN, seed=1), noise(outputs, IN, seed=2), noise(outputs, seed=3)
    for i in wanted:
        operands[i].requires_grad_()
    leaves, grad = [operands[i] for i in wanted], noise(ROWS, outputs, seed=4)
    own, expected = (torch.autograd.grad(function(*operands), leaves, grad) for function in (linear, F.linear))
    torch.testing.assert_close(own, expected, atol=1e-3, rtol=1e-4)


def test_second_derivatives_are_pytorchs() -> None:
    def second(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in operands()]
        first = torch.autograd.grad(function(*leaves).tanh().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(t.square().mean() for t in first), leaves)

    torch.testing.assert_close(second(linear), second(F.linear), atol=1e-4, rtol=1e-4)


@needs_onednn
def test_one_graph_for_any_number_of_rows_and_it_runs_onednn() -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend=counter)
    for rows in (ROWS, 2 * ROWS, 3 * ROWS):
        leaves = [t.requires_grad_() for t in operands(rows)]
        own, expected = (torch.autograd.grad(f(*leaves).sum(), leaves) for f in (compiled, F.linear))
        torch.testing.assert_close(own, expected, atol=1e-3, rtol=1e-4)
    assert counter.frame_count == 1
    assert ONEDNN in operators_of(lambda: compiled(*leaves))


def test_nan_and_infinity_come_through() -> None:
    x, weight, bias = operands()
    x[3, 4], x[5, 6] = math.nan, math.inf
    out = linear(x, weight, bias)
    assert out[3].isnan().all() and not out[5].isfinite().any()
    assert out[[i for i in range(ROWS) if i not in (3, 5)]].isfinite().all()


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@needs_onednn
def test_what_is_left_to_pytorch() -> None:
    x, weight, bias = operands()
    double = [t.double() for t in (x, weight, bias)]
    assert linear(*double).dtype == torch.float64
    assert ONEDNN not in operators_of(lambda: linear(*double))
    assert ONEDNN not in operators_of(lambda: linear(x[:3], weight, bias))
    with torch.backends.mkldnn.flags(enabled=False):
        assert ONEDNN not in operators_of(lambda: linear(x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
        assert ONEDNN not in operators_of(lambda: linear(x, weight, bias))


class Quantised(Tensor):
    """A weight of another kind, which answers linear layers alone."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return F.linear(args[0], args[1].as_subclass(Tensor) * 2, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [((ROWS, IN + 1), (OUT, IN), (OUT,)), ((ROWS, IN), (OUT, IN), (OUT + 1,)), ((ROWS, IN), (OUT, IN), "double")],
    ids=str,
)
def test_mistakes_are_named_by_pytorch(x: tuple[int, ...], weight: tuple[int, ...], bias: object) -> None:
    bias = torch.zeros(OUT).double() if bias == "double" else torch.zeros(bias)
    with pytest.raises(RuntimeError) as expected:
        F.linear(torch.zeros(x), torch.zeros(weight), bias)
    with pytest.raises(RuntimeError) as found:
        linear(torch.zeros(x), torch.zeros(weight), bias)
    assert str(found.value) == str(expected.value)


def test_forward_mode_and_functional_derivatives_are_pytorchs() -> None:
    x, weight, bias = operands()
    tangent = noise(ROWS, IN, seed=6)
    for transform in (
        lambda f: torch.func.jvp(lambda x: f(x, weight, bias), (x,), (tangent,))[1],
        lambda f: torch.func.grad(lambda w: f(x, w, bias).square().mean())(weight),
        lambda f: torch.func.vmap(lambda row: f(row, weight, bias))(torch.stack([x, tangent])),
    ):
        torch.testing.assert_close(transform(linear), transform(F.linear), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_only_what_the_backward_pass_needs_is_kept(wanted: str) -> None:
    x, weight, bias = operands()
    (x if wanted == "x" else weight).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda t: t):
        linear(x, weight, bias)
    assert kept == [weight.shape if wanted == "x" else x.shape]


def test_kernels_are_made_for_few_numbers_of_rows() -> None:
    wholes = [whole_rows(count) for count in range(1, 2**15 + 1)]
    assert len(set(wholes[:512])) == 32 and len(set(wholes)) == 32 + 6 * 32
    assert all(count <= whole < count + max(16, count / 32 + 1) for count, whole in enumerate(wholes, start=1))
    assert whole_rows(0) == 0


@needs_onednn
@pytest.mark.parametrize("trains", [False, True])
def test_products_have_few_shapes(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN makes a kernel for every shape and keeps it: images of any number of tokens must not add up to GiBs."""
    shapes, plain = set(), onednn._product

    def spy(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.add((x.shape, w.shape))
        return plain(x, w, bias)

    monkeypatch.setattr(onednn, "_product", spy)
    for rows in range(2497, 2561, 9):
        x, weight, bias = (t.requires_grad_(trains) for t in operands(rows))
        out = linear(x, weight, bias)
        assert len(out) == rows
        if trains:
            out.sum().backward()
            assert x.grad.shape == x.shape
    assert len(shapes) == (3 if trains else 1)


def test_weights_of_another_kind_answer_for_themselves() -> None:
    x, weight, bias = operands()
    out = linear(x, weight.as_subclass(Quantised), bias)
    torch.testing.assert_close(out, F.linear(x, 2 * weight, bias), atol=1e-4, rtol=1e-5)


def test_flops_are_counted() -> None:
    x, weight, bias = operands()
    for action in (
        lambda: linear(x, weight, bias),
        lambda: product(x, weight),
        lambda: product(x, weight, noise(ROWS, OUT)),
    ):
        with FlopCounterMode(display=False) as counter:
            action()
        assert counter.get_total_flops() == 2 * ROWS * IN * OUT
    with FlopCounterMode(display=False) as counter:
        linear(*(t.requires_grad_() for t in operands())).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * ROWS * IN * OUT


@pytest.mark.parametrize("with_addend", [True, False])
@pytest.mark.parametrize("lay", ["rows", "columns", "gaps"])
@pytest.mark.parametrize("available", [True, False])
def test_product(lay: str, with_addend: bool, available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_EXISTS", onednn._EXISTS and available)
    x, w, _ = operands()
    if lay == "columns":
        w = w.T.contiguous().T
    if lay == "gaps":
        w = torch.cat([w, w], 1)[:, :IN]
    addend = noise(ROWS, OUT, seed=5) if with_addend else None
    expected = x @ w.T + (addend if with_addend else 0)
    torch.testing.assert_close(product(x, w, addend), expected, atol=1e-4, rtol=1e-5)


@needs_onednn
def test_layers_are_called_and_their_products_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of PyTorch's, linear layers nested in it; outside the call nothing is routed."""
    shapes, plain = [], onednn._product
    monkeypatch.setattr(onednn, "_FEW_PRODUCTS", 0)
    monkeypatch.setattr(onednn, "_product", lambda x, w, *bias: shapes.append(w.shape) or plain(x, w, *bias))
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
