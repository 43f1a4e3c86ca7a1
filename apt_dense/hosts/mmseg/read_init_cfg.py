"""Parse the backbone's ``init_cfg``: a checkpoint and MMEngine's initialisers."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from mmengine.model import PretrainedInit

from apt_dense.option_checks import flag, optional, pair, text

_KINDS = "Pretrained", PretrainedInit


class Pretrained(NamedTuple):
    """A checkpoint to start from.

    Args:
        checkpoint: a file or an address.
        prefix: of the backbone's names in it; "" for any that is known.
        options: of ``load_backbone``.
    """

    checkpoint: str
    prefix: str
    options: dict[str, Any]


def split_init_cfg(init_cfg: Any) -> tuple[Pretrained | None, list[Mapping]]:
    """Tell the checkpoint in an ``init_cfg``, a dictionary or a list of them, from the other entries.

    MMEngine would load it without a word about names that do not fit.

    Raises:
        TypeError, ValueError: for anything else, naming it.
    """
    if not isinstance(init_cfg, Mapping | list | tuple | None):
        raise TypeError(f"init_cfg={init_cfg!r} must be a dictionary, a list of them, or None")
    entries = [init_cfg] if isinstance(init_cfg, Mapping) else list(init_cfg or ())
    for entry in entries:
        if not isinstance(entry, Mapping) or (entry and "type" not in entry):
            raise TypeError(f"init_cfg={init_cfg!r}: {entry!r} must be a dictionary with a type")
    found = [entry for entry in entries if entry.get("type") in _KINDS]
    if len(found) > 1:
        raise ValueError(f"init_cfg={init_cfg!r} names {len(found)} checkpoints; give one of them")
    others = [entry for entry in entries if entry and entry.get("type") not in _KINDS]
    return (_read(found[0]) if found else None), others


def with_resized_patches(init_cfg: Any) -> Any:
    """An ``init_cfg`` whose checkpoint's patches are resampled."""
    if isinstance(init_cfg, Mapping):
        return {**init_cfg, "resize_patches": True} if init_cfg.get("type") in _KINDS else init_cfg
    return [with_resized_patches(entry) for entry in init_cfg]


def _read(entry: Mapping[str, Any]) -> Pretrained:
    known = "type", "checkpoint", "prefix", "map_location", "strict", "resize_patches", "grid"
    unknown = sorted(set(entry) - set(known), key=str)
    if unknown:
        raise TypeError(f"init_cfg has no {unknown[0]!r}; a Pretrained one has {', '.join(known)}")
    checkpoint = entry.get("checkpoint")
    checkpoint = text("init_cfg.checkpoint", os.fspath(checkpoint) if hasattr(checkpoint, "__fspath__") else checkpoint)
    if not checkpoint:
        raise ValueError("init_cfg.checkpoint='' must be a file or an address")
    prefix = optional(text)("init_cfg.prefix", entry.get("prefix")) or ""
    checks = {"strict": flag, "resize_patches": flag, "grid": optional(pair)}
    options = {name: check(f"init_cfg.{name}", entry[name]) for name, check in checks.items() if name in entry}
    return Pretrained(checkpoint, prefix, options)
