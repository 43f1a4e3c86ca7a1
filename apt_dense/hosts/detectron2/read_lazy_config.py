"""Read Detectron2's lazy configs, override them, and complete them for the machine at hand."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import LazyConfig
from detectron2.evaluation import COCOEvaluator
from omegaconf import DictConfig, OmegaConf

from apt_dense.hosts.detectron2.accumulation_and_bfloat16 import amp_dtype, check_precision
from apt_dense.option_checks import flag, optional, text, whole

# Below Detectron2's logger, whose setup then prints it and writes it to log.txt.
logger = logging.getLogger("detectron2.apt_dense")

#: Options of ``train`` that Detectron2 or this package understands but Detectron2's common/train.py does not list.
_TRAIN_OPTIONS = {
    "seed", "cudnn_benchmark", "float32_precision", "patch_schedule", "expected_tokens", "accumulate",
    "ap_by_scale",
}  # fmt: skip
_PARTS = "model", "dataloader", "train"


def load_config(path: str) -> DictConfig:
    """Read a lazy config from a Python file, or from the config.yaml of an earlier run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a yacs config, or cannot be read.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no config file {path or '(none given)'}; name one with --config-file, see configs/")
    if path.endswith((".yaml", ".yml")) and "_target_" not in Path(path).read_text(encoding="utf-8"):
        raise ValueError(
            f"{path} is a yacs config; this tool runs lazy configs. Train it with Detectron2's "
            f"tools/plain_train_net.py after adding apt_dense.hosts.detectron2.add_apt_config(cfg) there"
        )
    try:
        cfg = LazyConfig.load(path)
    except Exception as error:  # a config is a program: whatever it raises
        raise ValueError(f"{path} cannot be read as a lazy config: {_one_line(error)}") from error
    if not OmegaConf.is_dict(cfg):
        raise ValueError(f"{path} cannot be read as a lazy config: expected {', '.join(_PARTS)} by name, see configs/")
    return cfg


def check_parts(cfg: DictConfig, training: bool) -> None:
    """Check that a config has all that training, or the evaluation alone, needs. Raises ValueError."""
    needed = ("dataloader.train", "optimizer", "lr_multiplier") if training else ("dataloader.evaluator",)
    missing = [key for key in _PARTS if not OmegaConf.is_dict(cfg.get(key))]
    missing += [key for key in needed if not missing and OmegaConf.select(cfg, key) is None]
    if not missing and OmegaConf.select(cfg, "dataloader.evaluator") is not None and cfg.dataloader.get("test") is None:
        missing.append("dataloader.test")
    if missing:
        what = "training" if training else "--eval-only"
        raise ValueError(f"the config lacks {', '.join(missing)}, which {what} needs; see configs/detectron2")


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Apply ``key=value`` overrides as Detectron2's tool does. Values that contain "=" need no quotes.

    Raises:
        ValueError: if an override has another form, or would have no effect because nothing reads its key.
    """
    quoted = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key.startswith("-"):
            raise ValueError(f"{override!r} is not key=value; options that begin with -- go before the first override")
        _check_key(cfg, key)
        quoted.append(f"{key}={_quoted(value)}")
    try:
        LazyConfig.apply_overrides(cfg, quoted)
    except Exception as error:  # of Hydra's parser or OmegaConf
        raise ValueError(f"the overrides {' '.join(overrides)} do not fit: {_one_line(error)}") from error


def _check_key(cfg: DictConfig, key: str) -> None:
    # Keys of objects are checked when these are built; keys of the config itself are only checked here.
    root, _, rest = key.partition(".")
    if root not in cfg:
        raise ValueError(f"override {key}: the config has no {root!r}; it has {', '.join(cfg)}")
    option, options = rest.split(".")[0], {*cfg.train, *_TRAIN_OPTIONS}
    if root == "train" and option not in options:
        raise ValueError(f"override {key}: train has no {option!r}; it has {', '.join(sorted(options))}")


def _quoted(value: str) -> str:
    return f'"{value}"' if "=" in value and value[:1] not in "'\"[{" else value


def complete_config(cfg: DictConfig) -> None:
    """Fill in what stock configs leave open: a device that exists, a seed, and a folder for evaluation results.

    Raises:
        ValueError: if a number of ``train`` or its device is not one, or the seed is negative, which stands for another
            seed in each run; for a precision or a number of batches to accumulate that do not exist.
    """
    _check_values(cfg)
    _choose_device(cfg)
    check_precision(cfg.train)
    if cfg.train.get("seed") is None:
        cfg.train.seed = 0
    if cfg.train.seed < 0:
        raise ValueError(f"train.seed={cfg.train.seed} asks for other random numbers in each run; expected 0 or more")
    evaluators = cfg.dataloader.get("evaluator")
    for evaluator in evaluators if OmegaConf.is_list(evaluators) else [evaluators]:
        if evaluator is not None and evaluator._target_ is COCOEvaluator and evaluator.get("output_dir") is None:
            evaluator.output_dir = os.path.join(cfg.train.output_dir, "inference")


#: Numbers that Detectron2 looks at in the middle of a run.
_CHECKS = dict.fromkeys(("log_period", "max_iter", "checkpointer.period"), whole(1)) | {
    "eval_period": whole(0), "checkpointer.max_to_keep": optional(whole(1)), "seed": optional(whole(-1)),
    "output_dir": text, "init_checkpoint": optional(text), "amp.enabled": optional(flag),
}  # fmt: skip


def _check_values(cfg: DictConfig) -> None:
    for key, check in _CHECKS.items():
        try:
            check(f"train.{key}", OmegaConf.select(cfg.train, key))
        except TypeError as error:
            raise ValueError(str(error)) from None
    try:
        torch.device(cfg.train.device)
    except RuntimeError:
        raise ValueError(f"train.device={cfg.train.device!r} is not a device; expected cpu, cuda or cuda:1") from None


def _choose_device(cfg: DictConfig) -> None:
    device = cfg.train.device
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        logger.warning(
            "train.device=%s, but no GPU was found: running on the CPU without mixed precision in float16", device
        )
        cfg.train.device = "cpu"
    if torch.device(cfg.train.device).type == "cpu" and amp_dtype(cfg.train) != "bfloat16":
        # Detectron2's mixed precision requires CUDA.
        OmegaConf.update(cfg, "train.amp.enabled", False)
