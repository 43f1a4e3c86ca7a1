"""Complete a config that names a data set of one's own and weights, and leaves the rest to them.

    data_root = "data/own"     # folder with images, masks and classes.txt
    pretrained = "timm://vit_small_patch14_dinov2.lvd142m"   # or a file

The data decide the folders of each split and the number of classes; the weights decide the backbone, its channels in
necks and heads, and the normalisation of pixels. What a config says itself stays.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from apt_dense.hosts.mmseg.arguments_from_pretrained import TIMM, fill_in_config
from apt_dense.hosts.mmseg.dataset_checks import dataset_configs
from apt_dense.hosts.mmseg.find_images_and_masks import find_folders
from apt_dense.hosts.mmseg.own_data_dataset import read_own_classes
from apt_dense.options import PixelFormat
from apt_dense.weights.arguments_in_own_metadata import plain_options
from apt_dense.weights.timm_arguments import apt_arguments, timm_model_without_weights

SPLITS = "train", "val", "test"

log = logging.getLogger(__name__)


def complete_own_data(cfg: Config) -> None:
    """Complete a config whose data sets are ``APTFolders``; leave any other config as it is. The config then needs
    neither the keys above nor the file of weights to be built again.

    Raises:
        FileNotFoundError, ValueError: if data or weights are not named, not there, or do not tell enough.
    """
    datasets = [
        (split, dataset)
        for split in SPLITS
        for dataset in dataset_configs(cfg.get(f"{split}_dataloader"))
        if dataset.get("type") == "APTFolders"
    ]
    if not datasets:
        return
    found: dict[str, dict] = {}
    for split, dataset in datasets:
        _complete_data_set(dataset, split, cfg.get("data_root"), found.get("val"))
        found[split] = dataset
    classes = len(read_own_classes(Path(datasets[0][1]["data_root"])).names)
    for head in _heads(cfg.model):
        head["num_classes"] = head.get("num_classes") or classes
    complete_from_weights(cfg)


def complete_from_weights(cfg: Config) -> None:
    """Complete what the lines ``pretrained``, ``architecture`` and ``image_size`` of a config decide, without its data.

    Raises:
        FileNotFoundError, ValueError: if the weights are not there, or do not tell enough.
    """
    if "pretrained" in cfg or "architecture" in cfg:
        complete_model(cfg, cfg.pop("pretrained", None), cfg.pop("architecture", None))
    if "image_size" in cfg:
        set_image_size(cfg, cfg.pop("image_size"))


def _complete_data_set(dataset: dict, split: str, data_root: str | None, val: dict | None) -> None:
    """Find the folders of a split; without test data, those of ``val``."""
    root = dataset.get("data_root") or data_root
    if root is None:
        raise ValueError("the config names no data set: add data_root = 'FOLDER' to it, or --data-root FOLDER")
    dataset["data_root"] = root
    if dataset.get("data_prefix"):
        return
    try:
        found = find_folders(Path(root), split)
    except FileNotFoundError:
        if split != "test" or val is None:
            raise
        found = {key: val[key] for key in ("data_prefix", "ann_file") if key in val}
        log.info("%s has no test data: those of val are tested", root)
    dataset.update(found)


# ---- the model ------------------------------------------------------------------------------------------------------


def complete_model(cfg: Config, pretrained: str | None, architecture: str | None) -> None:
    """Give the backbone the arguments of its weights, and necks and heads its channels.

    Args:
        pretrained: weights, as for the backbone: a file, an address, or ``timm://NAME``.
        architecture: timm's name of the model that a file holds, where the file does not tell all of its arguments.

    Raises:
        FileNotFoundError, CheckpointError: if the weights cannot be read, or do not tell an argument.
        ValueError: if the architecture is not known.
    """
    model = cfg.model
    model.backbone["pretrained"] = pretrained
    if architecture:
        if pretrained and "patch_size" in model.backbone:
            weights = {"type": "Pretrained", "checkpoint": model.backbone.pop("pretrained"), "resize_patches": True}
            model.backbone["init_cfg"] = weights
        model.backbone = {**_arguments_of_timm(architecture, pretrained), **model.backbone}
    elif pretrained:
        fill_in_config(cfg)
    if "embed_dim" not in model.backbone:
        raise ValueError(
            f"pretrained={pretrained} does not tell the architecture: add architecture = 'NAME', timm's name of the "
            f"model, such as vit_small_patch14_dinov2; or name weights, such as pretrained = 'timm://NAME'"
        )
    backbone, depth = model.backbone, model.backbone["depth"]
    indices = model.decode_head.get("in_index")
    if isinstance(indices, list | tuple):
        backbone.setdefault("out_indices", spread_blocks(depth, len(indices)))
        backbone.setdefault("norm_intermediates", backbone.get("final_norm", False))
    _set_channels(model, backbone["embed_dim"])
    for key, source in (("mean", "pixel_mean"), ("std", "pixel_std")):
        model.data_preprocessor.setdefault(key, list(backbone.get(source, getattr(PixelFormat(), key))))


def _arguments_of_timm(architecture: str, pretrained: str | None) -> dict[str, Any]:
    if pretrained and pretrained.startswith(TIMM):
        raise ValueError(f"architecture={architecture} goes with a file of weights; {pretrained} tells its own")
    return plain_options(apt_arguments(timm_model_without_weights(architecture)))


def _set_channels(model: Mapping[str, Any], width: int) -> None:
    if model.get("neck"):
        model["neck"].setdefault("embed_dim", width)
    for head in _heads(model):
        indices = head.get("in_index")
        head.setdefault("in_channels", [width] * len(indices) if isinstance(indices, list | tuple) else width)
        if head.get("num_convs") == 0:  # a classifier of the maps as they are
            head.setdefault("channels", width)


def spread_blocks(depth: int, count: int) -> tuple[int, ...]:
    """Return ``count`` of ``depth`` blocks at even distances, ending with the last: 2, 5, 8, 11 for 4 of 12."""
    return tuple((number + 1) * depth // count - 1 for number in range(count))


def _heads(model: Mapping[str, Any]) -> Iterator[dict]:
    for part in (model.get("decode_head"), model.get("auxiliary_head")):
        yield from part if isinstance(part, list | tuple) else [part] if part else []


# ---- sizes ----------------------------------------------------------------------------------------------------------


def set_image_size(cfg: Config, size: int) -> None:
    """Train on square crops of ``size`` pixels, rounded up to whole patches, and scale everything else in proportion.

    Pipelines, preprocessor and sliding windows are expected to agree on the size of crops that they are written for.

    Raises:
        ValueError: if ``size`` is not a positive integer.
    """
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"image_size={size!r}: expected pixels, at least 1")
    model, patch = cfg.model, cfg.model.backbone.get("patch_size", 16)
    size = math.ceil(size / patch) * patch
    factor = size / model.data_preprocessor.size[0]
    model.data_preprocessor.size = (size, size)
    model.backbone.img_size = size
    for key in {"crop_size", "stride"} & (model.get("test_cfg") or {}).keys():
        model.test_cfg[key] = _scaled(model.test_cfg[key], factor)
    loaders = [cfg.get(f"{split}_dataloader") for split in SPLITS]
    pipelines = [dataset.get("pipeline") for loader in loaders for dataset in dataset_configs(loader)]
    steps = {id(step): step for step in _steps([*pipelines, cfg.get("tta_pipeline")])}  # splits may share one
    for step in steps.values():
        for key in {"scale", "crop_size"} & step.keys():
            step[key] = _scaled(step[key], factor)


def _scaled(sizes: tuple[int, int], factor: float) -> tuple[int, ...]:
    return tuple(round(side * factor) for side in sizes)


def _steps(node: object) -> Iterator[dict]:
    """Yield the steps of a pipeline, also those inside of others."""
    if isinstance(node, dict):
        if "type" in node:
            yield node
        node = list(node.values())
    if isinstance(node, list | tuple):
        for child in node:
            yield from _steps(child)
