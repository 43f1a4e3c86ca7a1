"""The 3 x 3 convolution of enlarged maps, computed on the small ones.

Shape letters: B images, C channels in, O channels out, h x w a map, H x W the enlarged one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.runtime import computes_in_16_bits

_TAPS = 3


def conv_of_levels(
    levels: Sequence[Tensor], weight: Tensor, bias: Tensor | None, align_corners: bool = False
) -> Tensor:
    """Compute a 3 x 3 convolution of levels that are enlarged to the size of the first and concatenated. Each level is
    convolved at its own size where that takes fewer operations.

    Args:
        levels: (B, C_i, h_i, w_i), the first with the size of the result.
        weight, bias: (O, sum of C_i, 3, 3) and (O,).
        align_corners: of the bilinear interpolation.

    Returns:
        (B, O, h_0, w_0).
    """
    size = tuple(levels[0].shape[2:])
    parts = zip(levels, weight.split([level.shape[1] for level in levels], dim=1), strict=True)
    small, large = [], []
    for level, part in parts:
        (small if _is_cheaper(level, size) else large).append((level, part))
    enlarged = [level if level.shape[2:] == size else _enlarge(level, size, align_corners) for level, _ in large]
    result = F.conv2d(_joined(enlarged), _joined([part for _, part in large]), bias, padding=1)
    for level, part in small:
        result = result + conv_of_enlarged(level, part, size, align_corners)
    return result


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _is_cheaper(x: Tensor, size: tuple[int, int]) -> bool:
    """Check whether :func:`conv_of_enlarged` takes fewer operations than enlarging and convolving."""
    (channels, h, w), (high, wide) = x.shape[1:], size
    own = _TAPS**2 * channels * h * w + _TAPS**2 * h * w * wide + _TAPS * h * high * wide  # times 2 O
    return own < _TAPS**2 * channels * high * wide


def _enlarge(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def conv_of_enlarged(x: Tensor, weight: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Compute ``conv2d(interpolate(x, size, mode="bilinear"), weight, padding=1)`` without the enlarged map.

    Both are linear, so that channels are mixed for all nine taps on the small map, and the taps are enlarged, shifted
    and added afterwards, rows and columns apart. Values and gradients are the same to rounding. With 512 channels and
    an enlarged map of 128 x 128, twice the size takes a third of the operations, four times a tenth.

    Args:
        x: (B, C, h, w).
        weight: (O, C, 3, 3).
        size: (H, W).
        align_corners: as for ``interpolate``.

    Returns:
        (B, O, H, W).
    """
    (batch, _, h, w), out_channels = x.shape, weight.shape[0]
    columns = _shifted_weights(w, size[1], align_corners, x).flatten(0, 1)  # (3 w, W)
    wide = _mix(x, weight).reshape(-1, _TAPS * w) @ columns  # (B h 3 O, W)
    rows = _shifted_weights(h, size[0], align_corners, x).transpose(0, 1).flatten(0, 1)  # (h 3, H)
    high = rows.T @ wide.view(batch, h * _TAPS, out_channels * size[1])
    return high.view(batch, size[0], out_channels, size[1]).transpose(1, 2)


def _mix(x: Tensor, weight: Tensor) -> Tensor:
    """The products of all taps: (B h, 3 O 3, w), by the tap's row, output, and the tap's column."""
    channels = x.shape[1]
    by_row = x.transpose(1, 2).flatten(0, 1)  # (B h, C, w)
    by_tap = weight.permute(2, 0, 3, 1).reshape(-1, channels)
    if computes_in_16_bits(x):  # in which PyTorch's convolutions of a single row may be wrong on CPUs
        return by_tap @ by_row
    # By oneDNN, which is faster than products where MKL is slow.
    return F.conv2d(by_row.contiguous()[:, :, None], by_tap[..., None, None])[:, :, 0]


def _shifted_weights(count: int, enlarged: int, align_corners: bool, like: Tensor) -> Tensor:
    """Interpolation weights of ``count`` values, shifted by each tap: (3, count, enlarged). Beyond the edge they are
    zero, as a convolution pads."""
    precision = torch.promote_types(like.dtype, torch.float32)
    unit = torch.eye(count, dtype=precision, device=like.device)[None]
    weights = F.interpolate(unit, size=enlarged, mode="linear", align_corners=align_corners)[0]
    padded = F.pad(weights, (1, 1)).to(like.dtype)
    return torch.stack([padded[:, tap : tap + enlarged] for tap in range(_TAPS)])
