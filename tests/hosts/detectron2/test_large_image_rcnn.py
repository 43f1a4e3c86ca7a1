"""Images larger than the square that a pyramid pads to are seen as a whole, in the real models."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is built from source (see its INSTALL page)")

from detectron2.config import get_cfg
from detectron2.modeling import GeneralizedRCNN as PlainGeneralizedRCNN
from detectron2.modeling import build_model

from apt_dense.hosts.detectron2 import APTGeneralizedRCNN, add_apt_config
from apt_dense.hosts.detectron2.large_image_rcnn import whole_images

from support.tiny_coco import ADAPTIVE, CONFIGS, TINY_YACS, UNIFORM, load_config, one_thread, tiny_model  # noqa: F401
from support.tiny_detectors import photo, preprocessed

LARGE = [(200, 150), (129, 20), (20, 129), (128, 300), (160, 160)]


@pytest.mark.parametrize("path", [ADAPTIVE, UNIFORM], ids=["adaptive", "uniform"])
@pytest.mark.parametrize("size", LARGE, ids=str)
def test_images_beyond_the_square_are_whole(path: object, size: tuple[int, int]) -> None:
    model, image = tiny_model(path), photo(*size)
    padded = preprocessed(model, image)
    assert tuple(padded.shape[-2:]) == tuple(-(-side // 32) * 32 for side in size)
    expected = (image - model.pixel_mean) / model.pixel_std
    assert torch.equal(padded[0, :, : size[0], : size[1]], expected)
    two = preprocessed(model, image, photo(40, 50))
    assert two.shape[0] == 2 and torch.equal(two[0, :, : size[0], : size[1]], expected)


@torch.no_grad()
def test_objects_beyond_the_square_can_be_found() -> None:
    model = tiny_model(ADAPTIVE, "model.roi_heads.box_predictor.test_score_thresh=0.0")
    (found,) = model([{"image": photo(200, 150), "height": 200, "width": 150}])
    boxes = found["instances"].pred_boxes.tensor
    assert boxes[:, 3].max() > 128 and boxes[:, 2].max() > 128
    assert found["instances"].pred_masks.shape[1:] == (200, 150)


@pytest.mark.parametrize("size", [(128, 128), (70, 100), (1, 128)], ids=str)
def test_smaller_images_are_padded_as_upstream_does(size: tuple[int, int]) -> None:
    model, image = tiny_model(ADAPTIVE), photo(*size)
    ours = model.preprocess_image([{"image": image}] * 2)
    theirs = PlainGeneralizedRCNN.preprocess_image(model, [{"image": image}] * 2)
    assert torch.equal(ours.tensor, theirs.tensor) and ours.image_sizes == theirs.image_sizes
    assert ours.tensor.shape[-2:] == (128, 128)


def test_upstream_cuts_off() -> None:
    """If this fails, Detectron2 has mended it, and our class can go."""
    model = tiny_model(ADAPTIVE)
    assert PlainGeneralizedRCNN.preprocess_image(model, [{"image": photo(200, 150)}]).tensor.shape[-2:] == (128, 128)


def test_sizes_are_divisible_without_a_square() -> None:
    model = tiny_model(ADAPTIVE, "model.backbone.square_pad=0")
    assert whole_images([photo(70, 100).float()], model.backbone).tensor.shape[-2:] == (96, 128)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_names_our_class(path: object) -> None:
    target = load_config(str(path)).model._target_
    assert target is APTGeneralizedRCNN or str(target).endswith("meta_arch.APTGeneralizedRCNN")


def test_yacs_config_builds_our_class() -> None:
    cfg = get_cfg()
    add_apt_config(cfg)
    cfg.merge_from_file(str(ADAPTIVE.with_name("mask_rcnn_apt_vitdet_b.yaml")))
    cfg.merge_from_list(TINY_YACS)
    model = build_model(cfg).eval()
    assert preprocessed(model, photo(200, 150)).shape[-2:] == (224, 160)
