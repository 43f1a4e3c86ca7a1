"""A queue of trainings: several settings, several seeds, each in a folder of its own."""

import contextlib
import json
import signal
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from apt_dense.weights.files import write_text_whole

from evidence.queued_trainers import Trainer, TrainingFailed
from evidence.resumable_rows import KeptRows

ASKED = "asked_for.json"


class Setting(NamedTuple):
    """A name, and what a training changes of the config, as ``--cfg-options`` takes it."""

    name: str
    options: tuple[str, ...]


def parse_setting(text: str) -> Setting:
    """Read "NAME" or "NAME: KEY=VALUE KEY=VALUE".

    Raises:
        ValueError: if it does not read like that, or the name cannot be one of a folder.
    """
    name, _, rest = text.partition(":")
    name, options = name.strip(), tuple(rest.split())
    if not name or "/" in name or name.startswith("."):
        raise ValueError(f"setting {text!r}: its name is to be that of a folder; expected NAME: KEY=VALUE ...")
    wrong = [option for option in options if "=" not in option.strip("=")]
    if wrong:
        raise ValueError(f"setting {text!r}: {wrong[0]!r} is not KEY=VALUE")
    return Setting(name, options)


class Run(NamedTuple):
    """One training."""

    setting: Setting
    seed: int
    trainer: Trainer

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on besides versions and data."""
        return {
            "setting": self.setting.name, "options": list(self.setting.options), "seed": self.seed,
            **self.trainer.settings,
        }  # fmt: skip


def result_of(run: Run, root: Path, kept: KeptRows, metrics: Sequence[str]) -> dict[str, Any]:
    """Settings and results of a run: those that are kept, or else it is trained, from its last checkpoint on.

    Raises:
        TrainingFailed: if the training does, or notes no such metric.
        ValueError: if the folder is of a training that was asked for otherwise.
    """
    found = kept.get(run.settings)
    if found is not None:
        return found
    folder = root / run.setting.name / f"seed_{run.seed}"
    _check_same(folder, run.settings)
    _train(run, folder)
    return kept.add(run.settings, run.trainer.results(folder, metrics))


def _check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note what a folder is for, and refuse one that is for something else: its checkpoint would be continued."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = folder / ASKED
    if asked.exists() and json.loads(asked.read_text(encoding="utf-8")) != settings:
        raise ValueError(f"{folder} holds a training of other settings; remove it, or choose another --out")
    write_text_whole(asked, json.dumps(dict(settings), indent=2) + "\n")


def _train(run: Run, folder: Path) -> None:
    """Train in a process of its own, which ends after a checkpoint when this one is interrupted."""
    command = run.trainer.command(folder, run.setting.options, run.seed)
    with (folder / "output.log").open("a", encoding="utf-8") as log:
        # Its own session: Ctrl-C in a terminal reaches this process, and is passed on once.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            process.wait()
            raise
    if code:
        lines = (folder / "output.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise TrainingFailed(f"{folder}: exit status {code}: {lines[-1] if lines else 'no output'}")


def summary(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One row a setting: means over seeds, the first metric's standard deviation, least and greatest, mean tokens."""
    table = []
    for name in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == name]
        scores = [row[metrics[0]] for row in own]
        tokens = [row["tokens"] for row in own if row["tokens"] is not None]
        table.append({
            "setting": name,
            "seeds": len(own),
            **{metric: statistics.mean(row[metric] for row in own) for metric in metrics},
            "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
            "least": min(scores),
            "greatest": max(scores),
            "tokens": statistics.mean(tokens) if tokens else None,
            "steps": own[0]["step"],
        })  # fmt: skip
    return table
