"""Layer-wise decay of the learning rate and mixed precision without a GPU, for MMEngine's optimizers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from torch import nn

from apt_dense.weights.parameter_rules import parameter_groups


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class APTLearningRateDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise decay of the learning rate for a model whose ``backbone`` is an ``APTViT``.

    With ``paramwise_cfg=dict(decay_rate=0.9)`` the embedding gets decay_rate**(depth + 1) of the rate, block i
    decay_rate**(depth - i), and everything else the full rate: heads, the final norm, and parameters that no checkpoint
    of a plain ViT holds. ``backbone_lr_mult=0.02`` multiplies the rate of the whole backbone, for a pretrained one
    below new heads. ``num_layers`` (default: the number of the backbone's blocks) replaces depth. Biases, norms,
    absolute positions, class and register tokens have no weight decay. The rule is in ``weights.parameter_rules``;
    MMSeg's own constructor supports BEiT and MAE only.
    """

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        """Append the groups of all trainable parameters to ``params``."""
        if self.base_wd is None:
            raise ValueError("layer-wise decay also sets weight decay: give optim_wrapper.optimizer.weight_decay")
        depth = self.paramwise_cfg.get("num_layers") or len(module.backbone.blocks)
        rates = self.paramwise_cfg["decay_rate"], self.paramwise_cfg.get("backbone_lr_mult", 1.0)
        groups = parameter_groups(module, depth, self.base_lr, self.base_wd, *rates)
        _log_groups(groups)
        params.extend(groups)


def _log_groups(groups: Sequence[dict]) -> None:
    """Log a line for each group, where MMEngine's constructors log one for each parameter."""
    lines = [
        f"  lr {group['lr']:.3g}, weight decay {group['weight_decay']:g}: {len(group['params'])} parameters, "
        f"{' to '.join(dict.fromkeys((group['param_names'][0], group['param_names'][-1])))}"
        for group in groups
    ]
    print_log("\n".join(["Parameter groups:", *lines]), "current")


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Mixed precision without a GPU: bfloat16 autocast, which needs no loss scaling (AmpOptimWrapper refuses a CPU)."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run forward passes of the body under autocast."""
        with super().optim_context(model), torch.autocast("cpu", dtype=torch.bfloat16):
            yield
