"""The classes of a run: written next to its checkpoints, found in the catalogue or an annotation file, or numbered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed (it is built from source, see its INSTALL page)")

from apt_dense.hosts.detectron2.class_names_of_run import FILE, known_classes, read_classes, write_classes
from apt_dense.hosts.detectron2.coco_data import use_data_root

from support.tiny_coco import tiny_config, write_coco

EXPECTED = [(3, "red"), (7, "green"), (20, "blue")]


def test_classes_are_written_and_read(tmp_path: Path) -> None:
    cfg = tiny_config()
    use_data_root(cfg, str(write_coco(tmp_path / "coco", images=2)), ["train", "val"])
    (tmp_path / "run").mkdir()
    write_classes(cfg, tmp_path / "run")
    assert json.loads((tmp_path / "run" / FILE).read_text()) == [list(pair) for pair in EXPECTED]
    assert read_classes(tmp_path / "run", [], 3) == EXPECTED
    numbered = read_classes(tmp_path / "run", [], 2)
    assert numbered == [(1, "class 0"), (2, "class 1")], "they belong to another model"


def test_classes_are_found_where_no_run_wrote_them(tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "coco", images=2) / "annotations" / "instances_val2017.json"
    assert read_classes(tmp_path, [None, str(annotations)], 3) == EXPECTED
    assert known_classes(["nobody registered this"]) is None
    coco = known_classes(["coco_2017_val"])
    assert len(coco) == 80 and coco[0] == (1, "person") and coco[-1] == (90, "toothbrush")
    for damaged in ("", "{", '[["a"]]', "3"):
        (tmp_path / FILE).write_text(damaged)
        assert read_classes(tmp_path, [], 1) == [(1, "class 0")]
