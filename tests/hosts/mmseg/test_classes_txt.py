"""classes.txt: values and colours of masks become labels, and whatever it does not list is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.own_folder import COLOURS, VALUES, labels_of, mask_image

pytest.importorskip("mmengine", reason="apt_dense.hosts.mmseg needs MMEngine")

from apt_dense.hosts.mmseg.classes_txt import ClassTable, read_classes, to_labels

EXPECTED = np.array([0, 1, 2, 255], np.uint8)[labels_of(0)]


def table(folder: Path, text: str) -> ClassTable:
    path = folder / "classes.txt"
    path.write_text(text, encoding="utf-8")
    return read_classes(path)


@pytest.mark.parametrize(
    ("kind", "text"),
    [("values", VALUES), ("palette", VALUES), ("palette", COLOURS), ("colours", COLOURS)],
)
def test_masks_of_all_kinds_become_the_same_labels(kind: str, text: str, tmp_path: Path) -> None:
    mask_image(labels_of(0), kind).save(tmp_path / "mask.png")
    listed = table(tmp_path, text)
    assert listed.names == ("sky", "road", "car")
    np.testing.assert_array_equal(to_labels(tmp_path / "mask.png", listed), EXPECTED)


def test_masks_of_0_and_255(tmp_path: Path) -> None:
    mask_image(labels_of(0), "binary").save(tmp_path / "mask.png")
    labels = to_labels(tmp_path / "mask.png", table(tmp_path, "0 rest\n255 car\n128 void\n"))
    np.testing.assert_array_equal(labels, np.array([0, 0, 1, 255], np.uint8)[labels_of(0)])


def test_lines_of_one_name_are_one_class(tmp_path: Path) -> None:
    """CamVid's 32 classes become 11 in this way."""
    listed = table(tmp_path, "0 sky\n1 ground\n2 ground\n3 void\n")
    mask_image(labels_of(0), "values").save(tmp_path / "mask.png")
    assert listed.names == ("sky", "ground")
    np.testing.assert_array_equal(
        to_labels(tmp_path / "mask.png", listed), np.array([0, 1, 1, 255], np.uint8)[labels_of(0)]
    )


@pytest.mark.parametrize("mode", ["1", "L", "I", "I;16", "RGB", "RGBA"])
def test_modes_of_masks_with_values(mode: str, tmp_path: Path) -> None:
    values = np.array([[0, 1], [1, 0]], np.uint8)
    image = Image.fromarray(values.astype(bool) if mode == "1" else values.astype(np.uint16) if ";" in mode else values)
    path = tmp_path / ("mask.tif" if mode == "I" else "mask.png")
    (image if mode in ("1", "I;16") else image.convert(mode)).save(path)
    labels = to_labels(path, table(tmp_path, "0 a\n1 b\n"))
    np.testing.assert_array_equal(labels, values)


def test_values_of_16_bits(tmp_path: Path) -> None:
    Image.fromarray(np.array([[7, 30007]], np.uint16)).save(tmp_path / "mask.png")
    listed = table(tmp_path, "7 a\n30007 b\n8 c\n")
    assert to_labels(tmp_path / "mask.png", listed).tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="holds 1 value that .* does not list: 30007; add lines such as '30007 NAME'"):
        to_labels(tmp_path / "mask.png", table(tmp_path, "7 a\n8 c\n"))


def test_windows_line_ends_commas_comments_and_names_with_spaces(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbf# R,G,B name\r\n1,2,3, traffic light\r\n\r\n4 5 6\tcar 2\r\n")
    listed = read_classes(tmp_path / "classes.txt")
    assert listed.names == ("traffic light", "car 2") and listed.palette == ((1, 2, 3), (4, 5, 6))


def test_classes_without_colours_get_different_ones(tmp_path: Path) -> None:
    palette = table(tmp_path, "".join(f"{value} class{value}\n" for value in range(200))).palette
    assert len(set(palette)) == 200 and (0, 0, 0) not in palette


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 a\n1 2 b\n", "line 2, is '1 2 b'; expected a line 'VALUE NAME'"),
        ("0 a\n7\n", "line 2, is '7'"),
        ("0 a\n1 2 3 b\n", "lists both values and colours"),
        ("0 a\n0 b\n", "line 2: '0 b' lists a value or colour a second time"),
        ("0 a\n1 void\n", "lists 1 class; expected 2 to 253"),
        ("0 a\n70000 b\n", "has a number above 65535"),
        ("1 2 3 a\n1 2 256 b\n", "has a number above 255"),
        ("", "lists 0 classes"),
    ],
)
def test_lines_that_cannot_be_meant(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="classes.txt") as raised:
        table(tmp_path, text)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_colours_that_are_not_listed_are_shown_as_in_the_file(tmp_path: Path) -> None:
    mask_image(labels_of(0), "colours").save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask.png holds 2 colours that .* does not list: 0 0 0, 64 0 128; add lines"):
        to_labels(tmp_path / "mask.png", table(tmp_path, "128 128 128 sky\n128 64 128 road\n"))


def test_coloured_masks_need_colours_in_the_list(tmp_path: Path) -> None:
    mask_image(labels_of(0), "colours").save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="mask.png has colours, but classes.txt lists values"):
        to_labels(tmp_path / "mask.png", table(tmp_path, VALUES))


def test_jpegs_of_masks_are_explained(tmp_path: Path) -> None:
    mask_image(labels_of(0), "values").save(tmp_path / "mask.jpg", quality=50)
    with pytest.raises(ValueError, match="a JPEG changes values when it is saved"):
        to_labels(tmp_path / "mask.jpg", table(tmp_path, "0 sky\n1 road\n"))


@pytest.mark.parametrize("content", [b"", b"not a picture"])
def test_damaged_masks_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(content)
    with pytest.raises(ValueError, match="mask.png is not a readable mask"):
        to_labels(tmp_path / "mask.png", table(tmp_path, VALUES))
