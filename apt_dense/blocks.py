"""Pre-norm transformer blocks on packed rows (R, C); parameters are named as in timm's ``vision_transformer.Block``
and Detectron2's ViT."""

import torch
from timm.layers import LayerNorm2d, Mlp
from torch import Tensor, nn

from apt_dense.attention import check_backend, packed_attention
from apt_dense.compiling import outside_graphs
from apt_dense.kernels.terms import PaddingKey, RelativeBias
from apt_dense.layout import TokenLayout
from apt_dense.positions import bias_of_padding, relative_bias_of_queries
from apt_dense.scatter import gather_tokens, scatter_tokens


class Attention(nn.Module):
    """Multi-head self-attention inside each image, or inside each window.

    Args:
        windowed: attend inside windows; the layout must have them.
        rel_pos_size: rows and columns of cells that decomposed relative positions are trained for; None for none.
        backend: of ``attention.packed_attention``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        windowed: bool = False,
        rel_pos_size: tuple[int, int] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim={dim} is no multiple of num_heads={num_heads}")
        self.num_heads, self.windowed, self.backend = num_heads, windowed, check_backend(backend)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = self.rel_pos_w = None
        if rel_pos_size is not None:
            self.rel_pos_h, self.rel_pos_w = (
                nn.Parameter(torch.zeros(2 * size - 1, dim // num_heads)) for size in rel_pos_size
            )

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Rows (R, C) -> (R, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        attend = self._attend if layout.is_fixed else outside_graphs(self._attend)
        return self.proj(attend(q, k, v, layout).flatten(1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        segments = layout.windows if self.windowed else layout.images
        bias = self._relative_bias(q, layout)
        return packed_attention(q, k, v, segments, bias, self._padding_key(q, bias, layout), self.backend)

    def _relative_bias(self, q: Tensor, layout: TokenLayout) -> RelativeBias | None:
        if self.rel_pos_h is None:
            return None
        cells = layout.window_cells if self.windowed else layout.image_cells
        queries = relative_bias_of_queries(q, self.rel_pos_h.to(q.dtype), self.rel_pos_w.to(q.dtype), cells, layout)
        return RelativeBias(queries, cells)

    def _padding_key(self, q: Tensor, bias: RelativeBias | None, layout: TokenLayout) -> PaddingKey | None:
        """The key that Detectron2's padding of windows that are cut short amounts to."""
        if not self.windowed or layout.window_cells.rows_N is None:
            return None
        logit = bias_of_padding(bias and bias.queries_RHK, layout.window_cells)
        if self.qkv.bias is None:
            zero = q.new_zeros(q.shape[1:])
            return PaddingKey(logit, zero, zero)
        _, k, v = self.qkv.bias.to(q.dtype).unflatten(0, (3, *q.shape[1:])).unbind(0)
        return PaddingKey(logit, k, v)


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
        return branch * kept[layout.image_R, None]

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class ConvResidual(nn.Module):
    """ViTDet's convolutional propagation: a bottleneck of 1x1, 3x3 and 1x1 convolutions on the feature map, added to
    the tokens; names as in Detectron2's ResBottleneckBlock. Starts as the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = dim // 2
        self.conv1, self.norm1, self.act1 = nn.Conv2d(dim, width, 1, bias=False), LayerNorm2d(width), nn.GELU()
        self.conv2, self.norm2, self.act2 = nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width), nn.GELU()
        self.conv3, self.norm3 = nn.Conv2d(width, dim, 1, bias=False), LayerNorm2d(dim)
        for conv in (self.conv1, self.conv2, self.conv3):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Rows (R, C) -> (R, C): a coarse token gets the mean of what its cells would."""
        feature_map = scatter_tokens(x, layout)
        for layer in self.children():
            feature_map = layer(feature_map)
        return x + gather_tokens(feature_map, layout)


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), then perhaps a convolutional residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        windowed: bool = False,
        rel_pos_size: tuple[int, int] | None = None,
        conv_residual: bool = False,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias, windowed, rel_pos_size, attention_backend)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.residual = ConvResidual(dim) if conv_residual else None

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Rows (R, C) -> (R, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x), layout), layout)
        x = x + self.drop_path(self.mlp(self.norm2(x)), layout)
        return x if self.residual is None else self.residual(x, layout)
