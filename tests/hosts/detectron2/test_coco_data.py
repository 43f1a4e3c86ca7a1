"""Registering a folder in COCO's layout: names, classes, records, what is evaluated; tests/hosts/test_coco.py has the
folders and files that are refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from omegaconf import OmegaConf

from apt_dense.hosts.coco import load_split
from apt_dense.hosts.detectron2.coco_data import check_data, records, use_data_root
from apt_dense.hosts.detectron2.train_and_evaluate import apply_overrides, load_config

from support.tiny_coco import ADAPTIVE, write_coco


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


TRAIN, VAL = Path("annotations/instances_train2017.json"), Path("annotations/instances_val2017.json")


def test_data_root_sets_names_classes_and_evaluator(coco: Path) -> None:
    cfg = load_config(str(ADAPTIVE))
    for _ in range(2):  # a second time in the same process is no conflict
        use_data_root(cfg, str(coco), ["train", "val"])
    assert cfg.model.roi_heads.num_classes == 3
    assert cfg.dataloader.evaluator.dataset_name == cfg.dataloader.test.dataset.names
    images = DatasetCatalog.get(cfg.dataloader.train.dataset.names)
    assert {thing["category_id"] for image in images for thing in image["annotations"]} == {0, 1, 2}
    assert MetadataCatalog.get(cfg.dataloader.train.dataset.names).thing_classes == ["red", "green", "blue"]


def test_records_are_detectron2_s_own(coco: Path, tmp_path: Path) -> None:
    """Those of its ``load_coco_json`` where nothing is left out, run lengths included."""
    crowd = {"counts": [0, 90 * 50, 120 * 90 - 90 * 50], "size": [120, 90]}
    root = shutil.copytree(coco, tmp_path / "crowd")
    extra = {"bbox": [0, 0, 50, 90], "iscrowd": 1, "segmentation": crowd, "category_id": 7, "image_id": 1, "id": 99}
    rewrite(root / TRAIN, lambda c: c["annotations"].append({**extra, "area": 4500}))
    assert records(load_split(root, "train")) == load_coco_json(str(root / TRAIN), str(root / "train2017"), "oracle")


def test_evaluation_reads_the_annotations_that_can_be_used(coco: Path, tmp_path: Path) -> None:
    root = shutil.copytree(coco, tmp_path / "data")
    cfg = load_config(str(ADAPTIVE))
    use_data_root(cfg, str(root), ["train", "val"])
    metadata = MetadataCatalog.get(cfg.dataloader.evaluator.dataset_name)
    assert metadata.json_file == str(root / VAL)
    rewrite(root / VAL, lambda c: c["annotations"][0].update(bbox=[1, 1, 0, 5]))
    use_data_root(cfg, str(root), ["train", "val"])
    judged_by = Path(MetadataCatalog.get(cfg.dataloader.evaluator.dataset_name).json_file)
    assert json.loads(judged_by.read_text()) == load_split(root, "val").content
    assert judged_by != root / VAL and check_data(cfg, ["val"]) is None


def test_boxes_without_masks_are_for_models_without_masks(coco: Path, tmp_path: Path) -> None:
    root, cfg = shutil.copytree(coco, tmp_path / "data"), load_config(str(ADAPTIVE))
    rewrite(root / TRAIN, lambda c: [a.pop("segmentation") for a in c["annotations"]])
    with pytest.raises(ValueError, match="has no segmentation"):
        use_data_root(cfg, str(root), ["train"])
    cfg.model.roi_heads.mask_head = None
    use_data_root(cfg, str(root), ["train"])
    assert "segmentation" not in DatasetCatalog.get(cfg.dataloader.train.dataset.names)[0]["annotations"][0]


@pytest.mark.parametrize("as_list", [True, False])
def test_evaluators_may_be_a_list(coco: Path, as_list: bool) -> None:
    cfg = load_config(str(ADAPTIVE))
    if as_list:
        cfg.dataloader.evaluator = [cfg.dataloader.evaluator]
    use_data_root(cfg, str(coco), ["val"])
    evaluator = cfg.dataloader.evaluator[0] if as_list else cfg.dataloader.evaluator
    assert evaluator.dataset_name == cfg.dataloader.test.dataset.names
    cfg.dataloader.evaluator = None
    use_data_root(cfg, str(coco), ["val"])


@pytest.mark.parametrize("key", ["num_classes", "head.num_classes"])
def test_classes_of_one_stage_detectors(coco: Path, key: str) -> None:
    cfg = load_config(str(ADAPTIVE))
    cfg.model = {}
    OmegaConf.update(cfg, f"model.{key}", 80, force_add=True)
    use_data_root(cfg, str(coco), ["train"])
    assert OmegaConf.select(cfg, f"model.{key}") == 3


def test_a_model_without_a_number_of_classes_is_named(coco: Path) -> None:
    cfg = load_config(str(ADAPTIVE))
    cfg.model = {"backbone": {}}
    with pytest.raises(
        ValueError, match="the config has none of model.roi_heads.num_classes, .*; set one of them to 3"
    ):
        use_data_root(cfg, str(coco), ["train"])


def test_classes_without_objects(coco: Path, tmp_path: Path) -> None:
    root, cfg = shutil.copytree(coco, tmp_path / "data"), load_config(str(ADAPTIVE))
    rewrite(root / TRAIN, lambda c: [a.update(category_id=3) for a in c["annotations"]])
    with pytest.raises(ValueError, match=r"has none of 2 classes: green \(0 of 0\), blue \(0 of 0\)"):
        use_data_root(cfg, str(root), ["train"])
    use_data_root(cfg, str(root), ["train"], every_class=False)
    assert len(DatasetCatalog.get(cfg.dataloader.train.dataset.names)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"].clear(), "has no objects"),
        (
            lambda c: c["annotations"][0].update(segmentation={"size": [120, 90], "counts": [5]}),
            "10800 pixels",
        ),
        (lambda c: c["images"][0].pop("height"), "has the height and width"),
        (lambda c: c["images"][0].update(width=7), "but .* says"),
        (lambda c: c["annotations"][0].update(bbox=["a"]), "expected four numbers"),
    ],
)
def test_registered_files_are_checked_as_folders_are(
    coco: Path, tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    root, cfg = shutil.copytree(coco, tmp_path / "data"), load_config(str(ADAPTIVE))
    name = f"mine_{tmp_path.name}"
    register_coco_instances(name, {}, str(root / TRAIN), str(root / "train2017"))
    cfg.dataloader.train.dataset.names = name
    check_data(cfg, ["train"])
    rewrite(root / TRAIN, change)
    with pytest.raises(ValueError, match=message):
        check_data(cfg, ["train"])


def test_registered_files_that_need_correction_are_named(
    coco: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, cfg = shutil.copytree(coco, tmp_path / "data"), load_config(str(ADAPTIVE))
    rewrite(root / TRAIN, lambda c: c["annotations"][0].pop("area"))
    register_coco_instances("mine_incomplete", {}, str(root / TRAIN), str(root / "train2017"))
    cfg.dataloader.train.dataset.names = "mine_incomplete"
    check_data(cfg, ["train"])
    assert "area missing" in caplog.text and "with --data-root" in caplog.text


def test_registered_data_sets_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(str(ADAPTIVE))
    with pytest.raises(FileNotFoundError, match="'coco_2017_train' needs .*Set .* DETECTRON2_DATASETS"):
        check_data(cfg, ["train"])
    with pytest.raises(ValueError, match="data set 'mine' is not registered"):
        apply_overrides(cfg, ["dataloader.train.dataset.names=mine"])
        check_data(cfg, ["train"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install shapely"):
        check_data(cfg, ["train"])


def test_classes_of_model_and_data_set_must_agree(coco: Path) -> None:
    cfg = load_config(str(ADAPTIVE))
    use_data_root(cfg, str(coco), ["train", "val"])
    DatasetCatalog.get(cfg.dataloader.train.dataset.names)  # from here on Detectron2 knows the classes
    cfg.model.roi_heads.num_classes = 80
    with pytest.raises(ValueError, match="num_classes=80, but data set .* has 3 classes"):
        check_data(cfg, ["train"])
