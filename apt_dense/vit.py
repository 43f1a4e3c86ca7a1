"""APTViT: the backbone. Its forward is the pipeline scores -> partition -> layout -> embedding -> blocks -> scatter."""

import math
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from apt_dense.layout.fixed import build_fixed_layout
from apt_dense.layout.packed import build_layout
from apt_dense.layout.scatter import scatter_tokens
from apt_dense.layout.tokens import TokenLayout
from apt_dense.nn.block import Block
from apt_dense.nn.layers import init_linear_layers, make_norm
from apt_dense.nn.output_channels_and_strides import DescribedOutputs
from apt_dense.nn.patch_embed import CoarseEmbed, Embeddings, PatchEmbed, embed_patches
from apt_dense.nn.positions import AbsolutePositions
from apt_dense.nn.rotary import RotaryTables, rotary_tables
from apt_dense.ops.cpu_layers import checkpointed
from apt_dense.ops.onednn_matmul import fill_rows
from apt_dense.option_checks import documented, split
from apt_dense.options import BlockOptions, ModelOptions, PatchOptions, PositionOptions, check_together, grid_of
from apt_dense.patches.image_preparation import are_finite, require_finite
from apt_dense.patches.regions import Region
from apt_dense.patches.replaceable_selector import ChoosesPatches
from apt_dense.patches.selector import PatchSelector
from apt_dense.runtime import is_traced, refuse_scripting
from apt_dense.weights.loading_mixin import LoadableViT
from apt_dense.weights.parameter_rules import UNDECAYED

_GROUPS = ModelOptions, BlockOptions, PositionOptions, PatchOptions


class APTViT(DescribedOutputs, ChoosesPatches, LoadableViT):
    """A plain ViT that spends one token on a flat area and many on a detailed one, and returns dense feature maps.

    With ``thresholds=()`` it equals the ViT whose weights it loads. See :meth:`forward`, :meth:`from_timm`,
    :meth:`from_weights` and :meth:`set_patches`.

    Args:
        img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, qkv_bias: as in timm.
        **options: fields of the groups in ``apt_dense.options``, where each is described:

            - ``ModelOptions``: windows, relative positions, class and register tokens, outer norms, outputs;
            - ``BlockOptions``: MLP, activation, biases, norms inside the blocks, attention kernel;
            - ``PositionOptions``: absolute and rotary positions;
            - ``PatchOptions``: thresholds, token budget, scorer, padding, pixel format.

    Raises:
        ValueError, TypeError: for options out of range or unknown, naming option, value and remedy.
    """

    @documented(*_GROUPS)
    def __init__(
        self,
        img_size: int | tuple[int, int] = ModelOptions.img_size,
        patch_size: int = ModelOptions.patch_size,
        in_chans: int = ModelOptions.in_chans,
        embed_dim: int = ModelOptions.embed_dim,
        depth: int = ModelOptions.depth,
        num_heads: int = BlockOptions.num_heads,
        mlp_ratio: float = BlockOptions.mlp_ratio,
        qkv_bias: bool = BlockOptions.qkv_bias,
        **options: Any,
    ) -> None:
        super().__init__()
        frame = {"img_size": img_size, "patch_size": patch_size, "in_chans": in_chans, "embed_dim": embed_dim}
        frame |= {"depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias}
        model, blocks, positions, patches = split({**frame, **options}, *_GROUPS)
        check_together(model, blocks, positions)
        self.options, self.block_options, self.position_options = model, blocks, positions
        self.patches = PatchSelector(
            **patches.given(),
            patch_size=model.patch_size,
            window_size=model.window_size,
            in_chans=model.in_chans,
            img_size=model.img_size,
        )
        self.img_size, self.in_chans, self.num_prefix = model.img_size, model.in_chans, model.num_prefix
        self.embed_dim, self.depth, self.out_indices = model.embed_dim, model.depth, model.out_indices
        self.rotary, self.no_embed_class = positions.rotary, positions.no_embed_class
        self.checkpoint_blocks = model.checkpoint_blocks
        self._build_embedding(model, positions)
        self._build_blocks(model, blocks)
        self.reset_parameters()

    __prepare_scriptable__ = refuse_scripting

    def _build_embedding(self, model: ModelOptions, positions: PositionOptions) -> None:
        """Patches, prefix tokens and absolute positions."""
        pretrain_size = positions.pretrain_img_size or model.img_size
        self.pos_grid = grid_of("pretrain_img_size", pretrain_size, model.patch_size)
        prefix_positions = 0 if positions.no_embed_class else model.num_prefix
        self.num_prefix_positions = prefix_positions if model.num_prefix else int(positions.pretrain_use_cls_token)
        self.patch_embed = PatchEmbed.from_options(model, self.block_options)
        self.coarse_embed = CoarseEmbed(model.embed_dim) if self.thresholds else None
        num_positions = self.num_prefix_positions + math.prod(self.pos_grid) if positions.use_abs_pos else 0
        self.cls_token, self.reg_token, self.pos_embed = (
            nn.Parameter(torch.zeros(1, rows, model.embed_dim)) if rows else None
            for rows in (int(model.class_token), model.reg_tokens, num_positions)
        )

    def _build_blocks(self, model: ModelOptions, options: BlockOptions) -> None:
        """Blocks up to the last output, and the norms around them."""
        rates = calculate_drop_path_rates(model.drop_path_rate, model.depth)
        self.blocks = nn.ModuleList(
            Block(
                model.embed_dim,
                options,
                drop_path=rate,
                windowed=i in model.windowed,
                rel_pos_size=model.attended_cells(i) if model.use_rel_pos else None,
                conv_residual=i in model.residual_block_indexes,
            )
            for i, rate in enumerate(rates[: self.out_indices[-1] + 1])
        )
        norm = make_norm(options)
        self.norm_pre = norm(model.embed_dim) if model.pre_norm else nn.Identity()
        self.norm = norm(model.embed_dim) if model.final_norm else None

    def reset_parameters(self) -> None:
        """Initialise as timm's ViT does: truncated normal weights of 0.02, zero biases."""
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        init_linear_layers(self.blocks)

    def forward(
        self, images: Tensor, keep_fine: Region | None = None, keep_coarse: Region | None = None
    ) -> tuple[Tensor, ...]:
        """Compute feature maps of normalised images.

        Args:
            images: (B, in_chans, H, W) float, any H, W >= 1.
            keep_fine, keep_coarse: where patches stay small, or are large wherever they may be, whatever their scores:
                masks, boxes or functions, as for :meth:`PatchSelector.scale_map`.

        Returns:
            One (B, embed_dim, H / p, W / p) per entry of ``out_indices``, sizes rounded up (``partial_patches="pad"``)
            or down ("crop").

        Raises:
            ValueError: for a wrong shape or number of channels, and for NaN or infinite pixels. (With a token budget,
                compiled or on a GPU, the latter is an assertion of the device, which is noticed later.)
            TypeError: for images that are not floating point.
        """
        outputs, layout = self.forward_tokens(images, keep_fine, keep_coarse)
        return tuple(scatter_tokens(rows, layout) for rows in outputs)

    def forward_tokens(
        self, images: Tensor, keep_fine: Region | None = None, keep_coarse: Region | None = None
    ) -> tuple[tuple[Tensor, ...], TokenLayout]:
        """Compute packed rows (R, embed_dim) per entry of ``out_indices``, and where they belong.

        For heads that scatter later (``SimpleFeaturePyramid.from_tokens``). Arguments, errors: see :meth:`forward`.
        """
        x, layout, rotary = self.patches.outside_graphs(self._tokens)(images, keep_fine, keep_coarse)
        x = self.norm_pre(x)
        outputs = []
        for index, block in enumerate(self.blocks):
            x = self._run(block, x, layout, rotary)
            if index in self.out_indices:
                outputs.append(self.patches.outside_graphs(layout.real_rows)(self._normalise(x, index)))
        return tuple(outputs), layout

    def partition(self, images: Tensor, keep_fine: Region | None = None, keep_coarse: Region | None = None) -> Tensor:
        """The scale map (B, H / p, W / p) int8 of images: ``PatchSelector.scale_map``."""
        return self.patches.scale_map(images, keep_fine, keep_coarse)

    def layout(self, images: Tensor, scale_map: Tensor) -> TokenLayout:
        """The token layout of images (B, C, H, W) cut up by a scale map; raises on pixels that are not finite."""
        num_scales = self.patches.num_scales
        if not self.patches.fixes_shapes:
            return build_layout(scale_map, num_scales, self.window_size, self.num_prefix, are_finite(images))
        require_finite(images)
        tokens = self.patches.tokens_per_image(tuple(scale_map.shape[1:]))
        return build_fixed_layout(
            scale_map, num_scales, tokens, self.window_size, self.num_prefix, self.patches.drop_padding
        )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimizers should not decay, as timm's models say it."""
        return {name for name in UNDECAYED if getattr(self, name) is not None}

    def _tokens(self, images: Tensor, *regions: Region | None) -> tuple[Tensor, TokenLayout, RotaryTables | None]:
        """Embedded rows (R, C), perhaps followed by rows of zeros, their layout and how they are rotated."""
        whole = self.patches.whole_patches(images)
        layout = self.layout(whole, self.patches.partition(whole, self.patches.regions(images, *regions)))
        if not is_traced():
            self._log_tokens_kept(layout.tokens_kept, cells=layout.row_Bhw.numel())
        rotary = None if self.rotary is None else rotary_tables(self.rotary, self.blocks[0].attn.head_dim, layout)
        return fill_rows(self._embed(whole, layout), spare=int(layout.cuts_windows)), layout, rotary

    def _log_tokens_kept(self, share: float, cells: int) -> None:
        """Take note of the share of a forward pass's cells that it keeps tokens of; hosts write it into their logs."""

    def _embed(self, images: Tensor, layout: TokenLayout) -> Tensor:
        """Images of whole patches -> rows (R, C)."""
        positions = prefix_positions = None
        if self.pos_embed is not None:
            prefix_positions, table = self.pos_embed[0].tensor_split([self.num_prefix_positions])
            positions = AbsolutePositions(table.unflatten(0, self.pos_grid), self.position_options.pos_antialias)
        prefix = self._prefix_rows(prefix_positions)
        embeddings = Embeddings(self.patch_embed, self.coarse_embed)
        return embed_patches(images, layout, embeddings, positions, prefix)

    def _prefix_rows(self, positions: Tensor | None) -> Tensor | None:
        """Class and register tokens (num_prefix, C), with their positions if they have any."""
        tokens = [token[0] for token in (self.cls_token, self.reg_token) if token is not None]
        if not tokens:
            return None
        return torch.cat(tokens) if self.no_embed_class or positions is None else torch.cat(tokens) + positions

    def _run(self, block: Block, x: Tensor, layout: TokenLayout, rotary: RotaryTables | None) -> Tensor:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpointed(block, x, layout, rotary)
        return block(x, layout, rotary)

    def _normalise(self, x: Tensor, index: int) -> Tensor:
        """The final norm, where this block's output gets it."""
        if self.norm is None or not (self.options.norm_intermediates or index == self.depth - 1):
            return x
        return self.norm(x)
