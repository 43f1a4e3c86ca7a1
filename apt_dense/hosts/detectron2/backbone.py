"""Detectron2 host: in a ViTDet config, change one line,

    model.backbone.net._target_ = APTViT  # from apt_dense.hosts.detectron2

and nothing else changes until ``model.backbone.net.thresholds`` says which patches may be large. For yacs configs see
:func:`add_apt_config`. Needs Detectron2 only; it is built from source (its INSTALL page), not from the package index.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling import SimpleFeaturePyramid as PlainFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.utils.events import get_event_storage, has_event_storage
from timm.layers import trunc_normal_
from torch import Tensor, nn

from apt_dense import vit
from apt_dense.hosts.detectron2.checkpoints import errors_of
from apt_dense.layout.scatter import scatter_tokens
from apt_dense.layout.tokens import TokenLayout
from apt_dense.nn.feature_pyramid import late_scatter, runs_as_written
from apt_dense.weights.load import LoadReport


class APTViT(vit.APTViT, Backbone):
    """The adaptive ViT with the arguments of Detectron2's ``ViT``, its state dict and, without thresholds, its values.

    Those arguments come first, in Detectron2's order and with its defaults. With thresholds there are four parameters
    more, ``coarse_embed.{down,zero}.{weight,bias}``: DetectionCheckpointer warns that a checkpoint of a plain ViT lacks
    them, which is as it should be. Checkpoints of EVA-02's detectors and of other ViTs load as well. While training
    inside an ``EventStorage``, the share of tokens kept is logged as ``tokens_kept`` (not with a budget). Stochastic
    depth acts per image, as Detectron2's does.

    Args:
        img_size: pixels that the relative positions of global attention are trained for. Leave it as in the
            checkpoint: they are interpolated to the size of each input, and Detectron2 leaves out weights of another
            shape with nothing but a warning.
        norm_layer: ``nn.LayerNorm`` (epsilon 1e-5), ``partial(nn.LayerNorm, eps=...)``, or a name that
            :class:`apt_dense.APTViT` knows, with ``norm_eps`` beside it.
        act_layer: ``nn.GELU`` or such a name.
        rel_pos_zero_init: start relative positions at zero, else at a truncated normal of 0.02.
        use_act_checkpoint: recompute activations of the blocks in the backward pass (with torch, without fairscale).
        out_feature: name of the feature map in the output.
        strict_loading: inside a detector, that weights missing from a checkpoint or unknown are errors (but those that
            only APT has, and relative positions). Detectron2 itself only warns.
        **options: any other argument of :class:`apt_dense.APTViT`: thresholds, scorer, drop_padding, ...
            ``pixel_mean``, ``pixel_std`` and ``channel_order`` must be the model's pixel_mean, pixel_std and
            input_format; the configs of this project interpolate them. By default, as in Detectron2,
            ``partial_patches="crop"`` and ``pos_antialias=False``.

    Raises:
        ValueError, TypeError: for arguments out of range, naming value and remedy.
    """

    def __init__(
        self,
        img_size: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] | str = nn.LayerNorm,
        act_layer: Callable[[], nn.Module] | str | None = nn.GELU,
        use_abs_pos: bool = True,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        window_size: int = 0,
        window_block_indexes: Sequence[int] = (),
        residual_block_indexes: Sequence[int] = (),
        use_act_checkpoint: bool = False,
        pretrain_img_size: int | None = 224,
        pretrain_use_cls_token: bool = True,
        out_feature: str = "last_feat",
        *,
        strict_loading: bool = True,
        **options: Any,
    ) -> None:
        if not isinstance(act_layer, str | None) and act_layer is not nn.GELU:
            raise ValueError(f"act_layer={act_layer} is not supported; the blocks are built with nn.GELU")
        settings = {"partial_patches": "crop", "pos_antialias": False, **_norm_arguments(norm_layer), **options}
        super().__init__(
            img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, qkv_bias,
            drop_path_rate=drop_path_rate,
            window_size=window_size,
            window_block_indexes=window_block_indexes,
            use_rel_pos=use_rel_pos,
            residual_block_indexes=residual_block_indexes,
            use_abs_pos=use_abs_pos,
            pretrain_img_size=pretrain_img_size,
            pretrain_use_cls_token=pretrain_use_cls_token,
            checkpoint_blocks=use_act_checkpoint,
            act_layer=None if act_layer is nn.GELU else act_layer,
            **settings,
        )  # fmt: skip
        if len(self.out_indices) != 1:
            raise ValueError(f"out_indices={self.out_indices}: Detectron2's ViT has one output; name one block")
        _check_padding_shows(self)
        if not rel_pos_zero_init:
            _randomise_relative_positions(self)
        self.strict_loading, self._out_features = strict_loading, [out_feature]
        self._out_feature_channels, self._out_feature_strides = {out_feature: embed_dim}, {out_feature: patch_size}

    @classmethod
    def from_timm(
        cls,
        model: str | nn.Module,
        pretrained: bool = False,
        img_size: int | tuple[int, int] | None = None,
        **options: Any,
    ) -> "APTViT":
        """As :meth:`apt_dense.APTViT.from_timm`, whose positions are those of the timm model, not of Detectron2's."""
        as_in_timm = {
            "pretrain_img_size": None, "pretrain_use_cls_token": False, "partial_patches": "pad", "pos_antialias": True,
        }  # fmt: skip
        return super().from_timm(model, pretrained, img_size, **{**as_in_timm, **options})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, in_chans, H, W) -> {out_feature: (B, embed_dim, H // p, W // p)}."""
        (feature_map,) = super().forward(images)
        return {self._out_features[0]: feature_map}

    def _loading_errors(self, report: LoadReport, prefix: str) -> Iterable[str]:
        # Alone (no prefix), load_state_dict's own strict decides; DetectionCheckpointer's is always False.
        return errors_of(report, prefix) if prefix and self.strict_loading else ()

    def _log_tokens_kept(self, share: float) -> None:
        if self.training and has_event_storage():
            get_event_storage().put_scalar("tokens_kept", share)


def _norm_arguments(norm_layer: Callable[[int], nn.Module] | str) -> dict[str, Any]:
    """What Detectron2's ``norm_layer`` stands for: the epsilon of LayerNorm."""
    if isinstance(norm_layer, str):
        return {"norm_layer": norm_layer}
    norm, settings = norm_layer, {}
    if isinstance(norm_layer, partial) and not norm_layer.args:
        norm, settings = norm_layer.func, norm_layer.keywords
    if norm is not nn.LayerNorm or not settings.keys() <= {"eps"}:
        raise ValueError(
            f"norm_layer={norm_layer} is not supported; expected nn.LayerNorm or partial(nn.LayerNorm, eps=...)"
        )
    return {"norm_eps": settings.get("eps", 1e-5)}


def _check_padding_shows(model: vit.APTViT) -> None:
    """With a mean of whole numbers, pixels of just that colour become 0, which is what padding is told by."""
    mean = model.pixel_format.mean
    if model.drop_padding and all(value.is_integer() for value in mean):
        raise ValueError(
            f"drop_padding=True with pixel_mean={mean}: pixels of that colour cannot be told from padding, and parts "
            f"of images would be dropped. Set drop_padding=False, or a mean that is no whole number as ImageNet's"
        )


def _randomise_relative_positions(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith((".rel_pos_h", ".rel_pos_w")):
            trunc_normal_(parameter, std=0.02)


class SimpleFeaturePyramid(PlainFeaturePyramid):
    """Detectron2's SimpleFeaturePyramid on tokens, whose wish that sizes are divisible is heard.

    With an :class:`APTViT` as its ``net``, what acts on single cells runs once per token (``pyramid.late_scatter``).

    Upstream spells the key ``size_divisiblity``, which ImageList does not read: without ``square_pad``, sizes that do
    not divide by the coarsest stride then lose their last rows and columns. Both spellings are given here.
    """

    @property
    def size_divisibility(self) -> int:
        """Pixels that heights and widths are padded to a multiple of."""
        return self._size_divisibility

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised images (B, C, H, W) -> {"p2": (B, C, H / 4, W / 4), ...}, the same values as upstream's."""
        if not isinstance(self.net, APTViT) or not runs_as_written(self.net):
            return super().forward(x)
        (rows,), layout = self.net.forward_tokens(x)
        results = [late_scatter(stage, rows, layout) for stage in self.stages]
        if self.top_block is not None:
            results.extend(self.top_block(self._input_of_top_block(results, rows, layout)))
        return dict(zip(self._out_features, results, strict=True))

    def _input_of_top_block(self, results: list[Tensor], rows: Tensor, layout: TokenLayout) -> Tensor:
        if self.top_block.in_feature in self._out_features:
            return results[self._out_features.index(self.top_block.in_feature)]
        return scatter_tokens(rows, layout)  # the backbone's own output

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {**super().padding_constraints, "size_divisibility": self._size_divisibility}


def get_apt_lr_decay_rate(name: str, lr_decay_rate: float = 1.0, num_layers: int = 12) -> float:
    """The share of the learning rate for a parameter of a detector; Detectron2's ``get_vit_lr_decay_rate`` and more.

    The embedding gets lr_decay_rate**(num_layers + 1), block i lr_decay_rate**(num_layers - i), everything else the
    full rate: heads, pyramid, convolutional residuals, and ``coarse_embed``, since no checkpoint of a plain ViT brings
    what only APT has.

    Raises:
        ValueError: for a block beyond ``num_layers``, whose rate would be greater than the full one.
    """
    return lr_decay_rate ** (num_layers + 1 - _layer_of(name, num_layers))


def _layer_of(name: str, num_layers: int) -> int:
    """0 for the embedding, i + 1 for block i, num_layers + 1 for all others."""
    if name.startswith("backbone") and re.search(r"\.(pos_embed|patch_embed|cls_token|reg_token|norm_pre)", name):
        return 0
    block = re.search(r"^backbone.*\.blocks\.(\d+)\.(?!residual\.)", name)
    if block is None:
        return num_layers + 1
    if int(block[1]) >= num_layers:
        raise ValueError(f"{name} is beyond num_layers={num_layers}; set num_layers to the depth of the backbone")
    return int(block[1]) + 1


def add_apt_config(cfg: CfgNode) -> None:
    """Add the node MODEL.APT to a yacs config: the arguments of :class:`APTViT` in capitals, then the pyramid's.

        cfg = get_cfg()
        add_apt_config(cfg)
        cfg.merge_from_file("configs/detectron2/mask_rcnn_apt_vitdet_b.yaml")
        DefaultTrainer(cfg)

    The defaults are those of ViTDet-B, without thresholds.
    """
    cfg.MODEL.APT = CfgNode({
        "IMG_SIZE": 1024,
        "PATCH_SIZE": 16,
        "EMBED_DIM": 768,
        "DEPTH": 12,
        "NUM_HEADS": 12,
        "MLP_RATIO": 4.0,
        "QKV_BIAS": True,
        "DROP_PATH_RATE": 0.1,
        "NORM_EPS": 1e-6,
        "USE_ABS_POS": True,
        "USE_REL_POS": True,
        "REL_POS_ZERO_INIT": True,
        "WINDOW_SIZE": 14,
        "WINDOW_BLOCK_INDEXES": (0, 1, 3, 4, 6, 7, 9, 10),
        "RESIDUAL_BLOCK_INDEXES": (),
        "USE_ACT_CHECKPOINT": False,
        "PRETRAIN_IMG_SIZE": 224,
        "PRETRAIN_USE_CLS_TOKEN": True,
        "THRESHOLDS": (),
        "TOKEN_BUDGET": None,
        "ATTENTION_BACKEND": "auto",
        "SCORER": "entropy",
        "DROP_PADDING": False,
        "PYRAMID": {"SCALE_FACTORS": (4.0, 2.0, 1.0, 0.5), "SQUARE_PAD": 1024},
    })  # fmt: skip


@BACKBONE_REGISTRY.register()
def build_apt_vit_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """MODEL.BACKBONE.NAME for yacs configs: the adaptive ViT of MODEL.APT and its pyramid, levels p2 to p6.

    The pyramid's channels and norm are MODEL.FPN's, the pixel format is MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and
    INPUT.FORMAT.
    """
    if "APT" not in cfg.MODEL:
        raise ValueError("the config has no node MODEL.APT; call add_apt_config(cfg) before merging files into it")
    options = {name.lower(): value for name, value in cfg.MODEL.APT.items()}
    pyramid = options.pop("pyramid")
    net = APTViT(
        in_chans=input_shape.channels,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        channel_order=cfg.INPUT.FORMAT,
        **options,
    )
    return SimpleFeaturePyramid(
        net,
        "last_feat",
        cfg.MODEL.FPN.OUT_CHANNELS,
        pyramid.SCALE_FACTORS,
        LastLevelMaxPool(),
        cfg.MODEL.FPN.NORM,
        pyramid.SQUARE_PAD,
    )
