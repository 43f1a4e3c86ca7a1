"""Arguments from files, and those of configs/evidence, which docs/EVIDENCE.md names."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import compare_by_training
import compare_scorers
import fit_scorer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evidence import measure_options
from shared.argument_files import RECORD, ArgumentParser, record_arguments, with_files

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs/evidence"
FILES = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.args"))
ADDED = {"camvid14_features", "raccoon_features", "raccoon16_features"}  # they need the weights of a training
OUTER = r"""# rows
--row "a: b='c'" \
    @inner/more.args

  # a comment \
--size 1 \
2#1
"""
CHECKS: dict[str, Callable[[list[str]], object]] = {
    "compare_by_training": lambda given: compare_by_training.check(compare_by_training.parse_args(given)),
    "compare_scorers": lambda given: compare_scorers.check(compare_scorers.parse_args(given)),
    "fit_scorer": lambda given: fit_scorer.check(fit_scorer.parse_args(given)),
    "measure_accuracy": lambda given: measure_options.check(measure_options.parse_args(given, None)),
}
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"])).filter(lambda text: not text.startswith("@"))
COMMAND = re.compile(r"^ {4}python tools/(\w+)\.py @configs/evidence/(\S+)(.*)$", re.MULTILINE)


def parser() -> ArgumentParser:
    made = ArgumentParser(prog="tool")
    made.add_argument("--row", action="append")
    made.add_argument("--size", nargs="+")
    return made


def test_a_file_stands_for_its_arguments_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "outer.args").write_text(OUTER)
    (tmp_path / "inner/more.args").write_text("@again.args --row x")
    (tmp_path / "inner/again.args").write_text("--row 'with \"quotes\"'\n")
    args = parser().parse_args([f"@{tmp_path}/outer.args", "--row", "last"])
    assert args == argparse.Namespace(row=["a: b='c'", 'with "quotes"', "x", "last"], size=["1", "2#1"])


@given(st.lists(TEXT))
def test_what_a_shell_quotes_comes_back(tmp_path_factory: pytest.TempPathFactory, arguments: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "quoted.args"
    path.write_text(shlex.join(arguments), "utf-8")
    assert list(with_files([f"@{path}"])) == arguments


@given(st.lists(TEXT))
def test_what_is_recorded_repeats_the_command(tmp_path_factory: pytest.TempPathFactory, arguments: list[str]) -> None:
    record_arguments(arguments, tmp_path_factory.getbasetemp())
    assert list(with_files([f"@{tmp_path_factory.getbasetemp() / RECORD}"])) == arguments


def test_one_file_twice_is_no_circle(tmp_path: Path) -> None:
    (tmp_path / "a.args").write_text("--row a")
    (tmp_path / "twice.args").write_text("@a.args @a.args")
    assert list(with_files([f"@{tmp_path}/twice.args"])) == ["--row", "a"] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("@self.args", "includes itself; remove @self.args from"),
        ("--row 'open", "No closing quotation"),
        ("@missing.args", "No such file"),
        (b"\xff", "can't decode"),
    ],
)
def test_faults_end_in_a_line_that_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | bytes, said: str
) -> None:
    (tmp_path / "self.args").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args([f"@{tmp_path}/self.args"])
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("tool: error: ") and said in line and ".args" in line


@pytest.mark.parametrize("path", [path for path in FILES if len(path.parts) == 2], ids=str)
def test_arguments_of_the_evidence_are_accepted_by_their_tool(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but whether the files that they name exist."""
    monkeypatch.chdir(ROOT)
    CHECKS[path.parts[0]]([f"@{FOLDER / path}", *(["--weights", "trained.pth"] if path.stem in ADDED else [])])


def test_the_page_of_evidence_and_its_files_name_each_other() -> None:
    named = COMMAND.findall((ROOT / "docs/EVIDENCE.md").read_text("utf-8"))
    assert all(Path(path).parts[0] == tool for tool, path, _ in named)
    assert {Path(path).stem for _, path, more in named if more} == ADDED
    assert {Path(path) for _, path, _ in named} == {path for path in FILES if len(path.parts) == 2}
    assert all(
        any(f"@../{path}" in (FOLDER / other).read_text() for other in FILES) for path in FILES if len(path.parts) == 1
    )
