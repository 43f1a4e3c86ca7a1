"""Learned scorers with random weights whose scores spread."""

from collections.abc import Sequence

import timm
import torch
from torch import Tensor

from apt_dense.patches.scorer_layers import Layer, Shape

from support.references import randomise

MODEL = "test_vit"  # timm's smallest: 64 channels, 6 blocks, patches of 16 pixels


def random_head(shapes: Sequence[Shape], seed: int = 0) -> list[Layer]:
    """Convolutions of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for inside, outside, kernel, _ in shapes:
        weight = torch.randn(outside, inside, kernel, kernel, generator=generator) * (2 / (inside * kernel**2)) ** 0.5
        layers.append(Layer(3 * weight if outside == 1 else weight, torch.randn(outside, generator=generator) * 0.1))
    return layers


def random_vit_weights(seed: int = 0) -> dict[str, Tensor]:
    """A state dict of ``MODEL``, far from its initial zeros."""
    return randomise(timm.create_model(MODEL, num_classes=0), 0.1, seed).state_dict()
