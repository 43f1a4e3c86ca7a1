"""Hooks of MMEngine's Runner: weights that fit, checkpoints that are never lost, and runs that can be stopped."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from apt_dense.hosts.check_resumed_checkpoints import entries_of
from apt_dense.hosts.interrupts import Stopped, agreement
from apt_dense.hosts.mmseg.safe_checkpoints import check_any_fits, check_weights
from apt_dense.weights.files import write_text_whole


@HOOKS.register_module()
class CheckLoadedWeights(Hook):
    """Compare what ``load_from`` or ``resume`` has read with the model. MMEngine loads what fits and only logs the
    rest.

    Args:
        whole: whether all weights must fit, as to resume, or any, as to start from.
    """

    def __init__(self, whole: bool) -> None:
        self.whole = whole

    def after_load_checkpoint(self, runner: Runner, checkpoint: Mapping) -> None:
        """Raise CheckpointError for a checkpoint that does not fit."""
        model = getattr(runner.model, "module", runner.model)
        (check_weights if self.whole else check_any_fits)(model, checkpoint, str(runner._load_from or "the checkpoint"))


@HOOKS.register_module()
class APTCheckpointHook(CheckpointHook):
    """MMEngine's CheckpointHook, which removes outdated checkpoints only once the new one is complete.

    A run killed while it writes therefore always leaves a checkpoint, also with ``max_keep_ckpts=1``, and a
    "last_checkpoint" that names it.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note how much of an optimizer there is; runs without ``save_optimizer`` have none."""
        if "optimizer" in checkpoint:
            checkpoint.update(entries_of(checkpoint["optimizer"]))

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = self._make_room(runner, step) if self.max_keep_ckpts > 0 else []
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir, name, self.file_client_args, self.save_optimizer, self.save_param_scheduler, meta,
            self.by_epoch, self.backend_args, **self.args,
        )  # fmt: skip
        if is_main_process():
            write_text_whole(Path(runner.work_dir, "last_checkpoint"), self.last_ckpt)
            for old in outdated:
                self._remove(self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old)))
        if self.max_keep_ckpts > 0:
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))

    def _make_room(self, runner: Runner, step: int) -> list[int]:
        """Note a step among those kept, and return the one that it replaces."""
        kept = self.keep_ckpt_ids
        if kept and kept[-1] == step:  # the same weights again, with a new best score
            return []
        outdated = [kept.popleft()] if len(kept) == self.max_keep_ckpts else []
        kept.append(step)
        # With those still there: MMEngine removes what is too much when a run is resumed that was killed before it did.
        runner.message_hub.update_info("keep_ckpt_ids", [*outdated, *kept])
        return [old for old in outdated if old != step]

    def _save_best_checkpoint(self, runner: Runner, metrics: Mapping) -> None:
        if not self.save_best:
            return
        before = self._best_paths()
        self._set_best_paths(dict.fromkeys(before))  # so that MMEngine finds nothing to remove yet
        super()._save_best_checkpoint(runner, metrics)
        after = self._best_paths()
        self._set_best_paths({key: after[key] or path for key, path in before.items()} | {
            key: path for key, path in after.items() if key not in before
        })  # fmt: skip
        for key, path in before.items():
            if path and after[key] not in (None, path) and is_main_process():
                self._remove(path)

    def _best_paths(self) -> dict[str, str | None]:
        if len(self.key_indicators) == 1:
            return {"": self.best_ckpt_path}
        return dict(self.best_ckpt_path_dict)

    def _set_best_paths(self, paths: Mapping[str, str | None]) -> None:
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = paths[""]
        else:
            self.best_ckpt_path_dict = dict(paths)

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)


class StopHook(Hook):
    """End a run after its current iteration, with a checkpoint, once ``asked`` returns True in any process.

    Raises:
        Stopped: from ``after_train_iter``.
    """

    priority = "LOWEST"  # after the checkpoint that this iteration may be due anyway

    def __init__(self, asked: Callable[[], bool]) -> None:
        self.asked = asked

    def before_train(self, runner: Runner) -> None:
        """Get the processes of a run to agree; the Runner has started them by now."""
        self.asked = agreement(self.asked)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Save where the checkpoint hook has not, and stop."""
        if not self.asked():
            return
        for hook in runner.hooks:
            if isinstance(hook, APTCheckpointHook) and not hook.by_epoch:
                kept = list(getattr(hook, "keep_ckpt_ids", ()))
                if not kept or kept[-1] != runner.iter + 1:
                    hook._save_checkpoint(runner)
        self.asked()  # waits until the main process has written it: launchers kill what outlives another process
        raise Stopped(runner.iter + 1)


class DueEvaluationHook(Hook):
    """Evaluate when a run is resumed from a checkpoint of an iteration that an evaluation follows.

    Checkpoints are written before it, so the one that is resumed from does not know its score, which "save_best" needs,
    whether or not the run was killed before the evaluation ended.
    """

    def before_train_epoch(self, runner: Runner) -> None:
        """Evaluate if it is due. Hooks have prepared in ``before_train``."""
        loop = runner.train_loop
        if runner.val_loop is None or not runner.iter or not isinstance(loop, IterBasedTrainLoop):
            return  # loops over epochs call this before each
        loop._decide_current_val_interval()
        due = runner.iter >= loop.val_begin and runner.iter % loop.val_interval == 0
        if due or runner.iter >= runner.max_iters:
            runner.val_loop.run()


def use_hooks(cfg: Config) -> None:
    """Replace MMEngine's CheckpointHook by ours, with files that are written whole, and check what is loaded."""
    hook = cfg.get("default_hooks", {}).get("checkpoint")
    if hook is not None and hook.get("type", "CheckpointHook") == "CheckpointHook":
        hook.type = "APTCheckpointHook"
        if not hook.get("backend_args") and not hook.get("file_client_args") and "://" not in str(hook.get("out_dir")):
            hook.backend_args = {"backend": "apt_atomic"}
    others = [hook for hook in cfg.get("custom_hooks") or [] if hook["type"] != "CheckLoadedWeights"]
    cfg.custom_hooks = [*others, {"type": "CheckLoadedWeights", "whole": bool(cfg.get("resume"))}]
