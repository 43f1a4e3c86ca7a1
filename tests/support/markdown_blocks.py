"""The code blocks of a page in Markdown, and how a reader uses each: paste it into a shell, Python or a file.

And its tables.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"```(\w*)")
#: The first line of a block that is the content of a file: "# own.py", "# data/x/classes.txt: what it is".
_FILE = re.compile(r"# ([\w./-]+\.(?:py|txt))(?::.*)?")


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line of the page that it starts on."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file that the reader saves it as, if any."""
        named = _FILE.fullmatch(self.text.splitlines()[0])
        return named[1] if named else None


def sections_of(page: Path, level: int) -> dict[str, list[Block]]:
    """The blocks of a page below each heading down to a level: 2 for ##, 3 for ###."""
    title = re.compile(rf"#{{2,{level}}} (.+)")
    sections: dict[str, list[Block]] = {}
    heading, fence, language = "", 0, ""
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        mark = _FENCE.fullmatch(line)
        if fence and line == "```":
            sections.setdefault(heading, []).append(Block(language, "\n".join(lines[fence : number - 1]) + "\n", fence))
            fence = 0
        elif mark and not fence:
            fence, language = number, mark[1]
        elif not fence and (found := title.fullmatch(line)):
            heading = found[1]
    return sections


def run_block(block: Block, folder: Path) -> str:
    """Do with a block what a reader does, in ``folder``, as it stands. Returns what was printed; fails with it."""
    if block.file:
        (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
        (folder / block.file).write_text(block.text, encoding="utf-8")
        return ""
    if block.language == "text":
        return ""
    run = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[block.language]
    done = subprocess.run([*run, block.text], cwd=folder, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, f"line {block.line}: {block.text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def environment(folder: Path) -> dict[str, str]:
    """What ``pip install -e .`` and an active environment give: the package, and ``python``."""
    python = folder / "bin" / "python"
    if not python.exists():
        python.parent.mkdir(exist_ok=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"PYTHONWARNINGS": "ignore", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **quiet}


def repository(folder: Path) -> Path:
    """A folder in which this repository's files are, and into which blocks may write."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tools", "configs", "apt_dense"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def rows_by_name(path: Path) -> dict[str, dict[str, str]]:
    """The table in a Markdown file: the first cell of a row -> heading -> cell."""
    rows = [line.split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    head, *lines = ([cell.strip("| ") for cell in row] for row in rows if "---" not in row[0])
    return {line[0]: dict(zip(head, line, strict=True)) for line in lines}
