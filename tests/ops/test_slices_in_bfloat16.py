"""Attention in slices that compute in bfloat16: near to float64, where keys have much in common, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apt_dense.layout.tokens import Cells, Segments
from apt_dense.ops.attention import choose, packed_attention
from apt_dense.ops.bias import RelativeBias
from apt_dense.ops.kernels import cpu_sliced, cpu_sliced_bfloat16
from apt_dense.ops.kernels.interface import Inputs

from support.references import layout_of, noise

HEADS, DIM, GRID = 2, 16, (7, 5)
LENGTHS = [(1,), (5,), (3, 0, 40), (70, 130, 1), (300, 18)]


@pytest.fixture(autouse=True)
def a_processor_that_multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_sliced, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)


def segments(*lengths: int) -> Segments:
    return layout_of(*lengths).images


def cells_of(rows: int) -> Cells:
    """Random patches of three scales, aligned to nothing."""
    generator = torch.Generator().manual_seed(11)
    scale = torch.randint(3, (rows,), generator=generator)
    y, x = ((torch.rand(rows, generator=generator) * (size - 2**scale + 1)).long() for size in GRID)
    return Cells(GRID, y, x, scale, 3, None, None)


def operands(rows: int, with_bias: bool) -> list[Tensor]:
    """q, k, v and perhaps the queries' part of relative positions, in bfloat16."""
    shapes = [(rows, HEADS, DIM)] * 3 + [(rows, HEADS, sum(GRID))] * with_bias
    return [(1.5 * noise(*shape, seed=seed)).bfloat16() for seed, shape in enumerate(shapes)]


def attend(of: list[Tensor], lengths: tuple[int, ...], weights: Tensor | None, backend: str) -> Tensor:
    bias = RelativeBias(of[3], cells_of(len(of[0]))) if len(of) > 3 else None
    return packed_attention(Inputs(*of[:3], segments(*lengths), bias, None, weights), backend)


def error(found: Tensor, right: Tensor) -> float:
    """Of a tensor as a share of its norm."""
    return ((found.double() - right).norm() / right.norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_values_and_gradients_are_near_to_those_of_float64(
    lengths: tuple[int, ...], with_bias: bool, with_weights: bool
) -> None:
    total = sum(lengths)
    weights = 2 * noise(total, seed=9) if with_weights else None
    leaves = [t.requires_grad_() for t in operands(total, with_bias)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    out, right = attend(leaves, lengths, weights, "rows"), attend(exact, lengths, weights, "mask")
    grad = noise(total, HEADS, DIM, seed=8).bfloat16()
    out.backward(grad)
    right.backward(grad.double())
    assert out.dtype == torch.bfloat16
    assert error(out, right.detach()) < 0.02
    for own, other in zip(leaves, exact, strict=True):
        assert own.grad.dtype == torch.bfloat16
        if other.grad.norm() > 0.01:  # a single key has no gradient but rounding
            assert error(own.grad, other.grad) < 0.03


def test_other_segments_change_nothing() -> None:
    q, k, v = operands(48, False)
    whole = attend([q, k, v], (5, 30, 13), None, "rows")
    alone = attend([q[5:35], k[5:35], v[5:35]], (30,), None, "rows")
    torch.testing.assert_close(whole[5:35], alone, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("queries", [1, 3, 128])
def test_slices_of_any_size_give_the_same(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_sliced_bfloat16, "_QUERIES", queries)
    test_values_and_gradients_are_near_to_those_of_float64((9, 40, 10), True, True)


def test_what_keys_have_in_common_costs_no_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of 500, in bfloat16 known to 2, of keys that differ by far less."""
    q, k, v = (noise(60, HEADS, DIM, seed=seed) for seed in range(3))
    q[..., 0], k[..., 0] = 20, 100 + k[..., 0].round()  # which bfloat16 holds
    of = [t.bfloat16() for t in (q, k, v)]
    right = attend([t.double() for t in of], (60,), None, "mask")
    assert error(attend(of, (60,), None, "rows"), right) < 0.02
    written_out = torch.einsum("qhd,khd->hqk", of[0], of[1] * DIM**-0.5).softmax(-1) @ of[2].transpose(0, 1)
    assert error(written_out.transpose(0, 1), right) > 0.1


def test_what_queries_add_to_all_keys_costs_no_precision() -> None:
    """For rows, and by the weights of all keys."""
    of = operands(60, True)
    exact = attend([t.double() for t in of], (60,), None, "mask")
    of[3] = of[3].float()
    of[3][..., : GRID[0]] += 1000
    assert error(attend(of, (60,), torch.full((60,), 500.0), "rows"), exact) < 0.02


def test_gradients_of_what_values_have_in_common() -> None:
    """Gradients of scores are differences of numbers ten times as large, which would be rounded first."""
    leaves = operands(300, False)
    leaves[2] = leaves[2] + 4
    leaves = [t.detach().requires_grad_() for t in leaves]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    grad = (noise(300, HEADS, DIM, seed=8) + 2).bfloat16()
    attend(leaves, (300,), None, "rows").backward(grad)
    attend(exact, (300,), None, "mask").backward(grad.double())
    for own, other in zip(leaves, exact, strict=True):
        assert error(own.grad, other.grad) < 0.05


@pytest.mark.parametrize("weight", [-torch.inf, -1e4])
def test_keys_of_no_weight(weight: float) -> None:
    leaves = [t.requires_grad_() for t in operands(20, True)]
    weights = torch.zeros(20)
    weights[5] = weights[12] = weight
    found, others = attend(leaves, (8, 12), weights, "rows"), attend(leaves, (8, 12), weights, "mask")
    torch.testing.assert_close(found, others, atol=3e-2, rtol=3e-2)
    for own, other in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (found, others)), strict=True):
        torch.testing.assert_close(own, other, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("backward_in_autocast", [None, torch.bfloat16])
def test_views_other_widths_and_autocast(backward_in_autocast: torch.dtype | None) -> None:
    """q, k and v are views of one tensor, of heads of 7 channels; relative positions are in float32."""
    packed = noise(40, 3, HEADS, 7).bfloat16().requires_grad_()
    queries = noise(40, HEADS, sum(GRID), seed=3).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (packed, queries)]
    with torch.autocast("cpu", torch.bfloat16):
        out = attend([*packed.unbind(1), queries], (30, 10), None, "rows")
        loss = out.float().square().sum()
    with torch.autocast("cpu", backward_in_autocast, enabled=backward_in_autocast is not None):
        loss.backward()
    right = attend([*exact[0].unbind(1), exact[1]], (30, 10), None, "mask")
    right.square().sum().backward()
    assert out.dtype == torch.bfloat16 and error(out, right.detach()) < 0.02
    for own, other in zip((packed, queries), exact, strict=True):
        assert own.grad.dtype == own.dtype and error(own.grad, other.grad) < 0.03


@pytest.mark.parametrize("logit", [-3e4, 0.0, 3e4])
def test_no_logit_is_too_large(logit: float) -> None:
    ones, v = torch.ones(12, HEADS, DIM).bfloat16(), noise(12, HEADS, DIM).bfloat16()
    leaves = [t.clone().requires_grad_() for t in (ones, ones * logit, v)]
    out = attend(leaves, (2, 7, 3), None, "rows")
    expected = torch.cat([part.float().mean(0).expand_as(part) for part in v.split((2, 7, 3))])
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=1e-2)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.float().square().sum(), leaves))


def test_no_scores_are_kept_for_the_backward_pass() -> None:
    leaves, kept = [t.requires_grad_() for t in operands(600, False)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        attend(leaves, (600,), None, "rows")
    assert sum(kept) <= 4 * 600 * HEADS * DIM  # q, k, v and the output


#: matrix unit, slow MKL (Zen 5), with relative positions, trains -> the kernel of long segments
CHOICES = [
    (False, False, False, False, "rows"),
    (False, False, False, True, "sdpa"),
    (False, False, True, False, "rows"),
    (False, False, True, True, "rows"),
    (False, True, False, True, "rows"),
    (True, False, False, False, "sdpa"),
    (True, False, False, True, "sdpa"),
    (True, False, True, False, "rows"),
    (True, False, True, True, "rows"),
]


@pytest.mark.parametrize(("matrix_unit", "slow_mkl", "with_bias", "trains", "taken"), CHOICES)
def test_when_they_are_taken(
    matrix_unit: bool, slow_mkl: bool, with_bias: bool, trains: bool, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrix_unit, raising=False)
    monkeypatch.setattr(cpu_sliced, "has_slow_mkl", lambda: slow_mkl)
    monkeypatch.setattr(cpu_sliced, "_LONG_IN_BFLOAT16", 4)
    monkeypatch.setattr(cpu_sliced, "_LONG_IN_TRAINING", 7)
    q, k, v, queries = (t.requires_grad_(trains) for t in operands(6, True))
    bias = RelativeBias(queries, cells_of(6)) if with_bias else None
    assert choose(Inputs(q, k, v, segments(6), bias)) == taken
    assert choose(Inputs(q, k, v, segments(3, 3), bias)) != "rows"
    monkeypatch.setattr(cpu_sliced, "_LONG_IN_TRAINING", 6)
    assert (choose(Inputs(q, k, v, segments(6), bias)) == "rows") == (with_bias or not matrix_unit)


def test_without_onednn_they_compute_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    of = operands(9, False)
    monkeypatch.setattr(torch.backends.mkldnn.__class__, "enabled", False)
    expected = attend([t.float() for t in of], (9,), None, "rows").bfloat16()
    torch.testing.assert_close(attend(of, (9,), None, "rows"), expected, atol=0, rtol=0)


def test_mixed_types_compute_in_float32() -> None:
    q, k, v = operands(9, False)
    expected = attend([q.float(), k.float(), v.float()], (9,), None, "rows")
    torch.testing.assert_close(attend([q, k, v.float()], (9,), None, "rows"), expected, atol=0, rtol=0)


def test_torch_func_is_left_to_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_sliced, "_LONG_IN_BFLOAT16", 4)
    q, k, v = operands(9, False)

    def loss(q: Tensor, backend: str) -> Tensor:
        return attend([q, k, v], (9,), None, backend).float().square().sum()

    found = torch.func.grad(loss)(q, "auto")
    assert error(found, torch.func.grad(loss)(q, "sdpa").double()) < 1e-6
    with pytest.raises(ValueError, match="'rows' cannot run: it has no derivatives of torch.func"):
        torch.func.grad(loss)(q, "rows")
