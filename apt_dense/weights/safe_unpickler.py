"""Pickles of arrays and tensors, read without running the code they may hold.

NumPy believes what a pickle says of a type of arrays: 300 bytes can declare numbers to be addresses of objects, which
NumPy then follows. So types and arrays are rebuilt here, from their plain descriptions alone.
"""

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch

_PLAIN = re.compile(r"[<>=|]?(\?|[biufc][1-9]\d*|[SU][1-9]\d*)")  # truth values, numbers and text


def read_pickle(file: IO[bytes]) -> Any:
    """Read a pickle of plain containers, numbers, text, NumPy's arrays and torch's tensors.

    Raises:
        pickle.UnpicklingError: if it asks for anything else, naming it.
        Exception: of any kind, if it is damaged.
    """
    return _ArraysOnly(file, encoding="latin1").load()  # files of Python 2, as the older ones of the zoo are


class PickledDtype:
    """Stands for a ``numpy.dtype`` while a pickle is read."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not _PLAIN.fullmatch(code):
            raise pickle.UnpicklingError(f"arrays of type {code!r:.40}; expected numbers or text")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        """Take over the byte order, and refuse subarrays and fields. Size and flags follow from the type."""
        _, order, *parts = state[:5]
        if any(part is not None for part in parts) or order not in "<>=|":
            raise pickle.UnpicklingError(f"a type of arrays with the parts {state!r:.40}; expected numbers or text")
        self.value = self.value.newbyteorder(order)


class PickledArray(np.ndarray):
    """An array while a pickle is read: empty at first, as NumPy would reserve memory of any size."""

    def __new__(cls, *_: Any) -> "PickledArray":
        raise pickle.UnpicklingError("an array without content")

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, by_columns, content = state
        super().__setstate__((version, shape, _plain(dtype), by_columns, _bytes(content)))

    def __reduce_ex__(self, protocol: int) -> Any:
        """Write it as the plain array that it is, if it comes to be saved again."""
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _plain(dtype: Any) -> np.dtype:
    if not isinstance(dtype, PickledDtype):
        raise pickle.UnpicklingError(f"an array of {type(dtype).__name__} instead of a type")
    return dtype.value


def _bytes(content: Any) -> bytes:
    """The bytes of an array; Python 2 pickled them as text."""
    content = content.encode("latin1") if isinstance(content, str) else content
    if not isinstance(content, bytes | bytearray | pickle.PickleBuffer):
        raise pickle.UnpicklingError(f"an array whose content is {type(content).__name__}")
    return bytes(content)


def _empty_array(kind: Any, shape: tuple[int, ...], code: bytes) -> PickledArray:
    if tuple(shape) != (0,):
        raise pickle.UnpicklingError(f"an array of shape {shape} without content")
    return np.empty(0, "i1").view(PickledArray)


def _scalar(dtype: Any, content: Any) -> Any:
    return np.frombuffer(_bytes(content), _plain(dtype), 1)[0]


def _from_buffer(content: Any, dtype: Any, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(_bytes(content), _plain(dtype)).reshape(shape, order=order)


def _no_bytes() -> bytes:
    """The content of an array without elements, as protocols before 3 write it."""
    return b""


def _numpy_globals() -> dict[str, Callable]:
    """The functions and types that pickled arrays refer to, by their names in all versions of NumPy."""
    parts = {
        "multiarray._reconstruct": _empty_array, "multiarray.scalar": _scalar, "numeric._frombuffer": _from_buffer,
    }  # fmt: skip
    functions = {f"numpy.{core}.{name}": part for core in ("core", "_core") for name, part in parts.items()}
    types = {"numpy.ndarray": PickledArray, "numpy.dtype": PickledDtype}
    return types | functions | {"__builtin__.bytes": _no_bytes, "builtins.bytes": _no_bytes}


#: For ``torch.serialization.safe_globals``, too.
NUMPY_GLOBALS = _numpy_globals()


# ---- whole pickles


def _tensor_bytes(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """An unpickler of arrays, tensors and plain containers that looks up nothing else."""

    _ALLOWED = NUMPY_GLOBALS | {
        "_codecs.encode": _encode,
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
        "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
        "torch.storage._load_from_bytes": _tensor_bytes,
    }

    def find_class(self, module: str, name: str) -> Callable:
        if f"{module}.{name}" not in self._ALLOWED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")
        return self._ALLOWED[f"{module}.{name}"]
