"""The data set APTFolders: what it reads, and how it names what is wrong before and while training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.own_folder import COLOURS, SIZE, VALUES, labels_of, write_own

pytest.importorskip("mmseg", reason="the data set is one of MMSegmentation's")

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from apt_dense.hosts.mmseg.dataset_checks import check_data
from apt_dense.hosts.mmseg.own_data_dataset import APTFolders, read_own_classes
from apt_dense.hosts.readable_images import DataError

pytestmark = pytest.mark.filterwarnings("ignore")  # MMSeg's own

PIPELINE = [dict(type="LoadImageFromFile"), dict(type="APTLoadLabels")]


def data_set(root: Path, split: str = "train", **options: object) -> APTFolders:
    init_default_scope("mmseg")
    return DATASETS.build(dict(type="APTFolders", data_root=str(root), split=split, pipeline=PIPELINE, **options))


def check(root: Path, **options: object) -> None:
    init_default_scope("mmseg")
    dataset = dict(type="APTFolders", data_root=str(root), pipeline=PIPELINE, **options)
    check_data(Config(dict(model=dict(), train_dataloader=dict(dataset=dataset))), ("train",))


@pytest.mark.parametrize(("kind", "classes"), [("values", VALUES), ("colours", COLOURS), ("palette", VALUES)])
def test_images_come_with_labels_and_void(kind: str, classes: str, tmp_path: Path) -> None:
    dataset = data_set(write_own(tmp_path, kind, classes=classes))
    assert dataset.metainfo["classes"] == ("sky", "road", "car") and len(dataset.metainfo["palette"]) == 3
    sample = dataset[1]
    assert sample["img"].shape == (*SIZE, 3) and Path(sample["img_path"]).name == "street_1.jpg"
    np.testing.assert_array_equal(sample["gt_seg_map"], np.array([0, 1, 2, 255], np.uint8)[labels_of(1)])


def test_the_checks_before_training_count_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="apt_dense")
    check(write_own(tmp_path))
    assert "all 3 masks" in caplog.text and "6.2 % of the pixels are ignored (label 255)" in caplog.text


def test_all_values_that_are_not_listed_are_named_at_once(tmp_path: Path) -> None:
    write_own(tmp_path, classes="0 sky\n9 road\n")
    with pytest.raises(ValueError, match="street_0.png holds 3 values that .* does not list: 1, 2, 3; add lines"):
        check(tmp_path)


def test_a_class_without_pixels_is_named(tmp_path: Path) -> None:
    write_own(tmp_path, classes=VALUES + "4 train\n")
    with pytest.raises(ValueError, match=r"classes.txt says what the values .* None of 1 class: train"):
        check(tmp_path)


@pytest.mark.parametrize(("kind", "found"), [("values", "masks with the values 0, 1, 2, 3"), ("colours", "with col")])
def test_without_a_list_the_error_says_what_masks_hold(kind: str, found: str, tmp_path: Path) -> None:
    write_own(tmp_path, kind, classes=None)
    with pytest.raises(FileNotFoundError, match=f"classes.txt does not exist; write a line 'VALUE NAME' .*{found}"):
        read_own_classes(tmp_path)


def test_a_mask_of_another_size_is_named_in_training(tmp_path: Path) -> None:
    dataset = data_set(write_own(tmp_path))
    Image.fromarray(labels_of(0)[:50]).save(tmp_path / "masks" / "train" / "street_0.png")
    with pytest.raises(ValueError, match=r"street_0.png: the mask has height and width \(50, 128\), but its image has"):
        dataset[0]
    with pytest.raises(ValueError, match="make them equal"):
        check(tmp_path)


def test_folders_can_be_named(tmp_path: Path) -> None:
    write_own(tmp_path, folders=("rgb/{}", "truth/{}"))
    dataset = data_set(tmp_path, data_prefix=dict(img_path="rgb/val", seg_map_path="truth/val"))
    assert Path(dataset[0]["img_path"]) == tmp_path / "rgb" / "val" / "street_0.jpg"


@pytest.mark.parametrize("kind", ["values", "palette"])
@pytest.mark.parametrize("value", [4, 127, 254, 255])
def test_values_that_the_sample_missed_are_named_when_they_are_read(kind: str, value: int, tmp_path: Path) -> None:
    """Masks beyond the sample that is looked at before training."""
    dataset = data_set(write_own(tmp_path, kind))
    path = tmp_path / "masks" / "train" / "street_1.png"
    pixels = labels_of(1).astype(np.uint16 if value == 254 else np.uint8)
    pixels[3, 5] = value
    Image.fromarray(pixels).save(path)
    assert dataset[0]["gt_seg_map"].max() == 255
    with pytest.raises(DataError, match=f"street_1.png holds 1 value that .* does not list: {value}; add lines"):
        dataset[1]


@pytest.mark.parametrize("value", [256, 65535, 300])
def test_values_of_16_bits_do_not_wrap_around(value: int, tmp_path: Path) -> None:
    dataset = data_set(write_own(tmp_path, "values"))
    pixels = labels_of(1).astype(np.uint16)
    pixels[0, 0] = value
    Image.fromarray(pixels).save(tmp_path / "masks" / "train" / "street_1.png")
    with pytest.raises(DataError, match=f"street_1.png holds 1 value .* does not list: {value}"):
        dataset[1]


def test_a_colour_that_the_sample_missed_is_named_when_it_is_read(tmp_path: Path) -> None:
    dataset = data_set(write_own(tmp_path, "colours", classes=COLOURS))
    path = tmp_path / "masks" / "train" / "street_2.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0] = (1, 2, 3)
    Image.fromarray(pixels).save(path)
    with pytest.raises(DataError, match="street_2.png holds 1 colour that .* does not list: 1 2 3"):
        dataset[2]
