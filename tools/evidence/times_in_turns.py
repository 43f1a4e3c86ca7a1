"""Milliseconds of a photo, and of a training step, for all rows of a comparison, whose models take turns so that other
load slows all alike."""

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.meters import seconds_of
from evidence.training_variants import Variant
from evidence.trainings_of_rows import Task
from evidence.variant_backbones import Plan, backbone_key

Action = Callable[[], int]  # returns the number of photos that it was for


def times_of(
    task: Task, plan: Plan, rows: Sequence[Variant], thresholds: Mapping[str, Sequence[float]], rounds: int,
    device: torch.device,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Time whole models in evaluation mode and, unless the backbone is frozen, in training. Rows that differ only in
    how they were trained share a model.

    Args:
        thresholds: those of each row, by its name.

    Returns:
        By the name of a row, milliseconds of one photo: "ms", the median over rounds, and "range", the fastest and
        the slowest round, both without what slowed all models of a round alike; of a row that is trained also those of
        a step of ``plan.batch`` photos, "step ms" and "step range".
    """

    def timed(make: Callable[..., Action], rows: Sequence[Variant]) -> dict[str, list[float]]:
        keys = {row.name: repr(backbone_key(plan, row)) for row in rows}
        actions: dict[str, Action] = {}
        for row in rows:
            if keys[row.name] not in actions:
                actions[keys[row.name]] = make(plan, row, thresholds[row.name])
        found = without_drift(milliseconds_in_turns(actions, rounds, device))
        return {name: found[key] for name, key in keys.items()}

    found: dict[str, dict[str, Any]] = {name: _describe(times) for name, times in timed(task.forward, rows).items()}
    trained = [row for row in rows if row.epochs != 0 and plan.backbone_rate]
    for name, times in timed(task.step, trained).items() if trained else ():
        found[name] |= _describe([plan.batch * time for time in times], "step ")
    return found


def milliseconds_in_turns(actions: Mapping[str, Action], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Run each in every round, in turns and after a round that does not count.

    Returns:
        Milliseconds of one photo by round.
    """
    found: dict[str, list[float]] = {name: [] for name in actions}
    names = deque(actions)
    for number in tqdm(range(rounds + 1), "timing", leave=False):
        names.rotate(1)  # so that none always comes at the same time after another
        for name in names:
            photos: list[int] = []
            seconds = seconds_of(lambda name=name, photos=photos: photos.append(actions[name]()), device)
            if number:
                found[name].append(1000 * seconds / photos[0])
    return found


def without_drift(milliseconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Divide each round by how much slower it was than others, by its geometric mean over all models: virtual machines
    are slower for minutes, and a median of rounds may be of slow ones for one model and of fast ones for the next."""
    logarithms = np.log(np.array([*milliseconds.values()]))  # (models, rounds)
    slowness = logarithms.mean(0)
    steady = np.exp(logarithms - slowness + np.median(slowness))
    return dict(zip(milliseconds, steady.tolist(), strict=True))


def _describe(milliseconds: Sequence[float], prefix: str = "") -> dict[str, Any]:
    extremes = f"{min(milliseconds):.1f}-{max(milliseconds):.1f}"
    return {f"{prefix}ms": statistics.median(milliseconds), f"{prefix}range": extremes}
