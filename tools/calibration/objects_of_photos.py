"""Photos and labels of detection data in COCO's layout, which pycocotools reads."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from apt_dense.hosts.coco_ap_by_scale import SMALL

from calibration.coco_objects_as_labels import object_map
from calibration.labels_of_photos import Labels
from shared.photo_files import evenly_spread
from torchvision_detection.data import CocoSplit, load_split, read_image


class ObjectsOfPhotos(NamedTuple):
    """The objects of a data set in COCO's layout, by photo."""

    split: CocoSplit
    ids: dict[Path, int]

    def photo(self, path: Path) -> np.ndarray:
        """Read a photo (H, W, 3) uint8 RGB, turned as its annotations are. Raises ValueError, OSError."""
        return read_image(self.split, self.ids[path])

    def labels(self, path: Path) -> Labels:
        """Number the objects of a photo, as a scorer learns from them, and find the small ones (crowds excepted)."""
        number = self.ids[path]
        found = [entry for entry in self.split.coco.imgToAnns[number] if not entry.get("iscrowd")]
        boxes = np.array([entry["bbox"] for entry in found if entry["area"] <= SMALL], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # COCO's are x, y, width, height
        return Labels(object_map(self.split, number), boxes)


def read_objects_of(data: Path, most: int | None) -> ObjectsOfPhotos:
    """Read the training split of a data set; of more than ``most`` photos, so many at even distances.

    Raises:
        ValueError, OSError: as ``load_split``.
    """
    split = load_split(data, "train", every_class=False, masks=None)
    chosen = evenly_spread(split.image_ids, most)
    return ObjectsOfPhotos(split, {split.folder / split.coco.imgs[number]["file_name"]: number for number in chosen})
