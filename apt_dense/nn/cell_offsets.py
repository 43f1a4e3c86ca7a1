"""What the cells of a coarse patch have beyond its token, so that labels may differ inside of it.

Shape letters: B images, h x w cells of the base grid, n coarse patches of a scale s, S = 2**s cells of their sides.
"""

from torch import Tensor, nn

from apt_dense.layout.scatter import add_to_cells, top_left_cells
from apt_dense.layout.tokens import TokenLayout
from apt_dense.ops.cpu_layers import call_layer


class CellOffsets(nn.Module):
    """Adds to each quarter of a coarse patch what a linear layer, which starts at zero, makes of its token; of patches
    of higher scales to the quarters of each quarter in the same way. The mirror of ``CoarseEmbed``'s way in."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.quarters = nn.Linear(embed_dim, 4 * embed_dim)
        self.reset_zero()

    def reset_zero(self) -> None:
        """Make all cells of a patch alike."""
        nn.init.zeros_(self.quarters.weight)
        nn.init.zeros_(self.quarters.bias)

    def forward(self, feature_map: Tensor, layout: TokenLayout) -> Tensor:
        """Feature map (B, C, h, w) whose cells hold the token that covers them -> the same with offsets."""
        cells = feature_map.permute(0, 2, 3, 1)
        for patches in layout.candidates[1:]:
            tokens = patches.take(top_left_cells(cells, patches.scale))
            offsets = self.tiles(tokens, patches.scale) - tokens[:, None, None]
            cells = add_to_cells(cells, offsets.to(cells.dtype), patches, layout)
        return cells.permute(0, 3, 1, 2).contiguous()

    def tiles(self, tokens: Tensor, scale: int) -> Tensor:
        """Tokens (n, C) of patches of a scale -> their cells (n, S, S, C)."""
        tiles = tokens[:, None, None]
        for _ in range(scale):
            quarters = call_layer(self.quarters, tiles).unflatten(-1, (2, 2, -1))
            tiles = (tiles[:, :, :, None, None] + quarters).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return tiles
