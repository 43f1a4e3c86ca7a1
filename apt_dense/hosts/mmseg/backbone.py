"""The adaptive ViT as a backbone of MMSegmentation and other OpenMMLab packages."""

from collections.abc import Mapping
from typing import Any

from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from apt_dense import vit
from apt_dense.hosts.mmseg.checkpoints import read_address
from apt_dense.hosts.mmseg.pretrained import Pretrained, split_init_cfg
from apt_dense.option_checks import flag, optional, text, whole
from apt_dense.options import BlockOptions, ModelOptions, PositionOptions, usual_activation
from apt_dense.weights.files import CheckpointError
from apt_dense.weights.load import load_backbone, unwrap
from apt_dense.weights.parameters import layer_of
from apt_dense.weights.timm_arguments import apt_arguments, create_timm_model


@MODELS.register_module()
class APTViT(vit.APTViT, BaseModule):
    """The adaptive ViT with the arguments that MMSeg's users expect.

    Returns a tuple of (B, C, H / p, W / p), one per ``out_indices``, each of stride ``patch_size``. For UPerNet, add
    MMSeg's MultiLevelNeck or Feature2Pyramid as neck. Training logs the share of tokens kept as ``tokens_kept``, except
    with a token budget, which fixes it.

    Args:
        pretrained: a checkpoint: a file, an address (http://, https://, s3://, mmcls://NAME), or ``timm://NAME``. Short
            for ``init_cfg=dict(type="Pretrained", checkpoint=...)``. Pickled code in it is never run.
        init_cfg: MMEngine's initialisation config. "Pretrained" converts the files of all known ViTs (see
            ``apt_dense.weights``), resamples positions (and, with ``resize_patches=True`` in it, patches of another
            size), and raises if a weight is missing or unknown (with ``strict=False`` in it, it warns instead).
        frozen_stages: -1 trains everything; 0 freezes the embedding; n freezes the first n blocks as well. Parameters
            that only APT has are never frozen, since no checkpoint of a plain ViT holds them.
        with_cp: activation checkpointing.
        norm_eval: keep norm layers in eval mode while training.
        pos_antialias: False by default here, as in MMSeg's VisionTransformer.
        **options: as for :class:`apt_dense.APTViT`.

    Raises:
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
        if optional(text)("pretrained", pretrained) is not None:
            init_cfg = {"type": "Pretrained", "checkpoint": pretrained}
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
            content = self._read_checkpoint(source.checkpoint)
            if source.prefix:
                content = _below(unwrap(content, backbone=False), source.prefix.rstrip(".") + ".")
            report = load_backbone(self, content, **source.options)
        except ValueError as error:
            raise CheckpointError(f"{source.checkpoint}: {error}") from error
        print_log(f"APTViT weights from {source.checkpoint}: {report.summary()}", "current")

    def _read_checkpoint(self, address: str) -> Mapping:
        """Read a checkpoint from a file, an address or ``timm://NAME``."""
        if not address.startswith("timm://"):
            return read_address(address)
        model = create_timm_model(address.removeprefix("timm://"), pretrained=True, img_size=self.img_size)
        self._check_same(apt_arguments(model), address)
        return model.state_dict()

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

    def _log_tokens_kept(self, share: float) -> None:
        if self.training:
            MessageHub.get_current_instance().update_scalar("train/tokens_kept", share)

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


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below ``prefix``, without it."""
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"no weight of the checkpoint starts with prefix={prefix!r}; it holds {list(state)[:4]}, ...")
    return found
