"""Scores from the first blocks of a ViT: against timm's whole model, block by block."""

import pytest
import timm
import torch
from torch import Tensor, nn

from apt_dense.patches.first_block_scores import HEAD, FirstBlocks, FirstBlockScorer

from support.scorers import BLOCKS, MODEL, pixels_of, random_scorer, random_vit_weights


@pytest.fixture(scope="module")
def scorer() -> FirstBlockScorer:
    return random_scorer(FirstBlockScorer)


def head_of(scorer: FirstBlockScorer) -> nn.Sequential:
    layers: list[nn.Module] = []
    for number in range(3):
        weight, bias = (scorer.weights[f"{HEAD}{number}.{name}"] for name in ("weight", "bias"))
        layer = nn.Conv2d(*weight.shape[1::-1], weight.shape[-1], padding="same")
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def naive(scorer: FirstBlockScorer, pixels: Tensor, size: int) -> Tensor:
    """timm's whole model at the size of the resized image, block by block; normalised by 0.5, as that model is."""
    rows, columns = pixels.shape[-2] // size, pixels.shape[-1] // size
    whole = timm.create_model(MODEL, num_classes=0, img_size=(16 * rows, 16 * columns)).eval()
    weights = random_vit_weights()
    weights["pos_embed"] = timm.layers.resample_abs_pos_embed(
        weights["pos_embed"], (rows, columns), num_prefix_tokens=whole.num_prefix_tokens
    )
    whole.load_state_dict(weights)
    seen = pixels[..., : rows * size, : columns * size] / 127.5 - 1
    seen = nn.functional.interpolate(seen, size=(16 * rows, 16 * columns), mode="bilinear", antialias=True)
    x = whole.norm_pre(whole._pos_embed(whole.patch_embed(seen)))
    for block in whole.blocks[:BLOCKS]:
        x = block(x)
    tokens = x[:, whole.num_prefix_tokens :]
    tokens = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    return torch.sigmoid(head_of(scorer)(tokens.transpose(1, 2).unflatten(2, (rows, columns)))[:, 0]) ** 2


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (41, 100), (32, 90), (32, 32)])
@torch.no_grad()
def test_a_patch_is_one_token_of_the_resized_image(scorer: FirstBlockScorer, rows: int, columns: int) -> None:
    pixels = pixels_of(rows, columns, batch=2)
    one, two = scorer(pixels, 8, [1, 2])
    torch.testing.assert_close(one, naive(scorer, pixels, 16), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(two, naive(scorer, pixels, 32), atol=1e-5, rtol=1e-4)
    assert one.min() >= 0 and one.max() <= 1 and one.std() > 0.01


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (15, 200), (7, 7)])
def test_images_without_a_whole_patch_have_no_scores(scorer: FirstBlockScorer, rows: int, columns: int) -> None:
    (found,) = scorer(pixels_of(rows, columns), 8, [1])
    assert found.shape == (1, rows // 16, columns // 16) and found.numel() == 0


def test_images_of_one_size_are_scored_alone(scorer: FirstBlockScorer) -> None:
    pixels = pixels_of(48, 80, batch=3)
    (together,) = scorer(pixels, 4, [1])
    for number in range(3):
        torch.testing.assert_close(scorer(pixels[number : number + 1], 4, [1])[0][0], together[number])


def test_padding_changes_scores_as_it_changes_a_plain_vit(scorer: FirstBlockScorer) -> None:
    """Its docstring says so; who pads in one way gets the same scores."""
    pixels = pixels_of(48, 48)
    padded = nn.functional.pad(pixels, (0, 32))
    alone, among = scorer(pixels, 8, [1])[0], scorer(padded, 8, [1])[0]
    assert not torch.allclose(alone, among[..., :3], atol=1e-3)
    torch.testing.assert_close(among, scorer(padded, 8, [1])[0], atol=0, rtol=0)


@pytest.mark.parametrize("level", [0.0, 255.0])
def test_flat_images_have_finite_scores(scorer: FirstBlockScorer, level: float) -> None:
    (found,) = scorer(torch.full((1, 3, 32, 32), level), 4, [1])
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("model", "blocks", "words"),
    [
        (MODEL, 0, "the first 0 blocks of test_vit: expected 1 to 6"),
        (MODEL, 7, "the first 7 blocks of test_vit: expected 1 to 6"),
        ("vit_gigantic_patch14_224", 20000, "expected 1 to 48"),
        ("nothing", 1, "timm has no model 'nothing'"),
        ("hf-hub:timm/test_vit", 1, "timm has no model"),
        ("vit_small_patch14_dinov2.nothing", 1, "timm cannot make .*nothing"),
        ("resnet18", 1, "no plain ViT"),
        ("swin_tiny_patch4_window7_224", 1, "no plain ViT"),
        ("eva02_tiny_patch14_224", 1, "no plain ViT"),
        ("vit_tiny_r_s16_p8_224", 1, "no plain ViT"),
        ("vit_base_mci_224", 1, "no plain ViT"),
        ("vitamin_small_224", 1, "no plain ViT"),
    ],
)
def test_other_models_are_named(model: str, blocks: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FirstBlocks(model, blocks)
