"""Data sets of Detectron2's lazy configs: any folder in COCO's layout, checked before a model is built.

Detectron2 itself finds out about missing files and objects without masks when it comes to them, in the middle of
training.
"""

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf

#: What the folder of a split's images may be called, beside the name in its annotation file ("train2017").
FOLDERS = {"train": ("train", "training"), "val": ("val", "validation")}
LAYOUT = (
    "expected DIR/annotations/instances_train*.json and instances_val*.json with images in DIR/train2017 and "
    "DIR/val2017 (COCO), or DIR/coco/annotations/... with images in DIR/images/training and validation "
    "(tools/make_demo_data.py)"
)


class CocoSplit(NamedTuple):
    """One split of a data set on disk."""

    annotations: Path
    images: Path
    categories: tuple[tuple[int, str], ...]  # ids, which may have holes, and names, ascending


def use_data_root(cfg: DictConfig, root: str, splits: Sequence[str]) -> None:
    """Point a lazy config to a folder in COCO's layout: register its splits, set their names and the classes.

    Args:
        splits: of "train" and "val"; only these must be there.

    Raises:
        FileNotFoundError: a folder, an annotation file or an image is missing.
        ValueError: an annotation file is damaged or cannot be trained with, or splits differ in their categories.
    """
    found = {split: find_split(Path(root).expanduser().resolve(), split) for split in splits}
    if len({part.categories for part in found.values()}) > 1:
        files = " and ".join(str(part.annotations) for part in found.values())
        raise ValueError(f"{files} differ in their categories (ids and names); one model cannot learn both")
    for split, part in found.items():
        loader = cfg.dataloader["train" if split == "train" else "test"]
        loader.dataset.names = _register(part)
    if "val" in found and "evaluator" in cfg.dataloader:
        cfg.dataloader.evaluator.dataset_name = cfg.dataloader.test.dataset.names
    cfg.model.roi_heads.num_classes = len(part.categories)


def _register(split: CocoSplit) -> str:
    """Register the split under the path of its annotation file, which is unique."""
    name = str(split.annotations)
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, name, str(split.images))
    return name


def find_split(root: Path, split: str) -> CocoSplit:
    """The annotations and images of a split below ``root``, checked; raises as :func:`use_data_root`."""
    annotations = _annotation_file(root, split)
    content = _read(annotations)
    names = [image["file_name"] for image in content["images"]]
    images = _image_folder(annotations, split, names)
    _check_images(annotations, images, names)
    if split == "train":
        _check_objects(annotations, content["annotations"])
    categories = sorted((category["id"], category["name"]) for category in content["categories"])
    return CocoSplit(annotations, images, tuple(categories))


def _annotation_file(root: Path, split: str) -> Path:
    folders = root / "annotations", root / "coco" / "annotations"
    found = [path for folder in folders for path in sorted(folder.glob(f"instances_{split}*.json"))]
    of_2017 = [path for path in found if path.stem.endswith("2017")]
    if len(of_2017 or found) == 1:
        return (of_2017 or found)[0]
    if not found:
        what = "holds no" if root.is_dir() else "does not exist, so there is no"
        raise FileNotFoundError(f"{root} {what} annotations/instances_{split}*.json; {LAYOUT}")
    raise ValueError(f"{root} holds several annotation files for {split}, {', '.join(map(str, found))}; keep one there")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({error}); write or download it again") from error
    known = content if isinstance(content, dict) else {}
    missing = [key for key in ("images", "annotations", "categories") if not known.get(key)]
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}; expected COCO's format for instances")
    return content


def _image_folder(annotations: Path, split: str, names: Sequence[str]) -> Path:
    """The first folder of the usual places that holds an image of the split."""
    called = (annotations.stem.removeprefix("instances_"), *FOLDERS[split])
    bases = annotations.parent.parent, annotations.parent.parent.parent
    inside = [base / folder / name for base in bases for folder in ("", "images") for name in called]
    places = [*inside, *(base / folder for base in bases for folder in ("images", ""))]
    for place in dict.fromkeys(places):
        if any((place / name).is_file() for name in names[:10]):
            return place
    tried = ", ".join(str(place) for place in inside[: 2 * len(called)])
    raise FileNotFoundError(f"no image that {annotations} names ({names[0]}, ...) is in {tried}; {LAYOUT}")


def _check_images(annotations: Path, images: Path, names: Sequence[str]) -> None:
    # One listing instead of a look at each file, which is slow on network storage.
    listed = set(os.listdir(images))
    missing = [name for name in names if name not in listed and not (os.sep in name and (images / name).is_file())]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images that {annotations} names are not in {images}, the first is "
            f"{missing[0]}; copy them there, or take them out of the annotations"
        )


def _check_objects(annotations: Path, objects: Sequence[Mapping]) -> None:
    """Refuse what Detectron2 would stop at in the middle of training: no object at all, or objects without masks."""
    singles = [thing for thing in objects if not thing.get("iscrowd")]
    if not singles:
        raise ValueError(f"{annotations} has only crowds (iscrowd=1), which are not trained with; label single objects")
    bare = [thing["id"] for thing in singles if not thing.get("segmentation")]
    if bare and len(bare) < len(singles):
        raise ValueError(
            f"{len(bare)} of {len(singles)} objects in {annotations} have no segmentation (annotation ids {bare[:3]}, "
            f"...), which Detectron2 cannot mix with others; give them one (the box as a polygon), or leave them out"
        )


def check_data(cfg: DictConfig, splits: Sequence[str]) -> None:
    """Look for the registered data sets that a lazy config names, and for as many classes as the model has.

    Raises:
        FileNotFoundError, ValueError: naming the data set, the path and the remedy.
    """
    if "train" in splits:
        _check_shapely(cfg)
    for split in splits:
        names = OmegaConf.select(cfg, f"dataloader.{'train' if split == 'train' else 'test'}.dataset.names")
        for name in [names] if isinstance(names, str) else names or []:
            if name not in DatasetCatalog.list():
                raise ValueError(f"data set {name!r} is not registered; name a folder with --data-root DIR: {LAYOUT}")
            _check_registered(name, OmegaConf.select(cfg, "model.roi_heads.num_classes"))


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
