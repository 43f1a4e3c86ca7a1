"""A hook of Detectron2's trainers that warns where training keeps another share of tokens than was calibrated."""

from detectron2.engine import HookBase

from apt_dense.hosts.detectron2.patch_schedule_hook import PatchScheduleHook
from apt_dense.hosts.detectron2.safe_checkpoints import logger
from apt_dense.hosts.token_drift import TokenDrift


class TokenDriftHook(HookBase):
    """Warn once where the share of tokens, ``tokens_kept``, is more than 10 % away from the expected one.

        trainer.register_hooks([TokenDriftHook(expected=0.6)])  # any trainer of Detectron2's
        train.expected_tokens = 0.6                             # in lazy configs, for tools/train_det.py

    With a :class:`PatchScheduleHook`, only iterations count at which its target holds. Compiled models log no share, so
    nothing is said of them.

    Args:
        expected: share of tokens, as tools/calibrate.py says it.
    """

    def __init__(self, expected: float) -> None:
        self.drift = TokenDrift(expected)

    def after_step(self) -> None:
        """Look at the share of this iteration."""
        share, iteration = self.trainer.storage.latest().get("tokens_kept", (None, None))
        hooks = self.trainer._hooks
        annealed = any(isinstance(hook, PatchScheduleHook) and not hook.reached() for hook in hooks)
        warning = None if iteration != self.trainer.iter or annealed else self.drift.add(share)
        if warning:
            logger.warning(warning)
