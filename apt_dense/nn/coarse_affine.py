"""What tells heads a coarse token from a fine one: its output channels, scaled and shifted."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apt_dense.layout.tokens import TokenLayout


class CoarseAffine(nn.Module):
    """x + (x * weight + bias) for tokens of coarse patches, x for all others. Starts as the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def reset_zero(self) -> None:
        """Make it the identity."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, rows: Tensor, layout: TokenLayout) -> Tensor:
        """Packed rows (R, C) -> (R, C)."""
        return self.where(layout.scale_R > 0, rows)

    def where(self, is_coarse: Tensor, x: Tensor) -> Tensor:
        """Tokens or cells (..., C) -> (..., C), scaled and shifted where (...) is true."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return torch.where(is_coarse[..., None], x + (x * weight + bias), x)


def finish_outputs(
    outputs: Sequence[Tensor], affines: Sequence[CoarseAffine], layout: TokenLayout
) -> tuple[Tensor, ...]:
    """Rows (R, C) of a model's outputs without those that fill up, and with the affine of each, if there are any."""
    rows = tuple(map(layout.real_rows, outputs))
    return tuple(affine(x, layout) for affine, x in zip(affines, rows, strict=True)) if affines else rows
