"""Rows of a table, as Markdown and as a file."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_dense.weights.files import write_text_whole


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Format rows in Markdown.

    Args:
        columns: key of a row -> how ``str.format`` writes it. Columns that no row has are left out, values that are
            None stay empty.
    """
    names = [name for name in columns if any(row.get(name) is not None for row in rows)]
    lines = [[name.replace("_", " ") for name in names], ["---"] * len(names)]
    for row in rows:
        cells = ["" if row.get(name) is None else columns[name].format(row[name]) for name in names]
        lines.append([cell.replace("|", "/") for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write all fields of all rows, whole or not at all."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_whole(path, text.getvalue())
