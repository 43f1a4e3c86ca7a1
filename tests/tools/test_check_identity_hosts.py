"""The identity check on configs of the hosts, and their original models' weights there and back."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import check_identity
import cv2
import numpy as np
import pytest
import torch

from apt_dense import APTViT
from apt_dense.weights.convert import from_apt, to_apt
from apt_dense.weights.load import load_backbone

from identity import model_pairs as pairs
from support.references import randomise

pytestmark = pytest.mark.filterwarnings("ignore")  # the hosts' own

MMSEG = """
model = dict(backbone=dict(
    type="APTViT", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, out_indices=(0, 2),
    thresholds=(5.5, 4.0), drop_path_rate=0.1, pretrained=None, {options}
))
"""
DETECTRON2 = """
from detectron2.config import LazyCall as L
from apt_dense.hosts.detectron2 import APTViT, SimpleFeaturePyramid
model = dict(
    pixel_mean=[123.675, 116.28, 103.53],
    backbone=L(SimpleFeaturePyramid)(net=L(APTViT)(
        img_size=64, patch_size=8, embed_dim=24, depth=2, num_heads=2, pretrain_img_size=32, use_rel_pos=True,
        window_size=4, window_block_indexes=(0,), thresholds=(5.5,), drop_padding=True,
        pixel_mean="${{...pixel_mean}}", {options}
    )),
)
"""
DETECTRON2_BY_FILE = """
from detectron2.config import LazyCall as L
from apt_dense.hosts.detectron2 import APTViT, SimpleFeaturePyramid
model = dict(backbone=L(SimpleFeaturePyramid)(
    net=L(APTViT)(pretrained="{pretrained}", out_feature="last_feat", {options}), in_feature="last_feat",
    out_channels=8, scale_factors=(1.0,)))
"""


def check(text: str, folder: Path, *arguments: object) -> int | str:
    """The exit status, or the one line that the tool ends with."""
    cv2.imwrite(str(folder / "photo.png"), np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    (folder / "config.py").write_text(text)
    with pytest.raises(SystemExit) as end:
        check_identity.main([str(a) for a in (folder / "config.py", "--image", folder / "photo.png", *arguments)])
    return end.value.code


# ---- MMSegmentation


@pytest.mark.parametrize("options", ["class_token=True, final_norm=True", "qkv_bias=True, norm_eps=1e-5"])
def test_mmseg(options: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("mmseg")
    assert check(MMSEG.format(options=options), tmp_path, "--img-size", 40, 56) == 0
    output = capsys.readouterr().out
    assert "MMSegmentation's VisionTransformer, config.py, images (1, 3, 40, 56)" in output
    assert re.findall(r"^block \d", output, re.MULTILINE) == ["block 0", "block 2"]


def test_mmseg_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mmseg = pytest.importorskip("mmseg.models.backbones")
    theirs = mmseg.VisionTransformer(
        img_size=32, patch_size=8, embed_dims=24, num_layers=3, num_heads=2, patch_bias=True
    )
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "vit.pth")
    options = "class_token=True, norm_eps=1e-5"
    assert check(MMSEG.format(options=options), tmp_path, "--checkpoint", tmp_path / "vit.pth") == 0
    assert "does not fit" in check(MMSEG.format(options="class_token=True, final_norm=True"), tmp_path,
                                   "--checkpoint", tmp_path / "vit.pth")  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MMSEG.format(options="init_values=1.0, qk_norm=True"), "VisionTransformer has no init_values, qk_norm, so"),
        (MMSEG.format(options="mlp_ratio=2.5"), "has no mlp_ratio=2.5"),
        ('model = dict(backbone=dict(type="ResNet"))', "is 'ResNet', not 'APTViT'"),
    ],
)
def test_mmseg_configs_without_an_original(text: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip("mmseg")
    assert message in check(text, tmp_path)


@pytest.mark.parametrize("options", [{}, {"final_norm": True}, {"pre_norm": True, "qkv_bias": True}], ids=str)
def test_weights_of_mmsegs_vit_there_and_back(options: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mmseg = pytest.importorskip("mmseg.models.backbones")
    from apt_dense.hosts.mmseg import APTViT

    theirs = mmseg.VisionTransformer(
        img_size=32, patch_size=8, embed_dims=24, num_layers=2, num_heads=2, patch_bias=True, **options
    )
    state = {name: torch.randn_like(value) for name, value in theirs.state_dict().items()}
    ours = randomise(APTViT(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, class_token=True, **options))
    report = load_backbone(ours, state)
    assert report.missing == report.unexpected == report.unused == report.new == []
    for back in (from_apt(ours.state_dict(), "mmseg").state, from_apt(to_apt(state, "mmseg"), "mmseg").state):
        assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


# ---- Detectron2


@pytest.mark.parametrize("options", ["", "drop_path_rate=0.1", "partial_patches='crop', residual_block_indexes=(1,)"])
def test_detectron2(options: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("detectron2")
    assert check(DETECTRON2.format(options=options), tmp_path, "--img-size", 48, 72) == 0
    output = capsys.readouterr().out
    assert "Detectron2's ViT, config.py, images (1, 3, 48, 72)" in output and "last_feat" in output


def test_detectron2_fails_where_a_number_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("detectron2")
    from apt_dense.hosts.detectron2 import APTViT

    forward = APTViT.forward
    monkeypatch.setattr(APTViT, "forward", lambda self, x: {k: v + 1e-3 for k, v in forward(self, x).items()})
    assert check(DETECTRON2.format(options=""), tmp_path) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DETECTRON2.format(options="class_token=True, pre_norm=True"), "ViT has no class_token, pre_norm, so"),
        (
            DETECTRON2.format(options="k_bias=False, rotary={}"),
            "k_bias, rotary, so there is nothing to compare with. EVA",
        ),
        ("model = dict()", "has no model.backbone.net"),
    ],
)
def test_detectron2_configs_without_an_original(text: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip("detectron2")
    assert message in check(text, tmp_path, "--host", "detectron2")


def test_detectron2_with_a_checkpoint_of_another_shape(tmp_path: Path) -> None:
    pytest.importorskip("detectron2")
    torch.save({"model": {"backbone.net.pos_embed": torch.zeros(1, 17, 8)}}, tmp_path / "x.pth")
    found = check(DETECTRON2.format(options=""), tmp_path, "--checkpoint", tmp_path / "x.pth")
    assert "pos_embed is (1, 17, 8) in the checkpoint" in found
    assert "--pretrained goes with timm's models" in check(DETECTRON2.format(options=""), tmp_path, "--pretrained")


def test_neutral_options_are_arguments() -> None:
    """So that a renamed argument is not let through unseen."""
    pytest.importorskip("mmseg")
    pytest.importorskip("detectron2")
    from apt_dense.hosts import detectron2, mmseg

    known = {"type", "_target_"}
    for model in (pairs.APTViT, detectron2.APTViT, mmseg.APTViT):
        known |= set(inspect.signature(model).parameters)
    assert known >= pairs._NEUTRAL


# ---- configs whose weights tell the backbone


def test_mmsegs_weights_tell_the_backbone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("mmseg")
    source = APTViT(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, class_token=True, final_norm=True)
    torch.save(randomise(source).state_dict(), tmp_path / "vit.pth")
    backbone = {"type": "APTViT", "pretrained": str(tmp_path / "vit.pth"), "thresholds": (5.0,)}
    assert check(f"model = dict(backbone={backbone!r})", tmp_path, "--host", "mmseg", "--img-size", 40, 56) == 0
    assert "PASS" in capsys.readouterr().out


@pytest.mark.parametrize("options", ["num_heads=2, window_size=0", "window_block_indexes=(0,)"])
def test_detectron2s_weights_tell_the_backbone(options: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    modeling = pytest.importorskip("detectron2.modeling")
    windows = {"window_size": 2, "window_block_indexes": (0,), "use_rel_pos": True} if "indexes" in options else {}
    theirs = modeling.ViT(img_size=128, embed_dim=24, depth=2, num_heads=2, pretrain_img_size=64, **windows)
    torch.save({"model": randomise(theirs).state_dict()}, tmp_path / "vit.pth")
    text = DETECTRON2_BY_FILE.format(pretrained=tmp_path / "vit.pth", options=options)
    assert check(text, tmp_path, "--checkpoint", tmp_path / "vit.pth") == 0
    assert "Detectron2's ViT, config.py" in capsys.readouterr().out


def test_what_weights_tell_and_detectron2_lacks_is_named(tmp_path: Path) -> None:
    pytest.importorskip("detectron2")
    source = APTViT(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, class_token=True, init_values=1.0)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    text = DETECTRON2_BY_FILE.format(pretrained=tmp_path / "vit.pth", options="num_heads=2")
    message = str(check(text, tmp_path))
    assert "Detectron2's ViT has no" in message and "init_values" in message
