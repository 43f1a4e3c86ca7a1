"""A progress bar for MMEngine's Runner, whose own log goes to a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from tqdm import tqdm


class TrainingBar(Hook):
    """Shows the iterations of training, with loss and tokens kept, and the images of a validation.

    Args:
        name: of what is trained.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: tqdm | None = None

    def before_train(self, runner: Runner) -> None:
        self._start("training", runner.max_iters, "it")

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        self.bar.set_postfix(loss=f"{float((outputs or {}).get('loss', float('nan'))):.3f}", refresh=False)
        self.bar.update()

    def before_val(self, runner: Runner) -> None:
        self._start("evaluating", len(runner.val_dataloader), "image")

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.bar.update()

    def after_run(self, runner: Runner) -> None:
        self._end()

    def _start(self, what: str, total: int, unit: str) -> None:
        self._end()
        self.bar = tqdm(total=total, desc=f"{self.name}: {what}", unit=unit, leave=False)

    def _end(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
