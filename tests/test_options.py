"""Options: every bad value is refused by the name of its option, every good one is brought to its canonical form."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_dense import APTViT, PatchSelector
from apt_dense.nn.layers import ACTIVATIONS, MLPS, NORMS
from apt_dense.option_checks import Options, defaults_of, names_of, split
from apt_dense.options import (
    ACT_LAYERS,
    MLP_LAYERS,
    NORM_LAYERS,
    BlockOptions,
    ModelOptions,
    PatchOptions,
    PixelFormat,
    PositionOptions,
    Rotary,
    check_together,
)

GROUPS = ModelOptions, BlockOptions, PositionOptions, PatchOptions
SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}

WHOLE_FROM_1 = [0, -1, 1.5, 64.0, True, "4", None, math.nan, [4]]
WHOLE_FROM_0 = [-1, 0.5, 2.0, False, "1", None, math.inf]
FLAGS = [0, 1, 2, "no", "False", None, 0.0, (True,)]
ABOVE_0 = [0, -1, math.nan, math.inf, "4", None, True]
NAMES = ["", "MLP", 3, None, True]
SIZES = [0, -4, 64.0, (64, 0), (64,), (1, 2, 3), "64", True, (64, 32.5), {}]
BLOCKS = [(0.5,), (-1,), (2,), 1, "01", (True,), None]
NO_FUNCTIONS = [3, True, "faces", (0, 1)]
#: Values that each option refuses.
BAD: dict[str, list[Any]] = {
    "img_size": [*SIZES, None],
    "pretrain_img_size": SIZES,
    **dict.fromkeys(["patch_size", "in_chans", "embed_dim", "depth", "num_heads"], WHOLE_FROM_1),
    **dict.fromkeys(["window_size", "reg_tokens"], WHOLE_FROM_0),
    **{item.name: FLAGS for group in GROUPS for item in fields(group) if isinstance(item.default, bool)},
    **dict.fromkeys(["mlp_ratio", "norm_eps"], ABOVE_0),
    **dict.fromkeys(["window_block_indexes", "residual_block_indexes"], BLOCKS),
    "proportional_attention": [-0.5, math.nan, math.inf, "0.5", None, True],
    "drop_path_rate": [-0.1, 1, 1.5, math.nan, "0.1", None, True],
    "out_indices": [(0, 2), (1, 0), (), -3, 0.5, "0", (1, 1), (True,)],
    "init_values": [math.nan, math.inf, "1e-5", True],
    "mlp_layer": NAMES,
    "norm_layer": NAMES,
    "act_layer": ["relu", "GELU", 3, True],
    "attention_backend": [3, None, True, "fast"],
    "thresholds": [5.5, "5.5", None, (3.0, 4.0), (math.nan,), ("4",), {4.0}],
    "token_budget": [0, 0.0, -1, 1.5, "0.5", True, math.nan],
    "min_tokens": [0, 0.0, -1, 1.5, "0.5", True, math.nan],
    **dict.fromkeys(["keep_fine", "keep_coarse"], NO_FUNCTIONS),
    "scorer": ["variance", 3, None],
    "partial_patches": ["floor", None, True],
    "pixel_mean": [(120.0,), (1, 2, math.nan), "abc", 120, None, (120.0,) * 4],
    "pixel_std": [(0.0, 1, 1), (-1, 1, 1), (58.0,), None, ("a", "b", "c")],
    "channel_order": ["rgb", "RGBA", None, 3],
    "rotary": ["cat", 3, {"rope_type": "mixed"}, {"temperature": 0}, {"reference": 1}, {"grid_indexing": "yx"}, [1]],
}


def test_every_option_is_covered() -> None:
    assert set(names_of(*GROUPS)) == set(BAD)


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused_by_name(name: str) -> None:
    """Together with thresholds and windows, so that every option has a meaning."""
    for value in BAD[name]:
        windows = {"window_size": 4, "window_block_indexes": (0,)} if "window_block" in name else {}
        with pytest.raises((TypeError, ValueError)) as error:
            APTViT(**{**SMALL, "thresholds": (4.0,), **windows, name: value})
        message = str(error.value)
        word = "backend" if name == "attention_backend" and value == "fast" else name
        assert word in message, (name, value, message)
        shown = value if isinstance(value, (str, int, float)) else ""
        assert str(shown) in message or repr(value) in message, (name, value, message)


@given(st.data())
def test_values_of_another_kind_never_pass(data: st.DataObject) -> None:
    """Whatever is given, the constructor either builds a model or names the option."""
    name = data.draw(st.sampled_from(sorted(BAD)))
    anything = st.one_of(
        st.none(), st.booleans(), st.integers(-3, 3), st.floats(allow_nan=True), st.text(max_size=3),
        st.lists(st.integers(-3, 3), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=1),
    )  # fmt: skip
    value = data.draw(anything)
    message = refusal(**{name: value})
    related = {"embed_dim": "num_heads", "num_heads": "embed_dim", "token_budget": "budget", "in_chans": "images"}
    spelled = [name, related.get(name, name), "rotary", "backend", "img_size", "window_size", "class_token"]
    assert message is None or any(word in message for word in spelled), (name, value, message)


def refusal(**options: object) -> str | None:
    """The message with which a model of these options is refused; None if it is built."""
    try:
        APTViT(**{**SMALL, "thresholds": (4.0,), **options})
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def test_numbers_of_numpy_are_numbers() -> None:
    model = APTViT(
        img_size=np.int64(32), patch_size=np.int32(4), embed_dim=np.int64(16), depth=np.uint8(2), num_heads=np.int16(2),
        mlp_ratio=np.float32(2.0), thresholds=np.array([4.0, 3.0]).tolist(), out_indices=[np.int64(1)],
    )  # fmt: skip
    assert model.img_size == (32, 32) and type(model.img_size[0]) is int and type(model.patch_size) is int
    assert model.out_indices == (1,)


@pytest.mark.parametrize("name", ["treshold", "windows", "num_head", "pos_embed"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"no option {name!r}"):
        APTViT(**{**SMALL, name: 3})


def test_close_names_are_suggested() -> None:
    with pytest.raises(TypeError, match="did you mean 'thresholds'?"):
        APTViT(**SMALL, tresholds=(4.0,))


def test_the_signature_lists_every_option_with_its_default() -> None:
    shown = {name: p.default for name, p in inspect.signature(APTViT).parameters.items()}
    assert shown == defaults_of(*GROUPS)
    assert list(shown)[:8] == [
        "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias",
    ]  # fmt: skip


def test_defaults_are_good_values() -> None:
    for group in (*GROUPS, Rotary, PixelFormat, PatchSelector):
        options = group()
        assert options == group(**options.given()) == copy.deepcopy(options) == pickle.loads(pickle.dumps(options))


@pytest.mark.parametrize("group", [*GROUPS, Rotary, PixelFormat, PatchSelector])
def test_options_cannot_be_changed(group: type[Options]) -> None:
    options = group()
    with pytest.raises(AttributeError):
        setattr(options, fields(group)[0].name, 3)


def test_names_have_layers() -> None:
    assert (tuple(MLPS), tuple(ACTIVATIONS), tuple(NORMS)) == (MLP_LAYERS, ACT_LAYERS, NORM_LAYERS)


def test_windows_without_blocks_are_none() -> None:
    assert APTViT(**SMALL, window_size=5).window_size == 0
    assert APTViT(**SMALL, window_block_indexes=(0,)).window_size == 0


# ---- rotary positions with other options


def check(rotary: Rotary | dict | None, head_dim: int = 16, windowed: bool = False, **options: bool) -> Rotary | None:
    windows = {"window_size": 4, "window_block_indexes": (0,)} if windowed else {}
    given = {"embed_dim": 2 * head_dim, "num_heads": 2, "k_bias": False, "rotary": rotary, **windows, **options}
    model, blocks, positions, _ = split(given, *GROUPS)
    check_together(model, blocks, positions)
    return positions.rotary


def test_configs_give_a_dictionary() -> None:
    assert check({"rope_type": "dinov3", "temperature": 100}) == Rotary("dinov3", 100)
    assert check({"ref_feat_shape": [16, 12]}) == Rotary(ref_feat_shape=(16, 12))
    assert check({"ref_feat_shape": 16}) == Rotary(ref_feat_shape=(16, 16))
    assert check(None, 3, True, k_bias=True) is None


@pytest.mark.parametrize("options", [{}, {"k_bias": True, "qkv_bias": False}], ids=str)
def test_windows_may_have_rotary_positions_where_padding_has_no_key(options: dict) -> None:
    assert check({}, windowed=True, **options) == Rotary()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"rope_type": "mixed"}, {}, "rope_type='mixed' must be one of"),
        ({"grid_indexing": "yx"}, {}, "grid_indexing='yx' must be one of"),
        ({"rope_type": "dinov3", "ref_feat_shape": (4, 4)}, {}, r"ref_feat_shape=\(4, 4\) has no meaning"),
        ({}, {"head_dim": 10}, "in fours; embed_dim / num_heads is 10"),
        ({}, {"use_rel_pos": True}, "with use_rel_pos=True are not defined"),
        ({}, {"windowed": True, "k_bias": True}, "need keys without a bias and qk_norm=False"),
        ({}, {"windowed": True, "qk_norm": True}, "need keys without a bias and qk_norm=False"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments: dict, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(arguments, **options)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="reference"):
        check({"reference": (16, 16)})
