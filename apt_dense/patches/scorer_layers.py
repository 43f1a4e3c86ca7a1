"""Convolutions with a ReLU between them: how learned scorers end, and how files hold them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layer(NamedTuple):
    """Weight and bias of a convolution."""

    weight: Tensor
    bias: Tensor


class Shape(NamedTuple):
    """Channels in and out, kernel and stride of a layer."""

    inside: int
    outside: int
    kernel: int
    stride: int = 1


def convolve(layers: Sequence[Layer], shapes: Sequence[Shape], x: Tensor) -> Tensor:
    """(B, C, H, W) through all layers, each padded with zeros by half of its kernel; all but the last end in a ReLU."""
    for number, (shape, layer) in enumerate(zip(shapes, layers, strict=True)):
        x = F.conv2d(x if number == 0 else x.relu(), layer.weight, layer.bias, shape.stride, shape.kernel // 2)
    return x


def tensors_of(layers: Sequence[Layer], prefix: str = "") -> dict[str, Tensor]:
    """Weights and biases by the names that they have in a file."""
    return {
        f"{prefix}{number}.{name}": tensor.detach().cpu().contiguous()
        for number, layer in enumerate(layers)
        for name, tensor in layer._asdict().items()
    }


def layers_from(
    tensors: Mapping[str, Tensor], shapes: Sequence[Shape], path: str | Path, prefix: str = ""
) -> list[Layer]:
    """The layers that :func:`tensors_of` named.

    Raises:
        ValueError: for one that is not there, of another shape or type, or not finite.
    """
    return [
        Layer(
            _checked(
                tensors, f"{prefix}{number}.weight", (shape.outside, shape.inside, shape.kernel, shape.kernel), path
            ),
            _checked(tensors, f"{prefix}{number}.bias", (shape.outside,), path),
        )
        for number, shape in enumerate(shapes)
    ]


def _checked(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], path: str | Path) -> Tensor:
    found = tensors.get(name)
    is_right = found is not None and tuple(found.shape) == shape and found.dtype == torch.float32
    if not is_right or not found.isfinite().all():
        held = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}, or NaN or infinity"
        raise ValueError(
            f"scorer={str(path)!r} holds {held} as {name}; expected finite float32 {shape}, as tools/fit_scorer.py "
            f"writes"
        )
    return found
