"""Check a segmentation data set before and while MMSegmentation reads it.

MMSegmentation itself silently leaves labels that are out of range out of the metric, fails on the device when the loss
meets them, wraps 16-bit labels around at 256, and looks for the folders only after it has built the model.
"""

import logging
import os
from collections.abc import Iterator, Sequence

import mmengine.fileio as fileio
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.registry import TRANSFORMS
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS
from mmseg.registry import TRANSFORMS as STEPS
from PIL import Image

from apt_dense.hosts.mmseg.mask_pixels_per_class import check_labels, type_name
from apt_dense.hosts.mmseg.readable_images import name_unreadable_files
from apt_dense.hosts.readable_images import DataError

STRETCHED = "Pad", "CenterCrop"  # steps of tests that change what a prediction is of
EXACT_IN_8_BITS = ("1", "L", "P")  # Pillow's names of one-channel formats that LoadAnnotations keeps as they are

log = logging.getLogger(__name__)


@TRANSFORMS.register_module()
class CheckLabels(BaseTransform):
    """Pipeline step after ``LoadAnnotations`` that refuses masks which the loss or the metric would get wrong.

    Args:
        num_classes: labels 0 to num_classes - 1 are allowed (after ``reduce_zero_label``).
        ignore_index: the only label outside this range that is allowed.

    Raises:
        DataError: if a label is out of range, the mask has colour channels or another size than its image, or its
            labels do not fit 8 bits. The message names the file, the label and the allowed range.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        if not 1 <= num_classes <= 255:
            raise ValueError(f"CheckLabels(num_classes={num_classes}): expected 1 to 255, as masks have 8 bits")
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def transform(self, results: dict) -> dict:
        """Check ``results["gt_seg_map"]``, (H, W) uint8, and return ``results`` unchanged."""
        mask, path = results["gt_seg_map"], results.get("seg_map_path", "(mask without a path)")
        if mask.ndim != 2:
            raise DataError(
                f"{path}: the mask has shape {mask.shape}, but one label per pixel (H, W) is needed. "
                "Convert colour masks to 8-bit label indices first."
            )
        _check_size(mask, results, path)
        highest = np.where(mask == self.ignore_index, 0, mask).max(initial=0)
        if highest >= self.num_classes:
            raise DataError(self._out_of_range(mask, path, bool(results.get("reduce_zero_label"))))
        _check_depth(path)
        return results

    def _out_of_range(self, mask: np.ndarray, path: str, reduced: bool) -> str:
        labels = np.unique(mask)
        wrong = labels[(labels >= self.num_classes) & (labels != self.ignore_index)]
        in_file = f" after reduce_zero_label, that is {wrong[0] + 1} in the file" if reduced else ""
        return (
            f"{path}: label {wrong[0]}{in_file}, only 0 to {self.num_classes - 1} and {self.ignore_index} (ignored) "
            f"are allowed; wrong labels in this mask: {len(wrong)}, up to {wrong[-1]}. Correct the mask, or set "
            "num_classes of the heads and of CheckLabels to what the data set has, and check reduce_zero_label"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_classes={self.num_classes}, ignore_index={self.ignore_index})"


def _check_size(mask: np.ndarray, results: dict, path: str) -> None:
    """Refuse a mask that has neither the size of its image now nor that of its file."""
    sizes = [tuple(results[key][:2]) for key in ("img_shape", "ori_shape", "pad_shape") if key in results]
    if sizes and mask.shape not in sizes:
        raise DataError(
            f"{path}: the mask has height and width {mask.shape}, but its image has {sizes[-1]}; make them equal"
        )


def _check_depth(path: str) -> None:
    """Refuse a mask with labels that LoadAnnotations has changed: 256 became 0, 257 became 1, and 0.5 became 0."""
    if not os.path.isfile(path):  # remote storage: no cheap look at the header
        return
    with Image.open(path) as image:
        labels = np.zeros((), np.uint8) if image.mode in EXACT_IN_8_BITS else np.asarray(image)
    wrong = labels[(labels < 0) | (labels > 255) | (labels != np.floor(labels)) | np.isnan(labels)]
    if wrong.size:
        raise DataError(
            f"{path}: label {wrong.max():g} in a mask of more than 8 bits; MMSegmentation reads whole labels 0 to 255"
        )


def dataset_configs(node: object) -> Iterator[dict]:
    """Yield the config of each data set inside a data loader's config, through wrappers such as ``ConcatDataset``."""
    if isinstance(node, dict) and ("data_prefix" in node or _is_data_set(node)):
        yield node
    elif isinstance(node, (dict, list, tuple)):
        for child in node.values() if isinstance(node, dict) else node:
            yield from dataset_configs(child)


def _is_data_set(node: dict) -> bool:
    return "type" in node and "pipeline" in node and not {"dataset", "datasets"} & node.keys()


def check_data(cfg: Config, splits: Sequence[str], every_class: bool = True) -> None:
    """Check that images and masks of each split ("train", "val", "test") exist, the numbers of classes agree, and the
    masks hold something to learn or score (``check_labels``). Pipelines without CheckLabels get it,
    and read files by APTLoadImage and APTLoadAnnotations.

    Args:
        every_class: whether each class needs a pixel.

    Raises:
        FileNotFoundError: if a folder is missing or empty, or images have no mask.
        ValueError: if the heads, the data set and CheckLabels disagree about the number of classes, or masks hold none
            of a class.
    """
    checked = []
    for split in splits:
        for dataset_cfg in dataset_configs(cfg.get(f"{split}_dataloader") or {}):
            dataset = _build(dataset_cfg, split)
            if not isinstance(dataset, BaseSegDataset):
                continue
            _check_classes(cfg, dataset, dataset_cfg)
            _warn_of_stretching(dataset_cfg.get("pipeline") or (), split)
            _check_files(dataset, split)
            _add_label_check(dataset_cfg.get("pipeline"), len(dataset.metainfo.get("classes") or ()), dataset)
            if dataset_cfg not in checked:  # train and val may be the same
                pipeline = dataset_cfg.get("pipeline") or ()
                counts = check_labels(dataset, pipeline, split, dataset.ignore_index, every_class)
                if counts is not None and counts.pixels[dataset.ignore_index]:
                    _check_ignored(cfg, split, dataset)
                checked.append(dataset_cfg)
            name_unreadable_files(dataset_cfg.get("pipeline"))


def _add_label_check(pipeline: object, classes: int, dataset: BaseSegDataset) -> None:
    """Insert CheckLabels after LoadAnnotations, also inside of ``TestTimeAug`` and the like, unless it is there or a
    step of the user's own may change labels."""
    if isinstance(pipeline, dict):
        pipeline = list(pipeline.values())
    if not isinstance(pipeline, list):
        return
    steps = [step for step in pipeline if isinstance(step, dict) and "type" in step]
    names = [type_name(step) for step in steps]
    reading = next((name for name in names if name.removeprefix("APT") == "LoadAnnotations"), None)
    unchecked = reading is not None and "CheckLabels" not in names and all(map(_keeps_labels, names))
    if unchecked and 1 <= classes <= 255:
        check = {"type": "CheckLabels", "num_classes": classes, "ignore_index": dataset.ignore_index}
        pipeline.insert(pipeline.index(steps[names.index(reading)]) + 1, check)
    for child in pipeline:
        _add_label_check(child, classes, dataset)


def _keeps_labels(step: str) -> bool:
    return getattr(STEPS.get(step), "__module__", "").startswith(("mm", "apt_dense"))


def _build(dataset_cfg: dict, split: str) -> object:
    lazy = dict(dataset_cfg, pipeline=[], lazy_init=True)  # only names and paths: nothing is read yet
    try:
        return DATASETS.build(lazy)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the {split} data set {dataset_cfg.get('type')} cannot be built: {one_line(error)}"
        ) from error


def one_line(error: BaseException) -> str:
    """Return the kind and the first line of an error's message."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _check_classes(cfg: Config, dataset: BaseSegDataset, dataset_cfg: dict) -> None:
    classes = len(dataset.metainfo.get("classes") or ())
    heads = [cfg.model.get("decode_head"), cfg.model.get("auxiliary_head")]
    steps = [step for step in dataset_cfg.get("pipeline", ()) if type_name(step) == "CheckLabels"]
    for part in _flat(heads) + steps:
        if classes and part.get("num_classes", classes) != classes:
            raise ValueError(
                f"{part['type']} has num_classes={part['num_classes']!r}, but {type(dataset).__name__} has {classes} "
                "classes: set num_classes of decode_head, auxiliary_head and CheckLabels to the data set's number"
            )


def _check_ignored(cfg: Config, split: str, dataset: BaseSegDataset) -> None:
    """Raise where the masks hold labels that the data set ignores and the loss or the metric does not: it fails, or
    counts them as wrong."""
    heads = _flat([cfg.model.get("decode_head"), cfg.model.get("auxiliary_head")]) if split == "train" else []
    evaluators = _flat([cfg.get(f"{split}_evaluator")])
    for part in [*heads, *(one for one in evaluators if type_name(one).endswith("IoUMetric"))]:
        ignored = part.get("ignore_index", 255)
        if ignored != dataset.ignore_index:
            raise ValueError(
                f"the masks of the {split} data hold label {dataset.ignore_index}, which {type(dataset).__name__} "
                f"ignores, but {part['type']} ignores {ignored}: set ignore_index of both to the same label"
            )


def _warn_of_stretching(pipeline: Sequence[dict], split: str) -> None:
    names = [type_name(step) for step in pipeline if isinstance(step, dict) and type_name(step) in STRETCHED]
    if names and split != "train":
        log.warning(
            "%s data: the pipeline has %s, after which MMSegmentation stretches the prediction over the whole image: "
            "masks and scores are shifted. Pad by model.data_preprocessor.test_cfg=dict(size_divisor=...) instead",
            split, names[0],
        )  # fmt: skip


def _flat(heads: Sequence[dict | list | None]) -> list[dict]:
    """Flatten the heads of a segmentor, each of which may be absent, a config, or a list of configs."""
    nested = [head if isinstance(head, (list, tuple)) else [head] for head in heads if head]
    return [head for group in nested for head in group]


def _check_files(dataset: BaseSegDataset, split: str) -> None:
    """Raise unless every local image of the split has a mask; remote storage is left to MMSegmentation."""
    if hasattr(dataset, "check_files"):
        dataset.check_files()
        return
    if dataset.backend_args and dataset.backend_args.get("backend", "local") != "local":
        return
    if dataset.ann_file and not os.path.exists(dataset.ann_file):
        raise FileNotFoundError(_advice(dataset, split, f"the list of images {dataset.ann_file} does not exist"))
    images = _names(dataset, split, "img_path", dataset.img_suffix)
    if dataset.data_prefix.get("seg_map_path") is None or dataset.ann_file:
        return  # no masks asked for, or the list of images names fewer than the folder holds
    unpaired = sorted(images - _names(dataset, split, "seg_map_path", dataset.seg_map_suffix))
    if unpaired:
        found = f"{len(unpaired)} of {len(images)} images have no mask, the first is {unpaired[0]}{dataset.img_suffix}"
        raise FileNotFoundError(_advice(dataset, split, found))


def _names(dataset: BaseSegDataset, split: str, prefix: str, suffix: str) -> set[str]:
    """List all files below one of the data set's folders: relative paths without the suffix."""
    folder = dataset.data_prefix[prefix]
    if not os.path.isdir(folder):
        raise FileNotFoundError(_advice(dataset, split, f"the folder {folder} does not exist"))
    files = fileio.list_dir_or_file(folder, list_dir=False, suffix=suffix, recursive=True)
    names = {name[: -len(suffix)] for name in files}
    if not names:
        raise FileNotFoundError(_advice(dataset, split, f"the folder {folder} holds no file *{suffix}"))
    return names


def _advice(dataset: BaseSegDataset, split: str, found: str) -> str:
    root = os.path.abspath(dataset.data_root or ".")
    images, masks = dataset.data_prefix.get("img_path"), dataset.data_prefix.get("seg_map_path")
    return (
        f"{split} data: {found} (data_root is {root}). Expected: images {images}/NAME{dataset.img_suffix} and masks "
        f"{masks}/NAME{dataset.seg_map_suffix}. Unpack the data set there, or name its folder with --data-root DIR."
    )
