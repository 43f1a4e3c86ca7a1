"""Patches and positions of another size: prefix and grid told apart for every rectangle, and resampled by timm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from apt_dense import APTViT
from apt_dense.weights.convert import from_apt, to_apt
from apt_dense.weights.load import load_backbone
from apt_dense.weights.resize import (
    fold_class_position,
    join_prefix,
    note_grid,
    noted_grid,
    prefix_counts,
    resize_positions,
    resize_state,
    source_grid,
    split_prefix,
)

from support.references import noise, randomise

WIDTH = 8
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 1, "num_heads": 1}
State = dict[str, Tensor]
Grid = tuple[int, int]
GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))
#: Arguments of models with 0, 1, 3 and 5 prefix positions, and without those of their tokens.
PREFIXES: list[dict[str, Any]] = [
    {},
    {"class_token": True},
    {"pretrain_use_cls_token": True},
    {"class_token": True, "reg_tokens": 2},
    {"class_token": True, "reg_tokens": 4},
    {"reg_tokens": 2},
    {"class_token": True, "no_embed_class": True},
]


def ours(seed: int = 0, grid: Grid | None = None, **options: Any) -> APTViT:
    size = {} if grid is None else {"img_size": (8 * grid[0], 8 * grid[1])}
    return randomise(APTViT(**{**SMALL, **size, **options}), 0.2, seed)


def weights(**options: Any) -> State:
    """A state dict that knows nothing but its tensors."""
    return dict(ours(**options).state_dict())


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def resampled(cells: Tensor, grid: Grid) -> Tensor:
    """Resample positions (1, rows, columns, C) by torch alone."""
    if tuple(cells.shape[1:3]) == grid:
        return cells
    return F.interpolate(cells.permute(0, 3, 1, 2), grid, mode="bicubic", antialias=True).permute(0, 2, 3, 1)


# ---- prefix and grid


@given(GRIDS, st.integers(0, 6))
def test_a_known_grid_is_split_and_joined(grid: Grid, prefix: int) -> None:
    positions = noise(1, prefix + math.prod(grid), 2)
    tokens, cells = split_prefix(positions, [prefix], grid)
    assert tokens.shape == (1, prefix, 2) and cells.shape == (1, *grid, 2)
    assert torch.equal(join_prefix(tokens, cells), positions)
    assert cells[0, -1, 0].equal(positions[0, prefix + (grid[0] - 1) * grid[1]])


@given(GRIDS, st.sampled_from([None, (2, 3)]))
def test_a_grid_of_sam_is_known(grid: Grid, claimed: Grid | None) -> None:
    positions = noise(1, *grid, 2)
    if claimed in (None, grid):
        tokens, cells = split_prefix(positions, (0, 1), claimed)
        assert tokens.shape == (1, 0, 2) and cells is positions
    else:
        with pytest.raises(ValueError, match="it is not a grid of 2 x 3"):
            split_prefix(positions, (0, 1), claimed)


@given(st.integers(1, 120), st.integers(0, 20))
def test_an_unknown_grid_is_the_only_square_or_refused(length: int, registers: int) -> None:
    counts = prefix_counts({"cls_token": noise(1, 1, 2), "reg_token": noise(1, registers, 2)})
    squares = [(count, side) for count in counts for side in range(1, 12) if count + side**2 == length]
    positions = noise(1, length, 2)
    if len(squares) == 1:
        tokens, cells = split_prefix(positions, counts)
        assert [(tokens.shape[1], cells.shape[1])] == squares and cells.shape[1] == cells.shape[2]
    else:
        with pytest.raises(ValueError, match=rf"pos_embed of shape \(1, {length}, 2\) does not fit.*--grid"):
            split_prefix(positions, counts)


def test_errors_name_the_shape_the_candidates_and_the_remedy() -> None:
    for length, counts, grid, message in (
        (17, (0, 1, 8), None, "its grid may be 4 x 4 after 1 or 3 x 3 after 8 prefix positions"),
        (12, (0, 1), None, "it is not a square grid after 0 or 1 prefix positions"),
        (64, (0, 1), (16, 5), "it is not a grid of 16 x 5 after 0 or 1 prefix positions"),
    ):
        with pytest.raises(ValueError) as error:
            split_prefix(noise(1, length, 2), counts, grid)
        assert str(error.value).startswith(f"pos_embed of shape (1, {length}, 2) does not fit: {message}")
        assert "name the checkpoint's rows and columns (grid=, --grid)" in str(error.value)


@pytest.mark.parametrize("shape", [(2,), (3, 4), (1, 2, 2, 2, 2)], ids=str)
def test_positions_of_another_rank_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        split_prefix(torch.zeros(shape), (0, 1))
    with pytest.raises(ValueError, match="does not fit"):
        load_backbone(ours(), {**weights(), "pos_embed": torch.zeros(shape)})


@pytest.mark.parametrize(
    ("options", "counts"),
    [({}, (0, 1)), ({"class_token": True}, (0, 1)), ({"class_token": True, "reg_tokens": 4}, (0, 1, 5)),
     ({"reg_tokens": 4}, (0, 1, 4))],
)  # fmt: skip
def test_plausible_prefixes(options: dict, counts: tuple[int, ...]) -> None:
    assert prefix_counts(weights(**options)) == counts


# ---- the grid that a state dict knows of


def test_state_dicts_say_their_grid() -> None:
    model = nn.ModuleDict({"a": ours(grid=(2, 5)), "b": nn.Linear(1, 1)})
    state = model.state_dict()
    assert noted_grid(state) == noted_grid(state, "a.") == (2, 5) and noted_grid(state, "b.") is None
    assert state.keys() == {f"a.{name}" for name in model["a"].state_dict()} | {"b.weight", "b.bias"}
    two = nn.ModuleList([ours(grid=(2, 5)), ours(grid=(5, 2))]).state_dict()
    assert noted_grid(two) is None and noted_grid(two, "1.") == (5, 2)


@pytest.mark.parametrize("junk", [None, [], "x", {"": None}, {"": {"pos_grid": "ab"}}, {"": {"pos_grid": [2, [8]]}},
                                  {"": {"pos_grid": (0, 8)}}, {"": {"pos_grid": (2, 8, 1)}}], ids=str)  # fmt: skip
def test_metadata_may_hold_anything(junk: Any) -> None:
    state = ours().state_dict()
    state._metadata = junk
    assert noted_grid(state) is None
    load_backbone(ours(1), state)


def test_a_noted_grid_that_cannot_be_true_is_ignored() -> None:
    """Positions that were resampled since."""
    state = ours(grid=(2, 8)).state_dict()
    assert source_grid(state, None, noted_grid(state)) == (2, 8)
    state["pos_embed"] = noise(1, 9, WIDTH)
    assert source_grid(state, None, noted_grid(state)) is None
    model = ours(1, grid=(3, 3))
    load_backbone(model, state)
    assert torch.equal(model.pos_embed, state["pos_embed"])


def test_notes_do_not_reach_the_state_dict_they_were_copied_from() -> None:
    state = ours(grid=(2, 8)).state_dict()
    copy = state.copy()
    copy._metadata = state._metadata
    note_grid(copy, "", (4, 4))
    assert noted_grid(copy) == (4, 4) and noted_grid(state) == (2, 8)
    note_grid({}, "", (4, 4))  # a plain dictionary has no place for one


# ---- rectangles: file x model x prefix


def loaded(model: APTViT, checkpoint: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Load, and return the prefix and the grid of a model's positions after loading."""
    load_backbone(model, checkpoint, **options)
    return split_prefix(model.pos_embed.detach(), [model.num_prefix_positions], model.pos_grid)


@given(GRIDS, GRIDS, st.sampled_from(PREFIXES), st.sampled_from(["noted", "named", "load_state_dict", "nested"]))
def test_rectangles_are_resampled_and_never_scrambled(source: Grid, target: Grid, options: dict, way: str) -> None:
    """Whoever knows the grid: our state dict, the user, or torch's own loading, also of a whole model."""
    theirs, model = ours(0, source, **options), ours(1, target, **options)
    state = theirs.state_dict()
    prefix, cells = split_prefix(state["pos_embed"], [theirs.num_prefix_positions], source)
    if way == "named":
        load_backbone(model, dict(state), grid=source)
    elif way == "noted":
        load_backbone(model, {"state_dict": state})
    elif way == "load_state_dict":
        model.load_state_dict(state)
    else:
        nn.ModuleDict({"net": model}).load_state_dict(nn.ModuleDict({"net": theirs}).state_dict())
    expected = join_prefix(prefix, resampled(cells, target))
    torch.testing.assert_close(model.pos_embed.detach(), expected, atol=1e-5, rtol=0)
    if source == target:
        assert torch.equal(model.pos_embed, state["pos_embed"])
    assert noted_grid(state) == source  # loading has not changed what the state dict says


@given(GRIDS, GRIDS, st.booleans())
def test_rows_that_are_alike_stay_alike(source: Grid, target: Grid, class_token: bool) -> None:
    theirs, model = (ours(0, grid, class_token=class_token) for grid in (source, target))
    with torch.no_grad():
        rows = (torch.arange(float(source[0])) / source[0]).repeat_interleave(source[1])
        theirs.pos_embed[:, -len(rows) :] = rows.view(1, -1, 1)
    _, cells = loaded(model, theirs.state_dict())
    torch.testing.assert_close(cells, cells[:, :, :1].expand_as(cells), atol=1e-5, rtol=0)


@given(GRIDS, GRIDS)
def test_rectangles_of_sam(source: Grid, target: Grid) -> None:
    """Its file tells the grid, through every conversion that keeps its shape."""
    state = weights(grid=source)
    theirs = from_apt(state, "sam", grid=source).state
    assert theirs["pos_embed"].shape == (1, *source, WIDTH)
    expected = resampled(theirs["pos_embed"], target)
    for between in (theirs, to_apt(theirs), to_apt(from_apt(to_apt(theirs, "sam"), "sam").state, "sam")):
        _, cells = loaded(ours(1, target), {"model": between})
        torch.testing.assert_close(cells, expected, atol=1e-5, rtol=0)
    assert same(from_apt(to_apt(theirs), "apt").state, state)
    resized = resize_state(to_apt(theirs), img_size=(8 * target[0], 8 * target[1]))["pos_embed"]
    torch.testing.assert_close(resized, expected, atol=1e-5, rtol=0)


@given(GRIDS, st.sampled_from(["detectron2", "mmseg"]), st.booleans())
def test_rectangles_of_projects_with_a_class_position(grid: Grid, target: str, class_token: bool) -> None:
    state = weights(grid=grid, class_token=class_token)
    written = from_apt(state, target, grid=grid)
    assert ("pos_embed[:, 0]" in written.added) == (not class_token)
    assert written.state["pos_embed"].shape == (1, 1 + math.prod(grid), WIDTH)
    model = ours(1, grid, class_token=class_token)
    load_backbone(model, written.state, strict=False, grid=grid)
    assert torch.equal(model.pos_embed, state["pos_embed"])


def test_a_named_grid_wins_over_a_noted_one_and_must_be_true() -> None:
    state = ours(grid=(2, 8)).state_dict()
    cells = state["pos_embed"].unflatten(1, (8, 2))
    _, found = loaded(ours(1, (4, 4)), state, grid=(8, 2))
    torch.testing.assert_close(found, resampled(cells, (4, 4)), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"\(1, 16, 8\) does not fit: it is not a grid of 5 x 5 after 0 or 1"):
        load_backbone(ours(1, (4, 4)), state, grid=(5, 5))


def test_where_nobody_knows_the_model_does() -> None:
    """Its grid, if it has as many positions; or else a square; an error asks where both would do."""
    state = weights(grid=(2, 8))
    for grid in ((2, 8), (8, 2), (4, 4)):
        model = ours(1, grid, pretrain_img_size=(8 * grid[0], 8 * grid[1]))
        assert load_backbone(model, state).converted == []
        assert torch.equal(model.pos_embed, state["pos_embed"])
    with pytest.raises(ValueError, match="its grid may be 2 x 8 after 0 or 4 x 4 after 0 prefix positions"):
        load_backbone(ours(1, (2, 8)), state)
    model = ours(1, (2, 6))
    assert load_backbone(model, weights(grid=(3, 4))).converted == []  # 12 positions are no square
    square = resampled(state["pos_embed"].unflatten(1, (4, 4)), (3, 3))
    torch.testing.assert_close(loaded(ours(1, (3, 3)), state)[1], square, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="it is not a square grid after 0 or 1 prefix positions"):
        load_backbone(ours(1), weights(grid=(2, 6)))


# ---- positions


@pytest.mark.parametrize("grid", [(7, 7), (14, 14), (3, 20)], ids=str)
@pytest.mark.parametrize("num_prefix", [0, 1])
def test_positions_are_resampled_as_timm_does(grid: tuple[int, int], num_prefix: int) -> None:
    pos_embed = noise(1, 14 * 14 + 1, 5)
    resized = resize_positions(pos_embed, grid, num_prefix)
    expected = resample_abs_pos_embed(pos_embed, list(grid), [14, 14], num_prefix_tokens=1)
    torch.testing.assert_close(resized, expected[:, 1 - num_prefix :], atol=1e-6, rtol=0)


def test_positions_without_a_class_position() -> None:
    pos_embed = noise(1, 16, 2)
    assert torch.equal(resize_positions(pos_embed, (4, 4), 0), pos_embed)
    with pytest.raises(ValueError, match=r"pos_embed of shape \(1, 16, 2\) does not fit"):
        resize_positions(pos_embed, (4, 4), 1)


def test_positions_of_no_square_grid_are_refused() -> None:
    """198 = 196 + 2: a distilled DeiT."""
    with pytest.raises(ValueError, match="set img_size and class_token as in the checkpoint"):
        resize_positions(noise(1, 198, 2), (14, 14), 1)


def test_a_class_position_is_folded_into_the_token() -> None:
    state = {"pos_embed": torch.ones(1, 10, 2), "cls_token": torch.ones(1, 1, 2)}
    assert fold_class_position(state, (2, 5)) == {}  # a grid of 2 x 5, and not of 3 x 3 and a class
    folded = fold_class_position(state, (4, 4))
    assert folded["pos_embed"].shape == (1, 3, 3, 2) and (folded["cls_token"] == 2).all()
    assert fold_class_position({"pos_embed": torch.ones(1, 10, 2)}, (4, 4)) == {}
    assert fold_class_position({**state, "pos_embed": torch.ones(1, 9, 2)}, (4, 4)) == {}


@given(GRIDS, GRIDS)
def test_rectangles_with_a_class_position_to_fold(source: Grid, target: Grid) -> None:
    state = weights(grid=source, class_token=True)
    model = ours(1, target, class_token=True, no_embed_class=True)
    _, cells = loaded(model, state, grid=source)
    assert torch.equal(model.cls_token, state["cls_token"] + state["pos_embed"][:, :1])
    expected = resampled(state["pos_embed"][:, 1:].unflatten(1, source), target)
    torch.testing.assert_close(cells, expected, atol=1e-5, rtol=0)


# ---- patches and images of another size


@pytest.mark.parametrize("patch_size", [4, 16, 14])
def test_patches_are_resampled_as_timm_does(patch_size: int) -> None:
    state = weights()
    resized = resize_state(state, patch_size)
    expected = resample_patch_embed(state["patch_embed.proj.weight"], [patch_size, patch_size])
    assert torch.equal(resized.pop("patch_embed.proj.weight"), expected)
    assert all(torch.equal(value, state[name]) for name, value in resized.items())


def test_a_larger_patch_of_a_larger_image_says_the_same() -> None:
    """FlexiViT's aim: an image that is enlarged as the patches are gives the same embedding."""
    state, image = weights(), noise(1, 3, 8, 8)
    larger = resize_state(state, 16)["patch_embed.proj.weight"]
    enlarged = F.interpolate(image, size=(16, 16), mode="bicubic", antialias=True)
    expected = F.conv2d(image, state["patch_embed.proj.weight"])
    torch.testing.assert_close(F.conv2d(enlarged, larger), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("options", "prefix"), [({}, 0), ({"class_token": True}, 1), ({"class_token": True, "reg_tokens": 3}, 4)]
)
def test_positions_are_resampled_as_timm_does(options: dict, prefix: int) -> None:
    state = weights(**options)
    resized = resize_state(state, img_size=(48, 64))["pos_embed"]
    assert torch.equal(resized, resample_abs_pos_embed(state["pos_embed"], [6, 8], num_prefix_tokens=prefix))
    assert same(resize_state(state, 8, (32, 32)), state)


def test_a_model_of_other_patches_and_size_loads_on_request() -> None:
    state = weights(class_token=True)
    model = ours(1, class_token=True, patch_size=16, img_size=96)
    with pytest.raises(ValueError, match="or resize_patches=True to resample it"):
        load_backbone(model, state)
    report = load_backbone(model, state, resize_patches=True)
    assert sorted(report.converted) == ["patch_embed.proj.weight", "pos_embed"]
    assert same(model.state_dict(), resize_state(state, 16, (96, 96)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 0}, "patch_size=0: expected at least 1"),
        ({"img_size": (40, 36)}, r"img_size=\(40, 36\) is not a multiple of patches of 8"),
        ({"patch_size": 16, "img_size": (8, 8)}, "not a multiple of patches of 16"),
    ],
)
def test_sizes_that_do_not_divide(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize_state(weights(), **arguments)


@given(GRIDS, GRIDS, st.sampled_from(PREFIXES))
def test_images_of_every_rectangle(source: Grid, target: Grid, options: dict) -> None:
    model = ours(0, source, **options)
    state = dict(model.state_dict())
    resized = resize_state(state, img_size=(8 * target[0], 8 * target[1]), grid=source)["pos_embed"]
    prefix, cells = split_prefix(state["pos_embed"], [model.num_prefix_positions], source)
    torch.testing.assert_close(resized, join_prefix(prefix, resampled(cells, target)), atol=1e-5, rtol=0)


def test_the_grid_of_an_image_size_is_that_of_the_result() -> None:
    """A square of as many positions is resampled, too."""
    state = weights(grid=(4, 4))
    resized = resize_state(state, img_size=(16, 64))["pos_embed"]
    expected = resampled(state["pos_embed"].unflatten(1, (4, 4)), (2, 8)).flatten(1, 2)
    torch.testing.assert_close(resized, expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="it is not a square grid"):
        resize_state(weights(grid=(2, 6)), img_size=(16, 64))
