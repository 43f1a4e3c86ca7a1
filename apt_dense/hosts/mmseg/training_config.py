"""Prepare the config of a run of MMSegmentation: overrides, and training without a GPU.

The functions edit a config in place; the Runner is MMEngine's own.
"""

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device

from apt_dense.hosts.mmseg.config_errors import check_kinds_of_keys
from apt_dense.hosts.mmseg.dataset_checks import dataset_configs, one_line
from apt_dense.hosts.mmseg.own_data_config import complete_own_data
from apt_dense.hosts.mmseg.safe_checkpoints import check_start
from apt_dense.hosts.mmseg.scale_iou_metric import add_hook

#: Options of MMEngine's schedulers that count iterations.
_ITERATIONS = {"begin", "end", "total_steps", "T_max", "milestones", "step_size", "periods"}
LOG_LINES = 10  # at least, in a run shorter than the config's


def load_config(
    path: str, options: Mapping | None = None, *, data_root: str | None = None, max_iters: int | None = None
) -> Config:
    """Read a config, override parts of it, complete it where it names data of one's own (``complete_own_data``) or a
    metric that needs a hook (``add_hook``), and check that the weights it starts from can be read (``check_start``).

    Args:
        path: config file.
        options: ``--cfg-options``: dotted key -> value. ``data_root`` and ``max_iters`` (also ``train_cfg.max_iters``)
            mean the same as the arguments below; every other key sets one place and is applied last.
        data_root: folder of the data, set in every data loader.
        max_iters: iterations of training; the schedule and intervals are scaled with it (``set_max_iters``).

    Raises:
        FileNotFoundError: if the config or the file that ``load_from`` names does not exist.
        ValueError: if the config cannot be read, an option does not fit it, ``max_iters`` is not a positive integer, or
            that file cannot be read safely.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no config file {path}")
    cfg, options = _read_config(path), dict(options or {})
    data_root = _first(data_root, options.pop("data_root", None))
    max_iters = _first(max_iters, options.pop("max_iters", None), options.pop("train_cfg.max_iters", None))
    if data_root is not None:
        set_data_root(cfg, data_root)
    if max_iters is not None:
        set_max_iters(cfg, max_iters)
    try:
        cfg.merge_from_dict(options)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"--cfg-options {' '.join(options)} does not fit {path}: {one_line(error)}") from error
    check_kinds_of_keys(cfg)
    complete_own_data(cfg)
    add_hook(cfg)
    check_start(cfg)
    return cfg


def _read_config(path: str) -> Config:
    try:
        return Config.fromfile(path)
    except Exception as error:  # a config is a program: whatever it raises
        raise ValueError(f"{path} cannot be read as a config of MMEngine: {one_line(error)}") from error


def _first(*values: Any) -> Any:
    """Return the first value that is given, or None."""
    return next((value for value in values if value is not None), None)


def set_data_root(cfg: Config, data_root: str) -> None:
    """Set ``data_root`` wherever a config repeats it: MMEngine copies the value into each data loader as it parses."""
    cfg.data_root = data_root
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for dataset in dataset_configs(cfg.get(loader)):
            dataset["data_root"] = data_root


def set_max_iters(cfg: Config, max_iters: int) -> None:
    """Train for ``max_iters`` iterations and scale the schedule: a warm-up of 1500 of 160000 becomes 15 of 1600.

    Intervals of validation, checkpoints and the log are shortened where the run would end before the first of them.

    Raises:
        ValueError: if the config does not train by iterations, or ``max_iters`` is not a positive integer.
    """
    before = (cfg.get("train_cfg") or {}).get("max_iters")
    if before is None:
        raise ValueError("max_iters was given, but this config trains by epochs or not at all: set train_cfg instead")
    if not isinstance(max_iters, int) or max_iters < 1:
        raise ValueError(f"max_iters={max_iters!r}: expected a whole number of iterations, at least 1")
    cfg.max_iters = cfg.train_cfg.max_iters = max_iters
    cfg.train_cfg.val_interval = min(cfg.train_cfg.get("val_interval", 1000), max_iters)
    cfg.param_scheduler = _scaled(cfg.get("param_scheduler"), max_iters / before)
    for name, longest in (("checkpoint", max_iters), ("logger", math.ceil(max_iters / LOG_LINES))):
        hook = (cfg.get("default_hooks") or {}).get(name) or {}
        if "interval" in hook:
            hook["interval"] = min(hook["interval"], longest)


def _scaled(schedulers: dict | list[dict] | None, factor: float) -> list[dict] | None:
    """Multiply the iterations of one or several schedulers by a factor."""
    if schedulers is None:
        return None
    schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
    for scheduler in schedulers:
        for key in _ITERATIONS & scheduler.keys() if not scheduler.get("by_epoch", True) else ():
            scheduler[key] = _scaled_iterations(scheduler[key], factor, least=0 if key in ("begin", "end") else 1)
    # A very short run rounds its warm-up to nothing, which MMEngine would refuse.
    return [one for one in schedulers if one.get("begin", 0) < one.get("end", math.inf)]


def _scaled_iterations(value: int | list[int] | None, factor: float, least: int) -> int | list[int] | None:
    if isinstance(value, list | tuple):
        return [_scaled_iterations(each, factor, least) for each in value]
    return None if value is None else max(least, round(value * factor))


def complete_training(cfg: Config) -> None:
    """Check that a config can be trained, before its data are read.

    Raises:
        ValueError: if it has no model, data, loop or optimizer, or validates without data or a metric.
    """
    for key in ("model", "train_dataloader", "train_cfg", "optim_wrapper"):
        if not cfg.get(key):
            raise ValueError(f"the config has no {key}, which training needs; see configs/mmseg for examples")
    parts = [key for key in ("val_dataloader", "val_evaluator", "val_cfg") if cfg.get(key)]
    if parts == ["val_dataloader", "val_evaluator"]:
        cfg.val_cfg = {"type": "ValLoop"}
    elif 0 < len(parts) < 3:
        raise ValueError(
            f"the config has {' and '.join(parts)}, but validation needs val_dataloader, val_evaluator and val_cfg; "
            f"set all three, or all to None"
        )
    # A test is not part of training, and MMEngine refuses half a one.
    if not all(cfg.get(key) for key in ("test_dataloader", "test_evaluator", "test_cfg")):
        cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None


def use_amp(cfg: Config) -> None:
    """Train in mixed precision: float16 with loss scaling (or ``optim_wrapper.dtype``), and bfloat16 on a CPU.

    Raises:
        ValueError: if the optimizer wrapper is missing or not MMEngine's plain one, or the CPU is to use another dtype.
    """
    wrapper = cfg.get("optim_wrapper")
    if not wrapper:
        raise ValueError(
            "--amp changes optim_wrapper, but the config has none; add optim_wrapper = dict(optimizer=...)"
        )
    if wrapper.get("constructor") is None and "optimizer" not in wrapper:
        raise ValueError("--amp needs a single optimizer in optim_wrapper, but the config has none or several")
    wrapper.setdefault("type", "OptimWrapper")  # MMEngine's own default
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
    """Set the launcher and, without a GPU, prepare the config for distributed training on CPUs.

    MMEngine selects a CUDA device per process, passes it to DistributedDataParallel, and keeps SyncBN, which has no CPU
    implementation (a single process replaces SyncBN automatically).

    Raises:
        ValueError: if the launcher needs GPUs and there is none.
    """
    cfg.launcher = launcher
    if launcher == "none" or get_device() != "cpu":
        return
    if launcher != "pytorch":
        raise ValueError(f"--launcher {launcher} needs GPUs; without one use torchrun and --launcher pytorch")
    for norm in _configs_of_type(cfg.model, "SyncBN"):
        norm["type"] = "BN"
    cfg.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}
    cfg.env_cfg = {**(cfg.get("env_cfg") or {}), "dist_cfg": {"backend": "gloo"}}
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
