"""Base class of learned scorers, and their convolutions."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


class FixedScorer(ABC):
    """A scorer (``apt_dense.patches.scores.Scorer``) with fixed weights.

    Scores are between 0 and 1: about what merging the patch hides, by labels the share of its pixels that are of
    another class than most of it.

    Args:
        weights: float32 on the CPU, by their names in a file.
    """

    #: In the note of a file, the name of what it holds.
    KIND: ClassVar[str]
    #: Whether it computes in the type of autocast, as ``score_maps`` calls it.
    follows_autocast: ClassVar[bool] = False

    def __init__(self, weights: Weights) -> None:
        self.weights = dict(weights)
        self._on_device: dict[torch.device, Weights] = {}

    def __call__(self, pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
        """Score pixels (B, 3, H, W) float32 RGB in [0, 255]: one map (B, H // size, W // size) in (0, 1) per scale."""
        images = self.normalise(pixels)
        return tuple(self._map(images, patch_size * 2**scale) for scale in scales)

    def _map(self, images: Tensor, size: int) -> Tensor:
        rows, columns = (n // size for n in images.shape[-2:])
        if rows == 0 or columns == 0:
            return images.new_zeros(len(images), rows, columns)
        return torch.sigmoid(self.logits(images, size)).square()

    @abstractmethod
    def normalise(self, pixels: Tensor) -> Tensor:
        """Grey levels -> what the network expects, of the same shape."""

    @abstractmethod
    def logits(self, images: Tensor, size: int) -> Tensor:
        """Normalised images (B, 3, H, W), of at least one patch of ``size`` pixels -> (B, H // size, W // size)."""

    @abstractmethod
    def note(self) -> dict[str, Any]:
        """Metadata stored with the weights."""

    def weights_on(self, device: torch.device) -> Weights:
        """The weights, copied to each device once."""
        if device not in self._on_device:
            self._on_device[device] = {name: weight.to(device) for name, weight in self.weights.items()}
        return self._on_device[device]

    def __getstate__(self) -> dict[str, Any]:
        """All but the copies on devices, which another process may not have."""
        return {**self.__dict__, "_on_device": {}}


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) minus the mean, divided by the deviation of each channel."""
    # Channel by channel: a tensor of means would have to be copied to the device, which CUDA graphs do not record.
    return torch.stack([(pixels[:, i] - mean[i]) / std[i] for i in range(3)], 1)


class Layer(NamedTuple):
    """Weight and bias of a convolution."""

    weight: Tensor
    bias: Tensor


class Shape(NamedTuple):
    """The sizes of a convolution."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1


def convolve(weights: Weights, shapes: Sequence[Shape], x: Tensor, prefix: str = "") -> Tensor:
    """(B, C, H, W) through all layers, each padded with zeros by half of its kernel; all but the last end in a ReLU."""
    for number, shape in enumerate(shapes):
        weight, bias = (weights[f"{prefix}{number}.{name}"] for name in Layer._fields)
        x = F.conv2d(x if number == 0 else x.relu(), weight, bias, shape.stride, shape.kernel_size // 2)
    return x


def weights_of(layers: Sequence[Layer], prefix: str = "") -> dict[str, Tensor]:
    """Weights and biases by the names that they have in a file."""
    return {
        f"{prefix}{number}.{name}": tensor.detach().cpu().contiguous()
        for number, layer in enumerate(layers)
        for name, tensor in layer._asdict().items()
    }


def sizes_of(shapes: Sequence[Shape], prefix: str = "") -> dict[str, tuple[int, ...]]:
    """The sizes of the tensors that :func:`weights_of` names."""
    sizes: dict[str, tuple[int, ...]] = {}
    for number, shape in enumerate(shapes):
        sizes[f"{prefix}{number}.weight"] = shape.out_channels, shape.in_channels, *[shape.kernel_size] * 2
        sizes[f"{prefix}{number}.bias"] = (shape.out_channels,)
    return sizes


def checked(weights: Weights, sizes: Mapping[str, tuple[int, ...]], path: str | Path) -> dict[str, Tensor]:
    """Those weights of a file that have a size here.

    Raises:
        ValueError: for one that is not there, of another size or type, or not finite.
    """
    for name, size in sizes.items():
        found = weights.get(name)
        is_right = found is not None and tuple(found.shape) == size and found.dtype == torch.float32
        if not is_right or not found.isfinite().all():
            held = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}, or NaN or infinity"
            raise ValueError(
                f"scorer={str(path)!r} holds {held} as {name}; expected finite float32 {size}, as "
                f"tools/fit_scorer.py writes: recreate it"
            )
    return {name: weights[name] for name in sizes}
