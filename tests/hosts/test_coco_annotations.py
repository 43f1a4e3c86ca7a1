"""Every field of an annotation file, broken in every way: the right objects, for both detectors, or an error or a line
in the log that names the annotation or its kind; never silence."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_dense.hosts.coco import CocoData
from apt_dense.hosts.coco_annotations import checked_lists, read_annotations, sort_annotations
from apt_dense.hosts.coco_lenient_values import Notes, number, whole
from apt_dense.hosts.coco_outlines import decoded, extent

from support.coco_folder import SIZE, content

rle = pytest.importorskip("pycocotools.mask", reason="compares run lengths with pycocotools")

PIXELS = SIZE[0] * SIZE[1]
MISSING = object()
NAN, INF = float("nan"), float("inf")


def whole_file() -> dict:
    found = content(2)
    for place, annotation in enumerate(found["annotations"], start=1):
        annotation["id"] = place
    return found


def broken(part: str, field: str, value: Any) -> dict:
    """The file with one field of the second entry of a list set to a value, or taken away."""
    found = whole_file()
    if value is MISSING:
        del found[part][1][field]
    else:
        found[part][1][field] = value
    return found


def load(found: dict, masks: bool = True) -> dict:
    checked = checked_lists(found, Path("a.json"))
    return {**checked, "annotations": sort_annotations(checked, Path("a.json"), masks).annotations}


def clean(annotations: list[dict]) -> list[dict]:
    return [{key: value for key, value in annotation.items() if key != "id"} for annotation in annotations]


# ---- what is plainly meant is accepted, and said --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "field", "value", "note"),
    [
        ("images", "id", "20", "id given as str"),
        ("images", "id", 20.0, "id given as float"),
        ("images", "height", str(SIZE[0]), "height or width given as str"),
        ("images", "width", float(SIZE[1]), "height or width given as float"),
        ("categories", "id", "90", "id given as str"),
        ("annotations", "image_id", "10", "image_id given as str"),
        ("annotations", "image_id", 10.0, "image_id given as float"),
        ("annotations", "category_id", "90", "category_id given as str"),
        ("annotations", "category_id", 90.0, "category_id given as float"),
        ("annotations", "iscrowd", MISSING, "iscrowd missing"),
        ("annotations", "iscrowd", None, "iscrowd missing"),
        ("annotations", "iscrowd", False, "iscrowd given as bool"),
        ("annotations", "iscrowd", "0", "iscrowd given as str"),
        ("annotations", "iscrowd", 0.0, "iscrowd given as float"),
        ("annotations", "area", MISSING, "area missing"),
        ("annotations", "area", None, "area missing"),
        ("annotations", "bbox", MISSING, "box missing, taken from the outline"),
        ("annotations", "bbox", None, "box missing, taken from the outline"),
        ("annotations", "bbox", [], "box missing, taken from the outline"),
        ("annotations", "id", "2", "numbered from 1"),
        ("annotations", "id", MISSING, "numbered from 1"),
        ("annotations", "id", -2, "numbered from 1"),
        ("annotations", "id", 10**400, "numbered from 1"),
    ],
)
def test_what_is_meant_is_read_and_said(
    part: str, field: str, value: Any, note: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = load(broken(part, field, value))
    assert found == whole_file()
    assert f"a.json: read as meant, 1 times: {note}" in caplog.text or note in caplog.text


def second() -> dict:
    return whole_file()["annotations"][1]


@pytest.mark.parametrize(
    ("value", "note"),
    [
        (lambda: second()["segmentation"][0], "a single list of numbers"),
        (lambda: [list(map(str, second()["segmentation"][0]))], "coordinate given as str"),
        (lambda: [*second()["segmentation"], [1, 2, 3]], "part of an outline left out"),
        (lambda: [*second()["segmentation"], []], "part of an outline left out"),
    ],
)
def test_outlines_of_other_forms(value: Callable, note: str, caplog: pytest.LogCaptureFixture) -> None:
    assert load(broken("annotations", "segmentation", value())) == whole_file()
    assert note in caplog.text


def runs(**change: Any) -> dict:
    """Run lengths of the second object."""
    x, y, w, h = second()["bbox"]
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    counts = decoded(rle.encode(mask)["counts"].decode())
    return {"size": list(SIZE), "counts": counts} | change


@pytest.mark.parametrize("change", [{"size": [float(side) for side in SIZE]}, {"size": list(map(str, SIZE))}, {}])
def test_sizes_of_run_lengths_may_be_text(change: dict) -> None:
    mask = load(broken("annotations", "segmentation", runs(**change)))["annotations"][1]["segmentation"]
    assert mask == runs()
    without_size = {"counts": runs()["counts"]}
    assert load(broken("annotations", "segmentation", without_size))["annotations"][1]["segmentation"] == runs()


def test_missing_boxes_follow_from_run_lengths() -> None:
    for mask in (runs(), runs(counts=rle.frPyObjects(runs(), *SIZE)["counts"].decode())):
        file = broken("annotations", "segmentation", mask)
        del file["annotations"][1]["bbox"]
        assert load(file)["annotations"][1]["bbox"] == second()["bbox"]


# ---- what cannot have been meant is named ---------------------------------------------------------------------------

NO_SEGMENTATION = ["text", 7, True, [None], [[None] * 6], [["a"] * 6], [[1, 2, 3, 4, 5, NAN]], [[1, 2, INF, 4, 5, 6]],
                   [{}], [[[1, 2], [3, 4], [5, 6]]], [1, 2, "x", 4, 5, 6], [[True] * 6]]  # fmt: skip
NO_RUNS = [
    {"counts": [1000, 50]}, {"counts": []}, {"counts": ""}, {"counts": None}, {"counts": 5}, {"counts": {}},
    {"counts": [PIXELS + 10, -10]}, {"counts": [0.5, PIXELS - 0.5]}, {"counts": [None]}, {"counts": [PIXELS, 1]},
    {"counts": "o" * 10**6},
    {"counts": "0"}, {"counts": "PPP"}, {"counts": "~~~"}, {"counts": "\n"}, {"counts": "o" * 40},
    {"size": [5, 5]}, {"size": list(SIZE[::-1])}, {"size": SIZE[0]}, {"size": [SIZE[0]]}, {"size": [*SIZE, 1]},
    {"size": [None, None]}, {"size": "96x128"},
]  # fmt: skip


@pytest.mark.parametrize("value", [*NO_SEGMENTATION, *(runs(**change) for change in NO_RUNS)], ids=str)
def test_wrong_segmentations_name_the_annotation(value: Any) -> None:
    with pytest.raises(ValueError, match="^a.json: annotation 2 of image 10 has ") as raised:
        load(broken("annotations", "segmentation", value))
    assert "expected" in str(raised.value) or "its image [96, 128]" in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "value", [[1, 2, 3], [1, 2, 3, 4, 5], [None] * 4, "1234", {}, 7, ["a", 1, 2, 3], [[1, 2, 3, 4]]]
)
def test_wrong_boxes_name_the_annotation(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^a.json: annotation 2 of image 10 has the box .*expected four numbers"):
        load(broken("annotations", "bbox", value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("iscrowd", value) for value in (2, -1, "yes", [], {}, 0.5, NAN)),
        *(("area", value) for value in (-1, NAN, INF, "much", [], {}, True, 10**400)),
        *(("category_id", value) for value in (MISSING, None, 4, "red", 3.5, True, [], {}, INF)),
    ],
)
def test_wrong_numbers_name_the_annotation(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match="^a.json: annotation 2 of image 10 has "):
        load(broken("annotations", field, value))


@pytest.mark.parametrize("value", [MISSING, None, "one", 1.5, True, [], {}, NAN, 10**400 + 0.0 if False else INF])
def test_annotations_without_an_image_are_named_by_their_place(value: Any) -> None:
    with pytest.raises(ValueError, match="^a.json: annotation 1 of the list is .*image_id"):
        load(broken("annotations", "image_id", value))


@pytest.mark.parametrize("value", [None, 7, "text", [], True])
def test_entries_that_are_no_objects(value: Any) -> None:
    for part, text in (("annotations", "annotation 1"), ("images", "image 1"), ("categories", "category 1")):
        found = whole_file()
        found[part][1] = value
        with pytest.raises(ValueError, match=f"^a.json: {text} of the list is"):
            load(found)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        *(("images", "file_name", value) for value in (MISSING, None, "", 7, ["a.png"], "a\0.png")),
        *(("images", side, v) for side in ("height", "width") for v in (MISSING, None, 0, -5, 1.5, "tall", NAN, True)),
        *((part, "id", value) for part in ("images", "categories") for value in (MISSING, None, "x", 1.5, [], True)),
    ],
)
def test_wrong_images_and_categories_are_named(part: str, field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"^a.json: (image|category) 1 of the list"):
        load(broken(part, field, value))


def test_ids_that_mean_the_same_are_duplicates() -> None:
    with pytest.raises(ValueError, match=r"each id only once, but \[10\] are there more than once"):
        load(broken("images", "id", "10"))
    with pytest.raises(ValueError, match=r"category ids \[3, 3\]"):
        load(broken("categories", "id", 3.0))


@pytest.mark.parametrize("far", [1e9, -1e9, 1e300, 10**18, 5000])
def test_outlines_that_reach_far_beyond_the_image_are_named(far: float) -> None:
    """pycocotools reserves memory for each pixel along an outline, and fails where there is none."""
    with pytest.raises(ValueError, match="^a.json: annotation 2 of image 10 has the segmentation .*, which reaches to"):
        load(broken("annotations", "segmentation", [[5, 5, far, 5, 9, 30]]))


@pytest.mark.parametrize("value", [{}, "", 0, False])
def test_empty_segmentations_of_another_kind_are_none_where_boxes_will_do(
    value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Detectron2 would look for the run lengths of an empty dictionary."""
    found = load(broken("annotations", "segmentation", value), masks=False)["annotations"][1]
    assert "segmentation" not in found and "taken as none" in caplog.text


# ---- what is of no use is left out, and counted ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("image_id", 999, "of images that are not listed"),
        ("bbox", [5, 5, 0, 9], "with an empty box"),
        ("bbox", [5, 5, 9, -2], "with an empty box"),
        ("bbox", [NAN, 5, 9, 9], "with an empty box"),
        ("bbox", [5, 5, INF, 9], "with an empty box"),
        ("bbox", [500, 5, 9, 9], "with a box outside of the image"),
        ("bbox", [-50, 5, 9, 9], "with a box outside of the image"),
        ("bbox", [0, 0, 2, 2], "with a box that does not touch the object's outline"),
        ("segmentation", [[]], "with an outline of less than three points"),
        ("segmentation", [[5, 6, 7, 8]], "with an outline of less than three points"),
        ("segmentation", [[505, 506, 535, 506, 535, 546]], "with an outline outside of the image"),
        ("segmentation", [[-5, -6, -35, -6, -35, -46]], "with an outline outside of the image"),
        ("segmentation", [[5, 5, 50, 5, 90, 5]], "with an outline outside of the image, or without an area"),
        ("segmentation", [[5, 5, 10, 10, 50, 50]], "or without an area"),
        ("segmentation", runs(counts=[PIXELS]), "with a mask of no pixel"),
        ("segmentation", runs(counts=[PIXELS, 0]), "with a mask of no pixel"),
    ],
    ids=str,
)
def test_useless_annotations_are_counted(
    field: str, value: Any, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = load(broken("annotations", field, value))["annotations"]
    assert found == [annotation for annotation in whole_file()["annotations"] if annotation["id"] != 2]
    assert f"a.json: left out 1 annotations {problem}" in caplog.text or problem in caplog.text


def test_boxes_as_corners_are_suspected(caplog: pytest.LogCaptureFixture) -> None:
    load(broken("annotations", "bbox", [70, 30, 120, 90]))
    assert "is it x, y, width, height" in caplog.text


# ---- run lengths ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=12))
def test_compressed_run_lengths_are_pycocotools_(counts: list[int]) -> None:
    height = sum(counts) or 1
    compressed = rle.frPyObjects({"size": [height, 1], "counts": counts}, height, 1)
    assert decoded(compressed["counts"].decode()) == counts


@given(st.binary(min_size=12, max_size=12), st.integers(1, 8))
def test_extents_of_runs_are_pycocotools_(pixels: bytes, height: int) -> None:
    mask = np.asfortranarray(np.frombuffer(pixels, np.uint8).reshape(-1, 12)[:, : 12 // height * height].reshape(
        height, -1, order="F") % 2)  # fmt: skip
    found = rle.encode(mask)
    box = extent({"size": list(mask.shape), "counts": found["counts"].decode()}, mask.shape)
    x, y, w, h = rle.toBbox(found).tolist()
    assert box == (None if not mask.any() else (x, y, x + w, y + h))


# ---- anything at all, for both detectors ----------------------------------------------------------------------------

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 200), st.floats(), st.just(10**400), st.text(max_size=3),
              st.sampled_from(["1", "10", "20", "3", "90", "0"])),
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(st.sampled_from("abc"), inner, max_size=2)),
    max_leaves=8,
)  # fmt: skip
SHAPES = st.one_of(
    st.lists(st.floats(-300, 300), min_size=4, max_size=4),
    st.lists(st.lists(st.integers(-50, 200), min_size=5, max_size=9), max_size=2),
    st.builds(lambda size, counts: {"size": size, "counts": counts}, st.sampled_from([list(SIZE), [5, 5], None]),
              st.one_of(st.text("0123OPQo`", max_size=9), st.lists(st.integers(-1, PIXELS), max_size=4),
                        st.integers(0, PIXELS).map(lambda n: [n, PIXELS - n]))),
)  # fmt: skip
PLACES = st.sampled_from(
    [("images", field) for field in ("id", "file_name", "height", "width")]
    + [("categories", field) for field in ("id", "name")]
    + [("annotations", f) for f in ("id", "image_id", "category_id", "bbox", "segmentation", "area", "iscrowd")]
)


@given(PLACES, st.one_of(st.just(MISSING), JSON, SHAPES), st.booleans())
def test_a_broken_field_gives_the_right_objects_a_line_or_an_error(
    place: tuple[str, str], value: Any, masks: bool
) -> None:
    part, field = place
    records = Records()
    logging.getLogger("apt_dense").addHandler(records)
    found, message = attempt(lambda: load(broken(part, field, value), masks))
    logging.getLogger("apt_dense").removeHandler(records)
    if found is None:
        assert message.startswith("a.json") and "\n" not in message
        return
    others = [whole_file()["annotations"][place] for place in (0, 2, 3)]
    if part == "annotations":
        assert all(other in clean(found["annotations"]) for other in clean(others))
    as_written = broken(part, field, value)[part][1].get(field)
    read = [entry.get(field) for entry in found[part]]
    assert as_written in read or records.lines, "changed without a word"
    check_both_hosts(found)


def attempt(function: Callable[[], dict]) -> tuple[dict | None, str]:
    """The function's result, or the message of its ValueError."""
    try:
        return function(), ""
    except ValueError as error:
        return None, str(error)


class Records(logging.Handler):
    """Collects what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def check_both_hosts(found: dict) -> None:
    """Masks are 0 and 1, in the image's size, and equal for both detectors, as are boxes and labels."""
    pytest.importorskip("detectron2")
    from apt_dense.hosts.detectron2.coco_data import records

    from torchvision_detection.data import index

    json.dumps(found)
    coco, data = index(found), CocoData(Path("a.json"), Path(), found, True)
    for record in records(data):
        theirs = coco.imgToAnns.get(record["image_id"], [])
        assert [a["bbox"] for a in theirs] == [a["bbox"] for a in record["annotations"]]
        for one, other in zip(theirs, record["annotations"], strict=True):
            if one.get("segmentation"):
                mask = coco.annToMask(one)
                assert mask.shape == (record["height"], record["width"]) and set(np.unique(mask)) <= {0, 1}
                assert np.array_equal(mask, coco.annToMask({**one, "segmentation": other["segmentation"]}))


@given(st.one_of(JSON, SHAPES))
def test_numbers_are_read_or_refused(value: Any) -> None:
    for read in (whole, number):
        found = read(value, Notes(), "x")
        assert found is None or float(found) == float(value) or found != found


def test_files_are_read_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(whole_file()))
    assert read_annotations(path) == whole_file()
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is damaged: it is not JSON"):
        read_annotations(path)
    assert copy.deepcopy(whole_file()) == whole_file()
