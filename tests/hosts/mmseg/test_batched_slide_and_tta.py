"""Packed inference for MMSeg: the same logits as MMSeg's segmentor and test-time augmentation, in fewer forwards."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from support.references import randomise

pytest.importorskip("mmseg")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mmengine.config import ConfigDict
    from mmengine.registry import MODELS
    from mmengine.structures import PixelData
    from mmseg.models.segmentors import EncoderDecoder
    from mmseg.structures import SegDataSample

from apt_dense.hosts.mmseg.batched_slide_and_tta import APTSegTTAModel, axis_windows, crop_windows

from support.tiny_segmentors import CLASSES, FCN, SMALL, half_flat, mmseg_scope  # noqa: F401 (a fixture)

pytestmark = pytest.mark.filterwarnings("ignore")  # MMSeg's own

APT = {"type": "APTViT", **SMALL}
BACKBONES = {
    "adaptive": {**APT, "thresholds": (4.0,)},
    "uniform": {**APT, "thresholds": ()},
    "mmseg": {
        "type": "VisionTransformer", "img_size": 32, "patch_size": 8, "embed_dims": 16, "num_layers": 2, "num_heads": 2,
    },
}  # fmt: skip
BINARY_HEAD = {**FCN, "num_classes": 2, "out_channels": 1, "threshold": 0.4,
               "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": True}}  # fmt: skip
PREPROCESSOR = {"type": "SegDataPreProcessor", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
SLIDE = {"mode": "slide", "crop_size": (32, 24), "stride": (21, 17)}
SIZES = [(32, 24), (50, 70), (75, 33), (20, 45), (45, 20), (20, 17)]


def segmentor(kind: str = "EncoderDecoder", backbone: str = "adaptive", head: dict = FCN, **test_cfg: Any) -> nn.Module:
    config = {"backbone": BACKBONES[backbone], "decode_head": head, "data_preprocessor": PREPROCESSOR}
    return randomised(MODELS.build(ConfigDict(type=kind, test_cfg={**SLIDE, **test_cfg}, **copy.deepcopy(config))))


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Give a model random weights, and a bias that makes all classes about equally likely, so that predictions vary."""
    logits = randomise(model, 0.3)(half_flat(64, 64), mode="tensor")
    model.decode_head.conv_seg.bias -= logits.mean((0, 2, 3))
    return model


def metas(images: Tensor) -> list[dict]:
    size = tuple(images.shape[2:])
    return [{"ori_shape": size, "img_shape": size, "pad_shape": size} for _ in images]


def batch_sizes(model: nn.Module) -> list[int]:
    """A list that grows by the number of crops with each forward of the backbone."""
    seen: list[int] = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def close(actual: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


# ---- sliding


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_logits_are_mmsegs(backbone: str, size: tuple[int, int]) -> None:
    images = half_flat(*size)
    expected = segmentor(backbone=backbone).inference(images, metas(images))
    logits = segmentor("APTEncoderDecoder", backbone, crops_per_forward=3).inference(images, metas(images))
    assert logits.shape == (2, CLASSES, *size)
    close(logits, expected)


@pytest.mark.parametrize(("crops_per_forward", "forwards"), [(1, [1] * 12), (3, [3] * 4), (5, [5, 5, 2]), (99, [12])])
@torch.no_grad()
def test_forward_passes_are_bounded_and_full(crops_per_forward: int, forwards: list[int]) -> None:
    images = half_flat(50, 50)
    model = segmentor("APTEncoderDecoder", crops_per_forward=crops_per_forward)
    seen = batch_sizes(model)
    close(model.slide_inference(images, metas(images)), segmentor().slide_inference(images, metas(images)))
    assert seen == forwards  # two images of 2 x 3 crops


@torch.no_grad()
def test_eight_crops_at_once_by_default() -> None:
    model, images = segmentor("APTEncoderDecoder"), half_flat(50, 50)
    seen = batch_sizes(model)
    model.slide_inference(images, metas(images))
    assert seen == [8, 4]


@torch.no_grad()
def test_whole_mode_stays_one_forward_per_batch() -> None:
    images = half_flat(50, 40)
    model = segmentor("APTEncoderDecoder", mode="whole", crops_per_forward=1)
    seen = batch_sizes(model)
    close(model.inference(images, metas(images)), segmentor(mode="whole").inference(images, metas(images)))
    assert seen == [2]


@torch.no_grad()
def test_logits_of_one_forward_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = segmentor("APTEncoderDecoder", crops_per_forward=2), half_flat(50, 50)
    before: list[StorageWeakRef] = []

    def encode_decode(crops: Tensor, metas: list[dict]) -> Tensor:
        assert all(storage.expired() for storage in before)
        logits = torch.zeros(len(crops), CLASSES, *crops.shape[2:])
        before.append(StorageWeakRef(logits.untyped_storage()))
        return logits

    monkeypatch.setattr(model, "encode_decode", encode_decode)
    model.slide_inference(images, metas(images))
    assert len(before) == 6


@torch.no_grad()
def test_heads_see_one_meta_per_crop_and_the_callers_stay_as_they_are() -> None:
    model, images = segmentor("APTEncoderDecoder", crops_per_forward=4), half_flat(32, 40)
    given_metas, seen = [dict(meta, img_path=name) for meta, name in zip(metas(images), "ab", strict=True)], []
    plain = model.encode_decode
    model.encode_decode = lambda crops, crop_metas: seen.extend(crop_metas) or plain(crops, crop_metas)
    model.slide_inference(images, given_metas)
    assert [meta["img_path"] for meta in seen] == ["a", "a", "b", "b"]
    assert all(meta["img_shape"] == torch.Size((32, 24)) for meta in seen)
    assert [meta["img_shape"] for meta in given_metas] == [(32, 40)] * 2


def mmsegs_windows(size: tuple[int, int], crop_size: tuple[int, int], stride: tuple[int, int]) -> list[tuple]:
    """The crops of MMSeg's own loop, (row, column, height, width), read from an image of numbered pixels."""
    found = []

    def record(crop: Tensor, metas: list[dict]) -> Tensor:
        row, column = divmod(int(crop[0, 0, 0, 0]), size[1])
        found.append((row, column, *crop.shape[2:]))
        return crop

    numbers = torch.arange(size[0] * size[1]).float().view(1, 1, *size)
    test_cfg = SimpleNamespace(crop_size=crop_size, stride=stride)
    EncoderDecoder.slide_inference(
        SimpleNamespace(test_cfg=test_cfg, out_channels=1, encode_decode=record), numbers, metas(numbers)
    )
    return found


@given(size=st.tuples(*[st.integers(1, 20)] * 2), crop=st.tuples(*[st.integers(1, 9)] * 2), data=st.data())
def test_windows_are_mmsegs(size: tuple[int, int], crop: tuple[int, int], data: st.DataObject) -> None:
    stride = tuple(data.draw(st.integers(1, side)) for side in crop)
    windows = [(y.start, x.start, y.stop - y.start, x.stop - x.start) for y, x in crop_windows(size, crop, stride)]
    assert windows == mmsegs_windows(size, crop, stride)


def test_windows_by_hand() -> None:
    assert axis_windows(10, 4, 3) == [slice(0, 4), slice(3, 7), slice(6, 10)]
    assert axis_windows(9, 4, 3) == [slice(0, 4), slice(3, 7), slice(5, 9)]
    assert axis_windows(3, 4, 3) == [slice(0, 3)]
    assert axis_windows(6, 4, 6) == [slice(0, 4), slice(2, 6)], "a long stride is fine where the last step is short"


# ---- sizes that patches do not divide


@pytest.mark.parametrize("size", [(50, 40), (33, 31), (48, 41), (9, 9)], ids=str)
@pytest.mark.parametrize("backbone", ["adaptive", "uniform"])
@torch.no_grad()
def test_logits_are_not_stretched(backbone: str, size: tuple[int, int]) -> None:
    """They are those of the image padded by hand, cut to its size; MMSeg's are others."""
    images = half_flat(*size)
    padded = nn.functional.pad(images, (0, -size[1] % 8, 0, -size[0] % 8))
    expected = segmentor(backbone=backbone, mode="whole").inference(padded, metas(padded))[..., : size[0], : size[1]]
    model = segmentor("APTEncoderDecoder", backbone, mode="whole", whole_patches=True)
    close(model.inference(images, metas(images)), expected)
    stretched = segmentor(backbone=backbone, mode="whole").inference(images, metas(images))
    assert (stretched - expected).abs().max() > 1e-3


@torch.no_grad()
def test_small_crops_are_not_stretched() -> None:
    images = half_flat(20, 17)  # smaller than the window
    padded = nn.functional.pad(images, (0, 7, 0, 4))
    expected = segmentor(mode="whole").inference(padded, metas(padded))[..., :20, :17]
    model = segmentor("APTEncoderDecoder", whole_patches=True)
    close(model.slide_inference(images, metas(images)), expected)


@torch.no_grad()
def test_whole_patches_change_nothing_where_patches_divide() -> None:
    images = half_flat(50, 72)
    model = segmentor("APTEncoderDecoder", whole_patches=True)
    close(model.inference(images, metas(images)), segmentor().inference(images, metas(images)))


# ---- augmentations


def augmented(sizes: list[tuple[int, int]], images: int = 2, flips: tuple = (None, "horizontal")) -> dict[str, list]:
    """8-bit images of 40 x 56 in each size and flip, collated as after ``TestTimeAug``."""
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (images, 3, 40, 56)).float()
    pictures[..., :28] = 90
    data: dict[str, list] = {"inputs": [], "data_samples": []}
    for size in sizes:
        resized = nn.functional.interpolate(pictures, size)
        for flip in flips:
            flipped = resized if flip is None else resized.flip(3 if flip == "horizontal" else 2)
            data["inputs"].append(list(flipped))
            data["data_samples"].append([sample(size, flip, f"{i}.jpg") for i in range(images)])
    return data


def sample(size: tuple[int, int], flip: str | None, path: str) -> SegDataSample:
    shapes = {"ori_shape": (40, 56), "img_shape": size, "pad_shape": size}
    result = SegDataSample(metainfo={**shapes, "flip": flip is not None, "flip_direction": flip, "img_path": path})
    result.gt_sem_seg = PixelData(data=torch.zeros(1, 40, 56, dtype=torch.long))
    return result


def tta(kind: str, module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, list]:
    """A TTA model, and a list that collects what it merges: for each image, its predictions by augmentation."""
    model, merged = MODELS.build({"type": kind, "module": module}), []
    merge = model.merge_preds
    monkeypatch.setattr(model, "merge_preds", lambda lists: merged.extend(copy.deepcopy(lists)) or merge(lists))
    return model, merged


THREE_SIZES = [(32, 24), (20, 28), (40, 56)]  # one crop, less than a crop, 2 x 3 crops


@pytest.mark.parametrize("mode", ["slide", "whole"])
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_merged_predictions_are_mmsegs(backbone: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, expected = tta("SegTTAModel", segmentor(backbone=backbone, mode=mode), monkeypatch)
    module = segmentor("APTEncoderDecoder", backbone, mode=mode, crops_per_forward=3)
    ours, actual = tta("APTSegTTAModel", module, monkeypatch)
    check_merged(ours.test_step(augmented(THREE_SIZES)), stock.test_step(augmented(THREE_SIZES)))
    check_views(actual, expected, views=6)


@torch.no_grad()
def test_one_logit_per_pixel_and_vertical_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views are MMSeg's, but their probabilities are averaged; SegTTAModel takes their sigmoid again."""
    stock, expected = tta("SegTTAModel", segmentor(head=BINARY_HEAD), monkeypatch)
    ours, actual = tta("APTSegTTAModel", segmentor("APTEncoderDecoder", head=BINARY_HEAD), monkeypatch)
    flips = (None, "horizontal", "vertical")
    merged, doubled = (model.test_step(augmented([(40, 56), (50, 70)], flips=flips)) for model in (ours, stock))
    check_views(actual, expected, views=6)
    for sample, theirs, views in zip(merged, doubled, actual, strict=True):
        mean = sum(view.seg_logits.data for view in views) / 6
        assert torch.equal(sample.pred_sem_seg.data, (mean > 0.4).float())
        assert len(sample.pred_sem_seg.data.unique()) == 2 and theirs.pred_sem_seg.data.min() == 1
        assert sample.metainfo == theirs.metainfo and "gt_sem_seg" in sample


PADDED = {"no padding": None, "to a multiple": {"size_divisor": 32}, "to a size": {"size": (96, 96)}}
ODD_SIZES = [(45, 51), (33, 38), (64, 75)]


def padded(images: Tensor, test_cfg: dict | None) -> Tensor:
    height, width = images.shape[2:]
    divisor, size = (test_cfg or {}).get("size_divisor", 1), (test_cfg or {}).get("size", (height, width))
    pad_bottom, pad_right = -height % divisor + size[0] - height, -width % divisor + size[1] - width
    return nn.functional.pad(images, (0, pad_right, 0, pad_bottom))


def by_hand(model: nn.Module, images: Tensor, slide: bool) -> Tensor:
    """Logits of normalised images: the mean over the windows that cover each pixel."""
    height, width = images.shape[2:]
    windows = [(slice(0, height), slice(0, width))]
    if slide:
        starts = [range(0, max(n - c, 0) + s, s) for n, c, s in zip((height, width), (32, 24), (21, 17), strict=True)]
        corners = {(min(y, max(height - 32, 0)), min(x, max(width - 24, 0))) for y in starts[0] for x in starts[1]}
        windows = [(slice(y, y + 32), slice(x, x + 24)) for y, x in sorted(corners)]
    total, count = torch.zeros(len(images), CLASSES, height, width), torch.zeros(height, width)
    for rows, columns in windows:
        crop = images[..., rows, columns]
        logits = model.decode_head(model.backbone(crop))
        total[..., rows, columns] += nn.functional.interpolate(logits, crop.shape[2:], mode="bilinear")
        count[rows, columns] += 1
    return total / count


@pytest.mark.parametrize("padding", PADDED)
@pytest.mark.parametrize("mode", ["slide", "whole"])
@torch.no_grad()
def test_odd_sizes_flips_and_padding_are_undone(mode: str, padding: str) -> None:
    """Against the average of each augmentation's probabilities, with all that was done to the pixels undone by hand."""
    model = segmentor("APTEncoderDecoder", backbone="uniform", mode=mode, crops_per_forward=5)
    model.data_preprocessor.test_cfg = PADDED[padding]
    data = augmented(ODD_SIZES, flips=(None, "horizontal", "vertical"))
    found = APTSegTTAModel(model).test_step(copy.deepcopy(data))
    total: Tensor = torch.zeros(2, CLASSES, 40, 56)
    mean, std = (torch.tensor(PREPROCESSOR[name]).view(3, 1, 1) for name in ("mean", "std"))
    for inputs, samples in zip(data["inputs"], data["data_samples"], strict=True):
        images = (torch.stack(inputs) - mean) / std
        logits = by_hand(model, padded(images, PADDED[padding]), mode == "slide")
        logits = logits[..., : images.shape[2], : images.shape[3]]
        direction = samples[0].flip_direction
        logits = logits if direction is None else logits.flip(3 if direction == "horizontal" else 2)
        total += nn.functional.interpolate(logits, (40, 56), mode="bilinear").softmax(1)
    first, second = total.topk(2, 1).values.unbind(1)
    sure = first - second > 1e-4
    assert sure.float().mean() > 0.9 and len(total.argmax(1).unique()) > 1
    for sample, expected, chosen in zip(found, total.argmax(1), sure, strict=True):
        assert torch.equal(sample.pred_sem_seg.data.squeeze()[chosen], expected[chosen])


@pytest.mark.parametrize("sizes", [[(40, 56)], [(40, 56), (20, 28)]])
@pytest.mark.parametrize("mode", ["slide", "whole"])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("logit", [-4.0, -0.5, 0.5, 4.0])
@torch.no_grad()
def test_augmentation_of_constant_logits_changes_nothing(
    logit: float, threshold: float, mode: str, sizes: list[tuple[int, int]]
) -> None:
    model = segmentor("APTEncoderDecoder", head={**BINARY_HEAD, "threshold": threshold}, mode=mode)
    model.decode_head.conv_seg.weight.zero_()
    model.decode_head.conv_seg.bias.fill_(logit)
    for sample in APTSegTTAModel(model).test_step(augmented(sizes)):
        foreground = torch.sigmoid(torch.tensor(logit)) > threshold
        assert (sample.pred_sem_seg.data == foreground).all() and sample.pred_sem_seg.data.shape == (1, 40, 56)


def check_merged(actual: list[SegDataSample], expected: list[SegDataSample]) -> None:
    assert len(actual) == len(expected) == 2
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.pred_sem_seg.data, theirs.pred_sem_seg.data)
        assert len(ours.pred_sem_seg.data.unique()) > 1 and "gt_sem_seg" in ours
        assert ours.metainfo == theirs.metainfo


def check_views(actual: list, expected: list, views: int) -> None:
    assert len(actual) == len(expected) == 2
    for ours, theirs in zip(actual, expected, strict=True):
        assert len(ours) == len(theirs) == views
        for one, other in zip(ours, theirs, strict=True):
            assert one.metainfo == other.metainfo
            torch.testing.assert_close(one.seg_logits.data, other.seg_logits.data, atol=1e-5, rtol=0)


@torch.no_grad()
def test_augmentations_share_forward_passes() -> None:
    module = segmentor("APTEncoderDecoder", crops_per_forward=10)
    seen = batch_sizes(module)
    APTSegTTAModel(module).test_step(augmented(THREE_SIZES))
    # For each of two images and two flips: 2 crops of 20 x 24, and 1 + 2 x 3 of 32 x 24.
    assert seen == [8, 10, 10, 8]


@torch.no_grad()
def test_whole_images_of_one_size_share_forward_passes() -> None:
    module = segmentor("APTEncoderDecoder", mode="whole", crops_per_forward=3)
    seen = batch_sizes(module)
    APTSegTTAModel(module).test_step(augmented(THREE_SIZES))
    assert seen == [3, 1] * 3


# ---- errors


@pytest.mark.parametrize("value", [0, -1, 2.0, "8", None, True])
def test_bad_crops_per_forward(value: Any) -> None:
    with pytest.raises(ValueError, match=f"crops_per_forward={value!r}: expected a whole number of crops from 1"):
        segmentor("APTEncoderDecoder", crops_per_forward=value)


@pytest.mark.parametrize(
    ("test_cfg", "message"),
    [
        ({"stride": (33, 17)}, "stride=33 leaves gaps between crops of 32 pixels: set at most 32"),
        ({"stride": (21, 0)}, "crop_size=24 and stride=0 must be at least one pixel"),
        ({"crop_size": (0, 24)}, "crop_size=0 and stride=21 must be at least one pixel"),
    ],
)
def test_bad_windows(test_cfg: dict, message: str) -> None:
    images = half_flat(70, 50)
    with pytest.raises(ValueError, match=message):
        segmentor("APTEncoderDecoder", **test_cfg).slide_inference(images, metas(images))


def test_bad_mode() -> None:
    with pytest.raises(ValueError, match='test_cfg.mode=\'tiles\': expected "slide" or "whole"'):
        APTSegTTAModel(segmentor("APTEncoderDecoder", mode="tiles")).test_step(augmented([(40, 56)]))


def test_packed_augmentation_needs_a_packed_segmentor() -> None:
    with pytest.raises(TypeError, match="needs a model of type APTEncoderDecoder, but got EncoderDecoder"):
        APTSegTTAModel(segmentor())


def test_packed_augmentation_needs_a_dict() -> None:
    with pytest.raises(TypeError, match="expected a dict of inputs and data_samples, but got tuple"):
        APTSegTTAModel(segmentor("APTEncoderDecoder")).test_step(([], []))
