"""Scores learned from labels: how much of a patch is expected to show something else than most of it.

A small convolutional network looks at each patch and two patches around it, at 16 pixels a patch whatever its scale, so
one network serves all scales and patch sizes. ``tools/fit_scorer.py`` trains it in minutes and writes it to a file.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

SUFFIX = ".safetensors"
#: Ratio of each scale's threshold to that of the scale below. A patch that replaces four saves a quarter as many tokens
#: for its area as they did, and may hide a quarter.
NEXT_SCALE = 0.25
USUAL_THRESHOLDS = 0.02, 0.02 * NEXT_SCALE  # a patch of the first scale may show something else on 2 % of it
PIXELS = 16  # of a patch, as the network sees it
MARGIN = 3  # patches around the image: what its outermost patches see ends within them
#: Channels in and out, kernel and stride of each layer; all but the last end in a ReLU.
LAYERS = (
    (3, 16, 3, 2), (16, 24, 3, 2), (24, 48, 3, 1), (48, 48, 3, 2), (48, 48, 3, 2), (48, 48, 3, 1), (48, 1, 1, 1),
)  # fmt: skip
_FORMAT = {"apt_dense": json.dumps({"learned_scorer": 1})}


class Layer(NamedTuple):
    """Weight and bias of a convolution."""

    weight: Tensor
    bias: Tensor


class LearnedScorer:
    """A scorer (``apt_dense.patches.scores.Scorer``) with fixed weights.

    Scores are between 0 and 1: about the share of the patch's pixels that are of another class than most of it.

    Args:
        layers: weights and biases, of the shapes of ``LAYERS``.
        padding: RGB grey levels of a host's padding; beyond an image the network sees the same, so that scores do not
            depend on what an image is batched with.
    """

    def __init__(self, layers: Sequence[Layer], padding: Sequence[float]) -> None:
        self.layers, self.padding = tuple(layers), tuple(map(float, padding))
        self._on_device = {layers[0].weight.device: self.layers}

    @staticmethod
    def load(path: str | Path, padding: Sequence[float]) -> "LearnedScorer":
        """Read a file that ``tools/fit_scorer.py`` wrote; nothing in it is run. One that did not change is read once.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it holds anything else, or weights that are not finite.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"scorer={str(path)!r}: there is no such file; tools/fit_scorer.py writes one")
        status = Path(path).stat()
        return _read(str(path), (status.st_mtime_ns, status.st_size), tuple(padding))

    def __call__(self, pixels: Tensor, patch_size: int, scales: Sequence[int]) -> tuple[Tensor, ...]:
        """Score pixels (B, 3, H, W) float32 RGB in [0, 255]: one map (B, H // size, W // size) in (0, 1) per scale."""
        layers = self._layers(pixels.device)
        images = centred(pixels, self.padding)
        return tuple(self._map(images, patch_size * 2**scale, layers) for scale in scales)

    def _map(self, images: Tensor, size: int, layers: Sequence[Layer]) -> Tensor:
        rows, columns = (n // size for n in images.shape[-2:])
        if rows == 0 or columns == 0:
            return images.new_zeros(len(images), rows, columns)
        return torch.sigmoid(run(layers, canvas(images, size))).square()

    def _layers(self, device: torch.device) -> Sequence[Layer]:
        if device not in self._on_device:
            self._on_device[device] = tuple(Layer(*(t.to(device) for t in layer)) for layer in self.layers)
        return self._on_device[device]


@lru_cache(maxsize=16)
def _read(path: str, stamp: tuple[int, int], padding: tuple[float, ...]) -> LearnedScorer:
    """Read a scorer's file; ``stamp`` changes when the file does."""
    try:
        with safe_open(path, "pt") as file:
            is_ours = (file.metadata() or {}).get("apt_dense") == _FORMAT["apt_dense"]
            tensors = {name: file.get_tensor(name) for name in file.keys()} if is_ours else None  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"scorer={path!r} is damaged ({error}); recreate it with tools/fit_scorer.py") from None
    if tensors is None:
        raise ValueError(f"scorer={path!r} is no learned scorer; expected a file of tools/fit_scorer.py")
    return LearnedScorer(_checked(tensors, path), padding)


def centred(pixels: Tensor, padding: Sequence[float]) -> Tensor:
    """RGB grey levels (B, 3, H, W) -> the network's input range, in which ``padding`` is 0."""
    return (pixels - pixels.new_tensor(padding).view(3, 1, 1)) / 255


def canvas(images: Tensor, size: int) -> Tensor:
    """Centred images (B, 3, H, W) -> the same with a margin of padding, at ``PIXELS`` a patch.

    Returns:
        (B, 3, 16 (h + 6), 16 (w + 6)) of h x w complete patches of ``size`` pixels.
    """
    height, width = images.shape[-2:]
    rows, columns = height // size + 2 * MARGIN, width // size + 2 * MARGIN
    margin = MARGIN * size
    around = margin, columns * size - width - margin, margin, rows * size - height - margin
    return F.interpolate(F.pad(images, around), size=(rows * PIXELS, columns * PIXELS), mode="bilinear", antialias=True)


def run(layers: Sequence[Layer], images: Tensor) -> Tensor:
    """The network on a canvas -> logits (B, h, w) of the patches inside its margin."""
    for number, ((_, _, kernel, stride), layer) in enumerate(zip(LAYERS, layers, strict=True)):
        images = F.conv2d(images if number == 0 else images.relu(), layer.weight, layer.bias, stride, kernel // 2)
    return inside(images)


def inside(logits: Tensor) -> Tensor:
    """Logits (B, 1, h + 6, w + 6) of a canvas -> (B, h, w) without its margin."""
    return logits[:, 0, MARGIN:-MARGIN, MARGIN:-MARGIN]


def as_bytes(layers: Sequence[Layer]) -> bytes:
    """The content of a scorer's file."""
    tensors = {f"{number}.{name}": tensor.detach().cpu().contiguous()
               for number, layer in enumerate(layers) for name, tensor in layer._asdict().items()}  # fmt: skip
    return save(tensors, _FORMAT)


def _checked(tensors: Mapping[str, Tensor], path: str | Path) -> list[Layer]:
    layers = []
    for number, (inside, outside, kernel, _) in enumerate(LAYERS):
        shapes = {"weight": (outside, inside, kernel, kernel), "bias": (outside,)}
        for name, shape in shapes.items():
            found = tensors.get(f"{number}.{name}")
            is_right = found is not None and tuple(found.shape) == shape and found.dtype == torch.float32
            if not is_right or not found.isfinite().all():
                held = "nothing" if found is None else f"{found.dtype} {tuple(found.shape)}, or NaN or infinity"
                raise ValueError(
                    f"scorer={str(path)!r} holds {held} as {number}.{name}; expected finite float32 {shape}, as "
                    f"tools/fit_scorer.py writes"
                )
        layers.append(Layer(tensors[f"{number}.weight"], tensors[f"{number}.bias"]))
    return layers
