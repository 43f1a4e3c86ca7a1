"""Mistakes in MMEngine's configs, as one line that names the key instead of a traceback through its registries."""

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from traceback import walk_tb
from types import TracebackType
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.runner import BaseLoop, Runner

from apt_dense.hosts.mmseg.mask_pixels_per_class import type_name
from apt_dense.hosts.readable_images import DataError
from apt_dense.hosts.run_errors import explaining_errors, find_parts
from apt_dense.option_checks import flag, optional, text, whole
from apt_dense.weights.files import CheckpointError

_LOADERS = "train_dataloader", "val_dataloader", "test_dataloader"
_GROUPS = (
    "model", "model.backbone", "model.decode_head", *_LOADERS, *(f"{name}.dataset" for name in _LOADERS), "train_cfg",
    "val_cfg", "test_cfg", "optim_wrapper", "optim_wrapper.optimizer", "default_hooks", "randomness", "env_cfg",
    "visualizer", "log_processor", "auto_scale_lr", "tta_model",
)  # fmt: skip
_LISTS = "custom_hooks", "tta_pipeline", *(f"{name}.dataset.pipeline" for name in _LOADERS)
_ONE_OR_MORE = "param_scheduler", "val_evaluator", "test_evaluator", "model.decode_head"
_PLAIN = str, int, float, list, tuple  # not built objects, which MMEngine takes, too
_TEXTS = "work_dir", "load_from", "default_scope", "log_level"
_CHECKS = dict.fromkeys(_TEXTS, text) | {
    "resume": flag, "train_cfg.max_iters": whole(1), "train_cfg.val_interval": whole(1),
    "default_hooks.checkpoint.interval": whole(-1), "default_hooks.checkpoint.max_keep_ckpts": whole(-1),
}  # fmt: skip
_IOU_METRICS = {"mIoU", "mDice", "mFscore"}  # MMSegmentation's own check comes after the first validation


class ConfigError(ValueError):
    """A part of a config is of another kind than expected, or cannot be built. Tools report it in one line."""


def check_kinds_of_keys(cfg: Config) -> None:
    """Check the kinds of the parts of a config that are read before it is built; absent ones and None pass.

    Raises:
        ConfigError: naming the key, its value and what is expected.
    """
    parts = dict(cfg.items())
    for key in _GROUPS:
        value = _at(parts, key)
        many = key in _ONE_OR_MORE and isinstance(value, list | tuple)
        if not many and isinstance(value, _PLAIN):
            raise ConfigError(f"{key}={value!r:.80} in the config must be a dictionary")
    for key in (*_LISTS, *_ONE_OR_MORE):
        _check_parts(key, _at(parts, key), key in _ONE_OR_MORE)
    for key in _LOADERS:
        if parts.get(key) and not _at(parts, f"{key}.dataset"):
            raise ConfigError(f"{key} in the config has no dataset")
    for key in ("val_evaluator", "test_evaluator"):
        _check_metrics(key, parts.get(key))
    for key, check in _CHECKS.items():
        try:
            optional(check)(key, _at(parts, key))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the config's {error}") from None


def _check_parts(key: str, value: Any, one_allowed: bool) -> None:
    """Check a list of parts, each with a type."""
    if value is None or (one_allowed and isinstance(value, Mapping)):
        return
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{key}={value!r:.80} in the config must be a list of dictionaries with a type")
    for number, part in enumerate(value):
        if not isinstance(part, Mapping) or "type" not in part:
            raise ConfigError(f"{key}[{number}]={part!r:.80} in the config must be a dictionary with a type")


def _check_metrics(key: str, value: Any) -> None:
    for part in [value] if isinstance(value, Mapping) else value or ():
        names = part.get("iou_metrics", "mIoU")
        names = {names} if isinstance(names, str) else set(names)
        if type_name(part) == "IoUMetric" and not names <= _IOU_METRICS:
            raise ConfigError(f"{key}.iou_metrics={sorted(names)} in the config must be of {sorted(_IOU_METRICS)}")


def _at(node: Any, key: str) -> Any:
    """Return the value at a dotted key; None if it, or a part on the way, is absent."""
    for name in key.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


@contextmanager
def building_from(cfg: Config) -> Iterator[None]:
    """Turn errors of building the parts of a config into a ConfigError that names the key.

    Errors of training and testing stay as they are (see ``running``), and so do those that say what to do already.
    """
    try:
        yield
    except (CheckpointError, ConfigError, OSError):
        raise
    except Exception as error:  # registries, and the constructors they call, raise errors of any kind
        found = _key_built(cfg, error.__traceback__)
        if found is None:
            raise
        raise ConfigError(f"{found} cannot be built: {_reason(error)}") from error


@contextmanager
def running(cfg: Config) -> Iterator[None]:
    """Build, train or test: errors become a ConfigError (``building_from``) or, once it runs, a RunError that names the
    part of the config and the file in the work dir that has the traceback. DataErrors, CheckpointErrors and OSErrors
    stay."""
    expected, parts = (CheckpointError, ConfigError, DataError), dict(cfg.items())
    with explaining_errors(cfg.work_dir, parts, expected, partial(_advice, cfg)), building_from(cfg):
        yield


def _advice(cfg: Config, error: Exception) -> str:
    """A hint that MMSegmentation's own message lacks."""
    functions = {frame.f_code.co_name for frame, _ in walk_tb(error.__traceback__)}
    if "_transform_inputs" in functions and isinstance(error, IndexError):
        return "in_index of a head counts the maps of the backbone or neck, from 0"
    if not _at(dict(cfg.items()), "model.data_preprocessor") and not _at(dict(cfg.items()), "model.module"):
        return "model has no data_preprocessor, which makes batches of images, such as SegDataPreProcessor"
    return ""


def _reason(error: Exception) -> str:
    """The kind and the start of an error's message, without MMEngine's link to its manual."""
    words = error.args[0] if isinstance(error, KeyError) and error.args else error
    said = " ".join(str(words).split()).partition(". Please check")[0]
    return f"{type(error).__name__}: {said[:300]}".strip(": ")


def _key_built(cfg: Config, trace: TracebackType | None) -> str | None:
    """The part that was being built where an error was raised; None if a loop ran, or nothing was built."""
    parts, key, found, running = dict(cfg.items()), None, None, False
    while trace is not None:
        function, names = trace.tb_frame.f_code.co_name, trace.tb_frame.f_locals
        if isinstance(names.get("self"), Runner):
            found = found or "the config"
        if isinstance(names.get("self"), BaseLoop) and function.startswith("run"):
            running = True
        elif function == "call_hook":
            running &= names.get("fn_name") != "before_train"  # which loops call
            key = next(find_parts(parts, partial(_describes, names.get("hook"))), None)
        else:
            key = _RUNNER_PARTS.get(function) or _key_of_first(parts, trace)
        found = f"{key} in the config" if key else found
        trace, key = trace.tb_next, None
    return None if running else found


#: By methods of the Runner whose arguments are no longer as in the config.
_RUNNER_PARTS = {"set_randomness": "randomness", "build_logger": "log_level", "build_visualizer": "visualizer"}


def _key_of_first(parts: Mapping, trace: TracebackType) -> str | None:
    """The key of the first argument that is a part of a config. Constructors have several, and build them elsewhere."""
    frame = trace.tb_frame
    if frame.f_code.co_name in ("__init__", "from_cfg") or frame.f_globals.get("__name__", "").startswith("apt_dense."):
        return None
    arguments = (value for value in frame.f_locals.values() if isinstance(value, ConfigDict) and value)
    return next(
        (key for value in arguments if (key := next(find_parts(parts, partial(operator.eq, value)), None))), None
    )


def _describes(hook: object, part: Any) -> bool:
    return isinstance(part, ConfigDict) and type_name(part) == type(hook).__name__
