"""A parser whose arguments may come from files: "@FILE" stands for all that FILE says."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from apt_dense.weights.files import write_text_whole

RECORD = "arguments.args"


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, with files of arguments, as configs/evidence has them for the tables of docs/EVIDENCE.md.

    A file has arguments as in a shell, on as many lines as wanted; lines that begin with "#" are comments, and nothing
    is expanded or run. It may include further files, whose paths are relative to its folder, which is what argparse's
    own ``fromfile_prefix_chars`` lacks. Options may be given again after the file: those that can be repeated, such as
    --row, add to its own, and of others the last value counts. No argument of another meaning can begin with "@".
    """

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        try:
            given = list(with_files(sys.argv[1:] if args is None else args))
        except (OSError, ValueError) as error:
            self.error(str(error))
        return super().parse_args(given, namespace)


def with_files(arguments: Sequence[str], folder: Path = Path(), including: tuple[Path, ...] = ()) -> Iterator[str]:
    """Yield the arguments, with those of its file in place of each "@FILE".

    Args:
        folder: that files are relative to.
        including: the files that these arguments come from, from the outermost.

    Raises:
        OSError, ValueError: for a file that cannot be read, has an open quote, or includes itself.
    """
    for argument in arguments:
        if not argument.startswith("@"):
            yield argument
            continue
        path = (folder / argument[1:]).resolve()
        if path in including:
            raise ValueError(f"{path} includes itself; remove {argument} from {including[-1]}")
        yield from with_files(arguments_in(path), path.parent, (*including, path))


def arguments_in(path: Path) -> list[str]:
    """Split the text of a file as a shell would. Raises OSError, ValueError."""
    try:
        without_comments = re.sub(r"(?m)^[ \t]*#.*$", "", path.read_text("utf-8"))
        return shlex.split(re.sub(r"\\\r?\n", " ", without_comments))
    except ValueError as error:  # of quotes, or of UTF-8
        raise ValueError(f"@{path}: {error}") from error


def command_line(tool: str, argv: Sequence[str] | None) -> str:
    """Return the command as it was given, to be named in what it writes."""
    return shlex.join(["python", f"tools/{tool}.py", *(sys.argv[1:] if argv is None else argv)])


def record_arguments(argv: Sequence[str] | None, folder: Path) -> None:
    """Write all arguments into a folder of results, since the files that they came from may change. Raises OSError."""
    lines: list[list[str]] = []
    for argument in with_files(sys.argv[1:] if argv is None else argv):
        if argument.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(argument)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_whole(folder / RECORD, "".join(f"{shlex.join(line)}\n" for line in lines))
