"""The .pkl files that MMEngine reads besides weights."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mmengine")

import mmengine

import apt_dense.hosts.mmseg  # noqa: F401 (registers the reader)
from apt_dense.weights.files import CheckpointError

from support.hostile import Bomb


@pytest.mark.parametrize("content", [[0.5, 1.0], np.ones(3), {"a": np.float32(2)}, "text", None], ids=str)
def test_arrays_and_plain_containers_are_read(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "weights.pkl"
    mmengine.dump(content, path)
    assert str(mmengine.load(path)) == str(content)


@pytest.mark.parametrize("suffix", ["pkl", "pickle"])
def test_code_is_not_run(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(pickle.dumps([Bomb(tmp_path / "ran")]))
    with pytest.raises(CheckpointError, match="pickled code, which is not run .*mkdir"):
        mmengine.load(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        mmengine.load(path)
    assert not (tmp_path / "ran").exists()
