"""The MMSeg backbone's init_cfg: checkpoints, MMEngine's initialisers, and lists of both."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg", reason="the MMSeg host needs the packages of the extra 'mmseg'")

from mmengine.model import PretrainedInit

from apt_dense.hosts.mmseg import APTViT
from apt_dense.hosts.mmseg.arguments_from_pretrained import fill_in
from apt_dense.weights.files import CheckpointError

from support.tiny_segmentors import SMALL, backbone, loaded, mmseg_scope  # noqa: F401 (a fixture)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(backbone(1).state_dict(), path)
    return path


@pytest.mark.parametrize("kind", ["Pretrained", PretrainedInit])
@pytest.mark.parametrize("before", [[], [{"type": "Normal", "layer": "Linear", "std": 0.5}]], ids=str)
def test_a_checkpoint_in_a_list(kind: object, before: list, weights: Path, tmp_path: Path) -> None:
    """MMEngine itself would load what fits, if anything, and only log the rest."""
    model = backbone(init_cfg=[*before, {"type": kind, "checkpoint": weights}])
    model.init_weights()
    assert loaded(model) and model.is_init
    torch.save({"other.weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth: .*does not fit the backbone"):
        backbone(init_cfg=[*before, {"type": kind, "checkpoint": tmp_path / "other.pth"}]).init_weights()


@pytest.mark.parametrize(
    ("init_cfg", "message"),
    [
        ({"type": "Pretrained"}, "init_cfg.checkpoint=None must be a name"),
        ({"type": "Pretrained", "checkpoint": 3}, "init_cfg.checkpoint=3 must be a name"),
        ({"type": "Pretrained", "checkpoint": ""}, "init_cfg.checkpoint='' must be a file"),
        ({"type": "Pretrained", "checkpoint": "a", "prefix": 3}, "init_cfg.prefix=3 must be a name"),
        ({"type": "Pretrained", "checkpoint": "a", "strict": "no"}, "init_cfg.strict='no' must be True or False"),
        ({"type": "Pretrained", "checkpoint": "a", "resize_patches": 1}, "init_cfg.resize_patches=1 must be True"),
        ({"type": "Pretrained", "checkpoint": "a", "stric": False}, "init_cfg has no 'stric'"),
        ([{"type": "Pretrained", "checkpoint": "a"}] * 2, "names 2 checkpoints"),
        ({"checkpoint": "a"}, "must be a dictionary with a type"),
        (["a"], "'a' must be a dictionary with a type"),
        ("a", "init_cfg='a' must be a dictionary, a list"),
    ],
    ids=str,
)
def test_an_init_cfg_that_cannot_be_meant_is_refused(init_cfg: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        backbone(init_cfg=init_cfg)


def test_without_weights_the_zero_initialised_parts_stay_zero() -> None:
    model = APTViT(**SMALL, thresholds=(4.0,))
    model.init_weights()
    assert not model.coarse_embed.zero.weight.any() and model.blocks[0].attn.qkv.weight.std() > 0.01


def test_an_init_cfg_for_all_linear_layers_keeps_the_zero_initialised_parts_zero() -> None:
    model = APTViT(**SMALL, thresholds=(4.0,), init_cfg={"type": "TruncNormal", "layer": "Linear", "std": 0.5})
    model.init_weights()
    assert model.blocks[0].attn.qkv.weight.std() > 0.2 and not model.coarse_embed.zero.weight.any()


def test_a_checkpoint_in_a_list_tells_the_arguments(weights: Path) -> None:
    entries = [{"type": "Normal", "layer": "Linear", "std": 0.5}, {"type": PretrainedInit, "checkpoint": weights}]
    options, init_cfg = fill_in({"patch_size": 8, "num_heads": 2}, entries)
    assert options["embed_dim"] == SMALL["embed_dim"] and options["depth"] == SMALL["depth"]
    assert init_cfg == [entries[0], {**entries[1], "resize_patches": True}]
