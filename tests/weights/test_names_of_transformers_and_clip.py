"""Files of transformers, OpenAI's CLIP and open_clip: timm's models, renamed as these projects' converters do it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from apt_dense import APTViT, load_backbone
from apt_dense.weights.arguments_from_file import told_by
from apt_dense.weights.find_backbone_weights import unwrap

from support.families import HEADS, timm_model
from support.names_of_transformers_and_clip import (
    openai_clip,
    transformers_clip,
    transformers_dinov2,
    transformers_vit,
)
from support.references import noise

CLIP = {"act_layer": "quick_gelu", "rotary": None}
CASES = {
    "ViT": (transformers_vit, "augreg", {}, "transformers"),
    "DINOv2": (transformers_dinov2, "dinov2", {}, "transformers"),
    "DINOv2 with registers": (transformers_dinov2, "dinov2 reg", {}, "transformers"),
    "DINOv2 giant": (transformers_dinov2, "dinov2 giant", {}, "transformers"),
    "CLIP": (transformers_clip, "openai clip", CLIP, "transformers"),
    "SigLIP": (transformers_clip, "siglip", {"act_layer": "gelu"}, "transformers"),
    "CLIP itself": (openai_clip, "openai clip", CLIP, "OpenAI's CLIP"),
}


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_values_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    convert, family, answers, title = CASES[name]
    theirs: nn.Module = timm_model(family)
    torch.save(convert(theirs.state_dict()), tmp_path / "pytorch_model.bin")
    ours = APTViT.from_weights(tmp_path / "pytorch_model.bin", num_heads=HEADS, **answers).eval()
    images = noise(1, 3, 3 * ours.patch_size, 5 * ours.patch_size)
    expected = theirs.forward_features(images)[:, theirs.num_prefix_tokens :].mT
    torch.testing.assert_close(ours(images)[0].flatten(2), expected, atol=1e-4, rtol=0)
    plain = APTViT.from_timm(theirs)
    weights = plain.state_dict()
    report = load_backbone(plain, tmp_path / "pytorch_model.bin")
    assert not report.missing and not report.unexpected
    assert all(torch.equal(value, weights[key]) for key, value in plain.state_dict().items())
    assert f"names of {title}" in told_by(unwrap(convert(theirs.state_dict()))).title


def test_a_missing_projection_is_named() -> None:
    state = transformers_vit(timm_model("augreg").state_dict())
    del state["vit.encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(ValueError, match=r"lacks blocks\.1\.attn\.qkv\.weight.*blocks\.1\.attn\.query\.weight"):
        APTViT.from_weights(state, num_heads=HEADS)


def test_open_clip_around_a_timm_model() -> None:
    state = {f"visual.trunk.{name}": value for name, value in timm_model("siglip").state_dict().items()}
    state["text.transformer.resblocks.0.ln_1.weight"] = torch.ones(3)
    assert APTViT.from_weights(state, num_heads=HEADS, act_layer="gelu").depth == 2
