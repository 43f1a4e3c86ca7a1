"""The adaptive ViT as a backbone of Detectron2."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from detectron2.modeling import Backbone
from detectron2.utils.events import get_event_storage, has_event_storage
from timm.layers import trunc_normal_
from torch import Tensor, nn

from apt_dense import vit
from apt_dense.hosts.detectron2.arguments_from_pretrained import described_by_file, norm_arguments
from apt_dense.hosts.detectron2.safe_checkpoints import errors_of
from apt_dense.option_checks import flag, text
from apt_dense.patches.regions import Region
from apt_dense.weights.load import LoadReport


class APTViT(vit.APTViT, Backbone):
    """The adaptive ViT with the arguments of Detectron2's ``ViT``, its state dict and, without thresholds, its values.

    Those arguments come first, in Detectron2's order and with its defaults. Thresholds add four parameters,
    ``coarse_embed.{down,zero}.{weight,bias}``. DetectionCheckpointer warns that a checkpoint of a plain ViT lacks them,
    which is expected. Checkpoints of EVA-02's detectors and of other ViTs load as well. Training inside an
    ``EventStorage`` logs the share of tokens kept as ``tokens_kept``. Stochastic depth is drawn per image, as in
    Detectron2.

    Args:
        img_size: pixels that the relative positions of global attention are trained for. Keep the checkpoint's value:
            they are interpolated to the size of each input, whereas Detectron2 drops weights of another shape with
            only a warning.
        norm_layer: ``nn.LayerNorm`` (epsilon 1e-5), ``partial(nn.LayerNorm, eps=...)``, or a name that
            :class:`apt_dense.APTViT` accepts, which then takes ``norm_eps``.
        act_layer: ``nn.GELU``, or a name that :class:`apt_dense.APTViT` accepts.
        rel_pos_zero_init: initialise relative positions with zeros instead of a truncated normal of 0.02.
        use_act_checkpoint: recompute activations of the blocks in the backward pass (with torch, without fairscale).
        out_feature: name of the feature map in the output.
        strict_loading: inside a detector, raise if a checkpoint lacks weights of the backbone or has unknown ones.
            Relative positions and parameters that only APT has may be missing. Detectron2 itself only warns.
        pretrained: a file of a ViT in any format that ``load_backbone`` reads. Where neither ``embed_dim`` nor
            ``depth`` is given, it tells the arguments, as :meth:`apt_dense.APTViT.from_weights` does, and those that it
            cannot tell are asked for by name. A ``patch_size`` that is given then resamples its patches.
        resize_patches: where ``embed_dim`` or ``depth`` is given, resample its patches all the same.
        **options: any other argument of :class:`apt_dense.APTViT`, such as thresholds, scorer and drop_padding.
            ``pixel_mean``, ``pixel_std`` and ``channel_order`` must be the model's pixel_mean, pixel_std and
            input_format; the configs of this project interpolate them. Defaults that follow Detectron2 instead of
            the core are ``partial_patches="crop"`` and ``pos_antialias=False``.

    Raises:
        FileNotFoundError, CheckpointError: for weights that cannot be read, do not fit or do not tell an argument.
        ValueError, TypeError: for arguments that are out of range or unknown.
    """

    @described_by_file
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
        pretrained: str | None = None,
        resize_patches: bool = False,
        **options: Any,
    ) -> None:
        if not text("out_feature", out_feature):
            raise ValueError("out_feature='' must be a name, by which heads ask for the feature map")
        settings = {"partial_patches": "crop", "pos_antialias": False, **norm_arguments(norm_layer), **options}
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            drop_path_rate=drop_path_rate,
            window_size=window_size,
            window_block_indexes=window_block_indexes,
            use_rel_pos=use_rel_pos,
            residual_block_indexes=residual_block_indexes,
            use_abs_pos=use_abs_pos,
            pretrain_img_size=pretrain_img_size,
            pretrain_use_cls_token=pretrain_use_cls_token,
            checkpoint_blocks=flag("use_act_checkpoint", use_act_checkpoint),
            act_layer=_activation(act_layer),
            **settings,
        )
        if len(self.out_indices) != 1:
            raise ValueError(f"out_indices={self.out_indices}: Detectron2's ViT has one output; name one block")
        _check_padding_shows(self)
        if not flag("rel_pos_zero_init", rel_pos_zero_init):
            _randomise_relative_positions(self)
        self.strict_loading = flag("strict_loading", strict_loading)
        self._describe_output(out_feature, embed_dim, patch_size)

    def _describe_output(self, name: str, channels: int, stride: int) -> None:
        """Set what Detectron2's ``Backbone.output_shape`` reads."""
        self._out_features = [name]
        self._out_feature_channels, self._out_feature_strides = {name: channels}, {name: stride}

    @classmethod
    def from_timm(
        cls,
        model: str | nn.Module,
        pretrained: bool = False,
        img_size: int | tuple[int, int] | None = None,
        **options: Any,
    ) -> "APTViT":
        """Build from a timm model as :meth:`apt_dense.APTViT.from_timm` does, with timm's way of resampling positions
        and padding instead of Detectron2's."""
        as_in_timm = {
            "pretrain_img_size": None, "pretrain_use_cls_token": False, "partial_patches": "pad", "pos_antialias": True,
        }  # fmt: skip
        return super().from_timm(model, pretrained, img_size, **{**as_in_timm, **options})

    def forward(
        self, images: Tensor, keep_fine: Region | None = None, keep_coarse: Region | None = None
    ) -> dict[str, Tensor]:
        """Map normalised images (B, in_chans, H, W) to {out_feature: (B, embed_dim, H // p, W // p)}.

        ``keep_fine`` and ``keep_coarse``: as for :meth:`apt_dense.APTViT.forward`; Detectron2 itself gives none.
        """
        (feature_map,) = super().forward(images, keep_fine, keep_coarse)
        return {self._out_features[0]: feature_map}

    def _loading_errors(self, report: LoadReport, prefix: str) -> Iterable[str]:
        # Alone (no prefix), load_state_dict's own strict decides; DetectionCheckpointer's is always False.
        return errors_of(report, prefix) if prefix and self.strict_loading else ()

    def _log_tokens_kept(self, share: float, cells: int) -> None:
        if self.training and has_event_storage():
            get_event_storage().put_scalar("tokens_kept", share)


def _activation(act_layer: Callable[[], nn.Module] | str | None) -> str | None:
    """The name of the activation; None for GELU, with which blocks are built. Raises ValueError for other layers."""
    if not isinstance(act_layer, str | None) and act_layer is not nn.GELU:
        raise ValueError(f"act_layer={act_layer} is not supported; the blocks are built with nn.GELU")
    return None if act_layer is nn.GELU else act_layer


def _check_padding_shows(model: vit.APTViT) -> None:
    """Refuse to drop padding if pixels can be 0 after normalisation, as padding is: with a mean of whole numbers, those
    of the mean's colour are."""
    mean = model.pixel_format.mean
    if model.drop_padding and all(value.is_integer() for value in mean):
        raise ValueError(
            f"drop_padding=True with pixel_mean={mean}: pixels of that colour cannot be told from padding, and parts "
            f"of images would be dropped. Set drop_padding=False, or a mean with fractions such as ImageNet's"
        )


def _randomise_relative_positions(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith((".rel_pos_h", ".rel_pos_w")):
            trunc_normal_(parameter, std=0.02)
