"""What a run of MMSegmentation needs around its Runner: config overrides, training without a GPU, safe checkpoints.

Functions here edit a config in place before the Runner is built; the Runner itself is MMEngine's own.
"""

import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from apt_dense.checkpoints import read_checkpoint
from apt_dense.hosts.mmseg import _MMENGINE_TYPES, _NUMPY_DTYPES
from apt_dense.hosts.mmseg_data import dataset_configs

COARSE_ONLY = "backbone.coarse_embed."  # parameters of a backbone with thresholds alone
LOG_LINES = 10  # at least so many in a run shorter than the config's


# MMEngine's list of harmless types lacks the float32 of its own metrics: it would warn about its own checkpoints at length
# and read them with weights_only=False.
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


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Mixed precision without a GPU: bfloat16 autocast, which needs no loss scaling (AmpOptimWrapper refuses a CPU)."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Forward passes in here run under autocast."""
        with super().optim_context(model), torch.autocast("cpu", dtype=torch.bfloat16):
            yield


def load_config(path: str, options: Mapping | None = None, *, data_root: str | None = None,
                max_iters: int | None = None) -> Config:
    """Read a config and override parts of it.

    Args:
        path: config file.
        options: ``--cfg-options``: dotted key -> value. ``data_root`` and ``max_iters`` (also ``train_cfg.max_iters``)
            mean the same as the arguments below; every other key sets one place and has the last word.
        data_root: folder of the data, set in every data loader.
        max_iters: iterations of training; schedule and intervals follow (``set_max_iters``).

    Raises:
        FileNotFoundError, ValueError: no such config; no whole positive number of iterations.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no config file {path}")
    cfg, options = Config.fromfile(path), dict(options or {})
    data_root = data_root or options.pop("data_root", None)
    in_options = [options.pop(key) for key in ("max_iters", "train_cfg.max_iters") if key in options]
    if data_root is not None:
        set_data_root(cfg, data_root)
    if max_iters is not None or in_options:
        set_max_iters(cfg, in_options[0] if max_iters is None else max_iters)
    cfg.merge_from_dict(options)
    return cfg


def set_data_root(cfg: Config, data_root: str) -> None:
    """Set ``data_root`` wherever a config repeats it: MMEngine copies the value into each data loader as it parses."""
    cfg.data_root = data_root
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for dataset in dataset_configs(cfg.get(loader)):
            dataset["data_root"] = data_root


def set_max_iters(cfg: Config, max_iters: int) -> None:
    """Train for ``max_iters`` iterations with the same schedule, stretched: 1500 of 160000 warm up, so 15 of 1600 do.

    Intervals of validation, checkpoints and the log are shortened where the run would otherwise end before the first.
    """
    before = cfg.get("train_cfg", {}).get("max_iters")
    if before is None:
        raise ValueError("max_iters was given, but this config trains by epochs or not at all: set train_cfg instead")
    if not isinstance(max_iters, int) or max_iters < 1:
        raise ValueError(f"max_iters={max_iters!r}: expected a whole number of iterations, at least 1")
    cfg.max_iters = cfg.train_cfg.max_iters = max_iters
    cfg.train_cfg.val_interval = min(cfg.train_cfg.get("val_interval", 1000), max_iters)
    _scale_schedulers(cfg, max_iters / before)
    hooks = cfg.get("default_hooks", {})
    if "checkpoint" in hooks:
        hooks.checkpoint.interval = min(hooks.checkpoint.interval, max_iters)
    if "logger" in hooks:
        hooks.logger.interval = min(hooks.logger.interval, math.ceil(max_iters / LOG_LINES))


def _scale_schedulers(cfg: Config, factor: float) -> None:
    for scheduler in cfg.get("param_scheduler") or []:
        if not scheduler.get("by_epoch", True):
            for key in ("begin", "end"):
                if key in scheduler:
                    scheduler[key] = round(scheduler[key] * factor)
    # A very short run rounds its warm-up to nothing, which MMEngine would refuse.
    cfg.param_scheduler = [s for s in cfg.get("param_scheduler") or [] if s.get("begin", 0) < s.get("end", math.inf)]


def use_amp(cfg: Config) -> None:
    """Train in mixed precision: float16 with loss scaling (or ``optim_wrapper.dtype``), on a CPU bfloat16."""
    wrapper = cfg.optim_wrapper
    if wrapper.type not in ("OptimWrapper", "AmpOptimWrapper", "CPUAmpOptimWrapper"):
        raise ValueError(f"--amp cannot be combined with optim_wrapper.type={wrapper.type}: only with OptimWrapper")
    if get_device() != "cpu":
        wrapper.type = "AmpOptimWrapper"
        wrapper.setdefault("loss_scale", "dynamic")
        return
    dtype = wrapper.pop("dtype", "bfloat16")
    if dtype != "bfloat16":
        raise ValueError(f"optim_wrapper.dtype={dtype}: mixed precision on a CPU is bfloat16 only")
    wrapper.pop("loss_scale", None)
    wrapper.type = "CPUAmpOptimWrapper"


def start_processes(cfg: Config, launcher: str) -> None:
    """Set the launcher and, without a GPU, what MMEngine's distributed training takes for granted.

    MMEngine selects a CUDA device per process, hands it to DistributedDataParallel, and keeps SyncBN, which has no CPU
    code (with one process it replaces SyncBN by itself).
    """
    cfg.launcher = launcher
    if launcher == "none" or get_device() != "cpu":
        return
    if launcher != "pytorch":
        raise ValueError(f"--launcher {launcher} needs GPUs; without one use torchrun and --launcher pytorch")
    for norm in _configs_of_type(cfg.model, "SyncBN"):
        norm["type"] = "BN"
    cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    cfg.env_cfg.dist_cfg = dict(backend="gloo")
    if not dist.is_initialized():
        dist.init_process_group("gloo")  # MMEngine then leaves the existing group alone


def _configs_of_type(node: object, name: str) -> Iterator[dict]:
    """Every dict with ``type=name`` inside nested dicts and lists."""
    if isinstance(node, dict):
        if node.get("type") == name:
            yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from _configs_of_type(child, name)


def read_run(path: str) -> Mapping:
    """The content of a checkpoint of MMEngine's: weights, optimizer, schedule, log. Pickled code is never run.

    Raises:
        FileNotFoundError, ValueError: no such file, or it is damaged or no checkpoint at all.
    """
    # Types that are allowed already must stay so, but torch takes back whatever it is given here.
    new_types = [kind for kind in RUN_TYPES if kind not in torch.serialization.get_safe_globals()]
    try:
        return read_checkpoint(Path(path).expanduser(), new_types)
    except ValueError as error:
        raise ValueError(
            f"checkpoint {path} ({os.path.getsize(path)} bytes) cannot be read: it is cut off or damaged, no checkpoint, "
            "or holds pickled code other than MMEngine's. Use an older checkpoint, or copy it again"
        ) from error


def _history_method(owner: type, name: str) -> Callable:
    """What MMEngine's log buffers pickle as ``getattr(HistoryBuffer, "mean")`` and the like, and nothing else."""
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"the checkpoint asks for attribute {name!r} of {owner!r}, which is not allowed")
    return getattr(HistoryBuffer, name)


# MMEngine pickles its log with the weights; torch replaces builtins.getattr by the harmless function above.
RUN_TYPES = (*_MMENGINE_TYPES, *_NUMPY_DTYPES, (_history_method, "builtins.getattr"))


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
            f"{path} belongs to a schedule of {was} iterations, but {wanted} are asked for; resuming would keep the old "
            f"learning rates. Resume with --max-iters {was}, or start a new schedule from these weights: leave out "
            f"--resume and add --cfg-options load_from={path}"
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
