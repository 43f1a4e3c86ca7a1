"""The scale under each pixel, against MMSeg's own way of logits: crops, padding, mirror images, other sizes, TTA.

The reference is MMSeg's segmentor, whose network is replaced by one that says the scale of the patch under each pixel.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

pytest.importorskip("mmseg", reason="the MMSeg host needs the packages of the extra 'mmseg'")

from apt_dense.hosts.mmseg.scale_maps_of_test_images import most_common, scale_maps_of_batch, to_label_map

from support.tiny_segmentors import (  # noqa: F401 (a fixture)
    FCN,
    MODELS,
    SMALL,
    ConfigDict,
    PixelData,
    SegDataSample,
    mmseg_scope,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # MMSeg's own
SLIDE = {"mode": "slide", "crop_size": (32, 24), "stride": (21, 17)}
WHOLE = {"mode": "whole"}
#: The coarsest first, since argmax takes the first of equal ones.
SCALES = 1, 0, -1


def say(backbone: nn.Module, crops: Tensor, metas: list) -> Tensor:
    """Replaces the network: logits (B, 3, h, w) that say the scale under each pixel."""
    scales = backbone.partition(crops).long()
    pixels = scales.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, : crops.shape[2], : crops.shape[3]]
    place = torch.tensor([SCALES.index(scale) for scale in range(-1, 2)])
    return one_hot(place[pixels + 1], 3).permute(0, 3, 1, 2).float()


def segmentor(test_cfg: dict, padded: dict | None = None, kind: str = "EncoderDecoder", **options: Any) -> nn.Module:
    preprocessor = {
        "type": "SegDataPreProcessor", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375],
        "bgr_to_rgb": True, "test_cfg": padded,
    }  # fmt: skip
    backbone = {"type": "APTViT", **SMALL, "thresholds": (5.0,), **options}
    model = MODELS.build(ConfigDict(
        type=kind, backbone=backbone, decode_head=copy.deepcopy(FCN), data_preprocessor=preprocessor,
        test_cfg=test_cfg,
    ))  # fmt: skip
    model.encode_decode = partial(say, model.backbone)
    return model.eval()


def pictures(*size: int) -> Tensor:
    """Two 8-bit pictures with flat parts in several places."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, *size), generator=generator, dtype=torch.uint8)
    images[0, :, : size[0] // 2 + 8] = 90
    images[1, :, size[0] // 3 :, size[1] // 2 :] = 40
    return images


def batch(images: Tensor, flip: str | None = None, ori_shape: tuple[int, int] | None = None) -> dict[str, list]:
    flipped = images if flip is None else images.flip(3 if flip == "horizontal" else 2)
    shape = tuple(images.shape[2:])
    meta = {"img_shape": shape, "ori_shape": ori_shape or shape, "flip": flip is not None, "flip_direction": flip,
            "img_path": "0.jpg"}  # fmt: skip
    samples = [SegDataSample(metainfo=meta) for _ in images]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.zeros(1, *meta["ori_shape"], dtype=torch.long))
    return {"inputs": list(flipped), "data_samples": samples}


def said(model: nn.Module, data: dict) -> list[np.ndarray]:
    """What the segmentor says, as scales."""
    samples = model.test_step(copy.deepcopy(data))
    return [np.array(SCALES)[sample.pred_sem_seg.data[0].numpy()] for sample in samples]


def check(model: nn.Module, data: dict) -> list[np.ndarray]:
    inner = getattr(model, "module", model)
    found, expected = scale_maps_of_batch(inner, inner.backbone.patches, data), said(model, data)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == np.int8 and np.array_equal(ours, theirs)
    assert len(np.unique(np.concatenate([one.ravel() for one in found]))) > 1
    return found


@pytest.mark.parametrize("size", [(32, 24), (50, 70), (75, 33), (20, 45)], ids=str)
@pytest.mark.parametrize("test_cfg", [WHOLE, SLIDE], ids=["whole", "slide"])
@pytest.mark.parametrize("flip", [None, "horizontal", "vertical"])
def test_maps_are_carried_as_mmseg_carries_logits(size: tuple[int, int], test_cfg: dict, flip: str | None) -> None:
    check(segmentor(test_cfg), batch(pictures(*size), flip))


@pytest.mark.parametrize("test_cfg", [WHOLE, SLIDE], ids=["whole", "slide"])
def test_padding_of_the_preprocessor_is_cut_off(test_cfg: dict) -> None:
    """With dropped padding, cells of -1 are at its place only."""
    for drop in (False, True):
        found = check(segmentor(test_cfg, {"size_divisor": 32}, drop_padding=drop), batch(pictures(50, 41), "vertical"))
        assert [one.shape for one in found] == [(50, 41)] * 2 and min(one.min() for one in found) == 0


def test_dropped_padding_inside_of_an_image_is_minus_one() -> None:
    """A picture that the pipeline itself has padded with what becomes exact zeros."""
    model = segmentor(WHOLE, drop_padding=True)
    model.data_preprocessor.mean.fill_(100)
    images = pictures(48, 40)
    images[:, :, 24:] = 100
    maps = scale_maps_of_batch(model, model.backbone.patches, batch(images))
    assert all((one[24:] == -1).all() and (one[:24] >= 0).all() for one in maps)
    check(model, batch(images))


@pytest.mark.parametrize("flip", [None, "horizontal"])
def test_label_maps_of_another_size(flip: str | None) -> None:
    check(segmentor(WHOLE), batch(pictures(40, 48), flip, ori_shape=(80, 96)))


def test_nearest_pixels_of_any_size() -> None:
    scales = np.random.default_rng(0).integers(0, 3, (10, 14), dtype=np.int8)
    found = to_label_map(scales, {"ori_shape": (25, 9)})
    for y, x in np.ndindex(25, 9):
        assert found[y, x] == scales[int((y + 0.5) * 10 / 25), int((x + 0.5) * 14 / 9)]


@pytest.mark.parametrize("kind", ["SegTTAModel", "APTSegTTAModel"])
def test_augmentations(kind: str) -> None:
    """The scale that most have, as MMSeg averages probabilities."""
    inner = segmentor(WHOLE, kind="APTEncoderDecoder")
    model = MODELS.build({"type": kind, "module": inner}).eval()
    # 44 is not a multiple of the patch, so mirror images have other patches.
    views = [batch(pictures(44, 52), flip) for flip in (None, "horizontal", "vertical")]
    data = {key: [view[key] for view in views] for key in views[0]}
    merged = check(model, data)
    single = check(inner, views[0])
    assert not all(np.array_equal(one, other) for one, other in zip(merged, single, strict=True))


def test_most_common_by_hand() -> None:
    maps = np.array([[0, 0, -1, 2, 0], [1, 0, -1, 2, 1], [1, 2, 0, 1, 2]])
    assert most_common(maps, 3).tolist() == [1, 0, -1, 2, 2]


def test_uniform_patches_are_all_fine() -> None:
    model = segmentor(WHOLE, thresholds=())
    assert all(not one.any() for one in scale_maps_of_batch(model, model.backbone.patches, batch(pictures(33, 41))))


def test_the_batch_is_left_as_it_was() -> None:
    data = batch(pictures(50, 41))
    before = copy.deepcopy(data)
    model = segmentor(WHOLE, {"size_divisor": 32})
    scale_maps_of_batch(model, model.backbone.patches, data)
    assert all(torch.equal(one, other) for one, other in zip(data["inputs"], before["inputs"], strict=True))
    assert [one.metainfo for one in data["data_samples"]] == [one.metainfo for one in before["data_samples"]]


def test_other_modes_are_refused() -> None:
    model = segmentor({"mode": "tiles"})
    with pytest.raises(ValueError, match='knows test_cfg.mode="whole" and "slide", not \'tiles\''):
        scale_maps_of_batch(model, model.backbone.patches, batch(pictures(32, 32)))
