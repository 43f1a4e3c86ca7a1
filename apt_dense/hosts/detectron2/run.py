"""Training and evaluation of Detectron2's lazy configs: what its own tool does, on machines without a GPU too, with
loss curves that an interruption does not change and weights that are whole or refused."""

import importlib.util
import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, create_ddp_model, hooks
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from omegaconf import DictConfig, OmegaConf
from torch import nn

from apt_dense.hosts.detectron2.backbone import APTViT
from apt_dense.hosts.detectron2.loader import resumable, seed_all
from apt_dense.weights.files import read_checkpoint
from apt_dense.weights.load import convert_below

# Below Detectron2's logger, whose setup then prints it and writes it to log.txt.
logger = logging.getLogger("detectron2.apt_dense")

_COARSE = ".coarse_embed."
#: Options of ``train`` that Detectron2 understands but its common/train.py does not list.
_TRAIN_OPTIONS = {"seed", "cudnn_benchmark", "float32_precision"}
_UNREADABLE = (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, LookupError, AttributeError, ImportError)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not fit the model."""


def load_config(path: str) -> DictConfig:
    """A lazy config from a Python file.

    Raises:
        FileNotFoundError, ValueError: no such file, or a yacs config.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no config file {path or '(none given)'}; name one with --config-file, see configs/")
    if path.endswith((".yaml", ".yml")) and "_target_" not in Path(path).read_text(encoding="utf-8"):
        raise ValueError(
            f"{path} is a yacs config; this tool runs lazy configs. Train it with Detectron2's "
            f"tools/plain_train_net.py after adding apt_dense.hosts.detectron2.add_apt_config(cfg) there"
        )
    return LazyConfig.load(path)


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """``key=value`` overrides as in Detectron2's tool; values that hold a "=" need no quotes of their own.

    Raises:
        ValueError: for an override that would have no effect, since nothing reads that key.
    """
    quoted = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key.startswith("-"):
            raise ValueError(f"{override!r} is no key=value; options that begin with -- go before the first override")
        _check_key(cfg, key)
        quoted.append(f"{key}={_quoted(value)}")
    LazyConfig.apply_overrides(cfg, quoted)


def _check_key(cfg: DictConfig, key: str) -> None:
    """Keys of objects are checked when these are built; keys of the config itself are checked here."""
    root, _, rest = key.partition(".")
    if root not in cfg:
        raise ValueError(f"override {key}: the config has no {root!r}; it has {', '.join(cfg)}")
    option, options = rest.split(".")[0], {*cfg.train, *_TRAIN_OPTIONS}
    if root == "train" and option not in options:
        raise ValueError(f"override {key}: train has no {option!r}; it has {', '.join(sorted(options))}")


def _quoted(value: str) -> str:
    return f'"{value}"' if "=" in value and value[:1] not in "'\"[{" else value


def complete_config(cfg: DictConfig) -> None:
    """Fill in what stock configs leave open: a device that is there, a seed, and a folder for evaluation results."""
    device = cfg.train.device
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        logger.warning("train.device=%s, but no GPU was found: running on the CPU without mixed precision", device)
        cfg.train.device = "cpu"
    if torch.device(cfg.train.device).type == "cpu":
        # Detectron2's mixed precision asks for CUDA.
        OmegaConf.update(cfg, "train.amp.enabled", False)
    if cfg.train.get("seed") is None:
        cfg.train.seed = 0
    if cfg.train.seed < 0:
        raise ValueError(f"train.seed={cfg.train.seed} asks for other random numbers in each run; expected 0 or more")
    evaluator = cfg.dataloader.get("evaluator")
    if evaluator is not None and evaluator._target_ is COCOEvaluator and evaluator.get("output_dir") is None:
        evaluator.output_dir = os.path.join(cfg.train.output_dir, "inference")


class APTCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which says so when a file is missing or damaged.

    Weights of coarse patches, which only a model with thresholds has, may always be missing or left over.

    Args:
        complete: whether all other weights must be there, in the right shape. Else Detectron2 only warns of those
            outside the backbone, as is right for weights to begin training with.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", *, complete: bool = False, **checkpointables: Any) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.complete = complete

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict:
        file = urlparse(path)._replace(query="").geturl() if path else ""
        if file and "://" not in file and not os.path.isfile(file):
            raise CheckpointError(f"checkpoint {file} does not exist; correct train.init_checkpoint{self._marker()}")
        return super().load(path, *args, **kwargs)

    def _marker(self) -> str:
        """What else may have named a file: the note of the last checkpoint in the output folder."""
        marker = os.path.join(self.save_dir, "last_checkpoint")
        return f" or {marker}" if self.save_dir and os.path.isfile(marker) else ""

    def _load_file(self, filename: str) -> dict:
        try:
            # Detectron2 itself would run what a pickle says.
            return _from_zoo(filename) if filename.endswith(".pkl") else super()._load_file(filename)
        except _UNREADABLE as error:
            raise CheckpointError(
                f"checkpoint {filename} ({os.path.getsize(filename)} bytes) cannot be read: it is cut off or damaged, "
                f"no checkpoint, or holds pickled code. Use an older one{self._marker()}, or copy it again"
            ) from error

    def _torch_load(self, f: str) -> Mapping:
        return read_checkpoint(Path(f))

    def _load_model(self, checkpoint: Mapping) -> Any:
        try:
            if not self.complete:
                self._convert(checkpoint["model"])
            report = super()._load_model(checkpoint)
        except (ValueError, RuntimeError) as error:  # what the backbone says
            raise CheckpointError(" ".join(str(error).split())) from error
        for kind in ("missing_keys", "unexpected_keys"):
            names = getattr(report, kind)
            coarse = [name for name in names if _COARSE in name]
            names[:] = [name for name in names if _COARSE not in name]
            if coarse:
                logger.info("%d %s of coarse patches, as between models with and without thresholds", len(coarse), kind)
        if self.complete:
            _check_complete(report.missing_keys, report.incorrect_shapes)
        return report

    def _convert(self, state: dict) -> None:
        """Bring positions to the backbone's shape, before Detectron2 takes out what has another."""
        self._convert_ndarray_to_tensor(state)
        for name, module in _bare(self.model).named_modules():
            if isinstance(module, APTViT):
                convert_below(module, state, f"{name}.")


def _from_zoo(filename: str) -> dict:
    """A pickle of Detectron2's model zoo, or of Caffe2's, whose names Detectron2 then matches, by its own rules."""
    content = read_checkpoint(Path(filename))
    if "model" in content and "__author__" in content:
        return content
    weights = {k: v for k, v in content.get("blobs", content).items() if not k.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _check_complete(missing: Sequence[str], shapes: Sequence[tuple]) -> None:
    problems = [f"{len(missing)} are missing ({', '.join(missing[:3])})"] if missing else []
    problems += [f"{name} is {theirs} instead of {ours}" for name, theirs, ours in shapes[:3]]
    if problems:
        raise CheckpointError(
            f"the checkpoint does not fit the model, of its weights {'; '.join(problems)}. What stays random makes "
            f"results meaningless: use the config that it was trained with, and set train.init_checkpoint to the "
            f"file of a trained detector"
        )


class SeedIterations(HookBase):
    """Random numbers of each iteration follow from the seed, the process and the iteration alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_step(self) -> None:
        seed_all(self.seed, comm.get_rank(), self.trainer.iter)


def writers(output_dir: str, max_iter: int, period: int) -> list[EventWriter]:
    """Detectron2's writers. A line is the median of the iterations since the last line, of no earlier ones, so that it
    does not depend on where a run began. TensorBoard only if it is installed."""
    files: list[EventWriter] = [JSONWriter(os.path.join(output_dir, "metrics.json"), window_size=period)]
    if importlib.util.find_spec("tensorboard"):
        files.append(TensorboardXWriter(output_dir, window_size=period))
    return [CommonMetricPrinter(max_iter), *files]


def evaluate(cfg: DictConfig, model: nn.Module) -> Mapping[str, Mapping[str, float]] | None:
    """Run the config's evaluator over its test loader: AP of boxes and masks by task, on the main process."""
    if "evaluator" not in cfg.dataloader:
        return None
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))
    print_csv_format(results)
    return results


def evaluate_checkpoint(cfg: DictConfig) -> Mapping[str, Mapping[str, float]] | None:
    """Evaluate ``train.init_checkpoint``, which must hold the whole model.

    Raises:
        CheckpointError: there is none, or it is damaged or does not fit.
    """
    if not cfg.train.init_checkpoint:
        raise CheckpointError("nothing to evaluate: set train.init_checkpoint=FILE, such as a run's model_final.pth")
    model = _build_model(cfg)
    APTCheckpointer(model, complete=True).load(cfg.train.init_checkpoint)
    return evaluate(cfg, model)


def train(cfg: DictConfig, resume: bool = False) -> None:
    """Train, evaluate, and save ``model_final.pth`` in ``train.output_dir``.

    With ``resume``, the last checkpoint there is taken up; without one, the run begins. What it then does is what it
    would have done without the interruption: order of images, augmentations, samples of proposals and stochastic depth
    all follow from ``train.seed`` and the iteration. Lines of metrics.json after that checkpoint are written again.

    Raises:
        CheckpointError: a checkpoint is missing, damaged or does not fit.
    """
    model = _build_model(cfg)
    cfg.optimizer.params.model = _bare(model)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, None, instantiate(cfg.optimizer))
    output_dir, main = cfg.train.output_dir, comm.is_main_process()
    resume = resume and os.path.isfile(os.path.join(output_dir, "last_checkpoint"))
    checkpointer = APTCheckpointer(model, output_dir, complete=resume, trainer=trainer)
    trainer.register_hooks([
        SeedIterations(cfg.train.seed),
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main else None,
        hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
        _writer_hook(cfg) if main else None,
    ])  # fmt: skip
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume else 0
    trainer.data_loader = instantiate(resumable(cfg.dataloader.train, cfg.train.seed, start))
    trainer.train(start, cfg.train.max_iter)


def _writer_hook(cfg: DictConfig) -> HookBase:
    period = cfg.train.log_period
    return hooks.PeriodicWriter(writers(cfg.train.output_dir, cfg.train.max_iter, period), period=period)


def _build_model(cfg: DictConfig) -> nn.Module:
    model = instantiate(cfg.model).to(cfg.train.device)
    # Without a GPU there is no device number, and DDP must not be given one.
    devices = {} if torch.device(cfg.train.device).type == "cuda" else {"device_ids": None}
    return create_ddp_model(model, **{**cfg.train.ddp, **devices})


def _bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
