"""Layer-wise decay of learning rates: Detectron2's own rates, and the full rate for new parameters."""

from __future__ import annotations

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate

from apt_dense.hosts.detectron2 import get_apt_lr_decay_rate

from support.tiny_coco import ADAPTIVE, one_thread, tiny_model  # noqa: F401 (a fixture)


def test_learning_rates_decay_as_detectron2_s_and_new_parameters_get_the_full_rate() -> None:
    model = tiny_model(ADAPTIVE, "model.backbone.net.residual_block_indexes=[1]")
    names = [name for name, _ in model.named_parameters()]
    ours = {name: get_apt_lr_decay_rate(name, 0.7, 2) for name in names}
    theirs = {name: get_vit_lr_decay_rate(name, 0.7, 2) for name in names}
    assert ours == pytest.approx(theirs)
    coarse = [name for name in names if ".coarse_embed." in name]
    assert len(coarse) == 4 and all(ours[name] == 1.0 for name in coarse)
    assert ours["backbone.net.pos_embed"] == pytest.approx(0.7**3)
    for name in ("reg_token", "norm_pre.weight"):
        assert get_apt_lr_decay_rate(f"backbone.net.{name}", 0.7, 2) == pytest.approx(0.7**3)
    assert ours["backbone.net.blocks.1.attn.qkv.weight"] == pytest.approx(0.7)
    with pytest.raises(ValueError, match="blocks.1.* beyond num_layers=1"):
        get_apt_lr_decay_rate("backbone.net.blocks.1.norm1.weight", 0.7, 1)
