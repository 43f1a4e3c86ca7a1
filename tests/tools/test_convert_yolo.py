"""tools/convert_annotations.py yolo: text files and data.yaml in all their forms, and what can be wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.annotation_files import NAMES, draw, write_yolo, yolo_polygon
from support.conversions import boxes, content, convert, expected, failure


def yaml(root: Path, text: str) -> Path:
    (root / "data.yaml").write_text(text)
    return root / "data.yaml"


@pytest.mark.parametrize(
    ("train", "val"),
    [("images/train", "images/val"), ("../images/train", "../images/val"), ("[images/train]", "./images/val")],
)
@pytest.mark.parametrize("names", ["[raccoon, cat]", "{0: raccoon, 1: cat}", "{'1': cat, '0': raccoon}"])
def test_yolo_splits_and_names(train: str, val: str, names: str, tmp_path: Path) -> None:
    write_yolo(write_yolo(tmp_path, 3, "images/train", "labels/train"), 2, "images/val", "labels/val", start=3)
    description = yaml(tmp_path, f"names: {names}\ntrain: {train}\nval: {val}\nnc: 2\n")
    convert("yolo", description)
    assert boxes(tmp_path, "train") == expected("images/train", range(3))
    assert boxes(tmp_path, "val") == expected("images/val", range(3, 5))
    assert [entry["name"] for entry in content(tmp_path, "train")["categories"]] == list(NAMES)


def test_folders_of_splits_that_hold_images_and_labels(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_yolo(tmp_path, 2, f"{split}/images", f"{split}/labels")
    yaml(tmp_path, "names: [raccoon, cat]\ntrain: ../train/images\nval: ../valid/images\ntest: null\n")
    convert("yolo", tmp_path)
    assert boxes(tmp_path, "val") == expected("valid/images", range(2))


def test_lists_of_pictures_below_a_path(tmp_path: Path) -> None:
    write_yolo(tmp_path / "set", 3)
    (tmp_path / "set" / "train.txt").write_text("./images/0.png\nimages/2.png\n")
    (tmp_path / "set" / "val.txt").write_text(f"{tmp_path / 'set' / 'images' / '1.png'}\n")
    yaml(tmp_path, "path: set\nnames: [raccoon, cat]\ntrain: train.txt\nval: val.txt\n")
    convert("yolo", tmp_path)
    assert list(boxes(tmp_path, "train")) == ["set/images/0.png", "set/images/2.png"]
    assert list(boxes(tmp_path, "val")) == ["set/images/1.png"]
    (tmp_path / "set" / "val.txt").write_text("images/7.png\n")
    with pytest.raises(SystemExit, match=r"lists images/7.png, but there is no picture"):
        convert("yolo", tmp_path)


def test_one_split_can_be_divided(tmp_path: Path) -> None:
    write_yolo(tmp_path, 4, "images/train2017", "labels/train2017")
    yaml(tmp_path, "names: [raccoon, cat]\ntrain: images/train2017\n")
    convert("yolo", tmp_path, "--val-share", "0.25")
    assert len(boxes(tmp_path, "train")) == 3 and len(boxes(tmp_path, "val")) == 1


def test_polygons_stay_exact(tmp_path: Path) -> None:
    root = write_yolo(tmp_path, 3)
    points = [(10.25, 10.5), (50.5, 12.0), (30.0, 60.75)]
    (root / "labels" / "0.txt").write_text(yolo_polygon("cat", points) + "\n")
    yaml(root, "names: [raccoon, cat]\ntrain: images\nval: images\n")
    convert("yolo", root)
    entry = content(root, "train")["annotations"][0]
    assert entry["segmentation"] == [[10.25, 10.5, 50.5, 12, 30, 60.75]]
    assert entry["bbox"] == [10.25, 10.5, 40.25, 50.25] and entry["area"] == pytest.approx(996.469, abs=1e-3)


CORRUPT_YOLO = {
    "a class too many": ("2 0.5 0.5 0.1 0.1", "line 2: class 2; the classes are 0 to 1"),
    "half a class": ("0.5 0.5 0.5 0.1 0.1", "class 0.5"),
    "four values": ("0 0.5 0.5 0.1", "has 4 values; expected CLASS X Y WIDTH HEIGHT"),
    "six values": ("0 0.5 0.5 0.1 0.1 0.9", "has 6 values"),
    "half a point": ("0 0.1 0.1 0.2 0.2 0.1 0.2 0.3", "has 8 values"),
    "text": ("cat 0.5 0.5 0.1 0.1", "expected CLASS X Y WIDTH HEIGHT"),
    "not finite": ("0 nan 0.5 0.1 0.1", "expected CLASS X Y WIDTH HEIGHT"),
    "pixels": ("0 50 40 10 10", "has values outside of 0 to 1; expected shares"),
    "empty box": ("0 0.5 0.5 0 0.1", "an empty box, 0 x 8 pixels"),
    "a line for a polygon": ("0 0.1 0.1 0.2 0.2 0.3 0.3", "or without an area"),
    "not text": (b"\xff\xfe\x00", "it is not text"),
}


@pytest.mark.parametrize("kind", CORRUPT_YOLO)
def test_corrupt_lines_are_named_and_can_be_left_out(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_yolo(tmp_path)
    yaml(root, "names: [raccoon, cat]\ntrain: images\nval: images\n")
    line, message = CORRUPT_YOLO[kind]
    path = root / "labels" / "0.txt"
    path.write_bytes(line if isinstance(line, bytes) else path.read_bytes() + line.encode() + b"\n")
    printed = failure(capsys, "yolo", root)
    assert message in printed and str(path) in printed and not (root / "annotations").exists()
    convert("yolo", root, "--leave-out-corrupt")
    assert "left out: " in capsys.readouterr().err
    found = boxes(root, "train")
    if isinstance(line, str):
        assert found == expected("images", range(4))
    else:
        assert found == expected("images", range(1, 4)), "its picture is not one without objects"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a, b", "is not YAML"),
        ("- 1", "holds list; expected names, train and val"),
        ("names: [a, a]\ntrain: images", "expected a list, or numbers from 0"),
        ("names: {0: a, 2: b}\ntrain: images", "expected a list, or numbers from 0"),
        ("train: images", "has names: None"),
        ("names: [a]", "names neither train nor val"),
        ("names: [a]\ntrain: nowhere", "names nowhere, but there is neither"),
        ("names: [a]\nkpt_shape: [17, 3]\ntrain: images", "describes key points"),
    ],
)
def test_descriptions_that_cannot_be_used(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    yaml(write_yolo(tmp_path), text)
    assert message in failure(capsys, "yolo", tmp_path)


def test_without_names_the_option_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "give --classes FILE" in failure(capsys, "yolo", write_yolo(tmp_path))


def test_many_problems_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_yolo(tmp_path, 1)
    (root / "labels" / "0.txt").write_text("9 0.5 0.5 0.1 0.1\n" * 50)
    yaml(root, "names: [raccoon, cat]\ntrain: images\nval: images\n")
    printed = failure(capsys, "yolo", root)
    assert "100 entries cannot be converted, see above, of which 20 are shown" in printed
    assert len(printed.splitlines()) == 21


def test_labels_that_two_pictures_share(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """1.png and 1.jpg: both would get the objects of one."""
    root = write_yolo(tmp_path / "data", 3)
    draw(root / "images" / "1.jpg", [])
    options = ("--classes", tmp_path / "names.txt", "--val-share", "0.5")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    assert "1.png: " in (found := failure(capsys, "yolo", root, *options)) and "has the labels of 1.jpg, too" in found
    (root / "images" / "1.jpg").unlink()
    convert("yolo", root, *options)
