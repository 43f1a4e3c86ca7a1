"""Detectron2's trainer with several batches per iteration, and mixed precision in bfloat16, on CPUs as well."""

import time
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from omegaconf import DictConfig
from torch import Tensor, nn


def make_trainer(model: nn.Module, optimizer: torch.optim.Optimizer, train: DictConfig) -> SimpleTrainer:
    """Make the trainer that a config's ``train`` asks for, without its loader.

    Args:
        train: ``amp.enabled`` is Detectron2's mixed precision, in float16 with loss scaling. With
            ``amp.dtype=bfloat16`` there is none, and it runs on CPUs, too. ``accumulate`` is the number of batches per
            iteration, of which gradients are averaged; 1 by default.

    Raises:
        ValueError: for other values of these, and for batches to accumulate in float16.
    """
    check_precision(train)
    accumulate, enabled = batches_per_iteration(train), train.amp.enabled
    if enabled and amp_dtype(train) == "float16":
        return AMPTrainer(model, None, optimizer)
    if accumulate == 1 and not enabled:
        return SimpleTrainer(model, None, optimizer)
    return AccumulatingTrainer(model, optimizer, accumulate, torch.bfloat16 if enabled else None)


def check_precision(train: DictConfig) -> None:
    """Check the options that :func:`make_trainer` reads. Raises ValueError."""
    accumulate, dtype = batches_per_iteration(train), amp_dtype(train)
    if accumulate > 1 and train.amp.enabled and dtype == "float16":
        raise ValueError(
            f"train.accumulate={accumulate} in float16 is not supported: set train.amp.dtype=bfloat16, or "
            f"train.amp.enabled=False"
        )


def batches_per_iteration(train: DictConfig) -> int:
    """The config's ``train.accumulate``, 1 by default. Raises ValueError unless it is a positive integer."""
    accumulate = train.get("accumulate", 1)
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"train.accumulate={accumulate!r}: expected a whole number of batches, at least 1")
    return accumulate


def amp_dtype(train: DictConfig) -> str:
    """The config's ``train.amp.dtype``, float16 by default. Raises ValueError for another than float16 and bfloat16."""
    dtype = train.amp.get("dtype", "float16")
    if dtype not in ("float16", "bfloat16"):
        raise ValueError(f"train.amp.dtype={dtype!r}: expected float16 or bfloat16")
    return dtype


class AccumulatingTrainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer``, with the gradients of several batches averaged in each iteration.

    Processes exchange gradients, and wait for each other, once an iteration. Losses in the log are means over the
    batches.

    Args:
        accumulate: batches per iteration.
        dtype: of autocast; None for float32.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, accumulate: int = 1, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(model, None, optimizer)
        self.accumulate, self.dtype = accumulate, dtype

    def run_step(self) -> None:
        """Train on the batches of an iteration."""
        totals, data_seconds = {}, 0.0
        self.optimizer.zero_grad()
        for number in range(self.accumulate):
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_seconds += time.perf_counter() - start
            losses = self._backward(batch, exchanges=number + 1 == self.accumulate)
            totals = {name: totals.get(name, 0) + value.detach() for name, value in losses.items()}
        self.after_backward()
        self._write_metrics({name: value / self.accumulate for name, value in totals.items()}, data_seconds)
        self.optimizer.step()

    def _backward(self, batch: Any, exchanges: bool) -> dict[str, Tensor]:
        """Add the gradients of a batch, exchanged with other processes only with the last one."""
        alone = nullcontext() if exchanges or not hasattr(self.model, "no_sync") else self.model.no_sync()
        with alone:
            with torch.autocast(self._device_type(), self.dtype, enabled=self.dtype is not None):
                losses = self.model(batch)
            losses = {"total_loss": losses} if isinstance(losses, Tensor) else losses
            (sum(losses.values()) / self.accumulate).backward()
        return losses

    def _device_type(self) -> str:
        return next(self.model.parameters()).device.type
