"""Conversions between the forms of all projects: names against lists written out by hand, there and back to the bit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from torch import Tensor

from apt_dense import APTViT
from apt_dense.weights.convert import from_apt, problems, split_backbone, to_apt
from apt_dense.weights.find_backbone_weights import unwrap
from apt_dense.weights.formats import FORMATS, NOT_BACKBONE, detect_format, translate, translate_back
from apt_dense.weights.load import load_backbone

from support.families import ALL, timm_model
from support.references import noise, randomise

WIDTH = 24
State = dict[str, Tensor]
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
EVA02 = {
    "qkv_fused": False, "k_bias": False, "mlp_layer": "swiglu", "mlp_ratio": 2.5, "scale_mlp_norm": True, "rotary": {},
}  # fmt: skip


def ours(seed: int = 0, **options: Any) -> APTViT:
    return randomise(APTViT(**{**SMALL, **options}), 0.2, seed)


def weights(**options: Any) -> State:
    return ours(**options).state_dict()


def renamed(state: State, *rules: tuple[str, str]) -> State:
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, name): value for name, value in state.items()}
    return state


def same(first: State, second: State) -> bool:
    """The same names, shapes and bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- other projects' state dicts, name by name


def linear(name: str, rows: int, columns: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def norm(name: str, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def embedding(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (WIDTH, 3, 8, 8), f"{name}.bias": (WIDTH,)}


def filled(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    return {name: 0.2 * noise(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}


def plain_blocks(first: str = "mlp.fc1", second: str = "mlp.fc2") -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for block in ("blocks.0.", "blocks.1."):
        shapes |= norm(f"{block}norm1") | linear(f"{block}attn.qkv", 3 * WIDTH, WIDTH)
        shapes |= linear(f"{block}attn.proj", WIDTH, WIDTH) | norm(f"{block}norm2")
        shapes |= linear(block + first, 4 * WIDTH, WIDTH) | linear(block + second, WIDTH, 4 * WIDTH)
    return shapes


def detectron2_state() -> State:
    shapes = {"pos_embed": (1, 17, WIDTH), **embedding("patch_embed.proj"), **plain_blocks()}
    for block, side in (("blocks.0.", 3), ("blocks.1.", 7)):
        shapes |= {f"{block}attn.rel_pos_h": (side, WIDTH // 2), f"{block}attn.rel_pos_w": (side, WIDTH // 2)}
    for i, size in enumerate([(12, WIDTH, 1, 1), (12, 12, 3, 3), (WIDTH, 12, 1, 1)], 1):
        shapes |= {f"blocks.1.residual.conv{i}.weight": size, **norm(f"blocks.1.residual.norm{i}", size[0])}
    return filled(shapes)


def sam_state() -> State:
    shapes = {"pos_embed": (1, 4, 4, WIDTH), **embedding("patch_embed.proj"), **plain_blocks("mlp.lin1", "mlp.lin2")}
    shapes |= {f"blocks.{i}.attn.rel_pos_{axis}": (7, WIDTH // 2) for i in (0, 1) for axis in "hw"}
    return filled(shapes)


def mmseg_state(final_norm: bool = True) -> State:
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 17, WIDTH), **embedding("patch_embed.projection")}
    for layer in ("layers.0.", "layers.1."):
        shapes |= norm(f"{layer}ln1") | norm(f"{layer}ln2") | linear(f"{layer}attn.attn.out_proj", WIDTH, WIDTH)
        shapes[f"{layer}attn.attn.in_proj_weight"] = 3 * WIDTH, WIDTH
        shapes[f"{layer}attn.attn.in_proj_bias"] = (3 * WIDTH,)
        shapes |= linear(f"{layer}ffn.layers.0.0", 4 * WIDTH, WIDTH) | linear(f"{layer}ffn.layers.1", WIDTH, 4 * WIDTH)
    return filled(shapes | norm("ln_pre") | (norm("ln1") if final_norm else {}))


def eva02_det_state() -> State:
    """The weights of a ViT of EVA-02's detectors."""
    shapes, hidden = {"pos_embed": (1, 17, WIDTH), **embedding("patch_embed.proj")}, int(2.5 * WIDTH)
    for block in ("blocks.0.", "blocks.1."):
        shapes |= {f"{block}attn.{kind}_proj.weight": (WIDTH, WIDTH) for kind in "qkv"}
        shapes |= {f"{block}attn.{kind}_bias": (WIDTH,) for kind in "qv"} | linear(f"{block}attn.proj", WIDTH, WIDTH)
        shapes |= norm(f"{block}norm1") | norm(f"{block}norm2") | norm(f"{block}mlp.ffn_ln", hidden)
        shapes |= linear(f"{block}mlp.w1", hidden, WIDTH) | linear(f"{block}mlp.w2", hidden, WIDTH)
        shapes |= linear(f"{block}mlp.w3", WIDTH, hidden)
    return filled(shapes)


def tables() -> State:
    """The rotary tables in the files of EVA-02's detectors, also once per block."""
    places = ("rope_win.", "rope_glb.", "blocks.0.attn.rope.", "blocks.1.attn.rope.")
    return {f"{place}freqs_{kind}": torch.ones(16, 12) for place in places for kind in ("cos", "sin")}


def timm_state(name: str, **options: Any) -> State:
    small = {"embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 0, **options}
    return randomise(timm.create_model(name, **small), 0.2).state_dict()


def timm_vit() -> State:
    return timm_state("vit_small_patch16_224", img_size=64, init_values=1.0, qk_norm=True)


def timm_eva02() -> State:
    return timm_state("eva02_base_patch16_clip_224", img_size=64)


def timm_dinov3() -> State:
    return timm_state("vit_small_patch16_dinov3_qkvb", img_size=64)


FOREIGN = {
    "detectron2": detectron2_state,
    "sam": sam_state,
    "mmseg": mmseg_state,
    "eva02_det": eva02_det_state,
    "timm": timm_vit,
    "timm_eva": timm_dinov3,
}
OPTIONS = {
    "detectron2": {"use_rel_pos": True, "residual_block_indexes": (1,), "pretrain_use_cls_token": True,
                   "window_size": 2, "window_block_indexes": (0,)},
    "sam": {"use_rel_pos": True},
    "mmseg": {"class_token": True, "final_norm": True, "pre_norm": True},
    "eva02_det": {**EVA02, "pretrain_use_cls_token": True},
    "timm": {"patch_size": 16, "img_size": 64, "class_token": True, "final_norm": True, "init_values": 1.0,
             "qk_norm": True},
    "timm_eva": {"patch_size": 16, "img_size": 64, "class_token": True, "reg_tokens": 4, "final_norm": True,
                 "init_values": 1.0, "k_bias": False, "use_abs_pos": False, "rotary": {}},
}  # fmt: skip


# ---- there and back


@pytest.mark.parametrize("source", [None, "own"])
@pytest.mark.parametrize("name", FOREIGN)
def test_there_and_back_is_exact(name: str, source: str | None) -> None:
    state = FOREIGN[name]()
    converted = to_apt(state, source and name)
    assert problems(converted) == ([], [])
    back = from_apt(converted, name)
    assert same(back.state, state) and back.left_out == back.added == []


@pytest.mark.parametrize("name", FOREIGN)
def test_converted_weights_are_those_of_a_model(name: str) -> None:
    """And a model's weights come back through the other form."""
    model, state = ours(1, **OPTIONS[name]), FOREIGN[name]()
    assert same(from_apt(model.state_dict(), name).state, state) is False
    report = load_backbone(model, state)
    assert report.missing == report.unexpected == report.unused == report.new == []
    assert same(from_apt(model.state_dict(), name).state, state)
    back = to_apt(from_apt(model.state_dict(), name).state, name)
    assert same(from_apt(back, "apt").state, model.state_dict())  # which has SAM's grid of positions as a list
    assert name == "sam" or same(back, model.state_dict())


@pytest.mark.parametrize("name", [*FOREIGN, "timm_eva02"])
def test_formats_are_told_apart(name: str) -> None:
    state = timm_eva02() if name == "timm_eva02" else FOREIGN[name]()
    state |= tables() if name == "eva02_det" else {}
    assert detect_format(state) == name.replace("timm_eva02", "timm_eva")


def test_own_and_read_only_formats_are_told_apart() -> None:
    assert detect_format(weights(thresholds=(4.0,))) == "apt" and detect_format(weights()) == "timm"
    plain = weights(class_token=True)
    signs = {
        "mae": "decoder_embed.weight", "dinov2": "register_tokens", "dinov3": "storage_tokens",
        "eva02": "blocks.0.mlp.w1.weight", "apt_release": "mixed_patch.zero_conv.bias",
        "transformers": "encoder.layer.0.norm1.weight", "openai_clip": "transformer.resblocks.0.ln_1.weight",
    }  # fmt: skip
    for name, sign in signs.items():
        assert detect_format({**plain, sign: torch.zeros(1)}) == name


def test_no_table_renames_a_name_of_its_own_twice() -> None:
    for format_ in FORMATS.values():
        for mine, theirs in format_.table:
            name, other = (part.replace("#", "13") + "x" for part in (mine, theirs))
            assert translate_back(other, format_.table) == name
            if format_ not in (FORMATS["apt_release"], FORMATS["transformers"]):  # which have two names of some
                assert translate(name, format_.table) == other


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown format 'swin'; expected one of apt_release, apt, mmseg"):
        to_apt(weights(), "swin")
    with pytest.raises(ValueError, match="cannot write the format 'mae'; expected one of apt, mmseg, sam"):
        from_apt(weights(), "mae")


@pytest.mark.parametrize("family", ALL)
def test_all_families_of_timm_there_and_back(family: str) -> None:
    """But for pooling heads. From the model alone, "timm" tells the class of most."""
    model = timm_model(family)
    ours = APTViT.from_timm(model).state_dict()
    own_class = "timm_eva" if isinstance(model, Eva) else "timm"
    expected = {name: p for name, p in model.named_parameters() if not NOT_BACKBONE.match(name)}
    assert same(from_apt(ours, own_class).state, expected)
    told = same(from_apt(ours, "timm").state, expected)
    assert told == (family not in ("pe lang", "pe lang giant", "rope and positions"))


# ---- what has no place


def test_trained_coarse_patches_are_not_dropped_unasked() -> None:
    state = weights(thresholds=(4.0,), class_token=True)
    neutral = {**state, **{f"coarse_embed.zero.{kind}": torch.zeros_like(state[f"coarse_embed.zero.{kind}"])
                           for kind in ("weight", "bias")}}  # fmt: skip
    coarse = [name for name in state if name.startswith("coarse_embed.")]
    for target in ("timm", "mmseg", "detectron2", "sam"):
        with pytest.raises(ValueError, match="coarse_embed.zero.weight, which was trained .*--drop-coarse"):
            from_apt(state, target)
        for conversion in (from_apt(state, target, drop_coarse=True), from_apt(neutral, target)):
            assert set(coarse) <= set(conversion.left_out) and not set(coarse) & conversion.state.keys()
    assert same(from_apt(state, "apt").state, state)


@pytest.mark.parametrize(
    ("target", "options", "name"),
    [
        ("mmseg", {"init_values": 1.0}, "blocks.0.ls1.gamma"),
        ("mmseg", {"use_rel_pos": True}, "blocks.0.attn.rel_pos_h"),
        ("detectron2", {"class_token": True, "reg_tokens": 2}, "reg_token"),
        ("detectron2", {"pre_norm": True}, "norm_pre.weight"),
        ("sam", {"residual_block_indexes": (1,)}, "blocks.1.residual.conv1.weight"),
        ("eva02_det", {}, "blocks.0.attn.qkv.weight"),
        ("timm", {"use_rel_pos": True}, "blocks.0.attn.rel_pos_h"),
    ],
)
def test_weights_without_a_place_are_named(target: str, options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"has no place for \\d+ weights: .*{name}"):
        from_apt(weights(**options), target)


def test_detectors_do_without_class_token_and_final_norm() -> None:
    state = weights(class_token=True, final_norm=True)
    conversion = from_apt(state, "detectron2")
    assert sorted(conversion.left_out) == ["cls_token", "norm.bias", "norm.weight"] and not conversion.added
    assert torch.equal(conversion.state["pos_embed"], state["pos_embed"])
    grid = from_apt(state, "sam").state["pos_embed"]
    assert torch.equal(grid, state["pos_embed"][:, 1:].unflatten(1, (4, 4)))


@pytest.mark.parametrize("img_size", [32, (16, 48)])
def test_positions_get_a_place_for_a_class_token(img_size: Any) -> None:
    """Zero, for it is not read; a model without class token loads what it was."""
    state = weights(img_size=img_size)
    for target, extra in (("detectron2", []), ("mmseg", ["cls_token"])):
        conversion = from_apt(state, target)
        assert conversion.added == [*extra, "pos_embed[:, 0]"]
        assert not conversion.state["pos_embed"][:, 0].any()
        assert torch.equal(conversion.state["pos_embed"][:, 1:], state["pos_embed"])
    model = ours(1)
    load_backbone(model, from_apt(weights(), "mmseg").state)
    assert same(model.state_dict(), weights())


def test_grids_of_sam() -> None:
    state = weights(img_size=(16, 40))  # 10 positions, not 1 + 3 x 3
    assert from_apt(state, "sam", grid=(2, 5)).state["pos_embed"].shape == (1, 2, 5, WIDTH)
    assert from_apt(state, "detectron2", grid=(2, 5)).added == ["pos_embed[:, 0]"]
    for target in ("sam", "detectron2", "mmseg"):
        with pytest.raises(
            ValueError, match=r"\(1, 12, 24\) does not fit: it is not a square grid .* \(grid=, --grid\)"
        ):
            from_apt(dict(weights(img_size=(16, 48))), target)
        with pytest.raises(ValueError, match=r"\(1, 12, 24\) does not fit: it is not a grid of 3 x 3 after 0 or 1 "):
            from_apt(weights(img_size=(16, 48)), target, grid=(3, 3))


def test_timm_has_two_classes() -> None:
    """LayerScale's factors have other names in Eva."""
    scaled = {"init_values": 1.0}
    plain, eva = weights(**scaled), weights(**scaled, **EVA02)
    assert "blocks.0.ls1.gamma" in from_apt(plain, "timm").state and "blocks.0.gamma_1" in from_apt(eva, "timm").state
    assert "blocks.0.gamma_1" in from_apt(plain, "timm_eva").state


# ---- formats that are only read


def test_mae() -> None:
    model = weights(class_token=True, final_norm=True)
    more = {name: torch.ones(2) for name in ("mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight")}
    state, others = split_backbone(to_apt(model | more, "mae"))
    assert same(state, model) and others == list(more)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2(registers: int) -> None:
    model = weights(class_token=True, reg_tokens=registers, init_values=1.0, mlp_layer="swiglu_packed", final_norm=True)
    theirs = renamed(model, ("^reg_token$", "register_tokens"), (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3"))
    assert same(split_backbone(to_apt(theirs | {"mask_token": torch.ones(1)}, "dinov2"))[0], model)


@pytest.mark.parametrize("masked", [True, False])
def test_dinov3(masked: bool) -> None:
    """A bias for queries, keys and values, of which that of the keys may be masked out."""
    model = weights(class_token=True, reg_tokens=4, init_values=1.0, k_bias=not masked, use_abs_pos=False, rotary={})
    theirs = renamed(model, ("^reg_token$", "storage_tokens")) | {"rope_embed.periods": torch.ones(4)}
    for i in (0, 1) if masked else ():
        q, v = (theirs.pop(f"blocks.{i}.attn.{kind}_bias") for kind in "qv")
        theirs[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.ones(WIDTH), v])
        theirs[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(3 * WIDTH)
    assert same(split_backbone(to_apt(theirs, "dinov3"))[0], model)


def test_eva02_classification() -> None:
    model = weights(class_token=True, final_norm=True, **EVA02)
    theirs = renamed(
        model, (r"([qv])_proj\.bias", r"\1_bias"), (r"mlp\.norm", "mlp.ffn_ln"), (r"fc1_g", "w1"), (r"fc1_x", "w2"),
        (r"mlp\.fc2", "mlp.w3"),
    )  # fmt: skip
    state, others = split_backbone(to_apt(theirs | tables() | {"head.weight": torch.ones(3)}, "eva02"))
    assert same(state, model) and len(others) == len(tables()) + 1


# ---- the APT release


def release_state(scale_zero: float = 1.0) -> State:
    """Return what the release's Lightning module saves: some weights under two names, others under its own."""
    shapes = {"pos_embed": (1, 17, WIDTH), **embedding("patch_embed.proj"), **plain_blocks(), **norm("norm")}
    net = filled(shapes)
    net |= {"head.weight": noise(10, WIDTH), "head.bias": noise(10)}
    net |= {f"mixed_patch.patch_embed.proj.{kind}": net[f"patch_embed.proj.{kind}"] for kind in ("weight", "bias")}
    net["mixed_patch.base_pos_embed"] = net["pos_embed"]
    net |= filled({
        "mixed_patch.cls_token": (1, 1, WIDTH),
        "mixed_patch.base_mini_pos_embed": (1, 4, WIDTH),
        "mixed_patch.patch_attn.weight": (WIDTH, WIDTH, 2, 2),
        "mixed_patch.patch_attn.bias": (WIDTH,),
        **linear("mixed_patch.zero_conv", WIDTH, WIDTH),
    }, seed=100)  # fmt: skip
    return {f"net.{name}": value for name, value in net.items()}


def released_token(net: State, patch: Tensor, position: Tensor) -> Tensor:
    """Compute the token of a square patch (3, S, S) from the release's weights.

    Embed the patch shrunk to 8 pixels; add its parts of 8 pixels, each embedded and then joined four by four until one
    is left; and add the position.
    """
    kernel, bias = net["net.patch_embed.proj.weight"], net["net.patch_embed.proj.bias"]
    side = patch.shape[-1] // 8
    # Bilinear samples lie in the middle of the pixels that they stand for, between two rows and two columns.
    middle = side // 2 - 1
    shrunk = sum(patch[:, middle + i :: side, middle + j :: side] for i in (0, 1) for j in (0, 1)) / 4
    token = torch.einsum("ocij,cij->o", kernel, shrunk) + bias + position
    parts = {
        (y, x): torch.einsum("ocij,cij->o", kernel, patch[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]) + bias
        for y in range(side) for x in range(side)
    }  # fmt: skip
    join, join_bias = net["net.mixed_patch.patch_attn.weight"], net["net.mixed_patch.patch_attn.bias"]
    while side > 1:
        side //= 2
        parts = {
            (y, x): join_bias + sum(join[:, :, i, j] @ parts[2 * y + i, 2 * x + j] for i in (0, 1) for j in (0, 1))
            for y in range(side) for x in range(side)
        }  # fmt: skip
    return token + net["net.mixed_patch.zero_conv.weight"] @ parts[0, 0] + net["net.mixed_patch.zero_conv.bias"]


@pytest.mark.parametrize("scale", [1, 2])
@torch.no_grad()
def test_coarse_tokens_are_the_releases(scale: int) -> None:
    net = release_state()
    model = APTViT(**SMALL, class_token=True, final_norm=True, thresholds=(100.0,) * scale)
    report = load_backbone(model, {"state_dict": net, "epoch": 3})
    assert report.missing == report.unexpected == report.new == []
    assert report.unused == ["head.weight", "head.bias", "mixed_patch.base_mini_pos_embed"]
    image, size = noise(1, 3, 32, 32) * 0.3, 8 << scale
    rows = model._embed(image, model.layout(image, model.partition(image)))
    cells = 32 // size
    grid = resample_abs_pos_embed(net["net.pos_embed"], [cells, cells], num_prefix_tokens=1)[0]
    expected = [net["net.mixed_patch.cls_token"][0, 0] + grid[0]] + [
        released_token(net, image[0, :, y * size : (y + 1) * size, x * size : (x + 1) * size], grid[1 + y * cells + x])
        for y in range(cells) for x in range(cells)
    ]  # fmt: skip
    assert len(rows) == 1 + cells**2
    torch.testing.assert_close(rows, torch.stack(expected), atol=1e-4, rtol=1e-5)


def test_two_values_of_one_weight_are_refused() -> None:
    state = unwrap(release_state())
    state["mixed_patch.base_pos_embed"] = state["pos_embed"] + 1
    with pytest.raises(ValueError, match="two different values of pos_embed, one of them as mixed_patch.base_pos"):
        to_apt(state)


def test_a_compiled_release_model() -> None:
    """torch.compile puts a prefix between."""
    state = {name.replace("net.", "net._orig_mod.", 1): value for name, value in release_state().items()}
    assert unwrap({"state_dict": state}).keys() == unwrap(release_state()).keys()


# ---- what is no backbone


def test_missing_and_unexpected_names() -> None:
    state = weights(residual_block_indexes=(1,), thresholds=(4.0,))
    assert problems(state) == ([], [])
    del state["blocks.1.mlp.fc2.bias"]
    assert problems(state | {"dist_token": torch.ones(1)}) == (["blocks.1.mlp.fc2.bias"], ["dist_token"])
    without_block = {name: value for name, value in state.items() if not name.startswith("blocks.0.")}
    missing = problems(without_block)[0]
    assert "blocks.0.attn.qkv.weight" in missing and "blocks.0.attn.proj.weight" in missing
    assert "patch_embed.proj.weight" in problems({})[0]


def test_a_convolutional_network_is_no_backbone() -> None:
    missing, unexpected = problems(to_apt(timm.create_model("resnet18").state_dict()))
    assert "patch_embed.proj.weight" in missing and len(unexpected) > 100


@pytest.mark.parametrize("index", ["3", "999999", "1000000", "1000000000000", "9" * 5000])
def test_blocks_of_any_number_are_told_from_those_that_are_there(index: str) -> None:
    """A block of number 10^12 is not a reason to list 10^12 missing ones."""
    state = APTViT(**SMALL).state_dict()
    name = f"blocks.{index}.norm1.weight"
    missing, unexpected = problems(state | {name: torch.ones(1)})
    assert (missing or unexpected) and len(missing) < 30
    with pytest.raises(ValueError, match="does not fit the backbone: .* 1 unexpected"):
        load_backbone(APTViT(**SMALL), state | {name: torch.ones(1)})


def test_many_unknown_names_take_no_time() -> None:
    """Comparing each with each would take hours."""
    state = {f"blocks.0.attn.qkv.weight{i}": torch.ones(1) for i in range(10**5)}
    assert len(problems(state)[1]) == 10**5
    with pytest.raises(ValueError, match="100000 unexpected"):
        load_backbone(APTViT(**SMALL), state)
