"""Pre-norm transformer blocks on packed rows (R, C).

Parameters are named as in timm's ``vision_transformer.Block`` and in Detectron2's ViT.
"""

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from apt_dense.layout.scatter import gather_tokens, scatter_tokens
from apt_dense.layout.tokens import TokenLayout
from apt_dense.nn.attention import Attention
from apt_dense.nn.layers import make_layer_scale, make_mlp, make_norm
from apt_dense.nn.rotary import RotaryTables
from apt_dense.ops.cpu_layers import call_layer, call_on_map
from apt_dense.ops.onednn_matmul import fill_up
from apt_dense.options import BlockOptions


class DropPath(nn.Module):
    """Stochastic depth per image: all rows of an image keep or lose the branch together.

    timm's DropPath draws along axis 0, which in a packed sequence are single tokens.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop path rate {rate} is not in [0, 1)")
        self.rate = rate

    def forward(self, branch: Tensor, layout: TokenLayout) -> Tensor:
        """Rows (R, C) -> (R, C), those of dropped images zero and the others scaled up."""
        if not self.training or self.rate == 0:
            return branch
        kept = branch.new_empty(layout.batch).bernoulli_(1 - self.rate) / (1 - self.rate)
        return branch * fill_up(kept[layout.image_R, None], len(branch))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class ConvResidual(nn.Module):
    """ViTDet's convolutional propagation: a bottleneck of 1x1, 3x3 and 1x1 convolutions on the feature map, added to
    the tokens; names as in Detectron2's ResBottleneckBlock. Starts as the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = dim // 2
        self.conv1, self.norm1, self.act1 = nn.Conv2d(dim, width, 1, bias=False), LayerNorm2d(width), nn.GELU()
        self.conv2, self.norm2, self.act2 = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            LayerNorm2d(width),
            nn.GELU(),
        )
        self.conv3, self.norm3 = nn.Conv2d(width, dim, 1, bias=False), LayerNorm2d(dim)
        for conv in (self.conv1, self.conv2, self.conv3):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Rows (R, C) -> (R, C): a coarse token gets the mean of what its cells would."""
        feature_map = scatter_tokens(x, layout)
        for layer in self.children():
            feature_map = call_on_map(layer, feature_map)
        return x + gather_tokens(feature_map, layout, len(x))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), each branch perhaps scaled per channel, then perhaps a
    convolutional residual."""

    def __init__(
        self,
        dim: int,
        options: BlockOptions,
        drop_path: float = 0.0,
        windowed: bool = False,
        rel_pos_size: tuple[int, int] | None = None,
        conv_residual: bool = False,
    ) -> None:
        super().__init__()
        norm = make_norm(options)
        self.norm1 = norm(dim)
        self.attn = Attention(dim, options, windowed, rel_pos_size)
        self.ls1 = make_layer_scale(dim, options)
        self.norm2 = norm(dim)
        self.mlp = make_mlp(dim, options)
        self.ls2 = make_layer_scale(dim, options)
        self.drop_path = DropPath(drop_path)
        self.residual = ConvResidual(dim) if conv_residual else None

    def forward(self, x: Tensor, layout: TokenLayout, rotary: RotaryTables | None = None) -> Tensor:
        """Rows (R, C) -> (R, C)."""
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), layout, rotary)), layout)
        x = x + self.drop_path(self.ls2(call_layer(self.mlp, self.norm2(x))), layout)
        return x if self.residual is None else self.residual(x, layout)
