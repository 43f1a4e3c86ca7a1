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
    net.keep(share)
    return net, plain


@pytest.mark.parametrize("options", [{}, {"init_values": 0.5, "reg_tokens": 2, "qk_norm": True}])
@pytest.mark.parametrize("kind", rivals.RIVALS)
@torch.no_grad()
def test_with_all_tokens_it_is_the_uniform_model(kind: str, options: dict) -> None:
    net, plain = build(kind, 1.0, **options)
    images = noise(2, 3, 48, 64)
    torch.testing.assert_close(net(images), plain(images), atol=1e-5, rtol=1e-4)


@given(part=st.floats(0.0, 1.0), cells=st.integers(60, 900), depth=st.integers(5, 24))
@pytest.mark.parametrize("kind", rivals.RIVALS)
def test_blocks_see_the_share_on_average(kind: str, part: float, cells: int, depth: int) -> None:
    net = rivals.RIVALS[kind](**{**SIZES, "depth": depth, "embed_dim": 2})
    net.keep(net.lowest_share + part * (1 - net.lowest_share))
    counts = net.counts(cells)
    assert len(counts) == depth and min(counts) >= 0 and counts[0] == cells
    assert net.mean_count(cells) == pytest.approx(net.share * cells, abs=1)
    assert kind == "merging" or counts[-1] == cells


@pytest.mark.parametrize("kind", rivals.RIVALS)
def test_a_share_that_cannot_be_kept_is_refused(kind: str) -> None:
    net, _ = build(kind, 1.0)
    net.keep(net.lowest_share)
    assert net(noise(1, 3, 64, 64))[-1].isfinite().all()
    for share in (net.lowest_share - 0.01, 1.01):
        with pytest.raises(ValueError, match=f"a rival of 5 blocks keeps {net.lowest_share:.0%} to 100%"):
            net.keep(share)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": (5.0,)}, "thresholds"),
        ({"window_size": 4, "window_block_indexes": (0,), "class_token": False}, "windows"),
        ({"use_rel_pos": True, "class_token": False}, "relative positions"),
        ({"proportional_attention": 0.5}, "proportional attention"),
        ({"class_token": False}, "no class token"),
    ],
)
def test_what_a_rival_would_ignore_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rivals.PruningViT(**{**SIZES, **options}).keep(0.7)


@pytest.mark.parametrize("kind", rivals.RIVALS)
def test_blocks_see_as_many_tokens_as_it_says(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and MLPs, which are the work."""
    net, _ = build(kind, 0.7)
    seen, plain = [], rivals.attend
    monkeypatch.setattr(rivals, "attend", lambda block, x, bias: seen.append(x.shape[1] - 1) or plain(block, x, bias))
    mlps = []
    for block in net.blocks:
        block.mlp.register_forward_hook(lambda module, args, out: mlps.append(out.shape[1] - 1))
    output = net(noise(2, 3, 64, 64))[-1]
    assert output.shape == (2, 16, 8, 8) and seen == net.counts(64)
    mean = (sum(seen) + sum(mlps)) / 10
    assert rivals.mean_tokens(net, noise(2, 3, 64, 64)).tolist() == pytest.approx([mean] * 2)
    assert mean == pytest.approx(0.7 * 64, abs=1)
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
