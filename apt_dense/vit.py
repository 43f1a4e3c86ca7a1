"""APTViT: the backbone. Its forward is the pipeline scores -> partition -> layout -> embedding -> blocks -> scatter."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apt_dense.layout.fixed import build_fixed_layout
from apt_dense.layout.packed import TokenLayout, build_layout, check_finite, real_rows
from apt_dense.layout.scatter import scatter_tokens
from apt_dense.nn.block import Block
from apt_dense.nn.layers import BlockOptions, init_linear_layers, make_norm
from apt_dense.nn.patch_embed import CoarseEmbed, PatchEmbed, embed_patches
from apt_dense.nn.rotary import Rotary, RotaryTables, check_rotary, rotary_tables
from apt_dense.ops.linear import fill_up, whole_rows
from apt_dense.options import (
    are_finite,
    check_block_indexes,
    check_final_norm,
    check_images,
    check_pixel_format,
    check_prefix,
    check_windows,
    grid_of,
    one_of,
    pair,
    resolve_out_indices,
    whole_patches,
)
from apt_dense.patches.budget import check_token_budget, partition_by_budget, require, tokens_per_image
from apt_dense.patches.partition import check_thresholds, drop_padding, filled_region, partition_by_thresholds
from apt_dense.patches.scores import PixelFormat, Scorer, resolve_scorer, score_maps
from apt_dense.runtime import outside_graphs
from apt_dense.weights.load import LoadReport, convert_below, load_backbone
from apt_dense.weights.resize import note_grid
from apt_dense.weights.timm_models import apt_arguments, create_timm_model


class APTViT(nn.Module):
    """A plain ViT that spends one token on a flat area and many on a detailed one, and returns dense feature maps.

    With ``thresholds=()`` it equals the ViT whose weights it loads. See :meth:`forward` and :meth:`from_timm`.

    Args:
        img_size: pixels (H, W, or one number for both) that the positions are trained for; any input size runs.
        patch_size: pixels of the smallest patches; the stride of the feature maps.
        in_chans: image channels; with thresholds, 3.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: as in timm. ``depth`` also sets the drop path rates, but
            blocks after the last output are not built.
        patch_bias: whether the patch embedding has a bias.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0, drawn per image.
        window_size: cells of the attention windows of the blocks in ``window_block_indexes``; other blocks attend
            over the image. Windows cut short by the edge of the grid attend to padding as Detectron2's do.
        window_block_indexes: blocks with windows.
        use_rel_pos: decomposed relative positions in all blocks; global ones are interpolated to other input sizes.
        residual_block_indexes: blocks with a convolutional residual.
        use_abs_pos: whether there is an absolute position embedding.
        pretrain_img_size: pixels that ``pos_embed`` is trained for, if other than ``img_size``.
        pretrain_use_cls_token: without a class token, that ``pos_embed`` has a place for one all the same.
        class_token, reg_tokens: whether a class token and how many registers run along (they are not in the output).
        no_embed_class: that class and register tokens have no position embedding (DeiT-3, DINOv2 reg4).
        rotary: rotary positions: an :class:`apt_dense.nn.rotary.Rotary`, or a dictionary of its fields; None for none.
        qkv_fused: one projection, ``attn.qkv``, or three, ``attn.{q,k,v}_proj`` (EVA-02).
        k_bias, proj_bias: whether keys, with ``qkv_bias``, and whether ``attn.proj`` and the MLP have biases. EVA's
            and DINOv3's keys have none.
        pre_norm, qk_norm: a norm before the first block (CLIP), and norms of the queries and keys of each head.
        init_values: start of LayerScale's factors (``ls{1,2}.gamma``); None for no LayerScale.
        scale_attn_norm, scale_mlp_norm: a norm before the last linear layer of attention and MLP (EVA-02, BEiT-3).
        mlp_layer: "mlp", "swiglu" (two first layers, EVA-02) or "swiglu_packed" (one of double width, DINOv2 giant).
            ``mlp_ratio`` is the width of what the last layer takes.
        act_layer: "gelu", "gelu_tanh" (SigLIP), "quick_gelu" (OpenAI's CLIP), "silu" (None: in SwiGLUs; else "gelu").
        norm_layer, norm_eps: "layernorm" or "rmsnorm", and the epsilon of all norms.
        final_norm: normalise the output of the last block (which ``out_indices`` must then include).
        norm_intermediates: with ``final_norm``, apply that norm to every output, as timm's ``norm=True``.
        out_indices: blocks whose outputs are returned, ascending, from 0, or from -1 at the end; None for the last.
        thresholds: for scales 1, 2, ...: a patch of that scale stays whole where its score is below. () for none.
        token_budget: tokens per image, as a fraction (float) or a count (int); None for as many as thresholds say.
            With a budget only the ratios of the thresholds matter: they order merges of different scales. Shapes then
            depend on the size of the images alone (``torch.compile(fullgraph=True)``, CUDA graphs).
        scorer: "entropy" (bits, the paper's), "laplacian", "upsampling_error" or a callable (scores.Scorer).
        drop_padding: make no tokens of the host's padding (exact zeros at the right and bottom) and return zeros there.
        pixel_mean, pixel_std, channel_order: such that images * std + mean is the 8-bit image.
        partial_patches: "pad" fills sizes that are no multiple of ``patch_size`` with zeros at the right and bottom
            (timm's dynamic_img_pad, MMSeg), "crop" leaves the rest out (Detectron2).
        pos_antialias: resample positions to another input size with antialiasing (timm) or without (MMSeg, Detectron2).
        checkpoint_blocks: recompute activations of the blocks in the backward pass instead of keeping them.
        attention_backend: "auto", or one of ``attention.BACKENDS``.

    Raises:
        ValueError, TypeError: for arguments out of range, naming value and remedy.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_bias: bool = True,
        drop_path_rate: float = 0.0,
        window_size: int = 0,
        window_block_indexes: Sequence[int] = (),
        use_rel_pos: bool = False,
        residual_block_indexes: Sequence[int] = (),
        use_abs_pos: bool = True,
        pretrain_img_size: int | tuple[int, int] | None = None,
        pretrain_use_cls_token: bool = False,
        class_token: bool = False,
        reg_tokens: int = 0,
        no_embed_class: bool = False,
        rotary: Rotary | Mapping[str, Any] | None = None,
        pre_norm: bool = False,
        qkv_fused: bool = True,
        k_bias: bool = True,
        qk_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        mlp_layer: str = "mlp",
        act_layer: str | None = None,
        norm_layer: str = "layernorm",
        norm_eps: float = 1e-6,
        final_norm: bool = False,
        norm_intermediates: bool = False,
        out_indices: int | Sequence[int] | None = None,
        thresholds: Sequence[float] = (),
        token_budget: float | int | None = None,
        scorer: str | Scorer = "entropy",
        drop_padding: bool = False,
        pixel_mean: Sequence[float] = PixelFormat().mean,
        pixel_std: Sequence[float] = PixelFormat().std,
        channel_order: str = "RGB",
        partial_patches: str = "pad",
        pos_antialias: bool = True,
        checkpoint_blocks: bool = False,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        self.img_size = pair(img_size)
        self.patch_size, self.in_chans, self.embed_dim, self.last_block = patch_size, in_chans, embed_dim, depth - 1
        self.out_indices = resolve_out_indices(out_indices, depth)
        windowed = check_windows(window_size, window_block_indexes, depth)
        self.window_size = window_size if windowed else 0
        self.num_prefix = check_prefix(class_token, reg_tokens, self.window_size, use_rel_pos, residual_block_indexes)
        self.block_options = BlockOptions(
            num_heads, mlp_ratio, qkv_bias,
            k_bias=k_bias, qkv_fused=qkv_fused, qk_norm=qk_norm, proj_bias=proj_bias, init_values=init_values,
            scale_attn_norm=scale_attn_norm, scale_mlp_norm=scale_mlp_norm,
            mlp_layer=mlp_layer, act_layer=act_layer, norm_layer=norm_layer, norm_eps=norm_eps,
            attention_backend=attention_backend,
        )  # fmt: skip
        self.rotary = check_rotary(rotary, embed_dim, self.block_options, self.window_size > 0, use_rel_pos)
        self.thresholds = check_thresholds(thresholds, patch_size, self.img_size, self.window_size)
        self.token_budget = check_token_budget(
            token_budget, self.thresholds, patch_size, self.img_size, self.window_size, drop_padding
        )
        self.scorer = resolve_scorer(scorer)
        self.pixel_format = check_pixel_format(pixel_mean, pixel_std, channel_order, in_chans, self.thresholds)
        self.partial_patches = one_of("partial_patches", partial_patches, "pad", "crop")
        self.drop_padding, self.checkpoint_blocks, self.pos_antialias = drop_padding, checkpoint_blocks, pos_antialias
        self.norm_intermediates, self.no_embed_class = norm_intermediates, no_embed_class
        check_final_norm(final_norm, norm_intermediates, self.out_indices, self.last_block)
        grid = grid_of("img_size", self.img_size, patch_size)
        self.pos_grid = grid_of("pretrain_img_size", pair(pretrain_img_size or img_size), patch_size)
        prefix_positions = 0 if no_embed_class else self.num_prefix
        self.num_prefix_positions = prefix_positions if self.num_prefix else int(pretrain_use_cls_token)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, patch_bias)
        self.coarse_embed = CoarseEmbed(embed_dim) if self.thresholds else None
        positions = self.num_prefix_positions + math.prod(self.pos_grid)
        self.cls_token, self.reg_token, self.pos_embed = (
            nn.Parameter(torch.zeros(1, rows, embed_dim)) if rows else None
            for rows in (int(class_token), reg_tokens, positions if use_abs_pos else 0)
        )
        residual = check_block_indexes("residual_block_indexes", residual_block_indexes, depth)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                self.block_options,
                drop_path=rate,
                windowed=i in windowed,
                rel_pos_size=((window_size, window_size) if i in windowed else grid) if use_rel_pos else None,
                conv_residual=i in residual,
            )
            for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth)[: self.out_indices[-1] + 1])
        )
        norm = make_norm(self.block_options)
        self.norm_pre = norm(embed_dim) if pre_norm else nn.Identity()
        self.norm = norm(embed_dim) if final_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as timm's ViT does: truncated normal weights of 0.02, zero biases."""
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        init_linear_layers(self.blocks)

    @classmethod
    def from_timm(
        cls,
        model: str | nn.Module,
        pretrained: bool = False,
        img_size: int | tuple[int, int] | None = None,
        **options: Any,
    ) -> "APTViT":
        """An adaptive ViT with the architecture and the weights of one of timm's: AugReg, DeiT, DeiT-3, MAE, CLIP,
        SigLIP, BEiT-3, DINOv2, EVA, EVA-02, DINOv3, PE and their like, without pooling heads, and SAM's encoder.

        Args:
            model: a timm name such as "vit_base_patch16_224.mae", or a timm ``VisionTransformer`` or ``Eva``.
            pretrained: load timm's pretrained weights.
            img_size: as for ``timm.create_model``: timm resamples the positions. None keeps the model's own.
            **options: any argument of :class:`APTViT`; by default the last block's output is returned, normalised if
                the model has a final norm, and pixels are normalised as the model expects.

        Raises:
            ValueError: for an unknown name, or a model with a feature that is not supported (before any weight is
                copied).
        """
        if isinstance(model, str):
            model = create_timm_model(model, pretrained, img_size)
        elif pretrained or img_size is not None:
            raise ValueError("pretrained and img_size go with a model's name; this model is built already")
        backbone = cls(**{**apt_arguments(model), **options})
        load_backbone(backbone, model.state_dict())
        return backbone

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """Note the grid of the positions in torch's metadata: their number does not tell 16 x 4 from 8 x 8."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note_grid(destination, prefix, self.pos_grid)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Convert the state dict first, so that ``load_state_dict`` takes those of all ViTs in weights/formats.py."""
        try:
            report = convert_below(self, state_dict, prefix, local_metadata.get("pos_grid"))
            error_msgs.extend(self._loading_errors(report, prefix))
        except ValueError as error:
            error_msgs.append(str(error))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _loading_errors(self, report: LoadReport, prefix: str) -> Iterable[str]:
        """What a host's checkpoints must not lack, although it loads them without ``strict``."""
        return ()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of normalised images.

        Args:
            images: (B, in_chans, H, W) float, any H, W >= 1.

        Returns:
            One (B, embed_dim, H / p, W / p) per entry of ``out_indices``, sizes rounded up (``partial_patches="pad"``)
            or down ("crop").

        Raises:
            ValueError: for a wrong shape or number of channels, and for NaN or infinite pixels. (With a token budget,
                compiled or on a GPU, the latter is an assertion of the device, which is noticed later.)
            TypeError: for images that are not floating point.
        """
        outputs, layout = self.forward_tokens(images)
        return tuple(scatter_tokens(rows, layout) for rows in outputs)

    def forward_tokens(self, images: Tensor) -> tuple[tuple[Tensor, ...], TokenLayout]:
        """As :meth:`forward`, before the scatter: packed rows (R, embed_dim) per entry of ``out_indices``, and where
        they belong. For heads that work on tokens and scatter afterwards (``SimpleFeaturePyramid.from_tokens``)."""
        # With a budget all shapes are fixed, so that nothing needs to stay out of a compiled graph.
        apart = outside_graphs if self.token_budget is None else lambda function: function
        x, layout, rotary = apart(self._tokens)(images)
        x = self.norm_pre(x)
        outputs = []
        for index, block in enumerate(self.blocks):
            x = self._run(block, x, layout, rotary)
            if index in self.out_indices:
                outputs.append(apart(real_rows)(self._normalise(x, index), layout))
        return tuple(outputs), layout

    def _tokens(self, images: Tensor) -> tuple[Tensor, TokenLayout, RotaryTables | None]:
        """Embedded rows (R, C), their layout and how they are rotated. On CPUs rows of zeros follow, since a number of
        rows is dear when it comes up for the first time (kernels/onednn.py)."""
        images = self._whole_patches(images)
        layout = self.layout(images, self._partition(images))
        rotary = None if self.rotary is None else rotary_tables(self.rotary, self.blocks[0].attn.head_dim, layout)
        x = self._embed(images, layout)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            x = fill_up(x, whole_rows(len(x)))
        return x, layout, rotary

    @torch.no_grad()
    def partition(self, images: Tensor) -> Tensor:
        """The scale map (B, H / p, W / p) int8 of normalised images: the scale of the patch that covers each cell,
        -1 where padding is dropped. Draw it to see what the model sees. Raises as :meth:`forward` does."""
        images = self._whole_patches(images)
        check_finite(are_finite(images).tolist())
        return self._partition(images)

    def layout(self, images: Tensor, scale_map: Tensor) -> TokenLayout:
        """The token layout of images (B, C, H, W) cut up by a scale map; raises on pixels that are not finite."""
        finite = are_finite(images)
        if self.token_budget is not None:
            return self._fixed_layout(scale_map, finite)
        return build_layout(scale_map, len(self.thresholds) + 1, self.window_size, self.num_prefix, finite)

    def _fixed_layout(self, scale_map: Tensor, finite: Tensor) -> TokenLayout:
        if finite.device.type == "cpu" and not torch.compiler.is_compiling():
            check_finite(finite.tolist())
        require(finite.all(), "the batch holds images with NaN or infinite pixels; look at the transforms before")
        tokens = self._tokens_per_image(scale_map.shape[1:])
        return build_fixed_layout(
            scale_map, len(self.thresholds) + 1, tokens, self.window_size, self.num_prefix, self.drop_padding
        )

    def _tokens_per_image(self, grid: Sequence[int]) -> int:
        return tokens_per_image(
            self.token_budget, tuple(grid), len(self.thresholds), self.window_size, self.drop_padding
        )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimizers should not decay, as timm's models say it."""
        return {name for name in ("pos_embed", "cls_token", "reg_token") if getattr(self, name) is not None}

    def _whole_patches(self, images: Tensor) -> Tensor:
        """Check the images and pad or crop them to whole patches."""
        return whole_patches(check_images(images, self.in_chans), self.patch_size, self.partial_patches)

    @torch.no_grad()
    def _partition(self, images: Tensor) -> Tensor:
        """The scale map of images of whole patches."""
        batch, _, height, width = images.shape
        grid = height // self.patch_size, width // self.patch_size
        if not self.thresholds and not self.drop_padding:
            return torch.zeros(batch, *grid, dtype=torch.int8, device=images.device)
        scales = range(1, len(self.thresholds) + 1)
        scores = score_maps(images, self.patch_size, scales, self.scorer, self.pixel_format)
        region = filled_region(images)
        if self.token_budget is not None:
            return partition_by_budget(
                scores, self.thresholds, region, grid, self.patch_size, self.window_size,
                self._tokens_per_image(grid), self.drop_padding,
            )  # fmt: skip
        scale_map = partition_by_thresholds(scores, self.thresholds, region, grid, self.patch_size, self.window_size)
        return drop_padding(scale_map, region, self.patch_size) if self.drop_padding else scale_map

    def _embed(self, images: Tensor, layout: TokenLayout) -> Tensor:
        """Images of whole patches -> rows (R, C)."""
        positions = of_prefix = None
        if self.pos_embed is not None:
            of_prefix, positions = self.pos_embed[0].tensor_split([self.num_prefix_positions])
            positions = positions.unflatten(0, self.pos_grid)
        prefix = self._prefix_rows(of_prefix)
        return embed_patches(images, layout, self.patch_embed, self.coarse_embed, positions, prefix, self.pos_antialias)

    def _prefix_rows(self, positions: Tensor | None) -> Tensor | None:
        """Class and register tokens (num_prefix, C), with their positions if they have any."""
        tokens = [token[0] for token in (self.cls_token, self.reg_token) if token is not None]
        if not tokens:
            return None
        return torch.cat(tokens) if self.no_embed_class or positions is None else torch.cat(tokens) + positions

    def _run(self, block: Block, x: Tensor, layout: TokenLayout, rotary: RotaryTables | None) -> Tensor:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, x, layout, rotary, use_reentrant=False)
        return block(x, layout, rotary)

    def _normalise(self, x: Tensor, index: int) -> Tensor:
        """The final norm, where this block's output gets it."""
        if self.norm is None or not (self.norm_intermediates or index == self.last_block):
            return x
        return self.norm(x)
