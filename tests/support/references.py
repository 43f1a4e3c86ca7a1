"""Plain references: what the operations mean, as loops over tiny inputs, and makers of such inputs."""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from apt_dense.layout.packed import build_layout
from apt_dense.layout.tokens import TokenLayout
from apt_dense.options import PixelFormat, Rotary

HALF = PixelFormat((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))


class Token(NamedTuple):
    """One patch of a scale map: its image, its scale and its top left cell."""

    image: int
    scale: int
    y: int
    x: int

    def cells(self) -> list[tuple[int, int, int]]:
        """Image, row and column of all cells it covers."""
        side = range(2**self.scale)
        return [(self.image, self.y + dy, self.x + dx) for dy in side for dx in side]

    def centre(self) -> tuple[float, float]:
        """The mean of the rows and of the columns it covers."""
        cells = self.cells()
        return sum(y for _, y, _ in cells) / len(cells), sum(x for _, _, x in cells) / len(cells)


IMAGENET = PixelFormat()


def normalise(pixels: Tensor, pixel_format: PixelFormat = IMAGENET) -> Tensor:
    """RGB grey levels (B, 3, H, W) in [0, 255] -> what a host with that format hands to the backbone."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (pixel_format.mean, pixel_format.std))
    ordered = pixels if pixel_format.channel_order == "RGB" else pixels.flip(1)
    return (ordered.float() - mean) / std


def released_entropy(pixels: Tensor, size: int) -> Tensor:
    """The released batched definition, patch by patch: RGB (3, H, W) in [0, 255] -> bits (H // size, W // size)."""
    red, green, blue = pixels.float()
    grey = 0.2989 * red + 0.5870 * green + 0.1140 * blue
    bins = torch.floor(grey * 2).clamp(0, 511).long()
    scores = torch.zeros(bins.shape[0] // size, bins.shape[1] // size)
    for row in range(scores.shape[0]):
        for column in range(scores.shape[1]):
            patch = bins[row * size : (row + 1) * size, column * size : (column + 1) * size]
            p = torch.bincount(patch.flatten(), minlength=512).float() / size**2
            scores[row, column] = -(p * torch.log2(p + 1e-10)).sum()
    return scores


def random_scale_map(
    rng: random.Random, batch: int, h: int, w: int, num_scales: int = 3, window_size: int = 0, dropped: float = 0.0
) -> Tensor:
    """A random partition (B, h, w) int8: patches of every scale, none across a window's border, some dropped."""
    scale_map = torch.zeros(batch, h, w, dtype=torch.int8)
    for image in range(batch):
        density = rng.random()
        for scale in range(num_scales - 1, 0, -1):
            side = 2**scale
            for y in range(0, h - side + 1, side):
                for x in range(0, w - side + 1, side):
                    block = scale_map[image, y : y + side, x : x + side]
                    if within_window(y, x, side, window_size) and not block.any() and rng.random() < density:
                        block.fill_(scale)
        for token in tokens_of(scale_map[image : image + 1]):
            if rng.random() < dropped:
                scale_map[image, token.y : token.y + 2**token.scale, token.x : token.x + 2**token.scale] = -1
    return scale_map


def within_window(y: int, x: int, side: int, window_size: int) -> bool:
    """Whether a block of cells lies in a single window (window_size 0: there are none)."""
    if not window_size:
        return True
    return y // window_size == (y + side - 1) // window_size and x // window_size == (x + side - 1) // window_size


def windows_of(h: int, w: int, window_size: int) -> list[list[tuple[int, int]]]:
    """The cells (row, column) of each window, windows and cells row by row."""
    size = window_size or max(h, w, 1)
    return [
        [(y, x) for y in range(top, min(top + size, h)) for x in range(left, min(left + size, w))]
        for top in range(0, h, size)
        for left in range(0, w, size)
    ]


def tokens_by_window(scale_map: Tensor, window_size: int = 0) -> list[list[list[Token]]]:
    """The tokens of each image and window, in packed order."""
    h, w = scale_map.shape[1:]
    return [
        [
            [Token(image, cells[y][x], y, x) for y, x in window if _is_anchor(cells[y][x], y, x)]
            for window in windows_of(h, w, window_size)
        ]
        for image, cells in enumerate(scale_map.tolist())
    ]


def tokens_of(scale_map: Tensor, window_size: int = 0) -> list[Token]:
    """The tokens of a batch, in packed order."""
    return [token for image in tokens_by_window(scale_map, window_size) for window in image for token in window]


def _is_anchor(scale: int, y: int, x: int) -> bool:
    return scale >= 0 and y % 2**scale == 0 and x % 2**scale == 0


def is_partition(scale_map: Tensor, num_scales: int) -> bool:
    """Whether every marked cell belongs to an aligned block that is marked like it as a whole."""
    for cells in scale_map.tolist():
        for y, row in enumerate(cells):
            for x, scale in enumerate(row):
                if scale < 0:
                    continue
                side = 2**scale
                top, left = y // side * side, x // side * side
                if scale >= num_scales or top + side > len(cells) or left + side > len(row):
                    return False
                if any(cells[top + dy][left + dx] != scale for dy in range(side) for dx in range(side)):
                    return False
    return True


def layout_of(*lengths: int) -> TokenLayout:
    """A layout of images with that many tokens each, all of scale 0 and in a single row."""
    scale_map = torch.full((len(lengths), 1, max(lengths, default=1)), -1)
    for image, length in enumerate(lengths):
        scale_map[image, :, :length] = 0
    return build_layout(scale_map, 1)


def randomise(model: nn.Module, std: float = 0.1, seed: int = 0) -> nn.Module:
    """Give every parameter, biases and norms too, a value that shows when it is left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(seed: int, size: tuple[int, int], batch: int = 2) -> Tensor:
    """Patches of several amounts of noise, so that each scale merges at another factor."""
    generator = torch.Generator().manual_seed(seed)
    amount = torch.rand(batch, 1, -(-size[0] // 8), -(-size[1] // 8), generator=generator) ** 3 * 60
    amount = amount.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., : size[0], : size[1]]
    grey = 128 + amount * torch.randn(batch, 3, *size, generator=generator)
    return normalise(grey.round().clamp(0, 255))


def bicubic(position: float, size: int, scale: float) -> list[float]:
    """Weights over ``size`` samples of a cubic filter (a = -0.5) at a continuous position, widened by ``scale``."""
    width = max(scale, 1.0)
    weights = [_cubic(abs(sample + 0.5 - position) / width) for sample in range(size)]
    return [weight / sum(weights) for weight in weights]


def _cubic(x: float) -> float:
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def naive_rotary(rotary: Rotary, channels: int, y: float, x: float, size: tuple[int, int]) -> Tensor:
    """Sines and cosines (2 * channels,) for row y and column x of a grid of that size, cell i being at i."""
    angles = []
    axes = [(y, size[0], 0), (x, size[1], 1)]
    for place, cells, axis in axes if rotary.grid_indexing == "ij" else reversed(axes):
        place = place + rotary.grid_offset
        if rotary.rope_type == "dinov3":
            place = 2 * math.pi * ((place + 0.5) / cells * 2 - 1)
        elif rotary.ref_feat_shape is not None:
            place = place / cells * rotary.ref_feat_shape[axis]
        angles += [place / rotary.temperature ** (4 * i / channels) for i in range(channels // 4)]
    half = channels // 2
    each = [angles[c % half if rotary.rotate_half else c // 2] for c in range(channels)]
    return torch.tensor([math.sin(angle) for angle in each] + [math.cos(angle) for angle in each])


def in_padded_windows(attention: nn.Module, grid: Tensor, size: int, **options: Any) -> Tensor:
    """Attention of timm's, inside windows of a grid (h, w, C) filled up with zeros: (h, w, C)."""
    h, w, _ = grid.shape
    padded = F.pad(grid, (0, 0, 0, -w % size, 0, -h % size))
    windows = padded.unfold(0, size, size).unfold(1, size, size).permute(0, 1, 3, 4, 2)
    out = attention(windows.flatten(2, 3).flatten(0, 1), **options).view(windows.shape)
    return out.transpose(1, 2).reshape(padded.shape)[:h, :w]


def litter(dtype: torch.dtype) -> None:
    """Leave NaN in memory that is handed out next, so that what reads memory nobody wrote is found."""
    _ = [torch.full((2**bits,), torch.nan, dtype=dtype) for bits in range(4, 20)]


class Convolutions(TorchDispatchMode):
    """Takes note of the narrower side that each of PyTorch's convolutions makes, or if transposed takes."""

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.sides.append(min((args[0] if args[6] else out).shape[-2:]))
        return out
