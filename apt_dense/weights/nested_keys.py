"""Find keys of dictionaries in a pickle that take forever to hash or to tell apart, before it is read.

A tuple of two tuples, each of which holds the next one twice, and so on sixty levels, takes 300 bytes. Python hashes it
2^60 times, and cannot be interrupted while it does. All multiples of 2^61 - 1 have the hash 0, so that each new key is
compared with all before: a million of them, 10 MB, take days. Hashes of text are salted, those of smaller numbers
differ, but those of tuples and complex numbers can be made equal, too.
"""

import pickle
import pickletools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

_MOST = 10**6  # parts of a key; and ten for each operation of the pickle, of which honest ones hold few parts twice
_MOST_COMPARED = 2 * 10**7  # pairs of keys whose hashes may be equal, about a second; and ten for each operation

_MARK = object()
_MEMO_WRITES = {"PUT", "BINPUT", "LONG_BINPUT"}
_MEMO_READS = {"GET", "BINGET", "LONG_BINGET"}
_TO_MARK = {"TUPLE", "LIST", "DICT", "FROZENSET", "INST", "OBJ"}  # make a container of all that follows a mark
_ADD_TO_MARK = {"APPENDS", "SETITEMS", "ADDITEMS"}
_ADD = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}  # add to a container, with the number of parts
_MAKE = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3}
_CALLS = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ"}  # which may hash whatever they get
_MODULUS = sys.hash_info.modulus  # smaller whole numbers have hashes of their own
_HASH_NOTHING = {"LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "POP_MARK"}
_HASH_KEYS = {"DICT", "SETITEM", "SETITEMS"}  # every other part; all else may hash whatever it gets


def check_keys(file: IO[bytes], pickles: int = 1) -> None:
    """Read the operations of so many pickles, one after the other, without building what they describe.

    Raises:
        pickle.UnpicklingError: if what is hashed has more parts, or more keys whose hashes may be equal, than there can
            be in an honest file.
        Exception: of any kind, if a pickle is damaged.
    """
    for _ in range(pickles):
        _Parts().follow(file)


@dataclass(slots=True)
class _Part:
    """Something on a pickle's stack. A container that is referred to again may still grow.

    Args:
        size: number of its parts, with those inside of parts.
        alike: how many of them have hashes that can be made equal to others.
        keys: how many of those are its keys.
    """

    size: int = 1
    alike: int = 0
    keys: int = 0

    def add(self, parts: Sequence["_Part"]) -> None:
        self.size += sum(part.size for part in parts)
        self.alike += sum(part.alike for part in parts)


class _Parts:
    """The sizes of everything on a pickle's stack."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.compared = 0

    def follow(self, file: IO[bytes]) -> None:
        for done, (operation, argument, _) in enumerate(pickletools.genops(file)):
            parts = self._apply(operation, argument)
            if parts > _MOST + 10 * done:
                raise pickle.UnpicklingError("keys of tuples nested in each other without an end")
            if self.compared > _MOST_COMPARED + 10 * done:
                raise pickle.UnpicklingError("too many keys whose hashes may be equal")

    def _apply(self, operation: pickletools.OpcodeInfo, argument: Any) -> int:
        """Follow an operation, and return the number of parts that it hashes."""
        name, stack = operation.name, self.stack
        if name in _MEMO_WRITES or name == "MEMOIZE":
            self.memo[len(self.memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
            return 0
        if name in _MEMO_READS:
            stack.append(self.memo[int(argument)])
            return 0
        if name in _TO_MARK or name in _ADD_TO_MARK or name == "POP_MARK":
            popped = self._pop_to_mark()
        elif name in _MAKE or name in _ADD:
            popped = self._pop(_MAKE.get(name) or _ADD[name])
        else:
            self._push_plain(operation, argument)
            return 0
        if name in _TO_MARK or name in _MAKE:
            stack.append(_Part(alike=int(name not in ("LIST", "DICT"))))
        if name in _CALLS:  # of which the result, not the arguments, may be hashed later
            self._hash(_Part(), popped)
            stack[-1].size += sum(part.size for part in popped)
        elif name != "POP_MARK":
            stack[-1].add(popped)
        hashed = [] if name in _HASH_NOTHING else popped[1::2] if name in _HASH_KEYS else popped
        if name not in _CALLS and hashed:
            self._hash(stack[-1], hashed)
        return sum(part.size for part in hashed)

    def _hash(self, container: _Part, keys: Sequence[_Part]) -> None:
        """Count the pairs of keys that may have to be compared."""
        alike = sum(key.alike for key in keys)
        self.compared += alike * (container.keys + alike)
        container.keys += alike

    def _push_plain(self, operation: pickletools.OpcodeInfo, argument: Any) -> None:
        """Follow an operation whose result has no parts."""
        if operation.name == "MARK":
            self.stack.append(_MARK)
        elif operation.name == "DUP":
            self.stack.append(self.stack[-1])
        else:
            self._pop(len(operation.stack_before))
            large = isinstance(argument, int) and abs(argument) >= _MODULUS
            self.stack += [_Part(alike=int(large)) for _ in operation.stack_after]

    def _pop(self, count: int) -> list[_Part]:
        """Take items off the stack, the last one first."""
        return [self.stack.pop() for _ in range(count)]

    def _pop_to_mark(self) -> list[_Part]:
        popped = []
        while (part := self.stack.pop()) is not _MARK:
            popped.append(part)
        return popped
