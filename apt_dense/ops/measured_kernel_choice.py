"""The choice between kernels by times that were measured on the machine at hand, where there are any.

``tools/tune_kernels.py`` measures them and keeps them in a file in the user's cache, one for each processor, number of
threads and version of PyTorch. Nothing is measured unasked: a run chooses in the same way each time, and so does the
run that resumes it. Without a file, kernels go by facts about the processor.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from apt_dense.runtime import describe_machine

_VERSION = 2  # of the kernels: one more whenever times of before no longer hold
_log = logging.getLogger(__name__)

#: Mean lengths of segments at which attention is measured; others go by the nearest of them.
LENGTHS = tuple(2**exponent for exponent in range(6, 14))


class Case(NamedTuple):
    """What the best kernel depends on.

    Args:
        work: "attention" or "linear".
        dtype: the operands', such as "bfloat16".
        length: one of ``LENGTHS``; 0 for linear layers.
        terms: what is added to the logits, of "relative, padding, weights"; "" for nothing.
        trains: whether a backward pass follows.
    """

    work: str
    dtype: str
    length: int
    terms: str
    trains: bool

    @property
    def key(self) -> str:
        """Its name in a file."""
        return f"{self.work} {self.dtype} {self.length} [{self.terms}] {'training' if self.trains else 'inference'}"


class Seconds(NamedTuple):
    """Quartiles of several rounds, in seconds."""

    low: float
    median: float
    high: float


def nearest_length(mean_length: float) -> int:
    """The length in ``LENGTHS`` with the nearest logarithm."""
    return 2 ** min(max(round(math.log2(max(mean_length, 1.0))), 6), 13)


def fastest(case: Case, usual: str, able: Collection[str]) -> str | None:
    """Name the kernel that was measured as the fastest.

    Args:
        usual: PyTorch's own way. Another is taken only where its slow rounds (upper quartile) were faster than the
            usual one's fast rounds (lower quartile), so that a disturbed measurement leads back to PyTorch's.
        able: the kernels that can run.

    Returns:
        One of ``able``; None if the case, or its usual kernel, was not measured.
    """
    times = times_of_machine(torch.get_num_threads()).get(case.key, {})
    if usual not in times:
        return None
    clear = [name for name in able if name in times and times[name].high < times[usual].low]
    return min(clear, key=lambda name: times[name].median, default=usual)


def timings_path(threads: int) -> Path:
    """Return the file of this machine: processor, instruction set, threads, and the versions of PyTorch and kernels."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apt_dense"
    machine = f"{describe_machine()}, {threads} threads, torch {torch.__version__}, kernels {_VERSION}"
    return folder / f"kernels-{hashlib.sha256(machine.encode()).hexdigest()[:12]}.json"


@cache
def times_of_machine(threads: int) -> Mapping[str, Mapping[str, Seconds]]:
    """Read what was measured here, case -> kernel -> seconds; nothing where nothing was. Read once per process."""
    path = timings_path(threads)
    try:
        return parse_times(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _log.warning(
            "%s is not used: %s. Kernels go by facts about the processor; measure again, or delete it", path, error
        )
        return {}


def parse_times(text: str) -> dict[str, dict[str, Seconds]]:
    """Read the JSON text of a file of times.

    Raises:
        ValueError: if it is not one.
    """
    try:
        found = {
            case: {name: Seconds(*(float(second) for second in seconds)) for name, seconds in kernels.items()}
            for case, kernels in json.loads(text)["seconds"].items()
        }
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"it does not hold times of kernels ({type(error).__name__}: {error})") from error
    for case, kernels in found.items():
        for name, seconds in kernels.items():
            if not 0 < seconds.low <= seconds.median <= seconds.high < math.inf:
                raise ValueError(f"{case}, {name}: {list(seconds)} are not quartiles of seconds")
    return found


def format_times(times: Mapping[str, Mapping[str, Seconds]], threads: int) -> str:
    """Write times as the JSON text that :func:`parse_times` reads."""
    about = {"machine": describe_machine(), "threads": threads, "torch": torch.__version__}
    return json.dumps({**about, "seconds": times}, indent=1) + "\n"
