"""oneDNN's products: PyTorch's own, to rounding, wherever they take over and wherever they must not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from apt_dense.ops import onednn_matmul
from apt_dense.ops.onednn_matmul import linear, product, whole_rows

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
@pytest.mark.parametrize("few", [0, onednn_matmul._FEW_PRODUCTS])
def test_linear_is_pytorchs(shape: tuple[int, ...], with_bias: bool, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_matmul, "_FEW_PRODUCTS", few)
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
    def __torch_function__(
        cls, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> Tensor:
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
    shapes, plain = set(), onednn_matmul._product

    def spy(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.add((x.shape, w.shape))
        return plain(x, w, bias)

    monkeypatch.setattr(onednn_matmul, "_product", spy)
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
    monkeypatch.setattr(onednn_matmul, "_EXISTS", onednn_matmul._EXISTS and available)
    x, w, _ = operands()
    if lay == "columns":
        w = w.T.contiguous().T
    if lay == "gaps":
        w = torch.cat([w, w], 1)[:, :IN]
    addend = noise(ROWS, OUT, seed=5) if with_addend else None
    expected = x @ w.T + (addend if with_addend else 0)
    torch.testing.assert_close(product(x, w, addend), expected, atol=1e-4, rtol=1e-5)
