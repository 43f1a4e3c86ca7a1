"""Train and evaluate Detectron2's lazy configs as its own tool does, also on machines without a GPU, and resume
interrupted runs so that their loss curves do not change."""

import importlib.util
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from detectron2.config import instantiate
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.engine import HookBase, SimpleTrainer, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from omegaconf import DictConfig, OmegaConf
from torch import nn

from apt_dense.hosts.check_resumed_checkpoints import check_iteration, check_moments
from apt_dense.hosts.detectron2.accumulation_and_bfloat16 import batches_per_iteration, make_trainer
from apt_dense.hosts.detectron2.class_names_of_run import write_classes
from apt_dense.hosts.detectron2.count_tokens_of_tests import tokens_counted
from apt_dense.hosts.detectron2.patch_options_of_train import (
    PatchOptionError,
    ap_by_scale_evaluators,
    check_pixels,
    patch_schedule_hook,
    token_drift_hook,
)
from apt_dense.hosts.detectron2.read_lazy_config import (
    apply_overrides,
    check_parts,
    complete_config,
    load_config,
    logger,
)
from apt_dense.hosts.detectron2.readable_images import name_unreadable_images
from apt_dense.hosts.detectron2.resumable_loader import resumable
from apt_dense.hosts.detectron2.safe_checkpoints import APTCheckpointer, CheckpointError, unwrapped
from apt_dense.hosts.interrupts import Stopped, agreement, stop_requests
from apt_dense.hosts.randomness_from_seeds import seed_all
from apt_dense.hosts.readable_images import DataError
from apt_dense.hosts.run_errors import RunError, explaining_errors

#: Everything that a tool needs for a run.
__all__ = [
    "CheckpointError",
    "PatchOptionError",
    "RunError",
    "apply_overrides",
    "check_parts",
    "check_pixels",
    "complete_config",
    "evaluate",
    "evaluate_checkpoint",
    "has_checkpoint",
    "load_config",
    "logger",
    "train",
]


def train(cfg: DictConfig, resume: bool = False) -> None:
    """Train, evaluate, and save ``model_final.pth`` in ``train.output_dir``.

    With ``train.patch_schedule``, thresholds or the token budget are annealed (:class:`PatchScheduleHook`); with
    ``train.expected_tokens``, the log says where another share of tokens is kept (:class:`TokenDriftHook`); with
    ``train.ap_by_scale``, evaluations split AP by the patches under objects (:class:`APByScaleEvaluator`).

    With ``resume``, training continues from the last checkpoint there, or starts if there is none. It then does what it
    would have done without the interruption: the order of images, augmentations, samples of proposals and stochastic
    depth all follow from ``train.seed`` and the iteration. Lines of metrics.json after that checkpoint are written
    again.

    A first SIGINT or SIGTERM to any of its processes ends a run after its current iteration, with a checkpoint.

    Raises:
        CheckpointError: if a checkpoint is missing, damaged or does not fit.
        PatchOptionError: if ``train.patch_schedule`` does not fit the model, ``train.expected_tokens`` is no share, or
            ``train.ap_by_scale`` names no patches; or if the backbone expects images of another normalisation or
            channel order than the model's and the loader's, and nothing is trained yet.
        Stopped: on such a signal.
        DataError: if an image cannot be read.
        RunError: for other errors, most of which are mistakes in the config.
    """
    with stop_requests() as asked, _explaining(cfg):
        _train(cfg, resume, agreement(asked))


def _explaining(cfg: DictConfig) -> AbstractContextManager[None]:
    """Name the part of the config in errors that do not say what to do."""
    parts = OmegaConf.to_container(cfg)
    told = CheckpointError, DataError, PatchOptionError, SizeMismatchError
    return explaining_errors(cfg.train.output_dir, parts, told)


def _train(cfg: DictConfig, resume: bool, asked: Callable[[], bool]) -> None:
    model = _build_model(cfg)
    resume = resume and has_checkpoint(cfg)
    check_pixels(cfg, unwrapped(model), "train", is_new=not resume)
    ap_by_scale_evaluators(cfg, model)  # fails now, not at the first evaluation
    cfg.optimizer.params.model = unwrapped(model)
    trainer = make_trainer(model, instantiate(cfg.optimizer), cfg.train)
    output_dir, main = cfg.train.output_dir, comm.is_main_process()
    if main:
        write_classes(cfg, output_dir)
    checkpointer = APTCheckpointer(model, output_dir, complete=resume, trainer=trainer)
    saving = hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main else None
    trainer.register_hooks([
        SeedIterations(cfg.train.seed),
        patch_schedule_hook(cfg, model),
        token_drift_hook(cfg),
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        saving,
        StopHook(checkpointer, asked),
        hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
        _writer_hook(cfg) if main else None,
    ])  # fmt: skip
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = _iterations_done(trainer, cfg, checkpointer) if resume else 0
    if saving is not None and resume:
        saving.recent_checkpoints = _kept_checkpoints(output_dir, trainer.iter, saving.max_to_keep)
    if resume and start >= cfg.train.max_iter:
        _finish(checkpointer, trainer.iter)
    batches_done = start * batches_per_iteration(cfg.train)
    trainer.data_loader = instantiate(resumable(cfg.dataloader.train, cfg.train.seed, batches_done))
    trainer.train(start, cfg.train.max_iter)


def has_checkpoint(cfg: DictConfig) -> bool:
    """Check whether there is a run in ``train.output_dir`` to resume."""
    return os.path.isfile(os.path.join(cfg.train.output_dir, "last_checkpoint"))


def _kept_checkpoints(output_dir: str, iteration: int, max_to_keep: int | None) -> list[str]:
    """Find the checkpoints up to an iteration that the run before left, oldest first: they count among those to keep.
    One too many, of a run killed before it removed it, is removed. Later ones will be written again."""
    numbers = {path: path.stem.removeprefix("model_") for path in Path(output_dir).glob("model_*.pth")}
    found = sorted(path for path, number in numbers.items() if number.isdecimal() and int(number) <= iteration)
    surplus = found[:-max_to_keep] if max_to_keep else []
    for path in surplus:
        path.unlink()
    return [str(path) for path in found[len(surplus) :]]


def _finish(checkpointer: APTCheckpointer, iteration: int) -> None:
    """Write what a run killed after the checkpoint of its last iteration has not come to."""
    if not Path(checkpointer.save_dir, "model_final.pth").is_file():
        checkpointer.save("model_final", iteration=iteration)


def _iterations_done(trainer: SimpleTrainer, cfg: DictConfig, checkpointer: APTCheckpointer) -> int:
    """The number of iterations of the run that was loaded. Raises CheckpointError if there is nothing to go on with."""
    done = trainer.iter + 1 if isinstance(trainer.iter, int) else trainer.iter
    check_iteration(done, cfg.train.max_iter, checkpointer.get_checkpoint_file())
    check_moments(trainer.optimizer, checkpointer.get_checkpoint_file())
    return done


def evaluate(cfg: DictConfig, model: nn.Module) -> Mapping[str, Mapping[str, float]] | None:
    """Run the config's evaluator over its test loader, with ``train.ap_by_scale`` an :class:`APByScaleEvaluator`, too.

    Returns:
        AP of boxes and masks by task, on the main process; None if the config has no evaluator.
    """
    if cfg.dataloader.get("evaluator") is None:
        return None
    evaluators = cfg.dataloader.evaluator
    listed = [instantiate(one) for one in (evaluators if OmegaConf.is_list(evaluators) else [evaluators])]
    evaluator = DatasetEvaluators([*listed, *ap_by_scale_evaluators(cfg, model)])
    with tokens_counted(model):
        results = inference_on_dataset(model, name_unreadable_images(instantiate(cfg.dataloader.test)), evaluator)
    print_csv_format(results)
    return results


def evaluate_checkpoint(cfg: DictConfig) -> Mapping[str, Mapping[str, float]] | None:
    """Evaluate ``train.init_checkpoint``, which must hold the whole model; returns as :func:`evaluate`.

    Raises:
        CheckpointError: if no checkpoint is set, or it is missing, damaged or does not fit.
        DataError: if an image cannot be read.
        RunError: for other errors, most of which are mistakes in the config.
    """
    if not cfg.train.init_checkpoint:
        raise CheckpointError("nothing to evaluate: set train.init_checkpoint=FILE, such as a run's model_final.pth")
    with _explaining(cfg):
        model = _build_model(cfg)
        check_pixels(cfg, unwrapped(model), "test", is_new=False)
        APTCheckpointer(model, complete=True).load(cfg.train.init_checkpoint)
        return evaluate(cfg, model)


class SeedIterations(HookBase):
    """Seed the random numbers of each iteration with the seed, the process and the iteration alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_step(self) -> None:
        """Seed Python, NumPy and torch."""
        seed_all(self.seed, comm.get_rank(), self.trainer.iter)


class StopHook(HookBase):
    """End a run after its current iteration, with a checkpoint, once ``asked``, whose processes agree, returns True."""

    def __init__(self, checkpointer: APTCheckpointer, asked: Callable[[], bool]) -> None:
        self.checkpointer, self.asked = checkpointer, asked

    def after_step(self) -> None:
        """Save, unless this iteration's checkpoint was due anyway, and raise Stopped."""
        if not self.asked():
            return
        iteration = self.trainer.iter
        name = f"model_{iteration:07d}"
        if Path(self.checkpointer.get_checkpoint_file()).name != f"{name}.pth":
            self.checkpointer.save(name, iteration=iteration)
        self.asked()  # waits until the main process has written it
        raise Stopped(iteration + 1)


def writers(output_dir: str, max_iter: int, period: int) -> list[EventWriter]:
    """Create Detectron2's writers, TensorBoard's only if it is installed.

    Each line is the median of the iterations since the previous line, so it does not depend on where a run started.
    """
    files: list[EventWriter] = [JSONWriter(os.path.join(output_dir, "metrics.json"), window_size=period)]
    if importlib.util.find_spec("tensorboard"):
        files.append(TensorboardXWriter(output_dir, window_size=period))
    return [CommonMetricPrinter(max_iter), *files]


def _writer_hook(cfg: DictConfig) -> HookBase:
    period = cfg.train.log_period
    return hooks.PeriodicWriter(writers(cfg.train.output_dir, cfg.train.max_iter, period), period=period)


def _build_model(cfg: DictConfig) -> nn.Module:
    model = instantiate(cfg.model).to(cfg.train.device)
    # Without a GPU there is no device number, and DDP must not be given one.
    devices = {} if torch.device(cfg.train.device).type == "cuda" else {"device_ids": None}
    return create_ddp_model(model, **{**cfg.train.ddp, **devices})
