"""Count the labels in the masks of a data set before training and testing, as the pipeline will read them.

MMSegmentation itself trains on masks that are ignored as a whole, and then reports an mIoU of 100 or NaN: a class
without pixels does not count.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS
from PIL import Image
from tqdm import tqdm

from apt_dense.hosts.coco_lenient_values import plural
from apt_dense.hosts.coco_picture_sizes import picture_sizes, spread
from apt_dense.hosts.readable_images import check_all_whole

MOST = 1000  # masks that are read; of larger data sets, as many at even distances
SHOWN = 200  # classes in a message
ALLOW_OPTION = "--allow-empty-classes"
READING = "LoadAnnotations", "APTLoadAnnotations", "APTLoadLabels", "CheckLabels"  # steps of a pipeline

log = logging.getLogger(__name__)


class LabelCounts(NamedTuple):
    """Pixels by label in the masks of a data set."""

    pixels: np.ndarray  # (256,) of each label as the loss meets it
    in_files: np.ndarray  # (256,) of each label as the files have it
    masks: int  # that were read
    of: int  # masks of the data set


def check_labels(
    dataset: BaseSegDataset, pipeline: Sequence[Mapping], split: str, ignore_index: int = 255, every_class: bool = True
) -> LabelCounts | None:
    """Log how many pixels each class has, and refuse masks from which nothing, or nothing of a class, can be learned.

    Args:
        dataset: lists images and masks.
        pipeline: its config; the steps in it that read masks, ``READING``, are run on up to ``MOST`` masks.
        split: "train", "val" or "test", for messages.
        every_class: whether a class without pixels is an error, not only a warning. A class that a sample of the masks
            lacks is always a warning.

    Returns:
        What was counted; None where the config does not say enough to count.

    Raises:
        ValueError: naming the classes and what the files hold.
    """
    steps = [TRANSFORMS.build(step) for step in _steps(pipeline) if type_name(step) in READING]
    classes = dataset.metainfo.get("classes") or ()
    entries = dataset.load_data_list()
    loads = any(isinstance(step, LoadAnnotations) for step in steps)
    if not classes or not entries or "seg_map_path" not in entries[0] or not loads:
        log.info("%s data: labels are not counted, since the config names no classes, masks or LoadAnnotations", split)
        return None
    counts = count_labels(entries, steps, turns_pictures(pipeline))
    known = counts.pixels[: len(classes)]
    where = f"{split} data, {_masks(counts)} of {dataset.data_prefix.get('seg_map_path')}"
    shares = ", ".join(f"{name} {_percent(n, counts)}" for name, n in list(zip(classes, known, strict=True))[:SHOWN])
    ignored = f"{_percent(counts.pixels[ignore_index], counts)} of the pixels are ignored (label {ignore_index})"
    log.info("%s: %s; by class: %s", where, ignored, shares)
    _check_counts(counts, known, classes, f"{where}: {ignored}; {_files(counts, dataset)}", (split, every_class))
    return counts


def _check_counts(
    counts: LabelCounts, known: np.ndarray, classes: Sequence[str], found: str, rule: tuple[str, bool]
) -> None:
    split, every_class = rule
    empty = [name for name, count in zip(classes, known, strict=True) if not count]
    if not known.any():
        raise ValueError(f"{found}. No pixel is left to learn or score; correct the masks or reduce_zero_label")
    if not empty:
        return
    lack = f"{found}. None of {plural(len(empty), 'class', 'classes')}: {', '.join(map(str, empty[:SHOWN]))}"
    if len(classes) > 1 and len(empty) == len(classes) - 1 and (split == "train" or every_class):
        raise ValueError(f"{lack}. With a single label there is nothing to learn, and any model scores 100 %")
    if every_class and counts.masks == counts.of:
        raise ValueError(f"{lack}. Correct the masks or the list of classes, or add {ALLOW_OPTION}")
    log.warning("%s", lack)


def turns_pictures(pipeline: Sequence[Mapping]) -> bool:
    """Tell whether MMCV turns pictures as EXIF says, which it does not do with masks."""
    kinds = [str(step.get("color_type", "color")) for step in _steps(pipeline)]
    return not any(kind == "unchanged" or kind.endswith("ignore_orientation") for kind in kinds)


def count_labels(entries: Sequence[Mapping[str, Any]], steps: Sequence[Any], upright: bool = True) -> LabelCounts:
    """Read up to ``MOST`` masks by the steps of a pipeline.

    Args:
        upright: whether masks must have the sizes of pictures as shown, not as stored.

    Raises:
        ValueError: if an image is cut off, or a mask is damaged, of another size than its image, or refused by
            CheckLabels.
    """
    chosen = spread(entries, MOST)
    check_all_whole((entry["img_path"] for entry in chosen), len(entries))
    pixels, in_files = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for entry in tqdm(chosen, "counting labels", unit="mask", leave=False, delay=2):
        mask = _read(entry, steps, upright)
        pixels += np.bincount(mask.ravel(), minlength=256)
    for entry in chosen[:20]:  # enough for messages
        in_files += _labels_of_file(entry["seg_map_path"])
    return LabelCounts(pixels, in_files, len(chosen), len(entries))


def _read(entry: Mapping[str, Any], steps: Sequence[Any], upright: bool) -> np.ndarray:
    path = entry["seg_map_path"]
    results = {**entry, "seg_fields": [], **_size_of_image(entry["img_path"], upright)}
    try:
        for step in steps:
            results = step(results)
    except (OSError, SyntaxError, AssertionError) as error:
        raise ValueError(f"{path} is not a readable mask ({error}); replace it or its image") from error
    mask = results["gt_seg_map"]
    if mask.ndim != 2:
        raise ValueError(f"{path}: the mask has shape {mask.shape}; expected one label per pixel (H, W)")
    sizes = results.get("sizes_of_image", [mask.shape])
    if mask.shape not in sizes:
        raise ValueError(
            f"{path}: the mask has height and width {mask.shape}, but {entry['img_path']} has {sizes[0]}; "
            f"make them equal"
        )
    return mask


def _size_of_image(path: str, upright: bool) -> dict[str, Any]:
    """Return the size that the host gives an image; nothing where its own decoder is needed."""
    if not Path(path).is_file():
        return {}
    try:
        return {"sizes_of_image": [picture_sizes(Path(path))[0 if upright else -1]]}
    except ValueError:
        return {}  # such as .tif of many channels


def _labels_of_file(path: str) -> np.ndarray:
    if not Path(path).is_file():
        return np.zeros(256, np.int64)
    with Image.open(path) as mask:
        labels = np.asarray(mask)
    return np.bincount(labels.astype(np.uint8).ravel(), minlength=256)


def type_name(step: Mapping) -> str:
    """Return the name of a step's type, which configs also give as a class, or with a scope or package before it."""
    kind = step.get("type")
    return str(getattr(kind, "__name__", kind)).rpartition(".")[2]


def _steps(pipeline: Any) -> Iterator[Mapping]:
    """Yield the steps of a pipeline, also those inside of ``TestTimeAug`` and the like."""
    if isinstance(pipeline, Mapping):
        if "type" in pipeline:
            yield pipeline
        pipeline = list(pipeline.values())
    if isinstance(pipeline, list | tuple):
        for step in pipeline:
            yield from _steps(step)


# ---- messages -------------------------------------------------------------------------------------------------------


def _masks(counts: LabelCounts) -> str:
    return f"all {counts.of} masks" if counts.masks == counts.of else f"{counts.masks} of {counts.of} masks, a sample,"


def _percent(count: int, counts: LabelCounts) -> str:
    share = 100 * count / max(counts.pixels.sum(), 1)
    return f"{share:.1f} %" if share >= 0.05 or not count else "under 0.1 %"


def _files(counts: LabelCounts, dataset: BaseSegDataset) -> str:
    """Describe the labels in the files, with what is probably wrong with them."""
    if hasattr(dataset, "table"):  # files hold values that classes.txt gives a meaning
        return f"{dataset.table.path} says what the values in the files mean"
    labels = np.flatnonzero(counts.in_files).tolist()
    shown = ", ".join(map(str, labels[:12])) + (", ..." if len(labels) > 12 else "")
    reasons = [f"the files hold the labels {shown}"]
    if 255 in labels:
        reasons.append("255 is ignored: a mask of 0 and 255 needs 1 in place of 255")
    if dataset.reduce_zero_label and 0 in labels:
        reasons.append("reduce_zero_label=True ignores 0 and lowers the others by one")
    return ", ".join(reasons)
