"""The classes of a run's data set, written to its folder: neither its config nor its checkpoints name them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf

from apt_dense.hosts.coco_annotations import read_annotations
from apt_dense.weights.files import write_text_whole

FILE = "classes.json"  # [[id in annotation files, name], ...] in the order of the model's classes

Classes = list[tuple[int, str]]


def write_classes(cfg: DictConfig | CfgNode, folder: str | Path) -> None:
    """Write the classes of the data set of a config, lazy or yacs, to a run's folder, where they are known. Raises
    OSError."""
    if isinstance(cfg, CfgNode):
        names = [cfg.DATASETS.TRAIN, cfg.DATASETS.TEST]
    else:
        names = [OmegaConf.select(cfg, f"dataloader.{part}.dataset.names") for part in ("train", "test")]
    classes = known_classes(_flat(names))
    if classes is not None:
        write_text_whole(Path(folder, FILE), json.dumps(classes) + "\n")


def read_classes(folder: Path, data_sets: Iterable[Any], count: int) -> Classes:
    """Find the ``count`` classes of a run, in its folder or in one of its data sets; numbers if nothing names them."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        classes = [(int(number), str(name)) for number, name in content]
    except (OSError, ValueError, TypeError):
        classes = known_classes(_flat(data_sets))
    if classes is None or len(classes) != count:
        return [(number + 1, f"class {number}") for number in range(count)]
    return classes


def known_classes(data_sets: Iterable[str]) -> Classes | None:
    """Ask Detectron2's catalogue, or the annotation file that a data set is registered with or named after; None if no
    one knows."""
    for name in data_sets:
        metadata = MetadataCatalog.get(name) if name in MetadataCatalog.list() else None
        names = metadata.get("thing_classes") if metadata else None
        if names:
            labels = metadata.get("thing_dataset_id_to_contiguous_id")
            ids = sorted(labels, key=labels.get) if labels else range(1, len(names) + 1)
            return list(zip(ids, names, strict=True))
        file = str(metadata.get("json_file")) if metadata else name  # read by Detectron2 when training starts
        if file.endswith(".json") and Path(file).is_file():
            listed = read_annotations(Path(file))["categories"]
            return sorted((entry["id"], str(entry.get("name", entry["id"]))) for entry in listed)
    return None


def _flat(names: Iterable[Any]) -> list[str]:
    """Flatten names of data sets, each of which may be absent, a name, or several."""
    several = [[name] if isinstance(name, str) else name or () for name in names]
    return [name for group in several for name in group if isinstance(name, str)]
