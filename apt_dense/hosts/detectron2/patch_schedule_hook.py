"""A hook of Detectron2's trainers that anneals thresholds or the token budget."""

from typing import Any

from detectron2.engine import HookBase, TrainerBase
from torch import nn

from apt_dense.hosts.anneal_patches import AnnealedPatches
from apt_dense.hosts.detectron2.safe_checkpoints import logger
from apt_dense.patches.schedule import PatchSchedule


class PatchScheduleHook(HookBase):
    """Train with uniform patches at first and with those of the config at the end.

        trainer.register_hooks([PatchScheduleHook(begin=0.1, end=0.5)])  # any trainer of Detectron2's
        train.patch_schedule = dict(begin=0.1, end=0.5)                  # in lazy configs, for tools/train_det.py

    Metrics get what is in force: ``threshold_1``, ``threshold_2``, ... or ``token_budget``. Tests within the run see
    the patches of the iteration before them. A resumed run goes on where it was; if its schedule or its length is
    another one, the log says so.

    Args:
        begin, end, steps: as for :class:`apt_dense.patches.schedule.PatchSchedule`, of which ``begin`` and ``end`` are
            shares of the run.
    """

    def __init__(self, begin: float = 0.0, end: float = 0.5, steps: int | None = None) -> None:
        self.schedule = PatchSchedule(begin, end, steps)
        self.patches: AnnealedPatches | None = None
        self._saved: dict[str, Any] | None = None

    def before_train(self) -> None:
        """Take the model's patches as the target, and set those of the iteration that was the last one.

        Raises:
            ValueError: as :class:`AnnealedPatches`.
        """
        self.patches = AnnealedPatches(_model_of(self.trainer), self.schedule, self.trainer.max_iter)
        warning = self.patches.start(self.trainer.iter, self._saved)
        if warning:
            logger.warning(warning)

    def before_step(self) -> None:
        """Set the patches of this iteration, and log them."""
        for name, value in self.patches.set(self.trainer.iter).items():
            self.trainer.storage.put_scalar(name, value, smoothing_hint=False)

    def reached(self) -> bool:
        """Check whether the target holds in this iteration."""
        return self.patches is None or self.patches.reached(self.trainer.iter)

    def after_train(self) -> None:
        """Set the target again."""
        if self.patches is not None:
            self.patches.restore()

    def state_dict(self) -> dict[str, Any]:
        """The schedule, for the checkpoint."""
        return {} if self.patches is None else self.patches.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Note the schedule of the run that goes on."""
        self._saved = state


def _model_of(trainer: TrainerBase) -> nn.Module:
    """The model of a trainer; a ``DefaultTrainer`` has it in the trainer inside."""
    return getattr(trainer, "_trainer", trainer).model
