"""Arrays in pickles: what NumPy would believe of them, and what it may be told."""

from __future__ import annotations

import io
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apt_dense.weights.files import read_checkpoint
from apt_dense.weights.safe_unpickler import PickledArray, PickledDtype, read_pickle


class Call:
    """Pickles as a call with a state."""

    def __init__(self, function: Callable, args: tuple, *state: Any) -> None:
        self.result = function, args, *state

    def __reduce__(self) -> tuple:
        return self.result


ADDRESS = b"\x41" * 8
_reconstruct = np.zeros(1).__reduce__()[0]
_scalar = np.float64(1).__reduce__()[0]
_from_buffer = np.zeros(1).__reduce_ex__(5)[0]


def dtype(code: Any, *, order: str = "|", names: Any = None, fields: Any = None, flags: int = 0) -> Call:
    return Call(np.dtype, (code, False, True), (3, order, None, names, fields, 8, 1, flags))


HOLDS_OBJECTS = {"a": (np.dtype("O"), 0)}
#: Types that say they hold no objects, and do; that reach outside of the array; that change NumPy's own.
TYPES: dict[str, Callable[[], Call]] = {
    "objects": lambda: dtype("O8"),
    "objects in a field": lambda: dtype("V8", names=("a",), fields=HOLDS_OBJECTS),
    "objects in a field of text": lambda: dtype("S8", names=("a",), fields=HOLDS_OBJECTS),
    "a list of fields": lambda: dtype([("a", "O")]),
    "a field before": lambda: dtype("V8", names=("a",), fields={"a": (np.dtype("i8"), -1000)}),
    "a field behind": lambda: dtype("V8", names=("a",), fields={"a": (np.dtype("i8"), 10**6)}),
    "text of no length": lambda: Call(np.dtype, ("S0", False, True)),
    "nothing of no length": lambda: Call(np.dtype, ("V", False, True)),
    "dates": lambda: Call(np.dtype, ("M8", False, True)),
    "no code": lambda: Call(np.dtype, (None,)),
    "another order": lambda: dtype("i8", order="x"),
}
HOLDERS: dict[str, Callable[[Any], Call]] = {
    "scalar": lambda kind: Call(_scalar, (kind, ADDRESS)),
    "array": lambda kind: Call(_reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), kind, False, ADDRESS)),
    "large array": lambda kind: Call(_reconstruct, (np.ndarray, (0,), b"b"), (1, (10**12,), kind, False, ADDRESS)),
    "list": lambda kind: Call(_reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), kind, False, [ADDRESS])),
    "buffer": lambda kind: Call(_from_buffer, (ADDRESS, kind, (1,), "C")),
    "empty": lambda kind: Call(np.ndarray, ((10**12,), kind)),
}  # fmt: skip


def write(content: Any, path: Path) -> Path:
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol=4))
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", TYPES)
def test_types_that_numpy_would_believe_are_refused(kind: str, holder: str, suffix: str, tmp_path: Path) -> None:
    path = write({"model": {"a": HOLDERS[holder](TYPES[kind]())}}, tmp_path / f"a{suffix}")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("holder", ["large array", "list", "empty"])
def test_arrays_without_their_content_are_refused(holder: str, suffix: str, tmp_path: Path) -> None:
    path = write({"model": {"a": HOLDERS[holder](np.dtype("f8"))}}, tmp_path / f"a{suffix}")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_file_does_not_change_numpy_s_own_types(suffix: str, tmp_path: Path) -> None:
    """Without a copy, the pickled state is that of the one type of its kind."""
    swap = Call(np.dtype, ("f4", False, False), (3, ">", None, None, None, -1, -1, 0))
    read_checkpoint(write({"model": {}, "a": swap}, tmp_path / f"a{suffix}"))
    assert np.ones(1, np.float32).tobytes() == b"\x00\x00\x80\x3f"


NUMBERS = st.sampled_from(["?", "i1", "<i8", ">i4", "u2", "f2", "<f4", ">f8", "c8", "S3", "U2"])


@given(NUMBERS, st.lists(st.integers(0, 3), max_size=3), st.integers(0, 5), st.booleans())
def test_arrays_and_scalars_come_as_they_are(code: str, shape: list[int], protocol: int, by_columns: bool) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(code)
    array = np.asfortranarray(array) if by_columns else array
    for value in (array, *array.ravel()[:1]):
        found = read_pickle(io.BytesIO(pickle.dumps(value, protocol=protocol)))
        kinds = [each.dtype.newbyteorder("=") for each in (found, value)]  # NumPy swaps as it reads
        assert kinds[0] == kinds[1] and np.array_equal(found, value)
        again = pickle.loads(pickle.dumps(found))
        assert type(again) is type(value) and np.array_equal(again, value)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_arrays_without_elements_are_read(suffix: str, tmp_path: Path) -> None:
    content = read_checkpoint(write({"model": {}, "curve": [np.ones((0, 3)), b""]}, tmp_path / f"a{suffix}"))
    assert content["curve"][0].shape == (0, 3)


def test_arrays_of_python_2_are_read() -> None:
    """Their content is text."""
    head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nt"
    kind = b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n"
    content = b"S'\\x00\\x00\\x80?\\x00\\x00\\x00@'\ntb."
    assert read_pickle(io.BytesIO(head + kind + content)).tolist() == [1, 2]


def test_types_that_the_process_allows_do_not_take_the_place_of_ours(tmp_path: Path) -> None:
    path = write({"best": np.float64(0.5), "curve": np.ones(3)}, tmp_path / "a.pth")
    bad = write({"a": HOLDERS["array"](TYPES["objects"]())}, tmp_path / "b.pth")
    allowed = [np.ndarray, np.dtype, _reconstruct, _scalar, type(np.dtype("O")), type(np.dtype("f8"))]
    with torch.serialization.safe_globals(allowed):
        for _ in range(3):
            assert read_checkpoint(path)["curve"].tolist() == [1, 1, 1]
            with pytest.raises(ValueError, match="cannot be read"):
                read_checkpoint(bad)
        assert set(torch.serialization.get_safe_globals()) >= set(allowed)
    assert not {PickledArray, PickledDtype} & set(torch.serialization.get_safe_globals())


# ---- containers that hold each other


@pytest.fixture
def hurry() -> Iterator[None]:
    """Fail after a while: 10^30 elements take longer."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def nested(kind: str) -> Any:
    """Thirty levels, each of which refers to the next ten times."""
    inner: Any = [torch.ones(2)]
    for _ in range(30):
        inner = {
            "lists": [inner] * 10, "tuples": (inner,) * 10, "dictionaries": {str(i): inner for i in range(10)},
        }[kind]  # fmt: skip
    return inner


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("kind", ["lists", "tuples", "dictionaries"])
def test_each_container_is_looked_at_once(kind: str, suffix: str, tmp_path: Path) -> None:
    content = read_checkpoint(write({"model": {"a": torch.ones(2)}, "x": nested(kind)}, tmp_path / f"a{suffix}"))
    assert content["model"]["a"].tolist() == [1, 1]


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_container_may_hold_itself(suffix: str, tmp_path: Path) -> None:
    content: dict = {"model": {"a": torch.ones(2)}}
    content["self"] = [content]
    assert read_checkpoint(write(content, tmp_path / f"a{suffix}"))["model"]["a"].tolist() == [1, 1]


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("stride", [10**11, 10**9])
def test_storages_larger_than_the_file_are_refused(stride: int, suffix: str, tmp_path: Path) -> None:
    """Two numbers far apart: torch makes the storage as large as they ask."""
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.zeros(2).untyped_storage(), dtype=torch.float32, _internal=True
    )
    claim = Call(torch._utils._rebuild_tensor_v2, (storage, 0, (2,), (stride,), False, {}))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        read_checkpoint(write({"model": {"a": claim}}, tmp_path / f"a{suffix}"))
