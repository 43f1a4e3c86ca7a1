"""Run a long job as stages whose results are kept, so that the next run of the same command continues.

A stage owns a folder. It is finished when that folder holds ``results.json``, which is written last, was made with the
same settings, and names files that still exist.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from apt_dense.weights.files import write_text_whole

from shared.log_on_terminal import log_to

RECORD = "results.json"
LOG = "log.txt"


@dataclass(frozen=True)
class Stage:
    """One step of a job.

    name: what it is called in messages, and its folder below the job's.
    settings: JSON values that the result depends on; results made with others are made again. A stage that uses
        another one puts that one's ``Record.made`` in here.
    run: makes the result in the folder it is given, and returns JSON values.
    files: paths below the folder that must be there afterwards.
    tell: puts what ``run`` returned into a few words.
    """

    name: str
    settings: Mapping[str, Any]
    run: Callable[[Path], dict]
    files: Sequence[str] = ()
    tell: Callable[[dict], str] = lambda results: "done"


@dataclass(frozen=True)
class Record:
    """A finished stage: its folder, what ``run`` returned, when it ended (ISO 8601) and how many seconds it took."""

    folder: Path
    results: dict
    made: str
    seconds: float


def run_stage(stage: Stage, root: Path, force: bool = False, say: Callable[[str], None] = print) -> Record:
    """Return the stage's record: the one in its folder if that is finished, else (or with ``force``) a new one.

    A line says what became of the stage. What it prints, logs and warns meanwhile goes to ``log.txt`` in its folder.

    Raises:
        OSError: the folder cannot be written to.
        RuntimeError: ``run`` did not write one of the files it promised.
    """
    folder, settings = root / stage.name, json.loads(json.dumps(dict(stage.settings)))
    record, reason = _finished(stage, folder, settings)
    if record is not None and not force:
        say(f"{stage.name}: {stage.tell(record.results)} (finished before)")
        return record
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)  # from here on, its files are not those of an earlier run
    start = time.perf_counter()
    with log_to(folder / LOG):
        results = stage.run(folder)
    absent = [name for name in stage.files if not (folder / name).exists()]
    if absent:
        raise RuntimeError(f"stage {stage.name} ended without writing {', '.join(absent)} to {folder}")
    content = {
        "settings": settings,
        "made": datetime.now().isoformat(),
        "seconds": round(time.perf_counter() - start, 1),
        "results": results,
    }
    write_text_whole(folder / RECORD, json.dumps(content, indent=2) + "\n")
    why = "again, --force" if force and record else reason
    say(f"{stage.name}: {stage.tell(results)} ({content['seconds']:.0f} s{f'; {why}' if why else ''})")
    return Record(folder, results, content["made"], content["seconds"])


def _finished(stage: Stage, folder: Path, settings: dict) -> tuple[Record | None, str]:
    """Return the record in the folder, or None and why a new one is needed."""
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        record = Record(folder, content["results"], content["made"], content["seconds"])
        same = content["settings"] == settings
    except FileNotFoundError:
        return None, ""
    except (ValueError, KeyError, TypeError):
        return None, f"again, {folder / RECORD} is damaged"
    if not same:
        return None, "again, the earlier result was made with other settings or other data"
    absent = [name for name in stage.files if not (folder / name).exists()]
    return (None, f"again, {folder / absent[0]} is gone") if absent else (record, "")
