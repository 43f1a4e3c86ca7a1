"""The simple feature pyramid on tokens: upstream's names and values, and sizes that become divisible."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from detectron2.modeling import Backbone
from detectron2.modeling import SimpleFeaturePyramid as PlainFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor

from apt_dense.hosts.detectron2 import APTViT, SimpleFeaturePyramid

from support.references import Convolutions, litter, noise, randomise
from support.tiny_coco import ADAPTIVE, one_thread, tiny_model  # noqa: F401 (a fixture)
from support.tiny_detectors import WINDOWED, pair, photo, preprocessed


def test_pyramid_has_the_same_names_and_values() -> None:
    theirs, ours = pair(**WINDOWED)
    arguments = ("last_feat", 16, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), "LN", 0)
    plain = randomise(PlainFeaturePyramid(theirs, *arguments))
    adapted = SimpleFeaturePyramid(ours, *arguments).eval()
    adapted.load_state_dict(plain.state_dict(), strict=True)
    assert adapted.output_shape() == plain.output_shape()
    with torch.no_grad():
        expected, found = plain(noise(2, 3, 128, 96)), adapted(noise(2, 3, 128, 96))
    assert list(found) == list(expected) == ["p2", "p3", "p4", "p5", "p6"]
    assert all((found[level] - expected[level]).abs().max() <= 1e-4 for level in found)


@pytest.mark.parametrize("norm", ["LN", "BN"])
def test_pyramid_on_tokens_has_upstream_s_values(norm: str) -> None:
    """Pointwise layers run on mixed patches, with padding dropped, instead of on the scattered map."""
    images = noise(2, 3, 128, 96)
    images[:, :, :70, :] = 0.3
    images[1, :, 100:] = 0
    net = randomise(APTViT(**WINDOWED, thresholds=(5.5, 4.0), drop_padding=True)).eval()
    assert {-1, 0} < set(net.partition(images).unique().tolist())
    arguments = (net, "last_feat", 16, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), norm, 0)
    plain, adapted = PlainFeaturePyramid(*arguments), randomise(SimpleFeaturePyramid(*arguments)).eval()
    plain.eval().load_state_dict(adapted.state_dict(), strict=True)
    with torch.no_grad():
        expected, found = plain(images), adapted(images)
        net.register_forward_hook(lambda *_: None)
        hooked = adapted(images)
    for level in expected:
        torch.testing.assert_close(found[level], expected[level], atol=1e-5, rtol=1e-5)
        assert torch.equal(hooked[level], expected[level])


class OneMap(Backbone):
    """A backbone of somebody else: its feature map is the image."""

    def __init__(self) -> None:
        super().__init__()
        self._out_features, self._out_feature_channels, self._out_feature_strides = ["x"], {"x": 32}, {"x": 16}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"x": images}


@pytest.mark.parametrize("norm", ["LN", "BN"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_maps_of_any_backbone_in_16_bits_stay_near_float32(dtype: torch.dtype, norm: str) -> None:
    """By convolutions that are right on all processors."""
    arguments = (OneMap(), "x", 16, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), norm, 0)
    pyramid, half = (randomise(SimpleFeaturePyramid(*arguments), 0.2).eval() for _ in range(2))
    half.to(dtype)
    for size in ((8, 2), (2, 8), (2, 2), (16, 3)):  # smaller ones have no level of half their size
        feature_map = noise(2, 32, *size)
        with torch.no_grad():
            expected = pyramid(feature_map)
            for _ in range(3):
                litter(dtype)
                with Convolutions() as made:
                    found = half(feature_map.to(dtype))
                assert made.sides and 1 not in made.sides
                for level, values in expected.items():
                    bound = 0.08 * values.abs().max().item()
                    assert (found[level].float() - values).abs().max().item() <= bound, (size, level)


def test_sizes_become_divisible_without_square_padding() -> None:
    model = tiny_model(ADAPTIVE, "model.backbone.square_pad=0")
    assert model.backbone.size_divisibility == 32
    constraints = model.backbone.padding_constraints
    assert constraints["size_divisibility"] == constraints["size_divisiblity"] == 32
    assert preprocessed(model, photo(70, 100)).shape[-2:] == (96, 128)
    with torch.no_grad():
        levels = model.backbone(preprocessed(model, photo(70, 100)))
    assert [tuple(level.shape[-2:]) for level in levels.values()] == [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]
