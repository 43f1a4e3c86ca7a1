"""Checkpoints of detection runs: read without running code, refused where they do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apt_dense.hosts.check_resumed_checkpoints import check_parts
from apt_dense.hosts.torchvision.run_settings import Settings
from apt_dense.weights.files import read_checkpoint
from apt_dense.weights.parameter_rules import is_new
from apt_dense.weights.tensor_checks import check_kinds

CHECKPOINT = "last.pth"  # in the output folder of tools/train_det_torchvision.py
BACKBONE = "backbone.net."  # prefix of the ViT's weights in the detector's state dict
#: What a checkpoint holds, and of which kind.
PARTS = {
    "model": Mapping, "optimizer": Mapping, "scheduler": Mapping, "iteration": int, "settings": Mapping,
    "categories": list,
}  # fmt: skip


def read_run(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint that ``Trainer.save`` wrote.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it is damaged or of another kind.
    """
    content = read_checkpoint(path)
    missing = [part for part in PARTS if part not in content] if isinstance(content, Mapping) else list(PARTS)
    if missing:
        raise ValueError(
            f"{path} is not a checkpoint of this tool: it lacks {missing}; a ViT's file goes to --pretrained"
        )
    check_parts(content, PARTS, path)
    return content


def settings_of(checkpoint: Mapping[str, Any], path: Path) -> Settings:
    """Read the settings of a checkpoint's content. Raises ValueError for settings of another version of the tool."""
    try:
        return Settings(**checkpoint["settings"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has settings that this version does not know: {error}") from error


def load_weights(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load a whole detector. One trained with thresholds can be used without, and the other way round.

    Raises:
        ValueError: for weights that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    try:
        check_kinds(state, own)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    shared = sorted(own.keys() & state.keys())
    problems = [f"{name} is of another shape" for name in shared if own[name].shape != state[name].shape]
    for word, names in (("missing", own.keys() - state.keys()), ("unknown", state.keys() - own.keys())):
        problems += [f"{name} is {word}" for name in sorted(names) if not is_new(name.removeprefix(BACKBONE))]
    if problems:
        raise ValueError(f"{path} does not fit the model: {len(problems)} problems, such as {'; '.join(problems[:3])}")
    model.load_state_dict(state, strict=False)
