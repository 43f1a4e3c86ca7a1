"""tools/convert_annotations.py voc: XML files in all their layouts, and what can be wrong with them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from annotation_formats.pascal_voc_xml import VocOptions
from support.annotation_files import SIZE, voc_file, voc_object, write_voc
from support.conversions import boxes, content, convert, expected, failure


def test_voc_counts_pixels_from_1(tmp_path: Path) -> None:
    """A box from the first to the last pixel is the whole picture; one of a single pixel is 1 x 1."""
    root = write_voc(tmp_path / "data", 2)
    whole = voc_object("cat", (1, 1, SIZE[1], SIZE[0])) + voc_object("cat", (11, 21, 11, 21))
    (root / "Annotations" / "0.xml").write_text(voc_file("0.png", whole))
    convert("voc", root, "--val-share", "0.5")
    found = (boxes(root, "train") | boxes(root, "val"))["JPEGImages/0.png"]
    assert found == [("cat", (0, 0, SIZE[1], SIZE[0])), ("cat", (10, 20, 1, 1))]


def test_files_that_count_from_0(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_voc(tmp_path / "data", 2)
    (root / "Annotations" / "0.xml").write_text(voc_file("0.png", voc_object("cat", (0, 10, 30, 40))))
    assert "0.xml, object 1 (cat): the box [0.0, 10.0" in failure(capsys, "voc", root, "--val-share", "0.5")
    convert("voc", root, "--val-share", "0.5", "--first-pixel", "0")
    assert (boxes(root, "train") | boxes(root, "val"))["JPEGImages/0.png"] == [("cat", (0, 10, 30, 30))]


def test_voc_lists_of_splits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_voc(tmp_path / "VOC2012", 5)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("3\n0\n")
    (lists / "val.txt").write_text("1\n")
    convert("voc", root)
    assert list(boxes(root, "train")) == ["JPEGImages/3.png", "JPEGImages/0.png"]
    assert boxes(root, "val") == expected("JPEGImages", range(1, 2))
    assert "2 times: picture in no list of ImageSets/Main, left out" in capsys.readouterr().err
    (lists / "val.txt").write_text("1\n77\n")
    assert "val.txt: it lists 77, which was not read" in failure(capsys, "voc", root, "--force")


def test_folders_of_splits_with_files_side_by_side(tmp_path: Path) -> None:
    """As Roboflow exports them, and with the same names in several folders."""
    for split in ("train", "valid", "test"):
        write_voc(tmp_path, 2, split, split)
    convert("voc", tmp_path)
    for split, folder in (("train", "train"), ("val", "valid"), ("test", "test")):
        assert boxes(tmp_path, split) == expected(folder, range(2))


def test_pictures_are_found_by_the_name_inside_or_that_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = write_voc(tmp_path / "data", 3, "images", "annotations")
    xml = root / "annotations" / "0.xml"
    xml.rename(root / "annotations" / "other.xml")  # names 0.png
    (root / "annotations" / "1.xml").write_text(voc_file(r"C:\old\gone.png", voc_object("cat", (5, 5, 30, 30))))
    convert("voc", root, "--val-share", "0.5")
    assert set(boxes(root, "train") | boxes(root, "val")) == {f"images/{number}.png" for number in range(3)}
    (root / "annotations" / "1.xml").write_text(voc_file("2.png", voc_object("cat", (5, 5, 30, 30))))
    message = failure(capsys, "voc", root, "--val-share", "0.5", "--force")
    assert "1.xml: it names the picture 2.png, but 1.png is called as the file; correct one" in message


def test_polygons_parts_and_difficult_objects(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_voc(tmp_path / "data", 2)
    points = "".join(f"<{k}>{v}</{k}>" for k, v in {"x1": 11, "y1": 11, "x2": 41, "y2": 11, "x3": 41, "y3": 31}.items())
    outlined = voc_object("cat", (11, 11, 40, 30), f"<polygon>{points}</polygon><part><name>head</name></part>")
    hard = voc_object("cat", (50, 50, 80, 70), "<difficult>1</difficult>")
    (root / "Annotations" / "0.xml").write_text(voc_file("0.png", outlined + hard))
    convert("voc", root, "--val-share", "0.5")
    split = "train" if "JPEGImages/0.png" in boxes(root, "train") else "val"
    first, second = content(root, split)["annotations"]
    assert first["segmentation"] == [[10, 10, 40, 10, 40, 30]] and first["area"] == 300
    assert first["bbox"] == [10, 10, 30, 20] and second["iscrowd"] == 0
    printed = capsys.readouterr().err
    assert "1 times: parts of an object" in printed and "1 times: object marked as difficult, taken as any" in printed
    convert("voc", root, "--val-share", "0.5", "--force", "--ignore-difficult")
    assert [entry["iscrowd"] for entry in content(root, split)["annotations"]] == [0, 1]


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + "".join(
    f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9)
)
CORRUPT_VOC = {
    "not XML": ("<annotation><object>", "0.xml: it is not XML (no element found"),
    "empty": ("", "0.xml: it is not XML"),
    "another kind of XML": ("<svg/>", "0.xml: it is XML of a <svg>"),
    "entities": (BOMB + "]><annotation><filename>&j;</filename></annotation>", "0.xml: it is not XML (limit on input"),
    "external entity": (
        '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation><filename>&a;</filename></annotation>',
        "0.xml: it is not XML (undefined entity",
    ),
    "no name": (voc_file("0.png", voc_object(" ", (1, 1, 9, 9))), "0.xml, object 1: it has no name"),
    "no box": (voc_file("0.png", "<object><name>cat</name></object>"), "0.xml, object 1 (cat): the box"),
    "text for a number": (voc_file("0.png", voc_object("cat", (1, "x", 9, 9))), "object 1 (cat): the box {'xmin': '1'"),
    "not finite": (voc_file("0.png", voc_object("cat", (1, "nan", 9, 9))), "expected four numbers"),
    "turned round": (voc_file("0.png", voc_object("cat", (30, 1, 9, 9))), "ends before it starts"),
    "outside": (voc_file("0.png", voc_object("cat", (300, 1, 310, 9))), "a box outside of its picture of 100 x 80"),
    "another size": (voc_file("0.png", voc_object("cat", (1, 1, 9, 9)), (81, 100)), "its picture has (80, 100)"),
    "polygon of two points": (
        voc_file(
            "0.png", voc_object("cat", (1, 1, 9, 9), "<polygon><x1>1</x1><y1>1</y1><x2>5</x2><y2>5</y2></polygon>")
        ),
        "an outline of 2 points",
    ),
    "polygon in another form": (
        voc_file("0.png", voc_object("cat", (1, 1, 9, 9), "<polygon><pt><x>1</x></pt></polygon>")),
        "expected one of numbers x1, y1",
    ),
}


@pytest.mark.parametrize("kind", CORRUPT_VOC)
def test_corrupt_xml_is_named_and_can_be_left_out(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_voc(tmp_path / "data")
    text, message = CORRUPT_VOC[kind]
    (root / "Annotations" / "0.xml").write_text(text)
    printed = failure(capsys, "voc", root, "--val-share", "0.5")
    assert message in printed and str(root / "Annotations" / "0.xml") in printed
    assert "1 entries cannot be converted" in printed and "Nothing was written" in printed
    assert not (root / "annotations" / "instances_train.json").exists()
    convert("voc", root, "--val-share", "0.5", "--leave-out-corrupt", "--unlabelled", "background")
    assert f"left out: {root / 'Annotations' / '0.xml'}" in capsys.readouterr().err
    found = boxes(root, "train") | boxes(root, "val")
    # A file that cannot be read does not make its picture one without objects.
    assert found.pop("JPEGImages/0.png", []) == [] and found == expected("JPEGImages", range(1, 4))


def test_damaged_pictures_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_voc(tmp_path / "data")
    (root / "JPEGImages" / "2.png").write_bytes(b"no picture")
    assert "2.png: is not a readable image" in failure(capsys, "voc", root, "--val-share", "0.5")


def test_xml_of_no_picture_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_voc(tmp_path / "data")
    (root / "JPEGImages" / "2.png").unlink()
    printed = failure(capsys, "voc", root, "--val-share", "0.5")
    assert "2.xml: no picture is called as the file or 2.png in" in printed


def test_boxes_beyond_the_border_are_cut_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_voc(tmp_path / "data", 2)
    (root / "Annotations" / "0.xml").write_text(voc_file("0.png", voc_object("cat", (91, 71, 120, 90))))
    convert("voc", root, "--val-share", "0.5")
    assert (boxes(root, "train") | boxes(root, "val"))["JPEGImages/0.png"] == [("cat", (90, 70, 10, 10))]
    assert "1 times: box cut at the border of its picture; the first: " in capsys.readouterr().err


def test_files_without_their_picture_s_size_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_voc(tmp_path / "data", 2)
    (root / "Annotations" / "0.xml").write_text(voc_file("0.png", voc_object("cat", (1, 1, 9, 9)), (0, 0)))
    convert("voc", root, "--val-share", "0.5")
    assert "1 times: XML file without its picture's size" in capsys.readouterr().err


def test_classes_that_a_list_lacks_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "names.txt").write_text("raccoon\n")
    root = write_voc(tmp_path / "data")
    printed = failure(capsys, "voc", root, "--val-share", "0.5", "--classes", tmp_path / "names.txt")
    assert "object 2 (cat):" in printed and "names.txt does not list its class" in printed


@pytest.mark.parametrize(
    ("name", "value"),
    [("images", 3), ("annotations", ["a"]), ("first_pixel", 2), ("first_pixel", True), ("first_pixel", 0.0),
     ("ignore_difficult", "yes"), ("unlabelled", "drop"), ("unlabelled", None)],
)  # fmt: skip
def test_options_are_checked(name: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name}={re.escape(repr(value))} must be"):
        VocOptions(**{name: value})


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_listed_name_that_two_pictures_have(split: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The first of them would be left out without a word."""
    root = write_voc(tmp_path / "VOC2012", 3, "JPEGImages/a", "Annotations/a")
    write_voc(root, 1, "JPEGImages/b", "Annotations/b")
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    names = {"train": "1", "val": "2"}
    for name in names:
        (lists / f"{name}.txt").write_text(names[name] + ("\n0" if name == split else ""))
    found = failure(capsys, "voc", root)
    assert f"{split}.txt: it lists 0, which may be {root}/JPEGImages/a/0.png or {root}/JPEGImages/b/0.png" in found
    (lists / f"{split}.txt").write_text(names[split])
    convert("voc", root)
    assert list(boxes(root, split)) == [f"JPEGImages/a/{names[split]}.png"]
