"""The optimizer of a detection run, and how its learning rate changes."""

from typing import Any

import torch
from torchvision.models.detection import FasterRCNN

from apt_dense.hosts.torchvision.run_settings import Settings
from apt_dense.hosts.torchvision.safe_checkpoints import BACKBONE
from apt_dense.weights.parameter_rules import decays, lr_scale


def make_optimizer(model: FasterRCNN, settings: Settings) -> torch.optim.AdamW:
    """Build AdamW with layer-wise decay: heads have the full rate, each layer before them ``lr_decay`` of the next."""
    decay = settings.lr_decay or (0.7 if settings.pretrained else 1.0)
    depth = len(model.backbone.net.blocks)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        inner = name.removeprefix(BACKBONE)
        scale = lr_scale(inner, depth, decay) if inner != name else 1.0
        shrinks = decays(inner, parameter)
        rates = {"lr": settings.lr * scale, "weight_decay": settings.weight_decay * shrinks}
        groups.setdefault((scale, shrinks), {"params": [], **rates})["params"].append(parameter)
    return torch.optim.AdamW([groups[key] for key in sorted(groups)])


def rate_at(iteration: int, warmup: int, iterations: int) -> float:
    """Return the factor of the learning rate, by ViTDet's schedule.

    It rises over the warm-up, and falls to a tenth at 8/9 and a hundredth at 26/27 of the run.
    """
    rise = min(1.0, (iteration + 1) / (warmup + 1))
    return rise * 0.1 ** ((iteration >= iterations * 8 / 9) + (iteration >= iterations * 26 / 27))
