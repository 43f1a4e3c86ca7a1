"""Checkpoints of MMSegmentation: written whole, read without running code, refused where they do not fit."""

import hashlib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend, get_local_path, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import get_external_models, get_mmcls_models, get_torchvision_models
from torch import Tensor, nn

from apt_dense.hosts.check_resumed_checkpoints import check_iteration, check_optimizer, check_parts, continuing_from
from apt_dense.weights.files import CheckpointError, read_checkpoint, write_whole
from apt_dense.weights.parameter_rules import is_new
from apt_dense.weights.tensor_checks import check_kinds, check_names


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
        CheckpointError: if the file is damaged or not a checkpoint at all.
    """
    path = Path(path).expanduser()
    try:
        return read_checkpoint(path, RUN_TYPES)
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {path} ({os.path.getsize(path)} bytes) cannot be read: it is cut off, damaged, no checkpoint, "
            "or holds pickled code other than MMEngine's. Use an older checkpoint, or copy it again"
        ) from error


def read_address(address: str) -> Mapping:
    """Read a checkpoint as :func:`read_run` does, from a file or from an address: http://, https://, s3:// and other
    backends of MMEngine's file I/O, and the names of MMEngine's zoos (mmcls://NAME, torchvision://NAME, ...).

    Raises:
        FileNotFoundError, CheckpointError: as :func:`read_run`; the latter also for addresses that are not supported
            and for a failed download.
    """
    address = local_address(address)
    if "://" not in address:
        return read_run(address)
    try:
        with get_local_path(address) as path:
            return read_run(path)
    except KeyError as error:
        raise CheckpointError(
            f"{address}: expected a file, http://, https://, s3://, mmcls://NAME or timm://NAME; download it first"
        ) from error


def local_address(address: str) -> str:
    """Download the file at http://, https:// or a name in a zoo, unless it is in torch's cache, and return its path
    there. Other addresses are returned unchanged."""
    address = _address_in_zoo(address)
    if not address.startswith(("http://", "https://")):
        return address
    # Many addresses end in the same name, such as "model.safetensors".
    name = f"{hashlib.sha256(address.encode()).hexdigest()[:8]}-{os.path.basename(urlsplit(address).path)}"
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if not os.path.isfile(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            # Writes to a random name and renames, so several processes can do this at the same time.
            torch.hub.download_url_to_file(address, path, progress=False)
        except (OSError, ValueError) as error:  # urllib's are of the first kind, those of a bad address of the second
            raise CheckpointError(f"{address} cannot be downloaded ({error}); download it first") from error
    return path


_ZOOS = {
    "mmcls": get_mmcls_models, "torchvision": get_torchvision_models, "modelzoo": get_torchvision_models,
    "open-mmlab": get_external_models, "openmmlab": get_external_models,
}  # fmt: skip


def _address_in_zoo(address: str) -> str:
    """Look up ZOO://NAME in MMEngine's lists; return any other address unchanged."""
    zoo, _, name = address.partition("://")
    if zoo not in _ZOOS or not name:
        return address
    addresses = _ZOOS[zoo]()
    if name not in addresses:
        alike = [known for known in addresses if known.startswith("vit_")] or list(addresses)[:8]
        raise CheckpointError(f"{address} is unknown; MMEngine lists {', '.join(alike)}")
    return addresses[name]


@CheckpointLoader.register_scheme(prefixes=tuple(CheckpointLoader._schemes), force=True)
def load_from_safe(filename: str, map_location: Any = None) -> dict:
    """Read a checkpoint for MMEngine: its Runner, its ``init_cfg`` of any module and all else that loads weights.

    MMEngine's own loaders read what torch refuses a second time and run the code in it. Tensors come on the CPU,
    whatever ``map_location`` is: all of MMEngine's callers copy them to where they belong.
    """
    content = read_address(filename)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"checkpoint {filename} holds {type(content).__name__}; expected a dictionary of weights")
    if isinstance(content.get("meta"), Mapping) and "config" in content["meta"]:
        # MMEngine runs this text as a Python config when it resumes.
        content["meta"] = {key: value for key, value in content["meta"].items() if key != "config"}
    return content


_METHODS = {
    HistoryBuffer: ("min", "max", "mean", "current"),
    OneCycleParamScheduler: ("_annealing_cos", "_annealing_linear"),
}


def _known_method(owner: type, name: str) -> Callable:
    """Get what MMEngine's log buffers and schedules pickle as ``getattr(HistoryBuffer, "mean")`` and the like, and
    nothing else."""
    if name not in _METHODS.get(owner, ()):
        raise pickle.UnpicklingError(f"the checkpoint asks for attribute {name!r} of {owner!r}, which is not allowed")
    return getattr(owner, name)


# MMEngine pickles its log and its schedules with the weights; torch replaces builtins.getattr by the harmless function.
RUN_TYPES = HistoryBuffer, OneCycleParamScheduler, (_known_method, "builtins.getattr")


# ---- checks before a run


def check_start(cfg: Config) -> None:
    """Read the checkpoint that ``load_from`` names before a model is built. Download it first if needed; ``load_from``
    then names the file.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it is damaged or holds code.
    """
    if not cfg.get("load_from"):
        return
    try:
        cfg.load_from = local_address(cfg.load_from)
        load_from_safe(cfg.load_from)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"cannot start from what load_from names: {error}") from None


def check_resume(cfg: Config) -> int | None:
    """Check that ``--resume`` can continue: the checkpoint is whole and belongs to the same schedule.

    Returns:
        The seed of the run to continue; None without a checkpoint.

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
        return None
    try:
        content = load_from_safe(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"cannot resume from what {source} names: {error} (its path can be edited)") from None
    if not isinstance(content.get("meta"), Mapping) or "state_dict" not in content:
        raise CheckpointError(
            f"cannot resume from what {source} names: {path} is no checkpoint of a run. To start from its weights, "
            "leave out --resume and set load_from"
        )
    _check_run(content, cfg, path)
    return content["meta"].get("seed")


def _check_run(content: Mapping, cfg: Config, path: str) -> None:
    """Check the parts that MMEngine passes over where they are missing or too few, and the length of the schedule."""
    schedulers = _as_list(cfg.get("param_scheduler"))
    kinds = {"state_dict": Mapping, "message_hub": Mapping, "optimizer": Mapping}
    check_parts(content, kinds | ({"param_schedulers": (list, Mapping)} if schedulers else {}), path)
    check_optimizer(content["optimizer"], content, path)
    check_parts(content["meta"], {"iter": int, "epoch": int}, path)
    check_iteration(content["meta"]["iter"], (cfg.get("train_cfg") or {}).get("max_iters"), path)
    states = content.get("param_schedulers") or []
    if not isinstance(states, list):  # one list an optimizer
        return
    with continuing_from(path):
        _check_same_length(path, states, schedulers)
    if len(states) != len(schedulers):
        raise CheckpointError(
            f"{path} was saved with {len(states)} schedules (param_scheduler), this config has {len(schedulers)}; "
            f"resume with the config of the run"
        )


def _as_list(schedulers: Mapping | Sequence | None) -> Sequence[Mapping]:
    return [schedulers] if isinstance(schedulers, Mapping) else schedulers or []


_NEVER = 10**9  # MMEngine's default of a scheduler's end


def _last_iteration(scheduler: Mapping) -> int | None:
    """The last iteration of a scheduler's config or state; OneCycleLR may have a number of steps and end never."""
    end, steps = scheduler.get("end", _NEVER), scheduler.get("total_steps")
    if end < _NEVER:
        return end
    return scheduler.get("begin", 0) + steps if steps else None


def _check_same_length(path: str, states: Sequence[Mapping], schedulers: Sequence[Mapping]) -> None:
    """Compare the last iteration of the checkpoint's schedule with the config's, where both count iterations."""
    was, wanted = (
        max((end for s in group if not s.get("by_epoch", True) and (end := _last_iteration(s))), default=None)
        for group in (states, schedulers)
    )
    if was is not None and wanted is not None and was != wanted:
        raise CheckpointError(
            f"{path} belongs to a schedule of {was} iterations, but {wanted} are asked for; resuming would keep the "
            f"learning rates of the old one. Resume with --max-iters {was}, or start a new schedule from these "
            f"weights: leave out --resume and add --cfg-options load_from={path}"
        )


def check_weights(model: nn.Module, checkpoint: Mapping, path: str) -> None:
    """Compare names and shapes with a checkpoint's before testing. MMEngine loads what fits and only logs the rest.

    A model trained with thresholds may be tested without them and the other way round: parameters for coarse patches
    are then unused, or start at zero.

    Raises:
        CheckpointError: if weights are missing, unknown or of another shape, since random ones make scores meaningless.
    """
    own = model.state_dict()
    saved = _saved_weights(checkpoint, own, path)
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
        raise CheckpointError(f"{path} does not fit this config's model: of its weights {'; '.join(listed)}")


def check_any_fits(model: nn.Module, checkpoint: Mapping, path: str) -> None:
    """Refuse a checkpoint to start from of which no weight fits: MMEngine would train from random weights.

    Raises:
        CheckpointError: if no weight has the name and the shape of one of the model's.
    """
    own = model.state_dict()
    saved = _saved_weights(checkpoint, own, path)
    if any(name in own and getattr(value, "shape", None) == own[name].shape for name, value in saved.items()):
        return
    raise CheckpointError(
        f"load_from={path}: none of its {len(saved)} weights ({', '.join(map(str, list(saved)[:3]))}, ...) fits one of "
        f"the model's ({', '.join(list(own)[:3])}, ...), which would start from random numbers. It takes whole "
        "segmentors; set model.backbone.pretrained for the file of a ViT"
    )


def _saved_weights(checkpoint: Mapping, own: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """The state dict, without what DistributedDataParallel puts before its names, as MMEngine reads it."""
    state = checkpoint.get("state_dict", checkpoint)
    try:
        check_names(state)
        saved = {name.removeprefix("module."): value for name, value in state.items()}
        check_kinds(saved, own)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return saved
