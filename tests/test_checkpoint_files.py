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
from references import randomise
from torch import Tensor

from apt_dense import APTViT
from apt_dense.checkpoint_files import read_checkpoint, write_checkpoint
from apt_dense.checkpoints import unwrap


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
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
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


@pytest.mark.parametrize("save", ["torch", "old torch", "pickle"])
def test_pickled_code_is_never_run(tmp_path: Path, save: str) -> None:
    content = {"model": small().state_dict(), "extra": _Bomb(tmp_path / "exploded")}
    path = tmp_path / "bomb.pth"
    if save == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save == "torch")
    with pytest.raises(ValueError, match="holds pickled code, which is not run"):
        read_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


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
