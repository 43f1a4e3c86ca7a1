"""Other ways to spend fewer tokens: the uniform model where none is saved, otherwise a slow reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apt_dense import APTViT, PatchSelector

from evidence import rival_backbones as rivals
from support.references import noise, randomise

SIZES = {
    "img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 5, "num_heads": 2, "class_token": True, "thresholds": (),
}  # fmt: skip


def build(kind: str, share: float, **options: object) -> tuple[rivals.RivalViT, APTViT]:
    """A rival and the uniform model of the same weights."""
    plain = randomise(APTViT(**SIZES, **options), 0.2).eval()
    net = rivals.RIVALS[kind](**SIZES, **options).eval()
    net.load_state_dict(plain.state_dict())
    net.share = share
    return net, plain


@pytest.mark.parametrize("options", [{}, {"init_values": 0.5, "reg_tokens": 2, "qk_norm": True}])
@pytest.mark.parametrize("kind", rivals.RIVALS)
@torch.no_grad()
def test_with_all_tokens_it_is_the_uniform_model(kind: str, options: dict) -> None:
    net, plain = build(kind, 1.0, **options)
    images = noise(2, 3, 48, 64)
    torch.testing.assert_close(net(images), plain(images), atol=1e-5, rtol=1e-4)


@given(share=st.floats(0.6, 1.0), cells=st.integers(40, 900), depth=st.integers(5, 24))
@pytest.mark.parametrize("kind", rivals.RIVALS)
def test_blocks_see_the_share_on_average(kind: str, share: float, cells: int, depth: int) -> None:
    net = rivals.RIVALS[kind](**{**SIZES, "depth": depth, "embed_dim": 2})
    net.share = share
    counts = net.counts(cells)
    assert len(counts) == depth and min(counts) >= 0 and counts[0] == cells
    assert sum(counts) / depth == pytest.approx(share * cells, abs=1)
    assert kind == "merging" or counts[-1] == cells


def test_a_share_that_cannot_be_kept_is_refused() -> None:
    net, _ = build("merging", 0.4)
    with pytest.raises(ValueError, match="cannot keep that share"):
        net(noise(1, 3, 64, 64))


@pytest.mark.parametrize("kind", rivals.RIVALS)
def test_attention_sees_as_many_tokens_as_it_says(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = build(kind, 0.6)
    seen, plain = [], rivals.attend
    monkeypatch.setattr(rivals, "attend", lambda block, x, bias: seen.append(x.shape[1]) or plain(block, x, bias))
    output = net(noise(2, 3, 64, 64))[-1]
    assert output.shape == (2, 16, 8, 8)
    assert [count - 1 for count in seen] == net.counts(64)
    assert rivals.mean_tokens(net, noise(2, 3, 64, 64)).tolist() == pytest.approx([sum(net.counts(64)) / 5] * 2)
    assert sum(net.counts(64)) / 5 == pytest.approx(0.6 * 64, abs=1)
    output.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def merge_slowly(
    x: Tensor, keys: Tensor, sizes: Tensor, count: int, prefix: int
) -> list[tuple[Tensor, float, set[int]]]:
    """The tokens of one image, what they stand for, and of which tokens they were made."""
    groups = {i: [i] for i in range(len(x))}
    sources, targets = list(range(prefix, len(x)))[::2], list(range(prefix, len(x)))[1::2]
    edges = []
    for i in sources:
        alike = [F.cosine_similarity(keys[i], keys[j], dim=0) for j in targets]
        best = max(range(len(targets)), key=lambda j, alike=alike: alike[j])
        edges.append((float(alike[best]), i, targets[best]))
    for _, i, j in sorted(edges, reverse=True)[:count]:
        groups[j] += groups.pop(i)
    found = []
    for members in groups.values():
        total = sum(float(sizes[i]) for i in members)
        found.append((sum(x[i] * sizes[i] for i in members) / total, total, set(members)))
    return found


@pytest.mark.parametrize(("total", "count", "prefix"), [(12, 3, 1), (9, 4, 0), (14, 0, 2), (4, 1, 2)])
def test_merging_is_that_of_loops(total: int, count: int, prefix: int) -> None:
    x, keys, sizes = noise(2, total, 6), noise(2, total, 4), noise(2, total).abs() + 1
    place = torch.arange(total).repeat(2, 1)
    found = rivals.merged(rivals.Tokens(x, sizes, place), keys, count, prefix)
    assert found.x.shape == (2, total - count, 6)
    for image in range(2):
        expected = merge_slowly(x[image], keys[image], sizes[image], count, prefix)
        for token, size, members in expected:
            own = {int(found.place[image, i]) for i in members}
            assert len(own) == 1
            torch.testing.assert_close(found.x[image, own.copy().pop()], token)
            assert float(found.sizes[image, own.pop()]) == pytest.approx(size, rel=1e-5)
        assert found.place[image, :prefix].tolist() == list(range(prefix))


def test_pruned_tokens_come_back_as_they_were() -> None:
    """With a last block that changes nothing, the cells pruned first hold what the first block made of them."""
    net, _ = build("pruning", 0.6, final_norm=False)
    for parameter in net.blocks[-1].parameters():
        torch.nn.init.zeros_(parameter)
    images = noise(1, 3, 64, 64)
    with torch.no_grad():
        result = net(images)[-1].flatten(2)[0].T
        first = APTViT(**{**SIZES, "depth": 1}, final_norm=False).eval()
        first.load_state_dict({n: p for n, p in net.state_dict().items() if n in first.state_dict()})
        early = first(images)[-1].flatten(2)[0].T
    same = (result - early).abs().amax(1) < 1e-5
    assert int(same.sum()) == 64 - net.counts(64)[1]


def test_random_patches_are_the_image_s_own() -> None:
    images = noise(3, 3, 64, 64)
    selector = PatchSelector(patch_size=8, thresholds=(0.5, 0.3), scorer=rivals.random_scores)
    whole = selector.scale_map(images)
    assert torch.equal(selector.scale_map(images[1:2]), whole[1:2])
    assert not torch.equal(whole[0], whole[1]) and set(whole.unique().tolist()) == {0, 1, 2}
