"""The trainings that compare_by_training was asked for: made once, and found again by all that they depend on."""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from apt_dense.weights.files import read_checkpoint, write_whole

from evidence.fast_16_bits import fast_type
from evidence.file_digest import digest, scorer_digest
from evidence.resumable_rows import KeptRows
from evidence.training_variants import Variant
from evidence.variant_backbones import Plan
from shared.machine_and_versions import environment


class Task(Protocol):
    """Data to train on and to test on, and the score.

    Args:
        metric: its name.
        files: "trained" and "tested", all that results depend on.
    """

    metric: str
    files: Mapping[str, Sequence[Path]]

    def run(
        self, plan: Plan, variant: Variant, seed: int, start: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Train and test one variant from the weights of ``start``; return its results and weights."""

    def forward(self, plan: Plan, variant: Variant, thresholds: Sequence[float]) -> Callable[[], int]:
        """Make a function that runs an untrained model of a variant over some photos, and returns their number."""

    def step(self, plan: Plan, variant: Variant, thresholds: Sequence[float]) -> Callable[[], int]:
        """Make a function that trains such a model for a step of ``plan.batch`` photos, and returns their number."""


def row_named(args: argparse.Namespace, name: str | None) -> Variant | None:
    """The row of that name; None if there is none."""
    return next((row for row in args.rows if row.name == name), None)


def settings_of(
    variant: Variant, args: argparse.Namespace, data: Mapping[str, str], is_grouped: bool = True
) -> dict[str, Any]:
    """All that the results of a row depend on besides its seed and versions; those of the row it starts from, too.

    Args:
        is_grouped: whether they depend on --group-by.
    """
    size = "x".join(map(str, variant.size or args.size))
    own = {
        "row": variant.name,
        "options": {name: scorer_digest(value) or repr(value) for name, value in variant.options.items()},
        "size": size,
    }
    # Rows of before had no scores of borders and no times.
    own |= {"frozen": args.frozen, "rate of what is new": args.rate * Plan._field_defaults["new_rate"], "scores": 2}
    own["type"] = "bfloat16" if args.frozen else str(fast_type(torch.device(args.device).type))
    own |= {"wanted": variant.tokens, "epochs": args.epochs if variant.epochs is None else variant.epochs}
    if variant.rival is not None:
        own["rival"] = variant.rival
    if is_grouped and args.group_by is not None:
        own["groups"] = settings_of(row_named(args, args.group_by), args, data, is_grouped=False)
    own |= {"rate": args.rate * variant.rate, "base": "x".join(map(str, args.size)), "batch": args.batch, **data}
    if variant.start is not None:
        own["start"] = settings_of(row_named(args, variant.start), args, data, is_grouped)
    return own


def plan_of(args: argparse.Namespace) -> Plan:
    """Build the plan from the command line options."""
    plan = Plan(args.model, args.weights, args.classes, args.size, args.epochs, args.batch, args.rate)
    return plan._replace(backbone_rate=0.0) if args.frozen else plan


class Trainings:
    """The trainings of a command, made or found."""

    def __init__(self, args: argparse.Namespace, task: Task, kept: KeptRows) -> None:
        self.args, self.task, self.kept = args, task, kept
        weights = "timm's" if args.weights is None else digest([args.weights])
        self.data = {"model": args.model, "weights": weights}
        self.data |= {name: digest(paths) for name, paths in task.files.items()}

    def rows(self) -> Iterator[dict]:
        """Yield the results of all rows and seeds."""
        seeds, rows = self.args.seeds, self.args.rows
        # With a frozen backbone all seeds of a row take its features, which are kept until the next row.
        order = ((s, r) for r in rows for s in seeds) if self.args.frozen else ((s, r) for s in seeds for r in rows)
        for seed, variant in order:
            yield self._result(variant, seed)

    def _result(self, variant: Variant, seed: int) -> dict:
        settings = {**settings_of(variant, self.args, self.data), "seed": seed}
        found = self.kept.get(settings)
        return found or self._make(variant, seed, settings)

    def _make(self, variant: Variant, seed: int, settings: Mapping[str, Any]) -> dict:
        start = None if variant.start is None else self._weights(variant.start, seed)
        args, metric = self.args, self.task.metric
        results, state = self.task.run(plan_of(args), variant, seed, start)
        results["environment"] = environment(torch.device(args.device))
        if any(other.start == variant.name for other in args.rows):
            with write_whole(self._path(settings)) as partial:
                torch.save(state, partial)
        print(
            f"{variant.name}, seed {seed}: {metric} {results[metric]:.2f} with {results['tokens']:.0f} tokens",
            flush=True,
        )
        return self.kept.add(settings, results)

    def _weights(self, name: str, seed: int) -> Mapping[str, Any]:
        """Weights of a row that was trained; trained again if they are gone."""
        variant = row_named(self.args, name)
        settings = {**settings_of(variant, self.args, self.data), "seed": seed}
        if not self._path(settings).is_file():
            self._make(variant, seed, settings)
        return read_checkpoint(self._path(settings))

    def _path(self, settings: Mapping[str, Any]) -> Path:
        """Where the weights of a row are: a file for all that they depend on, so that none are of another command."""
        name = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:16]
        folder = self.args.out / "weights"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"seed{settings['seed']}_{name}.pth"
