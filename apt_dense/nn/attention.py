"""Multi-head self-attention on packed rows.

Parameters are named as in timm's ``Attention`` and ``EvaAttention`` and in Detectron2's. Shape letters: R packed rows,
H heads, D channels of a head, C channels.
"""

import torch
from torch import Tensor, nn

from apt_dense.layout.tokens import TokenLayout
from apt_dense.nn.layers import make_norm
from apt_dense.nn.relative import bias_of_padding, relative_bias_of_queries
from apt_dense.nn.rotary import RotaryTables
from apt_dense.ops.attention import check_backend, packed_attention
from apt_dense.ops.bias import PaddingKey, RelativeBias, proportional_logits
from apt_dense.ops.cpu_layers import call_layer
from apt_dense.ops.kernels.interface import Inputs
from apt_dense.ops.onednn_matmul import fill_up
from apt_dense.options import BlockOptions


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
            raise ValueError(f"embed_dim={dim} is not a multiple of num_heads={options.num_heads}")
        self.num_heads, self.windowed = options.num_heads, windowed
        self.backend, self.proportional = check_backend(options.attention_backend), options.proportional_attention
        self.head_dim = head_dim = dim // options.num_heads
        norm = make_norm(options)
        self._add_projections(dim, options.qkv_fused, options.qkv_bias, options.k_bias)
        self.q_norm = norm(head_dim) if options.qk_norm else nn.Identity()
        self.k_norm = norm(head_dim) if options.qk_norm else nn.Identity()
        self.norm = norm(dim) if options.scale_attn_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=options.proj_bias)
        self.rel_pos_h = self.rel_pos_w = None
        if rel_pos_size is not None:
            self.rel_pos_h, self.rel_pos_w = (
                nn.Parameter(torch.zeros(2 * size - 1, head_dim)) for size in rel_pos_size
            )

    def _add_projections(self, dim: int, fused: bool, qkv_bias: bool, k_bias: bool) -> None:
        """``qkv``, with separate ``q_bias`` and ``v_bias`` where keys have none, or ``q_proj, k_proj, v_proj``."""
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias and k_bias) if fused else None
        biases = fused and qkv_bias and not k_bias
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) if biases else None for _ in range(2))
        if not fused:
            self.q_proj = nn.Linear(dim, dim, bias=qkv_bias)
            self.k_proj = nn.Linear(dim, dim, bias=qkv_bias and k_bias)
            self.v_proj = nn.Linear(dim, dim, bias=qkv_bias)

    def forward(self, x: Tensor, layout: TokenLayout, rotary: RotaryTables | None = None) -> Tensor:
        """Rows (R, C) -> (R, C). Trailing padding rows are ignored."""
        rows = layout.outside_graphs(_with_zero_row)(x, layout) if self._attends_to_padding(layout) else x
        attend = layout.outside_graphs(self._attend)
        out = fill_up(attend(*self._project(rows), layout, rotary), len(x))
        return call_layer(self.proj, self.norm(out.flatten(1)))

    def _attends_to_padding(self, layout: TokenLayout) -> bool:
        return self.windowed and layout.cuts_windows

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, rotary: RotaryTables | None) -> Tensor:
        total = layout.images.total
        k_padding, v_padding = k[total:], v[total:]
        q, k, v = (layout.real_rows(t) for t in (q, k, v))
        segments, bias, padding = layout.images, self._relative_bias(q, layout), None
        if self.windowed:
            segments = layout.windows
        if self._attends_to_padding(layout):
            logit = bias_of_padding(bias and bias.queries_RHK, layout.window_cells)
            padding = PaddingKey(logit, k_padding[0], v_padding[0])
        if rotary is not None:
            q, k = rotary.rotate(q, self.windowed), rotary.rotate(k, self.windowed)
        return packed_attention(Inputs(q, k, v, segments, bias, padding, self._key_logits(layout)), self.backend)

    def _key_logits(self, layout: TokenLayout) -> Tensor | None:
        if not self.proportional or layout.image_cells.num_scales == 1:
            return None
        return proportional_logits(layout.scale_R, self.proportional)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (R, C) -> queries, keys and values (R, H, D) before any rotation."""
        if self.qkv is None:
            rows = [call_layer(layer, x) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        else:
            rows = call_layer(self.qkv, x).chunk(3, dim=-1)
            if self.q_bias is not None:
                rows = [rows[0] + self.q_bias.to(x.dtype), rows[1], rows[2] + self.v_bias.to(x.dtype)]
        q, k, v = (row.unflatten(-1, (self.num_heads, -1)) for row in rows)
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def _relative_bias(self, q: Tensor, layout: TokenLayout) -> RelativeBias | None:
        if self.rel_pos_h is None:
            return None
        cells = layout.window_cells if self.windowed else layout.image_cells
        queries = relative_bias_of_queries(q, self.rel_pos_h.to(q.dtype), self.rel_pos_w.to(q.dtype), cells, layout)
        return RelativeBias(queries, cells)


def _with_zero_row(x: Tensor, layout: TokenLayout) -> Tensor:
    """Rows (R, C) followed by a row of zeros at least: Detectron2's padding of windows that are cut short has the keys
    and values of such a row. It takes the place of rows that fill up, if there are any."""
    return fill_up(layout.real_rows(x), max(len(x), layout.images.total + 1))
