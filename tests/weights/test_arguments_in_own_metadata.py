"""What a backbone notes next to its weights: plain, read by the safe reader, and never more than hints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from apt_dense import APTViT
from apt_dense.options import Rotary
from apt_dense.weights.arguments_in_own_metadata import NOT_NOTED, REMOVED, noted_options, options_of
from apt_dense.weights.files import CheckpointError, read_checkpoint, write_checkpoint

SMALL = {"img_size": 36, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def small(**options: Any) -> APTViT:
    return APTViT(**{**SMALL, **options})


def with_options(model: nn.Module, **changed: Any) -> dict[str, Tensor]:
    """The state dict of a model with other values noted."""
    state = model.state_dict()
    for entry in state._metadata.values():
        if "options" in entry:
            entry["options"] = {**entry["options"], **changed}
    return state


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_options_survive_files_that_we_write(name: str, tmp_path: Path) -> None:
    model = small(thresholds=(5.0, 3.0), token_budget=0.8, rotary=Rotary(ref_feat_shape=(2, 3)), img_size=(32, 64))
    write_checkpoint(model.state_dict(), tmp_path / name)
    back = APTViT.from_weights(tmp_path / name)
    assert {key: options_of(back)[key] for key in options_of(model)} == options_of(model)
    assert back.pos_grid == model.pos_grid


def test_damaged_notes_in_safetensors_are_an_error(tmp_path: Path) -> None:
    for notes in ("{", "[" * 100_000):
        save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", {"apt_dense": notes})
        with pytest.raises(CheckpointError, match="damaged"):
            read_checkpoint(tmp_path / "x.safetensors")


def test_options_survive_the_file(tmp_path: Path) -> None:
    model = small(thresholds=(4.0,), rotary=Rotary(temperature=7.0), qkv_bias=False, token_budget=0.8)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    noted = noted_options(read_checkpoint(tmp_path / "x.pth"), has_coarse=True)
    assert noted.keys() == options_of(model).keys() - set(NOT_NOTED) and noted["token_budget"] == 0.8
    assert noted["rotary"] == {**noted["rotary"], "temperature": 7.0, "rope_type": "cat"}
    back = APTViT.from_weights(tmp_path / "x.pth")
    given = options_of(back)
    assert {name: given[name] for name in options_of(model)} == options_of(model)


def test_scorers_that_are_functions_are_not_noted(tmp_path: Path) -> None:
    model = small(thresholds=(4.0,), scorer=lambda images, size: images.mean(1))
    torch.save(model.state_dict(), tmp_path / "x.pth")
    assert "scorer" not in noted_options(read_checkpoint(tmp_path / "x.pth"), True)


def test_thresholds_go_with_the_weights_of_coarse_patches() -> None:
    state = small(thresholds=(4.0,)).state_dict()
    assert "thresholds" in noted_options(state, True) and "thresholds" not in noted_options(state, False)
    for name in [name for name in state if name.startswith("coarse_embed.")]:
        del state[name]
    assert APTViT.from_weights(state).thresholds == ()


def test_two_backbones_that_disagree_note_nothing() -> None:
    pair = nn.ModuleList([small(num_heads=2), small(num_heads=4)])
    assert noted_options(pair.state_dict(), True) == {} == noted_options({}, True)
    assert noted_options(nn.ModuleList([small(), small()]).state_dict(), True)["num_heads"] == 2


def test_shapes_are_believed_before_notes() -> None:
    state = with_options(small(use_rel_pos=True), num_heads=16, img_size=(800, 800))
    model = APTViT.from_weights(state, window_size=0)
    assert model.block_options.num_heads == 2 and model.img_size == (32, 32)
    assert APTViT.from_weights(small().state_dict()).img_size == (36, 36)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "embed_dim=16 is not a multiple of num_heads=5"),
        ({"act_layer": "sinus"}, "act_layer='sinus' must be one of"),
        ({"rotary": {"speed": 1}}, "unknown fields"),
        ({"img_size": "large"}, "img_size='large' must be"),
        ({"window_block_indexes": (9,), "window_size": 2}, "names blocks"),
    ],
)
def test_notes_of_nonsense_are_refused(options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        APTViT.from_weights(with_options(small(), **options))


def test_options_of_another_version_are_named() -> None:
    """An option that changes the values must not be left out silently."""
    with pytest.raises(TypeError, match="no option 'attend_backwards'"):
        APTViT.from_weights(with_options(small(), attend_backwards=True))


@pytest.mark.parametrize("noted", [None, 3, "num_heads", [("num_heads", 2)]])
def test_notes_of_another_kind_are_ignored(noted: Any) -> None:
    state = small().state_dict()
    state._metadata[""]["options"] = noted
    assert noted_options(state, True) == {}


def test_options_that_were_removed_are_read_past_where_they_changed_nothing() -> None:
    model = small(thresholds=(4.0,))
    back = APTViT.from_weights(with_options(model, **REMOVED))
    assert options_of(back) == options_of(model)
    assert APTViT.from_weights(with_options(small(), embed_parts=0.25)).thresholds == ()  # of no use there
    for name, value in (("embed_parts", 0.25), ("cell_offsets", True)):
        with pytest.raises(ValueError, match=f"{name}={value!r}, an option that was removed"):
            APTViT.from_weights(with_options(model, **{name: value}))
