"""Runs of Detectron2, lazy and yacs, loaded again: the same detections as in a test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed (it is built from source, see its INSTALL page)")

import measure_accuracy
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import nn

from apt_dense.hosts.detectron2 import add_apt_config, save_run_config
from apt_dense.hosts.detectron2.load_trained_detector import load_trained_detector
from apt_dense.hosts.load_trained import load_trained
from apt_dense.hosts.trained_model_types import Detections

from support.families import HEADS, timm_model
from support.references import randomise
from support.tiny_coco import ADAPTIVE, ROOT, TINY_YACS, one_thread, tiny_config, write_coco  # noqa: F401 (an automatic fixture)

PHOTO = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
PHOTO[:, :30] = 90


def write_lazy_run(folder: Path, *overrides: str) -> nn.Module:
    """Write the folder of a run of random weights; return its model."""
    cfg = tiny_config(ADAPTIVE, "model.roi_heads.num_classes=3", *overrides)
    model = randomise(instantiate(cfg.model)).eval()
    folder.mkdir()
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    torch.save({"model": model.state_dict(), "iteration": 7}, folder / "model_0000007.pth")
    (folder / "last_checkpoint").write_text("model_0000007.pth")
    return model


def expect(found: Detections, instances: object) -> None:
    assert len(found.boxes) == len(instances) > 0
    order = torch.argsort(instances.scores, descending=True, stable=True)
    assert np.array_equal(found.boxes, instances.pred_boxes.tensor[order])
    assert np.array_equal(found.labels, instances.pred_classes[order])
    assert np.array_equal(found.masks, instances.pred_masks[order])


def test_a_photo_gets_the_detections_of_a_test(tmp_path: Path) -> None:
    model = write_lazy_run(tmp_path / "run", "model.roi_heads.box_predictor.test_score_thresh=0.0")
    resize = ResizeShortestEdge(128, 128).get_transform(PHOTO)
    image = torch.from_numpy(resize.apply_image(PHOTO).transpose(2, 0, 1).copy()).float()
    with torch.no_grad():
        expected = model([{"image": image, "height": 60, "width": 80}])[0]["instances"]
    for path in (tmp_path / "run", tmp_path / "run" / "model_0000007.pth"):
        trained = load_trained_detector(path)
        expect(trained.predict(PHOTO, 0), expected)
        assert trained.class_names == ("class 0", "class 1", "class 2") and trained.category_ids == (1, 2, 3)
        assert trained.backbone is trained.model.backbone.net and not trained.model.training


def test_photos_are_seen_at_another_size(tmp_path: Path) -> None:
    more = "model.roi_heads.box_predictor.test_score_thresh=0.0", "model.backbone.square_pad=128"
    model = write_lazy_run(tmp_path / "run", *more)
    trained, seen = load_trained_detector(tmp_path / "run"), []
    trained.model.backbone.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape[-2:])))
    at_full_size = trained.predict(PHOTO, 0)
    trained.scale_photos(0.55)
    model.backbone._square_pad = 96  # 70 pixels, in whole strides of the coarsest level
    image = torch.from_numpy(
        ResizeShortestEdge(70, 70).get_transform(PHOTO).apply_image(PHOTO).transpose(2, 0, 1).copy()
    )
    with torch.no_grad():
        expect(trained.predict(PHOTO, 0), model([{"image": image.float(), "height": 60, "width": 80}])[0]["instances"])
    trained.scale_photos(1)
    assert np.array_equal(trained.predict(PHOTO, 0).boxes, at_full_size.boxes)
    assert seen == [(128, 128), (96, 96), (128, 128)]


def test_a_run_is_switched_without_training(tmp_path: Path) -> None:
    """tools/measure_accuracy.py boxes, on photos that are padded to a square."""
    data = write_coco(tmp_path / "coco")
    write_lazy_run(tmp_path / "run", "model.backbone.square_pad=128", "model.backbone.net.thresholds=[]")
    argv = ["boxes", "--run", str(tmp_path / "run"), "--coco", str(data), "--shares", "0.6", "--device", "cpu"]
    measure_accuracy.main([*argv, "--out", str(tmp_path / "out")])
    rows = [json.loads(line)["results"] for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    uniform, smaller, adaptive = rows
    assert uniform["tokens"] == 1 and {"AP", "mask AP"} <= uniform.keys()
    assert smaller["tokens"] == pytest.approx(0.6, abs=0.05) and smaller["factor"] < 0.78
    assert 0.5 < adaptive["tokens"] <= 0.6 and len(adaptive["thresholds"]) == 1


@pytest.mark.parametrize(
    "override",
    ["dataloader.test.mapper.augmentations=[]", "dataloader.test.mapper.augmentations.0.short_edge_length=0"],
)
def test_photos_without_a_size_are_not_scaled(override: str, tmp_path: Path) -> None:
    write_lazy_run(tmp_path / "run", override)
    with pytest.raises(ValueError, match="the run does not resize photos, so there is no size to scale"):
        load_trained_detector(tmp_path / "run").scale_photos(0.5)


def test_a_lazy_config_that_is_named_is_used(tmp_path: Path) -> None:
    write_lazy_run(tmp_path / "run")
    expected = load_trained_detector(tmp_path / "run").predict(PHOTO, 0)
    (tmp_path / "run" / "config.yaml").rename(tmp_path / "own.yaml")
    with pytest.raises(FileNotFoundError, match="config.yaml does not exist"):
        load_trained_detector(tmp_path / "run")
    found = load_trained_detector(tmp_path / "run", str(tmp_path / "own.yaml")).predict(PHOTO, 0)
    assert np.array_equal(found.boxes, expected.boxes)


def test_runs_of_default_trainer(tmp_path: Path) -> None:
    cfg = get_cfg()
    add_apt_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "detectron2" / "mask_rcnn_apt_vitdet_b.yaml"))
    cfg.merge_from_list([*TINY_YACS, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "INPUT.MIN_SIZE_TEST", 100])
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    torch.save({"model": randomise(build_model(cfg)).state_dict()}, cfg.MODEL.WEIGHTS)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    expected = DefaultPredictor(cfg)(PHOTO[..., ::-1].copy())["instances"]
    trained = load_trained_detector(tmp_path)
    expect(trained.predict(PHOTO, 0), expected)
    (tmp_path / "config.yaml").write_text("MODEL: {META_ARCHITECTURE: os.mkdir}\n")
    with pytest.raises(ValueError, match="its model cannot be built.*os.mkdir"):
        load_trained_detector(tmp_path)


def test_a_run_of_default_trainer_that_a_file_described(tmp_path: Path) -> None:
    """Its config is saved by hand, and the file that training started from is gone."""
    file = tmp_path / "dinov2.pth"
    torch.save(dict(timm_model("dinov2").state_dict()), file)
    write_coco(tmp_path / "coco", images=2)
    register_coco_instances("own", {}, str(tmp_path / "coco" / "annotations" / "instances_train2017.json"), "x")
    cfg = get_cfg()
    add_apt_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "detectron2" / "mask_rcnn_apt_vitdet_b.yaml"))
    cfg.merge_from_list([*TINY_YACS, "MODEL.APT.PRETRAINED.FILE", str(file), "MODEL.APT.PRETRAINED.NUM_HEADS", HEADS])
    cfg.merge_from_list(["MODEL.APT.PRETRAINED.PATCH_SIZE", 16, "INPUT.MIN_SIZE_TEST", 100, "DATASETS.TRAIN", ("own",)])
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, cfg.OUTPUT_DIR = 0.0, str(tmp_path / "run")
    model = randomise(build_model(cfg)).eval()
    file.unlink()
    save_run_config(cfg)
    DetectionCheckpointer(model, cfg.OUTPUT_DIR).save("model_final")
    DatasetCatalog.remove("own"), MetadataCatalog.remove("own")
    trained = load_trained(tmp_path / "run")
    assert trained.class_names == ("red", "green", "blue") and trained.category_ids == (3, 7, 20)
    resized = ResizeShortestEdge([100, 100], 1024).get_transform(PHOTO).apply_image(PHOTO)
    image = torch.from_numpy(resized.transpose(2, 0, 1).copy()).float()
    with torch.no_grad():
        expect(trained.predict(PHOTO, 0), model([{"image": image, "height": 60, "width": 80}])[0]["instances"])
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.yaml does not exist.*save_run_config\(cfg\)"):
        load_trained(tmp_path / "run")


def test_what_does_not_fit(tmp_path: Path) -> None:
    write_lazy_run(tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("depth: 2", "depth: 3"))
    with pytest.raises(ValueError, match="does not fit"):
        load_trained_detector(tmp_path / "run")
    (tmp_path / "run" / "last_checkpoint").write_text("../other/model.pth")
    with pytest.raises(FileNotFoundError, match="no model_final.pth"):
        load_trained_detector(tmp_path / "run")


@pytest.mark.parametrize(("mapper", "model"), [("RGB", "RGB"), ("BGR", "RGB"), ("RGB", "BGR"), ("BGR", "BGR")])
def test_photos_are_ordered_as_the_run_read_its_pictures(mapper: str, model: str, tmp_path: Path) -> None:
    """``model.input_format`` only says in what order Detectron2 draws."""
    formats = (f"dataloader.test.mapper.image_format={mapper}", f"model.input_format={model}")
    write_lazy_run(tmp_path / "run", *formats)
    trained, seen = load_trained_detector(tmp_path / "run"), []
    trained.model.forward = lambda inputs: seen.append(inputs[0]["image"]) or [{"instances": Instances((60, 80))}]
    with pytest.raises(AttributeError):  # it found nothing at all
        trained.predict(PHOTO)
    resized = ResizeShortestEdge(128, 128).get_transform(PHOTO).apply_image(PHOTO)
    expected = resized if mapper == "RGB" else resized[..., ::-1]
    assert np.array_equal(seen[0].numpy(), expected.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataloader.test.mapper.image_format=L", "read pictures as 'L'; photos can be given as RGB or BGR"),
        ("dataloader.test.mapper.image_format=YUV-BT.601", "read pictures as 'YUV-BT.601'"),
        (
            "dataloader.test.mapper.augmentations=[{_target_: detectron2.data.transforms.Resize, shape: [64, 64]}]",
            "go through .*Resize.*only go through ResizeShortestEdge",
        ),
    ],
)
def test_runs_that_saw_pictures_in_another_way(override: str, message: str, tmp_path: Path) -> None:
    write_lazy_run(tmp_path / "run", override)
    with pytest.raises(ValueError, match=message):
        load_trained_detector(tmp_path / "run")
