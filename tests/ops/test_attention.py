"""Attention: softmax inside each segment and nothing across, whatever the lengths."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from apt_dense.layout.fixed import build_fixed_layout
from apt_dense.layout.tokens import Bucket, Cells, Segments
from apt_dense.ops import attention
from apt_dense.ops.attention import BACKENDS, KERNELS, choose, packed_attention
from apt_dense.ops.bias import PaddingKey, RelativeBias
from apt_dense.ops.kernels import cpu_sliced, sdpa_bias_as_mask, varlen
from apt_dense.ops.kernels.interface import Inputs, Kernel

from support.references import layout_of, noise

HEADS, DIM = 2, 4


def segments(*lengths: int) -> Segments:
    return layout_of(*lengths).images


def qkv(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(2 * noise(rows, HEADS, DIM, seed=seed) for seed in (1, 2, 3))


def naive_attention(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    out, start = torch.zeros_like(v), 0
    for length in lengths:
        rows = range(start, start + length)
        for head in range(HEADS):
            for i in rows:
                scores = [math.exp((q[i, head] @ k[j, head]).item() / math.sqrt(DIM)) for j in rows]
                out[i, head] = sum(score / sum(scores) * v[j, head] for score, j in zip(scores, rows, strict=True))
        start += length
    return out


@pytest.mark.parametrize(
    "lengths", [(1,), (5,), (3, 3), (1, 1, 1), (2, 4, 3), (0, 3), (3, 0, 0, 2), (0, 2, 2), (7, 1)], ids=str
)
def test_attention_stays_inside_its_segment(lengths: tuple[int, ...]) -> None:
    q, k, v = qkv(sum(lengths))
    expected = naive_attention(q, k, v, lengths)
    torch.testing.assert_close(packed_attention(Inputs(q, k, v, segments(*lengths))), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_no_rows(lengths: tuple[int, ...]) -> None:
    out = packed_attention(Inputs(*qkv(0), segments(*lengths)))
    assert out.shape == (0, HEADS, DIM)


def test_a_segment_of_one_row_returns_its_value() -> None:
    q, k, v = qkv(4)
    torch.testing.assert_close(packed_attention(Inputs(q, k, v, segments(1, 1, 1, 1))), v)


def test_other_segments_change_nothing() -> None:
    q, k, v = qkv(9)
    whole = packed_attention(Inputs(q, k, v, segments(2, 4, 3)))
    alone = packed_attention(Inputs(q[2:6], k[2:6], v[2:6], segments(4)))
    torch.testing.assert_close(whole[2:6], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(3, 3), (2, 0, 4)], ids=str)
def test_gradients_match_the_reference(lengths: tuple[int, ...]) -> None:
    q, k, v = (t.double().requires_grad_() for t in qkv(sum(lengths)))
    assert torch.autograd.gradcheck(
        lambda *t: packed_attention(Inputs(*t, segments(*lengths))), (q, k, v), fast_mode=True
    )


@pytest.mark.parametrize("lengths", [(3,), (4, 4), ()], ids=str)
def test_layout_of_another_batch_is_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"5 rows, but the segments hold {sum(lengths)}"):
        packed_attention(Inputs(*qkv(5), segments(*lengths)))


@pytest.mark.parametrize("lengths", [(4, 4), (2, 7, 0, 3)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_gives_the_same(lengths: tuple[int, ...], backend: str) -> None:
    q, k, v = qkv(sum(lengths))
    expected = naive_attention(q, k, v, lengths)
    out = attend(backend, q, k, v, segments(*lengths))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


# ---- relative positions, a key for padding, and the weight of keys

LENGTHS = [(3, 3), (1, 5, 0, 2), (40, 33, 34, 64, 39), (70, 130, 20)]  # the last two are filled up, or cross blocks
GRID = (7, 5)


def terms(rows: int, lengths: tuple[int, ...]) -> tuple[RelativeBias, PaddingKey]:
    """Relative positions of random patches of three scales, aligned to nothing, and a padding key that the first
    segment has no use for."""
    generator = torch.Generator().manual_seed(11)
    scale = torch.randint(3, (rows,), generator=generator)
    y, x = ((torch.rand(rows, generator=generator) * (size - 2**scale + 1)).long() for size in GRID)
    bias = RelativeBias(noise(rows, HEADS, sum(GRID), seed=4), Cells(GRID, y, x, scale, 3, None, None))
    logit = noise(rows, HEADS, seed=6)
    logit[: lengths[0]] = -math.inf
    return bias, PaddingKey(logit, noise(HEADS, DIM, seed=7), noise(HEADS, DIM, seed=8))


def bias_matrix(bias: RelativeBias, head: int, rows: range) -> Tensor:
    """Logits of all pairs: the mean over a key's cells of the query's value for their row and for their column."""
    _, y, x, scale = (t.tolist() if isinstance(t, Tensor) else t for t in bias.cells[:4])
    cover = torch.zeros(len(rows), sum(GRID))
    for place, k in enumerate(rows):
        for i in range(2 ** scale[k]):
            cover[place, y[k] + i] = cover[place, GRID[0] + x[k] + i] = 1 / 2 ** scale[k]
    return bias.queries_RHK[rows.start : rows.stop, head] @ cover.T


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], bias: RelativeBias | None, padding: PaddingKey | None
) -> Tensor:
    """One segment and head after the other, with the whole matrix of logits; a padding key is one more column."""
    out, start = [torch.zeros(0, HEADS, DIM)], 0
    for length in lengths:
        part, heads = slice(start, start + length), []
        for head in range(HEADS):
            keys, values, extra = k[part, head], v[part, head], torch.zeros(length, length)
            if bias is not None:
                extra = bias_matrix(bias, head, range(start, start + length))
            if padding is not None:
                keys, values = (
                    torch.cat([keys, padding.k_HD[head][None]]),
                    torch.cat([values, padding.v_HD[head][None]]),
                )
                extra = torch.cat([extra, padding.logit_RH[part, head, None]], 1)
            heads.append((q[part, head] @ keys.T / math.sqrt(DIM) + extra).softmax(-1) @ values)
        out.append(torch.stack(heads, 1))
        start += length
    return torch.cat(out)


def naive_varlen(
    q: Tensor, k: Tensor, v: Tensor, offsets_q: Tensor, offsets_k: Tensor, longest_q: int, longest_k: int, scale: float
) -> Tensor:
    """A variable-length kernel in plain operations, which also checks its arguments as one would."""
    assert q.shape[1:] == k.shape[1:] == v.shape[1:]
    assert offsets_q.dtype == offsets_k.dtype == torch.int32
    assert len(q) == offsets_q[-1] and len(k) == len(v) == offsets_k[-1]
    assert longest_q >= offsets_q.diff().max() and longest_k >= offsets_k.diff().max()
    out = [q[:0]]
    for a, b, c, d in zip(offsets_q, offsets_q[1:], offsets_k, offsets_k[1:], strict=False):
        weights = (torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[c:d]))
    return torch.cat(out)


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
    """``packed_attention`` by a backend; the CUDA kernel of "varlen" is stood in for, all around it is real."""
    if backend == "varlen":
        return varlen.run(naive_varlen, Inputs(q, k, v, *others))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return packed_attention(Inputs(q, k, v, *others), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use", [(True, False), (False, True), (True, True), (False, False)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_bias_and_padding_key(lengths: tuple[int, ...], use: tuple[bool, bool], backend: str) -> None:
    q, k, v = qkv(sum(lengths))
    bias, padding = (part if used else None for part, used in zip(terms(sum(lengths), lengths), use, strict=True))
    expected = plain_attention(q, k, v, lengths, bias, padding)
    with torch.no_grad():
        out = attend(backend, q, k, v, segments(*lengths), bias, padding)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture
def _in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_in_float64")
@pytest.mark.parametrize("scale", [1, 30, 1000])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "mask", "rows", "varlen"])
@pytest.mark.parametrize("lengths", LENGTHS[:3], ids=str)
def test_logits_of_any_size(lengths: tuple[int, ...], backend: str, scale: float) -> None:
    """Weights and gradients are exact however large the logits of keys that take part are."""
    bias, padding = terms(sum(lengths), lengths)
    leaves = [*qkv(sum(lengths)), bias.queries_RHK, *padding]
    leaves = [t * (scale if i in (0, 3, 4) else 1) for i, t in enumerate(leaves)]

    def terms_of(leaves: list[Tensor]) -> tuple[RelativeBias, PaddingKey]:
        return RelativeBias(leaves[3], bias.cells), PaddingKey(*leaves[4:])

    assert_same_with_gradients(backend, lengths, [t.detach().requires_grad_() for t in leaves], terms_of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("logit", [-1e6, -3e4, -1e3, 0.0, 1e3, 3e4])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "mask", "rows", "varlen", "flex"])
def test_what_takes_no_part_has_no_weight(backend: str, logit: float, dtype: torch.dtype) -> None:
    """All real keys have the same logit, which may be far below that of the key for padding; it is for no segment. So
    each output is the mean of its segment's values."""
    if logit < -65504 and dtype == torch.float16:
        pytest.skip("no number of float16")
    lengths = (2, 7, 3)
    q, k, v = (torch.ones(12, HEADS, DIM, dtype=dtype) for _ in range(3))
    k = k * logit / DIM**0.5
    v = noise(12, HEADS, DIM).to(dtype)
    padding = PaddingKey(torch.full((12, 1), -math.inf), -k[0], torch.full_like(v[0], 1000))
    leaves = [t.detach().requires_grad_(backend != "flex") for t in (q, k, v, padding.k_HD, padding.v_HD)]
    for with_padding in (True, False):
        own = PaddingKey(padding.logit_RH, *leaves[3:]) if with_padding else None
        out = attend(backend, *leaves[:3], segments(*lengths), None, own)
        expected = torch.cat([part.float().mean(0).expand_as(part) for part in v.split(lengths)])
        torch.testing.assert_close(out.float(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-2)
        if backend != "flex":
            grads = torch.autograd.grad(out.float().square().sum(), leaves[: 5 if with_padding else 3])
            assert all(grad.isfinite().all() for grad in grads)
            assert not any(grad.any() for grad in grads[3:])


@pytest.mark.parametrize("use", [(True, False), (False, True), (True, True), (False, False)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [*LENGTHS, (4, 4)], ids=str)
def test_a_key_of_weight_n_is_n_keys(lengths: tuple[int, ...], backend: str, use: tuple[bool, bool]) -> None:
    """The logarithm of a whole number, added to a key's logits, is as good as so many copies of the key."""
    total = sum(lengths)
    weight = torch.randint(1, 5, (total,), generator=torch.Generator().manual_seed(5))
    copies = torch.repeat_interleave(torch.arange(total), weight)
    first = weight.cumsum(0) - weight
    repeated = tuple(int(part.sum()) for part in weight.split(lengths))
    q, k, v = leaves = [t.detach().requires_grad_(backend != "flex") for t in qkv(total)]
    bias, padding = (part if used else None for part, used in zip(terms(total, lengths), use, strict=True))
    own = attend(backend, q, k, v, segments(*lengths), bias, padding, weight.log())
    if bias is not None:
        cells = bias.cells._replace(**{n: getattr(bias.cells, n)[copies] for n in ("y_N", "x_N", "scale_N")})
        bias = RelativeBias(bias.queries_RHK[copies], cells)
    if padding is not None:
        padding = padding._replace(logit_RH=padding.logit_RH[copies])
    expected = plain_attention(q[copies], k[copies], v[copies], repeated, bias, padding)[first]
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)
    if backend != "flex":
        weights = noise(*v.shape, seed=9)
        grads = (torch.autograd.grad((out * weights).sum(), leaves) for out in (own, expected))
        for found, right in zip(*grads, strict=True):
            torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "mask", "rows", "varlen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_keys_in_16_bits(backend: str, dtype: torch.dtype) -> None:
    lengths = (5, 9)
    q, k, v = (t.to(dtype) for t in qkv(14))
    logit_R = noise(14, seed=3)
    out = attend(backend, q, k, v, segments(*lengths), None, None, logit_R)
    expected = attend("sdpa", q.float(), k.float(), v.float(), segments(*lengths), None, None, logit_R)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("entries", [1, 100, 2**21])
@pytest.mark.parametrize("slice_of_queries", [1, 3, 128])
@pytest.mark.parametrize("backend", ["mask", "rows"])
def test_parts_of_any_size_give_the_same(
    backend: str, entries: int, slice_of_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa_bias_as_mask, "_BIAS_ENTRIES", entries)
    monkeypatch.setattr(cpu_sliced, "_FEWEST_QUERIES", slice_of_queries)
    monkeypatch.setattr(cpu_sliced, "_QUERIES", slice_of_queries)
    lengths = (9, 4, 10, 9)
    q, k, v = qkv(sum(lengths))
    leaves = [t.detach().requires_grad_() for t in (q, k, v, terms(sum(lengths), lengths)[0].queries_RHK)]
    cells = terms(sum(lengths), lengths)[0].cells
    assert_same_with_gradients(backend, lengths, leaves, lambda of: (RelativeBias(of[3], cells), None))


def assert_same_with_gradients(
    backend: str, lengths: tuple[int, ...], leaves: list[Tensor], terms_of: Callable[[list[Tensor]], tuple]
) -> None:
    """Outputs, and gradients of all leaves: q, k, v and what the terms are made of."""
    outputs, weights = [], noise(*leaves[2].shape, seed=9)
    for function, of in ((partial(attend, backend), segments(*lengths)), (plain_attention, lengths)):
        out = function(*leaves[:3], of, *terms_of(leaves))
        outputs.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for own, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use", [(True, False), (False, True), (True, True), (False, False)], ids=str)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "mask", "rows", "varlen"])
@pytest.mark.parametrize("lengths", LENGTHS[:3], ids=str)
def test_gradients_of_bias_and_padding_key(lengths: tuple[int, ...], backend: str, use: tuple[bool, bool]) -> None:
    bias, padding = terms(sum(lengths), lengths)
    leaves, parts = list(qkv(sum(lengths))), []
    for used, tensors in zip(use, ([bias.queries_RHK], padding), strict=True):
        parts.append(slice(len(leaves), len(leaves) + used * len(tensors)))
        leaves += tensors[: used * len(tensors)]

    def terms_of(leaves: list[Tensor]) -> tuple[RelativeBias | None, PaddingKey | None]:
        bias_parts, padding_parts = (leaves[part] for part in parts)
        return RelativeBias(*bias_parts, bias.cells) if bias_parts else None, (
            PaddingKey(*padding_parts) if padding_parts else None
        )

    assert_same_with_gradients(backend, lengths, [t.detach().requires_grad_() for t in leaves], terms_of)


@pytest.mark.parametrize("with_bias", [True, False])
def test_slices_of_long_segments_by_onednn(with_bias: bool) -> None:
    """As long as the segments that take this way by themselves, one of them with products that oneDNN takes over."""
    lengths = (cpu_sliced._LONG_SEGMENT + 3, cpu_sliced._LONG_SEGMENT + 64)
    q, k, v = qkv(sum(lengths))
    bias = terms(sum(lengths), lengths)[0] if with_bias else None
    leaves = [t.detach().requires_grad_() for t in (q, k, v, *([bias.queries_RHK] if bias else []))]
    assert choose(Inputs(*leaves[:3], segments(*lengths), bias)) == "rows"
    assert_same_with_gradients(
        "auto", lengths, leaves, lambda of: (RelativeBias(of[3], bias.cells) if bias else None, None)
    )


@pytest.mark.parametrize("with_bias", [True, False])
def test_slices_have_exact_derivatives(with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_sliced, "_FEWEST_QUERIES", 3)
    monkeypatch.setattr(cpu_sliced, "_QUERIES", 3)
    lengths = (5, 0, 2)
    bias, _ = terms(sum(lengths), lengths)
    leaves = [t.double().requires_grad_() for t in (*qkv(sum(lengths)), bias.queries_RHK)][: 3 + with_bias]

    def run(*of: Tensor) -> Tensor:
        terms = RelativeBias(of[3], bias.cells) if with_bias else None
        return packed_attention(Inputs(*of[:3], segments(*lengths), terms), "rows")

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("backward_in_autocast", [True, False])
def test_slices_of_16_bits_compute_in_float32(with_bias: bool, kind: torch.dtype, backward_in_autocast: bool) -> None:
    """On a CPU that does not multiply in bfloat16; others: ``test_slices_in_bfloat16``."""
    lengths = (30, 7)
    bias = terms(37, lengths)[0]
    leaves = [t.to(kind).requires_grad_() for t in (*qkv(37), bias.queries_RHK)][: 3 + with_bias]
    plain = [t.detach().float().requires_grad_() for t in leaves]

    def run(of: list[Tensor]) -> Tensor:
        term = RelativeBias(of[3], bias.cells) if with_bias else None
        return packed_attention(Inputs(*of[:3], segments(*lengths), term), "rows")

    with torch.autocast("cpu", torch.bfloat16):
        out = run(leaves)
        loss = out.float().square().sum()
        if backward_in_autocast:
            loss.backward()
    if not backward_in_autocast:
        loss.backward()
    expected = run(plain)
    expected.square().sum().backward()
    assert out.dtype == kind
    torch.testing.assert_close(out, expected.to(kind), atol=0, rtol=0)
    for own, reference in zip(leaves, plain, strict=True):
        torch.testing.assert_close(own.grad.float(), reference.grad, atol=2e-2, rtol=2e-2)


def test_slices_keep_no_scores() -> None:
    """Memory that the forward pass keeps for the backward grows with the rows, not with their square."""
    length, kept = 600, 0
    leaves = [t.requires_grad_() for t in qkv(length)]

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        packed_attention(Inputs(*leaves, segments(length)), "rows")
    assert kept <= 3 * length * HEADS * DIM


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["varlen", "flex", "sdpa"])
@pytest.mark.parametrize("lengths", LENGTHS[:3], ids=str)
def test_kernels_on_a_gpu(lengths: tuple[int, ...], backend: str) -> None:
    rows, kind = sum(lengths), torch.bfloat16
    bias, padding = terms(rows, lengths)
    q, k, v = (t.cuda().to(kind).requires_grad_() for t in qkv(rows))
    cells = Cells(*(t.cuda() if isinstance(t, Tensor) else t for t in bias.cells))
    on_gpu = RelativeBias(bias.queries_RHK.cuda().to(kind), cells), PaddingKey(*(t.cuda().to(kind) for t in padding))
    bucket = segments(*lengths)
    buckets = tuple(Bucket(b.rows.cuda(), b.valid if b.valid is None else b.valid.cuda()) for b in bucket.buckets)
    bucket = bucket._replace(offsets=bucket.offsets.cuda(), place_R=bucket.place_R.cuda(), buckets=buckets)
    out = packed_attention(Inputs(q, k, v, bucket, *on_gpu), backend)
    out.float().square().sum().backward()
    plain = [t.detach().float().cpu().requires_grad_() for t in (q, k, v)]
    expected = plain_attention(*plain, lengths, bias, padding)
    expected.square().sum().backward()
    torch.testing.assert_close(out.float().cpu(), expected, atol=5e-2, rtol=5e-2)
    for own, reference in zip((q, k, v), plain, strict=True):
        torch.testing.assert_close(own.grad.float().cpu(), reference.grad, atol=1e-1, rtol=1e-1)


@pytest.mark.parametrize(
    "backend, message",
    [("fast", "unknown; expected one of"), ("varlen", "on cpu, not cuda"), ("flex", "no backward on a CPU")],
)
def test_backends_that_cannot_run_say_why(backend: str, message: str) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(4))
    with pytest.raises(ValueError, match=message):
        packed_attention(Inputs(q, k, v, segments(4)), backend)


def test_slices_are_for_cpus() -> None:
    q, k, v = (t.to("meta") for t in qkv(4))
    with pytest.raises(
        ValueError, match="'rows' cannot run: it loops over segments on the host, and the tensors are on meta"
    ):
        packed_attention(Inputs(q, k, v, segments(4)), "rows")


def test_auto_avoids_what_has_no_fused_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    (bias, padding), (q, k, v) = terms(6, (6,)), qkv(6)
    assert choose(Inputs(q, k, v, segments(6), bias)) == "mask"
    assert choose(Inputs(q, k, v, segments(6))) == "sdpa"
    assert choose(Inputs(q, k, v, segments(6), logit_R=torch.zeros(6))) == "mask"
    assert choose(Inputs(q.clone().requires_grad_(), k, v, segments(6), bias)) == "sdpa"
    trained = bias._replace(queries_RHK=bias.queries_RHK.clone().requires_grad_())
    assert choose(Inputs(q, k, v, segments(6), trained)) == "sdpa"
    monkeypatch.setattr(cpu_sliced, "_LONG_SEGMENT", 1)
    assert choose(Inputs(q, k, v, segments(6), trained)) == "rows"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert choose(Inputs(q.bfloat16(), k, v, segments(6))) == "rows"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert choose(Inputs(q.bfloat16(), k, v, segments(6))) == "sdpa"
    assert choose(Inputs(q, k, v, segments(6))) == "rows"
    assert choose(Inputs(q, k, v, segments(6), bias, padding)) == "mask"
    monkeypatch.setattr(cpu_sliced, "_LONG_SEGMENT", 4)
    assert choose(Inputs(q, k, v, segments(5, 1))) == "mask"  # one long one, but short by the mean
    monkeypatch.setattr(torch.backends.mkldnn.__class__, "enabled", False)
    assert choose(Inputs(q, k, v, segments(6))) == "sdpa"


def test_inert_rows_do_not_make_windows_long() -> None:
    scale_map = torch.zeros(1, 40, 40, dtype=torch.int8)
    fixed = build_fixed_layout(scale_map, 1, 1600, window_size=8)
    assert fixed.windows.longest == 1600
    q, k, v = (noise(1600, 1, 4, seed=seed) for seed in (1, 2, 3))
    assert choose(Inputs(q, k, v, fixed.windows)) == "mask"


def test_a_kernel_is_one_entry_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is chosen in the order of the registry, if it suits and can run; by name only if it can run."""
    inputs = Inputs(*qkv(3), segments(3))
    ready = Kernel(lambda given: given.v + 1, lambda given: None, lambda given: True)
    barred = ready._replace(obstacle=lambda given: "it is Sunday")
    monkeypatch.setattr(attention, "KERNELS", {"barred": barred, "ready": ready, **KERNELS})
    monkeypatch.setattr(attention, "BACKENDS", ("auto", *attention.KERNELS))
    assert torch.equal(packed_attention(inputs), inputs.v + 1)
    with pytest.raises(ValueError, match="'barred' cannot run: it is Sunday"):
        packed_attention(inputs, "barred")
