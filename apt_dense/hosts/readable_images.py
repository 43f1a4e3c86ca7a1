"""Pictures that cannot be read, or only in part: one line that names the file, for all hosts.

Decoders of JPEG fill with grey what lies below the end of a file that is cut off, and most say nothing.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

_START, _END = b"\xff\xd8", b"\xff\xd9"
_MARK = re.compile(rb"\xff+([\x02-\xcf\xd9-\xfe])")  # those that are followed by a length, and the end
REMEDY = "replace it, or take it out of the data"


class DataError(ValueError):
    """A file of a data set cannot be used. Tools report it in one line (``line_of``)."""


def line_of(error: Exception) -> str:
    """The message of a DataError, which comes out of a worker inside of a traceback."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1].rpartition(f"{DataError.__name__}: ")[2]


def is_cut_off(data: bytes) -> bool:
    """Tell whether a picture is a JPEG without an end mark. Anything may follow that mark, such as a phone's film."""
    if not data.startswith(_START) or data.endswith(_END):
        return False
    place = len(_START)
    while (mark := _MARK.search(data, place)) is not None:  # scans hold none: there, zeros follow each 0xff
        if mark[1] == _END[1:]:
            return False
        place = mark.end() + int.from_bytes(data[mark.end() : mark.end() + 2], "big")
    return True


def is_file_cut_off(path: str | Path) -> bool:
    """Tell of a file what :func:`is_cut_off` tells of its content; of nearly all files, four bytes are read.

    Raises:
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(2) != _START or file.seek(0, os.SEEK_END) < 4:
            return False
        file.seek(-2, os.SEEK_END)
        if file.read() == _END:
            return False
        file.seek(0)
        return is_cut_off(file.read())


def check_whole(path: str | Path) -> None:
    """Raise DataError if a file is a JPEG that is cut off, and OSError if it cannot be read."""
    if is_file_cut_off(path):
        raise DataError(f"{path} is a JPEG file that is cut off; {REMEDY}")


def check_all_whole(paths: Iterable[str | Path], of: int) -> None:
    """Check pictures before a run.

    Args:
        paths: of those that are looked at.
        of: the number of pictures of the data set.

    Raises:
        DataError: with the number of JPEG files that are cut off, and the name of the first.
    """
    looked_at, found = 0, []
    for path in paths:
        looked_at += 1
        if os.path.isfile(path) and is_file_cut_off(path):
            found.append(path)
    if found:
        sample = "" if looked_at == of else f" (a sample of {of})"
        raise DataError(
            f"{len(found)} of {looked_at} images{sample} are JPEG files that are cut off, which would be read as grey "
            f"below the break; the first is {found[0]}: {REMEDY}"
        )
