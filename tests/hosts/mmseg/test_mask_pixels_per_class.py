"""Masks from which nothing, or nothing of a class, can be learned are refused before a model is built."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg", reason="apt_dense.hosts.mmseg.mask_pixels_per_class counts what MMSeg reads")

from mmengine.config import Config
from mmengine.registry import TRANSFORMS, init_default_scope

from apt_dense.hosts.mmseg import mask_pixels_per_class as label_counts
from apt_dense.hosts.mmseg.dataset_checks import CheckLabels, check_data

SIZE = (12, 20)


def write(root: Path, masks: list[np.ndarray], split: str = "training", size: tuple[int, int] = SIZE) -> None:
    for kind in ("images", "masks"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    for number, mask in enumerate(masks):
        Image.new("RGB", size[::-1]).save(root / "images" / split / f"{number}.jpg")
        Image.fromarray(mask).save(root / "masks" / split / f"{number}.png")


def mask(*values: int, dtype: type = np.uint8) -> np.ndarray:
    """A mask in stripes of these labels."""
    return np.resize(np.array(values, dtype), SIZE)


def config(root: Path, zero: bool = False, classes: tuple[str, ...] = ("background", "thing")) -> Config:
    init_default_scope("mmseg")
    dataset = dict(
        type="BaseSegDataset", data_root=str(root), img_suffix=".jpg", seg_map_suffix=".png",
        metainfo=dict(classes=classes, palette=[[0, 0, 0]] * len(classes)), reduce_zero_label=zero,
        data_prefix=dict(img_path="images/training", seg_map_path="masks/training"),
        pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"),
                  dict(type="CheckLabels", num_classes=len(classes))],
    )  # fmt: skip
    return Config(dict(model=dict(), **{f"{split}_dataloader": dict(dataset=dataset) for split in ("train", "test")}))


def refusal(root: Path, split: str = "train", every_class: bool = True, **options: object) -> str:
    with pytest.raises(ValueError) as raised:
        check_data(config(root, **options), (split,), every_class)
    assert "\n" not in str(raised.value)
    return str(raised.value)


NOTHING = [
    ("0 and 255", [mask(0, 255)], False, "255 is ignored: a mask of 0 and 255 needs 1 in place of 255"),
    ("only 255", [mask(255)] * 2, False, "No pixel is left to learn or score"),
    ("only 0, lowered", [mask(0)], True, "No pixel is left to learn or score"),
    ("0 and 255, lowered", [mask(0, 255)], True, "No pixel is left"),
    ("0 and 1, lowered", [mask(0, 1)], True, "reduce_zero_label=True ignores 0 and lowers the others by one"),
    ("only the first label", [mask(0)] * 3, False, "With a single label there is nothing to learn"),
    ("only the second label", [mask(1)], False, "None of 1 class: background"),
    ("one bit, all set", [np.ones(SIZE, bool)], False, "With a single label"),
]


@pytest.mark.parametrize(
    ("masks", "zero", "message"), [case[1:] for case in NOTHING], ids=[case[0] for case in NOTHING]
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_nothing_to_learn_or_score(tmp_path: Path, masks: list, zero: bool, message: str, split: str) -> None:
    write(tmp_path, masks)
    found = refusal(tmp_path, split, zero=zero)
    assert message in found and found.startswith(f"{split} data, all {len(masks)} masks of {tmp_path}")
    if split == "train":
        assert message in refusal(tmp_path, split, every_class=False, zero=zero)


def test_a_class_without_pixels_is_named_and_can_be_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, [mask(0, 1, 255)])
    three = ("background", "thing", "other")
    assert "None of 1 class: other. Correct the masks" in refusal(tmp_path, classes=three)
    assert "--allow-empty-classes" in refusal(tmp_path, classes=three)
    check_data(config(tmp_path, classes=three), ("train", "test"), every_class=False)
    assert "None of 1 class: other" in caplog.text


def test_a_single_label_can_be_scored_if_asked_for(tmp_path: Path) -> None:
    write(tmp_path, [mask(1)])
    check_data(config(tmp_path), ("test",), every_class=False)


def test_shares_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, [mask(0, 0, 0, 1, 255)])
    with caplog.at_level(logging.INFO):
        check_data(config(tmp_path), ("train",))
    assert "20.0 % of the pixels are ignored (label 255); by class: background 60.0 %, thing 20.0 %" in caplog.text


def test_large_sets_are_sampled_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, [mask(0, 1), mask(0, 1, 2)] * 5)
    monkeypatch.setattr(label_counts, "MOST", 5)
    with caplog.at_level(logging.INFO):  # the sample happens to lack the third class
        check_data(config(tmp_path, classes=("background", "thing", "other")), ("train",))
    assert "5 of 10 masks, a sample, of" in caplog.text and "None of 1 class: other" in caplog.text


# ---- masks of other kinds and sizes


@pytest.mark.parametrize("kind", ["palette", "sixteen bits", "one bit"])
def test_exact_masks_of_other_kinds_pass(tmp_path: Path, kind: str) -> None:
    write(tmp_path, [mask(0, 1)])
    picture = {
        "palette": lambda: palette(mask(0, 1)),
        "sixteen bits": lambda: Image.fromarray(mask(0, 1, dtype=np.uint16)),
        "one bit": lambda: Image.fromarray(mask(0, 1).astype(bool)),
    }[kind]()
    picture.save(tmp_path / "masks" / "training" / "0.png")
    check_data(config(tmp_path), ("train",))


def palette(indices: np.ndarray) -> Image.Image:
    picture = Image.fromarray(indices)
    picture.putpalette([90, 0, 0, 0, 90, 0])
    return picture


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((*SIZE, 3), np.uint8), "the mask has shape (12, 20, 3)"),
        (np.zeros((*SIZE, 4), np.uint8), "the mask has shape (12, 20, 4)"),
        (np.zeros((*SIZE, 2), np.uint8), "the mask has shape (12, 20, 2)"),
        (mask(0, 256, dtype=np.uint16), "label 256 in a mask of more than 8 bits"),
        (mask(0, 65535, dtype=np.uint16), "label 65535 in a mask of more than 8 bits"),
        (mask(0, 2), "label 2, only 0 to 1 and 255"),
        (np.zeros((11, 20), np.uint8), "height and width (11, 20), but"),
        (np.zeros((20, 12), np.uint8), "height and width (20, 12), but"),
    ],
)
def test_masks_that_would_be_misread_name_their_file(tmp_path: Path, picture: np.ndarray, message: str) -> None:
    write(tmp_path, [mask(0, 1), picture])
    found = refusal(tmp_path)
    assert message in found and f"{tmp_path}/masks/training/1.png" in found


@pytest.mark.parametrize("content", [b"", b"no mask", b"\x89PNG\r\n\x1a\n"])
def test_damaged_masks_are_named(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, [mask(0, 1)] * 2)
    path = tmp_path / "masks" / "training" / "1.png"
    path.write_bytes(content)
    assert f"{path} is not a readable mask" in refusal(tmp_path)


def test_fractions_are_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "0.tif"
    Image.fromarray(np.full(SIZE, 0.5, np.float32)).save(path)
    with pytest.raises(ValueError, match="label 0.5 in a mask of more than 8 bits"):
        CheckLabels(2).transform(dict(gt_seg_map=np.zeros(SIZE, np.uint8), seg_map_path=str(path)))


@pytest.mark.parametrize(
    ("sizes", "good"),
    [
        (dict(img_shape=SIZE, ori_shape=SIZE), True),
        (dict(img_shape=(64, 64), ori_shape=SIZE), True),  # the image was resized before the mask was loaded
        (dict(img_shape=SIZE, ori_shape=(24, 40)), True),  # both were resized
        (dict(), True),
        (dict(img_shape=(11, 20), ori_shape=(11, 20)), False),
        (dict(img_shape=SIZE[::-1], ori_shape=SIZE[::-1]), False),
    ],
)
def test_sizes_of_mask_and_image(sizes: dict, good: bool) -> None:
    results = dict(gt_seg_map=np.zeros(SIZE, np.uint8), seg_map_path="0.png", **sizes)
    if good:
        assert CheckLabels(2).transform(results) is results
    else:
        with pytest.raises(ValueError, match=r"0.png: the mask has height and width \(12, 20\), but its image has"):
            CheckLabels(2).transform(results)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("color_type", [None, "color", "color_ignore_orientation", "unchanged"])
def test_masks_have_the_size_of_the_picture_as_mmcv_turns_it(
    tmp_path: Path, orientation: int, color_type: str | None
) -> None:
    """At the door, and not only when the picture's turn comes in training."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = orientation > 4 and color_type in (None, "color")
    for good in (True, False):
        shape = SIZE[::-1] if turned == good else SIZE
        write(tmp_path, [np.resize(np.uint8([0, 1]), shape)])
        Image.new("RGB", SIZE[::-1]).save(tmp_path / "images" / "training" / "0.jpg", exif=exif)
        cfg = config(tmp_path)
        loading = cfg.train_dataloader.dataset.pipeline[0]
        loading.update({} if color_type is None else {"color_type": color_type})
        if good:
            check_data(cfg, ("train",))
            results = dict(img_path=str(tmp_path / "images" / "training" / "0.jpg"))
            assert TRANSFORMS.build(loading)(results)["img"].shape[:2] == shape
        else:
            with pytest.raises(ValueError, match=r"0.png: the mask has height and width .* make them equal"):
                check_data(cfg, ("train",))


@pytest.mark.parametrize("part", ["decode_head", "auxiliary_head", "test_evaluator"])
@pytest.mark.parametrize(("of_data", "of_part"), [(254, None), (255, 0), (254, 255), (255, 254)])
def test_labels_that_the_data_set_ignores_and_a_part_does_not(
    tmp_path: Path, part: str, of_data: int, of_part: int | None
) -> None:
    write(tmp_path, [mask(0, 1, of_data)])
    split = "test" if part == "test_evaluator" else "train"
    for ignored in (of_part, of_data):
        settings = {"type": "IoUMetric" if split == "test" else "FCNHead"}
        settings |= {} if ignored is None else {"ignore_index": ignored}
        cfg = config(tmp_path)
        cfg[f"{split}_dataloader"].dataset.update(ignore_index=of_data)
        cfg[f"{split}_dataloader"].dataset.pipeline[2].update(ignore_index=of_data)
        cfg[part] = settings
        cfg.model[part] = settings
        if ignored == of_data:
            check_data(cfg, (split,))
        else:
            with pytest.raises(
                ValueError, match=f"hold label {of_data}, which .* but .* ignores {of_part or '(0|255)'}"
            ):
                check_data(cfg, (split,))
    write(tmp_path, [mask(0, 1)])  # nothing is ignored
    check_data(cfg, (split,))


@pytest.mark.parametrize("step", [dict(type="Pad", size_divisor=32), dict(type="CenterCrop", crop_size=8)])
def test_steps_after_which_predictions_are_stretched_are_named(tmp_path: Path, step: dict, caplog: Any) -> None:
    write(tmp_path, [mask(0, 1)])
    cfg = config(tmp_path)
    for split in ("train", "test"):
        cfg[f"{split}_dataloader"].dataset.pipeline.insert(1, step)
        caplog.clear()
        check_data(cfg, (split,))
        named = f"the pipeline has {step['type']}, after which MMSegmentation stretches the prediction" in caplog.text
        assert named == (split == "test")
