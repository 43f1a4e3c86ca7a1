"""Pre-norm transformer blocks on packed rows (R, C); parameters are named as in timm's ``vision_transformer.Block``."""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from apt_dense.attention import packed_attention
from apt_dense.layout import Segments, TokenLayout


class Attention(nn.Module):
    """Multi-head self-attention inside each segment."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim={dim} is no multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, segments: Segments) -> Tensor:
        """Rows (R, C) -> (R, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        return self.proj(packed_attention(q, k, v, segments).flatten(1))


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


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Rows (R, C) -> (R, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x), layout.images), layout)
        return x + self.drop_path(self.mlp(self.norm2(x)), layout)
