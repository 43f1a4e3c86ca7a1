"""The trainers that a queue can run, one for each host: their command lines, and the results that they note."""

import contextlib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evidence.file_digest import digest

TRAIN_SEG, TRAIN_DET = (Path(__file__).resolve().parents[1] / f"train_{of}.py" for of in ("seg", "det_torchvision"))
_FLAGS = {"true": "--{}", "false": "--no-{}"}


class TrainingFailed(RuntimeError):
    """A training ended with an error, or noted no result; the message says which."""


class SegmentationTrainer(NamedTuple):
    """``train_seg.py`` with a config of MMSegmentation."""

    config: Path
    arguments: tuple[str, ...]  # the same for all runs

    @property
    def settings(self) -> dict[str, Any]:
        """All of it that results depend on."""
        text = self.config.read_text(encoding="utf-8")
        return {"config": self.config.name, "content": text, "arguments": list(self.arguments)}

    def command(self, folder: Path, options: Sequence[str], seed: int) -> list[str]:
        """The command line of a training, which continues from the last checkpoint, if there is one."""
        around = ["--work-dir", str(folder), *(["--resume"] if (folder / "last_checkpoint").exists() else [])]
        changed = ["--cfg-options", *options, f"randomness.seed={seed}"]
        return [sys.executable, str(TRAIN_SEG), str(self.config), *around, *self.arguments, *changed]

    def results(self, folder: Path, metrics: Sequence[str]) -> dict[str, Any]:
        """Read the last values of metrics from the run's own logs, the share of tokens and the seconds of a step.

        Raises:
            TrainingFailed: if there is no such metric.
        """
        entries = [entry for path in sorted(folder.glob("*/vis_data/scalars.json")) for entry in _entries(path)]
        scores = {entry["step"]: entry for entry in entries if all(metric in entry for metric in metrics)}
        steps = [entry for entry in entries if "loss" in entry]
        if not scores:
            named = ", ".join(metrics)
            raise TrainingFailed(f"{folder}: its logs hold no {named}; set val_dataloader, val_cfg and val_evaluator")
        kept = [entry["tokens_kept"] for entry in steps if "tokens_kept" in entry]
        last = max(scores)
        return {
            "step": last,
            **{metric: scores[last][metric] for metric in metrics},
            "best": max(entry[metrics[0]] for entry in scores.values()),
            "tokens": statistics.mean(kept) if kept else None,
            "seconds": statistics.median(entry["time"] for entry in steps) if steps else None,
        }


class DetectionTrainer(NamedTuple):
    """``train_det_torchvision.py`` with a data set in COCO's layout."""

    data: Path
    arguments: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """All of it that results depend on."""
        files = sorted((self.data / "annotations").glob("*.json"))
        files += sorted((self.data / "coco" / "annotations").glob("*.json"))
        return {"data": digest(files), "arguments": list(self.arguments)}

    def command(self, folder: Path, options: Sequence[str], seed: int) -> list[str]:
        """The command line of a training, which continues from the last checkpoint, if there is one."""
        changed = [word for option in options for word in _as_words(option)]
        own = [str(TRAIN_DET), str(self.data), "--out", str(folder), "--resume", "--seed", str(seed)]
        return [sys.executable, *own, *self.arguments, *changed]

    def results(self, folder: Path, metrics: Sequence[str]) -> dict[str, Any]:
        """Read metrics such as "bbox/AP50", in per cent, from the run's results.

        Raises:
            TrainingFailed: if there is no such metric.
        """
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        kinds = [kind for kind in ("bbox", "segm") if kind in found]
        scores = {f"{kind}/{name}": 100 * value for kind in kinds for name, value in found[kind].items()}
        missing = [metric for metric in metrics if metric not in scores]
        if missing:
            raise TrainingFailed(f"{folder}: it has no {missing[0]}; choose --metric of {', '.join(scores)}")
        steps = [entry for entry in _entries(folder / "log.jsonl") if "loss" in entry]
        return {
            "step": len({entry["iteration"] for entry in steps}),
            **{metric: scores[metric] for metric in metrics},
            "best": scores[metrics[0]],
            "tokens": found["tokens_kept"],
            "seconds": None,
        }


Trainer = SegmentationTrainer | DetectionTrainer


def _as_words(option: str) -> list[str]:
    """ "thresholds=5.5,4.0" -> --thresholds 5.5 4.0; "amp=true" -> --amp."""
    name, _, value = option.partition("=")
    name = name.replace("_", "-")
    return [_FLAGS[value].format(name)] if value in _FLAGS else [f"--{name}", *value.split(",")]


def _entries(path: Path) -> list[dict]:
    """The entries of a log of one JSON object a line; the last may have been cut off."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            entries.append(json.loads(line))
    return entries
