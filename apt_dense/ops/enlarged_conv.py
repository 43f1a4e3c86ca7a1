"""The 3 x 3 convolution of an enlarged map, computed on the small one."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_TAPS = 3


def conv_of_levels(
    levels: Sequence[Tensor], weight: Tensor, bias: Tensor | None, align_corners: bool = False
) -> Tensor:
    """Compute a 3 x 3 convolution of levels that are enlarged to the size of the first and concatenated.

    Args:
        levels: (B, C_i, h_i, w_i), the largest first.
        weight, bias: (O, sum of C_i, 3, 3) and (O,).
        align_corners: of the bilinear interpolation.

    Returns:
        (B, O, h_0, w_0).
    """
    first, *others = levels
    size = tuple(first.shape[2:])
    weights = weight.split([level.shape[1] for level in levels], dim=1)
    result = F.conv2d(first, weights[0], bias, padding=1)
    for level, part in zip(others, weights[1:], strict=True):
        result = result + conv_of_enlarged(level, part, size, align_corners)
    return result


def conv_of_enlarged(x: Tensor, weight: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Compute ``conv2d(interpolate(x, size, mode="bilinear"), weight, padding=1)`` without the enlarged map.

    Both are linear, so that channels are mixed for all nine taps on the small map, and the taps are enlarged, shifted
    and added afterwards, rows and columns apart. For C channels in and out, twice the size costs a third of the
    products, four times a tenth. Values and gradients are the same to rounding.

    Args:
        x: (B, C, h, w).
        weight: (O, C, 3, 3).
        size: (H, W) of the enlarged map.
        align_corners: as for ``interpolate``.

    Returns:
        (B, O, H, W).
    """
    (batch, channels, h, w), out_channels = x.shape, weight.shape[0]
    by_row = x.transpose(1, 2).contiguous().view(-1, channels, 1, w)  # so that what is added lies together
    by_tap = weight.permute(2, 0, 3, 1).reshape(-1, channels, 1, 1)  # rows' tap, output, columns' tap
    columns = _shifted_weights(w, size[1], align_corners, x).flatten(0, 1)  # (3 w, W)
    wide = F.conv2d(by_row, by_tap).reshape(-1, _TAPS * w) @ columns  # (B h 3 O, W)
    rows = _shifted_weights(h, size[0], align_corners, x).transpose(0, 1).flatten(0, 1)  # (h 3, H)
    high = rows.T @ wide.view(batch, h * _TAPS, out_channels * size[1])
    return high.view(batch, size[0], out_channels, size[1]).transpose(1, 2)


def _shifted_weights(count: int, enlarged: int, align_corners: bool, like: Tensor) -> Tensor:
    """What ``count`` values add to those next before, at and after each of ``enlarged`` ones: (3, count, enlarged).
    Beyond the edge there is nothing, as where a convolution pads with zeros."""
    precision = torch.promote_types(like.dtype, torch.float32)
    unit = torch.eye(count, dtype=precision, device=like.device)[None]
    weights = F.interpolate(unit, size=enlarged, mode="linear", align_corners=align_corners)[0]
    padded = F.pad(weights, (1, 1)).to(like.dtype)
    return torch.stack([padded[:, tap : tap + enlarged] for tap in range(_TAPS)])
