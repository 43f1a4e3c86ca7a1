"""Data sets of which nothing, or nothing of a class, can be learned or scored are refused, with the reasons."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from apt_dense.hosts.coco import load_split

from support.coco_folder import SIZE, write_coco


def of(category: int | None, **fields: object) -> Callable[[dict], None]:
    """Set fields of all annotations of a category, or of all."""
    return lambda c: [a.update(fields) for a in c["annotations"] if category in (None, a["category_id"])]


def drop(category: int | None) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        content["annotations"] = [a for a in content["annotations"] if category not in (None, a["category_id"])]

    return change


USELESS = [
    (dict(image_id=5), "of images that are not listed"),
    (dict(image_id="5"), "of images that are not listed"),
    (dict(bbox=[0, 0, 0, 0]), "with an empty box"),
    (dict(bbox=[5, 5, -9, -9]), "with an empty box"),
    (dict(bbox=[500, 500, 9, 9]), "with a box outside of the image"),
    (dict(segmentation=[[]]), "with an outline of less than three points"),
    (dict(segmentation=[[505, 506, 535, 506, 535, 546]]), "with an outline outside of the image"),
    (dict(segmentation={"size": list(SIZE), "counts": [SIZE[0] * SIZE[1]]}), "with a mask of no pixel"),
    (dict(iscrowd=1), r"crowds \(iscrowd=1\)"),
]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("fields", "reason"), USELESS, ids=str)
def test_nothing_left_says_why(tmp_path: Path, fields: dict, reason: str, split: str) -> None:
    root = write_coco(tmp_path, change=of(None, **fields))
    for every_class in (True, False):
        with pytest.raises(
            ValueError, match=rf"instances_{split}2017.json has .*0 of 4 annotations.*\(not: 4 {reason}"
        ):
            load_split(root, split, every_class=every_class)


def test_no_annotation_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no objects; .*: 0 of 0 annotations can be used"):
        load_split(write_coco(tmp_path, change=drop(None)), "val")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("change", "count"), [(drop(90), "0 of 0"), *((of(90, **fields), "0 of 2") for fields, _ in USELESS)]
)
def test_a_class_without_objects_is_named(
    tmp_path: Path, change: Callable, count: str, split: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_coco(tmp_path, change=change)
    with pytest.raises(ValueError, match=rf"has none of 1 class: green \({count}\); .*add --allow-empty-classes"):
        load_split(root, split)
    load_split(root, split, every_class=False)
    assert "has none of 1 class: green" in caplog.text


def test_objects_that_remain_are_counted_by_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_coco(tmp_path, 3, lambda c: c["annotations"][0].update(bbox=[1, 1, 0, 0]))
    with caplog.at_level(logging.INFO):
        load_split(root, "train")
    assert "5 of 6 objects can be used (not: 1 with an empty box); by class: red 2 of 3, green 3 of 3" in caplog.text
