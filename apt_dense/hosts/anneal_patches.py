"""Patches of a model in training that follow a schedule: the part that all hosts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from apt_dense.patches.schedule import PatchSchedule, check_target
from apt_dense.runtime import graph_limit, is_compiled
from apt_dense.vit import APTViT


class AnnealedPatches:
    """The adaptive ViTs in a model, whose patches follow a schedule from now on.

    Their patches as they are now are the target. Processes of a distributed run need no exchange, since patches follow
    from the iteration alone.

    Args:
        model: may be wrapped, as by DistributedDataParallel or torch.compile.
        iterations: of the whole run.
        compiled: the model is compiled in a way that it does not show itself.

    Raises:
        ValueError: if there is no adaptive ViT in the model, nothing to anneal, or more graphs would be compiled than
            PyTorch makes.
    """

    def __init__(self, model: nn.Module, schedule: PatchSchedule, iterations: int, compiled: bool = False) -> None:
        self.schedule, self.iterations = schedule, iterations
        self._targets = [(module, module.patches) for module in model.modules() if isinstance(module, APTViT)]
        if not self._targets:
            raise ValueError(f"{type(model).__name__} has no APTViT inside, so there are no patches to anneal")
        for _, target in self._targets:
            check_target(target)
            if (compiled or is_compiled(model)) and target.token_budget is not None:
                _check_graphs(schedule)

    def set(self, iteration: int) -> dict[str, float]:
        """Set the patches of an iteration.

        Returns:
            What to log, of the first of the backbones: ``threshold_1`` and so on, or ``token_budget``.
        """
        for backbone, target in self._targets:
            backbone.set_patches(**self.schedule.at(target, iteration, self.iterations))
        first = self._targets[0][0]
        if first.token_budget is not None:
            return {"token_budget": float(first.token_budget)}
        return {f"threshold_{scale}": value for scale, value in enumerate(first.thresholds, start=1)}

    def set_as_after(self, done: int) -> dict[str, float]:
        """Set the patches in force after ``done`` iterations, which an evaluation that is due then uses."""
        return self.set(max(done - 1, 0))

    def start(self, done: int, saved: Mapping[str, Any] | None) -> str | None:
        """Set the patches of a new or resumed run (:meth:`set_as_after`).

        Args:
            saved: :meth:`state` of the run that is resumed; None for a new run.

        Returns:
            A warning if the resumed run had another schedule.
        """
        self.set_as_after(done)
        differences = [] if saved is None else self.differences(saved)
        return f"another patch schedule than before: {'; '.join(differences)}" if differences else None

    def restore(self) -> None:
        """Set the target again."""
        for backbone, target in self._targets:
            backbone.patches = target

    def reached(self, iteration: int) -> bool:
        """Check whether the target holds at an iteration."""
        return self.schedule.progress(iteration, self.iterations) == 1

    def state(self) -> dict[str, Any]:
        """The schedule as plain values, to be saved in checkpoints."""
        target = self._targets[0][1]
        ends = {"thresholds": list(target.thresholds), "token_budget": target.token_budget}
        return {**asdict(self.schedule), "iterations": self.iterations, **ends}

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """List what a checkpoint's schedule has otherwise, as "name: saved, now own"."""
        own = self.state()
        return [f"{name}: {saved.get(name)}, now {own[name]}" for name in own if saved.get(name) != own[name]]


def _check_graphs(schedule: PatchSchedule) -> None:
    """Raise if a compiled model would need more graphs than are made of a function."""
    limit = graph_limit()
    if schedule.steps is None or schedule.steps >= limit:
        raise ValueError(
            f"steps={schedule.steps} with a compiled model and a token budget: every budget is compiled to its own "
            f"graph, and PyTorch stops at {limit}. Set steps to at most {limit - 1}, raise "
            f"torch._dynamo.config.recompile_limit, or train without compiling"
        )
