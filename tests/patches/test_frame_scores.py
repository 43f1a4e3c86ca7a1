"""Scores of a video: kept where nothing moved, made anew where something did, whatever the scale, size and number."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apt_dense import APTViT, PatchSelector
from apt_dense.patches.blocks_of_pixels import grey_levels
from apt_dense.patches.frame_scores import FrameScorer
from apt_dense.patches.scores import SCORERS, entropy_scores

SCALES = 1, 2
FLICKER = 2.0  # grey levels of a camera's noise


def still_video(frames: int, side: int = 96) -> Tensor:
    """Frames (n, 1, 3, side, side) of a scene that does not move, under a camera's noise."""
    random = torch.Generator().manual_seed(0)
    scene = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 12, generator=random) * 90 + 60, size=(side, side))
    noise = torch.randn(frames, 1, 3, side, side, generator=random) * FLICKER
    return (scene + noise).round().clamp(0, 255)


def with_square(frame: Tensor, top: int, left: int, side: int = 8) -> Tensor:
    moved = frame.clone()
    moved[..., top : top + side, left : left + side] = 255 - moved[..., top : top + side, left : left + side]
    return moved


def test_the_first_frame_is_scored_as_without_memory() -> None:
    (frame,) = still_video(1)
    for name, scorer in SCORERS.items():
        for kept, expected in zip(FrameScorer(name)(frame, 16, SCALES), scorer(frame, 16, SCALES), strict=True):
            assert torch.equal(kept, expected)


def test_noise_alone_changes_no_score() -> None:
    frames, scorer = still_video(6), FrameScorer()
    first = scorer(frames[0], 16, SCALES)
    for frame in frames[1:]:
        assert all(map(torch.equal, scorer(frame, 16, SCALES), first))
        assert not any(map(torch.equal, entropy_scores(frame, 16, SCALES), first))


def test_patches_in_which_something_moves_get_new_scores_and_no_others() -> None:
    before, after = still_video(2)
    after = with_square(after, top=36, left=70)
    scorer = FrameScorer()
    first = scorer(before, 16, SCALES)
    second, fresh = scorer(after, 16, SCALES), entropy_scores(after, 16, SCALES)
    places = [(1, 2), (0, 1)]  # of 36, 70 in patches of 32 and of 64 pixels; at 64, 70 lies beyond the whole ones
    for old, kept, new, place in zip(first, second, fresh, places, strict=True):
        inside = torch.zeros_like(kept, dtype=torch.bool)
        if all(index < length for index, length in zip(place, kept.shape[1:], strict=True)):
            inside[0][place] = True
        assert torch.equal(kept, torch.where(inside, new, old))


def test_slow_changes_add_up() -> None:
    """Each frame differs from the last by less than the tolerance; scores say from which frame they are."""
    made = []

    def numbered(pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
        made.append(pixels)
        size = patch_size * 2 ** scales[0]
        return (pixels.new_full((1, pixels.shape[2] // size, pixels.shape[3] // size), len(made) - 1),)

    frame, scorer = still_video(1)[0], FrameScorer(numbered, tolerance=2.0)
    found = [scorer(frame + 0.6 * number, 16, (1,))[0].unique().tolist() for number in range(6)]
    assert found == [[0], [0], [0], [0], [4], [4]]


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    patch=st.sampled_from([1, 7, 8, 14, 16]),
    seed=st.integers(0, 99),
)
def test_any_size_agrees_with_a_plain_loop(height: int, width: int, patch: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    before = torch.randint(0, 256, (2, 3, height, width), generator=random).float()
    after = torch.where(torch.rand(2, 1, height, width, generator=random) < 0.02, 255 - before, before)
    scorer = FrameScorer(tolerance=3.0)
    first, second = scorer(before, patch, SCALES), scorer(after, patch, SCALES)
    block = {1: 1, 7: 7, 8: 8, 14: 7, 16: 8}[patch]
    for scale, old, kept, new in zip(SCALES, first, second, entropy_scores(after, patch, SCALES), strict=True):
        size = patch * 2**scale
        for image, row, column in torch.cartesian_prod(*map(torch.arange, kept.shape)).tolist():
            area = slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size)
            change = grey_levels(after[[image]])[0][area] - grey_levels(before[[image]])[0][area]
            blocks = change.unflatten(1, (-1, block)).unflatten(0, (-1, block)).mean((1, 3))
            expected = new if blocks.abs().max() >= 3.0 else old
            assert kept[image, row, column] == expected[image, row, column]


def test_another_size_number_or_scales_begin_anew() -> None:
    frames, scorer = still_video(2), FrameScorer()
    scorer(frames[0], 16, SCALES)
    for other in (frames[1][..., :80], frames[1].repeat(2, 1, 1, 1)):
        assert all(map(torch.equal, scorer(other, 16, SCALES), entropy_scores(other, 16, SCALES)))
    assert len(scorer(frames[1], 16, (1,))) == 1
    scorer.forget()
    assert all(map(torch.equal, scorer(frames[0], 16, SCALES), entropy_scores(frames[0], 16, SCALES)))


@pytest.mark.parametrize("options", [{}, {"token_budget": 0.5}], ids=str)
def test_a_model_cuts_a_still_scene_as_in_its_first_frame(options: dict) -> None:
    pixels, tiny = {"pixel_mean": (120.0,) * 3, "pixel_std": (60.0,) * 3}, {"embed_dim": 24, "depth": 1, "num_heads": 2}
    video = still_video(5, side=224)
    options |= {"thresholds": (entropy_scores(video[0], 16, (1,))[0].median().item() - 1e-3,), **pixels}
    model = APTViT(img_size=224, scorer=FrameScorer(), **tiny, **options).eval()
    plain = PatchSelector(**options)
    frames = [(frame - 120) / 60 for frame in video]
    with torch.no_grad():
        maps = [model.partition(frame) for frame in frames]
        assert model(frames[-1])[0].shape == (1, 24, 14, 14)
    assert all(torch.equal(each, maps[0]) for each in maps) and 0 < maps[0].float().mean() < 2
    assert not all(torch.equal(plain.scale_map(frame), maps[0]) for frame in frames)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan")])
def test_bad_tolerances_are_refused(tolerance: float) -> None:
    with pytest.raises(ValueError, match=f"tolerance={tolerance} must be"):
        FrameScorer(tolerance=tolerance)


def test_unknown_scorers_are_refused() -> None:
    with pytest.raises(ValueError, match="scorer='entropie' is unknown"):
        FrameScorer("entropie")


def test_no_graph_is_made_of_a_memory() -> None:
    options = {"img_size": 64, "embed_dim": 24, "depth": 1, "num_heads": 2, "thresholds": (5.5,), "token_budget": 0.5}
    model = APTViT(scorer=FrameScorer(), **options).eval()
    with torch.no_grad(), pytest.raises(Exception, match="FrameScorer remembers earlier frames"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.rand(1, 3, 64, 64))
