"""Checkpoints of a run of MMSegmentation: written whole, read without running code, refused where they do not fit."""

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from torch import nn

from apt_dense.weights.files import read_checkpoint

COARSE_ONLY = "backbone.coarse_embed."  # parameters of a backbone with thresholds alone

_NUMPY_DTYPES = tuple(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "?"))

# MMEngine's list of harmless types lacks the float32 of its own metrics: it would warn about its own checkpoints at
# length and read them with weights_only=False.
torch.serialization.add_safe_globals(list(_NUMPY_DTYPES))


@register_backend("apt_atomic", force=True)
class AtomicLocalBackend(LocalBackend):
    """Local files that appear under their name only once they are complete.

    For ``CheckpointHook(backend_args=dict(backend="apt_atomic"))``: MMEngine writes a checkpoint in place, so that a
    run killed meanwhile leaves half a file under the name of a finished one.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write ``obj`` beside ``filepath``, then rename it."""
        partial = f"{filepath}.partial"
        super().put(obj, partial)
        os.replace(partial, filepath)


def read_run(path: str) -> Mapping:
    """The content of a checkpoint of MMEngine's: weights, optimizer, schedule, log. Pickled code is never run.

    Raises:
        FileNotFoundError, ValueError: no such file, or it is damaged or no checkpoint at all.
    """
    try:
        return read_checkpoint(Path(path).expanduser(), RUN_TYPES)
    except ValueError as error:
        raise ValueError(
            f"checkpoint {path} ({os.path.getsize(path)} bytes) cannot be read: it is cut off, damaged, no checkpoint, "
            "or holds pickled code other than MMEngine's. Use an older checkpoint, or copy it again"
        ) from error


def _history_method(owner: type, name: str) -> Callable:
    """What MMEngine's log buffers pickle as ``getattr(HistoryBuffer, "mean")`` and the like, and nothing else."""
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"the checkpoint asks for attribute {name!r} of {owner!r}, which is not allowed")
    return getattr(HistoryBuffer, name)


# MMEngine pickles its log with the weights; torch replaces builtins.getattr by the harmless function above.
RUN_TYPES = (
    HistoryBuffer,
    np.ndarray,
    np.dtype,
    np._core.multiarray._reconstruct,
    np._core.multiarray.scalar,
    *_NUMPY_DTYPES,
    (_history_method, "builtins.getattr"),
)


def check_resume(cfg: Config) -> None:
    """Make sure that ``--resume`` can continue: the checkpoint is whole and belongs to the same schedule.

    Nothing to resume is no error: MMEngine then starts from the beginning, so that one command serves every restart.

    Raises:
        FileNotFoundError, ValueError: the checkpoint is missing, damaged, or was made for another number of iterations
            (MMEngine would silently keep the learning rates of the old schedule).
    """
    marker = os.path.join(cfg.work_dir, "last_checkpoint")
    if cfg.get("load_from"):
        path, source = cfg.load_from, "load_from"
    elif os.path.isfile(marker):
        path, source = Path(marker).read_text().strip(), marker
    else:
        return
    if "://" in path:  # remote: left to MMEngine
        return
    try:
        states = read_run(path).get("param_schedulers") or []
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"cannot resume from what {source} names: {error} (its path can be edited)") from None
    _check_same_length(path, states, cfg.get("param_scheduler") or [])


def _check_same_length(path: str, states: Sequence[Mapping], schedulers: Sequence[Mapping]) -> None:
    """Compare the last iteration of the checkpoint's schedule with the config's, where both count iterations."""
    was, wanted = (
        max((s["end"] for s in group if not s.get("by_epoch", True) and "end" in s), default=None)
        for group in (states, schedulers)
    )
    if was is not None and wanted is not None and was != wanted:
        raise ValueError(
            f"{path} belongs to a schedule of {was} iterations, but {wanted} are asked for; resuming would keep the "
            f"learning rates of the old one. Resume with --max-iters {was}, or start a new schedule from these "
            f"weights: leave out --resume and add --cfg-options load_from={path}"
        )


def check_weights(model: nn.Module, checkpoint: Mapping, path: str) -> None:
    """Compare names and shapes with a checkpoint's before testing: MMEngine loads what fits and only logs the rest.

    A model trained with thresholds may be tested without and the other way round: the parameters for coarse patches,
    which only the one has, are then not used, or start at zero.

    Raises:
        ValueError: weights are missing, unknown or of another shape; what stays random makes the scores meaningless.
    """
    saved = {name.removeprefix("module."): value for name, value in checkpoint.get("state_dict", checkpoint).items()}
    own = model.state_dict()
    problems = {
        "missing": own.keys() - saved.keys(),
        "unknown": saved.keys() - own.keys(),
        "of another shape": {name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape},
    }
    for kind, names in problems.items():
        optional = {name for name in names if name.startswith(COARSE_ONLY) or name.endswith("num_batches_tracked")}
        problems[kind] = sorted(names if kind == "of another shape" else names - optional)
    listed = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in problems.items() if names]
    if listed:
        raise ValueError(f"{path} does not fit this config's model: of its weights {'; '.join(listed)}")
