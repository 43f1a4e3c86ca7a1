"""A hook of MMEngine's Runner that warns where training keeps another share of tokens than was calibrated."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from apt_dense.hosts.mmseg.patch_schedule_hook import PatchScheduleHook
from apt_dense.hosts.token_drift import TokenDrift


@HOOKS.register_module()
class TokenDriftHook(Hook):
    """Warn once where the share of tokens, ``train/tokens_kept``, is more than 10 % away from the expected one.

        custom_hooks = [dict(type="TokenDriftHook", expected=0.6)]

    With a :class:`PatchScheduleHook`, only iterations count at which its target holds. Compiled models log no share, so
    nothing is said of them.

    Args:
        expected: share of tokens, as tools/calibrate.py says it.
    """

    def __init__(self, expected: float) -> None:
        self.drift = TokenDrift(expected)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Look at the share of this iteration."""
        shares = runner.message_hub.log_scalars.get("train/tokens_kept")
        annealed = any(isinstance(hook, PatchScheduleHook) and not hook.reached(runner) for hook in runner.hooks)
        warning = None if shares is None or annealed else self.drift.add(shares.current())
        if warning:
            print_log(warning, "current", level="WARNING")
