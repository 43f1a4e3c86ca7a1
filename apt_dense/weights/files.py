"""Checkpoint files: read without running the code they may hold, written whole or not at all."""

import argparse
import errno
import io
import os
import pickle
import re
import shutil
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

SUFFIXES = ".pth", ".safetensors"  # of files that are written

_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG

# torch keeps one list of safe types per process, so two readers must not change it at the same time.
_SAFE_TYPES_LOCK = threading.Lock()


class CheckpointError(ValueError):
    """A checkpoint is damaged, holds code, or does not fit. Tools report it in one line."""


def read_checkpoint(path: str | Path, safe_types: Sequence[Any] = ()) -> Mapping:
    """Read a .safetensors file, a file written by ``torch.save``, or a .pkl of Detectron2's model zoo, whose arrays
    become tensors. Pickled code is never run. May be called from several threads.

    Args:
        safe_types: types a pickle may hold in addition to tensors, NumPy's numbers and arrays, plain containers and
            the command line arguments that MAE and others store.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file is damaged, of another format, holds other pickled types, or claims tensors larger
            than itself.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        content = _read(path, safe_types)
        _check_sizes(content, path.stat().st_size)
        return content
    except Exception as error:  # a damaged file can fail in any part of the readers
        raise CheckpointError(
            f"checkpoint {path} cannot be read as weights: it is damaged, of another format, or holds pickled code, "
            f"which is not run{_culprit(error)}. Copy it again, or save its state dict alone"
        ) from error


def write_checkpoint(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state dict whole or not at all, as .safetensors or by ``torch.save``. The suffix is one of ``SUFFIXES``.

    Raises:
        OSError: if the file cannot be written, for example on a full disk; an existing file is left as it was.
    """
    # Clones, since safetensors refuses tensors that share memory, and torch.save would store all of what a view views.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    with write_whole(path) as partial:
        if Path(path).suffix == ".safetensors":
            safetensors.torch.save_file(state, partial, metadata={"format": "pt"})
        else:
            torch.save(state, partial)


@contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to, next to ``path``; rename it to ``path`` if the body succeeds and
    remove it if not. Readers therefore see the old file or all of the new one. A link to a file is replaced, and the
    file it points to stays. The temporary path is unique to the process.

    Raises:
        FileNotFoundError: if ``path`` is a link to a file that does not exist, which replacing would lose.
        OSError: if the body fails to write, naming the file and, where its disk is full, the disk.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not exist; remove the link first")
    partial = path.with_name(f"{path.name}{_partial_suffix(os.getpid())}")
    try:
        with naming_file(path):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _partial_suffix(pid: int) -> str:
    return f".{pid}.partial"


def remove_partial_files(folder: str | Path, pid: int) -> None:
    """Remove what a process that was killed inside :func:`write_whole` left in a folder."""
    for path in Path(folder).glob(f"*{_partial_suffix(pid)}"):
        path.unlink(missing_ok=True)


@contextmanager
def naming_file(path: str | Path) -> Iterator[None]:
    """Name the file and the full disk in errors of writing it. Python's own name neither, and those of torch and
    safetensors are not OSErrors."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in _FULL:
            raise
        if isinstance(error, RuntimeError) and not re.search(
            "PytorchStreamWriter|inline_container|file write failed", str(error)
        ):
            raise
        raise OSError(f"{path} cannot be written: {_why_unwritten(path, error)}") from error


def _why_unwritten(path: str | Path, error: Exception) -> str:
    folder = Path(path).absolute().parent
    free = shutil.disk_usage(folder).free / 2**20
    reason = error.strerror if isinstance(error, OSError) else "writing failed part of the way"
    return f"{reason}; the disk of {folder} has {free:.0f} MB free. Make room there, or choose another folder"


def write_text_whole(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; see :func:`write_whole`."""
    with write_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _read(path: Path, safe_types: Sequence[Any]) -> Mapping:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix == ".pkl":
        return _read_pickle(path)
    with _SAFE_TYPES_LOCK:
        # Types that are allowed already must stay so, but torch withdraws all that it is given here.
        allowed = torch.serialization.get_safe_globals()
        wanted = (argparse.Namespace, Counter, *_numpy_types(), *safe_types)
        with torch.serialization.safe_globals([kind for kind in wanted if kind not in allowed]):
            return torch.load(path, map_location="cpu", weights_only=True)


def _numpy_types() -> tuple[Any, ...]:
    """Globals that pickled NumPy scalars and arrays refer to, under the names of NumPy 1 and 2."""
    functions = _numpy_functions().items()
    kinds = "?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16", "S", "U"
    return np.ndarray, np.dtype, *((f, name) for name, f in functions), *(type(np.dtype(kind)) for kind in kinds)


def _check_sizes(content: Any, file_size: int) -> None:
    """Refuse tensors and arrays of more bytes than the file has: 1 kB can claim 10^12 elements, by stride 0 or beyond
    the stored numbers. torch and NumPy reserve such memory without touching it; the first copy would."""
    if isinstance(content, Mapping | list | tuple):
        for value in content.values() if isinstance(content, Mapping) else content:
            _check_sizes(value, file_size)
        return
    sized = isinstance(content, np.ndarray) or (isinstance(content, Tensor) and content.layout is torch.strided)
    if sized and content.nbytes > file_size:
        raise ValueError(f"a tensor of shape {tuple(content.shape)} in a file of {file_size} bytes")


def _culprit(error: Exception) -> str:
    """The pickled type that was refused, if that is the error."""
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


def _empty_array(kind: Any, shape: tuple[int, ...], code: bytes) -> np.ndarray:
    """NumPy's ``_reconstruct``, which would reserve memory of any size; what is pickled begins empty."""
    if tuple(shape) != (0,):
        raise pickle.UnpicklingError(f"an array of shape {shape} without content")
    return np.empty(0, "i1")


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding}")
    return text.encode("latin1")


def _allowed_globals() -> dict[str, Callable]:
    """The functions that rebuild pickled arrays and tensors, by their names in all versions of NumPy."""
    return _numpy_functions() | {
        "numpy.ndarray": _empty_array,  # only ever handed to that function
        "numpy.dtype": np.dtype,
        "_codecs.encode": _encode,
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
        "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
        "torch.storage._load_from_bytes": _tensor_bytes,
    }


def _numpy_functions() -> dict[str, Callable]:
    frombuffer = np.zeros(1).__reduce_ex__(5)[0]
    parts = {"multiarray._reconstruct": _empty_array, "multiarray.scalar": _scalar, "numeric._frombuffer": frombuffer}
    return {f"numpy.{core}.{name}": part for core in ("core", "_core") for name, part in parts.items()}


class _ArraysOnly(pickle.Unpickler):
    """An unpickler of arrays, tensors and plain containers that looks up nothing else."""

    _ALLOWED = _allowed_globals()

    def find_class(self, module: str, name: str) -> Callable:
        if f"{module}.{name}" not in self._ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")
        return self._ALLOWED[f"{module}.{name}"]
