"""Checkpoints of MMSegmentation: written whole, read without running code, refused where they do not fit."""

import hashlib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend, get_local_path, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import get_mmcls_models
from torch import nn

from apt_dense.weights.files import read_checkpoint, write_whole
from apt_dense.weights.parameters import is_new

# MMEngine's list of harmless types lacks the float32 of its own metrics (such as the best mIoU), and a type that it
# lacks makes it read the whole file again, running what is pickled in it. This is the only type added for all of torch.
torch.serialization.add_safe_globals([type(np.dtype("f4"))])


@register_backend("apt_atomic", force=True)
class AtomicLocalBackend(LocalBackend):
    """Local files that appear under their name only once they are complete.

    For ``CheckpointHook(backend_args=dict(backend="apt_atomic"))``. MMEngine's own backend writes in place, so a run
    killed while writing leaves half a file under the name of a finished one.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write ``obj`` to a temporary file and rename it to ``filepath``."""
        with write_whole(filepath) as partial:
            super().put(obj, str(partial))


# ---- reading


def read_run(path: str | Path) -> Mapping:
    """Read a checkpoint of MMEngine: weights, optimizer, schedule, log. Pickled code is never run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or not a checkpoint at all.
    """
    path = Path(path).expanduser()
    try:
        return read_checkpoint(path, RUN_TYPES)
    except ValueError as error:
        raise ValueError(
            f"checkpoint {path} ({os.path.getsize(path)} bytes) cannot be read: it is cut off, damaged, no checkpoint, "
            "or holds pickled code other than MMEngine's. Use an older checkpoint, or copy it again"
        ) from error


def read_address(address: str) -> Mapping:
    """Read a checkpoint as :func:`read_run` does, from a file or from an address: http://, https://, s3:// and other
    backends of MMEngine's file I/O, and mmcls://NAME. MMEngine's own loader would run pickled code in it.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_run`, and for addresses that are not supported.
        urllib.error.URLError: if a download fails.
    """
    address = local_address(address)
    if "://" not in address:
        return read_run(address)
    try:
        with get_local_path(address) as path:
            return read_run(path)
    except KeyError as error:
        raise ValueError(
            f"{address}: expected a file, http://, https://, s3://, mmcls://NAME or timm://NAME; download it first"
        ) from error


def local_address(address: str) -> str:
    """Download the file at http://, https:// or mmcls://NAME, unless it is in torch's cache, and return its path there.
    Other addresses are returned unchanged."""
    if address.startswith("mmcls://"):
        address = _address_in_zoo(address.removeprefix("mmcls://"))
    if not address.startswith(("http://", "https://")):
        return address
    # Many addresses end in the same name, such as "model.safetensors".
    name = f"{hashlib.sha256(address.encode()).hexdigest()[:8]}-{os.path.basename(urlsplit(address).path)}"
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if not os.path.isfile(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        # Writes to a random name and renames, so several processes can do this at the same time.
        torch.hub.download_url_to_file(address, path, progress=False)
    return path


def _address_in_zoo(name: str) -> str:
    addresses = get_mmcls_models()
    if name not in addresses:
        vits = [known for known in addresses if known.startswith("vit_")]
        raise ValueError(f"mmcls://{name} is unknown; the ViTs that MMEngine lists are {', '.join(vits)}")
    return addresses[name]


def _history_method(owner: type, name: str) -> Callable:
    """Get what MMEngine's log buffers pickle as ``getattr(HistoryBuffer, "mean")`` and the like, and nothing else."""
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"the checkpoint asks for attribute {name!r} of {owner!r}, which is not allowed")
    return getattr(HistoryBuffer, name)


_ARRAY, _NUMBER = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
# MMEngine pickles its log with the weights; torch replaces builtins.getattr by the harmless function above. NumPy
# renamed its private package in version 2.
RUN_TYPES = (
    HistoryBuffer,
    np.ndarray,
    np.dtype,
    *((_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_NUMBER, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "u1", "?")),
    (_history_method, "builtins.getattr"),
)


# ---- checks before a run


def check_start(cfg: Config) -> None:
    """Read the checkpoint that ``load_from`` names, so that MMEngine, which runs the code in files that it cannot read
    otherwise, only gets one without code. Download it first if needed; ``load_from`` then names the file.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it is damaged or holds code.
    """
    if not cfg.get("load_from"):
        return
    cfg.load_from = local_address(cfg.load_from)
    try:
        read_address(cfg.load_from)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"cannot start from what load_from names: {error}") from None


def check_resume(cfg: Config) -> None:
    """Check that ``--resume`` can continue: the checkpoint is whole and belongs to the same schedule.

    Without a checkpoint, MMEngine starts from the beginning, so that one command serves every restart.

    Raises:
        FileNotFoundError, ValueError: if the checkpoint is missing, damaged, or from a schedule of another number of
            iterations (MMEngine would silently keep the learning rates of the old schedule).
    """
    marker = os.path.join(cfg.work_dir, "last_checkpoint")
    if cfg.get("load_from"):
        path, source = cfg.load_from, "load_from"
    elif os.path.isfile(marker):
        path, source = Path(marker).read_text().strip(), marker
    else:
        return
    try:
        states = read_address(path).get("param_schedulers") or []
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
    """Compare names and shapes with a checkpoint's before testing. MMEngine loads what fits and only logs the rest.

    A model trained with thresholds may be tested without them and the other way round: parameters for coarse patches
    are then unused, or start at zero.

    Raises:
        ValueError: if weights are missing, unknown or of another shape, since random ones make scores meaningless.
    """
    saved = {name.removeprefix("module."): value for name, value in checkpoint.get("state_dict", checkpoint).items()}
    own = model.state_dict()
    problems = {
        "missing": own.keys() - saved.keys(),
        "unknown": saved.keys() - own.keys(),
        "of another shape": {name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape},
    }
    for kind, names in problems.items():
        optional = {name for name in names if is_new(name) or name.endswith("num_batches_tracked")}
        problems[kind] = sorted(names if kind == "of another shape" else names - optional)
    listed = [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in problems.items() if names]
    if listed:
        raise ValueError(f"{path} does not fit this config's model: of its weights {'; '.join(listed)}")
