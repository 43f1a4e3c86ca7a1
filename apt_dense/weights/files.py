"""Checkpoint files: read without running the code they may hold, written whole or not at all."""

import argparse
import errno
import io
import json
import os
import pickle
import re
import shutil
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from apt_dense.weights.nested_keys import check_keys
from apt_dense.weights.safe_unpickler import NUMPY_GLOBALS, read_pickle

SUFFIXES = ".pth", ".safetensors"  # of files that are written

_LEGACY_PICKLES = 5  # before version 1.6: a magic number, the protocol, the system, the content, names of storages
_NOTES = "apt_dense"  # key in the metadata of .safetensors files

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
    """Write a state dict whole or not at all, as .safetensors or by ``torch.save``, with what our backbones note in
    torch's metadata. The suffix is one of ``SUFFIXES``.

    Raises:
        OSError: if the file cannot be written, for example on a full disk; an existing file is left as it was.
    """
    # Clones, since safetensors refuses tensors that share memory, and torch.save would store all of what a view views.
    notes = _notes(getattr(state, "_metadata", None))
    state = OrderedDict((name, value.detach().cpu().contiguous().clone()) for name, value in state.items())
    with write_whole(path) as partial:
        if Path(path).suffix == ".safetensors":
            metadata = {_NOTES: json.dumps(notes)} if notes else {}
            safetensors.torch.save_file(state, partial, metadata={"format": "pt", **metadata})
        else:
            if notes:
                state._metadata = notes
            torch.save(state, partial)


def _notes(metadata: Any) -> dict[str, dict[str, Any]]:
    """The entries of torch's metadata that are more than a module's version."""
    entries = metadata.items() if isinstance(metadata, Mapping) else ()
    return {key: dict(entry) for key, entry in entries if isinstance(entry, Mapping) and entry.keys() - {"version"}}


def _read_safetensors(path: Path) -> Mapping:
    """Read weights and notes, whose lists become the tuples that they were."""
    state = OrderedDict(safetensors.torch.load_file(path))
    with safetensors.safe_open(path, "pt") as file:
        notes = (file.metadata() or {}).get(_NOTES)
    if notes is not None:
        state._metadata = _with_tuples(json.loads(notes))
    return state


def _with_tuples(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _with_tuples(value) for key, value in content.items()}
    return tuple(map(_with_tuples, content)) if isinstance(content, list) else content


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
    if path.name.endswith(".safetensors"):
        return _read_safetensors(path)
    if path.name.endswith(".pkl"):  # also one of no other name, which has no suffix
        return _read_pickle(path)
    _check_keys(path)
    numpy_types = [(function, name) for name, function in NUMPY_GLOBALS.items()]
    with _safe_types([argparse.Namespace, Counter, *numpy_types, *safe_types]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_keys(path: Path) -> None:
    """Look at the pickles of a file of ``torch.save``."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # by which torch tells, too
            file.seek(0)
            check_keys(file, pickles=_LEGACY_PICKLES)
            return
    check_keys(io.BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")))


@contextmanager
def _safe_types(wanted: Sequence[Any]) -> Iterator[None]:
    """Let torch read these types, instead of those of the same name that the process may have allowed already."""
    with _SAFE_TYPES_LOCK:
        allowed, names = torch.serialization.get_safe_globals(), set(map(_name_of_global, wanted))
        replaced = [kind for kind in allowed if _name_of_global(kind) in names]
        if replaced:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals([kind for kind in allowed if kind not in replaced])
        try:
            with torch.serialization.safe_globals(wanted):
                yield
        finally:
            torch.serialization.add_safe_globals(replaced)  # torch withdraws all that it was given


def _name_of_global(kind: Any) -> str:
    return kind[1] if isinstance(kind, tuple) else f"{kind.__module__}.{kind.__qualname__}"


def _check_sizes(content: Any, file_size: int) -> None:
    """Refuse tensors and arrays of more bytes than the file has: 1 kB can claim 10^12 elements, by stride 0 or beyond
    the stored numbers. torch and NumPy reserve such memory without touching it; the first copy would."""
    seen: set[int] = set()  # a list may hold another ten times, that one a third ten times, and so on
    waiting = [content]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping | list | tuple | set | frozenset):
            if id(part) not in seen:
                seen.add(id(part))
                waiting.extend(part.values() if isinstance(part, Mapping) else part)
        elif _size_of(part) > file_size:
            raise ValueError(f"a tensor of shape {tuple(part.shape)} in a file of {file_size} bytes")


def _size_of(part: Any) -> int:
    """The bytes that a tensor or array takes, also those of its storage that it leaves out."""
    if isinstance(part, np.ndarray):
        return part.nbytes
    if not isinstance(part, Tensor) or part.layout is not torch.strided:
        return 0
    return part.nbytes if part.is_meta else max(part.nbytes, part.untyped_storage().nbytes())


def _culprit(error: Exception) -> str:
    """The pickled type that was refused, or the kind of program, if that is the error."""
    if "TorchScript" in str(error):
        return " (it is a TorchScript program; torch.jit.load(FILE).state_dict() has its weights, if you trust it)"
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" (it asks for {found[1]})" if found else ""


def _read_pickle(path: Path) -> Mapping:
    with path.open("rb") as file:
        check_keys(file)
        file.seek(0)
        content = read_pickle(file)
    if not isinstance(content, Mapping):
        raise pickle.UnpicklingError(f"a pickle of {type(content).__name__}, not of a dictionary")
    return _as_tensors(content, {})


def _as_tensors(content: Any, done: dict[int, Any]) -> Any:
    """Copy nested dictionaries, each once however often it is referred to, with arrays as tensors."""
    if id(content) in done:
        return done[id(content)]
    if isinstance(content, Mapping):
        done[id(content)] = copied = {}
        copied.update({name: _as_tensors(value, done) for name, value in content.items()})
        return copied
    if isinstance(content, np.ndarray) and content.dtype.kind in "biuf":
        # A copy: those of a pickle may be read-only.
        return torch.from_numpy(np.array(content, content.dtype.newbyteorder("=")))
    return content
