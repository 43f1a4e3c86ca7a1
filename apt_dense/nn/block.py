"""Pre-norm transformer blocks on packed rows (R, C); parameters are named as in timm's ``vision_transformer.Block`` and
``EvaAttention`` and in Detectron2's ViT."""

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from apt_dense.layout.packed import TokenLayout, real_rows
from apt_dense.layout.scatter import gather_tokens, scatter_tokens
from apt_dense.nn.layers import BlockOptions, Linear, make_layer_scale, make_mlp, make_norm
from apt_dense.nn.positions import bias_of_padding, relative_bias_of_queries
from apt_dense.nn.rotary import RotaryTables
from apt_dense.ops.attention import check_backend, packed_attention
from apt_dense.ops.bias import PaddingKey, RelativeBias
from apt_dense.ops.linear import fill_up, linear
from apt_dense.runtime import outside_graphs


class Attention(nn.Module):
    """Multi-head self-attention inside each image, or inside each window.

    Args:
        windowed: attend inside windows; the layout must have them.
        rel_pos_size: rows and columns of cells that decomposed relative positions are trained for; None for none.
    """

    def __init__(
        self, dim: int, options: BlockOptions, windowed: bool = False, rel_pos_size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        if dim % options.num_heads:
            raise ValueError(f"embed_dim={dim} is no multiple of num_heads={options.num_heads}")
        self.num_heads, self.windowed = options.num_heads, windowed
        self.backend = check_backend(options.attention_backend)
        self.head_dim = head_dim = dim // options.num_heads
        norm = make_norm(options)
        self._add_projections(dim, options.qkv_fused, options.qkv_bias, options.k_bias)
        self.q_norm = norm(head_dim) if options.qk_norm else nn.Identity()
        self.k_norm = norm(head_dim) if options.qk_norm else nn.Identity()
        self.norm = norm(dim) if options.scale_attn_norm else nn.Identity()
        self.proj = Linear(dim, dim, bias=options.proj_bias)
        self.rel_pos_h = self.rel_pos_w = None
        if rel_pos_size is not None:
            self.rel_pos_h, self.rel_pos_w = (
                nn.Parameter(torch.zeros(2 * size - 1, head_dim)) for size in rel_pos_size
            )

    def _add_projections(self, dim: int, fused: bool, qkv_bias: bool, k_bias: bool) -> None:
        """``qkv``, with ``q_bias`` and ``v_bias`` of their own where keys have none, or ``q_proj, k_proj, v_proj``."""
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias and k_bias) if fused else None
        biases = fused and qkv_bias and not k_bias
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) if biases else None for _ in range(2))
        if not fused:
            self.q_proj = Linear(dim, dim, bias=qkv_bias)
            self.k_proj = Linear(dim, dim, bias=qkv_bias and k_bias)
            self.v_proj = Linear(dim, dim, bias=qkv_bias)

    def forward(self, x: Tensor, layout: TokenLayout, rotary: RotaryTables | None = None) -> Tensor:
        """Rows (R, C) -> (R, C). Rows behind those of the layout take no part."""
        q, k, v = self._project(x)
        attend = self._attend if layout.is_fixed else outside_graphs(self._attend)
        return self.proj(self.norm(attend(q, k, v, layout, rotary).flatten(1)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, rotary: RotaryTables | None) -> Tensor:
        filled, (q, k, v) = len(q), (real_rows(t, layout) for t in (q, k, v))
        segments = layout.windows if self.windowed else layout.images
        bias = self._relative_bias(q, layout)
        padding = self._padding_key(q, bias, layout)
        if rotary is not None:
            q, k = rotary.rotate(q, self.windowed), rotary.rotate(k, self.windowed)
        return fill_up(packed_attention(q, k, v, segments, bias, padding, self.backend), filled)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (R, C) -> queries, keys and values (R, H, D) before any rotation."""
        if self.qkv is None:
            rows = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        elif self.q_bias is None:
            rows = self.qkv(x).chunk(3, dim=-1)
        else:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            rows = linear(x, self.qkv.weight, bias).chunk(3, dim=-1)
        q, k, v = (row.unflatten(-1, (self.num_heads, -1)) for row in rows)
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def _relative_bias(self, q: Tensor, layout: TokenLayout) -> RelativeBias | None:
        if self.rel_pos_h is None:
            return None
        cells = layout.window_cells if self.windowed else layout.image_cells
        queries = relative_bias_of_queries(q, self.rel_pos_h.to(q.dtype), self.rel_pos_w.to(q.dtype), cells, layout)
        return RelativeBias(queries, cells)

    def _padding_key(self, q: Tensor, bias: RelativeBias | None, layout: TokenLayout) -> PaddingKey | None:
        """The key that Detectron2's padding of windows that are cut short amounts to: that of a row of zeros."""
        if not self.windowed or layout.window_cells.rows_N is None:
            return None
        logit = bias_of_padding(bias and bias.queries_RHK, layout.window_cells)
        _, k, v = self._project(q.new_zeros(1, self.proj.in_features))
        return PaddingKey(logit, k[0], v[0])


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
            feature_map = layer(feature_map)
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
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))), layout)
        return x if self.residual is None else self.residual(x, layout)
