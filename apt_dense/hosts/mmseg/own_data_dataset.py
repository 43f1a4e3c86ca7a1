"""A segmentation data set in folders of any usual names, with the classes that its classes.txt lists."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import DATASETS, TRANSFORMS
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations

from apt_dense.hosts.coco_picture_sizes import spread
from apt_dense.hosts.mmseg.classes_txt import EXPECTED, ClassTable, read_classes, read_keys, to_labels, unlisted
from apt_dense.hosts.mmseg.find_images_and_masks import find_folders, pair_files, picture_files
from apt_dense.hosts.readable_images import DataError

CLASSES = "classes.txt"
MOST = 50  # masks that are looked at for values that nobody listed


def read_own_classes(root: Path, split: str = "train") -> ClassTable:
    """Read the classes.txt of a data set; where there is none, the error says what the masks hold.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_classes` and :func:`find_folders`.
    """
    try:
        return read_classes(root / CLASSES)
    except FileNotFoundError:
        folder = root / find_folders(root, split)["data_prefix"]["seg_map_path"]
        masks = spread(sorted(picture_files(folder).values()), MOST)
        raise FileNotFoundError(
            f"{root / CLASSES} does not exist; write {EXPECTED}. {folder} holds {_describe(masks)}"
        ) from None


def _describe(masks: Iterable[Path]) -> str:
    """Describe the values in masks, as much as can be read."""
    values: set[int] = set()
    for path in masks:
        try:
            values |= set(np.unique(read_keys(path, has_colours=False)).tolist())
        except ValueError:
            return "masks with colours"
    shown = ", ".join(map(str, sorted(values)[:30])) + (", ..." if len(values) > 30 else "")
    return f"masks with the values {shown}" if values else "no masks"


@DATASETS.register_module()
class APTFolders(BaseSegDataset):
    """Images and masks of the same names in two folders, and the classes of a classes.txt.

    Args:
        data_root: folder with classes.txt.
        split: the folders "train", "val" or "test" are looked for unless ``data_prefix`` names them.
        **options: as for MMSegmentation's ``BaseSegDataset``. Suffixes may be any of ``SUFFIXES``.

    Raises:
        FileNotFoundError, ValueError: if a folder, a mask or classes.txt is missing or damaged.
    """

    def __init__(self, data_root: str, split: str = "train", **options: Any) -> None:
        self.table = read_own_classes(Path(data_root), split)
        if not options.get("data_prefix"):
            options |= find_folders(Path(data_root), split)
        palette = [list(colour) for colour in self.table.palette]
        options["metainfo"] = {"classes": self.table.names, "palette": palette, **(options.get("metainfo") or {})}
        super().__init__(data_root=data_root, **options)

    def load_data_list(self) -> list[dict]:
        """Pair images with masks."""
        listed = Path(self.ann_file) if self.ann_file else None
        pairs = pair_files(Path(self.data_prefix["img_path"]), Path(self.data_prefix["seg_map_path"]), listed)
        common = {"label_map": None, "reduce_zero_label": False, "classes_file": str(self.table.path)}
        return [{"img_path": str(a), "seg_map_path": str(b), "seg_fields": [], **common} for a, b in pairs]

    def check_files(self) -> None:
        """Raise unless every image has a mask, and classes.txt lists all values of a sample of the masks.

        Raises:
            FileNotFoundError, ValueError: naming all the values that are not listed, so that one look is enough.
        """
        missing: dict[int, Path] = {}
        for entry in spread(self.load_data_list(), MOST):
            path = Path(entry["seg_map_path"])
            for key in np.unique(read_keys(path, self.table.has_colours)).tolist():
                if key not in self.table.keys:
                    missing.setdefault(key, path)
        if missing:
            raise ValueError(unlisted(next(iter(missing.values())), sorted(missing), self.table))


@TRANSFORMS.register_module()
class APTLoadLabels(LoadAnnotations):
    """Pipeline step of ``APTFolders`` that reads a mask by classes.txt, in place of MMSegmentation's
    ``LoadAnnotations``.

    Raises:
        DataError: if the mask is damaged, of another size than its image, or holds values that are not listed.
    """

    def _load_seg_map(self, results: dict) -> None:
        path = Path(results["seg_map_path"])
        try:
            labels = to_labels(path, read_classes(Path(results["classes_file"])))
        except ValueError as error:
            raise DataError(str(error)) from error
        sizes = [tuple(results[key][:2]) for key in ("ori_shape", "img_shape") if key in results]
        if sizes and labels.shape not in sizes:
            raise DataError(
                f"{path}: the mask has height and width {labels.shape}, but its image has {sizes[0]}; make them equal"
            )
        results["gt_seg_map"] = labels
        results["seg_fields"].append("gt_seg_map")
