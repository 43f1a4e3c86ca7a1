"""The demo data tool: what it writes, that it can be repeated, and what it says to bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

TOOLS = Path(__file__).parents[2] / "tools"
import make_demo_data as tool

from demo import dataset, photographs, scenes
from demo.dataset import coco_annotations, make_demo_data, mask_polygons

SMALL = {"train": 3, "val": 2, "size": 128}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of scikit-image's photographs; the tests only read it."""
    pytest.importorskip("skimage")
    out = tmp_path_factory.mktemp("shipped") / "demo"
    make_demo_data(out, **SMALL)
    return out


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of four photographs in four pixel formats, next to a file that is not one."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    colours = rng.integers(0, 256, (90, 120, 4), dtype=np.uint8)
    cv2.imwrite(str(folder / "a colour.jpg"), colours[..., :3])
    cv2.imwrite(str(folder / "b alpha.png"), colours)
    cv2.imwrite(str(folder / "c grey.PNG"), colours[..., 0])
    cv2.imwrite(str(folder / "d sixteen.tif"), colours[..., :3].astype(np.uint16) * 257)
    (folder / "notes.txt").write_text("no photograph")
    return folder


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def masks(root: Path, split: str) -> list[np.ndarray]:
    paths = sorted((root / "annotations" / split).iterdir())
    return [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in paths]


def only_error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command line, expect it to fail, and return what it says."""
    with pytest.raises(SystemExit) as stop:
        tool.main([str(argument) for argument in arguments])
    assert stop.value.code not in (0, None)
    return str(stop.value.code) + capsys.readouterr().err


def test_layout_is_ade20k_and_coco(shipped: Path) -> None:
    names = {path for path in files(shipped) if "scene" not in path}
    assert names == {"classes.txt", "coco/annotations/instances_train.json", "coco/annotations/instances_val.json"}
    for split, count in (("training", 3), ("validation", 2)):
        stems = [f"scene_{index:05d}" for index in range(count)]
        assert sorted(path.name for path in (shipped / "images" / split).iterdir()) == [f"{s}.jpg" for s in stems]
        assert sorted(path.name for path in (shipped / "annotations" / split).iterdir()) == [f"{s}.png" for s in stems]
    assert not shipped.with_name("demo.partial").exists()


def test_labels_are_one_byte_from_background_to_last_class(shipped: Path) -> None:
    classes = (shipped / "classes.txt").read_text().splitlines()
    assert classes[0] == "background" and 6 <= len(classes) <= 10 and len(set(classes)) == len(classes)
    seen = masks(shipped, "training") + masks(shipped, "validation")
    assert all(mask.dtype == np.uint8 and mask.ndim == 2 for mask in seen)
    values = np.unique(np.concatenate([mask.ravel() for mask in seen]))
    assert values[0] == 1 and 1 < values[-1] <= len(classes)


def test_sizes_vary_around_the_one_asked_for_and_fit_their_masks(shipped: Path) -> None:
    sizes = []
    for picture in sorted((shipped / "images" / "training").iterdir()):
        image = cv2.imread(str(picture), cv2.IMREAD_UNCHANGED)
        assert image.ndim == 3
        sizes.append(image.shape[:2])
    assert sizes == [mask.shape for mask in masks(shipped, "training")]
    assert all(108 <= side <= 148 for size in sizes for side in size) and len(set(sizes)) == 3


def test_scenes_do_not_depend_on_how_many_there_are(shipped: Path, tmp_path: Path) -> None:
    make_demo_data(tmp_path / "more", train=4, val=2, size=128)
    more = files(tmp_path / "more")
    again = {name: data for name, data in files(shipped).items() if not name.endswith("_train.json")}
    assert {name: more[name] for name in again} == again


def test_same_seed_same_bytes_other_seed_other_scenes(shipped: Path, tmp_path: Path) -> None:
    make_demo_data(tmp_path / "same", **SMALL)
    make_demo_data(tmp_path / "other", **SMALL, seed=1)
    first, same, other = (files(root) for root in (shipped, tmp_path / "same", tmp_path / "other"))
    assert same == first
    assert all(other[name] != first[name] for name in first if name.endswith(".jpg"))


def test_validation_scenes_are_not_training_scenes(shipped: Path) -> None:
    pictures = [data for name, data in files(shipped).items() if name.endswith(".jpg")]
    assert len(set(pictures)) == 5


def test_coco_instances_are_the_semantic_mask(shipped: Path) -> None:
    """Rasterised by pycocotools, an independent oracle, each polygon is the region of its class in the mask."""
    COCO = pytest.importorskip("pycocotools.coco").COCO
    coco = COCO(str(shipped / "coco" / "annotations" / "instances_train.json"))
    classes = (shipped / "classes.txt").read_text().splitlines()
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == classes[1:]
    for entry, labels in zip(coco.loadImgs(coco.getImgIds()), masks(shipped, "training"), strict=True):
        assert labels.shape == (entry["height"], entry["width"])
        covered = np.zeros(labels.shape, int)
        for annotation in coco.loadAnns(coco.getAnnIds(entry["id"])):
            mask = coco.annToMask(annotation).astype(bool)
            covered += mask
            assert mask.sum() == pytest.approx(annotation["area"], rel=0.02) and annotation["area"] >= 64
            assert np.mean(labels[mask] == annotation["category_id"] + 1) > 0.98
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert annotation["bbox"] == pytest.approx(box, abs=1) and annotation["iscrowd"] == 0
        assert np.mean((covered == 1) == (labels > 1)) > 0.99


def test_polygons_follow_the_edges_of_pixels() -> None:
    mask = np.zeros((5, 6), np.uint8)
    mask[1, 2] = 1
    points = np.reshape(mask_polygons(mask, left=10, top=20), (-1, 2))
    assert {tuple(point) for point in points} == {(12, 21), (13, 21), (13, 22), (12, 22)}
    mask[3:5, 3:6] = 1
    assert len(mask_polygons(mask)) == 2
    assert mask_polygons(np.zeros((3, 3), np.uint8)) == []


def test_hidden_objects_are_no_instances_but_stay_in_the_mask() -> None:
    instances = np.zeros((40, 40), np.int32)
    instances[:20, :20], instances[30:33, 30:33] = 1, 2
    scene = scenes.Scene(np.zeros((40, 40, 3), np.uint8), instances, categories=(3, 5))
    assert [entry["category_id"] for entry in coco_annotations(scene)] == [3]
    assert scene.labels[31, 31] == 6 and scene.labels[0, 0] == 4 and scene.labels[25, 25] == 1


@pytest.mark.parametrize("left, target, source", [(-1, (0, 3), (1, 4)), (3, (3, 7), (0, 4)), (8, (8, 10), (0, 2))])
def test_patches_are_cut_at_the_border(left: int, target: tuple[int, int], source: tuple[int, int]) -> None:
    inside, shown = scenes.overlap_slices((5, 10), (5, 4), 0, left)
    assert (inside[1], shown[1]) == (slice(*target), slice(*source))


def test_every_photograph_of_a_folder_is_a_class(photos: Path, tmp_path: Path) -> None:
    names = make_demo_data(tmp_path / "demo", images=photos, **SMALL)
    assert names == ["background", "a colour", "b alpha", "c grey", "d sixteen"]
    written = json.loads((tmp_path / "demo" / "coco" / "annotations" / "instances_val.json").read_text())
    assert [category["name"] for category in written["categories"]] == names[1:]


def test_photographs_are_read_as_eight_bit_rgb(photos: Path) -> None:
    colour, alpha, grey, sixteen = (photographs.read_material(path) for path in sorted(photos.glob("* *")))
    assert all(image.shape == (90, 120, 3) and image.dtype == np.uint8 for image in (colour, alpha, grey, sixteen))
    np.testing.assert_array_equal(alpha, sixteen)
    np.testing.assert_array_equal(grey[..., 0], alpha[..., 2])  # the grey file holds the blue channel


def test_classes_of_equal_stems_have_different_names(photos: Path, tmp_path: Path) -> None:
    (photos / "a colour.jpg").rename(photos / "b alpha.jpg")
    (photos / "c grey.PNG").rename(photos / "background.png")
    names = make_demo_data(tmp_path / "demo", images=photos, **SMALL)
    assert names == ["background", "b alpha.jpg", "b alpha.png", "background.png", "d sixteen"]


@pytest.mark.parametrize("shape", [(64, 900, 3), (900, 64, 3), (64, 64, 3)])
def test_small_and_long_photographs_will_do(shape: tuple[int, ...], tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "one.png"), np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    assert make_demo_data(tmp_path / "demo", images=tmp_path, **SMALL) == ["background", "one"]


def test_main_prints_one_summary(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool.main([str(tmp_path / "demo"), "--images", str(photos), "--train", "2", "--val", "1", "--size", "96"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "2 + 1 scenes" in lines[0] and "a colour" in lines[0]


def test_missing_and_empty_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = only_error(capsys, tmp_path / "demo", "--images", tmp_path / "nowhere")
    assert "nowhere is not a folder" in message
    (tmp_path / "empty").mkdir()
    assert "empty holds no photographs" in only_error(capsys, tmp_path / "demo", "--images", tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


@pytest.mark.parametrize("content", [b"", b"text", "cut.jpg", "cut.png"])
def test_broken_photographs_are_named(content: bytes | str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if isinstance(content, str):
        whole = cv2.imencode(Path(content).suffix, np.random.default_rng(0).integers(0, 256, (99, 99, 3)))[1].tobytes()
        content = whole[: len(whole) * 9 // 10]
    name = "broken.jpg"
    (photos / name).write_bytes(content)
    message = only_error(capsys, photos.with_name("demo"), "--images", photos)
    assert name in message and "remove it or save it again" in message
    assert not photos.with_name("demo").exists()


def test_tiny_photographs_are_named(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cv2.imwrite(str(photos / "icon.png"), np.zeros((16, 100, 3), np.uint8))
    assert "icon.png is 100 x 16 pixels" in only_error(capsys, photos.with_name("demo"), "--images", photos)


def test_missing_scikit_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install scikit-image"):
        make_demo_data(tmp_path / "demo")


@pytest.mark.parametrize("option, value", [("train", 0), ("val", -1), ("size", 63), ("seed", -1)])
def test_numbers_out_of_range(option: str, value: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = only_error(capsys, tmp_path / "demo", f"--{option}", value)
    assert f"--{option} is {value}; it must be at least" in message


def test_an_existing_folder_is_replaced_only_by_force(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = photos.with_name("demo")
    make_demo_data(out, images=photos, **SMALL)
    before = files(out)
    message = only_error(capsys, out, "--images", photos)
    assert "exists; pass --force to replace it or choose another folder" in message and files(out) == before
    make_demo_data(out, images=photos, **SMALL, seed=5, force=True)
    assert files(out).keys() == before.keys() and files(out) != before
    assert sorted(path.name for path in out.parent.iterdir()) == ["demo", "photos"]


def test_force_never_deletes_other_files(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = photos.with_name("demo")
    make_demo_data(out, images=photos, **SMALL)
    (out / "checkpoint.pth").write_text("precious")
    assert "holds more than a data set" in only_error(capsys, out, "--force", "--images", photos)
    assert "lie inside the output folder" in only_error(capsys, photos.parent, "--force", "--images", photos)
    assert (out / "checkpoint.pth").is_file() and (photos / "notes.txt").is_file()


def test_an_interrupted_run_leaves_nothing_that_looks_finished(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = photos.with_name("demo")
    write, calls = dataset.write_image, []

    def write_three(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) > 3:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(dataset, "write_image", write_three)
    with pytest.raises(KeyboardInterrupt):
        make_demo_data(out, images=photos, **SMALL)
    assert not out.exists() and out.with_name("demo.partial").is_dir()
    monkeypatch.undo()
    make_demo_data(out, images=photos, **SMALL)
    assert len(masks(out, "training")) == 3 and not out.with_name("demo.partial").exists()


def test_a_failing_disk_is_one_line(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "scene_00000.jpg")

    monkeypatch.setattr(dataset, "write_image", fail)
    with pytest.raises(SystemExit, match="No space left on device.*scene_00000.jpg"):
        tool.main([str(photos.with_name("demo")), "--images", str(photos)])


def test_it_runs_as_a_script() -> None:
    done = subprocess.run(
        [sys.executable, TOOLS / "make_demo_data.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "--images DIR" in done.stdout
