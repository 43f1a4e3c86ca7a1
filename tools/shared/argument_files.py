"""A parser whose arguments may come from files: "@FILE" stands for all that FILE says."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with files of arguments, as configs/evidence has them for the tables of docs/EVIDENCE.md.

    A file has arguments as in a shell, on as many lines as wanted, and comments after "#"; nothing in it is expanded
    or run. It may take further files, whose paths are relative to its folder. Of an option that is given again, the
    last value counts.
    """

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        try:
            given = list(with_files(sys.argv[1:] if args is None else args))
        except (OSError, ValueError) as error:
            self.error(str(error))
        return super().parse_args(given, namespace)


def with_files(arguments: Sequence[str], folder: Path = Path(), inside: tuple[Path, ...] = ()) -> Iterator[str]:
    """Yield the arguments, with those of its file in place of each "@FILE". Raises OSError, ValueError."""
    for argument in arguments:
        if not argument.startswith("@"):
            yield argument
            continue
        path = (folder / argument[1:]).resolve()
        if path in inside:
            raise ValueError(f"{argument}: the file takes its own arguments, through {len(inside)} file(s)")
        yield from with_files(arguments_in(path), path.parent, (*inside, path))


def arguments_in(path: Path) -> list[str]:
    """Split the text of a file as a shell would. Raises OSError, ValueError."""
    try:
        return shlex.split(path.read_text("utf-8"), comments=True)
    except ValueError as error:  # of quotes, or of UTF-8
        raise ValueError(f"@{path}: {error}") from error
