"""Schedules: from uniform patches at the start of a training to those of its target at the end.

A model that was trained with uniform patches meets coarse ones little by little, and the target's alone at the end.
"""

from dataclasses import dataclass
from typing import Any

from apt_dense.option_checks import Options, option, optional, share, whole
from apt_dense.options import PatchOptions
from apt_dense.patches.calibration import scalable


@dataclass(frozen=True)
class PatchSchedule(Options):
    """Thresholds or a token budget annealed over a part of a run, linearly.

        PatchSchedule(end=0.5).at(PatchOptions((5.5, 4.0)), 250, 1001)["thresholds"]  # (2.75, 2.0)

    Thresholds are scaled from 0, which leaves all patches at scale 0, up to the target's. A token budget falls from all
    tokens to the target's, and thresholds, whose ratios alone matter then, stay. Either way the share of tokens never
    rises. The place in a schedule follows from the iteration alone, so a resumed run goes on where it was.

    Args:
        begin: share of the run up to which all patches are small; 0 is the first iteration.
        end: share of the run from which on the target holds; 1 is the last iteration.
        steps: equal steps from one to the other; None for a change at every iteration. A compiled model with a token
            budget gets a graph for each of the ``steps`` + 1 budgets.

    Raises:
        ValueError, TypeError: for values of another type or out of range, and if it would end before it begins.
    """

    begin: float = option(0.0, share)
    end: float = option(0.5, share)
    steps: int | None = option(None, optional(whole(1)))

    def _check_together(self) -> None:
        if self.begin > self.end:
            raise ValueError(f"begin={self.begin} must not be after end={self.end}; both are shares of the run")

    def progress(self, iteration: int, iterations: int) -> float:
        """How far a run is on its way: from 0 for uniform patches to 1 for the target.

        Args:
            iteration: 0 is the first of the run.
            iterations: of the whole run. A run of a single one has the target.
        """
        place = iteration / (iterations - 1) if iterations > 1 else 1.0
        if place >= self.end:
            return 1.0
        if place <= self.begin:
            return 0.0
        done = (place - self.begin) / (self.end - self.begin)
        return done if self.steps is None else int(done * self.steps) / self.steps

    def at(self, target: PatchOptions, iteration: int, iterations: int) -> dict[str, Any]:
        """The options that differ from the target's at an iteration, or may: those that ``APTViT.set_patches`` takes.

        Args:
            target: the patches at the end, such as a model's ``patches``.
            iteration, iterations: as for :meth:`progress`.

        Returns:
            thresholds, token_budget and min_tokens.

        Raises:
            ValueError: for a target without coarse patches, or with thresholds that cannot be scaled.
        """
        check_target(target)
        done = self.progress(iteration, iterations)
        options = {name: getattr(target, name) for name in ("thresholds", "token_budget", "min_tokens")}
        if target.token_budget is not None and done < 1:
            options["token_budget"] = _budget(target, done)
        elif done < 1:
            options["thresholds"] = tuple(done * each for each in target.thresholds)
            # Thresholds of 0 leave all tokens, and have no ratios.
            options["min_tokens"] = target.min_tokens if done else None
        return options


def check_target(target: PatchOptions) -> None:
    """Raise a ValueError if there is nothing to anneal: no thresholds, or infinite or negative ones."""
    if not target.thresholds:
        raise ValueError("thresholds=() has no coarse patches, so a schedule has nothing to anneal; give thresholds")
    if target.token_budget is None:
        scalable(target.thresholds)


def _budget(target: PatchOptions, done: float) -> float | int:
    """The token budget on the way from all tokens to the target's."""
    budget = target.token_budget
    if done == 0:
        return 1.0
    if isinstance(budget, float):
        return 1 - done * (1 - budget)
    size = getattr(target, "img_size", None)
    if size is None:
        raise ValueError(
            f"token_budget={budget!r} counts tokens, so a schedule needs the number of all tokens; give a share (a "
            f"float), or img_size"
        )
    total = max(budget, (-(-size[0] // target.patch_size)) * (-(-size[1] // target.patch_size)))
    return round(total - done * (total - budget))
