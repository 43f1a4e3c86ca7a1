"""Per-cell offsets for coarse patches, so that labels can differ within a patch.

Shape letters: B images, h x w cells of the base grid, n coarse patches of scale s, S = 2**s cells a side.
"""

from torch import Tensor, nn

from apt_dense.layout.scatter import add_to_cells, top_left_cells
from apt_dense.layout.tokens import TokenLayout
from apt_dense.ops.cpu_layers import call_layer


class CellOffsets(nn.Module):
    """Split each coarse patch into quarters with a zero-initialized linear layer of its token, once per scale.

    The inverse of the repeated 2 x 2 convolution in ``CoarseEmbed``.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.quarters = nn.Linear(embed_dim, 4 * embed_dim)
        self.reset_zero()

    def reset_zero(self) -> None:
        """Make all cells of a patch alike."""
        nn.init.zeros_(self.quarters.weight)
        nn.init.zeros_(self.quarters.bias)

    def forward(self, feature_map: Tensor, layout: TokenLayout) -> Tensor:
        """Add the offsets to a scattered feature map (B, C, h, w), see ``scatter_tokens``."""
        cells = feature_map.permute(0, 2, 3, 1)
        for patches in layout.candidates[1:]:
            tokens = patches.take(top_left_cells(cells, patches.scale))
            offsets = self.tiles(tokens, patches.scale) - tokens[:, None, None]
            cells = add_to_cells(cells, offsets.to(cells.dtype), patches, layout)
        return cells.permute(0, 3, 1, 2).contiguous()

    def tiles(self, tokens: Tensor, scale: int) -> Tensor:
        """Expand tokens (n, C) of one scale into their cells (n, S, S, C)."""
        tiles = tokens[:, None, None]
        for _ in range(scale):
            quarters = call_layer(self.quarters, tiles).unflatten(-1, (2, 2, -1))
            tiles = (tiles[:, :, :, None, None] + quarters).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return tiles
