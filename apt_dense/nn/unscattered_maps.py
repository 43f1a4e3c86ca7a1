"""Feature maps that are not scattered yet, for heads that know nothing of tokens.

A :class:`TokenMap` stands for a feature map (B, C, H, W). Layers that treat every cell alone (1 x 1 convolutions,
transposed ones without overlap, batch norm, activations) run on its tokens, which are fewer; any other operation gets
the scattered map. So the standard heads and necks of MMSegmentation need no change.

Shape letters: B images, R packed rows, h x w cells of the base grid, th x tw pixels of a tile, C channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_dense.layout.scatter import scatter_tiles, tile_of_cells
from apt_dense.layout.tokens import TokenLayout
from apt_dense.ops.onednn_matmul import linear
from apt_dense.runtime import has_16_bits, runs_on_host


class TokenMap:
    """A feature map as one tile per token, and one for the dropped cells of each image.

    Args:
        tiles: (R + B, th, tw, C).
        layout: the cells that each row covers.
    """

    def __init__(self, tiles: Tensor, layout: TokenLayout) -> None:
        self.tiles, self.layout = tiles, layout
        self._map: Tensor | None = None

    @classmethod
    def from_rows(cls, rows: Tensor, layout: TokenLayout) -> "TokenMap":
        """The map of packed rows (R, C): dropped cells are zero."""
        return cls(torch.cat([rows, rows.new_zeros(layout.batch, rows.shape[1])])[:, None, None], layout)

    def dense(self) -> Tensor:
        """The feature map (B, C, h * th, w * tw), scattered once."""
        if self._map is None:
            # Convolutions hand the order in memory on to the logits, which a loss on CPUs copies where channels lie
            # last: 3 % of a training step of UPerNet. The argmax of inference is faster over those.
            reaches_loss = runs_on_host(self.tiles) and self.tiles.requires_grad
            self._map = scatter_tiles(self.tiles, self.layout, channels_last=not reaches_loss)
        return self._map

    @property
    def shape(self) -> torch.Size:
        (h, w), (_, th, tw, channels) = self.layout.grid, self.tiles.shape
        return torch.Size((self.layout.batch, channels, h * th, w * tw))

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 4

    @property
    def cells(self) -> Tensor:
        """How many cells each tile covers: (R + B,) float."""
        index = tile_of_cells(self.layout, len(self.tiles)).flatten()
        counts = torch.zeros(len(self.tiles), device=index.device)
        return counts.index_add(0, index, torch.ones_like(index, dtype=counts.dtype))

    @property
    def images(self) -> Tensor:
        """The image of each tile: (R + B,)."""
        return torch.cat([self.layout.image_R, torch.arange(self.layout.batch, device=self.layout.image_R.device)])

    def __getattr__(self, name: str) -> Any:
        """Any other attribute is that of the scattered map."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        run = _ON_TILES.get(func)
        if run is not None and isinstance(args[0], TokenMap):
            result = run(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*_dense(args), **dict(zip(kwargs, _dense(tuple(kwargs.values())), strict=True)))


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg", "getitem", "matmul"):

    def _operator(self: TokenMap, *others: Any, name: str = f"__{_name}__") -> Any:
        return getattr(self.dense(), name)(*_dense(others))

    setattr(TokenMap, f"__{_name}__", _operator)


def _dense(values: tuple) -> tuple:
    """Arguments of an operation with scattered maps in place of token maps, also inside lists."""
    return tuple(
        v.dense() if isinstance(v, TokenMap) else type(v)(_dense(tuple(v))) if type(v) in (list, tuple) else v
        for v in values
    )


# ---- layers on tiles: each returns NotImplemented where a cell would look at others


def _conv(
    x: TokenMap, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> TokenMap:  # fmt: skip
    """A 1 x 1 convolution."""
    if tuple(weight.shape[2:]) != (1, 1) or _pair(stride) != (1, 1) or _pair(padding) != (0, 0) or groups != 1:
        return NotImplemented
    return TokenMap(linear(x.tiles, weight.flatten(1), bias), x.layout)


def _transposed_conv(
    x: TokenMap, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> TokenMap:  # fmt: skip
    """A transposed convolution whose kernels do not overlap: a linear layer with kh * kw outputs per cell."""
    kh, kw = weight.shape[2:]
    plain = _pair(padding) == _pair(output_padding) == (0, 0) and groups == 1 and _pair(dilation) == (1, 1)
    if _pair(stride) != (kh, kw) or not plain:
        return NotImplemented
    n, th, tw, _ = x.tiles.shape
    bias = None if bias is None else bias.repeat(kh * kw)
    out = linear(x.tiles, weight.permute(2, 3, 1, 0).flatten(0, 2), bias).view(n, th, tw, kh, kw, -1)
    return TokenMap(out.transpose(2, 3).reshape(n, th * kh, tw * kw, -1), x.layout)


def _batch_norm(
    x: TokenMap, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> TokenMap:  # fmt: skip
    """Batch norm, whose statistics over cells are those of tiles weighted by the cells that they cover."""
    values = x.tiles.float() if has_16_bits(x.tiles.dtype) else x.tiles
    mean, var = running_mean, running_var
    if training:
        mean, var = _moments(x, values)
        if running_mean is not None:
            _track(running_mean, running_var, mean.detach(), var.detach(), momentum, x)
    values = (values - mean) * (var + eps).rsqrt()
    values = values if weight is None else values * weight
    values = values if bias is None else values + bias
    return TokenMap(values.to(x.tiles.dtype), x.layout)


def _moments(x: TokenMap, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) over all cells of the scattered map."""
    share = x.cells.to(values.dtype) / (x.layout.row_Bhw.numel() * values.shape[1] * values.shape[2])
    mean = (values.sum((1, 2)) * share[:, None]).sum(0)
    return mean, ((values - mean).square().sum((1, 2)) * share[:, None]).sum(0)


@torch.no_grad()
def _track(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float, x: TokenMap) -> None:
    """Update running statistics in place, as torch does: with the unbiased variance."""
    count = x.shape[0] * x.shape[2] * x.shape[3]
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (count / max(count - 1, 1))).to(running_var.dtype), momentum)


def _dropout2d(x: TokenMap, p: float = 0.5, training: bool = True, inplace: bool = False) -> TokenMap:
    """Whole channels of an image are kept or lost, with the draws of the scattered map."""
    if not training or p == 0:
        return x
    kept = F.dropout2d(x.tiles.new_ones(x.layout.batch, x.tiles.shape[-1], 1, 1), p, True)[:, :, 0, 0]
    return TokenMap(x.tiles * kept[x.images][:, None, None], x.layout)


def _elementwise(function: Callable) -> Callable:
    return lambda x, *args, **kwargs: TokenMap(function(x.tiles, *args, **kwargs), x.layout)


def _relu(x: TokenMap, inplace: bool = False) -> TokenMap:
    return TokenMap(F.relu(x.tiles), x.layout)


_ON_TILES: dict[Callable, Callable] = {
    F.conv2d: _conv,
    F.conv_transpose2d: _transposed_conv,
    F.batch_norm: _batch_norm,
    F.dropout2d: _dropout2d,
    F.gelu: _elementwise(F.gelu),
    F.relu: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
}


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)
