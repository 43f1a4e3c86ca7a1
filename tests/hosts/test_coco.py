"""The reader of data sets in COCO's layout: folders, damaged files, contradictions, annotations that are left out."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from apt_dense.hosts import coco_picture_sizes
from apt_dense.hosts.coco import CocoData, check_same_categories, load_split
from apt_dense.hosts.coco_annotations import read_annotations, usable_annotations

from support.coco_folder import CATEGORIES, SIZE, content, rectangle, write_coco
from support.fresh_python import run_fresh

TRAIN, VAL = Path("annotations/instances_train2017.json"), Path("annotations/instances_val2017.json")
CROWD = {"counts": [0, 40, SIZE[0] * SIZE[1] - 40], "size": list(SIZE)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images with two objects each; tests only read it."""
    return write_coco(tmp_path_factory.mktemp("data") / "coco", images=3)


def load(root: Path, change: Callable[[dict], object] | None = None, **options: Any) -> CocoData:
    return load_split(write_coco(root, 2, change, splits=("train",)), "train", **options)


def arrange(data: Path, root: Path, annotations: str, images: str) -> Path:
    """Copy the training split to another layout."""
    for source, copied in ((data / TRAIN, root / annotations), (data / "train2017", root / images)):
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, copied) if source.is_dir() else shutil.copy(source, copied)
    return root


# ---- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/instances_train.json", "train"),
        ("annotations/instances_train_mine.json", "images/train"),
        ("annotations/instances_train.json", "images"),
        ("coco/annotations/instances_train.json", "images/training"),
        ("coco/annotations/instances_train2017.json", "coco/train2017"),
    ],
)
def test_layouts(data: Path, tmp_path: Path, annotations: str, images: str) -> None:
    found = load_split(arrange(data, tmp_path, annotations, images), "train")
    assert (found.path, found.folder) == (tmp_path / annotations, tmp_path / images)
    assert found.categories == ((3, "red"), (90, "green")) and not found.is_changed
    assert found.content == json.loads((data / TRAIN).read_text())


def test_the_demo_s_coco_folder_is_a_root_too(data: Path, tmp_path: Path) -> None:
    arrange(data, tmp_path, "coco/annotations/instances_train.json", "images/training")
    assert load_split(tmp_path / "coco", "train").folder == tmp_path / "images" / "training"


def test_images_in_folders_of_their_own(data: Path, tmp_path: Path) -> None:
    root = shutil.copytree(data, tmp_path / "data")
    (root / "train2017" / "a").mkdir()
    (root / "train2017" / "1.png").rename(root / "train2017" / "a" / "1.png")
    rewrite(root / TRAIN, lambda c: c["images"][0].update(file_name="a/1.png"))
    assert load_split(root, "train").folder == root / "train2017"
    rewrite(root / TRAIN, lambda c: c["images"][0].update(file_name="b/1.png"))
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 images .* such as b/1.png"):
        load_split(root, "train")


def test_2017_is_preferred_then_the_name_without_a_suffix(data: Path, tmp_path: Path) -> None:
    root = shutil.copytree(data, tmp_path / "data")
    for name in ("instances_train.json", "instances_train_a.json"):
        shutil.copy(root / TRAIN, root / "annotations" / name)
    assert load_split(root, "train").path == root / TRAIN
    (root / TRAIN).unlink()
    (root / "train2017").rename(root / "train")
    assert load_split(root, "train").path.name == "instances_train.json"
    (root / "annotations" / "instances_train.json").rename(root / "annotations" / "instances_train_b.json")
    with pytest.raises(ValueError, match="several annotation files for train, .*train_a.json, .*train_b.json; keep"):
        load_split(root, "train")


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist, so there is no annotations/instances_train.*expected DIR/"),
        (lambda root: (root / TRAIN).unlink(), r"holds no annotations/instances_train\*.json; expected"),
        (lambda root: shutil.rmtree(root / "train2017"), r"no image that .*train2017.json lists \(1.png, ...\) is in"),
        (
            lambda root: (root / "train2017/2.png").unlink(),
            "1 of the 3 images that .*json lists are not in .*such as 2",
        ),
    ],
)
def test_missing_files(data: Path, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    root = shutil.copytree(data, tmp_path / "data")
    damage(root)
    with pytest.raises(FileNotFoundError, match=message) as raised:
        load_split(root, "train")
    assert str(root) in str(raised.value) and "\n" not in str(raised.value)


# ---- damaged files and contradictions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "is damaged: it is not JSON"),
        ("", "is damaged"),
        ("\xff\xfe", "is damaged"),
        ("[]", r"lacks the lists \['images', 'annotations', 'categories'\]"),
        ('{"images": []}', r"lacks the lists \['annotations', 'categories'\]"),
        (
            '{"images": [1], "annotations": [], "categories": [{"id": 1}]}',
            "image 0 of the list is 1; expected an object",
        ),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "image 0 of the list has the file_name None"),
    ],
)
def test_damaged_files(tmp_path: Path, text: str, message: str) -> None:
    root = write_coco(tmp_path)
    (root / TRAIN).write_text(text, encoding="latin1")
    with pytest.raises(ValueError, match=f"instances_train2017.json.* {message}|instances_train2017.json.*{message}"):
        load_split(root, "train")


def _set(number: int, **fields: object) -> Callable[[dict], None]:
    return lambda content: content["annotations"][number].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(1, category_id=4), r"annotation 2 of image 10 has category 4; the categories are \[3, 90\]"),
        (_set(0, segmentation=[]), "annotation 1 of image 10 has no segmentation, which Mask R-CNN"),
        (_set(0, segmentation={"size": [5, 5], "counts": [25]}), r"a mask of size \[5, 5\], its image \[96, 128\]"),
        (_set(0, segmentation={"size": list(SIZE), "counts": [25]}), r"run lengths \[25\]; expected 12288 pixels"),
        (lambda content: content["images"].clear(), "lists 0 images"),
        (lambda content: content["images"].append(content["images"][0]), "each id only once"),
        (lambda content: content.update(categories=CATEGORIES * 2), r"category ids \[3, 90, 3, 90\]"),
        (lambda content: content.update(categories=[]), "expected at least one"),
        (lambda content: [a.update(iscrowd=1) for a in content["annotations"]], "has only crowds"),
    ],
)
def test_contradictions(tmp_path: Path, change: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, change)


def test_only_crowds_are_nothing_to_score(tmp_path: Path) -> None:
    root = write_coco(tmp_path, change=lambda c: [a.update(iscrowd=1) for a in c["annotations"]])
    with pytest.raises(ValueError, match=r"has only crowds .*not scored.*: 0 of 4 annotations .*not: 4 crowds"):
        load_split(root, "val")


def test_boxes_alone_will_do_for_models_without_masks(tmp_path: Path) -> None:
    found = load(tmp_path, lambda c: [a.pop("segmentation") for a in c["annotations"]], masks=False)
    assert len(found.content["annotations"]) == 4 and not found.is_changed


def test_categories_that_differ_are_named() -> None:
    check_same_categories([(1, "a")], [[1, "a"]], "a.json", "b.json")
    with pytest.raises(ValueError, match=r"of a.json differ from those of b.json: \[\(1, 'a'\)\] \(1\) against"):
        check_same_categories([(1, "a")], [(1, "b")], "a.json", "b.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_files_of_other_encodings_are_written_again_for_the_hosts(encoding: str, tmp_path: Path) -> None:
    """Python reads them from bytes, but not from text, as the hosts' evaluations do, after the training."""
    root = write_coco(tmp_path, change=lambda content: content["categories"][0].update(name="räd"))
    path = root / TRAIN
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False), encoding=encoding)
    found = load_split(root, "train")
    assert found.categories[0] == (3, "räd") and found.is_changed == (encoding != "utf-8")


# ---- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(60, 50), (SIZE[0], SIZE[1]), (1, 1)])
def test_pictures_of_another_size_are_named(data: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    root = shutil.copytree(data, tmp_path / "data")
    Image.new("RGB", size).save(root / "train2017" / "2.png")
    with pytest.raises(ValueError, match=r"2.png has height and width .*2017.json says \(96, 128\) for image 20"):
        load_split(root, "train")


@pytest.mark.parametrize("pixels", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_files_that_are_no_pictures_are_named(data: Path, tmp_path: Path, pixels: bytes) -> None:
    root = shutil.copytree(data, tmp_path / "data")
    (root / "train2017" / "2.png").write_bytes(pixels)
    with pytest.raises(ValueError, match="2.png is not a readable image"):
        load_split(root, "train")


def test_turned_pictures_have_two_sizes_unless_the_host_turns_them(data: Path, tmp_path: Path) -> None:
    root, exif = shutil.copytree(data, tmp_path / "data"), Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    Image.new("RGB", SIZE[::-1]).save(root / "train2017" / "2.png", format="JPEG", exif=exif)
    load_split(root, "train")
    with pytest.raises(ValueError, match=r"2.png has height and width \(128, 96\)"):
        load_split(root, "train", upright=True)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_many_grey_levels_are_named_where_the_host_makes_white_of_them(
    mode: str, data: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(data, tmp_path / "data")
    Image.new(mode, SIZE[::-1], 300).save(root / "train2017" / "2.png", format="TIFF")
    load_split(root, "train")
    with pytest.raises(ValueError, match="2.png is a grey picture of more than 8 bits"):
        load_split(root, "train", upright=True)


def test_large_sets_are_sampled_and_say_so(data: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(coco_picture_sizes, "MOST", 2)
    with caplog.at_level(logging.INFO):
        load_split(data, "train")
    assert "compared the sizes of 2 of its 3 images" in caplog.text
    assert coco_picture_sizes.spread(range(10), 4) == [0, 2, 5, 7]


# ---- annotations ----------------------------------------------------------------------------------------------------


def test_useless_annotations_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(content: dict) -> None:
        bad = [rectangle(10, 3, box) for box in ((5, 5, 0, 9), (5, 5, 9, -2), (5, 5, 9, float("nan")))]
        bad += [rectangle(999, 3, (5, 5, 9, 9)), rectangle(10, 3, (5, 5, 9, 9), segmentation=[[5, 5, 14, 14]])]
        content["annotations"] = bad + content["annotations"]

    with caplog.at_level(logging.WARNING):
        found = load(tmp_path, change)
    assert [annotation["image_id"] for annotation in found.content["annotations"]] == [10, 10, 20, 20]
    assert found.is_changed
    for text in ("3 annotations with an empty box", "1 annotations of images", "1 annotations with an outline"):
        assert text in caplog.text


def test_missing_fields_are_completed(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        for annotation in content["annotations"]:
            del annotation["iscrowd"], annotation["area"]

    found = load(tmp_path, change)
    assert all(a["iscrowd"] == 0 and a["area"] == a["bbox"][2] * a["bbox"][3] for a in found.content["annotations"])
    assert found.is_changed


@pytest.mark.parametrize("ids", [(0, 1, 2, 3), (5, 5, 6, 7), ("a", "b", "c", "d"), (None, 1, 2, 3)])
def test_ids_that_coco_s_evaluation_cannot_use_are_replaced(tmp_path: Path, ids: tuple) -> None:
    def change(content: dict) -> None:
        for annotation, number in zip(content["annotations"], ids, strict=True):
            annotation["id"] = number

    found = load(tmp_path, change)
    assert [annotation["id"] for annotation in found.content["annotations"]] == [1, 2, 3, 4] and found.is_changed


def test_good_ids_are_kept(tmp_path: Path) -> None:
    found = load(tmp_path, lambda c: [a.update(id=a["id"] * 100) for a in c["annotations"]])
    assert [annotation["id"] for annotation in found.content["annotations"]] == [100, 200, 300, 400]
    assert not found.is_changed


def test_parts_of_an_outline_without_an_inside_are_left_out(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        content["annotations"][0]["segmentation"] += [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7]]

    assert len(load(tmp_path, change).content["annotations"][0]["segmentation"]) == 1


def attempt(function: Callable[[], Any]) -> tuple[Any, str]:
    """The function's result, or the message of its ValueError."""
    try:
        return function(), ""
    except ValueError as error:
        return None, str(error)


BROKEN = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.just(10**400), st.text(max_size=2), st.just([]),
    st.just({}), st.lists(st.one_of(st.integers(-9, 200), st.floats(), st.none(), st.text(max_size=1)), max_size=5),
    st.just([[1, 2, 3, None, 5, 6]]), st.just([[0, 0, 9, 0, float("nan"), 9]]), st.just([[]]), st.just([3]),
    st.sampled_from([{"size": list(SIZE)}, CROWD, CROWD | {"counts": ""}, CROWD | {"counts": [-1, 41, 12248]}]),
    st.just("missing"),
)  # fmt: skip
FIELDS = ("image_id", "category_id", "bbox", "segmentation", "area", "iscrowd", "id")


@given(st.sampled_from(FIELDS), BROKEN, st.booleans())
def test_a_broken_field_gives_the_other_objects_or_an_error_naming_it(field: str, value: Any, masks: bool) -> None:
    whole = content(2)
    for number, annotation in enumerate(whole["annotations"], start=1):
        annotation["id"] = number
    broken = copy.deepcopy(whole)
    if value == "missing":
        del broken["annotations"][1][field]
    else:
        broken["annotations"][1][field] = value
    found, message = attempt(lambda: usable_annotations(broken, Path("a.json"), masks))
    if message:
        assert message.startswith("a.json: annotation ") and "\n" not in message and len(message) < 400
        assert field == "id" or message.startswith(
            ("a.json: annotation 2 of image ", "a.json: annotation 1 of the list")
        )
        return
    strip = [{k: v for k, v in annotation.items() if k != "id"} for annotation in found]
    others = [whole["annotations"][number] for number in (0, 2, 3)]
    assert all({k: v for k, v in other.items() if k != "id"} in strip for other in others)
    ids = [annotation["id"] for annotation in found]
    assert len(found) in (3, 4) and len(set(ids)) == len(ids) and all(isinstance(i, int) and i for i in ids)
    for annotation in found:
        assert annotation["iscrowd"] in (0, 1) and annotation["area"] >= 0 and min(annotation["bbox"][2:]) > 0
        assert annotation.get("segmentation") or not masks


@given(
    st.sampled_from([("images", "id"), ("images", "file_name"), ("images", "height"), ("images", "width"),
                     ("categories", "id"), ("categories", "name")]),
    BROKEN,
)  # fmt: skip
def test_a_broken_image_or_category_is_named(
    tmp_path_factory: pytest.TempPathFactory, field: tuple, value: Any
) -> None:
    broken, (key, name) = content(2), field
    if value == "missing":
        del broken[key][1][name]
    else:
        broken[key] = [broken[key][0], broken[key][1] | {name: value}]
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(broken))
    found, message = attempt(lambda: read_annotations(path))
    if message:
        assert str(path) in message and "\n" not in message
        return
    assert len({entry["id"] for entry in found[key]}) == 2
    assert all(isinstance(entry.get("name", ""), str) for entry in found["categories"])
    assert all(
        isinstance(entry["file_name"], str) and entry["height"] > 0 < entry["width"] for entry in found["images"]
    )


def test_neither_hosts_nor_pycocotools_are_imported() -> None:
    code = (
        "import sys, apt_dense; before = set(sys.modules); import apt_dense.hosts.coco; "
        "assert not {'pycocotools', 'detectron2', 'mmseg', 'cv2'} & (set(sys.modules) - before)"
    )
    assert run_fresh(code).returncode == 0


def test_data_may_decide_whether_there_are_masks(tmp_path: Path) -> None:
    """If any object has one, all need one."""

    def drop(number: int) -> Callable[[dict], None]:
        return lambda content: [entry.update(segmentation=[]) for entry in content["annotations"][number:]]

    for name, first, expected in (("none", 0, False), ("all", 99, True)):
        root = write_coco(tmp_path / name, change=drop(first))
        assert load_split(root, "train", masks=None).has_masks is expected
    with pytest.raises(ValueError, match="has no segmentation"):
        load_split(write_coco(tmp_path / "some", change=drop(1)), "train", masks=None)
    assert not load_split(tmp_path / "some", "train", masks=False).has_masks
