"""Augmentation derived from test pipelines: the same steps on six sizes and their mirror images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg", reason="builds MMSegmentation's transforms")

from mmengine.config import ConfigDict
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope

from apt_dense.hosts.mmseg.tta_pipeline import RATIOS, augmented

from support.tiny_segmentors import mmseg_scope  # noqa: F401 (a fixture)

LOAD, PACK = dict(type="LoadImageFromFile"), dict(type="PackSegInputs")
MASKS = dict(type="LoadAnnotations")


def sizes(pipeline: list[dict]) -> list:
    """What each of the six resizing steps of a derived pipeline asks for."""
    steps = augmented(pipeline)[1]["transforms"][0]
    return [(step.get("scale"), step.get("scale_factor"), step.get("max_size")) for step in steps]


@pytest.mark.parametrize(
    ("resize", "half", "largest"),
    [
        ([], (None, 0.5, None), (None, 1.75, None)),
        ([dict(type="Resize", scale=(2048, 512))], ((1024, 256), None, None), ((3584, 896), None, None)),
        ([dict(type="Resize", scale=(float("inf"), 512))], ((float("inf"), 256), None, None), None),
        ([dict(type="Resize", scale=(-1, 512))], ((-1, 256), None, None), ((-1, 896), None, None)),
        ([dict(type="mmseg.Resize", scale_factor=2.0)], (None, 1.0, None), (None, 3.5, None)),
        ([dict(type="Resize", scale_factor=(0.5, 1.0))], (None, (0.25, 0.5), None), (None, (0.875, 1.75), None)),
        (
            [dict(type="ResizeShortestEdge", scale=512, max_size=2048)],
            (256, None, 1024),
            (896, None, 3584),
        ),
    ],
)
def test_sizes_are_multiplied(resize: list, half: tuple, largest: tuple | None) -> None:
    found = sizes([LOAD, *resize, MASKS, PACK])
    assert len(found) == len(RATIOS) == 6 and repr(found[0]) == repr(half), "pixels stay whole numbers"
    assert largest is None or repr(found[-1]) == repr(largest)


def test_masks_are_loaded_after_resizing_wherever_the_test_loads_them() -> None:
    other = dict(type="ResizeToMultiple", size_divisor=32)
    for pipeline in ([LOAD, MASKS, dict(type="Resize", scale=64), other, PACK], [LOAD, MASKS, other, PACK]):
        first, derived = augmented(pipeline)
        assert first == LOAD and derived["transforms"][2:] == [[MASKS], [other], [PACK]]
        assert [flip["prob"] for flip in derived["transforms"][1]] == [0.0, 1.0]


def test_the_config_stays_as_it_is() -> None:
    pipeline = [ConfigDict(step) for step in (LOAD, dict(type="Resize", scale=(64, 32)), PACK)]
    augmented(pipeline)
    assert pipeline == [LOAD, dict(type="Resize", scale=(64, 32)), PACK]
    with_augmentation = [LOAD, dict(type="TestTimeAug", transforms=[])]
    assert augmented(with_augmentation) == with_augmentation


def test_flips_reach_predictions() -> None:
    pack = dict(type="PackSegInputs", meta_keys=["img_path", "ori_shape"])
    (step,) = augmented([LOAD, pack])[1]["transforms"][-1]
    assert step["meta_keys"] == ("img_path", "ori_shape", "flip", "flip_direction")


@pytest.mark.parametrize(
    "pipeline",
    [
        [],
        [MASKS | dict(type="Normalize"), PACK],
        [LOAD, dict(type="Resize"), dict(type="Resize"), PACK],
        [LOAD, dict(type="RandomResize", scale=(1, 2)), PACK],
        [LOAD, dict(type="RandomFlip", prob=0.5), PACK],
    ],
)
def test_pipelines_that_must_say_it_themselves(pipeline: list) -> None:
    with pytest.raises(ValueError, match="--tta cannot be derived .* add tta_pipeline to the config"):
        augmented(pipeline)


def test_a_derived_pipeline_runs(tmp_path: Path) -> None:
    init_default_scope("mmseg")
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / "a.png")
    pipeline = Compose(augmented([LOAD, dict(type="Resize", scale=(80, 40), keep_ratio=True), PACK]))
    found = pipeline(dict(img_path=str(tmp_path / "a.png"), seg_fields=[], reduce_zero_label=False))
    shapes = [tuple(image.shape[1:]) for image in found["inputs"]]
    assert shapes == [(round(40 * r), round(80 * r)) for r in RATIOS for _ in range(2)]
    assert [sample.flip for sample in found["data_samples"]] == [False, True] * 6
