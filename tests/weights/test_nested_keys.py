"""Keys of dictionaries that take forever to hash are found before a pickle is read."""

from __future__ import annotations

import io
import multiprocessing
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apt_dense.weights import nested_keys
from apt_dense.weights.files import CheckpointError, read_checkpoint
from apt_dense.weights.nested_keys import check_keys


class Call:
    """Pickles as a call with arguments, and with entries."""

    def __init__(self, function: Callable, *args: Any, entries: tuple = ()) -> None:
        self.result = function, args, None, None, iter(entries) if entries else None

    def __reduce__(self) -> tuple:
        return self.result


def key(levels: int = 60) -> tuple:
    """Tuples of two, each of which holds the next one twice."""
    inner: tuple = ("x",)
    for _ in range(levels):
        inner = inner, inner
    return inner


HASHING: dict[str, Callable[[], Any]] = {
    "a key": lambda: Call(OrderedDict, entries=((key(), 1),)),
    "one of several keys": lambda: Call(OrderedDict, entries=(("a", 1), (key(), 1))),
    "a key of a dictionary as an argument": lambda: Call(OrderedDict, [(key(), 1)]),
    "in a list as an argument": lambda: Call(OrderedDict, [[key(), 1]]),
    "counted": lambda: Call(Counter, [key()]),
    "in a set": lambda: Call(set, [key()]),
    "deep inside": lambda: [{"a": [Call(OrderedDict, entries=((key(), 1),))]}],
}


def write(content: Any, path: Path, legacy: bool = False) -> Path:
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol=4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def _read(path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        read_checkpoint(path)


@pytest.mark.parametrize("kind", HASHING)
def test_endless_keys_are_refused(kind: str, tmp_path: Path) -> None:
    """In a process, which can be ended: hashing cannot be interrupted."""
    for name, legacy in (("a.pkl", False), ("a.pth", False), ("b.pth", True)):
        path = write({"model": {"a": torch.ones(2)}, "x": HASHING[kind]()}, tmp_path / name, legacy)
        child = multiprocessing.get_context("fork").Process(target=_read, args=(path,))
        child.start()
        child.join(10)
        hangs = child.is_alive()
        child.kill()
        child.join()
        assert not hangs and child.exitcode == 0, name


MANY = 3000
M = 2**61 - 1  # whose multiples have the hash 0
ALIKE: dict[str, Callable[[], Any]] = {
    "numbers": lambda: {k * M: 0 for k in range(MANY)},
    "negative numbers": lambda: {-k * M: 0 for k in range(MANY)},
    "numbers in a set": lambda: {k * M for k in range(MANY)},
    "numbers in tuples": lambda: {(k * M,): 0 for k in range(MANY)},
    "numbers in frozen sets": lambda: {(frozenset([k * M]), "a"): 0 for k in range(MANY)},
    "arguments of a set": lambda: Call(set, [k * M for k in range(MANY)]),
    "arguments of a dictionary": lambda: Call(OrderedDict, [[k * M, 0] for k in range(MANY)]),
    "counted": lambda: Call(Counter, [k * M for k in range(MANY)]),
    "complex numbers": lambda: {complex(-k * 1_000_003, k): 0 for k in range(MANY)},
    "entries of an ordered dictionary": lambda: OrderedDict((k * M, 0) for k in range(MANY)),
    "several dictionaries": lambda: [{k * M: 0 for k in range(1000)} for _ in range(40)],
}


@pytest.mark.parametrize("kind", ALIKE)
def test_keys_with_equal_hashes_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nested_keys, "_MOST_COMPARED", 10**6)
    with pytest.raises(pickle.UnpicklingError, match="too many keys whose hashes may be equal"):
        check_keys(io.BytesIO(pickle.dumps(ALIKE[kind](), protocol=2)))


@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "b.pth"])
def test_files_of_such_keys_are_refused(name: str, tmp_path: Path) -> None:
    alike = {k * M: 0 for k in range(8000)}
    _read(write({"model": {"a": torch.ones(2)}, "x": alike}, tmp_path / name, name == "b.pth"))


def test_numbers_that_are_no_keys_and_keys_of_text_or_small_numbers_pass() -> None:
    several = range(7000)
    content = {
        "large": [k * M for k in several], "text": {str(k): (k,) for k in several}, "small": dict.fromkeys(several),
        "set": set(range(-7000, 0)), "pairs": {(k, "a"): 0 for k in range(2000)}, "arrays": [np.float32(1)] * 7000,
    }  # fmt: skip
    for protocol in (0, 2, 4):
        check_keys(io.BytesIO(pickle.dumps(content, protocol=protocol)))


def test_a_zip_behind_a_file_of_old_does_not_hide_its_keys(tmp_path: Path) -> None:
    hidden = write({"x": HASHING["a key"]()}, tmp_path / "hidden.pth", legacy=True)
    harmless = write({"a": torch.ones(2)}, tmp_path / "harmless.pth")
    hidden.write_bytes(hidden.read_bytes() + harmless.read_bytes())
    _read(hidden)


@pytest.mark.parametrize("protocol", range(6))
def test_honest_pickles_pass(protocol: int) -> None:
    shared = ("a", 1.5)
    content = {
        "numbers": list(range(3000)), "shared": [shared] * 3000, ("a", ("b", 2)): {shared: 1, "x": None},
        "arrays": [np.ones((2, 3)), np.float32(2)], "ordered": OrderedDict(a=torch.ones(2)), "set": {1, "b", shared},
        "frozen": frozenset("abc"), "counter": Counter("abracadabra"), "bytes": b"abc", "nested": [key(30)],
    }  # fmt: skip
    check_keys(io.BytesIO(pickle.dumps(content, protocol=protocol)))


def test_honest_files_pass(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    for legacy in (False, True):
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), ("a", 1): shared_lists()}
        read = read_checkpoint(write(content, tmp_path / "a.pth", legacy))
        assert read["model"].keys() == {"weight", "bias"} and ("a", 1) in read


def shared_lists() -> list:
    return [[1, 2]] * 100


def test_pickles_cut_off_fail() -> None:
    whole = pickle.dumps({"a": [1, 2, (3, "b")]})
    for length in range(1, len(whole)):
        with pytest.raises(Exception, match=""):
            check_keys(io.BytesIO(whole[:length]))
