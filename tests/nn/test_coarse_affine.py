"""Outputs of coarse tokens, scaled and shifted: neutral at first, fine tokens left alone, alike in all layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apt_dense import APTViT
from apt_dense.hosts.torchvision.pyramid import PyramidBackbone
from apt_dense.nn.feature_pyramid import SimpleFeaturePyramid
from apt_dense.weights.arguments_from_file import told_by
from apt_dense.weights.convert import from_apt

from support.references import noise, normalise, randomise

SMALL = {
    "img_size": 32, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "thresholds": (4.0, 4.0),
    "coarse_affine": True,
}  # fmt: skip
WINDOWED = {"window_size": 4, "window_block_indexes": (0,), "use_rel_pos": True}
FORMS = [{}, WINDOWED, {"token_budget": 0.7}, {"class_token": True}, {"drop_padding": True}]


def images(batch: int = 2) -> Tensor:
    pixels = 128 + 60 * noise(batch, 3, 32, 36)
    pixels[:, :, :, :20] = 90
    return normalise(pixels.clamp(0, 255).round())


def model_of(**options: object) -> APTViT:
    return randomise(APTViT(**{**SMALL, **options}), 0.2).eval()


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_cells_of_coarse_patches_alone_are_scaled_and_shifted(options: dict) -> None:
    model = model_of(**options, out_indices=(0, 1))
    plain = APTViT(**{**SMALL, **options, "coarse_affine": False}, out_indices=(0, 1)).eval()
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if ".outputs." not in n})
    coarse = (model.partition(images()) > 0)[:, None]
    assert 0 < coarse.float().mean() < 1
    for affine, found, before in zip(model.coarse_embed.outputs, model(images()), plain(images()), strict=True):
        weight, bias = (p.view(1, -1, 1, 1) for p in (affine.weight, affine.bias))
        torch.testing.assert_close(found, torch.where(coarse, before * (1 + weight) + bias, before))
        assert not torch.allclose(found, before, atol=1e-2)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_new_model_is_neutral(options: dict) -> None:
    torch.manual_seed(0)
    model = APTViT(**SMALL, **options).eval()
    plain = APTViT(**{**SMALL, **options, "coarse_affine": False}).eval()
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if ".outputs." not in n})
    torch.testing.assert_close(model(images())[0], plain(images())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"token_budget": 0.7}], ids=str)
def test_everything_gets_a_gradient(options: dict, dtype: torch.dtype) -> None:
    """Also for images without a coarse patch, as distributed training wants it."""
    noisy = normalise((128 + 60 * noise(1, 3, 32, 36)).clamp(0, 255).round())
    for batch in (images(), noisy):
        model = model_of(**options).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(batch)[0].float().square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_uniform_model_has_none_and_thresholds_can_be_taken_away() -> None:
    assert model_of(thresholds=()).coarse_embed is None
    model = model_of()
    model.set_patches(thresholds=())
    plain = model_of(thresholds=(), coarse_affine=False)
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if "coarse_embed." not in n})
    torch.testing.assert_close(model(images())[0], plain(images())[0])


def test_pyramids_on_tokens_see_it() -> None:
    model = randomise(PyramidBackbone(APTViT(**SMALL), 8), 0.2)
    expected = SimpleFeaturePyramid.forward(model, model.net(images())[-1])
    for level, other in zip(model(images()).values(), expected, strict=True):
        torch.testing.assert_close(level, other, atol=1e-4, rtol=1e-4)


def test_files_tell_of_it_and_other_formats_have_no_place() -> None:
    model = APTViT(**SMALL, out_indices=(0, 1))
    assert APTViT.from_weights(model.state_dict()).options.coarse_affine
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert told_by(plain).arguments["coarse_affine"]
    assert any("outputs." in name for name in from_apt(plain, "timm").left_out)
    plain["coarse_embed.outputs.1.bias"][0] = 1
    with pytest.raises(ValueError, match=r"coarse_embed.outputs.1.bias, which was trained"):
        from_apt(plain, "timm")
