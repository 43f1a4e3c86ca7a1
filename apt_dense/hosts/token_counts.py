"""The tokens of each image of a training set, counted once and kept in a file.

The file says what they were counted with, and is written again where that differs. tools/simulate_scaling.py reads it.
"""

import datetime
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from apt_dense.hosts.interrupts import outlive_sigterm
from apt_dense.patches.selector import PatchSelector
from apt_dense.weights.files import write_text_whole

log = logging.getLogger(__name__)
#: Processes that count more images wait for each other at most so long.
PATIENCE = datetime.timedelta(days=1)


def cached_counts(
    path: str | Path, counted_with: Mapping[str, Any], count_one: Callable[[int], float], images: int, workers: int = 0
) -> list[float]:
    """Read the tokens of all images from a file, or count them and write it.

    All processes of a training must call this. The first reads or writes the file; each counts a part of the images.

    Args:
        path: of the file; its folder is made.
        counted_with: all that the counts depend on, as values of JSON.
        count_one: the tokens of the image of an index.
        images: their number; each draw of an image's augmentation is one.
        workers: processes that read images, for each process of the training.

    Raises:
        ValueError: if there is a file that holds something else.
        OSError: if it cannot be read or written.
    """
    counted_with = json.loads(json.dumps({**counted_with, "images": images}))
    with _processes() as (rank, ranks, everyone):
        found = everyone(_read(Path(path), counted_with) if rank == 0 else None)[0]
        if isinstance(found, Exception):
            raise found
        if found is not None:
            return found
        if rank == 0:
            log.info("counting the tokens of %d images for %s", images, path)
        counting = DataLoader(_Counting(count_one, range(rank, images, ranks)), batch_size=None, num_workers=workers)
        parts = everyone([float(tokens) for tokens in counting])
    counts = [parts[index % ranks][index // ranks] for index in range(images)]
    if rank == 0:
        write_counts(path, counts, counted_with)
    return counts


def write_counts(path: str | Path, tokens: Sequence[float], counted_with: Mapping[str, Any]) -> None:
    """Write a file of counts, whole or not at all. Raises OSError."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    content = {"counted_with": dict(counted_with), "tokens": list(tokens)}
    write_text_whole(Path(path), json.dumps(content) + "\n")


def read_counts(path: str | Path) -> tuple[list[float], dict[str, Any]]:
    """Read the tokens of each image, and what they were counted with.

    Raises:
        ValueError: if the file holds something else.
        OSError: if it cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        tokens, counted_with = [float(one) for one in content["tokens"]], dict(content["counted_with"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of token counts; name another file, or remove it") from error
    return tokens, counted_with


def selector_options(selector: PatchSelector) -> dict[str, Any]:
    """All options of a selector as values of JSON."""
    options = {field.name: getattr(selector, field.name) for field in fields(selector)}
    return {name: value if _is_plain(value) else repr(value) for name, value in options.items()}


def digest(names: Iterable[str]) -> str:
    """Tell lists of names apart by 12 letters."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def _is_plain(value: Any) -> bool:
    parts = value if isinstance(value, tuple | list) else [value]
    return all(isinstance(part, int | float | str | None) for part in parts)


def _read(path: Path, counted_with: Mapping[str, Any]) -> list[float] | Exception | None:
    """The counts; None if there are none with these settings. Errors are returned, to be raised by all processes."""
    try:
        tokens, found = read_counts(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return error
    differing = sorted(name for name in {*found, *counted_with} if found.get(name) != counted_with.get(name))
    if differing:
        log.info("%s was counted with other values of %s", path, ", ".join(differing))
        return None
    return tokens


class _Counting(Dataset):
    def __init__(self, count_one: Callable[[int], float], indices: range) -> None:
        self.count_one, self.indices = count_one, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> float:
        outlive_sigterm()
        return round(float(self.count_one(self.indices[place])), 2)


@contextmanager
def _processes() -> Iterator[tuple[int, int, Callable[[Any], list]]]:
    """The rank, the number of processes, and a function that collects an object of each in all of them."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        yield 0, 1, lambda mine: [mine]
        return
    group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def everyone(mine: Any) -> list:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine, group=group)
        return found

    try:
        yield dist.get_rank(), dist.get_world_size(), everyone
    finally:
        dist.destroy_process_group(group)
