"""The conversion tool: files of all kinds, its one summary, and refusals that leave no file behind."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import convert_checkpoint
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc, resample_patch_embed
from torch import Tensor

from apt_dense import APTViT
from apt_dense.weights.files import read_checkpoint
from apt_dense.weights.load import load_backbone

from support.references import randomise

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def weights(seed: int = 0, **options: Any) -> dict[str, Tensor]:
    return randomise(APTViT(**{**SMALL, **options}), 0.2, seed).state_dict()


def saved(folder: Path, content: Any, name: str = "in.pth") -> Path:
    if name.endswith(".pkl"):
        (folder / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, folder / name)
    return folder / name


def convert(*arguments: Any) -> None:
    convert_checkpoint.main([str(argument) for argument in arguments])


def refusal(*arguments: Any) -> str:
    """The one line with which the tool ends."""
    with pytest.raises(SystemExit) as end:
        convert(*arguments)
    message = str(end.value)
    assert message.startswith("convert_checkpoint: ") and "\n" not in message
    return message


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_timm_weights_become_ours(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    theirs = randomise(timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=3), 0.2)
    source, out = saved(tmp_path, {"state_dict": theirs.state_dict()}), tmp_path / "out.safetensors"
    convert(source, out)
    expected = {name: value for name, value in theirs.state_dict().items() if not name.startswith("head")}
    assert same(safetensors.torch.load_file(out), expected)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{source}: {len(expected) + 2} weights of timm's VisionTransformer (timm)"
    assert second.endswith(f"weights of apt_dense: {len(expected)} loaded; 2 unused (head.weight, head.bias)")
    load_backbone(APTViT(**SMALL, class_token=True, final_norm=True), read_checkpoint(out))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("target", ["timm", "mmseg", "detectron2", "sam"])
def test_there_and_back_through_files(tmp_path: Path, target: str, suffix: str) -> None:
    options = {"class_token": True} if target in ("timm", "mmseg") else {"use_rel_pos": True}
    state, between, back = weights(**options), tmp_path / f"x{suffix}", tmp_path / "back.pth"
    convert(saved(tmp_path, state), between, "--to", target)
    names = read_checkpoint(between).keys()
    prefix = {"detectron2": "backbone.net.", "sam": "image_encoder."}.get(target, "")
    assert all(name.startswith(prefix) for name in names)
    convert(between, back, "--from", target)
    if target == "detectron2":  # whose positions have one more
        assert not read_checkpoint(back)["pos_embed"][:, 0].any()
    else:
        assert same(read_checkpoint(back), state)
    model = APTViT(**SMALL, **options)
    load_backbone(model, read_checkpoint(between))
    assert same(model.state_dict(), state)


def test_eva02_detectors_there_and_back(tmp_path: Path) -> None:
    options = {"qkv_fused": False, "k_bias": False, "mlp_layer": "swiglu", "scale_mlp_norm": True, "rotary": {},
               "pretrain_use_cls_token": True}  # fmt: skip
    state = weights(**options)
    convert(saved(tmp_path, state), tmp_path / "det.pth", "--to", "eva02_det")
    assert "backbone.net.blocks.0.attn.q_bias" in read_checkpoint(tmp_path / "det.pth")
    convert(tmp_path / "det.pth", tmp_path / "back.pth")
    assert same(read_checkpoint(tmp_path / "back.pth"), state)


@pytest.mark.parametrize("kind", ["arrays", "tensors", "old arrays"])
def test_pickles_of_detectron2s_zoo(tmp_path: Path, kind: str) -> None:
    state = weights(use_rel_pos=True, pretrain_use_cls_token=True)
    whole = {f"backbone.net.{name}": value for name, value in state.items()} | {"roi_heads.x": torch.ones(2)}
    content = OrderedDict(whole) if kind == "tensors" else {name: value.numpy() for name, value in whole.items()}
    content = {"model": content, "__author__": "Detectron2", "iteration": np.int64(5)}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps(content, protocol=2 if kind == "old arrays" else None))
    convert(path, tmp_path / "out.pth")
    assert same(read_checkpoint(tmp_path / "out.pth"), state)


def test_patches_and_positions_are_resampled(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = weights(class_token=True)
    convert(saved(tmp_path, state), tmp_path / "out.pth", "--patch-size", 16, "--img-size", 96, 64)
    converted = read_checkpoint(tmp_path / "out.pth")
    assert "2 converted (pos_embed, patch_embed.proj.weight)" in capsys.readouterr().out.replace(
        "(patch_embed.proj.weight, pos_embed)", "(pos_embed, patch_embed.proj.weight)"
    )
    assert torch.equal(converted["pos_embed"], resample_abs_pos_embed(state["pos_embed"], [6, 4]))
    weight = resample_patch_embed(state["patch_embed.proj.weight"], [16, 16])
    assert torch.equal(converted["patch_embed.proj.weight"], weight)
    load_backbone(APTViT(**{**SMALL, "patch_size": 16, "img_size": (96, 64)}, class_token=True), converted)


@pytest.mark.parametrize("target", ["apt", "mmseg", "sam", "detectron2"])
def test_rectangles_need_a_name_where_the_file_has_none(tmp_path: Path, target: str) -> None:
    """Positions on 8 x 2 cells, resampled to 4 x 4."""
    state = weights(img_size=(64, 16))
    source, out = saved(tmp_path, dict(state)), tmp_path / "out.pth"
    convert(source, out, "--to", target, "--grid", 8, 2, "--img-size", 32)
    model = APTViT(**SMALL)
    load_backbone(model, read_checkpoint(out), strict=False)
    expected = resample_abs_pos_embed_nhwc(state["pos_embed"].unflatten(1, (8, 2)), [4, 4]).flatten(1, 2)
    assert torch.equal(model.pos_embed, expected)
    convert(saved(tmp_path, state, "noted.pth"), out, "--to", target, "--img-size", 32, "--force")
    load_backbone(model, read_checkpoint(out), strict=False)
    assert torch.equal(model.pos_embed, expected)


@pytest.mark.parametrize("target", ["apt", "timm", "sam", "detectron2", "mmseg"])
@pytest.mark.parametrize("resized", [True, False])
@pytest.mark.parametrize("known", ["named", "noted", "shape", "unknown"])
def test_a_square_that_is_assumed_is_said(
    known: str, resized: bool, target: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    state: dict[str, Tensor] = weights()
    if known == "shape":
        state = {**state, "pos_embed": state["pos_embed"].unflatten(1, (4, 4))}
    source = saved(tmp_path, state if known == "noted" else dict(state))
    options = (["--grid", 2, 8] if known == "named" else []) + (["--img-size", 64] if resized else [])
    convert(source, tmp_path / "out.pth", "--to", target, *options)
    said = "positions were taken for 4 x 4, since in.pth does not say (--grid)" in capsys.readouterr().out
    assert said == (known == "unknown" and (resized or target not in ("apt", "timm")))


def test_grids_that_cannot_be_told(tmp_path: Path) -> None:
    state = dict(weights(img_size=(16, 48)))
    source, out = saved(tmp_path, state), tmp_path / "out.pth"
    for more in (["--to", "sam"], ["--to", "mmseg"], ["--img-size", "32"]):
        message = refusal(source, out, *more)
        assert "(1, 12, 16) does not fit: it is not a square grid" in message and "--grid" in message
        assert "it is not a grid of 3 x 3" in refusal(source, out, *more, "--grid", 3, 3)
    convert(source, out, "--to", "sam", "--grid", 2, 6)
    assert read_checkpoint(out)["image_encoder.pos_embed"].shape == (1, 2, 6, 16)
    convert(out, tmp_path / "back.pth")
    assert same(read_checkpoint(tmp_path / "back.pth"), state)
    convert(source, out, "--force")  # our own form needs no grid
    assert same(read_checkpoint(out), state)


def test_trained_coarse_patches(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = saved(tmp_path, weights(thresholds=(4.0,))), tmp_path / "out.pth"
    assert "--drop-coarse" in refusal(source, out, "--to", "sam") and not out.exists()
    convert(source, out, "--to", "sam", "--drop-coarse")
    assert "4 unused (coarse_embed.down.weight" in capsys.readouterr().out
    convert(source, tmp_path / "own.pth")
    assert same(read_checkpoint(tmp_path / "own.pth"), weights(thresholds=(4.0,)))


def test_what_was_added_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    convert(saved(tmp_path, weights()), tmp_path / "out.pth", "--to", "mmseg")
    assert "2 new (cls_token, pos_embed[:, 0])" in capsys.readouterr().out


def test_files_are_not_overwritten_unasked(tmp_path: Path) -> None:
    source, out = saved(tmp_path, weights()), tmp_path / "out.pth"
    out.write_text("mine")
    assert "out.pth exists; --force overwrites it" in refusal(source, out) and out.read_text() == "mine"
    assert "in.pth exists" in refusal(source, source)
    convert(source, out, "--force")
    assert same(read_checkpoint(out), weights()) and sorted(p.name for p in tmp_path.iterdir()) == ["in.pth", "out.pth"]


def test_incomplete_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = {**weights(), "strange": torch.ones(1)}
    del state["blocks.1.mlp.fc2.bias"]
    source, out = saved(tmp_path, state), tmp_path / "out.pth"
    message = refusal(source, out)
    assert "1 missing (blocks.1.mlp.fc2.bias); 1 unexpected (strange)" in message and not out.exists()
    convert(source, out, "--partial")
    assert "1 missing (blocks.1.mlp.fc2.bias); 1 unexpected (strange)" in capsys.readouterr().out
    assert read_checkpoint(out).keys() == state.keys() - {"strange"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no state dict found"),
        ([1, 2], "no state dict found"),
        ({"model": {"a": 1}}, "no state dict found"),
        ({"a": torch.zeros(2)}, r"this is not a whole backbone: 0 loaded"),
    ],
    ids=str,
)
def test_files_without_a_backbone(tmp_path: Path, content: Any, message: str) -> None:
    assert message in refusal(saved(tmp_path, content), tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_another_architecture(tmp_path: Path) -> None:
    source = saved(tmp_path, timm.create_model("resnet18").state_dict())
    message = refusal(source, tmp_path / "out.pth")
    assert "unexpected (conv1.weight" in message and len(message) < 1000
    refusal(source, tmp_path / "out.pth", "--partial")


def test_the_wrong_source_format_is_noticed(tmp_path: Path) -> None:
    convert(saved(tmp_path, weights(class_token=True)), tmp_path / "mmseg.pth", "--to", "mmseg")
    message = refusal(tmp_path / "mmseg.pth", tmp_path / "out.pth", "--from", "sam")
    assert "unexpected (" in message and "patch_embed.projection.weight" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pth", "out.pth"], "none.pth does not exist"),
        (["in.pth", "out.onnx"], "ends in '.onnx'; expected .pth or .safetensors"),
        (["in.pth", "no/folder/out.pth"], "no/folder does not exist"),
        (["in.pth", "out.pth", "--patch-size", "0"], "patch_size=0: expected at least 1"),
        (["in.pth", "out.pth", "--img-size", "30"], "is not a multiple of patches of 8"),
        (["in.pth", "out.pth", "--img-size", "1", "2", "3"], "takes one number or two, not 3"),
        (["in.pth", "out.pth", "--to", "eva02_det"], "EVA-02's detectors has no place for"),
    ],
)
def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path, weights())
    assert message in refusal(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_damaged_files(tmp_path: Path, suffix: str) -> None:
    state = weights()
    good = tmp_path / f"good{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(dict(state), good)
    else:
        saved(tmp_path, {"model": state}, good.name)
    content = good.read_bytes()
    for part in (0, 1, len(content) // 2, len(content) - 1):
        damaged = tmp_path / f"damaged{suffix}"
        damaged.write_bytes(content[:part])
        assert "cannot be read as weights: it is damaged" in refusal(damaged, tmp_path / "out.pth")
    convert(good, tmp_path / "out.pth")


@pytest.mark.parametrize(("out", "more"), [
    ("x.pth", []), ("x.safetensors", []), ("x.pth", ["--to", "timm"]), ("x.pth", ["--to", "detectron2"]),
])  # fmt: skip
def test_our_own_options_stay_in_converted_files(out: str, more: list[str], tmp_path: Path) -> None:
    """Nothing is asked of such a file, whose names and shapes tell neither heads nor epsilon nor activation."""
    options = {"act_layer": "quick_gelu", "norm_eps": 1e-3, "img_size": (32, 16), "pos_antialias": False}
    state = weights(**options)
    convert(saved(tmp_path, state), tmp_path / out, *more, "--img-size", "64", "32")
    back = APTViT.from_weights(tmp_path / out, pretrain_img_size=None)
    assert (back.block_options.num_heads, back.block_options.norm_eps) == (2, 1e-3)
    assert back.block_options.act_layer == "quick_gelu" and back.pos_grid == (8, 4)
    assert torch.equal(back.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])
