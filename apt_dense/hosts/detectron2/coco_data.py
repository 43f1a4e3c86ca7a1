"""Data sets of Detectron2's lazy configs: any folder in COCO's layout, checked before a model is built.

Detectron2 itself finds missing files and objects without masks when it comes to them, in the middle of training.
"""

import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, ListConfig, OmegaConf
from pycocotools import mask as run_lengths

from apt_dense.hosts.coco import LAYOUT, CocoData, Needs, check_same_categories, load_split, read_split

log = logging.getLogger(__name__)


def use_data_root(cfg: DictConfig, root: str, splits: Sequence[str], every_class: bool = True) -> None:
    """Point a lazy config to a folder in COCO's layout: register its splits, set their names and the classes.

    Args:
        splits: of "train" and "val"; only these must be there.
        every_class: whether each class needs an object.

    Raises:
        FileNotFoundError: if a folder, an annotation file or an image is missing.
        ValueError: if an annotation file is damaged or cannot be trained with, or splits differ in their categories.
    """
    needs = _needs(cfg, every_class)
    found = {split: _read(root, split, needs) for split in splits}
    first, *others = found.values()
    for data in others:
        check_same_categories(data.categories, first.categories, data.path, first.path)
    for split, data in found.items():
        name = _register(data, split, partial(_read, root, split, needs))
        OmegaConf.update(cfg, _names_key(split), name)
    if "val" in found and cfg.dataloader.get("evaluator") is not None:
        _set_data_set(cfg.dataloader.evaluator, cfg.dataloader.test.dataset.names)
    _set_classes(cfg, len(first.categories))


def _names_key(split: str) -> str:
    return f"dataloader.{'train' if split == 'train' else 'test'}.dataset.names"


def _set_data_set(evaluator: DictConfig | ListConfig, name: str) -> None:
    for one in evaluator if OmegaConf.is_list(evaluator) else [evaluator]:
        one.dataset_name = name


#: Where the number of classes stands: in two-stage detectors, one-stage detectors, and their heads.
_CLASS_KEYS = ("model.roi_heads.num_classes", "model.num_classes", "model.head.num_classes")


def _set_classes(cfg: DictConfig, count: int) -> None:
    present = [key for key in _CLASS_KEYS if isinstance(OmegaConf.select(cfg, key), int)]
    if not present:
        raise ValueError(f"the config has none of {', '.join(_CLASS_KEYS)}; set one of them to {count}")
    for key in present:
        if not OmegaConf.is_interpolation(OmegaConf.select(cfg, key.rpartition(".")[0]), "num_classes"):
            OmegaConf.update(cfg, key, count)


def _needs(cfg: DictConfig, every_class: bool) -> Needs:
    return Needs(OmegaConf.select(cfg, "model.roi_heads.mask_head") is not None, True, every_class)


def _read(root: str, split: str, needs: Needs) -> CocoData:
    return load_split(Path(root).expanduser().resolve(), split, **needs._asdict())


def _register(data: CocoData, split: str, read: Callable[[], CocoData]) -> str:
    """Register a split under the path of its annotation file, which is unique; return that name.

    Detectron2 trains on the records made here. Its evaluation reads an annotation file: the data set's, or a temporary
    one if annotations had to be left out or completed.

    Args:
        read: reads the split again when Detectron2 asks for it, so that it is not kept in memory until then.
    """
    name = str(data.path)
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: records(read()))
    MetadataCatalog.get(name).set(
        json_file=_evaluation_file(data) if split == "val" and data.is_changed else name,
        image_root=str(data.folder),
        evaluator_type="coco",
        thing_classes=[category_name for _, category_name in data.categories],
        thing_dataset_id_to_contiguous_id=_labels(data),
    )
    return name


#: Temporary files by data set; they are removed when the process ends or the data set is registered again.
_temporary: dict[Path, tempfile.TemporaryDirectory] = {}


def _evaluation_file(data: CocoData) -> str:
    folder = _temporary[data.path] = tempfile.TemporaryDirectory(prefix="apt_dense_")
    path = Path(folder.name) / data.path.name
    path.write_text(json.dumps(data.content), encoding="utf-8")
    return str(path)


def _labels(data: CocoData) -> dict[int, int]:
    return {category: label for label, (category, _) in enumerate(data.categories)}


def records(data: CocoData) -> list[dict[str, Any]]:
    """Return a split in Detectron2's form: a dictionary per image, by ascending id, as ``load_coco_json`` does."""
    labels = _labels(data)
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in data.content["images"]}
    for annotation in data.content["annotations"]:
        objects[annotation["image_id"]].append(_object(annotation, labels))
    return [
        {
            "file_name": os.path.join(data.folder, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": objects[image["id"]],
        }
        for image in sorted(data.content["images"], key=lambda image: image["id"])
    ]


def _object(annotation: dict[str, Any], labels: dict[int, int]) -> dict[str, Any]:
    found = {
        "iscrowd": annotation["iscrowd"],
        "bbox": annotation["bbox"],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": labels[annotation["category_id"]],
    }
    outline = annotation.get("segmentation")
    if isinstance(outline, dict) and isinstance(outline["counts"], list):
        outline = run_lengths.frPyObjects(outline, *outline["size"])  # compressed, as Detectron2 reads them
    return found | {"segmentation": outline} if outline else found


def check_data(cfg: DictConfig, splits: Sequence[str], every_class: bool = True) -> None:
    """Check that the data sets a lazy config names are registered and have as many classes as the model.

    The content of registered COCO files is checked as that of --data-root is, but Detectron2 trains on it as it is.

    Raises:
        FileNotFoundError, ValueError: naming the data set, the path and the remedy.
    """
    if "train" in splits:
        _check_shapely(cfg)
    for split in splits:
        _refuse_proposals(cfg, split)
        names = OmegaConf.select(cfg, _names_key(split))
        for name in [names] if isinstance(names, str) else names or []:
            if name not in DatasetCatalog.list():
                raise ValueError(f"data set {name!r} is not registered; name a folder with --data-root DIR: {LAYOUT}")
            _check_registered(name, OmegaConf.select(cfg, "model.roi_heads.num_classes"))
            _check_content(name, split, _needs(cfg, every_class))


def _refuse_proposals(cfg: DictConfig, split: str) -> None:
    key = _names_key(split).replace("names", "proposal_files")
    if OmegaConf.select(cfg, key):
        raise ValueError(
            f"{key}={OmegaConf.select(cfg, key)}: Detectron2 would run the code that such files of proposals may hold; "
            f"leave it out, as detectors with an RPN make proposals themselves"
        )


def _check_shapely(cfg: DictConfig) -> None:
    """Detectron2 cuts polygons with shapely, which it imports only when the first image is cropped."""
    steps = OmegaConf.select(cfg, "dataloader.train.mapper.augmentations") or []
    crops = any("Crop" in str(step._target_) for step in steps)
    if crops and importlib.util.find_spec("shapely") is None:
        raise ValueError("the training loader crops images, for which Detectron2 needs shapely: pip install shapely")


def _check_registered(name: str, num_classes: int | None) -> None:
    known = MetadataCatalog.get(name)
    for path, exists in ((known.get("json_file"), PathManager.isfile), (known.get("image_root"), PathManager.isdir)):
        if path is not None and not exists(path):
            raise FileNotFoundError(
                f"data set {name!r} needs {path}, which does not exist. Set the environment variable "
                f"DETECTRON2_DATASETS to the folder that holds coco/, or name another with --data-root DIR: {LAYOUT}"
            )
    classes = known.get("thing_classes")
    if classes is not None and num_classes is not None and len(classes) != num_classes:
        raise ValueError(
            f"model.roi_heads.num_classes={num_classes}, but data set {name!r} has {len(classes)} classes; "
            f"make them equal"
        )


def _check_content(name: str, split: str, needs: Needs) -> None:
    """Check a registered annotation file, unless :func:`use_data_root` has done so."""
    known = MetadataCatalog.get(name)
    if known.get("json_file") is None or known.get("evaluator_type") != "coco" or name.endswith(".json"):
        return
    folder = Path(PathManager.get_local_path(known.image_root))
    if read_split(Path(PathManager.get_local_path(known.json_file)), folder, split, needs).is_changed:
        log.warning(
            "data set %r: Detectron2 uses its annotations as they are, including those named above; with --data-root "
            "they would be corrected or left out",
            name,
        )
