"""Positions of rectangular grids, in the files of every project: resampled as a reference in float64 says, or refused;
never taken for the square of as many positions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert_checkpoint
import pytest
import timm
import torch
from torch import Tensor, nn

from apt_dense import APTViT, load_backbone
from apt_dense.options import Rotary
from apt_dense.weights.arguments_from_file import told_by
from apt_dense.weights.convert import from_apt, to_apt
from apt_dense.weights.files import read_checkpoint, write_checkpoint
from apt_dense.weights.formats import FORMATS, translate
from apt_dense.weights.resize import noted_grid, resize_positions, split_prefix

from support.families import ALL, HEADS, timm_model
from support.names_of_transformers_and_clip import (
    openai_clip,
    transformers_clip,
    transformers_dinov2,
    transformers_vit,
)
from support.references import noise, randomise

Grid = tuple[int, int]
State = dict[str, Tensor]
RECTANGLE = 2, 8  # as many positions as 4 x 4
TARGETS = (2, 8), (4, 4), (8, 2), (3, 5), (1, 16), (7, 1)
ANSWERS = {"num_heads": HEADS, "norm_eps": 1e-6, "act_layer": "gelu", "rotary": None}
SMALL = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "norm_eps": 1e-6}


def cubic(size: int, count: int) -> Tensor:
    """Weights (count, size) of an antialiased cubic filter (a = -0.5) in float64, sample by sample."""
    step, rows = size / count, []
    width = max(step, 1.0)
    for sample in range(count):
        distances = [abs(source + 0.5 - (sample + 0.5) * step) / width for source in range(size)]
        row = [
            1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0
            for x in distances
        ]
        rows.append([weight / sum(row) for weight in row])
    return torch.tensor(rows, dtype=torch.float64)


def exact(cells: Tensor, grid: Grid) -> Tensor:
    """Positions (1, rows, columns, C) resampled in float64."""
    along_y, along_x = (cubic(size, count) for size, count in zip(cells.shape[1:3], grid, strict=True))
    return torch.einsum("ij,ajkc,lk->ailc", along_y, cells.double(), along_x)


def cells_of(model: APTViT) -> Tensor:
    return split_prefix(model.pos_embed.detach(), [model.num_prefix_positions], model.pos_grid)[1]


def assert_resampled(model: APTViT, cells: Tensor, grid: Grid) -> None:
    assert model.pos_grid == grid
    torch.testing.assert_close(cells_of(model).double(), exact(cells, grid), atol=1e-5, rtol=0)


def pixels(grid: Grid, patch: int = 8) -> Grid:
    return grid[0] * patch, grid[1] * patch


def small(grid: Grid, seed: int = 0, **options: Any) -> APTViT:
    return randomise(APTViT(**{**SMALL, "img_size": pixels(grid), **options}), 0.2, seed)


# ---- every family and every project's file, where the user names the grid


def named(format_: str, *signs: str) -> Callable[[State], State]:
    """Rename as a project does that is only read."""
    table = FORMATS[format_].table
    return lambda state: {translate(k, table): v for k, v in state.items()} | {s: torch.zeros(1) for s in signs}


def written(format_: str) -> Callable[[State], State]:
    return lambda state: dict(from_apt(state, format_, grid=RECTANGLE).state)


def in_open_clip(state: State) -> State:
    return {f"visual.trunk.{name}": value for name, value in state.items()}


FILES = {
    "transformers' ViT": (transformers_vit, "augreg"),
    "transformers' DINOv2": (transformers_dinov2, "dinov2"),
    "transformers' DINOv2 with registers": (transformers_dinov2, "dinov2 reg"),
    "transformers' CLIP": (transformers_clip, "openai clip"),
    "transformers' SigLIP": (transformers_clip, "siglip"),
    "OpenAI's CLIP": (openai_clip, "openai clip"),
    "open_clip": (in_open_clip, "siglip"),
    "MAE": (named("mae", "decoder_pos_embed"), "mae"),
    "DINOv2": (named("dinov2", "mask_token"), "dinov2"),
    "DINOv2 with registers": (named("dinov2"), "dinov2 reg"),
    "EVA-02": (named("eva02"), "eva02 base"),
    "the APT release": (named("apt_release"), "augreg"),
    "MMSegmentation": (written("mmseg"), "augreg"),
    "timm's Eva": (written("timm_eva"), "eva02 base"),
} | {f"timm: {family}": (dict, family) for family in ALL if timm_model(family).pos_embed is not None}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_project(name: str) -> None:
    convert, family = FILES[name]
    patch = timm_model(family).patch_embed.patch_size[0]
    theirs = timm_model(family, img_size=pixels(RECTANGLE, patch))
    cells = theirs.pos_embed.detach()[:, -16:].unflatten(1, RECTANGLE)
    state = convert(dict(APTViT.from_timm(theirs).state_dict()))
    for target in TARGETS:
        model = APTViT.from_weights(state, pixels(target, patch), RECTANGLE, **ANSWERS)
        assert_resampled(model, cells, target)
    with pytest.raises(ValueError, match="not a grid of 4 x 7 after"):
        APTViT.from_weights(state, grid=(4, 7), **ANSWERS)


@pytest.mark.parametrize("family", ["augreg", "siglip", "dinov2 reg", "positions of registers", "deit3", "eva02 base"])
@pytest.mark.parametrize("options", [{}, {"pretrain_img_size": 4}, {"patch_size": 8}], ids=str)
def test_models_of_timm_know_their_grid(family: str, options: dict[str, int]) -> None:
    """Also where ours is given other positions: 4 x 4 cells, or patches that are half as large."""
    patch = timm_model(family).patch_embed.patch_size[0]
    theirs = timm_model(family, img_size=pixels(RECTANGLE, patch))
    options = {name: value * patch if name == "pretrain_img_size" else value for name, value in options.items()}
    model = APTViT.from_timm(theirs, **options)
    size = model.position_options.pretrain_img_size or model.img_size
    cells = theirs.pos_embed.detach()[:, -16:].unflatten(1, RECTANGLE)
    assert_resampled(model, cells, (size[0] // model.patch_size, size[1] // model.patch_size))


# ---- files that hold the grid


def saved(state: Any, folder: Path, name: str) -> Path:
    if name.endswith(".safetensors"):
        write_checkpoint(state, folder / name)
    else:
        torch.save(state, folder / name)
    return folder / name


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "alone": lambda model: model.state_dict(),
    "in a detector": lambda model: {"model": nn.ModuleDict({"backbone": nn.ModuleDict({"net": model})}).state_dict()},
    "in DDP": lambda model: {"state_dict": nn.ModuleDict({"module": model}).state_dict()},
    "compiled": lambda model: nn.ModuleDict({"_orig_mod": model}).state_dict(),
    "in a run": lambda model: {"model": model.state_dict(), "optimizer": {}, "iteration": 3},
    "next to a head": lambda model: nn.ModuleDict({"backbone": model, "head": nn.Linear(2, 2)}).state_dict(),
}


@pytest.mark.parametrize(
    ("way", "suffix"),
    [*((way, ".pth") for way in WRAPPED), *((way, ".safetensors") for way in ("alone", "compiled", "next to a head"))],
)
@pytest.mark.parametrize("options", [{}, {"class_token": True, "reg_tokens": 3}], ids=str)
def test_our_own_files_tell_it(way: str, suffix: str, options: dict, tmp_path: Path) -> None:
    source = small(RECTANGLE, **options)
    path = saved(WRAPPED[way](source), tmp_path, f"file{suffix}")
    for target in TARGETS:
        for model in (small(target, 1, **options), APTViT.from_weights(path, pixels(target))):
            load_backbone(model, path, strict=False)
            assert_resampled(model, cells_of(source), target)
    assert APTViT.from_weights(path).pos_grid == RECTANGLE


@pytest.mark.parametrize("source", [(2, 8), (3, 5), (1, 9), (9, 1)])
@pytest.mark.parametrize("target", ["apt", "timm", "detectron2", "mmseg", "timm_eva"])
def test_converted_files_go_on_telling_it(source: Grid, target: str, tmp_path: Path) -> None:
    """SAM's shape does, our note does, and then so does the file that the tool has made of either."""
    model, suffix = small(source), ".safetensors" if target in ("timm", "mmseg") else ".pth"
    sam = saved(dict(from_apt(model.state_dict(), "sam").state), tmp_path, "sam.pth")
    for number, path in enumerate((sam, saved(model.state_dict(), tmp_path, "own.pth"))):
        out, resized = tmp_path / f"{number}{suffix}", tmp_path / f"{number} resized{suffix}"
        convert_checkpoint.main([str(path), str(out), "--to", target])
        convert_checkpoint.main([str(path), str(resized), "--to", target, "--img-size", "16", "64"])
        for file, cells in ((out, cells_of(model)), (resized, exact(cells_of(model), RECTANGLE))):
            found = small((4, 4), 1)
            load_backbone(found, read_checkpoint(file), strict=False)
            assert_resampled(found, cells, (4, 4))


@pytest.mark.parametrize("shape", [(1, 2, 8, 16), (1, 8, 2, 16), (1, 1, 16, 16), (1, 4, 4, 16)], ids=str)
@pytest.mark.parametrize("options", [{}, {"class_token": True, "no_embed_class": True}], ids=str)
def test_positions_in_the_shape_of_a_grid(shape: tuple, options: dict) -> None:
    positions = noise(*shape)
    for target in TARGETS:
        model = small(target, 1, **options)
        load_backbone(model, {**model.state_dict(), "pos_embed": positions})
        assert_resampled(model, positions, target)


@pytest.mark.parametrize(
    "shape",
    [(1, 16, 2, 8), (1, 16, 4, 4), (2, 8, 16), (16, 1, 16), (4, 4, 4, 16), (16, 16), (2, 16, 16), (1, 16, 8),
     (1, 0, 16)],
    ids=str,
)  # fmt: skip
def test_positions_with_other_axes_are_refused(shape: tuple, tmp_path: Path) -> None:
    """Channels first, without the first axis or with more than one of it, and of another width."""
    state = {**small((4, 4)).state_dict(), "pos_embed": noise(*shape)}
    for target in ((4, 4), RECTANGLE, (3, 5)):
        with pytest.raises(ValueError, match=r"pos_embed (of shape|is) \("):
            load_backbone(small(target), state)
    path = saved(state, tmp_path, "in.pth")
    for options in (["--img-size", "24"], ["--to", "sam"], ["--to", "detectron2"]):
        with pytest.raises(SystemExit, match=r"convert_checkpoint: .*pos_embed (of shape|is) \("):
            convert_checkpoint.main([str(path), str(tmp_path / "out.pth"), *options])
    assert not (tmp_path / "out.pth").exists()


# ---- nobody says the grid


AMBIGUOUS = [
    ((2, 8), {}, 16, "2 x 8 after 0 or 4 x 4 after 0"),
    ((8, 2), {"class_token": True}, 17, "8 x 2 after 1 or 4 x 4 after 1"),
    ((18, 32), {}, 576, "18 x 32 after 0 or 24 x 24 after 0"),
    ((5, 10), {"class_token": True, "no_embed_class": True}, 50, "5 x 10 after 0 or 7 x 7 after 1"),
    ((1, 4), {"class_token": True, "reg_tokens": 2}, 7, "1 x 4 after 3 or 2 x 2 after 3"),
    ((2, 2 + 3), {"pretrain_use_cls_token": False}, 10, "2 x 5 after 0 or 3 x 3 after 1"),
]


@pytest.mark.parametrize(("grid", "options", "length", "found"), AMBIGUOUS)
def test_a_rectangle_is_not_filled_from_what_may_be_a_square(
    grid: Grid, options: dict, length: int, found: str
) -> None:
    model = small(grid, 1, **options)
    state = {**model.state_dict(), "pos_embed": noise(1, length, 16)}
    with pytest.raises(ValueError, match=rf"its grid may be {found} prefix positions; name the checkpoint's rows"):
        load_backbone(model, state)
    load_backbone(model, state, grid=grid, strict=False)  # the model's own
    assert torch.equal(cells_of(model).flatten(1, 2), state["pos_embed"][:, -grid[0] * grid[1] :])
    sized = small(grid, 1, **options, pretrain_img_size=pixels(grid))  # as the checkpoint's, which the user has named
    load_backbone(sized, state, strict=False)
    assert torch.equal(sized.pos_embed, state["pos_embed"])


def test_a_square_of_as_many_positions_is_resampled_for_a_rectangle() -> None:
    """24 x 24 positions of an image of 384 pixels, and 18 x 32 of one of 288 x 512."""
    square = small((24, 24))
    state = dict(square.state_dict())
    model = APTViT.from_weights(state, (144, 256), num_heads=2, act_layer="gelu")
    assert_resampled(model, cells_of(square), (18, 32))
    model = small((18, 32), 1)
    load_backbone(model, state, grid=(24, 24))
    assert_resampled(model, cells_of(square), (18, 32))


def test_a_file_for_a_model_of_timm(tmp_path: Path) -> None:
    theirs = timm.create_model("test_vit", num_classes=0)
    path = saved(dict(theirs.state_dict()), tmp_path, "weights.pth")  # 10 x 10
    with pytest.raises(ValueError, match="its grid may be 5 x 20 after 1 or 10 x 10 after 1"):
        APTViT.from_timm("test_vit", path, (80, 320))
    model = APTViT.from_timm("test_vit", path, (80, 320), grid=(10, 10))
    assert_resampled(model, theirs.pos_embed.detach()[:, 1:].unflatten(1, (10, 10)), (5, 20))


@pytest.mark.parametrize("length", [198, 197 + 2, 50 + 1, 17 + 1, 18 + 1])
def test_positions_of_a_distilled_token_are_refused(length: int) -> None:
    """Named or not: a second token's position is no cell."""
    model = small((4, 4), class_token=True)
    state = {**model.state_dict(), "pos_embed": noise(1, length, 16)}
    for extra in ({}, {"dist_token": noise(1, 1, 16)}):
        with pytest.raises(ValueError, match="distilled DeiT|not a square grid after 0 or 1 prefix positions"):
            load_backbone(model, {**state, **extra})


@pytest.mark.parametrize("source", [(2, 8), (4, 4), (3, 5)])
def test_a_distilled_token_renamed_as_the_error_says(source: Grid) -> None:
    plain = small(source, class_token=True, reg_tokens=1)
    state = dict(plain.state_dict())
    with pytest.raises(ValueError, match="rename dist_token to reg_token and set reg_tokens=1"):
        to_apt({**state, "dist_token": state["reg_token"]})
    model = small((8, 2), 1, class_token=True, reg_tokens=1)
    load_backbone(model, state, grid=source)
    assert_resampled(model, cells_of(plain), (8, 2))
    assert torch.equal(model.pos_embed[:, :2], plain.pos_embed[:, :2])


# ---- relative positions and rotary tables


@pytest.mark.parametrize("image", [(2, 8), (8, 2), (3, 16), (5, 6), (1, 30), (2, 3)])
@pytest.mark.parametrize("format_", ["detectron2", "sam"])
@torch.inference_mode()
def test_relative_positions_tell_windows_from_the_image(image: Grid, format_: str) -> None:
    """Also where the image has fewer cells than a window, or as many."""
    windows = {"window_size": 4, "window_block_indexes": (0,), "use_rel_pos": True}
    source = small(image, **windows, pretrain_use_cls_token=format_ == "detectron2")
    state = dict(from_apt(source.state_dict(), format_, grid=image).state)
    found = APTViT.from_weights(state, grid=source.pos_grid)
    assert found.img_size == pixels(image)
    assert found.window_size == 4 and found.options.window_block_indexes == (0,)
    images = noise(1, 3, *pixels(image))
    torch.testing.assert_close(found(images)[0], source(images)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn.relative_position_bias_table",
        "blocks.0.attn.rel_pos_bias.relative_position_bias_table",
        "rel_pos_bias.relative_position_bias_table",
        "blocks.0.attn.rel_pos.mlp.fc1.weight",
        "shared_rel_pos.mlp.fc1.weight",
        "layers.0.blocks.0.attn.relative_position_bias_table",
        "blocks.0.attn.rel_pos_z",
        "embeds.pos_embed",
        "pos_embed_window",
        "pos_embed_spatial",
        "relative_position_bias",
    ],
)
def test_positions_of_other_kinds_are_refused(name: str) -> None:
    """BEiT's, Swin's, NaFlex's, Hiera's and video models' tables, of whatever grid: their values would be left out."""
    state = {**small((4, 4)).state_dict(), name: noise(3 * 15, 2)}
    refusals = (
        lambda: load_backbone(small((4, 4)), state),
        lambda: APTViT.from_weights(state, **ANSWERS | {"num_heads": 2}),
        lambda: small((4, 4)).load_state_dict(state),
    )
    for attempt in refusals:
        with pytest.raises((ValueError, RuntimeError), match=re.escape(name)):
            attempt()


def eva02s_table(rows: int, columns: int) -> Tensor:
    """Cosines as EVA-02's VisionRotaryEmbedding keeps them: (rows * columns, 8), the first half by rows."""
    angles = torch.tensor([1.0, 0.1])
    by_row, by_column = (torch.arange(n)[:, None] * angles for n in (rows, columns))
    table = torch.cat([by_row[:, None].expand(-1, columns, -1), by_column[None].expand(rows, -1, -1)], -1)
    return table.repeat_interleave(2, -1).flatten(0, 1).cos()


@pytest.mark.parametrize("image", [(2, 8), (8, 2), (4, 4), (16, 16), (2, 3), (30, 50)])
def test_rotary_tables_tell_rows_and_columns(image: Grid) -> None:
    options = {"mlp_layer": "swiglu", "scale_mlp_norm": True, "qkv_fused": False, "k_bias": False,
               "rotary": Rotary(ref_feat_shape=(16, 16)), "pretrain_use_cls_token": True}  # fmt: skip
    source = small((4, 4), **options)
    state = dict(from_apt(source.state_dict(), "eva02_det").state)
    for block, table in enumerate((eva02s_table(3, 3), eva02s_table(*image))):
        state[f"blocks.{block}.attn.rope.freqs_cos"] = table
    state |= {"rope_win.freqs_cos": eva02s_table(3, 3), "rope_glb.freqs_cos": eva02s_table(*image)}
    told = told_by(state).arguments
    assert told["img_size"] == pixels(image) and told["window_size"] == 3
    assert told["window_block_indexes"] == (0,) and told["pretrain_img_size"] in (None, pixels((4, 4)))
    state["blocks.1.attn.rope.freqs_cos"] = torch.zeros(15, 8)
    with pytest.raises(ValueError, match="a rotary table of 15 rows is not that of a grid"):
        told_by(state)


# ---- metadata


@pytest.mark.parametrize(
    "junk", ["ab", [2, 8], (2,), (2, 8, 1), (0, 16), (2.0, 8), (True, 16), None, 16, (8, 8), (-2, -8)]
)
def test_a_note_that_is_no_grid_of_these_positions_is_ignored(junk: Any) -> None:
    """By the loader of torch as by ours."""
    source = small((4, 4))
    for target in ((4, 4), (3, 5)):
        for load in (load_backbone, nn.Module.load_state_dict):
            state, model = source.state_dict(), small(target, 1)
            state._metadata[""]["pos_grid"] = junk
            load(model, state)
            assert_resampled(model, cells_of(source), target)


def test_two_notes_that_differ_are_none() -> None:
    pair = nn.ModuleList([small((2, 8)), small((8, 2))]).state_dict()
    assert noted_grid(pair) is None and noted_grid(pair, "0.") == (2, 8) and noted_grid(pair, "1.") == (8, 2)
    model = nn.ModuleList([small((4, 4), 1), small((4, 4), 1)])
    model.load_state_dict(pair)
    for one, number in zip(model, "01", strict=True):
        cells = pair[f"{number}.pos_embed"].unflatten(1, noted_grid(pair, f"{number}."))
        assert_resampled(one, cells, (4, 4))


@pytest.mark.parametrize("size", [(9, 9), (1, 9), (9, 1), (2, 8), (3, 1)])
@pytest.mark.parametrize("target", [(1, 1), (1, 7), (7, 1), (2, 8), (8, 2), (14, 3)])
def test_narrow_grids_are_resampled_exactly(size: Grid, target: Grid) -> None:
    positions = noise(1, 1 + size[0] * size[1], 3)
    resized = resize_positions(positions, target, 1, size, [1])
    expected = exact(positions[:, 1:].unflatten(1, size), target).flatten(1, 2)
    torch.testing.assert_close(resized[:, 1:].double(), expected, atol=2e-6, rtol=0)
