"""Run tools/convert_annotations.py and read what it wrote or said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("cv2", reason="the tools find photographs by OpenCV's suffixes")

import convert_annotations

from support.annotation_files import objects_of


def convert(*argv: object) -> None:
    convert_annotations.main([str(arg) for arg in argv])


def failure(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """All that a run prints that must end without writing anything."""
    with pytest.raises(SystemExit) as ended:
        convert(*argv)
    message = str(ended.value.code)
    assert message.startswith("convert_annotations: ") and "\n" not in message
    return capsys.readouterr().err + message


def content(root: Path, split: str) -> dict:
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def boxes(root: Path, split: str) -> dict[str, list]:
    """Names of pictures -> (class, box) of their objects."""
    read = content(root, split)
    names = {entry["id"]: entry["name"] for entry in read["categories"]}
    found = {entry["file_name"]: [] for entry in read["images"]}
    files = {entry["id"]: entry["file_name"] for entry in read["images"]}
    for entry in read["annotations"]:
        found[files[entry["image_id"]]].append((names[entry["category_id"]], tuple(entry["bbox"])))
    return found


def expected(folder: str, numbers: range) -> dict[str, list]:
    return {f"{folder}/{number}.png": objects_of(number) for number in numbers}
