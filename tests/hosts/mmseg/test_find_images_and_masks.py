"""Images and masks are found in folders of any usual names and paired by name; whatever has no partner is named."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from support.own_folder import write_own

pytest.importorskip("mmengine", reason="apt_dense.hosts.mmseg needs MMEngine")

from apt_dense.hosts.mmseg.find_images_and_masks import LAYOUTS, SPLITS, find_folders, pair_files


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
@pytest.mark.parametrize("split", SPLITS)
def test_all_layouts_and_all_names_of_a_split(layout: tuple[str, str], split: str, tmp_path: Path) -> None:
    for name in SPLITS[split]:
        root = tmp_path / name
        for folder in layout:
            (root / folder.format(name)).mkdir(parents=True)
        expected = {"img_path": layout[0].format(name), "seg_map_path": layout[1].format(name)}
        assert find_folders(root, split) == {"data_prefix": expected}


def test_pascal_voc_uses_its_lists(tmp_path: Path) -> None:
    write_own(tmp_path, count=4, folders=("JPEGImages", "SegmentationClass"), splits=("all",))
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("street_2\nstreet_0\n")
    found = find_folders(tmp_path, "train")
    assert found["data_prefix"] == {"img_path": "JPEGImages", "seg_map_path": "SegmentationClass"}
    pairs = pair_files(tmp_path / "JPEGImages", tmp_path / "SegmentationClass", tmp_path / found["ann_file"])
    assert [(image.name, mask.name) for image, mask in pairs] == [
        ("street_2.jpg", "street_2.png"), ("street_0.jpg", "street_0.png"),
    ]  # fmt: skip
    (tmp_path / found["ann_file"]).write_text("street_2\nstreet_9\n")
    with pytest.raises(FileNotFoundError, match="1 of the names in .*train.txt are not in .*JPEGImages, such as str"):
        pair_files(tmp_path / "JPEGImages", tmp_path / "SegmentationClass", tmp_path / found["ann_file"])


def test_missing_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"no val data in .*\(it holds pictures\); .* images/val with masks/val"
    ):
        find_folders(tmp_path, "val")
    with pytest.raises(FileNotFoundError, match="it does not exist"):
        find_folders(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("ending", ["", "_L", "_labelIds"])
def test_masks_may_share_an_ending(ending: str, tmp_path: Path) -> None:
    write_own(tmp_path, count=11, ending=ending)  # street_1 and street_10 begin alike
    pairs = pair_files(tmp_path / "images" / "train", tmp_path / "masks" / "train")
    assert len(pairs) == 11 and all(mask.stem == image.stem + ending for image, mask in pairs)


def test_folders_inside_are_kept_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_own(tmp_path / name, count=1)
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
            shutil.move(tmp_path / name / kind / "train", tmp_path / kind / name)
    pairs = pair_files(tmp_path / "images", tmp_path / "masks")
    assert [image.parent.name for image, _ in pairs] == [mask.parent.name for _, mask in pairs] == ["a", "b"]


def test_images_without_masks_are_an_error_and_masks_without_images_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images, masks = (write_own(tmp_path) / kind / "train" for kind in ("images", "masks"))
    (images / "street_0.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        assert len(pair_files(images, masks)) == 2
    assert "1 mask without an image, left out" in caplog.text
    (masks / "street_2.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 images in .* have no mask in .*, such as street_2.jpg"):
        pair_files(images, masks)


def test_two_pictures_of_one_name_are_an_error(tmp_path: Path) -> None:
    images, masks = (write_own(tmp_path) / kind / "train" for kind in ("images", "masks"))
    shutil.copy(images / "street_0.jpg", images / "street_0.jpeg")
    with pytest.raises(ValueError, match="street_0.jpeg and .*street_0.jpg have the same name; remove one"):
        pair_files(images, masks)


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match=r"images holds no image \(.jpg"):
        pair_files(tmp_path / "images", tmp_path / "images")
