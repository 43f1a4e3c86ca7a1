"""Channels and strides of outputs, as the outputs have them and as timm's models name them."""

from __future__ import annotations

import pytest
import timm

from apt_dense import APTViT

from support.references import noise

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}


@pytest.mark.parametrize("out_indices", [None, (1,), (0, 2, 3)])
def test_outputs_are_as_described(out_indices: tuple[int, ...] | None) -> None:
    model = APTViT(**SMALL, out_indices=out_indices)
    maps = model(noise(1, 3, 40, 48))
    assert tuple(map_.shape[1] for map_ in maps) == model.out_channels
    assert tuple(40 // map_.shape[2] for map_ in maps) == model.strides == (8,) * len(maps)
    assert model.feature_info.channels() == list(model.out_channels)
    assert model.feature_info.reduction() == list(model.strides)


def test_the_description_is_timms() -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", **SMALL, features_only=True, out_indices=(1, 3)).feature_info
    ours = APTViT(**SMALL, out_indices=(1, 3)).feature_info
    assert type(ours) is type(theirs) and ours.out_indices == theirs.out_indices
    for question in ("channels", "reduction", "module_name"):
        assert getattr(ours, question)() == getattr(theirs, question)()
        assert getattr(ours, question)(1) == getattr(theirs, question)(1)
