"""Configs that MMEngine dumped, read without being run: the same values, and no code."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("mmengine", reason="reads what MMEngine writes")

from mmengine.config import Config

from apt_dense.hosts.mmseg.read_dumped_config import read_dumped_config

#: Every sixth: MMEngine takes a second to format each.
CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "mmseg").glob("*.py"))[::6]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_read_as_mmengine_reads_its_dump(path: Path) -> None:
    cfg = Config.fromfile(path)
    assert Config(read_dumped_config(cfg.pretty_text, "dump")).to_dict() == cfg.to_dict()


def test_values_of_all_kinds() -> None:
    text = "a = dict(b=[1, -2.5, True, None], c=('x' 'y',), d={'k k': 1e-3, 2: {3}})\ne = inf\nf = -inf\n"
    assert read_dumped_config(text, "text") == {
        "a": {"b": [1, -2.5, True, None], "c": ("xy",), "d": {"k k": 1e-3, 2: {3}}}, "e": math.inf, "f": -math.inf,
    }  # fmt: skip


MARKER = "ran_by_a_config"
PROGRAMS = {
    "call": "a = __import__('os').mkdir('{0}')",
    "import": "import os\nos.mkdir('{0}')",
    "expression": "__import__('os').mkdir('{0}')",
    "in dict": "a = dict(b=[open('{0}', 'w')])",
    "unpacked": "a = dict(**__import__('os').environ)",
    "comprehension": "a = [open('{0}', 'w') for _ in (1,)]",
    "lambda": "a = (lambda: open('{0}', 'w'))()",
    "f-string": "a = f\"{{open('{0}', 'w')}}\"",
    "attribute": "a = dict.__class__",
    "name": "a = b",
    "own dict": "dict = open\na = dict(file='{0}', mode='w')",
    "function": "def dict(**k):\n    open('{0}', 'w')\na = dict(b=1)",
    "decorator": "@open\nclass a: pass",
    "walrus": "a = (b := 1)",
    "operator": "a = 10 ** 10 ** 10",
    "key": "a = {{[]: 1}}",
    "deep": "a = " + "[" * 5000 + "]" * 5000,
    "not python": "a = dict(",
    "null": "a = '\0'",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_refused_and_not_run(name: str, tmp_path: Path) -> None:
    text = PROGRAMS[name].format(tmp_path / MARKER)
    if name == "own dict":  # it names a variable, and the call stays that of a dictionary
        read_dumped_config(text.replace("dict = open\n", ""), "text")
    with pytest.raises(ValueError, match=r"^text.*(is code, which is not run|is not a config that a run dumped)"):
        read_dumped_config(text, "text")
    assert not (tmp_path / MARKER).exists()
