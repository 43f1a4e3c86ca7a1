"""Checkpoint files: read without running what they hold, written whole."""

from __future__ import annotations

import argparse
import errno
import io
import os
import pickle
import random
import resource
import signal
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from apt_dense import APTViT
from apt_dense.weights.files import (
    CheckpointError,
    naming_file,
    read_checkpoint,
    write_checkpoint,
    write_text_whole,
    write_whole,
)
from apt_dense.weights.load import unwrap

from support.hostile import Bomb
from support.references import randomise


def small() -> APTViT:
    return randomise(APTViT(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2), 0.2)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_files_are_read(tmp_path: Path, suffix: str) -> None:
    state, path = small().state_dict(), tmp_path / f"weights{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(dict(state), path)
    content = read_checkpoint(path)
    assert all(torch.equal(content[name], value) for name, value in state.items())


def test_old_torch_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"model": OrderedDict(small().state_dict()), "epoch": 7}, path, _use_new_zipfile_serialization=False)
    assert unwrap(read_checkpoint(path)).keys() == small().state_dict().keys()


@pytest.mark.parametrize("name", ["none.pth", "."])
def test_files_that_do_not_exist(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_checkpoint(tmp_path / name)


def damaged_files() -> dict[str, bytes]:
    """Cut at many places, in the old and the new format, and files that are something else."""
    new, old = (_saved(zipped) for zipped in (True, False))
    rng = random.Random(0)
    files = {f"new {n}": new[: n * len(new) // 10] for n in range(10)}
    files |= {f"old {n}": old[: n * len(old) // 40] for n in range(40)}
    files |= {f"noise {n}": rng.randbytes(n) for n in (1, 2, 5, 50, 500)}
    files |= {"tuples": b"\x80\x02\x86.", "number": b"\x80\x02J\x01.", "html": b"<html>not found</html>"}
    return files


def _saved(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(30), "b": [1.5]}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_damaged_files_are_refused(tmp_path: Path, suffix: str) -> None:
    others = {}
    for name, content in damaged_files().items():
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(content)
        with pytest.raises(Exception) as error:
            read_checkpoint(path)
        if not (error.type is CheckpointError and "cannot be read as weights: it is damaged" in str(error.value)):
            others[name] = error.value
    assert others == {}


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("save", ["torch", "old torch", "pickle"])
def test_pickled_code_is_never_run(tmp_path: Path, save: str, suffix: str) -> None:
    content = {"model": small().state_dict(), "extra": Bomb(tmp_path / "exploded")}
    path = tmp_path / f"bomb{suffix}"
    if save == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save == "torch")
    with pytest.raises(ValueError, match="holds pickled code, which is not run"):
        read_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_bombs_inside_arrays_and_storages_of_pickles_are_not_run(tmp_path: Path, protocol: int) -> None:
    """An array of objects pickles them, and a tensor the bytes of a file of torch's."""
    inner = io.BytesIO()
    torch.save({"x": Bomb(tmp_path / "exploded")}, inner)
    for value in (np.array([Bomb(tmp_path / "exploded")], object), _Storage(inner.getvalue())):
        path = tmp_path / "bomb.pkl"
        path.write_bytes(pickle.dumps({"model": {"a": value}}, protocol=protocol))
        with pytest.raises(ValueError, match="cannot be read as weights"):
            read_checkpoint(path)
        assert not (tmp_path / "exploded").exists()


class _Storage:
    """Pickles as the storage of a tensor with that content."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> tuple:
        return torch.storage._load_from_bytes, (self.content,)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_arrays_and_tensors_are_read(tmp_path: Path, protocol: int) -> None:
    state = small().state_dict()
    arrays = {name: value.numpy() for name, value in state.items()}
    path = tmp_path / "zoo.pkl"
    for model in (arrays, state, dict(state)):
        path.write_bytes(pickle.dumps({"model": model, "__author__": "me", "n": np.float32(2.5)}, protocol=protocol))
        content = read_checkpoint(path)
        assert content["__author__"] == "me" and content["n"] == 2.5
        assert all(torch.equal(content["model"][name], value) for name, value in state.items())


def test_text_in_a_pickle_of_arrays_stays(tmp_path: Path) -> None:
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"names": np.array(["a", "b"]), "half": np.ones(2, np.float16)}))
    content = read_checkpoint(path)
    assert content["names"].tolist() == ["a", "b"] and content["half"].dtype == torch.float16


@pytest.mark.parametrize("content", [[1, 2], np.ones(3), "text"], ids=str)
def test_pickles_of_something_else_are_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_checkpoint(path)


def test_command_line_arguments_as_mae_stores_them_are_read(tmp_path: Path) -> None:
    path = tmp_path / "args.pth"
    torch.save({"model": small().state_dict(), "args": argparse.Namespace(lr=0.1)}, path)
    assert read_checkpoint(path)["args"].lr == 0.1


def test_further_types_must_be_named(tmp_path: Path) -> None:
    path = tmp_path / "fraction.pth"
    torch.save({"model": small().state_dict(), "share": Fraction(1, 3)}, path)
    with pytest.raises(ValueError, match="Fraction"):
        read_checkpoint(path)
    assert read_checkpoint(path, [Fraction])["share"] == Fraction(1, 3)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_are_written_whole_or_not_at_all(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of views and of tensors that share memory."""
    table = torch.arange(12.0).view(3, 4)
    state: dict[str, Tensor] = {"a": table.T, "b": table[1], "c": table, "d": torch.nn.Parameter(table)}
    path = tmp_path / f"out{suffix}"
    write_checkpoint(state, path)
    content = read_checkpoint(path)
    assert all(torch.equal(content[name], value) for name, value in state.items())
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_checkpoint({"a": table}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ---- several threads, sizes that are not there


class _Own:
    """A type that torch does not know."""


def test_several_threads_read_files_of_different_types(tmp_path: Path) -> None:
    """torch's list of safe types is one for the process; every file must be read with its own."""
    kinds = {"namespace": (argparse.Namespace(lr=0.1), ()), "fraction": (Fraction(1, 3), (Fraction,)),
             "own": (_Own(), (_Own,))}  # fmt: skip
    for name, (value, _) in kinds.items():
        torch.save({"value": value, "w": torch.ones(300, 300)}, tmp_path / name)
    jobs = [(tmp_path / name, types) for _ in range(40) for name, (_, types) in kinds.items()]
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(lambda job: read_checkpoint(*job), jobs))
    assert {type(content["value"]) for content in contents} == {argparse.Namespace, Fraction, _Own}
    assert not {argparse.Namespace, Fraction, _Own} & set(torch.serialization.get_safe_globals())


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_tensors_that_claim_more_than_the_file_holds_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"claims{suffix}"
    for state in ({"a": torch.zeros(1).expand(10**12)}, {"model": {"a": torch.zeros(2).expand(10**11, 2)}}):
        torch.save(state, path) if suffix == ".pth" else path.write_bytes(pickle.dumps(state))
        assert path.stat().st_size < 3000
        with pytest.raises(ValueError, match="cannot be read as weights"):
            read_checkpoint(path)


def test_small_expanded_tensors_and_views_are_read(tmp_path: Path) -> None:
    table = torch.arange(1e6)
    torch.save({"view": table[5:8], "expanded": torch.ones(1).expand(20)}, tmp_path / "a.pth")
    content = read_checkpoint(str(tmp_path / "a.pth"))
    assert content["view"].tolist() == [5, 6, 7] and content["expanded"].sum() == 20


# ---- writing whole


def test_a_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text_whole(path, "old")
    with write_whole(str(path)) as partial:
        assert partial.parent == tmp_path and partial.suffix == ".partial"
        partial.write_text("new é", encoding="utf-8")
        assert path.read_text() == "old"
    assert path.read_text(encoding="utf-8") == "new é" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, ZeroDivisionError])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), write_whole(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError), write_whole(path):
        pass  # a body that wrote nothing
    assert path.read_text() == "old"


def test_links(tmp_path: Path) -> None:
    """A link to a file gives way to the new file; one to nothing would be lost, and is refused before any work."""
    link, file = tmp_path / "last.txt", tmp_path / "first.txt"
    file.write_text("first")
    link.symlink_to(file)
    write_text_whole(link, "second")
    assert not link.is_symlink() and link.read_text() == "second" and file.read_text() == "first"
    link.unlink()
    link.symlink_to(tmp_path / "gone.txt")
    with pytest.raises(FileNotFoundError, match=r"last.txt is a link to .*gone.txt, which does not exist"):
        write_checkpoint({"a": torch.ones(1)}, link)
    assert link.is_symlink() and sorted(tmp_path.iterdir()) == [file, link]


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """Files cannot grow beyond ``free`` bytes."""
    resource = pytest.importorskip("resource")
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_full_disk(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    write_checkpoint({"a": torch.ones(3)}, path)
    with full_disk(100_000), pytest.raises(OSError, match=f"out{suffix} cannot be written"):
        write_checkpoint({"a": torch.ones(100_000)}, path)
    assert read_checkpoint(path)["a"].tolist() == [1, 1, 1] and list(tmp_path.iterdir()) == [path]


# ---- full disks


def test_each_process_has_a_partial_file_of_its_own(tmp_path: Path) -> None:
    with write_whole(tmp_path / "a") as partial:
        assert partial.name == f"a.{os.getpid()}.partial"
        partial.touch()


WRITES = {
    "text": lambda path: write_text_whole(path, "x" * 300_000),
    "torch": lambda path: write_checkpoint({"a": torch.rand(100_000)}, path.with_suffix(".pth")),
    "safetensors": lambda path: write_checkpoint({"a": torch.rand(100_000)}, path.with_suffix(".safetensors")),
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_full_disk_is_named_and_the_old_file_stays(kind: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    WRITES[kind](tmp_path / "file")
    [path] = tmp_path.iterdir()
    content = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=f"{path} cannot be written: ") as error:
            WRITES[kind](tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value) and "MB free" in str(error.value)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [PermissionError(13, "no"), KeyError("x"), RuntimeError("of something else")])
def test_other_errors_stay_as_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as found, write_whole(tmp_path / "a"):
        raise error
    assert found.value is error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_errors_of_full_disks_are_told_apart(number: int, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a cannot be written: .*the disk of .* MB free"), naming_file(tmp_path / "a"):
        raise OSError(number, os.strerror(number))


def test_a_program_of_torchscript_is_named(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.rand(1, 2)).save(tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match=r"it is a TorchScript program; torch\.jit\.load\(FILE\)\.state_dict\(\)"):
        read_checkpoint(tmp_path / "clip.pt")
