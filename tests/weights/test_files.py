"""Checkpoint files: read without running what they hold, written whole."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from apt_dense import APTViT
from apt_dense.weights.files import read_checkpoint, write_checkpoint
from apt_dense.weights.load import unwrap

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
        if not (error.type is ValueError and "cannot be read as weights: it is damaged" in str(error.value)):
            others[name] = error.value
    assert others == {}


class _Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("save", ["torch", "old torch", "pickle"])
def test_pickled_code_is_never_run(tmp_path: Path, save: str, suffix: str) -> None:
    content = {"model": small().state_dict(), "extra": _Bomb(tmp_path / "exploded")}
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
    torch.save({"x": _Bomb(tmp_path / "exploded")}, inner)
    for value in (np.array([_Bomb(tmp_path / "exploded")], object), _Storage(inner.getvalue())):
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
