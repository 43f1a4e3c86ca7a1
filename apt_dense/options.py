"""Options of a backbone, grouped by what they decide.

Each group is a frozen dataclass that holds the only definition of its defaults and checks its own fields.

``APTViT`` takes all fields as flat keyword arguments, as MMSegmentation's dictionaries and Detectron2's lazy configs
write them, and sorts them into the groups (``option_checks.split``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from apt_dense.option_checks import (
    Options,
    check_blocks,
    choice,
    finite,
    flag,
    function,
    indexes,
    name_or_callable,
    names_of,
    number,
    option,
    optional,
    pair,
    resolve_out_indices,
    share_or_count,
    text,
    thresholds,
    triple,
    whole,
)

MLP_LAYERS = "mlp", "swiglu", "swiglu_packed"
ACT_LAYERS = "gelu", "gelu_tanh", "quick_gelu", "silu"
NORM_LAYERS = "layernorm", "rmsnorm"


@dataclass(frozen=True)
class ModelOptions(Options):
    """The frame of the model: sizes, windows, tokens that run along, outputs.

    Args:
        img_size: pixels (H, W, or one number for both) that the positions are trained for; any input size runs.
        patch_size: pixels of the smallest patches; the stride of the feature maps.
        in_chans: image channels; with thresholds, 3, or 1 of grey images.
        embed_dim: channels of the tokens.
        depth: number of blocks. It also sets the drop path rates, but blocks after the last output are not built.
        patch_bias: whether the patch embedding has a bias.
        embed_norm: a norm of the patch embedding, before the positions (AIMv2).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0, drawn per image.
        window_size: cells of the attention windows of the blocks in ``window_block_indexes``; other blocks attend
            over the image. Windows cut short by the edge of the grid attend to padding as Detectron2's do.
        window_block_indexes: blocks with windows.
        use_rel_pos: decomposed relative positions in all blocks; global ones are interpolated to other input sizes.
        residual_block_indexes: blocks with a convolutional residual.
        class_token, reg_tokens: whether a class token and how many registers run along (they are not in the output).
        pre_norm: a norm before the first block (CLIP).
        final_norm: normalise the output of the last block (which ``out_indices`` must then include).
        norm_intermediates: with ``final_norm``, apply that norm to every output, as timm's ``norm=True``.
        out_indices: blocks whose outputs are returned, ascending, from 0, or from -1 at the end; None for the last.
        checkpoint_blocks: recompute activations of the blocks in the backward pass instead of keeping them.
    """

    img_size: tuple[int, int] = option(224, pair)
    patch_size: int = option(16, whole(1))
    in_chans: int = option(3, whole(1))
    embed_dim: int = option(768, whole(1))
    depth: int = option(12, whole(1))
    patch_bias: bool = option(True, flag)
    embed_norm: bool = option(False, flag, brings="patch_embed.norm.")
    drop_path_rate: float = option(0.0, number(least=0, below=1))
    window_size: int = option(0, whole(0))
    window_block_indexes: tuple[int, ...] = option((), indexes)
    use_rel_pos: bool = option(False, flag, brings="blocks.#.attn.rel_pos_[hw]")
    residual_block_indexes: tuple[int, ...] = option((), indexes, brings="blocks.#.residual.(conv|norm)[123].")
    class_token: bool = option(False, flag, brings="cls_token")
    reg_tokens: int = option(0, whole(0), brings="reg_token")
    pre_norm: bool = option(False, flag, brings="norm_pre.")
    final_norm: bool = option(False, flag, brings="norm.")
    norm_intermediates: bool = option(False, flag)
    out_indices: tuple[int, ...] = option(None)
    checkpoint_blocks: bool = option(False, flag)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of whole patches at ``img_size``."""
        return grid_of("img_size", self.img_size, self.patch_size)

    @property
    def num_prefix(self) -> int:
        return int(self.class_token) + self.reg_tokens

    def attended_cells(self, block: int) -> tuple[int, int]:
        """Rows and columns of cells that a block attends over, at ``img_size``."""
        return (self.window_size, self.window_size) if block in self.windowed else self.grid

    @property
    def windowed(self) -> tuple[int, ...]:
        """Blocks with windows."""
        return self.window_block_indexes if self.window_size else ()

    def _check_together(self) -> None:
        self._set(out_indices=resolve_out_indices(self.out_indices, self.depth))
        check_blocks("window_block_indexes", self.windowed, self.depth)
        check_blocks("residual_block_indexes", self.residual_block_indexes, self.depth)
        if not self.windowed:  # so that nothing else has to ask for both
            self._set(window_size=0)
        _ = self.grid
        self._check_prefix()
        self._check_final_norm()

    def _check_prefix(self) -> None:
        """Prefix rows have no place in the image, so nothing that needs one can be meant to hold for them."""
        if self.num_prefix and (self.window_size or self.use_rel_pos or self.residual_block_indexes):
            raise ValueError(
                f"class_token={self.class_token} and reg_tokens={self.reg_tokens} together with "
                f"window_size={self.window_size}, use_rel_pos={self.use_rel_pos} or "
                f"residual_block_indexes={self.residual_block_indexes} is not defined; "
                f"set class_token=False and reg_tokens=0 as ViTDet and SAM do"
            )

    def _check_final_norm(self) -> None:
        last = self.depth - 1
        if self.norm_intermediates and not self.final_norm:
            raise ValueError("norm_intermediates=True applies the final norm to all outputs; set final_norm=True too")
        if self.final_norm and not self.norm_intermediates and last not in self.out_indices:
            raise ValueError(
                f"final_norm normalises block {last}, which out_indices={self.out_indices} leaves out; its weights "
                f"would never get a gradient. Add it, or set final_norm=False or norm_intermediates=True"
            )


@dataclass(frozen=True)
class BlockOptions(Options):
    """The features that all blocks of a model share.

    Args:
        num_heads: attention heads.
        mlp_ratio: width of what the last layer of the MLP takes, relative to ``embed_dim``.
        qkv_bias, k_bias: whether queries and values and, with those, keys have a bias. EVA's and DINOv3's keys do not.
        qkv_fused: one projection, ``attn.qkv``, or three, ``attn.{q,k,v}_proj`` (EVA-02).
        qk_norm: norms of the queries and keys of each head.
        proj_bias: whether ``attn.proj`` and the MLP have biases.
        init_values: start of LayerScale's factors (``ls{1,2}.gamma``); None for no LayerScale.
        scale_attn_norm, scale_mlp_norm: a norm before the last linear layer of attention and MLP (EVA-02, BEiT-3).
        mlp_layer: "mlp", "swiglu" (two first layers, EVA-02) or "swiglu_packed" (one of double width, DINOv2 giant).
        act_layer: "gelu", "gelu_tanh" (SigLIP), "quick_gelu" (OpenAI's CLIP), "silu" (None: in SwiGLUs; else "gelu").
        norm_layer, norm_eps: "layernorm" or "rmsnorm", and the epsilon of all norms.
        proportional_attention: the key of a patch that covers n cells weighs n ** this in all softmaxes: 0 as one key
            (the paper), 1 as the keys of all its cells (ToMe's proportional attention). From 0.5 to 1 features are
            nearer to the uniform ViT's where weights were not trained with coarse patches (docs/EVIDENCE.md). No effect
            without thresholds.
        attention_backend: "auto", or the name of a kernel in ``apt_dense.ops.attention``.
    """

    num_heads: int = option(12, whole(1))
    mlp_ratio: float = option(4.0, number(above=0))
    qkv_bias: bool = option(True, flag)
    k_bias: bool = option(True, flag)
    qkv_fused: bool = option(True, flag)
    qk_norm: bool = option(False, flag, brings="blocks.#.attn.[qk]_norm.")
    proj_bias: bool = option(True, flag)
    init_values: float | None = option(None, optional(number(below=1e30)), brings="blocks.#.ls[12].gamma")
    scale_attn_norm: bool = option(False, flag, brings="blocks.#.attn.norm.")
    scale_mlp_norm: bool = option(False, flag, brings="blocks.#.mlp.norm.")
    mlp_layer: str = option("mlp", choice(*MLP_LAYERS))
    act_layer: str | None = option(None, optional(choice(*ACT_LAYERS)))
    norm_layer: str = option("layernorm", choice(*NORM_LAYERS))
    norm_eps: float = option(1e-6, number(above=0))
    proportional_attention: float = option(0.0, number(least=0))
    attention_backend: str = option("auto", text)

    @property
    def activation(self) -> str:
        """The activation of the MLP."""
        return self.act_layer or usual_activation(self.mlp_layer)


@dataclass(frozen=True)
class Rotary(Options):
    """Rotation of queries and keys by position; names and values as in timm (``timm.models.eva.Eva``).

    In blocks with windows positions restart in each window, and the window takes the place of the grid below.

    Args:
        rope_type: "cat" counts cells (EVA-02, PE); "dinov3" places cell centres in [-1, 1] along each axis.
        temperature: of the frequencies temperature**(-4 i / D).
        ref_feat_shape: for "cat", rows and columns that the grid is scaled to; None for no scaling.
        grid_offset: added to each cell's position.
        grid_indexing: "ij": rows take the first half of the frequencies; "xy": columns do.
        rotate_half: channel i is rotated with i + D / 2, else with its neighbour.
    """

    rope_type: str = option("cat", choice("cat", "dinov3"), "rotary.rope_type")
    temperature: float = option(10000.0, number(above=0), "rotary.temperature")
    ref_feat_shape: tuple[int, int] | None = option(None, optional(pair), "rotary.ref_feat_shape")
    grid_offset: float = option(0.0, finite, "rotary.grid_offset")
    grid_indexing: str = option("ij", choice("ij", "xy"), "rotary.grid_indexing")
    rotate_half: bool = option(False, flag, "rotary.rotate_half")

    def _check_together(self) -> None:
        if self.rope_type == "dinov3" and self.ref_feat_shape is not None:
            raise ValueError(
                f"ref_feat_shape={self.ref_feat_shape} has no meaning for rope_type='dinov3'; leave it out"
            )


def _rotary(name: str, value: object) -> Rotary | None:
    """Rotary positions, given as such or as a dictionary of the fields of :class:`Rotary`."""
    if value is None or isinstance(value, Rotary):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}={value!r} must be a Rotary, a dictionary of its fields, or None")
    unknown = [key for key in value if key not in names_of(Rotary)]
    if unknown:
        raise TypeError(f"{name}={dict(value)!r} has the unknown fields {unknown}; expected {names_of(Rotary)}")
    return Rotary(**value)


@dataclass(frozen=True)
class PositionOptions(Options):
    """Positions of tokens in the whole image. (Relative ones belong to the blocks: ``use_rel_pos``.)

    Args:
        use_abs_pos: whether there is an absolute position embedding.
        pretrain_img_size: pixels that ``pos_embed`` is trained for, if other than ``img_size``.
        pretrain_use_cls_token: without a class token, that ``pos_embed`` has a place for one all the same.
        no_embed_class: that class and register tokens have no position embedding (DeiT-3, DINOv2 reg4).
        pos_antialias: resample positions to another input size with antialiasing (timm) or without (MMSeg, Detectron2).
        rotary: rotary positions: a :class:`Rotary` or a dictionary of its fields; None for none.
    """

    use_abs_pos: bool = option(True, flag)
    pretrain_img_size: tuple[int, int] | None = option(None, optional(pair))
    pretrain_use_cls_token: bool = option(False, flag)
    no_embed_class: bool = option(False, flag)
    pos_antialias: bool = option(True, flag)
    rotary: Rotary | None = option(None, _rotary)


@dataclass(frozen=True)
class PixelFormat(Options):
    """Normalisation of the host's images: ``images * std + mean`` are grey levels in [0, 255].

    Args:
        mean, std: of the image's channels, in grey levels; of a grey image, each three times; of 16-bit images, those
            of their normalisation divided by 257: they are scored as the 8-bit images that they round to.
        channel_order: the order of the image's channels, "RGB" or "BGR".
    """

    mean: tuple[float, float, float] = option((123.675, 116.28, 103.53), triple(finite), "pixel_mean")
    std: tuple[float, float, float] = option((58.395, 57.12, 57.375), triple(number(above=0)), "pixel_std")
    channel_order: str = option("RGB", choice("RGB", "BGR"))

    def _check_together(self) -> None:
        if not 1 < max(*self.mean, *self.std) <= 256:
            raise ValueError(
                f"pixel_mean={self.mean} and pixel_std={self.std} look like values for [0, 1] or of 16 bits; give grey "
                f"levels of 8 bits (times 255, or divided by 257)"
            )


@dataclass(frozen=True)
class PatchOptions(Options):
    """The choice of patches that an image is cut into.

    Args:
        thresholds: for scales 1, 2, ...: a patch of that scale stays whole where its score is below. () for none.
        token_budget: tokens per image, as a fraction (float) or a count (int); None for as many as thresholds say.
            With a budget only the ratios of the thresholds matter: they order merges of different scales. (Infinite
            thresholds are equal, and a ratio counts as 2**40 at most.) Shapes then
            depend on the size of the images alone (``torch.compile(fullgraph=True)``, CUDA graphs).
        scorer: "entropy" (bits, the paper's), another name in ``apt_dense.patches.scores.SCORERS`` ("tsallis",
            "laplacian_max", ...), the .safetensors file of a learned scorer (tools/fit_scorer.py: a small network, or
            a ViT's first blocks; scores from 0 to 1), or a callable (``apt_dense.patches.scores.Scorer``).
        drop_padding: make no tokens of the host's padding (exact zeros at the right and bottom) and return zeros there.
        partial_patches: "pad" fills sizes that ``patch_size`` does not divide with zeros at the right and bottom
            (timm's dynamic_img_pad, MMSeg), "crop" leaves the rest out (Detectron2).
        pixel_mean, pixel_std, channel_order: such that images * std + mean is the 8-bit image (:class:`PixelFormat`).
        min_tokens: the fewest tokens that thresholds may leave of an image, as a fraction (float) of its cells, dropped
            ones aside, or a count (int). An image that they would leave fewer keeps so many, or up to two more: the
            merges of the lowest scores are made, as with a budget.
        keep_fine: a function of the normalised images (B, C, H, W) that says where patches stay small in every image,
            by a mask (B, H, W) bool or by boxes: see ``keep_fine`` of :meth:`PatchSelector.scale_map`.
        keep_coarse: the same for where they are large wherever they may be.
    """

    thresholds: tuple[float, ...] = option((), thresholds)
    token_budget: float | int | None = option(None, share_or_count)
    scorer: str | Callable = option("entropy", name_or_callable)
    drop_padding: bool = option(False, flag)
    partial_patches: str = option("pad", choice("pad", "crop"))
    pixel_mean: tuple[float, float, float] = option(PixelFormat.mean)
    pixel_std: tuple[float, float, float] = option(PixelFormat.std)
    channel_order: str = option(PixelFormat.channel_order)
    min_tokens: float | int | None = option(None, share_or_count)
    keep_fine: Callable | None = option(None, optional(function))
    keep_coarse: Callable | None = option(None, optional(function))

    @property
    def num_scales(self) -> int:
        return len(self.thresholds) + 1

    def _check_together(self) -> None:
        pixels = PixelFormat(self.pixel_mean, self.pixel_std, self.channel_order)
        self._set(pixel_format=pixels, pixel_mean=pixels.mean, pixel_std=pixels.std)
        if self.token_budget is not None and min(self.thresholds, default=0) <= 0:
            raise ValueError(
                f"token_budget={self.token_budget!r} with thresholds={self.thresholds}: give one positive threshold "
                f"per scale, such as (5.5, 4.0); their ratios say which of two merges of different scales is made first"
            )


def usual_activation(mlp_layer: str) -> str:
    """The activation that an MLP of that kind has unless ``act_layer`` says otherwise."""
    return "gelu" if mlp_layer == "mlp" else "silu"


# ---- what concerns several options


def check_together(model: ModelOptions, blocks: BlockOptions, positions: PositionOptions) -> None:
    """Raise on options of different groups that exclude each other."""
    if positions.rotary is None:
        return
    if model.embed_dim // blocks.num_heads % 4:
        raise ValueError(
            f"rotary positions need head channels in fours; embed_dim / num_heads is "
            f"{model.embed_dim // blocks.num_heads}"
        )
    if model.use_rel_pos:
        raise ValueError("rotary positions together with use_rel_pos=True are not defined; give one of them")
    if model.window_size and (blocks.qk_norm or (blocks.qkv_bias and blocks.k_bias)):
        raise ValueError(
            "rotary positions with windows need keys without a bias and qk_norm=False: in windows that are cut short, "
            "each padded cell would have another key; set qkv_bias=False or k_bias=False, as in EVA-02 and DINOv3"
        )


def grid_of(name: str, size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of whole patches in images of that size."""
    if min(size) < patch_size:
        raise ValueError(f"{name}={size} is less than one patch of patch_size={patch_size} pixels")
    return size[0] // patch_size, size[1] // patch_size
