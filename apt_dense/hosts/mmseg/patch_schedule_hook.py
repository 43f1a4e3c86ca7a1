"""A hook of MMEngine's Runner that anneals thresholds or the token budget."""

from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from apt_dense.hosts.anneal_patches import AnnealedPatches
from apt_dense.patches.schedule import PatchSchedule

_KEY = "patch_schedule"  # in checkpoints


@HOOKS.register_module()
class PatchScheduleHook(Hook):
    """Train with uniform patches at first and with those of the config at the end.

        custom_hooks = [dict(type="PatchScheduleHook", begin=0.1, end=0.5)]

    Logs what is in force: ``threshold_1``, ``threshold_2``, ... or ``token_budget``. Validations within the run see the
    patches of the iteration before them; tests see the config's. A resumed run goes on where it was; if its schedule or
    its length is another one, the log says so.

    Args:
        begin, end, steps: as for :class:`apt_dense.patches.schedule.PatchSchedule`, of which ``begin`` and ``end`` are
            shares of the run.
    """

    def __init__(self, begin: float = 0.0, end: float = 0.5, steps: int | None = None) -> None:
        self.schedule = PatchSchedule(begin, end, steps)
        self.patches: AnnealedPatches | None = None
        self._saved: Mapping[str, Any] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: Mapping) -> None:
        """Note the schedule of the run that goes on."""
        self._saved = checkpoint.get(_KEY) if runner._resume else None

    def before_train(self, runner: Runner) -> None:
        """Take the model's patches as the target, and set those of the iteration that was the last one.

        Raises:
            ValueError: as :class:`AnnealedPatches`.
        """
        self.patches = AnnealedPatches(runner.model, self.schedule, runner.max_iters, bool(runner.cfg.get("compile")))
        # An evaluation that was due when the run was interrupted comes before the first iteration.
        warning = self.patches.start(runner.iter, self._saved)
        if warning:
            print_log(warning, "current", level="WARNING")

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Set the patches of this iteration, and log them."""
        for name, value in self.patches.set(runner.iter).items():
            runner.message_hub.update_scalar(f"train/{name}", value)

    def reached(self, runner: Runner) -> bool:
        """Check whether the target holds in this iteration."""
        return self.patches is None or self.patches.reached(runner.iter)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note the schedule."""
        if self.patches is not None:
            checkpoint[_KEY] = self.patches.state()

    def after_train(self, runner: Runner) -> None:
        """Set the target again."""
        self.patches.restore()
