"""Types of options that are checked by range: argparse then ends in a line that names the option and its value."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from apt_dense import option_checks
from apt_dense.patches.scores import SCORERS

PIXELS = 65_535  # the longest side that a JPEG can have, and that OpenCV draws
SCORER_HELP = f"{', '.join(SCORERS)}, or a file of tools/fit_scorer.py (default: entropy)"  # of --scorer
SEEDS = 2**63 - 1  # the largest that torch takes


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type of whole numbers from ``least`` up to ``most``."""

    def convert(text: str) -> int:
        return _checked(option_checks.whole(least, most), int(text))

    convert.__name__ = "whole number"  # for argparse's message where it is none
    return convert


def number(**bounds: float) -> Callable[[str], float]:
    """A type of finite numbers inside bounds (``option_checks.number``)."""

    def convert(text: str) -> float:
        return _checked(option_checks.number(**bounds), float(text))

    convert.__name__ = "number"
    return convert


def share_or_count(text: str) -> float | int:
    """A share of all tokens, such as 0.6, or a number of them, such as 600."""
    value = float(text) if "." in text or "e" in text.lower() else int(text)
    return _checked(option_checks.share_or_count, value)


share_or_count.__name__ = "share or number"


def device(text: str) -> str:
    """The name of one of torch's devices that is there."""
    import torch

    try:
        torch.zeros(1, device=text).cpu()
    except Exception as error:  # of many kinds; "meta" holds nothing to copy
        said = " ".join(str(error).split())[:120]
        raise argparse.ArgumentTypeError(f"torch cannot use {text!r} here ({said}); expected cpu, cuda, ...") from None
    return text


def _checked(check: option_checks.Check, value: float) -> float:
    try:
        return check("", value)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("=")) from None
