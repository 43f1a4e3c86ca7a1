"""Images that cannot be read while Detectron2 trains or tests: one line that names the file."""

import os
from collections.abc import Callable
from typing import Any

from detectron2.data import MapDataset
from PIL import Image
from torch.utils.data import DataLoader

from apt_dense.hosts.coco_picture_sizes import refuse_many_levels
from apt_dense.hosts.readable_images import REMEDY, DataError, check_whole


class NamingMapper:
    """A mapper of Detectron2, with an error that names the file. Pillow's does not.

    Args:
        mapper: reads the image of one of Detectron2's dictionaries.
    """

    def __init__(self, mapper: Callable[[dict], Any]) -> None:
        self.mapper = mapper

    def __call__(self, image: dict) -> Any:
        """Map a dictionary. Raises DataError if its file is missing, empty, cut off, damaged, no image or one of more
        than 8 bits that Pillow would make white of."""
        path = image.get("file_name", "an image without file_name")
        try:
            if os.path.isfile(path):  # not in remote storage
                check_whole(path)
                refuse_many_levels(path)
            return self.mapper(image)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} is not a readable image ({type(error).__name__}); {REMEDY}") from error


def name_unreadable_images(loader: DataLoader) -> DataLoader:
    """Let Detectron2's own loader read by a NamingMapper; any other loader stays."""
    if isinstance(getattr(loader, "dataset", None), MapDataset):
        loader.dataset._map_func = NamingMapper(loader.dataset._map_func)
    return loader
