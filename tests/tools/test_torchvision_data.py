"""torchvision_detection's data and batches: pictures, objects, targets, augmentation, order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from support.coco_folder import COLOURS, SIZE, write_coco

pytest.importorskip("pycocotools", reason="data sets in COCO's layout are read with pycocotools")

from pycocotools import mask as rle

from torchvision_detection.batches import EvaluationImages, TrainingImages, TrainingOrder, make_loader
from torchvision_detection.data import CocoSplit, load_split, read_boxes, read_image, read_objects

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own

TRAIN_FILE = "annotations/instances_train2017.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images with two objects each; tests only read it."""
    return write_coco(tmp_path_factory.mktemp("data") / "coco", images=3)


def load(
    root: Path, change: Callable[[dict], None] | None = None, images: int = 2, masks: bool | None = True
) -> CocoSplit:
    return load_split(write_coco(root, images, change, splits=("train",)), "train", masks=masks)


def test_a_split_is_indexed(data: Path) -> None:
    split = load_split(data, "train")
    assert split.image_ids == (10, 20, 30) and split.category_ids == (3, 90) and split.names == ("red", "green")
    assert split.num_classes == 3 and split.categories == [(3, "red"), (90, "green")]
    assert [len(split.coco.imgToAnns[image_id]) for image_id in split.image_ids] == [2, 2, 2]
    assert read_image(split, 20).shape == (*SIZE, 3)


# ---- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"no image"])
def test_an_unreadable_image(tmp_path: Path, data: bytes) -> None:
    split = load(tmp_path)
    (split.folder / "1.png").write_bytes(data)
    with pytest.raises(ValueError, match="1.png is not a readable image"):
        read_image(split, 10)


def test_an_image_of_another_size(tmp_path: Path) -> None:
    split = load(tmp_path)
    cv2.imwrite(str(split.folder / "1.png"), np.zeros((50, 60, 3), np.uint8))
    with pytest.raises(ValueError, match=r"1.png has height and width \(50, 60\), .* says \(96, 128\)"):
        read_image(split, 10)


# ---- objects --------------------------------------------------------------------------------------------------------


def test_polygons_and_run_lengths_give_the_same_masks(tmp_path: Path) -> None:
    polygons = load(tmp_path / "a")

    def change(content: dict) -> None:
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            mask = np.zeros(SIZE, np.uint8, order="F")
            mask[y : y + h, x : x + w] = 1
            counts = rle.encode(mask)["counts"].decode()
            runs = np.diff(np.flatnonzero(np.diff(mask.ravel("F"), prepend=0, append=0)), prepend=0, append=0)
            runs[-1] = mask.size - runs[:-1].sum()
            plain = annotation["id"] % 2
            annotation["segmentation"] = {"size": list(SIZE), "counts": runs.tolist() if plain else counts}

    encoded = load(tmp_path / "b", change)
    for image_id in polygons.image_ids:
        (masks, labels), (others, other_labels) = (read_objects(s, image_id) for s in (polygons, encoded))
        assert labels == other_labels == [1, 2]
        assert all(np.array_equal(a, b) for a, b in zip(masks, others, strict=True))


def _set(number: int, **fields: object) -> Callable[[dict], None]:
    return lambda content: content["annotations"][number].update(fields)


def test_crowds_are_no_targets_but_stay_for_the_evaluation(tmp_path: Path) -> None:
    split = load(tmp_path, _set(0, iscrowd=1))
    assert len(read_objects(split, 10)[0]) == 1
    assert len(split.coco.imgToAnns[10]) == 2


def test_images_without_objects_are_negatives(tmp_path: Path) -> None:
    split = load(tmp_path, lambda content: content["annotations"].__delitem__(slice(2)))
    target = TrainingImages(split, 128)[0, 0][1]
    assert {k: tuple(v.shape) for k, v in target.items()} == {"boxes": (0, 4), "labels": (0,), "masks": (0, 96, 128)}


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.4, 0.6), (1.5, 2.5)])
def test_targets_follow_the_pixels(data: Path, scales: tuple[float, float]) -> None:
    images = TrainingImages(load_split(data, "train"), 128, scales, seed=1)
    labels_seen = set()
    for draw in range(12):
        pixels, target = images[draw % 3, draw]
        assert target["masks"].shape[1:] == pixels.shape[1:] and max(pixels.shape) <= 128
        for mask, label, (x1, y1, x2, y2) in zip(target["masks"], target["labels"], target["boxes"], strict=True):
            assert mask.sum() == (x2 - x1) * (y2 - y1) == mask[int(y1) : int(y2), int(x1) : int(x2)].sum()
            inside = pixels[:, mask.bool()].median(dim=1).values * 255
            assert (inside - torch.tensor(COLOURS[(3, 90)[label - 1]])).abs().max() < 2
            labels_seen.add(int(label))
    assert labels_seen == {1, 2}


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.4, 0.6), (1.5, 2.5)])
def test_boxes_follow_the_pixels_as_those_of_masks_do(data: Path, scales: tuple[float, float]) -> None:
    """Without masks, the same draw gives the same picture and, to a pixel, the same boxes."""
    with_masks, alone = (
        TrainingImages(load_split(data, "train", masks=masks), 128, scales, seed=1) for masks in (True, False)
    )
    mirrored = set()
    for draw in range(12):
        (pixels, expected), (others, target) = with_masks[draw % 3, draw], alone[draw % 3, draw]
        assert torch.equal(pixels, others) and set(target) == {"boxes", "labels"}
        assert torch.equal(target["labels"], expected["labels"])
        assert (target["boxes"] - expected["boxes"]).abs().amax() <= 1 if len(target["boxes"]) else True
        mirrored.add(len(target["boxes"]) == 2 and bool(target["boxes"][0, 0] > target["boxes"][1, 0]))
    assert mirrored == {True, False}, "the red object is the left one in the file"


def test_boxes_of_less_than_a_pixel_are_dropped(tmp_path: Path) -> None:
    split = load(tmp_path, _set(0, bbox=[5, 5, 3, 30], segmentation=[]), masks=False)
    target = TrainingImages(split, 128, (0.25, 0.25))[0, 0][1]
    assert target["labels"].tolist() == [2] and target["boxes"].shape == (1, 4)
    boxes, labels = read_boxes(split, 10)
    assert boxes[0].tolist() == [5, 5, 8, 35] and labels == [1, 2]


def test_augmentation_depends_on_seed_and_draw_alone(data: Path) -> None:
    split = load_split(data, "train")
    images = [TrainingImages(split, 128, (0.5, 2.0), seed=seed) for seed in (0, 0, 1)]
    first, again, other_seed = (dataset[0, 5][0] for dataset in images)
    assert first.shape == again.shape and bool((first == again).all())
    assert all(first.shape != other.shape for other in (images[0][0, 6][0], other_seed))  # another scale


def test_bad_jitter(data: Path) -> None:
    with pytest.raises(ValueError, match="scale jitter"):
        TrainingImages(load_split(data, "train"), 128, (2.0, 1.0))


# ---- order ----------------------------------------------------------------------------------------------------------


def test_every_epoch_has_every_image_once_in_a_new_order() -> None:
    numbers = [number for batch in TrainingOrder(7, 2, 0, 14, seed=0) for number, _ in batch]
    epochs = [numbers[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_resumed_order_goes_on_where_it_stopped() -> None:
    whole = list(TrainingOrder(5, 3, 0, 10, seed=2))
    assert list(TrainingOrder(5, 3, 4, 10, seed=2)) == whole[4:]
    assert len(TrainingOrder(5, 3, 4, 10, seed=2)) == 6
    assert list(TrainingOrder(5, 3, 0, 10, seed=3)) != whole


def test_worker_processes_read_the_same(data: Path) -> None:
    """Also after OpenCV has started threads in the main process, as making the demo data does."""
    cv2.setNumThreads(2)
    cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (0, 0), 5)
    split = load_split(data, "train")
    images, order = TrainingImages(split, 64, (0.5, 1.5)), TrainingOrder(3, 2, 0, 3, seed=0)
    alone, workers = (list(make_loader(images, workers, order)) for workers in (0, 2))
    for (pixels, targets), (others, other_targets) in zip(alone, workers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pixels, others, strict=True))
        assert all(torch.equal(a[k], b[k]) for a, b in zip(targets, other_targets, strict=True) for k in a)


def test_evaluation_reads_every_image_once(data: Path) -> None:
    split = load_split(data, "train")
    found = [(images[0].shape, ids) for images, ids in make_loader(EvaluationImages(split), 0)]
    assert found == [((3, *SIZE), [i]) for i in split.image_ids]


def test_orientation_flags_are_ignored_where_the_annotations_ignore_them(tmp_path: Path) -> None:
    from PIL import Image

    split = load(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    Image.new("RGB", SIZE[::-1], (9, 9, 9)).save(tmp_path / "turned.jpg", exif=exif)
    shutil.move(tmp_path / "turned.jpg", split.folder / "1.png")
    assert read_image(split, 10).shape == (*SIZE, 3)
    assert json.loads((tmp_path / TRAIN_FILE).read_text())["images"][0]["height"] == SIZE[0]
