"""Checkpoint files: read without running what they hold, written whole."""

import argparse
import io
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

SUFFIXES = ".pth", ".safetensors"  # of files that are written


def read_checkpoint(path: Path, safe_types: Sequence[Any] = ()) -> Mapping:
    """The content of a .safetensors file, of one written by ``torch.save``, or of a .pkl of Detectron2's model zoo, its
    arrays as tensors; pickled code is never run.

    Args:
        safe_types: further types that a pickle may hold beside tensors, plain containers and the command line
            arguments that MAE and others store.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is damaged, of another format, or holds other pickled types.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix == ".pkl":
            return _read_pickle(path)
        # Types that are allowed already must stay so, but torch takes back whatever it is given here.
        allowed = torch.serialization.get_safe_globals()
        wanted = (argparse.Namespace, *safe_types)
        with torch.serialization.safe_globals([kind for kind in wanted if kind not in allowed]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any part of the readers
        raise ValueError(
            f"checkpoint {path} cannot be read as weights: it is damaged, of another format, or holds pickled code, "
            f"which is not run{_culprit(error)}. Copy it again, or save its state dict alone"
        ) from error


def write_checkpoint(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict as .safetensors or by ``torch.save``, beside the file and then renamed: it is there whole or
    not at all. The suffix is one of ``SUFFIXES``."""
    # Neither views of larger tensors nor tensors that share memory, which safetensors refuses.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    partial = path.with_name(f"{path.name}.partial")
    try:
        if path.suffix == ".safetensors":
            safetensors.torch.save_file(state, partial, metadata={"format": "pt"})
        else:
            torch.save(state, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _culprit(error: Exception) -> str:
    """The pickled type that was refused, if that is what went wrong."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" (it asks for {found[1]})" if found else ""


# ---- pickles of arrays


def _read_pickle(path: Path) -> Mapping:
    with path.open("rb") as file:
        # Files of Python 2, as the older ones of the zoo are, need latin1.
        content = _ArraysOnly(file, encoding="latin1").load()
    if not isinstance(content, Mapping):
        raise pickle.UnpicklingError(f"a pickle of {type(content).__name__}, not of a dictionary")
    return _as_tensors(content)


def _as_tensors(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _as_tensors(value) for name, value in content.items()}
    if isinstance(content, np.ndarray) and content.dtype.kind in "biuf":
        return torch.from_numpy(np.array(content))  # a copy: those of a pickle may be read-only
    return content


def _tensor_bytes(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _scalar(dtype: np.dtype, content: bytes) -> Any:
    if dtype.hasobject:
        raise pickle.UnpicklingError("a number that is an object")
    return np.frombuffer(content, dtype)[0]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding}")
    return text.encode("latin1")


def _allowed_globals() -> dict[str, Callable]:
    """By name, what arrays and tensors are pickled as, in all versions of NumPy."""
    reconstruct, frombuffer = np.zeros(1).__reduce__()[0], np.zeros(1).__reduce_ex__(5)[0]
    names = {
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "_codecs.encode": _encode,
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
        "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
        "torch.storage._load_from_bytes": _tensor_bytes,
    }
    for core in ("numpy.core", "numpy._core"):
        names |= {
            f"{core}.multiarray._reconstruct": reconstruct,
            f"{core}.multiarray.scalar": _scalar,
            f"{core}.numeric._frombuffer": frombuffer,
        }
    return names


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that knows arrays, tensors and plain containers, and looks up nothing else."""

    _ALLOWED = _allowed_globals()

    def find_class(self, module: str, name: str) -> Callable:
        if f"{module}.{name}" not in self._ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")
        return self._ALLOWED[f"{module}.{name}"]
