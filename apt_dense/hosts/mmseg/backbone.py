"""The adaptive ViT as a backbone of MMSegmentation and other OpenMMLab packages."""

from collections.abc import Mapping
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import nn

from apt_dense import vit
from apt_dense.hosts.mmseg.arguments_from_pretrained import TIMM, fill_in, pretrained_config, read_weights
from apt_dense.hosts.mmseg.log_tokens_kept import log_tokens_kept
from apt_dense.hosts.mmseg.read_init_cfg import Pretrained, split_init_cfg
from apt_dense.option_checks import flag, optional, text, whole
from apt_dense.options import BlockOptions, ModelOptions, PositionOptions, usual_activation
from apt_dense.weights.files import CheckpointError
from apt_dense.weights.load import load_backbone
from apt_dense.weights.parameter_rules import layer_of
from apt_dense.weights.timm_arguments import apt_arguments, create_timm_model, weights_of


@MODELS.register_module()
class APTViT(vit.APTViT, BaseModule):
    """The adaptive ViT with the arguments that MMSeg's users expect.

    Returns a tuple of (B, C, H / p, W / p), one per ``out_indices``, each of stride ``patch_size``. For UPerNet, add
    MMSeg's MultiLevelNeck or Feature2Pyramid as neck. Training, validation and testing log the share of tokens kept as
    ``tokens_kept`` (not of compiled models).

    Args:
        pretrained: a checkpoint: a file, an address (http://, https://, s3://, mmcls://NAME), or ``timm://NAME``. Short
            for ``init_cfg=dict(type="Pretrained", checkpoint=...)``. Pickled code in it is never run. Where neither
            ``embed_dim`` nor ``depth`` is given, the checkpoint tells the arguments, as
            :meth:`apt_dense.APTViT.from_weights` does, and those that it cannot tell are asked for by name. A
            ``patch_size`` that is given then resamples its patches.
        init_cfg: MMEngine's initialisation config. "Pretrained" converts the files of all known ViTs (see
            ``apt_dense.weights``), resamples positions (from ``grid=(rows, columns)`` in it, where they are not a
            square) and, with ``resize_patches=True`` in it, patches of another size. It raises if a weight is missing
            or unknown (with ``strict=False`` in it, it warns instead).
        frozen_stages: -1 trains everything; 0 freezes the embedding; n freezes the first n blocks as well. Parameters
            that only APT has are never frozen, since no checkpoint of a plain ViT holds them.
        with_cp: activation checkpointing.
        norm_eval: keep norm layers in eval mode while training.
        pos_antialias: False by default here, as in MMSeg's VisionTransformer.
        **options: as for :class:`apt_dense.APTViT`.

    Raises:
        FileNotFoundError, CheckpointError: for weights that are to tell arguments and do not, or cannot be read.
        ValueError: for arguments that contradict each other or are out of range.
    """

    def __init__(
        self,
        *,
        pretrained: str | None = None,
        init_cfg: dict | list[dict] | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        norm_eval: bool = False,
        pos_antialias: bool = False,
        **options: Any,
    ) -> None:
        if pretrained is not None and init_cfg is not None:
            raise ValueError("pretrained and init_cfg both say where weights come from; give one of them")
        optional(text)("pretrained", pretrained)
        options, init_cfg = fill_in(options, pretrained_config(pretrained, init_cfg))
        super().__init__(checkpoint_blocks=flag("with_cp", with_cp), pos_antialias=pos_antialias, **options)
        if not -1 <= whole(-(2**31))("frozen_stages", frozen_stages) <= len(self.blocks):
            raise ValueError(
                f"frozen_stages={frozen_stages} must be from -1 to the number of blocks, {len(self.blocks)}"
            )
        self.init_cfg, self._pretrained, self._other_init = init_cfg, *split_init_cfg(init_cfg)
        self.frozen_stages = frozen_stages
        self.norm_eval = flag("norm_eval", norm_eval)
        self._freeze()

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says, and then load the pretrained weights, if there are any."""
        if self._pretrained is None:
            print_log("APTViT starts from random weights; set backbone.pretrained for a checkpoint", "current")
        if self._pretrained is None or self._other_init:
            given, self.init_cfg = self.init_cfg, self._other_init or None
            super().init_weights()
            self.init_cfg = given
        if self.coarse_embed is not None and self._other_init:
            self.coarse_embed.reset_zero()  # an init_cfg for all linear layers means the plain ViT's
        if self._pretrained is not None:
            self._load_pretrained(self._pretrained)
        self._is_init = True

    def _load_pretrained(self, source: Pretrained) -> None:
        try:
            is_timm = source.checkpoint.startswith(TIMM)
            content = self._timm_weights(source) if is_timm else read_weights(source)
            report = load_backbone(self, content, **source.options)
        except ValueError as error:
            raise CheckpointError(f"{source.checkpoint}: {error}") from error
        print_log(f"APTViT weights from {source.checkpoint}: {report.summary()}", "current")

    def _timm_weights(self, source: Pretrained) -> Mapping:
        """The weights of ``timm://NAME``, resampled by timm."""
        patch_size = self.patch_size if source.options.get("resize_patches") else None
        model = create_timm_model(source.checkpoint.removeprefix(TIMM), True, self.img_size, patch_size)
        self._check_same(apt_arguments(model), source.checkpoint)
        return weights_of(model)

    def _check_same(self, arguments: Mapping[str, Any], address: str) -> None:
        """Compare the options that shapes of weights do not show."""
        own = {name: getattr(self.block_options, name) for name in ("num_heads", "norm_eps", "act_layer")}
        own |= {"class_token": self.cls_token is not None, "rotary": self.rotary}
        if own["act_layer"] == usual_activation(self.block_options.mlp_layer):
            own["act_layer"] = None
        left_out = {"class_token": ModelOptions.class_token, "rotary": PositionOptions.rotary}
        left_out["act_layer"] = BlockOptions.act_layer
        for name, value in own.items():
            theirs = arguments.get(name, left_out.get(name))
            if theirs != value:
                raise ValueError(f"{address} has {name}={theirs}, this backbone {name}={value}")

    def _log_tokens_kept(self, share: float, cells: int) -> None:
        log_tokens_kept(share, cells, self.training)

    def train(self, mode: bool = True) -> "APTViT":
        """Set the mode of all modules, except frozen ones and, with ``norm_eval``, norms, which stay in eval mode."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        for module in (self.patch_embed, *self.blocks[: self.frozen_stages]):
            module.eval().requires_grad_(False)
        for name, parameter in self.named_parameters():
            if layer_of(name, len(self.blocks)) == 0:
                parameter.requires_grad_(False)
