"""Attention: softmax inside each segment and nothing across, whatever the lengths."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from references import layout_of, noise
from torch import Tensor

from apt_dense import attention
from apt_dense.attention import AlignedBias, PaddingKey, RelativeBias, packed_attention
from apt_dense.layout import Segments
from apt_dense.positions import MASKED

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
    torch.testing.assert_close(packed_attention(q, k, v, segments(*lengths)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_no_rows(lengths: tuple[int, ...]) -> None:
    out = packed_attention(*qkv(0), segments(*lengths))
    assert out.shape == (0, HEADS, DIM)


def test_a_segment_of_one_row_returns_its_value() -> None:
    q, k, v = qkv(4)
    torch.testing.assert_close(packed_attention(q, k, v, segments(1, 1, 1, 1)), v)


def test_other_segments_change_nothing() -> None:
    q, k, v = qkv(9)
    whole = packed_attention(q, k, v, segments(2, 4, 3))
    alone = packed_attention(q[2:6], k[2:6], v[2:6], segments(4))
    torch.testing.assert_close(whole[2:6], alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(3, 3), (2, 0, 4)], ids=str)
def test_gradients_match_the_reference(lengths: tuple[int, ...]) -> None:
    q, k, v = (t.double().requires_grad_() for t in qkv(sum(lengths)))
    assert torch.autograd.gradcheck(lambda *t: packed_attention(*t, segments(*lengths)), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("lengths", [(3,), (4, 4), ()], ids=str)
def test_layout_of_another_batch_is_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"5 rows, but the segments hold {sum(lengths)}"):
        packed_attention(*qkv(5), segments(*lengths))


# ---- a bias and a key for padding

LENGTHS = [(3, 3), (1, 5, 0, 2), (40, 33, 34, 64, 39)]  # the last share buckets that are filled up


def factored(rows: int, lengths: tuple[int, ...]) -> tuple[RelativeBias, PaddingKey]:
    """A random bias, and a padding key that the first segment has no use for."""
    bias = RelativeBias(noise(rows, HEADS, 3, seed=4), noise(rows, 3, seed=5))
    logit = noise(rows, HEADS, seed=6)
    logit[: lengths[0]] = MASKED
    return bias, PaddingKey(logit, noise(HEADS, DIM, seed=7), noise(HEADS, DIM, seed=8))


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], bias: RelativeBias | None, padding: PaddingKey | None
) -> Tensor:
    """One segment and head after the other, with the whole matrix of logits; a padding key is one more column."""
    out = torch.zeros_like(v)
    for start, length in zip([sum(lengths[:i]) for i in range(len(lengths))], lengths, strict=True):
        part = slice(start, start + length)
        for head in range(HEADS):
            keys, values = k[part, head], v[part, head]
            extra = torch.zeros(length, length)
            if bias is not None:
                extra = bias.queries_RHK[part, head] @ bias.keys_RK[part].T
            if padding is not None:
                keys, values = torch.cat([keys, padding.k_HD[head][None]]), torch.cat([values, padding.v_HD[head][None]])
                extra = torch.cat([extra, padding.logit_RH[part, head, None]], 1)
            out[part, head] = (q[part, head] @ keys.T / math.sqrt(DIM) + extra).softmax(-1) @ values
    return out


@pytest.mark.parametrize("entries", [1, 100, 2**21])
@pytest.mark.parametrize("use", [(True, False), (False, True), (True, True), (False, False)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_bias_and_padding_key(
    lengths: tuple[int, ...], use: tuple[bool, bool], entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_BIAS_ENTRIES", entries)
    q, k, v = qkv(sum(lengths))
    bias, padding = (part if used else None for part, used in zip(factored(sum(lengths), lengths), use, strict=True))
    expected = plain_attention(q, k, v, lengths, bias, padding)
    with torch.no_grad():
        torch.testing.assert_close(packed_attention(q, k, v, segments(*lengths), bias, padding), expected)
    q.requires_grad_()
    torch.testing.assert_close(packed_attention(q, k, v, segments(*lengths), bias, padding), expected)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_gradients_of_bias_and_padding_key(lengths: tuple[int, ...]) -> None:
    rows = sum(lengths)
    bias, padding = factored(rows, lengths)
    leaves = [t.detach().requires_grad_() for t in (*qkv(rows), *bias[:2], *padding)]
    weights = noise(rows, HEADS, DIM, seed=9)

    def gradients(attend: Callable[..., Tensor], of: object) -> tuple[Tensor, ...]:
        out = attend(*leaves[:3], of, RelativeBias(*leaves[3:5]), PaddingKey(*leaves[5:]))
        return torch.autograd.grad((out * weights).sum(), leaves)

    pairs = zip(gradients(packed_attention, segments(*lengths)), gradients(plain_attention, lengths), strict=True)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slice_of_queries", [1, 3, 128])
def test_an_aligned_bias_gives_the_same_as_its_factors(slice_of_queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_QUERIES", slice_of_queries)
    q, k, v = qkv(9)
    queries, codes = noise(9, HEADS, 6), torch.tensor([[i % 3, 3 + i % 2] for i in range(9)])
    keys = torch.zeros(9, 6).scatter_(1, codes, 1.0)
    expected = packed_attention(q, k, v, segments(2, 4, 3), RelativeBias(queries, keys))
    aligned = RelativeBias(queries, keys, AlignedBias(queries, codes))
    torch.testing.assert_close(packed_attention(q, k, v, segments(2, 4, 3), aligned), expected, atol=1e-6, rtol=1e-5)
