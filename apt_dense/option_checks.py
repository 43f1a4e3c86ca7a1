"""How options are declared, grouped and checked.

A check returns the value in its canonical type, or raises an error with the option's name, its value and what is
expected. NumPy's numbers are numbers; truth values are not.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

Check = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Options:
    """Base of a group of options that checks itself. Fields are made by :func:`option`."""

    def __post_init__(self) -> None:
        for item in fields(self):
            check, label = item.metadata["check"], item.metadata["label"] or item.name
            if check is not None:
                self._set(**{item.name: check(label, getattr(self, item.name))})
        self._check_together()

    def _check_together(self) -> None:
        """Check what concerns several fields."""

    def given(self) -> dict[str, Any]:
        """The options as keyword arguments."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def _set(self, **values: Any) -> None:
        """Replace values by canonical ones while the options are being made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def option(default: Any, check: Check | None = None, label: str | None = None, brings: str | None = None) -> Any:
    """A field of a group of options.

    Args:
        check: brings a value to its canonical form, or raises.
        label: the option's name in messages, if not the field's own.
        brings: names of the parameters that exist only with this option, in a model's state dict. "#" stands for the
            number of a block, "[..]" for one of several characters; names that end in "." go on with weight or bias.
    """
    return field(default=default, metadata={"check": check, "label": label, "brings": brings})


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be True or False")
    return value


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r} must be a name")
    return value


def function(name: str, value: object) -> Callable:
    if not callable(value):
        raise TypeError(f"{name}={value!r} must be a function")
    return value


def name_or_callable(name: str, value: object) -> str | Callable:
    return value if callable(value) else text(name, value)


def whole(least: int, most: int | None = None) -> Check:
    """A check for whole numbers from ``least`` up, to ``most``."""

    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}={value!r} must be a whole number")
        if value < least:
            raise ValueError(f"{name}={value} must be {least} or more")
        if most is not None and value > most:
            raise ValueError(f"{name}={value} must be {most} or less")
        return int(value)

    return check


def number(least: float | None = None, above: float | None = None, below: float | None = None) -> Check:
    """A check for finite numbers inside bounds: ``least`` included, ``above`` and ``below`` excluded."""
    bounds = [f"{least:g} or more" if least is not None else "", f"above {above:g}" if above is not None else ""]
    bounds = " and ".join(filter(None, [*bounds, f"below {below:g}" if below is not None else ""]))

    def check(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}={value!r} must be a number")
        inside = math.isfinite(value) and (least is None or value >= least)
        if not inside or (above is not None and value <= above) or (below is not None and value >= below):
            raise ValueError(f"{name}={value} must be a finite number{f', {bounds}' if bounds else ''}")
        return value

    return check


finite = number()


def share(name: str, value: object) -> float:
    """Check for a number from 0 to 1, both included."""
    if number(least=0)(name, value) > 1:
        raise ValueError(f"{name}={value} must be from 0 to 1")
    return value


def choice(*names: str) -> Check:
    """A check for one of several names."""

    def check(name: str, value: object) -> str:
        if value not in names:
            raise ValueError(f"{name}={value!r} must be one of {names}")
        return value

    return check


def instance(kind: type) -> Check:
    """A check for objects of a type."""

    def check(name: str, value: object) -> Any:
        if not isinstance(value, kind):
            raise TypeError(f"{name}={value!r} must be {kind.__name__}")
        return value

    return check


def optional(check: Check) -> Check:
    """The check, for values other than None."""
    return lambda name, value: None if value is None else check(name, value)


def pair(name: str, value: object) -> tuple[int, int]:
    """One whole number from 1 for both sides, or two (H, W)."""
    sides = (value, value) if isinstance(value, Real) else _several(name, value, "one or two whole numbers")
    if len(sides) != 2:
        raise ValueError(f"{name}={value!r} must be one number or two (H, W)")
    return tuple(whole(1)(name, side) for side in sides)


def triple(check: Check) -> Check:
    """A check for three numbers, each of which passes ``check``: one per image channel."""

    def check_all(name: str, value: object) -> tuple[float, float, float]:
        values = _several(name, value, "three numbers")
        if len(values) != 3:
            raise ValueError(f"{name}={value!r} must be three numbers, one per channel")
        return tuple(float(check(name, each)) for each in values)

    return check_all


def each(check: Check) -> Check:
    """A check for any number of values, each of which passes ``check``."""
    return lambda name, value: tuple(check(name, one) for one in _several(name, value, "a sequence"))


def indexes(name: str, value: object, negative: bool = False) -> tuple[int, ...]:
    """Numbers of blocks, from 0 up unless ``negative`` ones count from the end."""
    check = whole(-(2**31) if negative else 0)
    return tuple(check(name, each) for each in _several(name, value, "a sequence of block numbers"))


def check_blocks(name: str, indexes: tuple[int, ...], depth: int) -> None:
    """Raise on numbers of blocks that there are not."""
    bad = [i for i in indexes if i >= depth]
    if bad:
        raise ValueError(f"{name}={indexes} names blocks {bad}; there are blocks 0 to {depth - 1}")


def resolve_out_indices(out_indices: object, depth: int) -> tuple[int, ...]:
    """The blocks with an output, counted from 0; None for the last one."""
    given = -1 if out_indices is None else out_indices
    given = indexes("out_indices", given if isinstance(given, Sequence) else (given,), negative=True)
    resolved = tuple(i + depth if i < 0 else i for i in given)
    if not resolved or list(resolved) != sorted(set(resolved)) or not 0 <= resolved[0] <= resolved[-1] < depth:
        raise ValueError(f"out_indices={given} must be ascending block numbers from 0 to {depth - 1}, at least one")
    return resolved


def thresholds(name: str, value: object) -> tuple[float, ...]:
    """One number per scale from 1 up, none greater than the one before."""
    if isinstance(value, (str, bytes, Real)) or not isinstance(value, Sequence):
        raise TypeError(
            f"{name}={value!r} must be a sequence with one number per scale from 1 up, such as (5.5, 4.0); "
            f"() is the plain ViT"
        )
    for each in value:
        if isinstance(each, bool) or not isinstance(each, Real) or math.isnan(each):
            raise TypeError(f"{name}={tuple(value)!r}: {each!r} is not a number")
    if any(coarse > fine for fine, coarse in pairwise(value)):
        raise ValueError(
            f"{name}={tuple(value)!r} rise with the scale, so a large patch would count as flat while its quarters do "
            f"not; give them from scale 1 (smallest) up, none greater than the one before"
        )
    return tuple(float(each) for each in value)


def share_or_count(name: str, value: object) -> float | int | None:
    """A share of the tokens, their number, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} must be a fraction (float) or tokens per image (int)")
    if not (0 < value <= 1 if isinstance(value, float) else value >= 1):
        raise ValueError(f"{name}={value!r} must be a fraction in (0, 1] or at least 1 token (an int)")
    return value


def _several(name: str, value: object, expected: str) -> Sequence:
    """The elements of any iterable but text."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}={value!r} must be {expected}")
    return tuple(value)


# ---- groups as one set of keyword arguments


def parameters_of(*groups: type[Options]) -> dict[str, str]:
    """Regular expressions of the names of parameters, for every option that brings some."""
    found = {item.name: item.metadata["brings"] for group in groups for item in fields(group)}
    return {name: _pattern(brings) for name, brings in found.items() if brings}


def _pattern(brings: str) -> str:
    layer = r"\.(weight|bias)" if brings.endswith(".") else ""
    return brings.removesuffix(".").replace(".", r"\.").replace("#", r"\d+") + layer + "$"


def names_of(*groups: type[Options]) -> list[str]:
    return [item.name for group in groups for item in fields(group)]


def defaults_of(*groups: type[Options]) -> dict[str, Any]:
    """The default of every option of these groups."""
    return {item.name: item.default for group in groups for item in fields(group)}


def split(options: Mapping[str, Any], *groups: type[Options]) -> list[Any]:
    """Sort flat keyword arguments into groups: one instance of each.

    Raises:
        TypeError: for a name that no group has.
        ValueError, TypeError: for values out of range, naming option, value and remedy.
    """
    known = names_of(*groups)
    for name in options:
        if name not in known:
            alike = difflib.get_close_matches(name, known, 1)
            raise TypeError(f"there is no option {name!r}{f'; did you mean {alike[0]!r}?' if alike else ''}")
    return [group(**{name: options[name] for name in names_of(group) if name in options}) for group in groups]


def documented(*groups: type[Options]) -> Callable[[Callable], Callable]:
    """Decorate a constructor that takes these groups as ``**options``: its signature then lists each option."""

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [
            inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=item.type)
            for group in groups
            for item in fields(group)
            if item.name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=own + added)
        return function

    return decorate
