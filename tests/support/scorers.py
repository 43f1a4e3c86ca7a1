"""Learned scorers with random weights whose scores spread."""

from collections.abc import Sequence

import timm
import torch
from torch import Tensor

from apt_dense.patches.first_block_scores import HEAD, VIT, FirstBlocks, FirstBlockScorer
from apt_dense.patches.learned_scores import LAYERS, LearnedScorer
from apt_dense.patches.scorer_layers import FixedScorer, Layer, Shape, weights_of

from support.references import randomise

MODEL, BLOCKS = "test_vit", 3  # timm's smallest: 64 channels, 6 blocks, patches of 16 pixels
PADDING = (124.0, 116.0, 104.0)


def random_layers(shapes: Sequence[Shape], seed: int = 0) -> list[Layer]:
    """Convolutions of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for inside, outside, kernel, _ in shapes:
        weight = torch.randn(outside, inside, kernel, kernel, generator=generator) * (2 / (inside * kernel**2)) ** 0.5
        layers.append(Layer(3 * weight if outside == 1 else weight, torch.randn(outside, generator=generator) * 0.1))
    return layers


def random_vit_weights(model: str = MODEL, seed: int = 0) -> dict[str, Tensor]:
    """A state dict of a timm ViT, far from its initial zeros."""
    return randomise(timm.create_model(model, num_classes=0), 0.1, seed).state_dict()


def random_scorer(kind: type[FixedScorer], seed: int = 0) -> FixedScorer:
    """A scorer of either kind."""
    if kind is LearnedScorer:
        return LearnedScorer(weights_of(random_layers(LAYERS, seed)), PADDING)
    blocks, state = FirstBlocks(MODEL, BLOCKS), random_vit_weights(seed=seed)
    own = {name: state[name.removeprefix(VIT)] for name in blocks.sizes}
    return FirstBlockScorer(blocks, own | weights_of(random_layers(blocks.head_shapes, seed), HEAD))


def pixels_of(rows: int, columns: int, batch: int = 1) -> Tensor:
    """Noise (batch, 3, rows, columns): RGB grey levels."""
    return torch.randint(0, 256, (batch, 3, rows, columns), generator=torch.Generator().manual_seed(0)).float()
