"""MMSegmentation host: ``backbone=dict(type="APTViT", ...)`` after

    custom_imports = dict(imports=["apt_dense.hosts.mmseg"])

Registered in mmengine's root registries, so every OpenMMLab package finds it. The backbone needs mmengine only; with
MMSegmentation installed, the segmentor and test-time augmentation of ``mmseg_slide`` are registered, too.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.logging import MessageHub, print_log
from mmengine.model import BaseModule
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from apt_dense import vit
from apt_dense.hosts.mmseg.checkpoints import read_run
from apt_dense.options import usual_activation
from apt_dense.weights.load import load_backbone, unwrap
from apt_dense.weights.timm_models import apt_arguments, create_timm_model

#: Parameters of the embedding that are no weights of a layer.
_NOT_DECAYED = "pos_embed", "cls_token", "reg_token"


@MODELS.register_module()
class APTViT(vit.APTViT, BaseModule):
    """The adaptive ViT with an MMSeg user's arguments.

    Returns a tuple of (B, C, H / p, W / p), one per ``out_indices``, each of stride ``patch_size``: put MMSeg's
    MultiLevelNeck or Feature2Pyramid behind it for UPerNet. While training, the share of tokens kept is logged as
    ``tokens_kept`` (not with a budget, which says it).

    Args:
        pretrained: a checkpoint: a file, an address known to mmengine, or ``timm://NAME``. Short for
            ``init_cfg=dict(type="Pretrained", checkpoint=...)``.
        init_cfg: mmengine's initialisation config. "Pretrained" converts the files of all known ViTs (see
            ``checkpoints.py``), resamples positions (with ``resize_patches=True`` in it, also patches of another
            size), and raises if a weight is missing or unknown (``strict=False`` in it: warns instead).
        frozen_stages: -1 trains all; 0 freezes the embedding; n also the first n blocks. Parameters that only APT
            has are never frozen: no checkpoint of a plain ViT brings them.
        with_cp: activation checkpointing.
        norm_eval: keep norm layers in eval mode while training.
        pos_antialias: False by default here, as in MMSeg's VisionTransformer.
        **options: as for :class:`apt_dense.APTViT`.
    """

    def __init__(
        self,
        *,
        pretrained: str | None = None,
        init_cfg: dict | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        norm_eval: bool = False,
        pos_antialias: bool = False,
        **options: Any,
    ) -> None:
        if pretrained is not None and init_cfg is not None:
            raise ValueError("pretrained and init_cfg both say where weights come from; give one of them")
        super().__init__(checkpoint_blocks=with_cp, pos_antialias=pos_antialias, **options)
        if not -1 <= frozen_stages <= len(self.blocks):
            raise ValueError(
                f"frozen_stages={frozen_stages} must be from -1 to the number of blocks, {len(self.blocks)}"
            )
        self.init_cfg = {"type": "Pretrained", "checkpoint": pretrained} if pretrained is not None else init_cfg
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self._freeze()

    def init_weights(self) -> None:
        """Load the pretrained weights, if there are any."""
        config = self.init_cfg
        if not isinstance(config, Mapping) or config.get("type") != "Pretrained":
            print_log("APTViT starts from random weights; set backbone.pretrained for a checkpoint", "current")
            super().init_weights()
            if self.coarse_embed is not None:
                self.coarse_embed.reset_zero()  # an init_cfg for all linear layers means the plain ViT's
            return
        content = self._read_checkpoint(config["checkpoint"])
        if config.get("prefix"):
            content = _below(unwrap(content, backbone=False), config["prefix"].rstrip(".") + ".")
        options = {name: config[name] for name in ("strict", "resize_patches") if name in config}
        try:
            report = load_backbone(self, content, **options)
        except ValueError as error:
            raise ValueError(f"{config['checkpoint']}: {error}") from error
        print_log(f"APTViT weights from {config['checkpoint']}: {report.summary()}", "current")
        self._is_init = True

    def _read_checkpoint(self, address: str) -> Mapping:
        """The content of a checkpoint given by file, mmengine address or ``timm://NAME``."""
        if address.startswith("timm://"):
            model = create_timm_model(address.removeprefix("timm://"), pretrained=True, img_size=self.img_size)
            self._check_same(apt_arguments(model), address)
            return model.state_dict()
        if "://" in address:
            return CheckpointLoader.load_checkpoint(address, map_location="cpu")
        return read_run(address)

    def _check_same(self, arguments: Mapping[str, Any], address: str) -> None:
        """Compare what the shapes of the weights do not show."""
        own = {name: getattr(self.block_options, name) for name in ("num_heads", "norm_eps", "act_layer")}
        own |= {"class_token": self.cls_token is not None, "rotary": self.rotary}
        usual = {"class_token": False, "rotary": None, "act_layer": None}
        if own["act_layer"] == usual_activation(self.block_options.mlp_layer):
            own["act_layer"] = None
        for name, value in own.items():
            theirs = arguments.get(name, usual.get(name))
            if theirs != value:
                raise ValueError(f"{address} has {name}={theirs}, this backbone {name}={value}")

    def _log_tokens_kept(self, share: float) -> None:
        if self.training:
            MessageHub.get_current_instance().update_scalar("train/tokens_kept", share)

    def train(self, mode: bool = True) -> "APTViT":
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
        for parameter in (self.pos_embed, self.cls_token, self.reg_token, *self.norm_pre.parameters()):
            if parameter is not None:
                parameter.requires_grad_(False)


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not found:
        raise ValueError(f"no weight of the checkpoint starts with prefix={prefix!r}; it holds {list(state)[:4]}, ...")
    return found


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class APTLearningRateDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning rate decay for a model whose ``backbone`` is an :class:`APTViT`.

    ``paramwise_cfg=dict(decay_rate=0.9)``: the embedding gets decay_rate**(depth + 1) of the rate, block i
    decay_rate**(depth - i), everything else the full rate: heads, the final norm, and the parameters that only APT
    has, since no checkpoint brings them. Biases, norms, positions, class and register tokens are not decayed.
    ``num_layers`` (default: the backbone's blocks) replaces depth. MMSeg's own constructor knows BEiT and MAE only.
    """

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        depth = self.paramwise_cfg.get("num_layers") or len(module.backbone.blocks)
        decay_rate = self.paramwise_cfg["decay_rate"]
        groups: dict[tuple[int, bool], dict] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer, decays = layer_of(name, depth), parameter.ndim > 1 and not name.endswith(_NOT_DECAYED)
            scale = decay_rate ** (depth + 1 - layer)
            group = groups.setdefault((layer, decays), {
                "params": [], "lr": scale * self.base_lr, "lr_scale": scale, "param_names": [],
                "weight_decay": self.base_wd if decays else 0.0,
            })  # fmt: skip
            group["params"].append(parameter)
            group["param_names"].append(name)
        params.extend(groups[key] for key in sorted(groups))
        _log_groups(params)


def layer_of(name: str, depth: int) -> int:
    """The layer of a parameter of a segmentor: 0 for the embedding, i + 1 for block i, depth + 1 for all others."""
    if name.startswith(("backbone.patch_embed.", "backbone.norm_pre.", *(f"backbone.{n}" for n in _NOT_DECAYED))):
        return 0
    if name.startswith("backbone.blocks."):
        return int(name.split(".")[2]) + 1
    return depth + 1


def _log_groups(groups: Sequence[dict]) -> None:
    lines = {f"group {i}": {k: v for k, v in group.items() if k != "params"} for i, group in enumerate(groups)}
    print_log(f"Parameter groups: {json.dumps(lines, indent=2)}", "current")
