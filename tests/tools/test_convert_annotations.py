"""tools/convert_annotations.py: annotations become COCO's JSON, and nothing is lost without a word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from apt_dense.hosts.coco import load_split

from support.annotation_files import NAMES, draw, write_voc, write_yolo
from support.conversions import boxes, content, convert, expected, failure


@pytest.mark.parametrize(("kind", "write"), [("voc", write_voc), ("yolo", write_yolo)])
def test_a_share_for_validation_and_the_reader_of_the_trainers(
    kind: str, write: object, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = write(tmp_path / "data", 5)
    names = tmp_path / "names.txt"
    names.write_text("raccoon\ncat\n")
    convert(kind, root, "--val-share", "0.2", "--classes", names)
    found = boxes(root, "train") | boxes(root, "val")
    assert found == expected("images" if kind == "yolo" else "JPEGImages", range(5))
    assert len(boxes(root, "val")) == 1
    data = load_split(root, "train", masks=False, every_class=False)
    assert data.folder == root and not data.is_changed
    assert [name for _, name in data.categories] == list(NAMES)
    assert "4 pictures (0 without objects)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_boxes_can_be_outlines_for_mask_rcnn(kind: str, tmp_path: Path) -> None:
    root = (write_voc if kind == "voc" else write_yolo)(tmp_path / "data", 4)
    names = tmp_path / "names.txt"
    names.write_text("raccoon\ncat\n")
    convert(kind, root, "--val-share", "0.5", "--box-outlines", "--classes", names)
    data = load_split(root, "train", masks=True, every_class=False)
    entry = data.content["annotations"][0]
    x, y, w, h = entry["bbox"]
    assert entry["segmentation"] == [[x, y, x + w, y, x + w, y + h, x, y + h]] and entry["area"] == w * h


def test_files_that_exist_stay_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_voc(tmp_path / "data")
    convert("voc", root, "--val-share", "0.5")
    before = content(root, "train")
    assert "exist already; add --force" in failure(capsys, "voc", root, "--val-share", "0.25")
    assert content(root, "train") == before
    convert("voc", root, "--val-share", "0.25", "--force")
    assert len(content(root, "train")["images"]) == 3


def test_another_folder_for_the_files(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "data")
    convert("voc", root, "--val-share", "0.5", "--out", tmp_path / "out")
    assert not (root / "annotations").exists()
    assert load_split(tmp_path / "out", "val", masks=False, every_class=False).folder == tmp_path / "out"


@pytest.mark.parametrize(("share", "message"), [("0", "above 0 and below 1"), ("1", "above 0 and below 1")])
def test_shares_out_of_range(share: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert message in failure(capsys, "voc", write_voc(tmp_path / "data"), "--val-share", share)


def test_without_splits_the_option_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "add --val-share 0.2" in failure(capsys, "voc", write_voc(tmp_path / "data"))
    assert "nowhere does not exist" in failure(capsys, "voc", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "there is no XML file below" in failure(capsys, "voc", tmp_path / "empty")


def test_a_split_without_objects_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = write_yolo(write_yolo(tmp_path, 2, "images/train", "labels/train"), 1, "images/val", "labels/val")
    (root / "labels" / "val" / "0.txt").write_text("")
    (root / "data.yaml").write_text("names: [raccoon, cat]\ntrain: images/train\nval: images/val\n")
    assert "instances_val.json has no objects" in failure(capsys, "yolo", root)
    assert not (root / "annotations").exists()


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_pictures_without_labels(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = (write_voc if kind == "voc" else write_yolo)(tmp_path / "data")
    draw(root / ("JPEGImages" if kind == "voc" else "images") / "9.png", [])
    (tmp_path / "names.txt").write_text("raccoon\ncat\n")
    argv = [kind, root, "--val-share", "0.5", "--force", "--classes", tmp_path / "names.txt"]
    message = failure(capsys, *argv)
    assert "9.png: it has no" in message and "--unlabelled background" in message
    convert(*argv, "--unlabelled", "background")
    assert sum(len(content(root, split)["images"]) for split in ("train", "val")) == 5
    assert "1 times: picture without" in capsys.readouterr().err
    convert(*argv, "--unlabelled", "skip")
    assert sum(len(content(root, split)["images"]) for split in ("train", "val")) == 4
    assert "left out; the first: " in capsys.readouterr().err


def test_a_full_disk_leaves_no_part_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = write_voc(tmp_path / "data")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "cannot be written: No space left on device" in failure(capsys, "voc", root, "--val-share", "0.5")
    assert list((root / "annotations").iterdir()) == []
