"""Read the training pipeline of one of MMSegmentation's configs, and what it is to be run on."""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmcv.transforms import BaseTransform, LoadAnnotations
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings
from mmseg.utils import register_all_modules
from visualize import read_config

import apt_dense.hosts.mmseg  # noqa: F401 (registers what configs name)
from apt_dense import PatchSelector
from apt_dense.hosts.find_patch_selector import patch_options_of
from apt_dense.hosts.mmseg.arguments_from_pretrained import fill_in_config
from apt_dense.hosts.mmseg.config_errors import building_from
from apt_dense.hosts.mmseg.dataset_checks import dataset_configs
from apt_dense.hosts.mmseg.mask_pixels_per_class import type_name
from apt_dense.hosts.mmseg.readable_images import name_unreadable_files
from apt_dense.hosts.mmseg.training_config import load_config

from calibration.tokens_after_each_transform import Pipeline
from shared.photo_files import evenly_spread


class Task(NamedTuple):
    """A pipeline, and the photos to send through it.

    Args:
        settings: the steps and the preprocessor as the config has them.
    """

    pipeline: Pipeline
    photos: Sequence[Mapping[str, Any]]
    settings: str


def read_task(options: Namespace, photos: Sequence[Path]) -> Task:
    """Build the pipeline of ``options.pipeline``, for photos without masks or, without photos, for the config's data.

    Raises:
        ValueError, OSError: for a config that has no pipeline or cuts no patches by thresholds, or cannot be built.
    """
    register_all_modules(init_default_scope=False)
    cfg = _read(options, bool(photos))
    selector = _selector(options, cfg)
    data_sets = _data_sets(options.pipeline, cfg)
    steps = deepcopy(data_sets[0]["pipeline"])
    settings = cfg.model.get("data_preprocessor") or cfg.get("data_preprocessor")
    if not settings:
        raise ValueError(f"--pipeline {options.pipeline} has no data_preprocessor, which normalises and pads images")
    name_unreadable_files(steps)
    with building_from(cfg), DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmseg")):
        transforms = Compose(steps).transforms
        infos = evenly_spread([*_without_masks(photos)] if photos else [*_entries(data_sets)], options.photos)
        preprocessor, plain = (MODELS.build(deepcopy(one)) for one in (settings, {**settings, "test_cfg": None}))
    if photos:
        transforms = [StandInLabels() if isinstance(one, LoadAnnotations) else one for one in transforms]
    names = [*map(type_name, data_sets[0]["pipeline"]), f"padding by {type(preprocessor).__name__}"]
    pipeline = Pipeline(_numbered(names), transforms, plain, preprocessor, selector)
    return Task(pipeline, infos, f"{data_sets[0]['pipeline']} {settings}")


def _read(options: Namespace, has_photos: bool) -> Config:
    if not has_photos:
        read_config(options.pipeline)  # says what is no config with an APTViT
        cfg = load_config(str(options.pipeline), data_root=options.data_root and str(options.data_root))
        fill_in_config(cfg)
        return cfg
    cfg = read_config(options.pipeline)
    import_modules_from_strings(**cfg.get("custom_imports", {"imports": []}))
    return cfg


def _selector(options: Namespace, cfg: Config) -> PatchSelector:
    """Choose patches as the config's backbone, except where the command line says otherwise."""
    given = {"thresholds": options.thresholds, "scorer": options.scorer, "patch_size": options.patch_size}
    given = {name: value for name, value in given.items() if value is not None}
    selector = PatchSelector(**{**patch_options_of(cfg.model.backbone), "img_size": None, **given})
    if not selector.thresholds:
        raise ValueError(
            f"--pipeline {options.pipeline}: its backbone has no thresholds; give --thresholds to try some"
        )
    if selector.token_budget is not None:
        raise ValueError(
            f"--pipeline {options.pipeline}: with token_budget={selector.token_budget} every image keeps as many "
            f"tokens, whatever is done to it"
        )
    return selector


def _data_sets(path: Path, cfg: Config) -> list[dict]:
    """The configs of the training data sets, whose pipelines are the same. Raises ValueError."""
    loader = cfg.get("train_dataloader") or {}
    found = [data_set for data_set in dataset_configs(loader) if data_set.get("pipeline")]
    if not found:
        raise ValueError(f"--pipeline {path} has no train_dataloader whose data set has a pipeline")
    if any(data_set["pipeline"] != found[0]["pipeline"] for data_set in found):
        raise ValueError(f"--pipeline {path}: its {len(found)} training data sets have different pipelines")
    mixing = [node["type"] for node in _wrappers(loader) if node.get("pipeline")]
    if mixing:
        raise ValueError(
            f"--pipeline {path}: {mixing[0]} has a second pipeline, which mixes several images; its tokens are not "
            f"known for one photo"
        )
    return found


def _wrappers(node: Any) -> Iterator[dict]:
    """Every data set inside a config that wraps others."""
    if isinstance(node, Mapping) and "type" in node and {"dataset", "datasets"} & node.keys():
        yield node
    if isinstance(node, Mapping | list | tuple):
        for child in node.values() if isinstance(node, Mapping) else node:
            yield from _wrappers(child)


def _without_masks(photos: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for photo in photos:
        yield {"img_path": str(photo), "label_map": None, "reduce_zero_label": False, "seg_fields": []}


def _entries(data_sets: Sequence[dict]) -> Iterator[dict[str, Any]]:
    """The images and masks of data sets, as their pipelines take them."""
    for config in data_sets:
        data_set = DATASETS.build({**config, "pipeline": []})
        for index in range(len(data_set)):
            yield data_set.get_data_info(index)


def _numbered(names: Sequence[str]) -> list[str]:
    """Number the names that come again: Pad, Pad 2."""
    counts = [names[: place + 1].count(name) for place, name in enumerate(names)]
    return [name if count == 1 else f"{name} {count}" for name, count in zip(names, counts, strict=True)]


class StandInLabels(BaseTransform):
    """In place of the masks that photos lack: one class everywhere."""

    def transform(self, results: dict) -> dict:
        """Add ``gt_seg_map`` (H, W) uint8 of the image's size."""
        results["gt_seg_map"] = np.zeros(results["img"].shape[:2], np.uint8)
        results["seg_fields"].append("gt_seg_map")
        return results
