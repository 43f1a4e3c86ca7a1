"""Masks and folders that MMSeg would get wrong or fail on late are refused with a helpful message."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from support.tiny_ade import CONFIGS, write_ade, write_mask

pytest.importorskip("mmseg", reason="apt_dense.hosts.mmseg.dataset_checks checks data for MMSeg")

from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS as STEPS

from apt_dense.hosts.mmseg.dataset_checks import CheckLabels, check_data, dataset_configs
from apt_dense.hosts.mmseg.training_config import load_config


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    return write_ade(tmp_path / "ade")


def load_and_check(path: Path, num_classes: int = 150, reduce_zero_label: bool = True) -> dict:
    results = dict(seg_map_path=str(path), reduce_zero_label=reduce_zero_label, seg_fields=[])
    return CheckLabels(num_classes).transform(LoadAnnotations().transform(results))


def config(ade: Path, **options: object) -> Config:
    init_default_scope("mmseg")
    return load_config(str(CONFIGS[0]), options, data_root=str(ade))


@pytest.mark.parametrize("labels", [[0], [0, 1, 150], [255, 0], [150], [255]])
def test_all_labels_of_ade20k_pass(ade: Path, labels: list[int]) -> None:
    path = write_mask(ade, np.resize(np.uint8(labels), (5, 7)))
    results = load_and_check(path)
    assert set(np.unique(results["gt_seg_map"])) == {
        (label - 1) % 256 if label not in (0, 255) else 255 for label in labels
    }


def test_an_empty_mask_passes() -> None:
    results = dict(gt_seg_map=np.zeros((0, 4), np.uint8))
    assert CheckLabels(2).transform(results) is results


def test_label_above_the_range_names_file_label_and_range(ade: Path) -> None:
    mask = np.full((4, 4), 7, np.uint8)
    mask[1, 2] = 151
    path = write_mask(ade, mask)
    with pytest.raises(ValueError, match=r"label 150 .* 151 in the file, only 0 to 149 and 255") as raised:
        load_and_check(path)
    assert str(path) in str(raised.value)


def test_label_is_named_as_in_the_file_where_nothing_was_subtracted(ade: Path) -> None:
    path = write_mask(ade, np.uint8([[0, 2], [200, 255]]))
    with pytest.raises(ValueError, match="label 2, only 0 to 1 .* wrong labels in this mask: 2, up to 200"):
        load_and_check(path, num_classes=2, reduce_zero_label=False)


def test_sixteen_bit_labels_do_not_wrap_around(ade: Path) -> None:
    assert load_and_check(write_mask(ade, np.uint16([[0, 150], [1, 2]])))["gt_seg_map"].tolist() == [[255, 149], [0, 1]]
    with pytest.raises(ValueError, match="label 257 in a mask of more than 8 bits"):
        load_and_check(write_mask(ade, np.uint16([[0, 257], [1, 2]])))


def test_colour_masks_are_refused(ade: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 5, 3\), but one label per pixel"):
        load_and_check(write_mask(ade, np.zeros((4, 5, 3), np.uint8)))


@pytest.mark.parametrize("num_classes", [0, 256])
def test_num_classes_must_fit_8_bits(num_classes: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 255"):
        CheckLabels(num_classes)


def test_complete_folder_passes(ade: Path) -> None:
    check_data(config(ade), ("train", "val", "test"))


def test_missing_folder_names_it_the_layout_and_the_option(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        check_data(config(tmp_path / "nowhere"), ("train",))
    message = str(raised.value)
    for part in (
        f"{tmp_path}/nowhere/images/training",
        "annotations/training/NAME.png",
        "--data-root DIR",
        "train data",
    ):
        assert part in message


def test_empty_folder_is_named(ade: Path) -> None:
    shutil.rmtree(ade / "images" / "validation")
    (ade / "images" / "validation").mkdir()
    check_data(config(ade), ("train",))
    with pytest.raises(FileNotFoundError, match=r"images/validation holds no file \*.jpg"):
        check_data(config(ade), ("train", "val"))


def test_image_without_mask_is_named(ade: Path) -> None:
    (ade / "annotations" / "training" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 images have no mask, the first is 1.jpg"):
        check_data(config(ade), ("train",))


def test_missing_list_of_images_is_named(ade: Path) -> None:
    with pytest.raises(FileNotFoundError, match="list of images .*some.txt does not exist"):
        check_data(config(ade, **{"train_dataloader.dataset.ann_file": "some.txt"}), ("train",))


@pytest.mark.parametrize("key", ["model.decode_head.num_classes", "train_dataloader.dataset.pipeline.2.num_classes"])
def test_numbers_of_classes_must_agree(ade: Path, key: str) -> None:
    with pytest.raises(ValueError, match="has num_classes=19, but ADE20KDataset has 150"):
        check_data(config(ade, **{key: 19}), ("train",))


@pytest.mark.parametrize("kind", ["LoadAnnotations", "mmseg.LoadAnnotations", LoadAnnotations], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_labels_are_checked_where_a_pipeline_does_not(ade: Path, kind: object, nested: bool) -> None:
    write_mask(ade, np.resize(np.uint8([1, 151, 200]), (64, 96)))
    load, pack = dict(type=kind), dict(type="PackSegInputs")
    steps = [dict(type="TestTimeAug", transforms=[[load], [pack]])] if nested else [load, pack]
    pipeline = [dict(type="LoadImageFromFile"), *steps]
    cfg = config(ade, **{"train_dataloader.dataset.pipeline": pipeline})
    with pytest.raises(ValueError, match="label 150 .* 151 in the file, only 0 to 149"):
        check_data(cfg, ("train",))


def test_labels_stay_unchecked_where_a_step_of_ones_own_may_change_them(ade: Path) -> None:
    @STEPS.register_module(force=True)
    class LowerLabels(BaseTransform):
        def transform(self, results: dict) -> dict:
            return results

    write_mask(ade, np.resize(np.arange(152, dtype=np.uint8), (64, 96)))
    pipeline = [dict(type=name) for name in ("LoadImageFromFile", "LoadAnnotations", "LowerLabels")]
    check_data(config(ade, **{"train_dataloader.dataset.pipeline": pipeline}), ("train",))


def test_dataset_configs_looks_through_wrappers() -> None:
    inner = [dict(data_prefix=dict(img_path=name)) for name in "ab"]
    wrapped = dict(type="RepeatDataset", dataset=dict(type="ConcatDataset", datasets=inner))
    assert list(dataset_configs(dict(dataset=wrapped))) == inner
    assert list(dataset_configs(None)) == []
