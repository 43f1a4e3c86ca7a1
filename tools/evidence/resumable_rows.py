"""Rows of a table that survive interruption: one line of JSON for each, written as soon as it is known."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt_dense.weights.files import write_text_whole


class KeptRows:
    """The rows in a file, found again by what they were made with.

    Args:
        path: a file of JSON lines, each {"settings": {...}, "results": {...}}. It is written whole with each row.

    Raises:
        ValueError: if there is a file that holds anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, dict] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), start=1):
            try:
                row = json.loads(line)
                self._rows[_key(row["settings"])] = {**row["settings"], **row["results"]}
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}, is not a row of this tool; move the file away") from None

    def get(self, settings: Mapping[str, Any]) -> dict | None:
        """Settings and results of the row that was made with just these settings."""
        return self._rows.get(_key(settings))

    def add(self, settings: Mapping[str, Any], results: Mapping[str, Any]) -> dict:
        """Keep a row, and return it as :meth:`get` will."""
        lines = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        line = json.dumps({"settings": dict(settings), "results": dict(results)})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text_whole(self.path, f"{lines}{line}\n")
        self._rows[_key(settings)] = row = {**json.loads(json.dumps(dict(settings))), **results}
        return row


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), sort_keys=True)
