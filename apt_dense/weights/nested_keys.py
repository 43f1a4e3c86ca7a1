"""Find keys of dictionaries in a pickle that take forever to hash, before it is read.

A tuple of two tuples, each of which holds the next one twice, and so on sixty levels, takes 300 bytes. Python hashes it
2^60 times, and cannot be interrupted while it does.
"""

import pickle
import pickletools
from typing import IO, Any

_MOST = 10**6  # parts of a key; and ten for each operation of the pickle, of which honest ones hold few parts twice

_MARK = object()
_MEMO_WRITES = {"PUT", "BINPUT", "LONG_BINPUT"}
_MEMO_READS = {"GET", "BINGET", "LONG_BINGET"}
_TO_MARK = {"TUPLE", "LIST", "DICT", "FROZENSET", "INST", "OBJ"}  # make a container of all that follows a mark
_ADD_TO_MARK = {"APPENDS", "SETITEMS", "ADDITEMS"}
_ADD = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}  # add to a container, with the number of parts
_MAKE = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3}
_HASH_NOTHING = {"LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "POP_MARK"}
_HASH_KEYS = {"DICT", "SETITEM", "SETITEMS"}  # every other part; all else may hash whatever it gets


def check_keys(file: IO[bytes], pickles: int = 1) -> None:
    """Read the operations of so many pickles, one after the other, without building what they describe.

    Raises:
        pickle.UnpicklingError: if what is hashed has more parts than there can be in an honest file.
        Exception: of any kind, if a pickle is damaged.
    """
    for _ in range(pickles):
        _Parts().follow(file)


class _Parts:
    """The number of parts of everything on a pickle's stack, with those inside of parts: lists of one number, as
    containers that are referred to again may still grow."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def follow(self, file: IO[bytes]) -> None:
        for done, (operation, argument, _) in enumerate(pickletools.genops(file)):
            parts = self._apply(operation, argument)
            if parts > _MOST + 10 * done:
                raise pickle.UnpicklingError("keys of tuples nested in each other without an end")

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
            self._push_plain(operation)
            return 0
        if name in _TO_MARK or name in _MAKE:
            stack.append([1 + sum(popped)])
        elif name != "POP_MARK":
            stack[-1][0] += sum(popped)
        return 0 if name in _HASH_NOTHING else sum(popped[1::2] if name in _HASH_KEYS else popped)

    def _push_plain(self, operation: pickletools.OpcodeInfo) -> None:
        """Follow an operation whose result has no parts."""
        if operation.name == "MARK":
            self.stack.append(_MARK)
        elif operation.name == "DUP":
            self.stack.append(self.stack[-1])
        else:
            self._pop(len(operation.stack_before))
            self.stack += [[1] for _ in operation.stack_after]

    def _pop(self, count: int) -> list[int]:
        """Take items off the stack, the last one first, and return their numbers of parts."""
        return [self.stack.pop()[0] for _ in range(count)]

    def _pop_to_mark(self) -> list[int]:
        popped = []
        while (part := self.stack.pop()) is not _MARK:
            popped.append(part[0])
        return popped
