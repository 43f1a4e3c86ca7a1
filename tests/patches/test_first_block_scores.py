"""Scores from the first blocks of a ViT: against timm's whole model, and models that choose patches by them."""

import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from apt_dense import APTViT, PatchSelector
from apt_dense.patches.first_block_scores import FirstBlockScorer, features, first_blocks, head_shapes
from apt_dense.patches.scorer_files import as_bytes
from apt_dense.patches.scorer_layers import Layer

from support.contract import assert_maps_close
from support.scorers import MODEL, random_head, random_vit_weights

TINY = {"img_size": 64, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def scorer() -> FirstBlockScorer:
    vit = first_blocks(MODEL, 3, random_vit_weights())
    return FirstBlockScorer(MODEL, vit, random_head(head_shapes(vit)))


@pytest.fixture
def file(tmp_path: Path, scorer: FirstBlockScorer) -> Path:
    path = tmp_path / "scorer.safetensors"
    path.write_bytes(as_bytes(scorer))
    return path


def pixels_of(rows: int, columns: int, batch: int = 1) -> Tensor:
    return torch.randint(0, 256, (batch, 3, rows, columns), generator=torch.Generator().manual_seed(0)).float()


def module_of(head: tuple[Layer, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for weight, bias in head:
        layer = nn.Conv2d(*weight.shape[1::-1], weight.shape[-1], padding="same")
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def naive(scorer: FirstBlockScorer, pixels: Tensor, size: int) -> Tensor:
    """timm's whole model at the size of the shrunk image, block by block; normalised by 0.5, as that model is."""
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
    for block in whole.blocks[:3]:
        x = block(x)
    tokens = x[:, whole.num_prefix_tokens :]
    tokens = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    maps = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    return torch.sigmoid(module_of(scorer.head)(maps)[:, 0]) ** 2


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (41, 100), (32, 90), (32, 32)])
@torch.no_grad()
def test_a_patch_is_one_token_of_the_shrunk_image(scorer: FirstBlockScorer, rows: int, columns: int) -> None:
    pixels = pixels_of(rows, columns, batch=2)
    one, two = scorer(pixels, 8, [1, 2])
    torch.testing.assert_close(one, naive(scorer, pixels, 16), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(two, naive(scorer, pixels, 32), atol=1e-5, rtol=1e-4)
    assert one.min() >= 0 and one.max() <= 1 and one.std() > 0.01


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (15, 200), (7, 7)])
def test_images_without_a_whole_patch_have_no_scores(scorer: FirstBlockScorer, rows: int, columns: int) -> None:
    (found,) = scorer(pixels_of(rows, columns), 8, [1])
    assert found.shape == (1, rows // 16, columns // 16) and found.numel() == 0


def test_images_of_a_batch_are_scored_alone(scorer: FirstBlockScorer) -> None:
    pixels = pixels_of(48, 80, batch=3)
    (together,) = scorer(pixels, 4, [1])
    for number in range(3):
        torch.testing.assert_close(scorer(pixels[number : number + 1], 4, [1])[0][0], together[number])


@pytest.mark.parametrize("level", [0.0, 255.0])
def test_flat_images_have_finite_scores(scorer: FirstBlockScorer, level: float) -> None:
    (found,) = scorer(torch.full((1, 3, 32, 32), level), 4, [1])
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("model", "blocks", "words"),
    [
        ("test_vit", 2, None),
        ("vit_small_patch16_dinov3", 1, None),
        ("vit_base_patch16_clip_quickgelu_224", 1, None),
        ("vit_small_patch14_dinov2.lvd142m", 1, None),
        ("vit_small_patch14_dinov2.nothing", 1, "is no ViT"),
        ("nothing", 1, "timm has no model 'nothing'"),
        ("resnet18", 1, "is no ViT"),
        ("swin_tiny_patch4_window7_224", 1, "is no ViT"),
        ("beit_base_patch16_224", 1, "is no ViT"),
    ],
)
def test_models_with_blocks_of_tokens_serve(model: str, blocks: int, words: str | None) -> None:
    if words:
        with pytest.raises(ValueError, match=words):
            first_blocks(model, blocks, {})
        return
    weights = timm.create_model(model, depth=blocks, num_classes=0).state_dict()
    vit = first_blocks(
        model, blocks, {**weights, "blocks.99.norm1.weight": torch.ones(1), "head.weight": torch.ones(1)}
    )
    assert features(vit, pixels_of(24, 40), 8).shape == (1, vit.embed_dim, 3, 5)


def test_nothing_is_drawn_from_the_generator() -> None:
    weights = random_vit_weights()
    torch.manual_seed(0)
    first_blocks(MODEL, 1, weights)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("budget", [None, 0.6])
def test_models_choose_by_it_and_can_be_copied(file: Path, budget: float | None) -> None:
    images = torch.randn(2, 3, 64, 40, generator=torch.Generator().manual_seed(0))
    scores = PatchSelector(patch_size=4, thresholds=(0.1,), scorer=str(file)).scores(images)
    model = APTViT(**TINY, thresholds=(float(scores[0].median()),), scorer=str(file), token_budget=budget).eval()
    kept = model.patches.tokens_kept(images)
    assert kept.min() > 0.3 and kept.max() < 0.9
    with torch.no_grad():
        expected = model(images)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_maps_close(list(other(images)), list(expected), 0)
        if budget:
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            exported = torch.export.export(model, (images,), strict=False).module()
            for graph in (compiled, exported):
                assert_maps_close(list(graph(images)), list(expected), 1e-5)


def test_nothing_learns_it(file: Path) -> None:
    """Not a parameter, nor in the state dict; scores have no gradient."""
    model, plain = APTViT(**TINY, thresholds=(0.1,), scorer=str(file)), APTViT(**TINY, thresholds=(5.0,))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    scorer = model.train().patches.score
    assert not scorer.vit.training and not any(p.requires_grad for p in scorer.vit.parameters())
    assert not model.patches.scores(torch.randn(1, 3, 32, 32).requires_grad_())[0].requires_grad


def test_16_bit_images_are_scored_in_float32(file: Path) -> None:
    selector = PatchSelector(patch_size=4, thresholds=(0.1,), scorer=str(file))
    images = torch.randn(1, 3, 32, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = selector.scores(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, selector.scores(images.float())[0])


@pytest.mark.cuda
def test_it_follows_the_images_to_a_gpu(file: Path) -> None:
    selector = PatchSelector(patch_size=4, thresholds=(0.1,), scorer=str(file))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        selector.scores(images.cuda())[0].cpu(), selector.scores(images)[0], atol=1e-3, rtol=1e-2
    )
